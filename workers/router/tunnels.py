"""The overlay: which tunnels, rules and ports a node should have, how devices are named, and which ones are ours.

Pure: node facts, link facts and settings in, desired values and plans out.

A device is named after its remote address, as kube-router names it; two addresses can come to one name (21.3.0.4 and
2.13.0.4). Then the device that is there keeps it, and the other remote takes its second name (`names_of`). Ours is a
device whose name follows from its own remote address by any recipe that was ever used, and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kube_router._fast.tunnelname import legacy_tunnel_name, tunnel_name
from kube_router.workers.linkfacts import LOOPBACK, Links
from kube_router.workers.model import Family, IPNetwork
from kube_router.workers.nodefacts import NodeFacts
from kube_router.workers.routefacts import Prefix, Route
from kube_router.workers.settings import Settings
from kube_router.workers.tunnelfacts import KINDS, PLAIN, FouPort, PodRule, PodRulePlan, Tunnel, TunnelPlan

GUE_TTL = 225
"""As kube-router gives it to tunnels over UDP; plain ones take that of the inner packet."""
HEADERS = {Family.IPV4: 20, Family.IPV6: 40}
UDP_AND_GUE = 12
TCP_AND_IP = {Family.IPV4: 40, Family.IPV6: 60}
"""What a segment loses of a packet: bytes between MTU and MSS."""
LEAST_MTU = {Family.IPV4: 68, Family.IPV6: 1280}
RECEIVERS = {Family.IPV4: "tun-receiver4", Family.IPV6: "tun-receiver6"}
"""Take what comes in while tunnels of the family are changed, for which the kernel unhooks them; gone afterwards."""
BOOT_PROTOCOL = 3
"""``rtm_protocol`` of kube-router's routes in table 77, which names none."""


@dataclass(frozen=True, slots=True)
class End:
    """This node's end of the tunnels of one family.

    ``mtu``: what goes through a tunnel, in bytes, and ``link``: the index of the link below it; both 0 when the address
    is on loopback, where neither is known.
    """

    local: str
    mtu: int
    link: int


@dataclass(frozen=True, slots=True)
class Overlay:
    """How this node tunnels. ``full``: to every other node, else only to those of other subnets. ``port``: GUE's."""

    full: bool
    port: int
    ends: tuple[tuple[Family, End], ...]

    def end(self, family: Family) -> End | None:
        """The end for a family; None where the node has no address of it on any link."""
        return next((end for each, end in self.ends if each == family), None)

    def tunnel(self, remote: str) -> Tunnel | None:
        """The tunnel to another node's address; None without an own end."""
        family = family_of(remote)
        end = self.end(family)
        if end is None:
            return None
        return Tunnel(
            local=end.local,
            remote=remote,
            port=self.port,
            ttl=GUE_TTL if self.port else 0,
            pmtudisc=bool(self.port) and family is Family.IPV4,
            mtu=end.mtu,
        )

    def route(self, remote: str) -> Route | None:
        """A route through that tunnel, without its device's name."""
        family = family_of(remote)
        end = self.end(family)
        if end is None:
            return None
        return Route("", "", end.local, end.mtu, end.mtu - TCP_AND_IP[family] if end.mtu else 0)

    def seen(self, tunnel: Tunnel) -> Tunnel:
        """An observed device in the words of desired ones: an MTU that is left to the kernel does not count."""
        end = self.end(tunnel.family)
        return tunnel if end is None or end.mtu else tunnel._replace(mtu=0)


def family_of(text: str) -> Family:
    """The family of an address or prefix in canonical text."""
    return Family.IPV6 if ":" in text else Family.IPV4


def overlay(own: NodeFacts, links: Links, settings: Settings) -> Overlay | None:
    """How this node tunnels; None when it does not."""
    if not settings.enable_overlay:
        return None
    port = settings.overlay_encap_port if settings.overlay_encap == "fou" else PLAIN
    ends = []
    for family in settings.families:
        address = own.address(family)
        link = links.link_of(address) if address is not None else None
        if address is None or link is None:
            continue
        overhead = HEADERS[family] + (UDP_AND_GUE if port else 0)
        known = link.kind != LOOPBACK and link.mtu > 0
        mtu = max(link.mtu - overhead, LEAST_MTU[family]) if known else 0
        ends.append((family, End(str(address), mtu, link.index if known else 0)))
    return Overlay(settings.overlay_type == "full", port, tuple(ends))


def other_addresses(own: NodeFacts, nodes: Iterable[NodeFacts]) -> frozenset[str]:
    """The addresses of all other nodes that are not this one's too: tunnels lead to these, and to nowhere else."""
    theirs = {str(address) for node in nodes if node.name != own.name for address in node.addresses}
    return frozenset(theirs.difference(map(str, own.addresses)))


def names_of(remote: str) -> tuple[str, ...]:
    """The names that a device to ``remote`` may have, best first.

    kube-router's; and for the remote that comes second to it, the same recipe over the address with ``-`` in the place
    of ``.`` and ``_`` in that of ``:``, so that what is the same without separators differs with them.
    """
    return tunnel_name(remote), tunnel_name(remote.replace(".", "-").replace(":", "_"))


