"""The sessions of a node: with the other nodes and with external peers.

Pure: facts, flags and configured peers in, `Neighbor` by address out. A node or a peer that cannot be had is told and
left out; the others do not suffer.

Sessions between nodes (``--enable-ibgp``): every node with every other, from primary address to primary address, both
families over the one session; with route reflectors as in ``reflectors.py``. Where the primary addresses are of
different families (a node has lost its address of one), both sides take the first family that both have. A session
keeps a family that the other node has lost: it does no harm, and another set of families would be another session.

With ``--nodes-full-mesh`` the peer's AS number is left open (0): every node has the cluster's, and one that is being
moved to another AS number keeps its session meanwhile. The address already says who the peer is. Without full mesh,
only nodes with the same ``kube-router.io/node.asn`` pair up, and the number is fixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kube_router.workers.model import Family, IPAddress
from kube_router.workers.nodefacts import RR_CLIENT, RR_SERVER, NodeFacts, Problem
from kube_router.workers.router import names
from kube_router.workers.router.bgpstate import BgpState, GracefulRestart, Neighbor, Speaker
from kube_router.workers.router.peers import INVALID_PEER, ExternalPeer, ExternalPeers
from kube_router.workers.router.reflectors import Reflectors
from kube_router.workers.settings import Settings

MOST_HOLD_SECONDS = 65535
DEFERRAL_SECONDS, REFLECTOR_DEFERRAL_SECONDS = 1, 30
"""The longest silence after a restart, whatever ``--bgp-graceful-restart-deferral-time`` allows.

A restarted speaker waits for its peers' routes before it announces, so that it passes on what it has learned before.
Nodes pass nothing on and need not wait; reflectors do, but a peer that is away must not keep them silent for minutes.
"""


@dataclass(frozen=True, slots=True)
class Own:
    """What the sessions of a node are made from.

    ``facts`` are completed by the last good state; ``told`` are as the Node object says, which is what the other nodes
    go by.
    """

    facts: NodeFacts
    told: NodeFacts
    speaker: Speaker | None
    settings: Settings
    actual: BgpState


def graceful_restart(settings: Settings, own: NodeFacts) -> GracefulRestart | None:
    """What a node offers to each of its peers."""
    if not settings.bgp_graceful_restart:
        return None
    reflects = own.reflection is not None and own.reflection.server
    most = REFLECTOR_DEFERRAL_SECONDS if reflects else DEFERRAL_SECONDS
    return GracefulRestart(
        restart_seconds=max(1, int(settings.bgp_graceful_restart_time)),
        deferral_seconds=max(1, min(int(settings.bgp_graceful_restart_deferral_time), most)),
        long_lived_seconds=int(settings.bgp_long_lived_graceful_restart_time),
    )


def internal_neighbors(own: Own, nodes: Sequence[NodeFacts], problems: list[Problem]) -> dict[str, Neighbor]:
    """Sessions with the other nodes."""
    facts, settings = own.facts, own.settings
    if facts.primary is None or own.speaker is None or not settings.enable_ibgp:
        return {}
    reflectors = Reflectors(nodes)
    cluster_id = _cluster_id(own, problems)
    if facts.reflection is not None and not facts.reflection.server and not reflectors.served:
        text = f"node {facts.name}: annotation {RR_CLIENT}: no node has {RR_SERVER}: no BGP session with any node"
        problems.append(Problem("NoRouteReflector", text))
    graceful = graceful_restart(settings, facts)
    found: dict[str, Neighbor] = {}
    told = own.told if own.told.primary is not None else facts
    for node, local, remote in _partners(told, nodes, problems):
        if not settings.nodes_full_mesh and node.asn != own.speaker.asn:
            continue
        if not reflectors.paired(facts, node):
            continue
        server = node.reflection is not None and node.reflection.server
        running = own.actual.neighbors.get(str(remote))
        held = running.families if running is not None else ()
        found[str(remote)] = Neighbor(
            address=str(remote),
            asn=0 if settings.nodes_full_mesh else own.speaker.asn,
            local_address=str(local),
            remote_port=settings.bgp_port,
            families=tuple(family for family in facts.families if family in node.families or family in held),
            cluster_id="" if server else cluster_id,
            graceful_restart=graceful,
            most_prefixes=settings.bgp_max_prefixes,
        )
    return found


def _partners(
    own: NodeFacts, nodes: Iterable[NodeFacts], problems: list[Problem]
) -> Iterator[tuple[NodeFacts, IPAddress, IPAddress]]:
    """The nodes that can be reached, with our address and theirs; one for each of their addresses."""
    owners: dict[IPAddress, str] = {}
    for node in nodes:
        if node.name == own.name or node.primary is None or own.primary is None:
            continue
        other = own.name if node.primary in own.addresses else owners.setdefault(node.primary, node.name)
        if other != node.name:
            text = f"node {node.name}: its address {node.primary} is also {other}'s; no BGP session with {node.name}"
            problems.append(Problem("DuplicateNodeAddress", text))
        elif (pair := _pair(own, node)) is None:
            text = f"node {node.name}: has addresses of no family of {own.name}'s; no BGP session between them"
            problems.append(Problem("NoCommonFamily", text))
        else:
            yield node, *pair


def _pair(own: NodeFacts, node: NodeFacts) -> tuple[IPAddress, IPAddress] | None:
    """Our address and the other node's that a session between them runs on; both nodes come to the same two."""
    ours, theirs = own.primary, node.primary
    if ours is not None and theirs is not None and ours.version == theirs.version:
        return ours, theirs
    for family in Family:
        ours, theirs = own.address(family), node.address(family)
        if ours is not None and theirs is not None:
            return ours, theirs
    return None


