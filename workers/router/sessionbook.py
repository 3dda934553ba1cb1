"""How the BGP sessions stand: what gobgpd lists, one listing after the other, as status and metrics show it.

Pure: reports and times in, `Session` values out. Events only say which peer to list by itself (`SessionBook.unlisted`);
all of them are listed rarely. Events are no truth here: a listing overtakes those that are still on their way.

Why a session ended gobgpd does not say. Its counters of NOTIFICATION messages, before and after, tell which side ended
it, and that is all that is said.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kube_router.ipc.messages import Session
from kube_router.workers.model import Family
from kube_router.workers.router.sessions import PeerStatus

UNKNOWN, ESTABLISHED = "unspecified", "established"
SESSION_STATES = (UNKNOWN, "idle", "connect", "active", "opensent", "openconfirm", ESTABLISHED)
"""By gobgpd's numbers; kube-router's words."""
PEER_NOTIFIED = "the peer sent a NOTIFICATION"
WE_NOTIFIED = "this side sent a NOTIFICATION: the hold time was over, or it got something that it does not accept"
TOO_MANY_PREFIXES = "the peer announced more prefixes than it may"
LOST = "the connection was lost"
NEVER_CONNECTED = "no TCP connection so far"
DAEMON_ENDED = "gobgpd ended"


class PeerReport(NamedTuple):
    """What a listing says of a peer; ``established_at`` in seconds since the epoch, 0 if it never was.

    ``configured_asn`` 0: any; ``asn``: what the peer told, else 0. ``families`` as asked for. ``advertised`` None: not
    counted. The numbers of messages count from the daemon's start. ``peer_restarting``: its routes are kept for it.
    """

    status: PeerStatus
    state: str
    configured_asn: int
    asn: int
    families: tuple[Family, ...] = ()
    received: int = 0
    accepted: int = 0
    advertised: int | None = None
    established_at: float = 0.0
    notifications_received: int = 0
    notifications_sent: int = 0
    messages: int = 0
    graceful_restart: bool = False
    peer_restarting: bool = False

    @property
    def address(self) -> str:
        """The peer's address."""
        return self.status.address


class _Peer:
    """What is remembered of one peer. ``since``: seconds since the epoch at which it came up, or was last up."""

    __slots__ = ("advertised", "flaps", "last_error", "report", "since", "up")

    def __init__(self) -> None:
        self.report: PeerReport | None = None
        self.up = False
        self.since: float | None = None
        self.last_error = ""
        self.advertised: int | None = None
        self.flaps = 0


class SessionBook:
    """All sessions of this worker's gobgpd, also over the daemon's restarts."""

    def __init__(self) -> None:
        self._peers: dict[str, _Peer] = {}
        self._unlisted: set[str] = set()
        self._uncounted: dict[str, None] = {}
        self._view: tuple[int, tuple[Session, ...]] | None = None
        self._gap = False

    @property
    def unlisted(self) -> frozenset[str]:
        """Peers whose state has changed since they were last listed."""
        return frozenset(self._unlisted)

    def restart(self) -> None:
        """Another daemon, or the same one after a gap: the next listing says what became of the sessions."""
        self._gap = True
        self._unlisted.clear()
        self._view = None
        for peer in self._peers.values():
            peer.report = None

    def touched(self, addresses: Iterable[str]) -> None:
        """Something has become of these peers, or they have been added or removed."""
        self._unlisted.update(addresses)

    def listed(self, reports: Iterable[PeerReport], now: float, *, only: str = "") -> None:
        """Take a listing of all peers, or of ``only`` one; a peer that it lacks is forgotten.

        ``now`` in seconds since the epoch.
        """
        found = set()
        for report in reports:
            found.add(report.address)
            self._take(self._peers.setdefault(report.address, _Peer()), report, now)
        if only:
            self._unlisted.discard(only)
        else:
            self._unlisted.clear()
            self._gap = False
        for address in ({only} if only else self._peers.keys()) - found:
            self._peers.pop(address, None)
        self._view = None

    def _take(self, peer: _Peer, report: PeerReport, now: float) -> None:
        up = report.status.established
        ended = peer.up and (not up or report.established_at != peer.since)
        if ended:
            peer.flaps += 1
            peer.advertised = None
        if ended or not up:
            peer.last_error = self._why(peer.report, report, ended) or peer.last_error
        if up and (ended or not peer.up):
            self._uncounted[report.address] = None
        if up:
            peer.since = report.established_at
        elif ended:
            peer.since = now
        if report.advertised is not None:
            peer.advertised = report.advertised
        peer.up, peer.report = up, report

    def _why(self, before: PeerReport | None, report: PeerReport, ended: bool) -> str:
        """Why a session or an attempt ended, empty if nothing new is known."""
        if report.status.limited:
            return TOO_MANY_PREFIXES
        if before is None:
            return DAEMON_ENDED if ended and self._gap else ""
        if report.notifications_received > before.notifications_received:
            return PEER_NOTIFIED
        if report.notifications_sent > before.notifications_sent:
            return WE_NOTIFIED
        return LOST if ended else ""

    def count_again(self) -> None:
        """What is announced has changed: every session's number must be asked for again."""
        self._uncounted |= {address: None for address, peer in self._peers.items() if peer.up}

    @property
    def uncounted(self) -> bool:
        """Whether a session's number of announced prefixes may be unknown or old."""
        return bool(self._uncounted)

    def take_uncounted(self) -> str | None:
        """The next session whose number of announced prefixes is not known."""
        while self._uncounted:
            address = next(iter(self._uncounted))
            del self._uncounted[address]
            peer = self._peers.get(address)
            if peer is not None and peer.up:
                return address
        return None

    def view(self, own_asn: int) -> tuple[Session, ...]:
        """All sessions by address. Where any AS number is taken, it is the peer's once it has told it, else ours."""
        if self._view is None or self._view[0] != own_asn:
            peers = sorted(
                (item for item in self._peers.items() if item[1].report is not None), key=lambda item: item[0]
            )
            self._view = own_asn, tuple(_session(address, peer, own_asn) for address, peer in peers)
        return self._view[1]


def _session(address: str, peer: _Peer, own_asn: int) -> Session:
    report = peer.report
    assert report is not None
    never = not peer.up and not peer.last_error and not report.messages
    return Session(
        address=address,
        asn=report.configured_asn or report.asn or own_asn,
        type="internal" if report.configured_asn in (0, own_asn) else "external",
        state=report.state,
        received=report.received,
        accepted=report.accepted,
        advertised=peer.advertised,
        since=peer.since,
        last_error=NEVER_CONNECTED if never else peer.last_error,
        families=tuple(map(str, report.families)),
        flaps=peer.flaps,
        graceful_restart=_graceful(report),
    )


def _graceful(report: PeerReport) -> str:
    if not report.graceful_restart:
        return ""
    if report.peer_restarting:
        return "restarting"
    return "ready" if report.status.established and report.status.graceful else "offered"
