"""What separates the speaker that runs from the one that should: ordered steps, as data.

Pure: two states in, a `Plan` out; the same state twice gives an empty plan. Passwords never show in a plan's text.

The order keeps routes closed rather than open when a step fails: start (exports closed) → peers that go → policies →
paths → peers that come. A path or a peer is never there without the policies that hold for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from kube_router.workers.router import names
from kube_router.workers.router.bgpstate import (
    CLOSED,
    FRESH,
    Assignment,
    BgpState,
    Neighbor,
    Policies,
    PrefixRange,
    Speaker,
    is_host_prefix,
    same_session,
)
from kube_router.workers.router.effects import effects
from kube_router.workers.router.policies import merged

MOST_LISTED = 12
"""Members of a set that a plan's text names one by one."""

NAMED = tuple(item.name for item in fields(Neighbor) if item.name not in ("address", "password"))


@dataclass(frozen=True, slots=True)
class StartSpeaker:
    """Start BGP on a fresh daemon and close its exports at once: gobgpd begins with everything allowed."""

    speaker: Speaker

    def __str__(self) -> str:
        return f"start BGP: {self.speaker}; export nothing yet"


@dataclass(frozen=True, slots=True)
class ReplaceDaemon:
    """End the gobgpd process, for its supervisor to start a fresh one: a running one cannot change these settings.

    ``silently``: peers that know graceful restart are not told, and keep our routes.
    """

    actual: Speaker
    desired: Speaker
    silently: bool = False

    def __str__(self) -> str:
        way = ", gracefully" if self.silently else ""
        return f"restart gobgpd{way}: it runs {self.actual}, wanted is {self.desired}"


@dataclass(frozen=True, slots=True)
class SetPolicies:
    """Replace all sets, statements and policies at once."""

    policies: Policies

    def __str__(self) -> str:
        members = {name: sorted(map(str, items)) for name, items in self.policies.prefix_sets.items()}
        members |= {name: sorted(items) for name, items in self.policies.neighbor_sets.items()}
        lines = [f"set {name} = {{{_some(items)}}}" for name, items in sorted(members.items())]
        lines += [f"export {item}" for item in self.policies.export]
        lines += [f"import {item}" for item in self.policies.import_]
        return "set policies:" + "".join(f"\n    {line}" for line in lines)


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """Add members to a prefix set that is there, or remove some; the statements that use it stay."""

    name: str
    add: frozenset[PrefixRange] = frozenset()
    remove: frozenset[PrefixRange] = frozenset()

    def __str__(self) -> str:
        parts = [("add to", self.add), ("remove from", self.remove)]
        return "; ".join(
            f"{verb} set {self.name}: {', '.join(map(str, sorted(items)))}" for verb, items in parts if items
        )


@dataclass(frozen=True, slots=True)
class Assign:
    """Let policies decide a direction (``export`` or ``import``)."""

    direction: str
    assignment: Assignment

    def __str__(self) -> str:
        return f"assign {self.direction}: {self.assignment}"


@dataclass(frozen=True, slots=True)
class AddPath:
    """Originate a prefix, or give it another next hop."""

    prefix: str
    next_hop: str

    def __str__(self) -> str:
        return f"originate {self.prefix} via {self.next_hop}"


@dataclass(frozen=True, slots=True)
class RemovePath:
    """Stop originating a prefix; peers get a withdrawal."""

    prefix: str
    next_hop: str

    def __str__(self) -> str:
        return f"withdraw {self.prefix}"


@dataclass(frozen=True, slots=True)
class Retract:
    """Make peers forget what a tighter policy now denies them.

    ``paths``: (prefix, next hop) of paths that originate here; ``learned``: the peers among ``addresses`` whose learned
    routes are concerned as well. gobgpd 4.6 and newer withdraws on a soft reset of the peer. Generation 3 never does:
    there, the paths are withdrawn from all and originated again, and the sessions with ``learned`` begin anew.
    """

    addresses: tuple[str, ...]
    paths: tuple[tuple[str, str], ...] = ()
    learned: tuple[Neighbor, ...] = ()

    def __str__(self) -> str:
        what = [prefix for prefix, _ in self.paths] + (["learned routes"] if self.learned else [])
        return f"make {' '.join(self.addresses)} forget {', '.join(what)}"


