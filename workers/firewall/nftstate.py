"""What the nftables table of one family should hold, what it is believed to hold, and the steps between the two.

Pure. `Wanted` is computed from the rule set, wholly or for just the policies that changed; `Believed` is what the last
transaction left or the last look found. Members of clause sets are not kept here: the rule set has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from kube_router.ipc.messages import Key
from kube_router.workers.firewall import names
from kube_router.workers.firewall.nftplan import NewSet, RuleOwner, SetOwner, Steps, degraded
from kube_router.workers.firewall.nftrender import (
    Chain,
    element_text,
    frame_chains,
    group_chain,
    map_element,
    policy_chain,
    set_shape,
)
from kube_router.workers.firewall.rules import BlockSet, Clause, Direction, Frame, PolicyRules, Ruleset, SetKey
from kube_router.workers.model import Family

Dispatch = Mapping[str, tuple[str, Key]]
"""By address of an isolated pod: its chain, and which pod it is."""


@dataclass(frozen=True, slots=True)
class PodLayout:
    """What the local pods come to. ``groups``: their chains, rendered.

    ``local``: all their addresses; ``themselves``: pairs of addresses of an isolated pod, in nftables' words.
    """

    local: frozenset[str] = frozenset()
    themselves: frozenset[str] = frozenset()
    dispatch: Mapping[Direction, Dispatch] = field(default_factory=lambda: {direction: {} for direction in Direction})
    groups: Mapping[str, Chain] = field(default_factory=dict)

    def members(self) -> Mapping[str, AbstractSet[str]]:
        """By set, the elements of the sets of pods, in nftables' words."""
        return {names.LOCAL_PODS: self.local, names.THEMSELVES: self.themselves}


def pod_layout(ruleset: Ruleset, family: Family) -> PodLayout:
    """The layout of all local pods; a few hundred at most, so it is always computed whole."""
    local: set[str] = set()
    themselves: set[str] = set()
    dispatch: dict[Direction, dict[str, tuple[str, Key]]] = {direction: {} for direction in Direction}
    chains: dict[tuple[Direction, tuple[Key, ...]], Chain] = {}
    for key, pod in ruleset.pods.items():
        addresses = pod.addresses_of(family)
        local.update(addresses)
        isolated = False
        for direction in Direction:
            policies = pod.policies(direction)
            if policies is None or not addresses:
                continue
            isolated = True
            chain = chains.get((direction, policies))
            if chain is None:
                chain = chains[direction, policies] = group_chain(policies, direction)
            dispatch[direction].update((address, (chain.name, key)) for address in addresses)
        if isolated:
            themselves.update(f"{one} . {other}" for one in addresses for other in addresses)
    groups = {chain.name: chain for chain in chains.values()}
    return PodLayout(frozenset(local), frozenset(themselves), dispatch, groups)


@dataclass(slots=True)
class Believed:
    """What stands in the kernel, as far as is known; ``known`` is false before the first look.

    ``chains``: by name, the `rules_hash` of what it was given, or what stands in its place.
    ``frame_sets``: names of the sets that are always there; ``sets``: of all others. ``elements``: of the former, by
    set. ``dispatch``: by address, the chain; empty when somebody else led it elsewhere.
    """

    known: bool = False
    table: bool = False
    chains: dict[str, int] = field(default_factory=dict)
    sets: set[str] = field(default_factory=set)
    frame_sets: set[str] = field(default_factory=set)
    elements: dict[str, set[str]] = field(default_factory=dict)
    dispatch: dict[Direction, dict[str, str]] = field(
        default_factory=lambda: {direction: {} for direction in Direction}
    )


EMPTY, ALTERED, OTHER = 0, 1, 2
"""In the place of a hash: a chain without rules, one whose rules somebody else changed, and one of other rules."""


def rules_hash(rules: Sequence[str]) -> int:
    """Of a chain's rules, as text, within this process."""
    if not rules:
        return EMPTY
    found = hash(tuple(rules))
    return found if found not in (EMPTY, ALTERED, OTHER) else 3


@dataclass(slots=True)
class Refusals:
    """What this kernel refused, and why; it is left out or replaced until it is tried again."""

    sets: dict[SetKey, str] = field(default_factory=dict)
    rules: dict[RuleOwner, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.sets or self.rules)

    def left_out(self, clause: Clause) -> bool:
        """Whether a clause names a set that cannot be made."""
        return bool(self.sets) and any(key in self.sets for key in clause.sets)

    def note(self, owner: SetOwner | RuleOwner, reason: str) -> bool:
        """Remember a refusal; whether it is news."""
        if isinstance(owner, SetOwner):
            news = owner.key not in self.sets
            self.sets.setdefault(owner.key, reason)
        else:
            news = owner not in self.rules
            self.rules.setdefault(owner, reason)
        return news

    def applied_to(self, chain: Chain, *, clauses: bool) -> Chain:
        """The chain without what was refused. ``clauses``: its rules only allow, so each may be left out."""
        if not self.rules:
            return chain
        kept = []
        for rule in chain.rules:
            text: str | None = rule
            while text and RuleOwner(chain.name, text) in self.rules:
                text = "" if clauses else degraded(text)
            if text is None:
                return chain
            if text:
                kept.append(text)
        return Chain(chain.name, tuple(kept), chain.hook, chain.comment)


