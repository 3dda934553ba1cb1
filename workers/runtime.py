"""The loop that every worker runs: receive the cluster, reconcile at a bounded rate, beat.

Touches sockets (through ``ipc``), signals and the clock; everything else is the controller's. A controller is the
worker's own part: it holds the pure core and the drivers. The loop gives it the newest cluster state and a trigger and
gets an `Outcome` back; it never looks inside.

When a reconciliation happens (all times monotonic seconds):

- at the first usable snapshot (in sync, or stale from disk: law 1), and never before;
- ``min_interval`` after the first of a burst of cluster changes or driver wake-ups (debounce with a bound: a steady
  stream of events delays nothing beyond it), or after the cluster has come in sync (what was kept may now go); with
  ``at_once`` the first of them is not waited with, and the interval is the least between two;
- ``retry_first`` after a failure, doubling up to ``retry_most``, with jitter; a cluster change does not wait for it;
- ``period`` after the last one, as the background check for drift.

An exception out of ``reconcile`` is a failure of phase ``internal``: logged with its trace, counted, retried; the
worker lives on, because state in the kernel is worth more than a clean exit.
"""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from kube_router.ipc.channels import HeartbeatSender, NoticeSender, Pollable, Poller, shut_down
from kube_router.ipc.codec import NO_VIEWS, View
from kube_router.ipc.messages import Heartbeat, Kind
from kube_router.ipc.replica import Changes, Cluster, Replica
from kube_router.workers import logs
from kube_router.workers.model import Failure, Outcome
from kube_router.workers.settings import Settings, load_settings

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
WARNINGS_SHOWN, WARNING_LENGTH = 100, 1000
NOTICES_REMEMBERED = 1000
"""A notice is not sent again while it is among so many of the last ones."""


class Clock(Protocol):
    """Time as the loop sees it; injected, so that tests decide it."""

    def monotonic(self) -> float: ...

    def time(self) -> float: ...


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()


@dataclass(frozen=True, slots=True)
class Trigger:
    """Why a reconciliation happens.

    ``start``: the first one of this process; observe the kernel. ``period``: the background check; observe again.
    ``woken``: a driver saw a foreign change. ``confirmed``: the cluster was stale and has come in sync since the last
    call that did not fail: what was only kept because of that may now be deleted, also when ``changes`` is empty.
    ``changes``: what differs from the cluster of the last call that did not fail, by kind and key; what changed and
    changed back around a failed call is there with old equal to new, as nobody knows what that call left behind.
    ``seen``: when the first of ``changes`` came in, in monotonic seconds; None without changes.
    """

    start: bool = False
    period: bool = False
    woken: bool = False
    retry: bool = False
    confirmed: bool = False
    changes: Changes = field(default_factory=dict)
    seen: float | None = None

    @property
    def observe(self) -> bool:
        """Whether the kernel must be read again instead of trusting what was last applied."""
        return self.start or self.period or self.woken or self.retry or self.confirmed


class Controller(Protocol):
    """A worker's own part."""

    name: str
    kinds: tuple[Kind, ...]
    period: float

    def reconcile(self, cluster: Cluster, trigger: Trigger) -> Outcome:
        """Bring kernel and daemons to what ``cluster`` asks for. Blocks for at most a few seconds."""
        ...

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """File descriptors to watch, each with a function that drains it and tells whether to reconcile (``woken``)."""
        ...

    def close(self) -> None:
        """Release sockets; leave kernel state as it is."""
        ...


@dataclass(frozen=True, slots=True)
class Pace:
    """Bounds on how often a controller runs, in seconds; ``beat`` is the heartbeat interval.

    ``at_once``: a change after a quiet ``min_interval`` is not waited with; only what follows it closely is gathered.
    For a controller whose changes are small, and for whom the wait would be most of the time that one takes.
    """

    min_interval: float = 0.01
    at_once: bool = False
    retry_first: float = 1.0
    retry_most: float = 60.0
    beat: float = HEARTBEAT_SECONDS


