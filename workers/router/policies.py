"""The export and import policies: who may learn what, and what nobody may teach us.

Pure: peers and prefixes in, `Policies` out. ``docs/routing.md`` shows the same as tables.

==================================== ========================== ===================================
route                                to a node (iBGP)           to an external peer
==================================== ========================== ===================================
own pod CIDR                         yes                        with ``--advertise-pod-cidr``
own Service address                  no                         yes
learned from anybody                 no; a reflector: yes       no
other node's pod CIDR                as learned                 a reflector with ``--advertise-pod-cidr``
==================================== ========================== ===================================

Accepted from any peer: everything but Service addresses, default routes, the operator's list, and what is ours
(``refused.py``). Set and statement names and their order are kube-router's; sets and statements of ours come last.

A statement exists only when both of its sets have members: gobgpd takes an empty neighbour set as "every neighbour", so
a statement with an empty one would give our pod CIDRs to everybody. Neighbour sets are per family of the *session*,
prefix sets per family of the *route*; all four pairs exist, because one session carries both families.

The members of one prefix set are either all exact, or all "this and every part of it". Then it makes no difference that
gobgpd 3.x asks only the longest member that contains a prefix, and 4.x all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from kube_router.workers.model import Family, IPNetwork
from kube_router.workers.router import names
from kube_router.workers.router.bgpstate import (
    LEARNED_EXTERNAL,
    LEARNED_INTERNAL,
    Attributes,
    Policies,
    PrefixRange,
    Statement,
    host_prefix,
)
from kube_router.workers.router.refused import Refused, around, inside

T = TypeVar("T")

NO_ATTRIBUTES = Attributes()
NOTHING_REFUSED = Refused()
DEFAULT_ROUTES = {Family.IPV4: PrefixRange("0.0.0.0/0", 0, 0), Family.IPV6: PrefixRange("::/0", 0, 0)}


@dataclass(slots=True)
class _Sets:
    """Sets with members, by name."""

    prefixes: dict[str, frozenset[PrefixRange]] = field(default_factory=dict)
    neighbors: dict[str, frozenset[str]] = field(default_factory=dict)

    def pairs(
        self, peer_sets: Mapping[Family, str], *route_sets: Mapping[Family, str]
    ) -> Iterator[tuple[Family, Family, str, str]]:
        """(peer's family, route's family, prefix set, neighbour set) of those that have members, in kube-router's
        order.
        """
        for peer in Family:
            for sets in route_sets:
                for route in Family:
                    if peer_sets[peer] in self.neighbors and sets[route] in self.prefixes:
                        yield peer, route, sets[route], peer_sets[peer]


def desired_policies(
    *,
    pod_cidrs: Sequence[IPNetwork],
    internal: Iterable[str],
    external: Iterable[str],
    advertise_pod_cidr: bool,
    override_next_hop: bool,
    service_vips: Iterable[str] = (),
    known_vips: Iterable[str] = (),
    attributes: Attributes = NO_ATTRIBUTES,
    refused: Refused = NOTHING_REFUSED,
    reflected: Iterable[IPNetwork] | None = None,
) -> Policies:
    """The policies of a node.

    ``internal`` and ``external`` are the peers' addresses. ``override_next_hop`` replaces the next hop towards
    external peers by the session's own address, for routes of the session's family only: the other family's next hop
    would get an address that it cannot use. ``service_vips``: addresses of Services that are announced here;
    ``known_vips``: of any Service. ``attributes`` are added to what external peers get. ``reflected``: the other nodes'
    pod CIDRs on a route reflector, None on any other node.
    """
    internal, external = tuple(internal), tuple(external)
    sets = _Sets()
    announced, known = service_ranges(frozenset(service_vips), frozenset(known_vips))
    sets.prefixes.update((names.SERVICE_VIP_SETS[family], ranges) for family, ranges in announced.items())
    _sorted_in(sets, names.POD_CIDR_SETS, map(_whole, pod_cidrs))
    _sorted_in(sets, names.NODE_POD_CIDR_SETS, map(_whole, reflected or ()))
    _sorted_in(sets, names.DEFAULT_ROUTE_SETS, DEFAULT_ROUTES.values())
    _sorted_in(sets, names.CUSTOM_REJECT_SETS, map(inside, refused.custom))
    sets.prefixes.update((names.KNOWN_VIP_SETS[family], ranges) for family, ranges in known.items())
    _sorted_in(sets, names.PROTECTED_SETS, map(inside, refused.protected))
    _sorted_in(sets, names.COVERING_SETS, around(refused.protected) if refused.covering else ())
    _neighbors(sets, names.IBGP_PEER_SETS, internal)
    _neighbors(sets, names.EXTERNAL_PEER_SETS, external)
    _neighbors(sets, names.ALL_PEER_SETS, (*external, *internal))
    export = [Statement(prefix_set, peers, True) for *_, prefix_set, peers in sets.pairs(*_INTERNAL)]
    if reflected is not None:
        export += _reflections(sets)
    for peer, route, prefix_set, peers in sets.pairs(*_EXTERNAL):
        if advertise_pod_cidr or prefix_set not in names.POD_CIDR_SETS.values():
            actions = replace(attributes, next_hop_self=override_next_hop and peer == route)
            export.append(Statement(prefix_set, peers, True, actions))
    if reflected is not None and advertise_pod_cidr:
        export += _pod_cidrs_of_others(sets, attributes, override_next_hop)
    rejects = (Statement(prefix_set, peers, False) for *_, prefix_set, peers in sets.pairs(*_IMPORT))
    return Policies(sets.prefixes, sets.neighbors, tuple(export), tuple(rejects))


_INTERNAL = (names.IBGP_PEER_SETS, names.POD_CIDR_SETS)
_EXTERNAL = (names.EXTERNAL_PEER_SETS, names.SERVICE_VIP_SETS, names.POD_CIDR_SETS)
_IMPORT = (
    names.ALL_PEER_SETS,
    names.SERVICE_VIP_SETS,
    names.DEFAULT_ROUTE_SETS,
    names.CUSTOM_REJECT_SETS,
    names.KNOWN_VIP_SETS,
    names.PROTECTED_SETS,
    names.COVERING_SETS,
)


def _reflections(sets: _Sets) -> Iterator[Statement]:
    """A reflector's nodes get what others have told it, whoever they were; RFC 4456 decides which node gets what."""
    for peers in names.IBGP_PEER_SETS.values():
        if peers in sets.neighbors:
            for learned in (LEARNED_INTERNAL, LEARNED_EXTERNAL):
                yield Statement("", peers, True, learned=learned)


