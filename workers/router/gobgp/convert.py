"""Between the neutral BGP values and gobgpd's messages, in both directions and for both generations.

Pure: messages only. What gobgpd fills in or reorders on read-back is taken out again here (routing facts in
``docs/router.md``), so that a state read back equals the state that was asked for.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from kube_router.workers.model import Family, IPAddress, IPNetwork
from kube_router.workers.router import names
from kube_router.workers.router.bgpstate import (
    LEARNED_EXTERNAL,
    LEARNED_INTERNAL,
    Assignment,
    Attributes,
    Policies,
    PrefixRange,
    Speaker,
    Statement,
)
from kube_router.workers.router.rib import RouteEvent

AFI = {Family.IPV4: 1, Family.IPV6: 2}
FAMILY_OF_AFI = {1: Family.IPV4, 2: Family.IPV6}
UNICAST = 1
LOCAL_ORIGIN = ("", "<nil>")
"""What a path of our own has for its neighbour: empty in generation 4, a printed nil in generation 3."""


class Dialect(Protocol):
    """What differs between the generations of gobgpd's interface."""

    generation: int
    service: str
    messages: Any

    def nlri(self, network: IPNetwork) -> Any: ...

    def attributes(self, network: IPNetwork, next_hop: IPAddress) -> list[Any]: ...

    def prefix_of(self, path: Any) -> str | None: ...

    def next_hop_of(self, path: Any) -> str | None: ...

    def capabilities(self, peer: Any) -> Iterator[tuple[str, Any]]: ...


def family_message(dialect: Dialect, family: Family) -> Any:
    """The unicast address family."""
    return dialect.messages.Family(afi=AFI[family], safi=UNICAST)


def path_message(dialect: Dialect, prefix: str, next_hop: str, *, withdraw: bool = False) -> Any:
    """A path that originates here."""
    network = ipaddress.ip_network(prefix)
    return dialect.messages.Path(
        nlri=dialect.nlri(network),
        pattrs=dialect.attributes(network, ipaddress.ip_address(next_hop)),
        family=family_message(dialect, Family(network.version)),
        is_withdraw=withdraw,
    )


def speaker_message(dialect: Dialect, speaker: Speaker) -> Any:
    """The argument of StartBgp."""
    return dialect.messages.Global(
        asn=speaker.asn,
        router_id=speaker.router_id,
        listen_port=speaker.listen_port,
        listen_addresses=sorted(speaker.listen_addresses),
    )


def speaker_of(message: Any) -> Speaker | None:
    """None for a daemon on which BGP is not started."""
    if message.asn == 0:
        return None
    return Speaker(
        asn=message.asn,
        router_id=message.router_id,
        listen_port=message.listen_port,
        listen_addresses=frozenset(address_text(text) for text in message.listen_addresses),
    )


def policies_message(dialect: Dialect, policies: Policies) -> Any:
    """The argument of SetPolicies: all sets, statements and policies."""
    messages = dialect.messages
    sets = [_prefix_set_message(dialect, name, members) for name, members in sorted(policies.prefix_sets.items())]
    sets += [
        messages.DefinedSet(defined_type=messages.DEFINED_NEIGHBOR, name=name, list=sorted(members))
        for name, members in sorted(policies.neighbor_sets.items())
    ]
    chains = ((names.EXPORT_POLICY, policies.export), (names.IMPORT_POLICY, policies.import_))
    return messages.SetPoliciesRequest(
        defined_sets=sets,
        policies=[
            messages.Policy(name=name, statements=[_statement_message(dialect, item) for item in statements])
            for name, statements in chains
        ],
    )


def _statement_message(dialect: Dialect, statement: Statement) -> Any:
    messages = dialect.messages
    conditions = messages.Conditions(
        neighbor_set=messages.MatchSet(type=messages.MATCH_ANY, name=statement.neighbor_set)
    )
    if statement.prefix_set:
        conditions.prefix_set.type = messages.MATCH_ANY
        conditions.prefix_set.name = statement.prefix_set
    if statement.learned:
        conditions.route_type = _learned_from(messages)[statement.learned]
    return messages.Statement(name=statement.name, conditions=conditions, actions=_actions_message(dialect, statement))


def _actions_message(dialect: Dialect, statement: Statement) -> Any:
    messages, attributes = dialect.messages, statement.attributes
    actions = messages.Actions(route_action=messages.ROUTE_ACCEPT if statement.accept else messages.ROUTE_REJECT)
    if attributes.next_hop_self:
        actions.nexthop.self = True
    if attributes.prepend is not None:
        actions.as_prepend.asn, actions.as_prepend.repeat = attributes.prepend
    for field, values in (
        (actions.community, attributes.communities),
        (actions.large_community, attributes.large_communities),
    ):
        if values:
            field.type = messages.COMMUNITY_ADD
            field.communities.extend(values)
    return actions


def _learned_from(messages: Any) -> dict[str, int]:
    return {LEARNED_INTERNAL: messages.LEARNED_INTERNAL, LEARNED_EXTERNAL: messages.LEARNED_EXTERNAL}


def set_change(dialect: Dialect, name: str, members: Iterable[PrefixRange], *, add: bool) -> Any:
    """The argument of AddDefinedSet or DeleteDefinedSet: members of a prefix set that come or go."""
    messages = dialect.messages
    request = messages.AddDefinedSetRequest if add else messages.DeleteDefinedSetRequest
    return request(defined_set=_prefix_set_message(dialect, name, members))


