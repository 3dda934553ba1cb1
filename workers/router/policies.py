"""The export and import policies: who may learn what, and what nobody may teach us.

Pure: peers and prefixes in, `Policies` out; and `decision`, gobgpd's evaluation of them, to foresee a change's effect.

========================= ========================== ===================================
route                     to a node (iBGP)           to an external peer
========================= ========================== ===================================
own pod CIDR              yes                        with ``--advertise-pod-cidr``
anything learned          no                         no
========================= ========================== ===================================

Accepted from any peer: everything but the default routes. Set and statement names are kube-router's. A statement
exists only when both of its sets have members: gobgpd takes an empty neighbour set as "every neighbour", so a statement
with an empty one would give our pod CIDRs to everybody. Neighbour sets are per family of the *session*, prefix sets per
family of the *route*; all four pairs exist, because one session carries both families.

The place for later features: service addresses (``SERVICE_VIP_SETS``) go before the pod CIDRs in the external exports
and before the default routes in the imports; custom rejects (``CUSTOM_REJECT_SETS``) end the imports; communities and
path prepending are further actions of the external statements; a route reflector exports learned routes to its clients.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from kube_router.workers.model import Family, IPNetwork
from kube_router.workers.router import names
from kube_router.workers.router.bgpstate import Assignment, Policies, PrefixRange, Statement

T = TypeVar("T")

DEFAULT_ROUTES = {Family.IPV4: PrefixRange("0.0.0.0/0", 0, 0), Family.IPV6: PrefixRange("::/0", 0, 0)}


def desired_policies(
    *,
    pod_cidrs: Sequence[IPNetwork],
    internal: Iterable[str],
    external: Iterable[str],
    advertise_pod_cidr: bool,
    override_next_hop: bool,
) -> Policies:
    """The policies of a node.

    ``internal`` and ``external`` are the peers' addresses. ``override_next_hop`` replaces the next hop towards
    external peers by the session's own address, for routes of the session's family only: the other family's next hop
    would get an address that it cannot use.
    """
    internal, external = tuple(internal), tuple(external)
    prefix_sets = {
        **_prefix_sets(names.POD_CIDR_SETS, pod_cidrs),
        **{names.DEFAULT_ROUTE_SETS[family]: frozenset({item}) for family, item in DEFAULT_ROUTES.items()},
    }
    neighbor_sets = {
        **_neighbor_sets(names.IBGP_PEER_SETS, internal),
        **_neighbor_sets(names.EXTERNAL_PEER_SETS, external),
        **_neighbor_sets(names.ALL_PEER_SETS, (*external, *internal)),
    }

    def statements(
        peer_sets: Mapping[Family, str], route_sets: Mapping[Family, str], *, accept: bool, own_hop: bool = False
    ) -> list[Statement]:
        return [
            Statement(route_sets[route], peer_sets[peer], accept, own_hop and route == peer)
            for peer in Family
            for route in Family
            if peer_sets[peer] in neighbor_sets and route_sets[route] in prefix_sets
        ]

    export = statements(names.IBGP_PEER_SETS, names.POD_CIDR_SETS, accept=True)
    if advertise_pod_cidr:
        export += statements(names.EXTERNAL_PEER_SETS, names.POD_CIDR_SETS, accept=True, own_hop=override_next_hop)
    import_ = statements(names.ALL_PEER_SETS, names.DEFAULT_ROUTE_SETS, accept=False)
    return Policies(prefix_sets, neighbor_sets, tuple(export), tuple(import_))


def _prefix_sets(set_names: Mapping[Family, str], networks: Iterable[IPNetwork]) -> dict[str, frozenset[PrefixRange]]:
    members: dict[str, set[PrefixRange]] = {}
    for network in networks:
        item = PrefixRange(str(network), network.prefixlen, network.prefixlen)
        members.setdefault(set_names[Family(network.version)], set()).add(item)
    return {name: frozenset(items) for name, items in members.items()}


def _neighbor_sets(set_names: Mapping[Family, str], addresses: Iterable[str]) -> dict[str, frozenset[str]]:
    members: dict[str, set[str]] = {}
    for text in addresses:
        network = ipaddress.ip_network(text)
        members.setdefault(set_names[Family(network.version)], set()).add(str(network))
    return {name: frozenset(items) for name, items in members.items()}


def merged(actual: Policies, desired: Policies) -> Policies:
    """Both at once: what a node may do that must not yet take anything away (every set the union of its two)."""
    return Policies(
        prefix_sets=_union(actual.prefix_sets, desired.prefix_sets),
        neighbor_sets=_union(actual.neighbor_sets, desired.neighbor_sets),
        export=tuple(dict.fromkeys((*desired.export, *actual.export))),
        import_=tuple(dict.fromkeys((*desired.import_, *actual.import_))),
    )


def _union(left: Mapping[str, frozenset[T]], right: Mapping[str, frozenset[T]]) -> dict[str, frozenset[T]]:
    none: frozenset[T] = frozenset()
    return {name: left.get(name, none) | right.get(name, none) for name in {**left, **right}}


def decision(
    policies: Policies, assignment: Assignment, statements: Sequence[Statement], prefix: str, neighbor: str
) -> Statement | bool:
    """What gobgpd does with ``prefix`` towards (export) or from (import) ``neighbor``.

    Returns the first statement that matches, or the assignment's default. An assignment without policies never looks
    at the statements. As gobgpd: an empty neighbour set matches every neighbour, an empty prefix set no prefix.
    """
    if assignment.policies:
        network = ipaddress.ip_network(prefix)
        for statement in statements:
            ranges = policies.prefix_sets.get(statement.prefix_set, frozenset())
            members = policies.neighbor_sets.get(statement.neighbor_set, frozenset())
            if not any(_covers(item, network) for item in ranges):
                continue
            if not members or among(neighbor, members):
                return statement
    return assignment.accept


def among(address: str, members: frozenset[str]) -> bool:
    """Whether a neighbour set has ``address``; our sets hold host prefixes only."""
    return f"{address}/{128 if ':' in address else 32}" in members


def accepts(verdict: Statement | bool) -> bool:
    """Whether a `decision` lets the path pass."""
    return verdict if isinstance(verdict, bool) else verdict.accept


def _covers(item: PrefixRange, network: IPNetwork) -> bool:
    outer = ipaddress.ip_network(item.prefix)
    return (
        outer.version == network.version
        and item.shortest <= network.prefixlen <= item.longest
        and network.network_address in outer
    )