def _pod_cidrs_of_others(sets: _Sets, attributes: Attributes, override_next_hop: bool) -> Iterator[Statement]:
    """A reflector's external peers get the nodes' pod CIDRs, when it was a node that told it.

    Only routes of the session's family: gobgpd puts the session's address into a learned route that leaves the AS, and
    in one of the other family that address is of no use.
    """
    for peer, route, prefix_set, peers in sets.pairs(names.EXTERNAL_PEER_SETS, names.NODE_POD_CIDR_SETS):
        if peer == route:
            actions = replace(attributes, next_hop_self=override_next_hop)
            yield Statement(prefix_set, peers, True, actions, LEARNED_INTERNAL)


Ranges = Mapping[Family, frozenset[PrefixRange]]


@functools.lru_cache(maxsize=1)
def service_ranges(announced: frozenset[str], known: frozenset[str]) -> tuple[Ranges, Ranges]:
    """The Service addresses as members of sets by family: those that are announced, and all that are known.

    The last answer is remembered. Addresses are thousands and mostly do not change with what else does, and who gets
    the same sets again need not compare them.
    """
    every = {address: _host(address) for address in announced | known}
    return _by_family(every[address] for address in announced), _by_family(every.values())


def _by_family(ranges: Iterable[PrefixRange]) -> Ranges:
    found: dict[Family, set[PrefixRange]] = {}
    for item in ranges:
        found.setdefault(_family(item.prefix), set()).add(item)
    return {family: frozenset(items) for family, items in found.items()}


def _host(address: str) -> PrefixRange:
    length = 128 if ":" in address else 32
    return PrefixRange(host_prefix(address), length, length)


def _whole(network: IPNetwork) -> PrefixRange:
    return PrefixRange(str(network), network.prefixlen, network.prefixlen)


def _sorted_in(sets: _Sets, set_names: Mapping[Family, str], ranges: Iterable[PrefixRange]) -> None:
    """Sort ranges into the sets of their families."""
    sets.prefixes.update((set_names[family], items) for family, items in _by_family(ranges).items())


def _neighbors(sets: _Sets, set_names: Mapping[Family, str], addresses: Iterable[str]) -> None:
    members: dict[str, set[str]] = {}
    for address in addresses:
        members.setdefault(set_names[_family(address)], set()).add(host_prefix(address))
    sets.neighbors.update((name, frozenset(items)) for name, items in members.items())


def _family(text: str) -> Family:
    return Family.IPV6 if ":" in text else Family.IPV4


def merged(actual: Policies, desired: Policies) -> Policies:
    """Both at once: what a node may do that must not yet take anything away (every set the union of its two).

    A statement that both have is as ``desired`` has it. One that only ``actual`` has stays if it is of our kind: one
    without a set was made by somebody else, and may hold for every neighbour.
    """
    prefix_sets = _union(actual.prefix_sets, desired.prefix_sets)
    neighbor_sets = _union(actual.neighbor_sets, desired.neighbor_sets)

    def both(first: Iterable[Statement], then: Iterable[Statement]) -> tuple[Statement, ...]:
        by_name = {statement.name: statement for statement in first}
        for statement in then:
            complete = (statement.prefix_set or statement.learned) and statement.neighbor_set in neighbor_sets
            if complete and (not statement.prefix_set or statement.prefix_set in prefix_sets):
                by_name.setdefault(statement.name, statement)
        return tuple(by_name.values())

    export, import_ = both(desired.export, actual.export), both(desired.import_, actual.import_)
    return Policies(prefix_sets, neighbor_sets, export, import_)


def _union(left: Mapping[str, frozenset[T]], right: Mapping[str, frozenset[T]]) -> dict[str, frozenset[T]]:
    none: frozenset[T] = frozenset()
    return {name: left.get(name, none) | right.get(name, none) for name in {**left, **right}}