@dataclass(frozen=True, slots=True)
class RemoveNeighbor:
    """End a session and forget the peer."""

    neighbor: Neighbor

    def __str__(self) -> str:
        return f"remove peer {self.neighbor.address}"


@dataclass(frozen=True, slots=True)
class ReplaceNeighbor:
    """End a session and begin it anew with other settings."""

    actual: Neighbor
    desired: Neighbor

    def __str__(self) -> str:
        return f"replace peer {self.actual.address}: {'; '.join(_differences(self.actual, self.desired))}"


@dataclass(frozen=True, slots=True)
class UpdateNeighbor:
    """Change what gobgpd changes without ending the session; another hold time counts from the next one on."""

    actual: Neighbor
    desired: Neighbor

    def __str__(self) -> str:
        return f"update peer {self.actual.address}: {'; '.join(_differences(self.actual, self.desired))}"


@dataclass(frozen=True, slots=True)
class AddNeighbor:
    """Hold a new session. ``restarting``: tell the peer that we are back from a restart and have kept forwarding."""

    neighbor: Neighbor
    restarting: bool = False

    def __str__(self) -> str:
        return f"add peer {self.neighbor}{', after a restart' if self.restarting else ''}"


@dataclass(frozen=True, slots=True)
class SendAgain:
    """Send a peer what a wider policy now allows it (soft reset out)."""

    address: str

    def __str__(self) -> str:
        return f"send {self.address} its routes again"


@dataclass(frozen=True, slots=True)
class JudgeAgain:
    """Apply the import policy anew to what a peer has sent (soft reset in)."""

    address: str

    def __str__(self) -> str:
        return f"judge the routes of {self.address} again"


