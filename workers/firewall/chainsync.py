"""The chains of the iptables backend: both families read and written, each failing alone.

Drives a chain driver (a parameter). What the kernel refuses is searched for: the policy whose chain it is gets an empty
chain, which allows nothing, and all else is written. It is tried again whenever the kernel is observed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kube_router.ipc.messages import Key
from kube_router.workers.firewall.familychains import FamilyChains, Wanted, is_policy_chain
from kube_router.workers.firewall.iptablesplan import plan_lines
from kube_router.workers.firewall.names import DEFAULT_CHAIN, WORDS_CHAIN, policy_chain
from kube_router.workers.firewall.removal import is_our_chain
from kube_router.workers.firewall.rules import Changed, Direction, Ruleset
from kube_router.workers.kernel.chains import FilterTable
from kube_router.workers.kernel.iptables import IptablesError, Refused
from kube_router.workers.model import Failure, Family
from kube_router.workers.rulefacts import ChainPlan

MOST_PROBES = 64
"""Restores that a search for refused chains may cost; what is not cleared by then counts as refused."""


class Chains(Protocol):
    """What this module asks of a chain driver."""

    def observe(self, family: Family, ours: Callable[[str], bool]) -> FilterTable: ...

    def test(self, plan: ChainPlan) -> IptablesError | None: ...

    def apply(self, plans: Iterable[ChainPlan]) -> Mapping[Family, IptablesError]: ...


@dataclass(slots=True)
class ChainResult:
    """What became of the chains in one sync. ``done``: the families in which all went well."""

    writes: int = 0
    failures: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    failed: dict[Key, str] = field(default_factory=dict)
    done: set[Family] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)

    def fail(self, key: Key, why: str) -> None:
        """A part of a policy allows nothing; a policy may fail for more than one reason."""
        self.failed[key] = f"{self.failed[key]}; {why}" if key in self.failed else why


class ChainSync:
    """`prepare` reads and renders, `write` writes; between the two the caller may do what must come before."""

    def __init__(self, driver: Chains, families: Iterable[Family], clock: Callable[[], float]) -> None:
        self._driver, self._clock = driver, clock
        self._repairs: set[Family] = set()
        self._errors: dict[Family, str] = {}
        self.of = {family: FamilyChains(family) for family in families}

    @property
    def standing(self) -> int:
        """The number of policies' chains that stand, of all families together."""
        return sum(chains.policy_chain_count for chains in self.of.values())

    def prepare(
        self, wanted: Wanted, changed: Changed, *, observe: bool, everything: bool, hold: bool, result: ChainResult
    ) -> dict[Family, ChainPlan]:
        """What is to be written, for each family that could be read.

        ``everything``: do not rely on ``changed`` for what differs from the last call. ``observe``: read what stands,
        and try again what was refused.
        """
        same = not everything and not changed
        plans: dict[Family, ChainPlan] = {}
        self._repairs.clear()
        for family, chains in self.of.items():
            try:
                if observe or not chains.certain:
                    self._observe(chains, wanted, same=same, hold=hold, result=result)
                elif everything or chains.pending:
                    chains.want_all(wanted)
                else:
                    chains.want_changed(wanted, changed)
                plans[family] = chains.plan(hold=hold)
            except IptablesError as error:
                self._lost(family, error)
        return plans

    def _lost(self, family: Family, error: Exception) -> None:
        """Nobody knows what stands in a family; it is read before the next attempt."""
        self.of[family].certain = False
        self._errors[family] = str(error)

    @property
    def settled(self) -> bool:
        """Whether all stands that is wanted, nothing was refused, and all of that is certain."""
        return all(each.certain and not each.pending and not each.incomplete for each in self.of.values())

    def withhold(self, family: Family, why: str) -> None:
        """A family cannot be written now, for a reason that lies elsewhere."""
        self._lost(family, IptablesError(why))

    def write(self, plans: Mapping[Family, ChainPlan], result: ChainResult) -> None:
        """Carry out the plans."""
        began = self._clock()
        errors = self._driver.apply(plans.values())
        for family, plan in plans.items():
            chains, error = self.of[family], errors.get(family)
            if isinstance(error, Refused):
                error = self._isolate(chains, plan, result)
            elif error is None:
                chains.applied(plan)
                result.writes += len(plan)
            if error is None:
                result.done.add(family)
                self._errors.pop(family, None)
            else:
                self._lost(family, error)
            if plan:
                result.seconds[f"controller_iptables_v{family.value}_restore_time"] = self._clock() - began
            if family in self._repairs & result.done:
                self._learn(chains, plan, result)
            chains.forget_texts()

    def tell(self, ruleset: Ruleset, result: ChainResult) -> None:
        """Put what is wrong now, also since earlier, into the result."""
        for family, why in self._errors.items():
            result.failures.append(Failure("iptables", f"{family}: {why}"))
        owners: dict[str, Key] = {}
        for family, chains in self.of.items():
            if chains.refused and not owners:
                owners = {policy_chain(key, direction): key for key in ruleset.policies for direction in Direction}
            for chain, why in chains.refused.items():
                key = owners.get(chain)
                if key is not None:
                    result.fail(key, f"its {family} chain {chain} was refused and allows nothing: {why}")

    def _observe(self, chains: FamilyChains, wanted: Wanted, *, same: bool, hold: bool, result: ChainResult) -> None:
        """Read the kernel, and tell what somebody changed of what was certain.

        ``same``: nothing else is wanted than at the last call; then nothing is rendered if it all stands.
        """
        began = self._clock()
        table = self._driver.observe(chains.family, is_our_chain)
        result.seconds[f"controller_iptables_v{chains.family.value}_save_time"] = self._clock() - began
        before = dict(chains.standing) if chains.certain else None
        jumps_stood = chains.jumps_stand
        same = same and before is not None and not chains.incomplete
        chains.observed(table.chains, table.hooks, hold=hold)
        if same and not chains.pending:
            return
        chains.want_all(wanted)
        if before is None:
            return
        lines = list(chains.surprises(table.chains, before))
        if jumps_stood:
            steps = chains.plan(hold=hold).steps
            hooks = dict.fromkeys(step.chain for step in steps)
            lines += [f"{chains.family}: the jump in {hook} was not first, or not the only one" for hook in hooks]
        result.repaired += lines
        if lines:
            self._repairs.add(chains.family)

    def _try(self, plan: ChainPlan) -> IptablesError | None:
        return self._driver.apply([plan]).get(plan.family)

    def _isolate(self, chains: FamilyChains, plan: ChainPlan, result: ChainResult) -> IptablesError | None:
        """Carry out what can be carried out of a plan that was refused; the error if that is not even all but policies.

        Chains of policies refer to nothing but sets and the default chain: each can be tried, and stand, for itself.
        """
        rest = dataclasses.replace(plan, remove=(), grow={})
        error = self._try(rest)
        if isinstance(error, Refused):
            policies = [chain for chain, rules in plan.write.items() if is_policy_chain(chain) and rules]
            without = dataclasses.replace(rest, write={**rest.write, **dict.fromkeys(policies, ())})
            if (other := self._driver.test(without)) is not None:
                return other
            base = {chain: rules for chain, rules in plan.write.items() if chain == DEFAULT_CHAIN}

            def attempt(some: Sequence[str]) -> IptablesError | None:
                return self._try(ChainPlan(plan.family, base | {chain: plan.write[chain] for chain in some}))

            refused = search(policies, attempt)
            for chain, why in refused.items():
                chains.refuse(chain, str(why))
            rest = dataclasses.replace(rest, write={**rest.write, **dict.fromkeys(refused, ())})
            error = self._try(rest)
        if error is not None:
            return error
        chains.applied(rest)
        result.writes += len(rest)
        return self._remove(chains, plan, result)

    def _remove(self, chains: FamilyChains, plan: ChainPlan, result: ChainResult) -> IptablesError | None:
        """Remove what can be removed: first their rules, as they may lead from one to the other."""
        if not plan.remove:
            return None
        emptied = ChainPlan(plan.family, dict.fromkeys(plan.remove, ()))
        error = self._try(emptied)
        if error is not None:
            return error
        chains.applied(emptied)
        kept = search(plan.remove, lambda some: self._try(ChainPlan(plan.family, remove=tuple(some))))
        gone = tuple(chain for chain in plan.remove if chain not in kept)
        chains.applied(ChainPlan(plan.family, remove=gone))
        result.writes += len(plan.remove)
        for chain, why in kept.items():
            chains.keep(chain)
            result.warnings.append(f"{plan.family}: chain {chain} is not needed any more; it stays, empty: {why}")
        return None

    def _learn(self, chains: FamilyChains, plan: ChainPlan, result: ChainResult) -> None:
        """After a repair, find out whether it was one, or whether the rules are only read in other words.

        They are written once more, to a chain that nobody else has a reason to touch.
        """
        rules = tuple({text: None for chain in plan.write if chain not in chains.refused for text in plan.write[chain]})
        if not rules or self._try(ChainPlan(plan.family, {WORDS_CHAIN: rules})) is not None:
            return
        with contextlib.suppress(IptablesError):
            read = self._driver.observe(chains.family, is_our_chain).chains.get(WORDS_CHAIN, ())
            if len(read) == len(rules):
                result.warnings += chains.learn_words(rules, read)
        if self._try(ChainPlan(plan.family, remove=(WORDS_CHAIN,))) is not None:
            chains.certain = False

    def plan(self, wanted: Wanted) -> Iterator[str]:
        """What would be written after reading the kernel, a line each; for an instance that does nothing else."""
        for family, chains in self.of.items():
            try:
                table = self._driver.observe(family, is_our_chain)
            except IptablesError as error:
                yield f"{family}: cannot: {error}"
                continue
            chains.observed(table.chains, table.hooks, hold=False)
            chains.want_all(wanted)
            yield from plan_lines(chains.plan(hold=False))


def search(items: Sequence[str], attempt: Callable[[Sequence[str]], IptablesError | None]) -> dict[str, IptablesError]:
    """Those of ``items`` that are refused, by halves; the others have been done.

    The last error stands for those that the number of probes did not suffice to look at.
    """
    refused: dict[str, IptablesError] = {}
    waiting = [items] if items else []
    probes = 0
    while waiting:
        some = waiting.pop()
        error = attempt(some)
        probes += 1
        if error is None:
            continue
        if len(some) == 1 or not isinstance(error, Refused) or probes >= MOST_PROBES:
            refused.update(dict.fromkeys(some, error))
            if probes >= MOST_PROBES:
                for others in waiting:
                    refused.update(dict.fromkeys(others, error))
                break
            continue
        half = len(some) // 2
        waiting += [some[half:], some[:half]]
    return refused