def _cluster_id(own: Own, problems: list[Problem]) -> str:
    """The cluster id of a reflecting server; empty for any other node. A bad one leaves the last good one."""
    reflection = own.facts.reflection
    if reflection is not None and not reflection.cluster_id:
        key = RR_SERVER if reflection.server else RR_CLIENT
        text = (
            f"node {own.facts.name}: annotation {key}: its value is neither a number from 1 to 4294967295 nor an IPv4"
        )
        fallback = "the router-id" if reflection.server else "any server's"
        problems.append(
            Problem("InvalidClusterID", f"{text} address; the last good cluster id counts, else {fallback}")
        )
    if reflection is None or not reflection.server or own.speaker is None:
        return ""
    last = next((item.cluster_id for item in own.actual.neighbors.values() if item.cluster_id), "")
    return reflection.cluster_id or last or own.speaker.router_id


def external_neighbors(
    own: Own, externals: ExternalPeers, nodes: Iterable[NodeFacts], problems: list[Problem]
) -> dict[str, Neighbor]:
    """Sessions with external peers; those of entries that cannot be used stay as they run."""
    found = {
        address: own.actual.neighbors[address]
        for address in _running_externals(own.actual)
        if externals.hold_all or address in externals.held
    }
    owners: Mapping[IPAddress, str] = {}
    if externals.peers:
        owners = {node.primary: node.name for node in nodes if node.primary is not None}
    for peer in externals.peers:
        text = ""
        local = peer.local_address or own.facts.address(Family(peer.address.version))
        if peer.address in own.facts.addresses:
            text = f"is an address of node {own.facts.name} itself"
        elif local is None:
            text = f"node {own.facts.name} has no {Family(peer.address.version)} address to reach it from"
        elif peer.address in owners:
            text = f"is also node {owners[peer.address]}; it is treated as an external peer"
        if text:
            problems.append(Problem(INVALID_PEER, f"peer {peer.address}: {text}"))
        if local is not None and peer.address not in own.facts.addresses:
            found[str(peer.address)] = _external(own, peer, local)
    return found


def _external(own: Own, peer: ExternalPeer, local: IPAddress) -> Neighbor:
    settings = own.settings
    ttl = peer.multihop_ttl if peer.multihop_ttl is not None else settings.peer_router_multihop_ttl
    return Neighbor(
        address=str(peer.address),
        asn=peer.asn,
        local_address=str(local),
        remote_port=peer.port,
        families=own.facts.families,
        hold_seconds=peer.hold_seconds or min(int(settings.bgp_holdtime), MOST_HOLD_SECONDS),
        multihop_ttl=ttl if ttl > 1 else 0,
        password=peer.password,
        graceful_restart=graceful_restart(settings, own.facts),
        bfd=peer.bfd,
        most_prefixes=settings.bgp_max_prefixes,
    )


def _running_externals(actual: BgpState) -> Iterator[str]:
    for name in names.EXTERNAL_PEER_SETS.values():
        for member in actual.policies.neighbor_sets.get(name, ()):
            address = member.partition("/")[0]
            if address in actual.neighbors:
                yield address


def without_bfd(state: BgpState, daemon: str) -> tuple[BgpState, tuple[Problem, ...]]:
    """``state`` for a daemon that has no BFD: sessions without it, and a problem for each that asks for it."""
    asking = [neighbor for neighbor in state.neighbors.values() if neighbor.bfd is not None]
    if not asking:
        return state, ()
    plain = {neighbor.address: replace(neighbor, bfd=None) for neighbor in asking}
    rule = f"{daemon} has no BFD (4.5 has); the session runs without it"
    problems = tuple(Problem("NoBFD", f"peer {neighbor.address}: {rule}") for neighbor in asking)
    return replace(state, neighbors={**state.neighbors, **plain}), problems