def is_ours(name: str, tunnel: Tunnel) -> bool:
    """Whether the name of a device of our kinds follows from its remote address, now or in v0.4 to v1.6."""
    remote = tunnel.remote
    if not remote:
        return name == RECEIVERS[tunnel.family] and bool(tunnel.local)
    return name in names_of(remote) or name == legacy_tunnel_name(remote)


def choose_name(remote: str, actual: Mapping[str, Tunnel], kinds: Mapping[str, str], holders: Mapping[str, str]) -> str:
    """A name for the tunnel to ``remote``: that of the device that is there, else the first that is free.

    ``kinds``: kind of every link by name; ``holders``: names that are given away, with their remotes. A device of the
    right kind whose name says ``remote``, but which leads elsewhere for no reason of ours, is free: it is mended.
    If nothing is free, the answer is a name of which the kernel will say why not; never that of another remote.
    """
    names = names_of(remote)
    for name in names:
        if name in actual and actual[name].remote == remote and holders.get(name, remote) == remote:
            return name
    for name in names:
        there = actual.get(name)
        if holders.get(name, remote) != remote or (there is not None and is_ours(name, there)):
            continue
        if kinds.get(name, KINDS[family_of(remote)]) == KINDS[family_of(remote)]:
            return name
    return next((name for name in names if holders.get(name, remote) == remote), names[-1])


def plan_tunnels(
    actual: Mapping[str, Tunnel], updates: Mapping[str, Tunnel], deletes: Iterable[str], around: Overlay | None
) -> TunnelPlan:
    """Steps for devices that are not as they should be.

    A device of ours under an old name with the ends of a new one is first bound to the link below it: then both can be
    there, and the old one goes on receiving until the routes have moved. While devices are changed in place that carry
    traffic, a receiver of the family stands in for them.
    """
    change = [(name, tunnel) for name, tunnel in updates.items() if name in actual]
    add = [(name, tunnel) for name, tunnel in updates.items() if name not in actual]
    loosen = []
    if add and around is not None:
        ends = {(tunnel.local, tunnel.remote) for _, tunnel in add}
        for name, tunnel in actual.items():
            if (tunnel.local, tunnel.remote) not in ends or name in updates or not is_ours(name, tunnel):
                continue
            end = around.end(tunnel.family)
            if tunnel.link == 0 and end is not None and end.link:
                change.append((name, tunnel._replace(link=end.link)))
            if tunnel.family is Family.IPV4 and tunnel.up:
                loosen.append(name)
    moved = {
        tunnel.family: tunnel.local
        for name, tunnel in change
        if (tunnel.local, tunnel.remote) == actual[name][:2] and actual[name].up
    }
    receivers = tuple((RECEIVERS[family], Tunnel(local, "")) for family, local in sorted(moved.items()))
    return TunnelPlan(receivers, tuple(change), tuple(add), tuple(deletes), tuple(loosen))


def overlay_host(remote: str) -> Prefix:
    """The destination in table 77 that leads pods' packets to a node's address through its tunnel."""
    return Prefix(f"{remote}/{family_of(remote).bits}")


def is_our_host(prefix: Prefix, protocol: int, route: Route) -> bool:
    """Whether a route of table 77 is ours: by protocol, or kube-router's own, to the address that names its device."""
    if protocol == 17:
        return True
    remote, _, length = prefix.partition("/")
    named = (*names_of(remote), legacy_tunnel_name(remote))
    return protocol == BOOT_PROTOCOL and int(length) == family_of(remote).bits and route.device in named


def plan_rules(
    actual: Sequence[PodRule], wanted: Sequence[IPNetwork], own: Sequence[IPNetwork], *, hold: bool = False
) -> PodRulePlan:
    """Steps that leave one rule of ours for each of ``wanted``; ``own``: pod CIDRs whose rules by others are ours too.

    Others' (kube-router's, which carry no protocol) are replaced by ours.
    """
    sources = [str(cidr) for cidr in wanted]
    mine = [rule for rule in actual if rule.protocol == 17]
    there = {rule.source for rule in mine}
    delete, kept = [], set[str]()
    for rule in mine:
        if rule.source in sources and rule.source not in kept:
            kept.add(rule.source)
        else:
            delete.append(rule)
    delete += [rule for rule in actual if rule.protocol != 17 and rule.source in {str(cidr) for cidr in own}]
    add = tuple(PodRule(source) for source in dict.fromkeys(sources) if source not in there)
    return PodRulePlan(add, () if hold else tuple(delete))


def wanted_ports(settings: Settings) -> frozenset[FouPort]:
    """The ports at which packets over UDP are taken: also while this node sends plain ones, because others may not."""
    if not settings.enable_overlay:
        return frozenset()
    numbers = (settings.overlay_encap_port, *settings.overlay_encap_accept_ports)
    return frozenset(FouPort(family, number) for family in settings.families for number in numbers)
