"""What gobgpd is to do on a node: speaker, sessions, policies and paths, out of Nodes, settings and annotations.

Pure: values in, `DesiredBgp` out. Bad input spoils as little as it can: it becomes a `Problem`, and what it leaves
unknown stays as gobgpd has it now (``actual``). So the last good state needs no memory of this process.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kube_router.ipc.messages import Node
from kube_router.workers.model import Family, IPAddress, IPNetwork
from kube_router.workers.nodefacts import NODE_ASN, NodeFacts, Problem, parse_address
from kube_router.workers.router import names
from kube_router.workers.router.attributes import custom_rejects, own_attributes
from kube_router.workers.router.bgpstate import Attributes, BgpState, Speaker
from kube_router.workers.router.neighbors import Own, external_neighbors, internal_neighbors
from kube_router.workers.router.peers import external_peers
from kube_router.workers.router.policies import desired_policies, service_ranges
from kube_router.workers.router.refused import Refused, protected_ranges
from kube_router.workers.router.vips import Vips
from kube_router.workers.settings import Secrets, Settings

DEFAULT_ASN = 64512


@dataclass(frozen=True, slots=True)
class DesiredBgp:
    """``state.speaker`` None: it is not known how to start one; a running one stays, see ``problems``."""

    state: BgpState
    problems: tuple[Problem, ...] = ()


def desired_bgp(
    own_node: Node,
    own: NodeFacts,
    nodes: Sequence[NodeFacts],
    settings: Settings,
    secrets: Secrets,
    actual: BgpState,
    vips: Vips,
    *,
    unbindable: Container[str] = (),
) -> DesiredBgp:
    """``nodes`` are the facts of all nodes, the own one included; ``actual`` is what gobgpd has.

    ``unbindable``: addresses of `listen_addresses` on which nobody can listen; BGP listens on the others.
    """
    problems: list[Problem] = []
    told, own = own, with_last_good(own, actual, settings.families, problems)
    if own.primary is None:
        text = f"node {own.name}: has no address; {_goes_on(actual)}"
        return DesiredBgp(actual, (*problems, Problem("MissingNodeAddress", text)))
    speaker = _speaker(own_node, own, settings, actual, unbindable, problems)
    externals = external_peers(settings, secrets, own.name, own_node.annotations)
    problems += externals.problems
    sources = Own(own, told, speaker, settings, actual)
    external = external_neighbors(sources, externals, nodes, problems)
    internal = internal_neighbors(sources, nodes, problems)
    internal = {address: neighbor for address, neighbor in internal.items() if address not in external}
    state = BgpState(
        speaker=speaker,
        policies=desired_policies(
            pod_cidrs=own.pod_cidrs,
            internal=internal,
            external=external,
            advertise_pod_cidr=settings.advertise_pod_cidr,
            override_next_hop=settings.override_nexthop,
            service_vips=vips.advertised,
            known_vips=vips.known,
            attributes=_attributes(own_node, actual, problems),
            refused=_refused(own_node, own, nodes, settings, problems),
            reflected=_reflected(own, nodes),
        ),
        paths=_paths(own, vips),
        neighbors={**internal, **external},
    )
    return DesiredBgp(state, tuple(problems))


def with_last_good(own: NodeFacts, actual: BgpState, families: Sequence[Family], problems: list[Problem]) -> NodeFacts:
    """``own``, completed for each enabled family that has lost its address or pod CIDRs by what gobgpd announces.

    gobgpd's own paths say both: prefix and next hop. Which of them are pod CIDRs, the policies' sets say: the others
    are Service addresses.
    """
    addresses, pod_cidrs, primary = list(own.addresses), list(own.pod_cidrs), own.primary
    for family in families:
        held = {
            ipaddress.ip_network(prefix): ipaddress.ip_address(next_hop)
            for prefix, next_hop in _pod_cidr_paths(actual, family)
        }
        if not own.pod_cidrs_of(family):
            kept = f"; {' '.join(map(str, held))} stays announced" if held else "; none is announced"
            problems.append(Problem("MissingPodCIDR", f"node {own.name}: has no {family} pod CIDR{kept}"))
            pod_cidrs += held
        if own.address(family) is None and held:
            address = next(iter(held.values()))
            addresses.append(address)
            if primary is None or any(item.local_address == str(address) for item in actual.neighbors.values()):
                primary = address
    pod_cidrs.sort(key=lambda network: network.version)
    return replace(own, primary=primary, addresses=tuple(addresses), pod_cidrs=tuple(pod_cidrs))


def _speaker(
    node: Node,
    own: NodeFacts,
    settings: Settings,
    actual: BgpState,
    unbindable: Container[str],
    problems: list[Problem],
) -> Speaker | None:
    """None when a part of it is not known; then a running speaker goes on."""
    asn = _own_asn(own, settings)
    if asn is None:
        rule = f"node {own.name}: annotation {NODE_ASN} is needed with --nodes-full-mesh=false, and is missing or bad"
        problems.append(Problem("MissingASN", f"{rule}; {_goes_on(actual)}"))
    identity = router_id(settings.router_id, own)
    if identity is None and own.primary is not None:
        rule = f"node {own.name}: has no IPv4 address to be its router-id: set --router-id"
        problems.append(Problem("MissingRouterID", f"{rule}; {_goes_on(actual)}"))
    candidates = listen_addresses(node, own, settings.families, problems)
    addresses = [address for address in candidates if address not in unbindable]
    for address in candidates:
        if address in unbindable:
            text = f"node {own.name}: {address} cannot be listened on for BGP: it is on no link; left out until it is"
            problems.append(Problem("InvalidLocalAddress", text))
    if asn is None or identity is None or not addresses:
        return actual.speaker
    return Speaker(asn, identity, settings.bgp_port, frozenset(addresses))


def _goes_on(actual: BgpState) -> str:
    return "BGP goes on as before" if actual.speaker is not None else "BGP is not started"


def _own_asn(own: NodeFacts, settings: Settings) -> int | None:
    return settings.cluster_asn or DEFAULT_ASN if settings.nodes_full_mesh else own.asn


def router_id(flag: str, own: NodeFacts) -> str | None:
    """``--router-id``: literal, ``generate`` (a hash of the primary address) or empty for the node's IPv4 address.

    The hash is FNV-1a, 32 bits, over the 16 bytes of the address (IPv4 mapped into IPv6), as kube-router does it.
    """
    if flag and flag != "generate":
        return flag
    if flag == "generate":
        return None if own.primary is None else str(ipaddress.IPv4Address(_fnv1a(_sixteen_bytes(own.primary))))
    address = own.address(Family.IPV4)
    return None if address is None else str(address)


def _sixteen_bytes(address: IPAddress) -> bytes:
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def _fnv1a(data: bytes) -> int:
    value = 0x811C9DC5
    for byte in data:
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value


def listen_addresses(
    node: Node, own: NodeFacts, families: Sequence[Family], problems: list[Problem]
) -> tuple[str, ...]:
    """``bgp-local-addresses``, item by item; without a usable one the node's best address of each family."""
    where = f"node {own.name}: annotation {names.LOCAL_ADDRESSES}"
    found = []
    for item in filter(None, map(str.strip, node.annotations.get(names.LOCAL_ADDRESSES, "").split(","))):
        try:
            address = parse_address(item)
        except ValueError:
            problems.append(Problem("InvalidLocalAddress", f"{where}: {item!r} is not an IP address; ignored"))
            continue
        if address.version not in families:
            text = f"{where}: {item!r} is {Family(address.version)}, which is not enabled; ignored"
            problems.append(Problem("InvalidLocalAddress", text))
            continue
        found.append(str(address))
    return tuple(found) or tuple(str(own.address(family)) for family in own.families)


