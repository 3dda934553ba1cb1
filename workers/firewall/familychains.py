"""The chains of one family: what is wanted, what is believed to be there, what was refused.

Pure: it is told what was read and what was written, and says what is to be written. A change renders the chains that it
touches and no other; everything is rendered when something is not certain.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kube_router.workers.delta import DeltaTracker
from kube_router.workers.firewall.chains import (
    Isolated,
    SetNamer,
    dispatched,
    ipset_of,
    isolated,
    pod_chains,
    policy_chains,
    render,
)
from kube_router.workers.firewall.iptablesplan import Digest, describe, digest_of, jump_steps, to_remove, to_write
from kube_router.workers.firewall.names import (
    DISPATCH_PREFIX,
    POD_PREFIX,
    POLICY_PREFIX,
    TAIL_CHAIN,
    pod_chain,
    policy_chain,
)
from kube_router.workers.firewall.rules import Changed, Direction, Frame, Ruleset, SetKey
from kube_router.workers.firewall.ruletext import Rules
from kube_router.workers.model import Family
from kube_router.workers.rulefacts import ChainPlan, RuleText

Chains = Mapping[str, tuple[RuleText, ...]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the chains are made from. ``without``: sets that no rule may name; ``without_fixed``: the same, by name."""

    ruleset: Ruleset
    frame: Frame
    without: Mapping[tuple[SetKey, Family], str] = field(default_factory=dict)
    without_fixed: Container[str] = ()
    named: SetNamer = ipset_of


