"""What separates the speaker that runs from the one that should: ordered steps, as data.

Pure: two states in, a `Plan` out; the same state twice gives an empty plan. Passwords never show in a plan's text.

The order keeps routes closed rather than open when a step fails: start (exports closed) → peers that go → policies →
paths → peers that come. A path or a peer is never there without the policies that hold for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kube_router.workers.router.bgpstate import (
    CLOSED,
    FRESH,
    Assignment,
    BgpState,
    Neighbor,
    Policies,
    Speaker,
)
from kube_router.workers.router.policies import accepts, among, decision, merged


@dataclass(frozen=True, slots=True)
class StartSpeaker:
    """Start BGP on a fresh daemon and close its exports at once: gobgpd begins with everything allowed."""

    speaker: Speaker

    def __str__(self) -> str:
        return f"start BGP: {self.speaker}; export nothing yet"


@dataclass(frozen=True, slots=True)
class ReplaceDaemon:
    """End the gobgpd process, for its supervisor to start a fresh one: a running one cannot change these settings."""

    actual: Speaker
    desired: Speaker

    def __str__(self) -> str:
        return f"restart gobgpd: it runs {self.actual}, wanted is {self.desired}"


@dataclass(frozen=True, slots=True)
class SetPolicies:
    """Replace all sets, statements and policies at once."""

    policies: Policies

    def __str__(self) -> str:
        members = {name: sorted(map(str, items)) for name, items in self.policies.prefix_sets.items()}
        members |= {name: sorted(items) for name, items in self.policies.neighbor_sets.items()}
        lines = [f"set {name} = {{{', '.join(items)}}}" for name, items in sorted(members.items())]
        lines += [f"export {item}" for item in self.policies.export]
        lines += [f"import {item}" for item in self.policies.import_]
        return "set policies:" + "".join(f"\n    {line}" for line in lines)


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
class Readvertise:
    """Withdraw a prefix from all and originate it again: makes a peer forget what a tighter policy now denies it."""

    prefix: str
    next_hop: str

    def __str__(self) -> str:
        return f"withdraw and originate {self.prefix} again, for a peer that may no longer have it"


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
class AddNeighbor:
    """Hold a new session."""

    neighbor: Neighbor

    def __str__(self) -> str:
        return f"add peer {self.neighbor}"


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
    | Assign
    | AddPath
    | RemovePath
    | Readvertise
    | RemoveNeighbor
    | ReplaceNeighbor
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


def diff(actual: BgpState, desired: BgpState, *, keep: bool = False) -> Plan:
    """The steps from ``actual`` to ``desired``.

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
        return Plan((start, *_changes(replace(FRESH, speaker=desired.speaker, export=CLOSED), desired)))
    if actual.speaker != desired.speaker:
        return Plan((ReplaceDaemon(actual.speaker, desired.speaker),))
    return Plan(tuple(_changes(actual, desired)))


def kept(actual: BgpState, desired: BgpState) -> BgpState:
    """``desired``, with everything that ``actual`` has beyond it."""
    return replace(
        desired,
        speaker=actual.speaker,
        policies=merged(actual.policies, desired.policies),
        paths={**actual.paths, **desired.paths},
        neighbors={**actual.neighbors, **desired.neighbors},
    )


def _changes(actual: BgpState, desired: BgpState) -> Iterator[Step]:
    for address, neighbor in sorted(actual.neighbors.items()):
        if address not in desired.neighbors:
            yield RemoveNeighbor(neighbor)
    if actual.policies != desired.policies:
        yield SetPolicies(desired.policies)
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
    yield from _neighbor_changes(actual, desired)
    yield from _policy_effects(actual, desired)


def _neighbor_changes(actual: BgpState, desired: BgpState) -> Iterator[Step]:
    for address, neighbor in sorted(desired.neighbors.items()):
        running = actual.neighbors.get(address)
        if running is None:
            yield AddNeighbor(neighbor)
        elif running != neighbor:
            yield ReplaceNeighbor(running, neighbor)


def _policy_effects(actual: BgpState, desired: BgpState) -> Iterator[Step]:
    """What must be sent or judged again: gobgpd applies a changed policy to later updates only.

    Looks at sessions and paths that stay as they are; new ones meet the new policies anyway. Withdrawing what a
    tighter policy denies takes a real withdrawal: a soft reset does not withdraw before gobgpd 4.6.
    """
    if actual.policies == desired.policies and actual.export == desired.export and actual.import_ == desired.import_:
        return
    staying = [address for address, item in sorted(desired.neighbors.items()) if actual.neighbors.get(address) == item]
    again: set[str] = set()
    wider: set[str] = set()
    for prefix, next_hop in sorted(desired.paths.items()):
        if actual.paths.get(prefix) != next_hop:
            continue
        for address in staying:
            before = decision(actual.policies, actual.export, actual.policies.export, prefix, address)
            after = decision(desired.policies, desired.export, desired.policies.export, prefix, address)
            if accepts(before) and not accepts(after):
                again.add(prefix)
            elif accepts(after) and _acts(before) != _acts(after):
                wider.add(address)
    for prefix in sorted(again):
        yield Readvertise(prefix, desired.paths[prefix])
    for address in sorted(wider):
        yield SendAgain(address)
    for address in staying:
        if _rejects(actual, address) != _rejects(desired, address):
            yield JudgeAgain(address)


def _acts(verdict: object) -> object:
    """A verdict by what it does to the path, without the names of the sets that led to it."""
    return (verdict, False) if isinstance(verdict, bool) else (verdict.accept, verdict.next_hop_self)  # type: ignore[attr-defined]


def _rejects(state: BgpState, address: str) -> object:
    """What the import policy says to routes of a peer: the ordered verdicts that concern it, and the default."""
    if not state.import_.policies:
        return state.import_.accept
    concerned = []
    for statement in state.policies.import_:
        members = state.policies.neighbor_sets.get(statement.neighbor_set, frozenset())
        if not members or among(address, members):
            concerned.append((state.policies.prefix_sets.get(statement.prefix_set, frozenset()), statement.accept))
    return tuple(concerned), state.import_.accept


def _differences(actual: Neighbor, desired: Neighbor) -> Iterator[str]:
    for name in ("asn", "local_address", "remote_port", "families", "hold_seconds", "multihop_ttl"):
        before, after = getattr(actual, name), getattr(desired, name)
        if before != after:
            yield f"{name} {_text(before)} -> {_text(after)}"
    if actual.password != desired.password:
        yield "password changed"


def _text(value: object) -> str:
    return "+".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
