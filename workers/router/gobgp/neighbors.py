"""Sessions between the neutral values and gobgpd's messages, in both directions and for both generations.

Pure: messages only. A neighbour that is read back equals the one that was asked for: what gobgpd fills in is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kube_router.workers.model import Family
from kube_router.workers.router.bgpstate import Bfd, GracefulRestart, Neighbor
from kube_router.workers.router.gobgp.convert import FAMILY_OF_AFI, UNICAST, Dialect, address_text, family_message
from kube_router.workers.router.sessionbook import SESSION_STATES, PeerReport
from kube_router.workers.router.sessions import PeerStatus

CONNECT_RETRY_SECONDS = 5
"""Between attempts to connect. gobgpd's own 120 s would keep a node away for minutes that was away for seconds."""
ESTABLISHED = 6
"""PeerState.session_state."""
MICROSECONDS = 1000


def neighbor_message(dialect: Dialect, neighbor: Neighbor, *, restarting: bool = False) -> Any:
    """The argument of AddPeer. ``restarting``: tell the peer that we have restarted and kept forwarding (RFC 4724)."""
    messages = dialect.messages
    peer = messages.Peer(
        conf=messages.PeerConf(
            neighbor_address=neighbor.address, peer_asn=neighbor.asn, auth_password=neighbor.password
        ),
        timers=messages.Timers(config=messages.TimersConfig(connect_retry=CONNECT_RETRY_SECONDS)),
        transport=messages.Transport(local_address=neighbor.local_address, remote_port=neighbor.remote_port),
        afi_safis=[_family(dialect, family, neighbor.graceful_restart) for family in neighbor.families],
    )
    if neighbor.multihop_ttl:
        peer.ebgp_multihop.enabled = True
        peer.ebgp_multihop.multihop_ttl = neighbor.multihop_ttl
    if neighbor.cluster_id:
        peer.route_reflector.route_reflector_client = True
        peer.route_reflector.route_reflector_cluster_id = neighbor.cluster_id
    graceful = neighbor.graceful_restart
    if graceful is not None:
        peer.graceful_restart.enabled = True
        peer.graceful_restart.restart_time = graceful.restart_seconds
        peer.graceful_restart.deferral_time = graceful.deferral_seconds
        peer.graceful_restart.longlived_enabled = graceful.long_lived_seconds > 0
        peer.graceful_restart.local_restarting = restarting
    set_live(dialect, peer, neighbor)
    return peer


def _family(dialect: Dialect, family: Family, graceful: GracefulRestart | None) -> Any:
    messages = dialect.messages
    entry = messages.AfiSafi(config=messages.AfiSafiConfig(family=family_message(dialect, family), enabled=True))
    if graceful is not None:
        entry.mp_graceful_restart.config.enabled = True
        if graceful.long_lived_seconds:
            entry.long_lived_graceful_restart.config.enabled = True
            entry.long_lived_graceful_restart.config.restart_time = graceful.long_lived_seconds
    return entry