class FamilyChains:
    """See the module. ``certain``: that what is believed was read, or written without an error since."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.certain = False
        self.gated = False
        """Whether the tail, as it stands, refuses pods that are not in the set of local pods."""
        self.refused: dict[str, str] = {}
        """Policy chains that the kernel did not take, and why; they are wanted empty."""
        self.kept: set[str] = set()
        """Chains that are not needed, but to which somebody else's rule leads; they are wanted empty."""
        self._tracker: DeltaTracker[str, Digest] = DeltaTracker()
        self._written_as: dict[RuleText, RuleText] = {}
        """By the words in which a rule is read, those in which it is written; equal ones are left out."""
        self._isolated: Isolated = {}
        self._jumps_stand = False
        self._hooks: Chains = {}
        self._texts: dict[str, Rules] = {}
        self._pod_rules: dict[str, Rules] = {}
        """Of the pods' chains also the rules that are believed to be there: most changes only add to them."""

    @property
    def pending(self) -> bool:
        """Whether something that is wanted was not written: refused by ``hold``, or not reached."""
        return bool(self._tracker.pending) or not self._jumps_stand

    @property
    def jumps_stand(self) -> bool:
        """Whether the jumps in the built-in chains are as they should be, as far as is known."""
        return self._jumps_stand

    @property
    def incomplete(self) -> bool:
        """Whether something stands otherwise than the rules ask, as the kernel did not take it."""
        return bool(self.refused or self.kept)

    @property
    def standing(self) -> Mapping[str, Digest]:
        """The chains that are believed to be there."""
        return self._tracker.actual

    def forget_texts(self) -> None:
        """Let go of what was rendered."""
        self._texts, self._hooks = {}, {}

    # ------------------------------------------------------------------------------------------------- wanted

    def want_all(self, wanted: Wanted) -> None:
        """Render everything."""
        texts = render(
            wanted.ruleset,
            wanted.frame,
            self.family,
            named=wanted.named,
            without=wanted.without,
            without_fixed=wanted.without_fixed,
        )
        self.refused = {chain: why for chain, why in self.refused.items() if chain in texts}
        texts |= dict.fromkeys((*self.refused, *(self.kept - texts.keys())), ())
        self._texts = texts
        self._isolated = isolated(wanted.ruleset.pods.values(), self.family)
        self._tracker.replace_desired({chain: digest_of(rules) for chain, rules in texts.items()})

    def want_changed(self, wanted: Wanted, changed: Changed) -> None:
        """Render what a change touches; only when nothing is `pending`."""
        texts: dict[str, Rules] = {}
        touched = {pod_chain(key, direction) for key in changed.pods for direction in Direction}
        touched |= {policy_chain(key, direction) for key in changed.policies for direction in Direction}
        for key in changed.pods & wanted.ruleset.pods.keys():
            texts |= pod_chains(wanted.ruleset.pods[key], self.family, wanted.ruleset.policies)
        for key in changed.policies & wanted.ruleset.policies.keys():
            policy = wanted.ruleset.policies[key]
            texts |= policy_chains(policy, self.family, named=wanted.named, without=wanted.without)
        if changed.pods:
            before, self._isolated = self._isolated, isolated(wanted.ruleset.pods.values(), self.family)
            if self._isolated != before:
                touched |= {chain for chain in self._tracker.desired if chain.startswith(DISPATCH_PREFIX)}
                texts |= dispatched(self._isolated, self.family)
        for chain in touched & self.refused.keys():
            del self.refused[chain]
        self._texts = texts
        for chain, rules in texts.items():
            self._tracker.set_desired(chain, digest_of(rules))
        for chain in touched - texts.keys():
            self._tracker.delete_desired(chain)

    def refuse(self, chain: str, why: str) -> None:
        """A policy chain was not taken: want it empty."""
        self.refused[chain] = why
        self._texts[chain] = ()
        self._tracker.set_desired(chain, digest_of(()))

    def keep(self, chain: str) -> None:
        """A chain cannot be removed, and is empty now."""
        self.kept.add(chain)
        self._texts[chain] = ()
        self._tracker.set_desired(chain, digest_of(()))

    # ----------------------------------------------------------------------------------------------- believed

    def observed(self, chains: Chains, hooks: Chains, *, hold: bool) -> None:
        """Take what the kernel holds for what is there. What was refused or kept before may be tried again."""
        read = {chain: self._translated(rules) for chain, rules in chains.items()}
        self._tracker.replace_actual({chain: digest_of(rules) for chain, rules in read.items()})
        self._pod_rules = {chain: rules for chain, rules in read.items() if chain.startswith(POD_PREFIX)}
        self._hooks, self._jumps_stand = hooks, not jump_steps(hooks, hold=hold)
        self.gated = _gates(chains.get(TAIL_CHAIN, ()))
        self.certain = True
        self.refused.clear()
        self.kept.clear()

    def _translated(self, rules: Rules) -> Rules:
        return tuple(self._written_as.get(text, text) for text in rules) if self._written_as else rules

    def _read(self, rules: Rules) -> Digest:
        return digest_of(self._translated(rules))

    def learn_words(self, written: Rules, read: Rules) -> Iterator[str]:
        """The same rules as they were written and as they are read; they are equal from now on.

        Other versions of the programs may print a rule in another way than this one expects.
        """
        for text, seen in zip(written, read, strict=True):
            if text != seen and seen not in self._written_as:
                self._written_as[seen] = text
                yield f"{self.family}: a rule is written as {text} and read as {seen}"

    def surprises(self, chains: Chains, before: Mapping[str, Digest]) -> Iterator[str]:
        """What somebody else did to the chains since ``before`` was believed; call it when everything is rendered."""
        for chain, digest in before.items():
            actual = chains.get(chain)
            if actual is not None and self._read(actual) == digest:
                continue
            if self._tracker.desired.get(chain) == digest:
                yield f"{self.family}: {describe(chain, actual, self._texts[chain])}"
            else:
                yield f"{self.family}: chain {chain} was {'gone' if actual is None else 'changed'}"
        for chain in chains.keys() - before.keys():
            yield f"{self.family}: chain {chain} was added"

    # -------------------------------------------------------------------------------------------------- plans

    def plan(self, *, hold: bool) -> ChainPlan:
        """What is to be written."""
        updates = self._tracker.pending_updates()
        write = {chain: self._texts[chain] for chain in to_write(self._tracker.actual, updates, hold=hold)}
        remove = to_remove(self._tracker.pending_deletes(), self._tracker.desired, hold=hold)
        steps = () if self._jumps_stand else jump_steps(self._hooks, hold=hold)
        grow = {}
        for chain, rules in write.items():
            if chain in self._pod_rules and (lacking := insertions(self._pod_rules[chain], rules)):
                grow[chain] = lacking
        return ChainPlan(self.family, write, steps, tuple(remove), grow)

    def applied(self, plan: ChainPlan) -> None:
        """All of a plan was carried out."""
        for chain, rules in plan.write.items():
            self._tracker.set_actual(chain, digest_of(rules))
            if chain.startswith(POD_PREFIX):
                self._pod_rules[chain] = rules
        for chain in plan.remove:
            self._tracker.delete_actual(chain)
            self._pod_rules.pop(chain, None)
        self._jumps_stand = self._jumps_stand or bool(plan.steps)
        if TAIL_CHAIN in plan.write:
            self.gated = _gates(plan.write[TAIL_CHAIN])

    @property
    def policy_chain_count(self) -> int:
        """The number of chains of policies that stand."""
        return sum(map(is_policy_chain, self._tracker.actual))


def insertions(actual: Rules, desired: Rules) -> tuple[tuple[int, RuleText], ...]:
    """What makes ``actual`` ``desired`` when it is put in, one after the other; nothing if other things must go."""
    found = []
    left = list(reversed(actual))
    for position, rule in enumerate(desired, 1):
        if left and left[-1] == rule:
            left.pop()
        else:
            found.append((position, rule))
    return () if left else tuple(found)


def is_policy_chain(chain: str) -> bool:
    """Whether a chain is a policy's, and no fixed one."""
    return chain.startswith(POLICY_PREFIX) and len(chain) == len(POLICY_PREFIX) + 16


def _gates(tail: Sequence[RuleText]) -> bool:
    return any(" -j REJECT " in text for text in tail)
