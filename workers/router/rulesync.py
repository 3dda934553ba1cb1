"""The node's ipsets and iptables rules: compares and applies, family by family, each part failing alone.

Drives a set driver and a rule driver (parameters); reads neither clock nor cluster itself. A part that failed is read
again before it is tried again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from kube_router.workers.kernel.ipset import SetError
from kube_router.workers.kernel.iptables import IptablesError, Programs
from kube_router.workers.model import Failure, Family
from kube_router.workers.nodefacts import NodeFacts
from kube_router.workers.router.egress import (
    FORWARD,
    POSTROUTING,
    desired_sets,
    egress_rule,
    forward_rules,
    plan_egress,
    plan_forward,
)
from kube_router.workers.router.repairs import Repairs
from kube_router.workers.rulefacts import Members, RulePlan, RuleText, SetPlan, SetSpec, plan_set


class Rules(Protocol):
    """What this module asks of a rule driver."""

    @property
    def programs(self) -> Programs: ...

    def observe(self, family: Family, table: str, chain: str) -> tuple[RuleText, ...]: ...

    def apply(self, plan: RulePlan) -> None: ...


class Sets(Protocol):
    """What this module asks of a set driver."""

    def observe(self, spec: SetSpec) -> Members | None: ...

    def apply(self, plan: SetPlan) -> None: ...


class SetSync:
    """The two egress sets of each family."""

    def __init__(self, driver: Sets, repairs: Repairs | None = None) -> None:
        self._driver, self._repairs = driver, repairs or Repairs()
        self.believed: dict[SetSpec, Members] = {}
        """What each set holds, as far as this process knows; a set that is missing here is read first."""

    def sync(
        self, families: Iterable[Family], nodes: Sequence[NodeFacts], *, observe: bool, hold_deletions: bool
    ) -> tuple[int, dict[Family, Failure]]:
        """(members and sets written, the failure of each family that has one)."""
        writes, failures = 0, {}
        for family in families:
            try:
                for spec, members in desired_sets(family, nodes).items():
                    writes += self._sync_set(spec, Members.of(family, members), observe, hold_deletions)
            except SetError as error:
                failures[family] = Failure("ipset", str(error))
        return writes, failures

    def _sync_set(self, spec: SetSpec, desired: Members, observe: bool, hold: bool) -> int:
        known = self.believed.get(spec)
        actual = None if observe else known
        if actual is None:
            self.believed.pop(spec, None)
            actual = self._driver.observe(spec)
        plan = plan_set(spec, actual, desired, hold=hold)
        if plan:
            self.believed.pop(spec, None)
            self._driver.apply(plan)
        self.believed[spec] = plan.result
        if plan and known is not None and actual != known:
            self._repairs.add("ipset", f"{spec.name} (it was gone)" if actual is None else spec.name)
        return len(plan)


class RuleSync:
    """The masquerade rule and the FORWARD accepts of each family."""

    def __init__(self, driver: Rules, repairs: Repairs | None = None) -> None:
        self._driver, self._repairs = driver, repairs or Repairs()
        self._forward: dict[Family, tuple[tuple[RuleText, ...], bool]] = {}
        self._egress: dict[Family, RuleText | None] = {}
        self._asserted: dict[tuple[Family, str], tuple[RuleText, ...]] = {}
        """What was there after the last success, by family and table, also when it is not known any more."""

    def sync_forward(self, family: Family, node_interface: str, *, observe: bool, hold_deletions: bool) -> int:
        """Assert the FORWARD accepts; rules written. Raises `IptablesError`."""
        wanted = forward_rules(node_interface)
        # An interface that is not known now may be down for a moment: its rule is not obsolete.
        hold = hold_deletions or not node_interface
        if not observe and self._forward.get(family) in ((wanted, False), (wanted, hold)):
            return 0
        self._forward.pop(family, None)
        actual = self._driver.observe(family, *FORWARD)
        plan = plan_forward(family, actual, wanted, hold_deletions=hold)
        self._driver.apply(plan)
        self._forward[family] = (wanted, hold)
        self._note(plan, wanted)
        return len(plan)

    def sync_egress(self, family: Family, enabled: bool, *, observe: bool) -> int:
        """Assert the masquerade rule, or that there is none; rules written. Raises `IptablesError`."""
        wanted = egress_rule(family, random_fully=self._driver.programs.random_fully) if enabled else None
        if not observe and family in self._egress and self._egress[family] == wanted:
            return 0
        self._egress.pop(family, None)
        plan = plan_egress(family, self._driver.observe(family, *POSTROUTING), wanted)
        self._driver.apply(plan)
        self._egress[family] = wanted
        self._note(plan, () if wanted is None else (wanted,))
        return len(plan)

    def _note(self, plan: RulePlan, wanted: tuple[RuleText, ...]) -> None:
        """Count the rules that were there before."""
        before = self._asserted.get((plan.family, plan.table), ())
        back = [step for step in plan.steps if step.verb != "delete" and step.rule in before]
        self._repairs.add("rule", *(f"{plan.family} {plan.table} {step.chain}: {step.rule}" for step in back))
        self._asserted[plan.family, plan.table] = wanted

    def sync(
        self,
        families: Iterable[Family],
        node_interfaces: Mapping[Family, str],
        egress: bool,
        *,
        without_sets: Iterable[Family],
        observe: bool,
        hold_deletions: bool,
    ) -> tuple[int, list[Failure]]:
        """(rules written, failures). ``without_sets``: families whose sets could not be made; no rule names them."""
        writes, failures = 0, []
        for family in families:
            # Masquerading first: what the accepts let through must not leave with a pod's address.
            try:
                if not (egress and family in without_sets):
                    writes += self.sync_egress(family, egress, observe=observe)
            except IptablesError as error:
                failures.append(Failure("pod-egress", f"{family}: {error}"))
            try:
                writes += self.sync_forward(
                    family, node_interfaces.get(family, ""), observe=observe, hold_deletions=hold_deletions
                )
            except IptablesError as error:
                failures.append(Failure("forward-rules", f"{family}: {error}"))
        return writes, failures
