"""When the agent is healthy: upstream's rule for each component, and a bound for workers that say nothing.

Pure: heartbeats and the table of processes in, a `Verdict` out; the time (monotonic seconds) is a parameter.

- A component is overdue when its last *successful* sync is older than its period, plus the time that its first one
  took, plus 1.5 s. Nothing is expected before a worker has the cluster's state; a restart does not turn the clock back.
- A worker that should run is silent when no heartbeat has come for `SILENCE` seconds, whether it hangs, is stopped or
  fails at each start; a program without heartbeats (gobgpd) when it has not been running for as long.
- What is degraded, the lost API server above all, is told and never fails.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kube_router.ipc.messages import Heartbeat, SourceState
from kube_router.workers.health.processes import ProcessTable

GRACE = 1.5
SILENCE = 20.0
MUTE = frozenset(("gobgpd", "reload"))
"""Programs that send no heartbeats."""
MYSELF = "health"


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reasons``: one line each, why it is not healthy; ``degraded``: what should be mended, and fails nothing."""

    reasons: tuple[str, ...]
    degraded: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether ``/healthz`` answers with success."""
        return not self.reasons

    @property
    def lines(self) -> tuple[str, ...]:
        """All that there is to tell, the worst first."""
        return self.reasons + self.degraded


@dataclass(slots=True)
class _Component:
    """``success``: when it last succeeded; ``first``: how long the first success took; both None before it."""

    success: float | None = None
    first: float | None = None


@dataclass(slots=True)
class _Worker:
    beat: Heartbeat
    arrived: float
    synced: float | None = None
    components: dict[str, _Component] = field(default_factory=dict)


class Board:
    """The newest heartbeat of each worker, and what must be remembered of the older ones."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._workers: dict[str, _Worker] = {}
        self._last_up: dict[str, float] = {}

    @property
    def heartbeats(self) -> tuple[Heartbeat, ...]:
        """The newest of each worker, in the order of their first ones."""
        return tuple(worker.beat for worker in self._workers.values())

    def take(self, beat: Heartbeat, now: float) -> None:
        """A heartbeat has come."""
        worker = self._workers.get(beat.worker)
        if worker is None:
            worker = self._workers[beat.worker] = _Worker(beat, now)
        worker.beat, worker.arrived = beat, now
        if worker.synced is None and (beat.in_sync or beat.stale):
            worker.synced = now
        for component in beat.components:
            known = worker.components.setdefault(component.name, _Component())
            if component.last_success is None:
                continue
            # By the worker's own clock the age is right also when that clock has been set since.
            known.success = max(known.success or 0.0, now - max(0.0, beat.sent - component.last_success))
            if known.first is None:
                known.first = max(0.0, known.success - (worker.synced if worker.synced is not None else now))

    def judge(self, table: ProcessTable, now: float) -> Verdict:
        """How the agent stands."""
        reasons = [*self._not_running(table, now), *self._silent(table, now), *self._overdue(now)]
        return Verdict(tuple(reasons), tuple(self._degraded()))

    def _not_running(self, table: ProcessTable, now: float) -> list[str]:
        lines = []
        for name, process in table.programs.items():
            if process.up:
                self._last_up[name] = now
            down = now - self._last_up.get(name, self._began)
            if name in MUTE and down > SILENCE:
                why = f": {process.reason}" if process.reason else ""
                lines.append(f"{name}: not running for {down:.0f} s ({process.state or 'never started'}{why})")
        return lines

    def _silent(self, table: ProcessTable, now: float) -> list[str]:
        expected = [name for name in table.programs if name not in MUTE and name != MYSELF]
        lines = []
        for name in dict.fromkeys([*expected, *self._workers]):
            worker = self._workers.get(name)
            silent = now - (worker.arrived if worker else self._began)
            if silent > SILENCE:
                process = table.programs.get(name)
                state = f" ({process.state}{': ' + process.reason if process.reason else ''})" if process else ""
                lines.append(f"{name}: no heartbeat for {silent:.0f} s{state}")
        return lines

    def _overdue(self, now: float) -> list[str]:
        lines = []
        for worker in self._workers.values():
            if worker.synced is None:
                continue
            for component in worker.beat.components:
                known = worker.components[component.name]
                age = now - (known.success if known.success is not None else worker.synced)
                if age > component.period + (known.first or 0.0) + GRACE:
                    text = f"last successful sync {age:.0f} s ago" if known.success else f"no success for {age:.0f} s"
                    due = f"due every {component.period:g} s"
                    lines.append(f"{worker.beat.worker}: {component.name}: {text}, {due}")
        return lines

    def _degraded(self) -> list[str]:
        lines = []
        if (source := self.source) is not None:
            if source.stale:
                lines.append(f"{source.source}: not confirmed: the state is that of the last snapshot on disk")
            lines += [f"{source.source}: {text}" for text in source.degraded]
        for name, worker in self._workers.items():
            if worker.synced is None:
                lines.append(f"{name}: waits for the first complete state of the cluster")
            lines += [f"{name}: {warning}" for warning in worker.beat.warnings]
        return list(dict.fromkeys(lines))

    @property
    def source(self) -> SourceState | None:
        """How the source of the cluster's state stands: what the watcher says, else the newest that another says."""
        told = [worker for worker in self._workers.values() if worker.beat.source is not None]
        told.sort(key=lambda worker: (worker.beat.worker == "watcher", worker.arrived))
        return told[-1].beat.source if told else None


def healthz_body(verdict: Verdict) -> tuple[int, str]:
    """(status, body) of ``/healthz``: upstream's first line, then a line for each thing to mend."""
    first = "OK" if verdict.healthy else "Unhealthy"
    return (200 if verdict.healthy else 500), "\n".join([first, *verdict.lines]) + "\n"
