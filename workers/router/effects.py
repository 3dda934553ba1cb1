"""What a changed policy asks for beyond itself: gobgpd applies it to later updates only.

Pure: two states in, `Effects` out. Looks at sessions and paths that stay as they are: new ones meet the new policies,
those that go are withdrawn anyway.

Of learned routes only the statements that let them pass are looked at, not the members of their sets: when a node or
its pod CIDR goes, its session or its own withdrawal takes the routes along, which no policy stops.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kube_router.workers.router import names
from kube_router.workers.router.bgpstate import (
    Attributes,
    BgpState,
    PrefixRange,
    Statement,
    is_host_prefix,
    same_session,
)
from kube_router.workers.router.verdicts import accepts, changed_members, concerns, decision, exact


@dataclass(frozen=True, slots=True)
class Effects:
    """By peer address. ``forget``: gets less than it had: of own paths the prefixes ``withdraw``; those in
    ``forget_learned`` less learned routes too. ``send``: gets more, or something else. ``judge``: may teach us other
    routes than before.
    """

    forget: tuple[str, ...] = ()
    withdraw: tuple[str, ...] = ()
    forget_learned: tuple[str, ...] = ()
    send: tuple[str, ...] = ()
    judge: tuple[str, ...] = ()


def effects(actual: BgpState, desired: BgpState, learned: Container[str] | None) -> Effects:
    """What must follow the change from ``actual`` to ``desired``.

    ``learned``: the prefixes of all learned routes, None if they are not known.
    """
    if actual.policies == desired.policies and actual.export == desired.export and actual.import_ == desired.import_:
        return Effects()
    staying = [
        address
        for address, item in sorted(desired.neighbors.items())
        if (running := actual.neighbors.get(address)) is not None and (running == item or same_session(running, item))
    ]
    paths = list(_paths_in_question(actual, desired))
    forget: set[str] = set()
    withdraw: set[str] = set()
    forget_learned: set[str] = set()
    send: set[str] = set()
    judge: set[str] = set()
    for group in _alike(staying, actual, desired):
        first = group[0]
        lost, gained = _own_paths(actual, desired, paths, first)
        withdraw.update(lost)
        less, more = _learned(actual, desired, first)
        forget.update(group if lost or less else ())
        forget_learned.update(group if less else ())
        send.update(group if gained or more else ())
        judge.update(_judged(group, actual, desired, learned))
    return Effects(*(tuple(sorted(found)) for found in (forget, withdraw, forget_learned, send, judge)))


def _alike(addresses: Iterable[str], *states: BgpState) -> Iterable[Sequence[str]]:
    """Addresses that the same statements concern, together: there are thousands of nodes, and two or three kinds."""
    statements = [(state.policies, item) for state in states for item in _by_neighbors(state)]
    groups: dict[tuple[bool, ...], list[str]] = {}
    for address in addresses:
        key = tuple(concerns(policies, item, address) for policies, item in statements)
        groups.setdefault(key, []).append(address)
    return groups.values()


def _by_neighbors(state: BgpState) -> Iterable[Statement]:
    """One statement of each neighbour set in use."""
    return {item.neighbor_set: item for item in (*state.policies.export, *state.policies.import_)}.values()


def _paths_in_question(actual: BgpState, desired: BgpState) -> Iterator[str]:
    """Own paths that stay, as far as the change can concern them."""
    before, after = actual.policies, desired.policies
    same = (before.export, before.neighbor_sets, actual.export) == (after.export, after.neighbor_sets, desired.export)
    changed = changed_members(before.prefix_sets, after.prefix_sets) if same else frozenset()
    if same and all(map(exact, changed)):
        candidates: Iterable[str] = sorted({item.prefix for item in changed})
    else:
        candidates = sorted(desired.paths)
    for prefix in candidates:
        if prefix in desired.paths and actual.paths.get(prefix) == desired.paths[prefix]:
            yield prefix


def _own_paths(actual: BgpState, desired: BgpState, paths: Iterable[str], address: str) -> tuple[list[str], list[str]]:
    """Those that ``address`` may no longer have, and those that it gets in addition or with other attributes."""
    lost, gained = [], []
    for prefix in paths:
        before = decision(actual.policies, actual.export, actual.policies.export, prefix, address)
        after = decision(desired.policies, desired.export, desired.policies.export, prefix, address)
        if accepts(before) and not accepts(after):
            lost.append(prefix)
        elif accepts(after) and (not accepts(before) or _attributes(before) != _attributes(after)):
            gained.append(prefix)
    return lost, gained


def _attributes(verdict: Statement | bool) -> Attributes:
    return Attributes() if isinstance(verdict, bool) else verdict.attributes


def _learned(actual: BgpState, desired: BgpState, address: str) -> tuple[bool, bool]:
    """Whether ``address`` gets fewer learned routes than before; whether more or others."""
    before, after = _passing(actual, address), _passing(desired, address)
    fewer = any(name not in after for name in before)
    return fewer, any(before.get(name) != attributes for name, attributes in after.items())


def _passing(state: BgpState, address: str) -> Mapping[str, Attributes]:
    """The statements that let learned routes pass to ``address``: attributes by name. An open default is one too."""
    found = {
        item.name: item.attributes
        for item in state.policies.export
        if item.accept and item.learned and state.export.policies and concerns(state.policies, item, address)
    }
    return {**found, "": Attributes()} if state.export.accept else found


def _judged(group: Sequence[str], actual: BgpState, desired: BgpState, learned: Container[str] | None) -> Sequence[str]:
    """Those of ``group`` whose routes the import policy may now judge otherwise.

    Service addresses come and go all the time, and judging a peer's routes again takes gobgpd time. A new one concerns
    only a route that is there; one that goes only a peer that announces such addresses, which our nodes do not.
    """
    before, after = _import_rules(actual, group[0]), _import_rules(desired, group[0])
    if before == after:
        return ()
    refused, wanted = _refused(before), _refused(after)
    if refused is None or wanted is None:
        return group
    new, gone = wanted - refused, refused - wanted
    if (
        not all(is_host_prefix(item.prefix) for item in new | gone)
        or learned is None
        or any(item.prefix in learned for item in new)
    ):
        return group
    nodes = {member.partition("/")[0] for name in names.IBGP_PEER_SETS.values() for member in _members(desired, name)}
    return [address for address in group if gone and address not in nodes]


def _members(state: BgpState, name: str) -> Iterable[str]:
    return state.policies.neighbor_sets.get(name, ())


Rules = tuple[tuple[tuple[frozenset[PrefixRange], bool], ...], bool]


def _import_rules(state: BgpState, address: str) -> Rules:
    """What the import policy says to routes of a peer: the ordered verdicts that concern it, and the default."""
    concerned = [
        (state.policies.prefix_sets.get(item.prefix_set, frozenset()), item.accept)
        for item in state.policies.import_
        if state.import_.policies and concerns(state.policies, item, address)
    ]
    return tuple(concerned), state.import_.accept


def _refused(rules: Rules) -> frozenset[PrefixRange] | None:
    """All that is refused, where anything else is accepted; None where the rules are of another kind."""
    verdicts, default = rules
    if not default or any(accept for _, accept in verdicts):
        return None
    none: frozenset[PrefixRange] = frozenset()
    return none.union(*(members for members, _ in verdicts))
