"""The sessions of one gobgpd as the router worker follows them: how they stand, and what is done about it.

Touches gobgpd through its client, and the memory for graceful restarts. Looking costs one listing of the peers, after
a change of a session and some seconds after routes have changed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kube_router.ipc.messages import Session
from kube_router.workers.router.bgpstate import Neighbor
from kube_router.workers.router.gobgp.client import Client
from kube_router.workers.router.graceful import GracefulMemory
from kube_router.workers.router.plan import AddNeighbor, Plan, ReplaceNeighbor, StartSpeaker
from kube_router.workers.router.sessions import Limits, PeerStatus, complaints
from kube_router.workers.runtime import Clock
from kube_router.workers.settings import Settings

log = logging.getLogger(__name__)

ROUTES_SECONDS = 5.0
"""Received routes are counted again so long after the last change."""
ALIVE_SECONDS = 10.0
"""A gobgpd of which nothing was heard for so long is asked whether it still answers."""


class Sessions:
    """What is known of the sessions; forgotten when gobgpd goes, but for what the next one must know."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings, self._clock = settings, clock
        self.seen: tuple[Session, ...] = ()
        self.lines: tuple[str, ...] = ()
        self._statuses: tuple[PeerStatus, ...] = ()
        self._due: float | None = None
        self._asked_at = 0.0
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
        self.seen, self.lines, self._statuses, self._due = (), (), (), None
        self._limits = Limits()

    def changed(self, *, routes_only: bool = False) -> None:
        """A session has changed (look now), or only what peers have sent (look when that is over)."""
        now = self._clock.monotonic()
        self._due = min(self._due or float("inf"), now + ROUTES_SECONDS) if routes_only else now

    def settled(self, wanted: int) -> bool:
        """Whether all ``wanted`` sessions are up, and no peer has yet to say that it has sent everything."""
        up = sum(status.established for status in self._statuses)
        return up >= wanted and not any(status.established and status.waited_for for status in self._statuses)

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

    def applied(self, plan: Plan) -> None:
        """Sessions have been begun anew: none of them is a return any more."""
        begun = {step.neighbor.address for step in plan.steps if isinstance(step, AddNeighbor)}
        begun |= {step.desired.address for step in plan.steps if isinstance(step, ReplaceNeighbor)}
        self._returning -= begun

    def look(self, client: Client, own_asn: int, neighbors: Mapping[str, Neighbor]) -> float:
        """Look at the sessions if that is due, and act; returns in how many seconds to call again.

        Raises `GobgpError` when gobgpd is gone or does not answer.
        """
        now = self._clock.monotonic()
        if self._due is not None and now >= self._due:
            self._due, self._asked_at = None, now
            self.seen, self._statuses = client.look(own_asn)
            self._limits.see(self._statuses, now)
            self._remember(neighbors, now)
        elif now >= self._asked_at + ALIVE_SECONDS:
            client.ask()
            self._asked_at = now
            self._memory.see(self._memory.peers, now)
        for address in self._limits.due(now):
            log.info("peer %s: tried again after it went over its prefix limit", address)
            client.enable(address)
            self._due = now
        self.lines = (*complaints(self._statuses, neighbors), *self._limits.lines(neighbors))
        times = (self._due, self._limits.next_at(), self._asked_at + ALIVE_SECONDS)
        return max(0.01, min(time for time in times if time is not None) - now)

    def _remember(self, neighbors: Mapping[str, Neighbor], now: float) -> None:
        """Peers whose session is down are remembered as they were: they may come back, or we may."""
        known = {status.address for status in self._statuses if status.established}
        graceful = {status.address for status in self._statuses if status.established and status.graceful}
        away = {address for address in self._memory.peers - known if address in neighbors}
        self._memory.see(frozenset(graceful | away), now)