class SetNames:
    """Names of the clause sets of one family; computed once a set, as a name is a digest of all that it selects."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._names: dict[SetKey, str] = {}

    def __call__(self, key: SetKey) -> str:
        """The name of a set."""
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = names.set_name(key, self._family)
        return name

    def keep(self, keys: Iterable[SetKey]) -> None:
        """Forget all others."""
        self._names = {key: self(key) for key in keys}

    def forget(self, keys: Iterable[SetKey]) -> None:
        """Forget sets that are gone."""
        for key in keys:
            self._names.pop(key, None)


def policy_chains(
    policies: Iterable[PolicyRules], family: Family, set_name: Callable[[SetKey], str], refused: Refusals
) -> dict[str, Chain]:
    """The chains of policies, by name, without what was refused."""
    found = {}
    for rules in policies:
        for direction in Direction:
            chain = policy_chain(rules, direction, family, set_name, refused.left_out)
            if chain is not None:
                found[chain.name] = refused.applied_to(chain, clauses=True)
    return found


def fixed_chains(family: Family, frame: Frame, refused: Refusals) -> dict[str, Chain]:
    """The chains of the frame, by name, with what this kernel can do."""
    return {chain.name: refused.applied_to(chain, clauses=False) for chain in frame_chains(family, frame)}


def wanted_sets(ruleset: Ruleset, family: Family, refused: Refusals) -> Iterable[SetKey]:
    """The sets that the clauses of this family name, without those that this kernel refuses."""
    for key in ruleset.members:
        if (not isinstance(key, BlockSet) or key.family is family) and key not in refused.sets:
            yield key


def new_set(key: SetKey, name: str, ruleset: Ruleset, family: Family) -> NewSet:
    """A clause set with all of its members."""
    members: Iterable[str]
    if isinstance(key, BlockSet):
        members = key.prefixes
    else:
        members = map(element_text, sorted(ruleset.members[key].get(family, ())))
    return NewSet(set_shape(key, name, family), tuple(members), SetOwner(key))


def frame_elements(frame: Frame, pods: PodLayout) -> dict[str, set[str]]:
    """By set, the elements of the sets that are always there."""
    found = {name: set(members) for name, members in pods.members().items()}
    for protocol, name in names.NODE_PORTS.items():
        found[name] = {str(port) for of, port in frame.node_ports if of == protocol}
    return found


def chain_steps(steps: Steps, wanted: Iterable[Chain], believed: Believed, *, hold: bool) -> None:
    """Make what is missing, write what differs. ``hold``: what exists stays, unless empty or altered by others."""
    for chain in wanted:
        stands = believed.chains.get(chain.name)
        if stands is None:
            steps.new_chains.append(chain)
        if (stands or EMPTY) != rules_hash(chain.rules) and (not hold or stands in (None, EMPTY, ALTERED)):
            steps.fill.append(chain)


def element_steps(
    steps: Steps, wanted: Mapping[str, AbstractSet[str]], pods: PodLayout, believed: Believed, *, hold: bool
) -> None:
    """Bring the elements of the frame's sets and of the verdict maps to what is wanted; ``hold``: add only."""
    for name, members in wanted.items():
        stand = believed.elements.get(name, set())
        steps.add.setdefault(name, []).extend(sorted(members - stand))
        if not hold:
            steps.delete.setdefault(name, []).extend(sorted(stand - members))
    for direction, name in names.POD_MAPS.items():
        stands, wants = believed.dispatch[direction], pods.dispatch[direction]
        kept = {address for address, chain in stands.items() if chain and hold}
        new = [address for address in wants if address not in kept and stands.get(address) != wants[address][0]]
        gone = [address for address in stands if address not in wants and not hold]
        moved = [address for address in new if address in stands]
        steps.delete.setdefault(name, []).extend(sorted([*gone, *moved]))
        steps.add.setdefault(name, []).extend(map_element(address, *wants[address]) for address in sorted(new))


def gone_steps(steps: Steps, chains: Iterable[str], sets: Iterable[str], words: Mapping[str, str]) -> None:
    """Remove chains and sets; ``words`` has ``map`` for those of a foreign hand that are maps."""
    steps.gone_chains = sorted(chains)
    steps.gone_sets = {name: words.get(name, "set") for name in sorted(sets)}