class Schedule:
    """When the next reconciliation is due. Pure: every method takes the time."""

    def __init__(self, pace: Pace, period: float, jitter: Callable[[], float]) -> None:
        """``jitter`` returns a number in [0, 1) and spreads the retries."""
        self._pace, self._period, self._jitter = pace, period, jitter
        self._dirty_at: float | None = None
        self._ended_at = float("-inf")
        self._retry_at: float | None = None
        self._period_at: float | None = None
        self._retries = 0

    def dirty(self, now: float) -> None:
        """Something changed; due ``min_interval`` after the *first* change of a burst, or after the last turn's end."""
        if self._dirty_at is None:
            since = self._ended_at if self._pace.at_once else now
            self._dirty_at = max(now, since + self._pace.min_interval)

    def done(self, now: float, failed: bool, again_after: float | None) -> None:
        """A reconciliation ended at ``now``.

        One that fails before the retry of an earlier failure is due leaves that retry where it is: a stream of changes
        neither delays it nor doubles its interval.
        """
        self._dirty_at, self._ended_at = None, now
        self._period_at = now + self._period
        if not failed:
            self._retries = 0
            self._retry_at = None if again_after is None else now + again_after
        elif self._retries == 0 or self._retry_at is None or self._retry_at <= now:
            delay = min(self._pace.retry_first * 2**self._retries, self._pace.retry_most)
            self._retries = min(self._retries + 1, 16)
            self._retry_at = now + delay * (0.75 + 0.5 * self._jitter())

    def due(self, now: float) -> tuple[bool, bool, bool]:
        """(dirty, retry, period) that are due now."""
        return tuple(at is not None and at <= now for at in (self._dirty_at, self._retry_at, self._period_at))  # type: ignore[return-value]

    def wait(self, now: float) -> float:
        """Seconds until something is due; infinity when nothing is planned."""
        planned = [at for at in (self._dirty_at, self._retry_at, self._period_at) if at is not None]
        return max(0.0, min(planned) - now) if planned else float("inf")