def set_live(dialect: Dialect, peer: Any, neighbor: Neighbor) -> None:
    """Set what UpdatePeer changes without ending the session: hold time (of the next one), prefix limit, BFD."""
    peer.timers.config.hold_time = neighbor.hold_seconds
    peer.timers.config.keepalive_interval = max(1, neighbor.hold_seconds // 3)
    for entry in peer.afi_safis:
        entry.prefix_limits.family.CopyFrom(entry.config.family)
        entry.prefix_limits.max_prefixes = neighbor.most_prefixes
    if dialect.generation == 3:
        return
    peer.ClearField("bfd")
    if neighbor.bfd is not None:
        peer.bfd.enabled = True
        peer.bfd.port = neighbor.bfd.port
        peer.bfd.detection_multiplier = neighbor.bfd.multiplier
        peer.bfd.desired_minimum_tx_interval = neighbor.bfd.send_milliseconds * MICROSECONDS
        peer.bfd.required_minimum_receive = neighbor.bfd.receive_milliseconds * MICROSECONDS


def neighbor_of(peer: Any) -> Neighbor:
    """A configured peer as read back."""
    entries = [entry for entry in peer.afi_safis if entry.config.enabled]
    families = sorted(
        FAMILY_OF_AFI[entry.config.family.afi]
        for entry in entries
        if entry.config.family.safi == UNICAST and entry.config.family.afi in FAMILY_OF_AFI
    )
    limits = {entry.prefix_limits.max_prefixes for entry in entries}
    return Neighbor(
        address=address_text(peer.conf.neighbor_address),
        asn=peer.conf.peer_asn,
        local_address=address_text(peer.transport.local_address),
        remote_port=peer.transport.remote_port,
        families=tuple(families),
        hold_seconds=peer.timers.config.hold_time,
        multihop_ttl=peer.ebgp_multihop.multihop_ttl if peer.ebgp_multihop.enabled else 0,
        password=peer.conf.auth_password,
        cluster_id=peer.route_reflector.route_reflector_cluster_id
        if peer.route_reflector.route_reflector_client
        else "",
        graceful_restart=_graceful_restart_of(peer, entries),
        bfd=_bfd_of(peer),
        # Families with limits of their own are nobody's wish: no number that anybody asks for.
        most_prefixes=limits.pop() if len(limits) == 1 else -len(limits),
    )


def _graceful_restart_of(peer: Any, entries: Sequence[Any]) -> GracefulRestart | None:
    if not peer.graceful_restart.enabled or not all(entry.mp_graceful_restart.config.enabled for entry in entries):
        return None
    long_lived = {
        entry.long_lived_graceful_restart.config.restart_time if peer.graceful_restart.longlived_enabled else 0
        for entry in entries
    }
    return GracefulRestart(
        restart_seconds=peer.graceful_restart.restart_time,
        deferral_seconds=peer.graceful_restart.deferral_time,
        long_lived_seconds=max(long_lived, default=0),
    )


def _bfd_of(peer: Any) -> Bfd | None:
    bfd = getattr(peer, "bfd", None)
    if bfd is None or not bfd.enabled:
        return None
    return Bfd(
        port=bfd.port,
        multiplier=bfd.detection_multiplier,
        send_milliseconds=bfd.desired_minimum_tx_interval // MICROSECONDS,
        receive_milliseconds=bfd.required_minimum_receive // MICROSECONDS,
    )


def status_of(dialect: Dialect, peer: Any) -> PeerStatus:
    """How a peer's session stands."""
    established = peer.state.session_state == ESTABLISHED
    offered = list(dialect.capabilities(peer)) if established else []
    return PeerStatus(
        address=address_text(peer.conf.neighbor_address or peer.state.neighbor_address),
        established=established,
        limited=peer.state.admin_state == dialect.messages.ADMIN_PREFIX_LIMIT,
        families=tuple(sorted(_offered_families(offered))),
        graceful=any(name == "graceful_restart" for name, _ in offered),
        waited_for=any(
            entry.mp_graceful_restart.state.received and not entry.mp_graceful_restart.state.end_of_rib_received
            for entry in peer.afi_safis
        ),
    )


def report_of(dialect: Dialect, peer: Any, *, counted: bool) -> PeerReport:
    """How a listed peer stands, in numbers too; ``counted``: those of announced prefixes were asked for."""
    number, messages = peer.state.session_state, peer.state.messages
    unicast = {entry.config.family.afi for entry in peer.afi_safis if entry.config.enabled}
    return PeerReport(
        status=status_of(dialect, peer),
        state=SESSION_STATES[number] if number < len(SESSION_STATES) else SESSION_STATES[0],
        configured_asn=peer.conf.peer_asn,
        asn=peer.state.peer_asn,
        families=tuple(sorted(FAMILY_OF_AFI[afi] for afi in unicast if afi in FAMILY_OF_AFI)),
        received=sum(entry.state.received for entry in peer.afi_safis),
        accepted=sum(entry.state.accepted for entry in peer.afi_safis),
        advertised=sum(entry.state.advertised for entry in peer.afi_safis) if counted else None,
        established_at=float(peer.timers.state.uptime.seconds),
        notifications_received=messages.received.notification,
        notifications_sent=messages.sent.notification,
        messages=messages.received.total + messages.sent.total,
        graceful_restart=peer.graceful_restart.enabled,
        peer_restarting=peer.graceful_restart.peer_restarting,
    )


def event_address(event: Any) -> str:
    """The address of the peer that an event is about."""
    return address_text(event.peer.state.neighbor_address)


def _offered_families(offered: Sequence[tuple[str, Any]]) -> Iterator[Family]:
    for name, capability in offered:
        if name == "multi_protocol" and capability.family.safi == UNICAST and capability.family.afi in FAMILY_OF_AFI:
            yield FAMILY_OF_AFI[capability.family.afi]
