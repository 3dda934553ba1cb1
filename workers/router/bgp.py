"""The BGP half of the router worker: one gobgpd, attached to, brought to the desired state, and listened to.

Touches gobgpd through its client. The daemon outlives this process, and this process outlives the daemon: a running
one is adopted as it is, a fresh one is set up in an order that leaks nothing, one that dies is waited for while the
learned routes stay.

Listing the daemon costs O(everything) and happens on attach, at the periodic check and after a failure; a change in
the cluster is planned against what is believed to be there, and a learned route touches none of this.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kube_router.ipc.messages import Component, Node, Notice
from kube_router.workers.model import Failure, Outcome
from kube_router.workers.nodefacts import NodeFacts
from kube_router.workers.router import names
from kube_router.workers.router.bgpsessions import Sessions
from kube_router.workers.router.bgpstate import BgpState, Policies, Speaker
from kube_router.workers.router.desired import DesiredBgp
from kube_router.workers.router.gobgp.client import CONNECT_SECONDS, Client, GobgpError, connect
from kube_router.workers.router.gobgp.watch import Taken, Watch
from kube_router.workers.router.plan import Plan, ReplaceDaemon, StartSpeaker, advertisements, diff, headline, kept
from kube_router.workers.router.rib import Rib
from kube_router.workers.router.vips import Vips
from kube_router.workers.router.wish import wished
from kube_router.workers.runtime import Clock, SystemClock
from kube_router.workers.settings import Secrets, Settings

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 5.0
"""How long gobgpd may be away before that is worth a warning: it starts beside this worker, or is restarted."""
RECONNECT_FIRST_SECONDS, RECONNECT_MOST_SECONDS = 0.1, 1.0
LOOK_AGAIN_SECONDS = 0.5
"""While something is awaited that no event tells of."""
TABLE_SECONDS = 1.0
"""How long a restarted worker waits for the table of a daemon that it adopts, before it lists the paths itself."""
QUIET_SECONDS = 1.0
"""No event for so long, with all sessions up, means that the peers have sent what they have."""
STUCK_SECONDS = 5.0
"""A gobgpd that is there and does not answer is asked again so long after, for CONNECT_SECONDS."""


@dataclass(slots=True)
class _Work:
    """What one call has come to, until it becomes an `Outcome`."""

    writes: int = 0
    failures: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    observations: dict[str, tuple[float, ...]] = field(default_factory=dict)
    retries: list[float] = field(default_factory=list)


class Bgp:
    """One gobgpd as this worker sees it."""

    def __init__(self, settings: Settings, secrets: Secrets, clock: Clock | None = None) -> None:
        self._settings, self._secrets = settings, secrets
        self._clock = clock or SystemClock()
        self._path = Path(settings.run_dir) / names.SOCKET
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._client: Client | None = None
        self._watch: Watch | None = None
        self._believed: BgpState | None = None
        self._desired: DesiredBgp | None = None
        self._compared_with_keep = False
        self._failures: tuple[Failure, ...] = ()
        self._rib = Rib()
        self._received = 0
        self._complete = False
        self._settled = False
        self._restarted_for: Speaker | None = None
        self._stuck_until: float | None = None
        self._interrupted = False
        self._asn = 0
        self._sessions = Sessions(settings, self._clock)
        now = self._clock.monotonic()
        self._away_since, self._attempts, self._attempt_at = now, 0, now
        self._young_until = now
        self._heard_at = self._attached_at = now
        self._synced: float | None = None

    @property
    def learned(self) -> Mapping[str, str]:
        """Next hop by prefix of the routes learned from peers; a live view."""
        return self._rib.routes

    @property
    def hold_deletions(self) -> bool:
        """Whether ``learned`` may lack routes that exist: gobgpd is away, or its peers have not all spoken yet."""
        return not (self._complete and self._settled)

    def take_changed(self) -> frozenset[str]:
        """The prefixes of ``learned`` that changed since the last call."""
        return self._rib.take()

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """For the worker's loop: see `Controller.wakers`."""
        return {self._eventfd: self._drain}

    def close(self) -> None:
        """Let go of gobgpd, which goes on as it is."""
        self._detach()
        os.close(self._eventfd)

    def _drain(self) -> bool:
        try:
            os.eventfd_read(self._eventfd)
        except BlockingIOError:
            return False
        return True

    def listen(self) -> None:
        """Take in what the watch has read: `learned` is as new as it can be afterwards."""
        if self._watch is None:
            return
        now = self._clock.monotonic()
        taken = self._watch.take()
        self._rib.apply(taken.routes.values())
        self._received += taken.events
        if taken.table or taken.peers:
            self._heard_at = now
        self._note_progress(taken, now)
        if taken.peers or taken.table:
            self._sessions.heard(taken.peers)
        if taken.broken is not None:
            log.warning("gobgpd is gone (%s); learned routes stay", taken.broken)
            self._detach()

    def _note_progress(self, taken: Taken, now: float) -> None:
        if self._complete:
            return
        if taken.table:
            self._complete = True
            self._settle(now)

    def _settle(self, now: float) -> None:
        """Decide whether the peers have sent what they have. Only a young daemon leaves a doubt, and not for long."""
        if self._settled or not self._complete:
            return
        quiet = (
            self._believed is not None
            and now >= self._heard_at + QUIET_SECONDS
            and self._sessions.settled(len(self._believed.neighbors))
        )
        if quiet or now >= self._young_until:
            self._settled = True
            self._rib.confirmed()

    def _attach(self, work: _Work) -> bool:
        """Connect unless connected; False when gobgpd is not there."""
        if self._client is not None:
            return True
        now = self._clock.monotonic()
        if now >= self._attempt_at:
            try:
                self._client = connect(self._path)
            except GobgpError as error:
                delay = min(RECONNECT_FIRST_SECONDS * 2**self._attempts, RECONNECT_MOST_SECONDS)
                delay = STUCK_SECONDS if error.stuck else delay
                self._attempts, self._attempt_at = min(self._attempts + 1, 8), self._clock.monotonic() + delay
                if not error.gone:
                    self._failures = (Failure("bgp-daemon", f"gobgpd: {error}"),)
        if self._client is None:
            work.retries.append(max(0.01, self._attempt_at - now))
            if not self._failures and now >= self._away_since + PATIENCE_SECONDS:
                work.warnings.append(f"gobgpd does not answer on {self._path}; BGP waits, learned routes stay")
            return False
        young = self._settings.bgp_graceful_restart_time - self._client.daemon_age()
        self._young_until = now + max(0.0, young)
        self._attempts, self._attempt_at, self._heard_at, self._attached_at = 0, now, now, now
        self._failures = ()
        self._sessions.attached()
        log.info("attached to gobgpd (interface generation %d)", self._client.generation)
        return True

    def _detach(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._client is not None:
            self._client.close()
            self._away_since = self._clock.monotonic()
        self._client = self._watch = self._believed = self._stuck_until = None
        self._complete = self._settled = False
        self._sessions.forget()

    def _open_watch(self, client: Client) -> None:
        if self._watch is None:
            self._rib.restart()
            self._watch = Watch(client, self._eventfd)
            self._sessions.changed()

    def reconcile(
        self,
        own_node: Node,
        own: NodeFacts,
        nodes: Sequence[NodeFacts],
        vips: Vips,
        *,
        compare: bool,
        observe: bool,
        retry: bool,
        keep: bool,
    ) -> Outcome:
        """Bring gobgpd to the desired state.

        ``compare``: something that the desired state is made of may have changed. ``observe``: read the daemon again.
        ``retry``: try again what failed. ``keep``: take nothing away (the cluster state is stale). Without any of
        them this costs next to nothing.
        """
        work = _Work()
        self.listen()
        try:
            if self._attach(work) and self._answers(work):
                assert self._client is not None
                due = compare or observe or keep != self._compared_with_keep or self._watch is None
                self._read_table(self._client)
                if due or self._interrupted or (retry and self._failures):
                    self._compare(self._client, own_node, own, nodes, vips, observe, keep, work)
                self._look_at_sessions(self._client, work)
        except GobgpError as error:
            if error.stuck and self._watch is not None:
                self._stuck_until = self._clock.monotonic() + STUCK_SECONDS
                self._believed, self._interrupted = None, True  # what was being done may have been done
            else:
                self._detach()
            if not error.gone:
                self._failures = (Failure("bgp-daemon", f"gobgpd: {error}"),)
            work.retries.append(STUCK_SECONDS if error.stuck else RECONNECT_FIRST_SECONDS)
        return self._outcome(own, work)

    def _answers(self, work: _Work) -> bool:
        """False while a gobgpd that did not answer is left alone; raises `GobgpError` when it still does not.

        The event stream stays open: what gobgpd has done meanwhile comes in when it goes on.
        """
        if self._stuck_until is None or self._client is None:
            return True
        now = self._clock.monotonic()
        if now < self._stuck_until:
            work.retries.append(self._stuck_until - now)
            return False
        self._client.ask(CONNECT_SECONDS)
        self._stuck_until, self._failures = None, ()
        return True

    def _read_table(self, client: Client) -> None:
        """Begin to watch a daemon that is already running, and wait for its table: it says what originates here."""
        if self._watch is not None or client.speaker() is None:
            return
        self._open_watch(client)
        deadline = self._clock.monotonic() + TABLE_SECONDS
        while self._client is client and not self._complete and self._clock.monotonic() < deadline:
            select.select([self._eventfd], [], [], 0.05)
            self._drain()
            self.listen()
        if self._client is not client:
            raise GobgpError("gobgpd is gone", gone=True)

    def _compare(
        self,
        client: Client,
        own_node: Node,
        own: NodeFacts,
        nodes: Sequence[NodeFacts],
        vips: Vips,
        observe: bool,
        keep: bool,
        work: _Work,
    ) -> None:
        if observe or self._believed is None:
            actual = client.observe(dict(self._rib.local) if self._complete else None)
        else:
            actual = self._believed
        self._desired = self._wish(client, own_node, own, nodes, actual, vips)
        wanted = self._desired.state
        plan = diff(actual, wanted, keep=keep, learned=self._rib.routes if self._complete else None)
        if keep and actual.speaker is not None:
            wanted = kept(actual, wanted)
        self._compared_with_keep, self._interrupted = keep, False
        began = self._clock.monotonic()
        self._failures = self._refuse_loop(plan, actual) or self._apply(client, plan, wanted.policies, work)
        if plan.steps:
            work.observations["controller_bgp_internal_peers_sync_time"] = (self._clock.monotonic() - began,)
        self._asn = wanted.speaker.asn if wanted.speaker is not None else 0
        if wanted.speaker is None and began < self._attached_at + PATIENCE_SECONDS:
            work.retries.append(LOOK_AGAIN_SECONDS)
        replaced = any(isinstance(step, ReplaceDaemon) for step in plan.steps)
        self._believed = None if self._failures or replaced or wanted.speaker is None else wanted
        if replaced and not self._failures:
            self._detach()
            work.retries.append(RECONNECT_FIRST_SECONDS)
        elif (self._believed or actual).speaker is not None:
            self._open_watch(client)
        if not self._failures:
            self._synced = self._clock.time()

    def _wish(
        self, client: Client, node: Node, own: NodeFacts, nodes: Sequence[NodeFacts], actual: BgpState, vips: Vips
    ) -> DesiredBgp:
        """The desired state, as far as this daemon can have it."""
        return wished(
            client.generation,
            node,
            own,
            nodes,
            self._settings,
            self._secrets,
            actual,
            vips,
            patient=self._clock.monotonic() < self._attached_at + PATIENCE_SECONDS,
        )

    def _refuse_loop(self, plan: Plan, actual: BgpState) -> tuple[Failure, ...]:
        """A failure when gobgpd was restarted for the same wish before, and still reads back something else."""
        match plan.steps:
            case (ReplaceDaemon(desired=desired),) if desired == self._restarted_for:
                text = f"gobgpd was restarted for {desired}, but runs {actual.speaker}; it is left so"
                return (Failure("bgp-start", text),)
            case (ReplaceDaemon(desired=desired),):
                self._restarted_for = desired
        return ()

    def _apply(self, client: Client, plan: Plan, policies: Policies, work: _Work) -> tuple[Failure, ...]:
        plan = self._sessions.restarting(plan)
        for step in plan.steps:
            loud = isinstance(step, ReplaceDaemon)
            log.log(logging.WARNING if loud else logging.INFO, "%s", headline(step))
        if any(isinstance(step, StartSpeaker) for step in plan.steps):
            # All that the daemon will know from here on it learns anew.
            self._settled = False
        done, failures = client.apply(plan)
        work.writes += done
        if plan.steps:
            self._sessions.applied(plan, failed=bool(failures))
        for kind, number in advertisements(plan, policies).items():
            work.counters[f'controller_bgp_advertisements_sent{{type="{kind}"}}'] = number
        return failures

    def _look_at_sessions(self, client: Client, work: _Work) -> None:
        if self._client is None or self._watch is None:
            return
        neighbors = self._believed.neighbors if self._believed is not None else {}
        again = self._sessions.look(client, self._asn, neighbors)
        self._settle(self._clock.monotonic())
        work.retries.append(again)
        if self.hold_deletions:
            work.retries.append(LOOK_AGAIN_SECONDS)

    def _outcome(self, own: NodeFacts, work: _Work) -> Outcome:
        work.counters["controller_bgp_advertisements_received"] = self._received
        self._received = 0
        problems = self._desired.problems if self._desired is not None else ()
        notices = [
            Notice(worker="router", kind="Node", name=own.name, uid=own.uid, reason=problem.reason, text=problem.text)
            for problem in problems
        ]
        return Outcome(
            writes=work.writes,
            failures=self._failures,
            warnings=(
                *work.warnings,
                *dict.fromkeys(problem.text for problem in problems),
                *self._sessions.lines,
            ),
            notices=tuple(notices),
            counters=work.counters,
            observations=work.observations,
            components=(
                Component(
                    name="NetworkRoutesController", period=self._settings.routes_sync_period, last_success=self._synced
                ),
            ),
            sessions=self._sessions.seen,
            retry_after=min(work.retries) if work.retries else None,
        )