def _pod_cidr_paths(actual: BgpState, family: Family) -> Iterator[tuple[str, str]]:
    """Prefix and next hop of what originates here and is a pod CIDR; the rest are Service addresses."""
    for item in sorted(actual.policies.prefix_sets.get(names.POD_CIDR_SETS[family], ())):
        if item.prefix in actual.paths:
            yield item.prefix, actual.paths[item.prefix]


def _attributes(node: Node, actual: BgpState, problems: list[Problem]) -> Attributes:
    """What external peers get with every route; what is announced now stands in for what cannot be read."""
    externals = names.EXTERNAL_PEER_SETS.values()
    running = (item.attributes for item in actual.policies.export if item.neighbor_set in externals)
    found = own_attributes(node.name, node.annotations, next(running, Attributes()))
    problems += found.problems
    return found.attributes


def _refused(
    node: Node, own: NodeFacts, nodes: Sequence[NodeFacts], settings: Settings, problems: list[Problem]
) -> Refused:
    custom = custom_rejects(node.name, node.annotations)
    problems += custom.problems
    ranges = [
        (name.replace("_", "-"), cidr)
        for name in ("service_cluster_ip_range", "service_external_ip_range", "loadbalancer_ip_range")
        for cidr in getattr(settings, name)
    ]
    protected = protected_ranges(own, (own, *nodes), ranges, problems)
    return Refused(custom.networks, protected, covering=not settings.bgp_accept_covering_prefixes)


def _reflected(own: NodeFacts, nodes: Sequence[NodeFacts]) -> tuple[IPNetwork, ...] | None:
    """The other nodes' pod CIDRs on a route reflector, None on any other node."""
    if own.reflection is None or not own.reflection.server:
        return None
    return tuple(cidr for other in nodes if other.name != own.name for cidr in other.pod_cidrs)


def _paths(own: NodeFacts, vips: Vips) -> Mapping[str, str]:
    """Own pod CIDRs and Service addresses by next hop: the best address of the same family."""
    hops = {family: str(own.address(family) or "") for family in Family}
    pods = ((str(cidr), hops[Family(cidr.version)]) for cidr in own.pod_cidrs)
    announced, _ = service_ranges(vips.advertised, vips.known)
    services = ((item.prefix, hops[family]) for family, items in announced.items() for item in items)
    return {prefix: hop for prefix, hop in (*pods, *services) if hop}
