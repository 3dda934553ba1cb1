"""Node facts: what a Node object says of a node's addresses, pod CIDRs and ASN, decided in one place for all workers.

Pure: a Node projection and the enabled families in, `NodeFacts` out. Nothing is read twice in two different ways.

Pod CIDRs are decided family by family, first source that has the family wins: annotation ``kube-router.io/pod-cidr``
(deprecated), annotation ``kube-router.io/pod-cidrs``, ``spec.podCIDRs``, ``spec.podCIDR``. So an old single-family
``pod-cidr`` does not hide the other family's CIDR. A malformed item is a problem of its own; the others still count.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kube_router.ipc.messages import Node
from kube_router.workers.model import Family, IPAddress, IPNetwork, parse_network

ANNOTATION_PREFIX = "kube-router.io/"
POD_CIDR = ANNOTATION_PREFIX + "pod-cidr"
POD_CIDRS = ANNOTATION_PREFIX + "pod-cidrs"
NODE_ASN = ANNOTATION_PREFIX + "node.asn"
RR_SERVER = ANNOTATION_PREFIX + "rr.server"
RR_CLIENT = ANNOTATION_PREFIX + "rr.client"
AS_TRANS = 23456
"""Stands for any AS number above 65535 on the wire (RFC 6793); no speaker has it."""

DEPRECATED_ANNOTATION = "DeprecatedAnnotation"
INVALID_ASN = "InvalidASN"
INVALID_NODE_ADDRESS = "InvalidNodeAddress"
INVALID_POD_CIDR = "InvalidPodCIDR"
MISSING_NODE_ADDRESS = "MissingNodeAddress"
OVERLAPPING_POD_CIDR = "OverlappingPodCIDR"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about a Node that an operator should mend; ``reason`` is an Event reason."""

    reason: str
    text: str


@dataclass(frozen=True, slots=True)
class Reflection:
    """A route reflector's role: server or client of a cluster, whose id is a dotted quad (empty: it is unreadable)."""

    server: bool
    cluster_id: str


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Facts of one node, restricted to the enabled families.

    ``addresses``: InternalIPs in order, then ExternalIPs. ``primary`` is the first InternalIP, else the first
    ExternalIP, of any enabled family; None when there is none. ``pod_cidrs``: IPv4 first, then IPv6, each in the
    order given.
    """

    name: str
    uid: str
    primary: IPAddress | None
    addresses: tuple[IPAddress, ...]
    pod_cidrs: tuple[IPNetwork, ...]
    asn: int | None
    problems: tuple[Problem, ...]
    reflection: Reflection | None = None

    def address(self, family: Family) -> IPAddress | None:
        """The best address of a family: the primary if it is of that family, else the first one listed."""
        if self.primary is not None and self.primary.version == family:
            return self.primary
        return next((address for address in self.addresses if address.version == family), None)

    def addresses_of(self, family: Family) -> tuple[IPAddress, ...]:
        """All addresses of a family, in order."""
        return tuple(address for address in self.addresses if address.version == family)

    def pod_cidrs_of(self, family: Family) -> tuple[IPNetwork, ...]:
        """The pod CIDRs of a family, in order."""
        return tuple(cidr for cidr in self.pod_cidrs if cidr.version == family)

    @property
    def families(self) -> tuple[Family, ...]:
        """The enabled families of which the node has an address."""
        return tuple(family for family in Family if self.address(family) is not None)


@dataclass(frozen=True, slots=True)
class PodCidrOverlap:
    """Two pod CIDRs that share addresses: ``cidr`` of ``node`` contains ``other_cidr`` of ``other_node``."""

    node: str
    cidr: IPNetwork
    other_node: str
    other_cidr: IPNetwork

    @property
    def problem(self) -> Problem:
        """As something that an operator should mend."""
        text = f"node {self.node}: pod CIDR {self.cidr} overlaps {self.other_cidr} of node {self.other_node}"
        return Problem(OVERLAPPING_POD_CIDR, text)

    def involves(self, name: str) -> bool:
        """Whether the node called ``name`` is one of the two."""
        return name in (self.node, self.other_node)


def node_facts(node: Node, families: Iterable[Family]) -> NodeFacts:
    """What ``node`` says, as far as the enabled ``families`` are concerned.

    Never raises on bad input: what cannot be read becomes a `Problem` that names the node, the key and the value.
    """
    enabled = tuple(families)
    problems: list[Problem] = []
    addresses = tuple(_addresses(node, problems))
    enabled_addresses = tuple(address for address in addresses if address.version in enabled)
    for family in enabled:
        if not any(address.version == family for address in enabled_addresses):
            problems.append(
                Problem(
                    MISSING_NODE_ADDRESS,
                    f"node {node.name}: status.addresses: {family} was enabled, but no {family} address was found on "
                    "the node",
                )
            )
    return NodeFacts(
        name=node.name,
        uid=node.uid,
        primary=enabled_addresses[0] if enabled_addresses else None,
        addresses=enabled_addresses,
        pod_cidrs=_pod_cidrs(node, enabled, problems),
        asn=_asn(node, problems),
        problems=tuple(problems),
        reflection=_reflection(node),
    )


def _addresses(node: Node, problems: list[Problem]) -> Iterator[IPAddress]:
    seen: set[IPAddress] = set()
    for wanted in ("InternalIP", "ExternalIP"):
        for entry in node.addresses:
            if entry.type != wanted:
                continue
            try:
                address = parse_address(entry.address)
            except ValueError:
                text = f"node {node.name}: status.addresses: {wanted} {entry.address!r} is not an IP address"
                problems.append(Problem(INVALID_NODE_ADDRESS, text))
                continue
            if address not in seen:
                seen.add(address)
                yield address


def parse_address(text: str) -> IPAddress:
    """An address by the rules of Go's ``net.ParseIP``; raises ValueError.

    No zone (``%eth0``); an IPv4-mapped IPv6 address is an IPv4 address.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise ValueError(f"{text!r} has a zone")
        return address.ipv4_mapped or address
    return address