class Loop:
    """One worker's loop; `step` is one turn, so that tests can turn it by hand."""

    def __init__(
        self,
        controller: Controller,
        replica: Replica,
        heartbeats: HeartbeatSender,
        notices: NoticeSender,
        *,
        clock: Clock | None = None,
        pace: Pace | None = None,
        jitter: Callable[[], float] = random.random,
        wait: Callable[[Iterable[Pollable], float], set[Pollable]] = Poller.wait,
        alarm: int | None = None,
    ) -> None:
        """``alarm``: a descriptor that becomes readable when `stopping` has been set; see `run`.

        Clock, ``jitter`` and ``wait`` are parameters so that a test can decide the time.
        """
        self.controller, self.replica = controller, replica
        self._heartbeats, self._notices = heartbeats, notices
        self._clock, self._pace, self._wait = clock or SystemClock(), pace or Pace(), wait
        self._schedule = Schedule(self._pace, controller.period, jitter)
        self._pending: Changes = {}
        self._seen: float | None = None
        self._alarm = alarm
        self._woken = False
        self._confirmed = False
        self._in_sync = False
        self._ran = False
        self._beat_at = float("-inf")
        self._told: dict[tuple[str, ...], None] = {}
        self._said: set[str] = set()
        self.stopping = False
        self.beat = Heartbeat(
            worker=controller.name,
            pid=os.getpid(),
            started=self._clock.time(),
            sent=self._clock.time(),
            privileges=privileges(),
        )

    def run(self) -> None:
        """Turn until `stopping` is set (by SIGTERM or SIGINT)."""
        while not self.stopping:
            self.step()

    def step(self) -> None:
        """Wait for input or the next due time, take the input, reconcile if due, beat if due."""
        wakers = self.controller.wakers()
        now = self._clock.monotonic()
        due = self._schedule.wait(now) if self.replica.usable else float("inf")
        timeout = min(due, self.replica.wait(now), max(0.0, self._beat_at - now))
        alarm = () if self._alarm is None else (self._alarm,)
        ready = self._wait([*self.replica.sockets, *wakers, *alarm], timeout)
        if self._alarm in ready:
            os.read(self._alarm, 4096)
        if self.stopping:
            return
        for descriptor, drain in wakers.items():
            if descriptor in ready and drain():
                self._woken = True
                self._schedule.dirty(self._clock.monotonic())
        self._take(self.replica.receive(self._clock.monotonic()))
        now = self._clock.monotonic()
        dirty, retry, period = self._schedule.due(now)
        if self.replica.usable and (dirty or retry or period or not self._ran):
            self._reconcile(retry=retry, period=period)
        if self._clock.monotonic() >= self._beat_at:
            self.send_heartbeat()

    def _take(self, changes: Changes) -> None:
        in_sync = self.replica.cluster.state.in_sync
        if in_sync and not self._in_sync and self._ran:
            self._confirmed = True
            self._schedule.dirty(self._clock.monotonic())
        self._in_sync = in_sync
        if not changes:
            return
        if self._seen is None:
            self._seen = self._clock.monotonic()
        for kind, by_key in changes.items():
            pending = self._pending.setdefault(kind, {})
            for key, (old, new) in by_key.items():
                first_old = pending[key][0] if key in pending else old
                pending[key] = (first_old, new)
        self._schedule.dirty(self._clock.monotonic())

    def _reconcile(self, *, retry: bool, period: bool) -> None:
        trigger = Trigger(
            start=not self._ran,
            period=period,
            woken=self._woken,
            retry=retry,
            confirmed=self._confirmed,
            changes=self._pending,
            seen=self._seen,
        )
        began = self._clock.monotonic()
        try:
            outcome = self.controller.reconcile(self.replica.cluster, trigger)
        except Exception as error:  # the last barrier: the loop must live on
            log.exception("reconciliation failed with an unexpected error")
            outcome = Outcome(failures=(Failure("internal", f"{type(error).__name__}: {error}"),))
        ended = self._clock.monotonic()
        failed = bool(outcome.failures)
        if not failed:
            self._pending = {}
            self._seen = None
            self._woken = self._confirmed = False
        self._ran = True
        self._schedule.done(ended, failed, outcome.retry_after)
        self._report(outcome, ended - began)
        self.send_heartbeat()

    def _report(self, outcome: Outcome, seconds: float) -> None:
        failures = {*map(str, outcome.failures)}
        lines = failures | set(outcome.warnings)
        for line in sorted(lines - self._said):
            (log.error if line in failures else log.warning)("%s", line)
        self._said = lines
        for notice in outcome.notices:
            identity = (notice.kind, notice.namespace, notice.name, notice.uid, notice.reason, notice.text)
            if identity not in self._told and self._notices.send(notice):
                self._told[identity] = None
                if len(self._told) > NOTICES_REMEMBERED:
                    del self._told[next(iter(self._told))]
        errors = dict(self.beat.errors)
        for failure in outcome.failures:
            errors[failure.phase] = errors.get(failure.phase, 0) + 1
        counters = dict(self.beat.counters)
        for name, value in outcome.counters.items():
            counters[name] = counters.get(name, 0.0) + value
        observations = {name: tuple(values) for name, values in self.beat.observations.items()}
        for name, values in outcome.observations.items():
            observations[name] = (*observations.get(name, ()), *values)[-1000:]
        self.beat = replace_struct(
            self.beat,
            last_sync=self.beat.last_sync if outcome.failures else self._clock.time(),
            sync_seconds=seconds,
            syncs=self.beat.syncs + 1,
            writes=self.beat.writes + outcome.writes,
            pending=len(outcome.failures),
            errors=errors,
            warnings=shortened((*map(str, outcome.failures), *outcome.warnings)),
            counts=dict(outcome.counts),
            counters=counters,
            observations=observations,
            components=outcome.components,
            sessions=outcome.sessions,
        )

    def send_heartbeat(self) -> None:
        """Send the newest heartbeat; observations are sent once."""
        self.beat = replace_struct(
            self.beat,
            sent=self._clock.time(),
            in_sync=self.replica.cluster.state.in_sync,
            stale=self.replica.cluster.state.stale,
            dropped=self.replica.dropped,
            source=self.replica.cluster.state,
            rss=resident_bytes(),
        )
        if self._heartbeats.send(self.beat):
            self.beat = replace_struct(self.beat, observations={})
        self._beat_at = self._clock.monotonic() + self._pace.beat


