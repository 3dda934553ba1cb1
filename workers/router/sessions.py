"""How sessions stand, what is wrong with those that are up, and when one that has gone over its limit is tried again.

Pure: statuses and times in, lines and decisions out. What gobgpd says of a session is read in ``gobgp/neighbors.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from kube_router.workers.model import Family
from kube_router.workers.router.bgpstate import Neighbor

LIMIT_FIRST_SECONDS, LIMIT_MOST_SECONDS = 60.0, 900.0
"""A peer over its prefix limit is tried again after 1, 2, 4, 8 and then every 15 minutes."""
LIMIT_FORGIVEN_SECONDS = 1800.0
"""A peer that has kept its limit for so long begins with the shortest wait again."""


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One session as gobgpd holds it.

    ``limited``: gobgpd has ended it because the peer sent more prefixes than it may, and does not try again by itself.
    ``families`` and ``graceful`` (graceful restart, RFC 4724): what the peer has offered; meaningful once established.
    ``waited_for``: it restarts gracefully and its End-of-RIB is still to come.
    """

    address: str
    established: bool
    limited: bool = False
    families: tuple[Family, ...] = ()
    graceful: bool = False
    waited_for: bool = False


def complaints(statuses: Iterable[PeerStatus], neighbors: Mapping[str, Neighbor]) -> Iterator[str]:
    """One line for each established session that carries less than was offered to the peer."""
    for status in statuses:
        neighbor = neighbors.get(status.address)
        if neighbor is None or not status.established:
            continue
        missing = [str(family) for family in neighbor.families if family not in status.families]
        if missing:
            yield f"peer {status.address}: does not speak {' or '.join(missing)}: none of its routes are exchanged"
        if neighbor.graceful_restart is not None and not status.graceful:
            yield (
                f"peer {status.address}: does not offer graceful restart (--bgp-graceful-restart): it drops our routes "
                "when gobgpd restarts"
            )


@dataclass(slots=True)
class _Wait:
    delay: float
    again_at: float


@dataclass(slots=True)
class Limits:
    """Which peers are over their prefix limit, and when they are tried again."""

    _waits: dict[str, _Wait] = field(default_factory=dict)
    _down: frozenset[str] = frozenset()

    def see(self, statuses: Iterable[PeerStatus], now: float) -> None:
        """Take in how the sessions stand at ``now`` (seconds of a steady clock)."""
        down = frozenset(status.address for status in statuses if status.limited)
        for address in down - self._down:
            known = self._waits.get(address)
            again = known is not None and now < known.again_at + LIMIT_FORGIVEN_SECONDS
            delay = min(known.delay * 2, LIMIT_MOST_SECONDS) if known and again else LIMIT_FIRST_SECONDS
            self._waits[address] = _Wait(delay, now + delay)
        self._down = down

    def due(self, now: float) -> tuple[str, ...]:
        """The peers to be tried again now; each is named once for each time that it went over its limit."""
        due = tuple(sorted(address for address in self._down if now >= self._waits[address].again_at))
        self._down = self._down.difference(due)
        return due

    def next_at(self) -> float | None:
        """When the next peer is due."""
        return min((self._waits[address].again_at for address in self._down), default=None)

    def lines(self, neighbors: Mapping[str, Neighbor]) -> Iterator[str]:
        """One line for each peer that is kept away."""
        for address in sorted(self._down):
            wait, neighbor = self._waits[address], neighbors.get(address)
            if neighbor is not None:
                rule = f"sent more than {neighbor.most_prefixes} prefixes of a family (--bgp-max-prefixes)"
                yield f"peer {address}: {rule}; its session is ended and tried again after {wait.delay / 60:g} min"