def _pod_cidrs(node: Node, enabled: tuple[Family, ...], problems: list[Problem]) -> tuple[IPNetwork, ...]:
    deprecated = node.annotations.get(POD_CIDR, "")
    if deprecated.strip():
        text = f"node {node.name}: annotation {POD_CIDR} is deprecated, use {POD_CIDRS} instead"
        problems.append(Problem(DEPRECATED_ANNOTATION, text))
    sources = (
        (f"annotation {POD_CIDR}", _split(deprecated)),
        (f"annotation {POD_CIDRS}", _split(node.annotations.get(POD_CIDRS, ""))),
        ("spec.podCIDRs", list(node.pod_cidrs)),
        ("spec.podCIDR", _split(node.pod_cidr)),
    )
    chosen: dict[Family, list[IPNetwork]] = {}
    for source, items in sources:
        of_source: dict[Family, list[IPNetwork]] = {}
        for item in items:
            try:
                network = parse_network(item)
            except ValueError as error:
                problems.append(Problem(INVALID_POD_CIDR, f"node {node.name}: {source}: {item!r}: {error}"))
                continue
            networks = of_source.setdefault(Family(network.version), [])
            if network not in networks:
                networks.append(network)
        for family, networks in of_source.items():
            chosen.setdefault(family, networks)
    return tuple(network for family in Family if family in enabled for network in chosen.get(family, ()))


def _split(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _asn(node: Node, problems: list[Problem]) -> int | None:
    """``kube-router.io/node.asn`` by Go's base-0 rules as an unsigned 32-bit number."""
    text = node.annotations.get(NODE_ASN)
    if text is None:
        return None
    try:
        value = parse_base0(text)
    except ValueError:
        value = -1
    if 0 < value < 2**32 and value != AS_TRANS:
        return value
    rule = f"is not an AS number (1-4294967295, not {AS_TRANS})"
    problems.append(Problem(INVALID_ASN, f"node {node.name}: annotation {NODE_ASN}: {text!r} {rule}"))
    return None


def _reflection(node: Node) -> Reflection | None:
    """The role by annotation: ``rr.server`` goes before ``rr.client``. A bad id leaves the role."""
    for key, server in ((RR_SERVER, True), (RR_CLIENT, False)):
        text = node.annotations.get(key)
        if text is not None:
            try:
                return Reflection(server, parse_cluster_id(text))
            except ValueError:
                return Reflection(server, "")
    return None


def parse_cluster_id(text: str) -> str:
    """A route reflector's cluster id as dotted quad: an IPv4 address, or a 32-bit number by Go's base-0 rules.

    Raises ValueError. Zero is none (RFC 4456).
    """
    try:
        number = int(ipaddress.IPv4Address(text)) if "." in text else parse_base0(text)
    except ValueError:
        number = 0
    if not 0 < number < 2**32:
        raise ValueError(f"{text!r} is no cluster id")
    return str(ipaddress.IPv4Address(number))


def parse_base0(text: str) -> int:
    """An unsigned number by the rules of Go's ``strconv.ParseUint(s, 0, …)``; raises ValueError.

    Decimal, ``0x``, ``0o``, ``0b``, a leading zero for octal; ``_`` between digits or behind the prefix. No sign, no
    blanks.
    """
    if not text or not text.isascii() or text != text.strip() or text[0] in "+-":
        raise ValueError(f"{text!r} is not a number")
    if len(text) > 1 and text[0] == "0" and text[1] in "0123456789_":
        return int("0o" + text[1:], 0)
    return int(text, 0)


def overlapping_pod_cidrs(nodes: Iterable[NodeFacts]) -> tuple[PodCidrOverlap, ...]:
    """Pod CIDRs that share addresses, each named with the smallest one that contains it; in order of address.

    Two CIDRs either contain one another or share nothing, so one sorted sweep finds them all: O(n log n) for n CIDRs,
    and at most one overlap for each CIDR. A node's own CIDRs are compared with each other too.
    """
    owned = [(cidr, facts.name) for facts in nodes for cidr in facts.pod_cidrs]
    owned.sort(key=lambda item: (item[0].version, int(item[0].network_address), item[0].prefixlen, item[1]))
    around: list[tuple[IPNetwork, str]] = []
    found = []
    for cidr, name in owned:
        while around and (around[-1][0].version != cidr.version or cidr.network_address not in around[-1][0]):
            around.pop()
        if around:
            found.append(PodCidrOverlap(around[-1][1], around[-1][0], name, cidr))
        around.append((cidr, name))
    return tuple(found)