def replace_struct(beat: Heartbeat, **changes: object) -> Heartbeat:
    """A copy of a heartbeat with some fields changed."""
    return msgspec.structs.replace(beat, **changes)


def shortened(lines: tuple[str, ...]) -> tuple[str, ...]:
    """Not more lines, and no longer ones, than a heartbeat can carry; the log has them all."""
    shown = tuple(line[:WARNING_LENGTH] for line in lines[:WARNINGS_SHOWN])
    more = len(lines) - len(shown)
    return (*shown, f"and {more} more, see the log") if more else shown


def resident_bytes() -> int:
    """Resident memory of this process in bytes, from ``/proc/self/statm``."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def privileges() -> str:
    """What this process may do, in words: user, effective capabilities, ``no_new_privs`` (from proc(5) status)."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value.split()
    mask = int(fields["CapEff"][0], 16)
    names = [name for bit, name in CAPABILITY_BITS.items() if mask >> bit & 1]
    others = mask & ~sum(1 << bit for bit in CAPABILITY_BITS)
    text = ",".join(names) or "none"
    if others:
        text += f"+{others.bit_count()} more"
    return f"uid={fields['Uid'][1]} caps={text} no_new_privs={fields['NoNewPrivs'][0]}"


CAPABILITY_BITS = {
    1: "dac_override",
    5: "kill",
    10: "net_bind_service",
    12: "net_admin",
    13: "net_raw",
    16: "sys_module",
    21: "sys_admin",
}
"""The capabilities that a worker may hold (linux/capability.h); any other is counted as "more"."""


def run(controller: Controller, pace: Pace | None = None, views: Mapping[Kind, View] = NO_VIEWS) -> int:
    """Run ``controller`` until SIGTERM or SIGINT; returns the exit status of the process. ``views``: see `Replica`.

    The working directory is the run directory's ``ipc`` folder: every socket is found there by its short name.
    """
    # A signal's handler only sets a flag, and the poll goes on afterwards (PEP 475): the wake-up descriptor ends it.
    alarm, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    replica = Replica(controller.name, controller.kinds, views=views)
    loop = Loop(controller, replica, HeartbeatSender(), NoticeSender(), pace=pace, alarm=alarm)

    def stop(signum: int, frame: object) -> None:
        loop.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    log.info("started: %s", loop.beat.privileges)
    try:
        loop.run()
    finally:
        controller.close()
        shut_down()
    log.info("stopped")
    sys.stdout.flush()
    return 0


Views = Callable[[Settings], Mapping[Kind, View]]


def main(
    name: str, make: Callable[[Settings], Controller], pace: Pace | None = None, views: Views | None = None
) -> int:
    """What every worker process does: read the settings, set up its log, make its controller, `run`.

    A controller that cannot be made (a socket that the kernel refuses, for want of a capability) is one line in the log
    and status 1: the supervisor tries again, with back-off.
    """
    settings = load_settings()
    logs.configure(name, settings)
    try:
        controller = make(settings)
    except OSError as error:
        log.error("cannot start: %s (%s)", error, privileges())
        return 1
    return run(controller, pace, views(settings) if views is not None else NO_VIEWS)
