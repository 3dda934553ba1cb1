"""The sessions of one gobgpd as the router worker follows them: how they stand, and what is done about it.

Touches gobgpd through its client, and the memory for graceful restarts. A peer is listed by itself when its session has
changed, all of them some seconds after routes have changed, and the less often the more there are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from kube_router.ipc.messages import Session
from kube_router.workers.router.bgpstate import Neighbor
from kube_router.workers.router.gobgp.client import Client
from kube_router.workers.router.graceful import GracefulMemory
from kube_router.workers.router.plan import AddNeighbor, Plan, RemoveNeighbor, ReplaceNeighbor, StartSpeaker
from kube_router.workers.router.sessionbook import PeerReport, SessionBook
from kube_router.workers.router.sessions import Limits, PeerStatus, complaints
from kube_router.workers.runtime import Clock
from kube_router.workers.settings import Settings

log = logging.getLogger(__name__)

ROUTES_SECONDS = 5.0
"""Received routes are counted again so long after the last change."""
LISTING_SHARE = 200
"""So many times what the last listing of all peers took passes before the next, as between two counts of what is told
to a peer: neither takes more than half a percent of this process or of gobgpd."""
LISTED_ONE_BY_ONE = 16
"""More changed peers than this are listed with all others in one call."""
ALIVE_SECONDS = 10.0
"""A gobgpd of which nothing was heard for so long is asked whether it still answers."""


class Sessions:
    """What is known of the sessions; forgotten when gobgpd goes, but for what the next one must know."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings, self._clock = settings, clock
        self.seen: tuple[Session, ...] = ()
        self.lines: tuple[str, ...] = ()
        self._book = SessionBook()
        self._statuses: dict[str, PeerStatus] = {}
        self._due: float | None = None
        self._asked_at = self._count_at = self._cost = 0.0
        self._complained: tuple[object, object] | None = None
        self._complaints: tuple[str, ...] = ()
        self._limits = Limits()
        self._returning: frozenset[str] = frozenset()
        self._returning_until = 0.0
        self._memory = GracefulMemory(
            Path(settings.state_dir),
            enabled=settings.bgp_graceful_restart,
            rewrite_seconds=settings.bgp_graceful_restart_time / 3,
        )

    def attached(self) -> None:
        """A gobgpd answers."""
        self._asked_at = self._clock.monotonic()

    def forget(self) -> None:
        """gobgpd is gone, or no longer listened to."""
        self.seen, self.lines, self._statuses, self._due = (), (), {}, None
        self._limits = Limits()
        self._book.restart()

    def changed(self) -> None:
        """Anything may have changed: look at all of them now."""
        self._due = self._clock.monotonic()

    def heard(self, peers: Iterable[str]) -> None:
        """These sessions have changed (look at them now), and perhaps what peers have sent (look when that is over)."""
        self._book.touched(peers)
        after = max(ROUTES_SECONDS, self._cost * LISTING_SHARE)
        self._due = min(self._due or float("inf"), self._clock.monotonic() + after)

    def settled(self, wanted: int) -> bool:
        """Whether all ``wanted`` sessions are up, and no peer has yet to say that it has sent everything."""
        up = [status for status in self._statuses.values() if status.established]
        return len(up) >= wanted and not any(status.waited_for for status in up)

    def restarting(self, plan: Plan) -> Plan:
        """``plan``, in which those peers are told of a restart that wait for us to come back from one."""
        now = self._clock.monotonic()
        if any(isinstance(step, StartSpeaker) for step in plan.steps):
            self._returning = self._memory.returning(now, self._settings.bgp_graceful_restart_time)
            self._returning_until = now + self._settings.bgp_graceful_restart_time
            if self._returning:
                log.info("gobgpd comes back to %d peers that keep our routes", len(self._returning))
        if not self._returning or now > self._returning_until:
            return plan
        return Plan(tuple(self._told(step) if isinstance(step, AddNeighbor) else step for step in plan.steps))

    def _told(self, step: AddNeighbor) -> AddNeighbor:
        graceful = step.neighbor.graceful_restart is not None and step.neighbor.address in self._returning
        return replace(step, restarting=True) if graceful else step

    def applied(self, plan: Plan, *, failed: bool) -> None:
        """Sessions have been begun anew: none of them is a return any more. What peers are told may have changed."""
        begun = {step.neighbor.address for step in plan.steps if isinstance(step, AddNeighbor)}
        begun |= {step.desired.address for step in plan.steps if isinstance(step, ReplaceNeighbor)}
        if not failed:
            self._returning -= begun
        self._book.touched(begun)
        self._book.touched(step.neighbor.address for step in plan.steps if isinstance(step, RemoveNeighbor))
        self._book.count_again()

    def look(self, client: Client, own_asn: int, neighbors: Mapping[str, Neighbor]) -> float:
        """Look at the sessions if that is due, and act; returns in how many seconds to call again.

        Raises `GobgpError` when gobgpd is gone or does not answer.
        """
        now = self._clock.monotonic()
        listed = self._list(client, now)
        if listed:
            self._asked_at = now
            self._limits.see(self._statuses.values(), now)
            self._remember(neighbors, now)
        elif now >= self._asked_at + ALIVE_SECONDS:
            client.ask()
            self._asked_at = now
            self._memory.see(self._memory.peers, now)
        self._count(client)
        for address in self._limits.due(now):
            log.info("peer %s: tried again after it went over its prefix limit", address)
            client.enable(address)
            self._book.touched((address,))
        self.seen = self._book.view(own_asn)
        self._complain(neighbors)
        times = [
            time for time in (self._due, self._limits.next_at(), self._asked_at + ALIVE_SECONDS) if time is not None
        ]
        times += [now] if self._book.unlisted else []
        times += [self._count_at] if self._book.uncounted else []
        return max(0.01, min(times) - now)

    def _list(self, client: Client, now: float) -> bool:
        """List what has changed by itself, or all peers when that is due; returns whether anything was."""
        unlisted = self._book.unlisted
        if len(unlisted) > LISTED_ONE_BY_ONE or (self._due is not None and now >= self._due):
            self._take(client.peers())
            self._due, self._cost = None, self._clock.monotonic() - now
            return True
        for address in unlisted:
            self._take(client.peers(address), address)
        return bool(unlisted)

    def _take(self, reports: tuple[PeerReport, ...], only: str = "") -> None:
        self._book.listed(reports, self._clock.time(), only=only)
        if only:
            self._statuses.pop(only, None)
        else:
            self._statuses.clear()
        self._statuses.update((report.address, report.status) for report in reports)

    def _count(self, client: Client) -> None:
        """Ask for one session how many prefixes it is told, if that is not known and not too soon."""
        began = self._clock.monotonic()
        if began < self._count_at or (address := self._book.take_uncounted()) is None:
            return
        self._take(client.peers(address, count_advertised=True), address)
        ended = self._clock.monotonic()
        self._count_at = ended + (ended - began) * LISTING_SHARE

    def _complain(self, neighbors: Mapping[str, Neighbor]) -> None:
        """Renew the lines, unless what they are made of is what it was: a learned route must not cost a look at all."""
        if self._complained is None or self._complained[0] is not self.seen or self._complained[1] is not neighbors:
            self._complained = self.seen, neighbors
            self._complaints = tuple(complaints(self._statuses.values(), neighbors))
        self.lines = (*self._complaints, *self._limits.lines(neighbors))

    def _remember(self, neighbors: Mapping[str, Neighbor], now: float) -> None:
        """Peers whose session is down are remembered as they were: they may come back, or we may."""
        known = {status.address for status in self._statuses.values() if status.established}
        graceful = {status.address for status in self._statuses.values() if status.established and status.graceful}
        away = {address for address in self._memory.peers - known if address in neighbors}
        self._memory.see(frozenset(graceful | away), now)