Step = (
    StartSpeaker
    | ReplaceDaemon
    | SetPolicies
    | ChangeSet
    | Assign
    | AddPath
    | RemovePath
    | Retract
    | RemoveNeighbor
    | ReplaceNeighbor
    | UpdateNeighbor
    | AddNeighbor
    | SendAgain
    | JudgeAgain
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in the order in which they are to be done."""

    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return "\n".join(f"{number:3} {step}" for number, step in enumerate(self.steps, 1)) or "  0 nothing to do"


def diff(actual: BgpState, desired: BgpState, *, keep: bool = False, learned: Container[str] | None = None) -> Plan:
    """The steps from ``actual`` to ``desired``. ``learned``: prefixes of learned routes, None if they are not known.

    ``keep``: take nothing away (the wanted state comes from a stale snapshot): no path, peer or allowance goes, and a
    running speaker keeps its settings. A speaker that must be replaced is a plan of that one step: everything else
    begins anew on the fresh daemon.
    """
    if keep and actual.speaker is not None:
        desired = kept(actual, desired)
    if desired.speaker is None:
        return Plan()
    if actual.speaker is None:
        start = StartSpeaker(desired.speaker)
        return Plan((start, *_changes(replace(FRESH, speaker=desired.speaker, export=CLOSED), desired, learned)))
    if actual.speaker != desired.speaker:
        silently = any(item.graceful_restart is not None for item in actual.neighbors.values())
        return Plan((ReplaceDaemon(actual.speaker, desired.speaker, silently),))
    return Plan(tuple(_changes(actual, desired, learned)))


def kept(actual: BgpState, desired: BgpState) -> BgpState:
    """``desired``, with everything that ``actual`` has beyond it."""
    return replace(
        desired,
        speaker=actual.speaker,
        policies=merged(actual.policies, desired.policies),
        paths={**actual.paths, **desired.paths},
        neighbors={**actual.neighbors, **desired.neighbors},
    )


def _changes(actual: BgpState, desired: BgpState, learned: Container[str] | None) -> Iterator[Step]:
    for address, neighbor in sorted(actual.neighbors.items()):
        if address not in desired.neighbors:
            yield RemoveNeighbor(neighbor)
    changed_sets = _changed_sets(actual.policies, desired.policies)
    if changed_sets is None:
        yield SetPolicies(desired.policies)
    # A member comes before the path that it is for, and goes after it.
    yield from (ChangeSet(item.name, add=item.add) for item in changed_sets or () if item.add)
    if actual.import_ != desired.import_:
        yield Assign("import", desired.import_)
    if actual.export != desired.export:
        yield Assign("export", desired.export)
    for prefix, next_hop in sorted(desired.paths.items()):
        if actual.paths.get(prefix) != next_hop:
            yield AddPath(prefix, next_hop)
    for prefix, next_hop in sorted(actual.paths.items()):
        if prefix not in desired.paths:
            yield RemovePath(prefix, next_hop)
    yield from (ChangeSet(item.name, remove=item.remove) for item in changed_sets or () if item.remove)
    yield from _neighbor_changes(actual, desired)
    yield from _policy_effects(actual, desired, learned)


_LARGE_SETS = frozenset({*names.SERVICE_VIP_SETS.values(), *names.KNOWN_VIP_SETS.values()})


def _changed_sets(actual: Policies, desired: Policies) -> tuple[ChangeSet, ...] | None:
    """What changes in the sets of Service addresses when nothing else does; None when something else does.

    There can be thousands of them, and one of a few comes and goes every second. A set that appears or goes is another
    matter: its statements do too.
    """
    if (actual.neighbor_sets, actual.export, actual.import_) != (
        desired.neighbor_sets,
        desired.export,
        desired.import_,
    ):
        return None
    before, after = actual.prefix_sets, desired.prefix_sets
    changed = [name for name in sorted(after) if before.get(name) != after[name]]
    if before.keys() != after.keys() or not _LARGE_SETS.issuperset(changed):
        return None
    return tuple(ChangeSet(name, after[name] - before[name], before[name] - after[name]) for name in changed)


def _neighbor_changes(actual: BgpState, desired: BgpState) -> Iterator[Step]:
    for address, neighbor in sorted(desired.neighbors.items()):
        running = actual.neighbors.get(address)
        if running is None:
            yield AddNeighbor(neighbor)
        elif running != neighbor:
            yield (
                UpdateNeighbor(running, neighbor)
                if same_session(running, neighbor)
                else ReplaceNeighbor(running, neighbor)
            )


def _policy_effects(actual: BgpState, desired: BgpState, learned: Container[str] | None) -> Iterator[Step]:
    """What must be withdrawn, sent or judged again: gobgpd applies a changed policy to later updates only."""
    found = effects(actual, desired, learned)
    if found.forget:
        paths = tuple((prefix, desired.paths[prefix]) for prefix in found.withdraw)
        yield Retract(found.forget, paths, tuple(desired.neighbors[address] for address in found.forget_learned))
    for address in found.send:
        yield SendAgain(address)
    for address in found.judge:
        yield JudgeAgain(address)


def _differences(actual: Neighbor, desired: Neighbor) -> Iterator[str]:
    for name in NAMED:
        before, after = getattr(actual, name), getattr(desired, name)
        if before != after:
            yield f"{name} {_text(before)} -> {_text(after)}"
    if actual.password != desired.password:
        yield "password changed"


def _some(items: Sequence[str]) -> str:
    """All items, or of more than a line's worth the first few and how many there are."""
    if len(items) <= MOST_LISTED:
        return ", ".join(items)
    return f"{', '.join(items[:3])}, … {len(items)} in all"


def _text(value: object) -> str:
    return "+".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value) or "none"


def advertisements(plan: Plan, policies: Policies) -> Mapping[str, int]:
    """How much the steps of a plan announce and withdraw, by the type that kube-router's metric gives it."""
    sent: Counter[str] = Counter()
    pods = {item.prefix for name in names.POD_CIDR_SETS.values() for item in policies.prefix_sets.get(name, ())}
    for step in plan.steps:
        match step:
            case AddPath(prefix):
                sent["pod-route" if prefix in pods else "advertise-vip"] += 1
            case RemovePath(prefix) if is_host_prefix(prefix):
                sent["withdraw-vip"] += 1
    return sent


def phase(step: Step) -> str:
    """Under which name a failure of a step is counted."""
    match step:
        case StartSpeaker() | ReplaceDaemon():
            return "bgp-start"
        case SetPolicies() | ChangeSet() | Assign() | Retract() | SendAgain() | JudgeAgain():
            return "bgp-policies"
        case AddPath() | RemovePath():
            return "bgp-paths"
        case _:
            return "bgp-peers"


def headline(step: Step) -> str:
    """A step in one line."""
    return str(step).partition("\n")[0].rstrip(":")