def _prefix_set_message(dialect: Dialect, name: str, members: Iterable[PrefixRange]) -> Any:
    messages = dialect.messages
    return messages.DefinedSet(
        defined_type=messages.DEFINED_PREFIX,
        name=name,
        prefixes=[
            messages.Prefix(ip_prefix=item.prefix, mask_length_min=item.shortest, mask_length_max=item.longest)
            for item in sorted(members)
        ],
    )


def policies_of(dialect: Dialect, prefix_sets: Iterable[Any], neighbor_sets: Iterable[Any], chains: Any) -> Policies:
    """Sets and policies as read back; a set without members is left out."""
    statements = {chain.name: tuple(_statement_of(dialect, item) for item in chain.statements) for chain in chains}
    return Policies(
        prefix_sets={
            item.name: frozenset(
                PrefixRange(_network(prefix.ip_prefix), prefix.mask_length_min, prefix.mask_length_max)
                for prefix in item.prefixes
            )
            for item in prefix_sets
            if item.prefixes
        },
        neighbor_sets={item.name: frozenset(map(_network, item.list)) for item in neighbor_sets if item.list},
        export=statements.get(names.EXPORT_POLICY, ()),
        import_=statements.get(names.IMPORT_POLICY, ()),
    )


def _statement_of(dialect: Dialect, message: Any) -> Statement:
    sources = {number: name for name, number in _learned_from(dialect.messages).items()}
    statement = Statement(
        prefix_set=message.conditions.prefix_set.name,
        neighbor_set=message.conditions.neighbor_set.name,
        accept=message.actions.route_action == dialect.messages.ROUTE_ACCEPT,
        attributes=_attributes_of(message.actions),
        learned=sources.get(message.conditions.route_type, ""),
    )
    # Someone else's statement must not compare equal to one of ours.
    ours = message.name == statement.name and _says_the_same(dialect, message, statement)
    return statement if ours else Statement(f"foreign:{message.name}:", "", statement.accept)


def _attributes_of(actions: Any) -> Attributes:
    prepend = actions.as_prepend
    return Attributes(
        next_hop_self=actions.nexthop.self,
        prepend=(prepend.asn, prepend.repeat) if prepend.repeat else None,
        communities=tuple(actions.community.communities),
        large_communities=tuple(actions.large_community.communities),
    )


def _says_the_same(dialect: Dialect, message: Any, statement: Statement) -> bool:
    """Whether a statement read back says what ``statement`` would be sent as, of all that we know of."""
    wanted = _statement_message(dialect, statement)
    pairs = (
        (message.actions.route_action, wanted.actions.route_action),
        (message.actions.community.type, wanted.actions.community.type),
        (message.actions.large_community.type, wanted.actions.large_community.type),
        (message.conditions.prefix_set, wanted.conditions.prefix_set),
        (message.conditions.neighbor_set, wanted.conditions.neighbor_set),
        (message.conditions.route_type, wanted.conditions.route_type),
    )
    return all(found == asked for found, asked in pairs)


def assignment_of(dialect: Dialect, message: Any) -> Assignment:
    """A direction's assignment as read back."""
    return Assignment(
        policies=tuple(policy.name for policy in message.policies),
        accept=message.default_action != dialect.messages.ROUTE_REJECT,
    )


def assignment_message(dialect: Dialect, direction: str, assignment: Assignment) -> Any:
    """The argument of SetPolicyAssignment; ``direction`` is ``export`` or ``import``."""
    messages = dialect.messages
    return messages.PolicyAssignment(
        name=names.GLOBAL_ASSIGNMENT,
        direction=messages.POLICY_EXPORT if direction == "export" else messages.POLICY_IMPORT,
        policies=[messages.Policy(name=name) for name in assignment.policies],
        default_action=messages.ROUTE_ACCEPT if assignment.accept else messages.ROUTE_REJECT,
    )


def local_path(dialect: Dialect, path: Any) -> tuple[str, str] | None:
    """(prefix, next hop) of a path that originates here, canonical; None for a learned or other one."""
    if path.neighbor_ip not in LOCAL_ORIGIN:
        return None
    prefix = dialect.prefix_of(path)
    if prefix is None:
        return None
    return _network(prefix), address_text(dialect.next_hop_of(path) or "")


def route_event(dialect: Dialect, path: Any) -> RouteEvent | None:
    """A best-path event; None when the path is not unicast IPv4 or IPv6, or has no next hop."""
    prefix = dialect.prefix_of(path)
    if prefix is None or path.family.safi != UNICAST or path.family.afi not in FAMILY_OF_AFI:
        return None
    local = path.neighbor_ip in LOCAL_ORIGIN
    if path.is_withdraw:
        return RouteEvent(prefix, None, local)
    next_hop = dialect.next_hop_of(path)
    # Of next hops there are few and of prefixes many: one text of each for all that have it.
    return None if next_hop is None else RouteEvent(prefix, sys.intern(next_hop), local)


def address_text(text: str) -> str:
    """Canonical text of an address; other text (``::`` zones, empty) as it is."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return text


def _network(text: str) -> str:
    """Canonical text of a CIDR or address; other text as it is."""
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        return text
