"""Own chains in table filter: read all at once, written by one restore a family.

Touches the kernel: forks ``iptables-save`` to read and ``iptables-restore --noflush`` to write, for both families at
the same time. A restore is a transaction and names the chains that it writes; chains and rules of others stay, with
their counters, also those that somebody adds meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from kube_router.workers.kernel import iptables
from kube_router.workers.kernel.iptables import IptablesError, Programs, Refused, Running, find_programs
from kube_router.workers.kernel.monitor import legacy_tables
from kube_router.workers.model import Family
from kube_router.workers.rulefacts import ChainPlan, RuleText

TABLE = "filter"
BUILT_IN = ("INPUT", "FORWARD", "OUTPUT")
_INCOMPATIBLE = re.compile(rf"^# Table .{TABLE}. (?:is|contains) incompatible", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class FilterTable:
    """What table filter holds: the rules of ``chains`` that were asked for, and all rules of the built-in chains."""

    chains: Mapping[str, tuple[RuleText, ...]] = field(default_factory=dict)
    hooks: Mapping[str, tuple[RuleText, ...]] = field(default_factory=dict)


class ChainDriver:
    """Reads and writes with the host's programs. ``writes`` counts chains and steps that were written."""

    def __init__(self, programs: Programs | None = None) -> None:
        self.programs = programs or find_programs()
        self.writes = 0
        self.writers: set[int] = set()
        """Process ids of the programs that wrote; the owner forgets those whose events it has seen."""

    def observe(self, family: Family, ours: Callable[[str], bool]) -> FilterTable:
        """Table filter as it is; ``ours`` says by name which chains matter. Raises `IptablesError`."""
        if self.programs.backend == "legacy" and TABLE not in legacy_tables(family):
            return FilterTable()  # reading would create it
        output = iptables.run_program([self.programs.name(family, "-save"), "-t", TABLE])
        if _INCOMPATIBLE.search(output):
            words = f"table {TABLE} holds chains or rules of nft that it cannot read; it is left as it is"
            raise IptablesError(f"{self.programs.name(family)}: {words}")
        return parse_saved(output.splitlines(), ours)

    def test(self, plan: ChainPlan) -> IptablesError | None:
        """What a program says of a plan without carrying it out; the kernel may still refuse it."""
        try:
            iptables.run_program([self.programs.name(plan.family, "-restore"), "--noflush", "--test"], str(plan))
        except IptablesError as error:
            return error
        return None

    def apply(self, plans: Iterable[ChainPlan]) -> dict[Family, IptablesError]:
        """Carry out plans of different families, each as a whole or not at all; the error of each that was not.

        An error is `Refused` if another plan might have been taken.
        """
        errors: dict[Family, IptablesError] = {}
        running: list[tuple[ChainPlan, Running]] = []
        for plan in plans:
            if plan:
                arguments = [
                    self.programs.name(plan.family, "-restore"), "--noflush", "--wait", str(iptables.WAIT_SECONDS),
                ]  # fmt: skip
                try:
                    started = Running(arguments, str(plan))
                except IptablesError as error:
                    errors[plan.family] = error
                    continue
                self.writers.add(started.pid)
                running.append((plan, started))
        for plan, started in running:
            try:
                started.output()
                self.writes += len(plan)
            except IptablesError as error:
                errors[plan.family] = error
        return errors


def parse_saved(lines: Iterable[str], ours: Callable[[str], bool]) -> FilterTable:
    """What ``iptables-save -t filter`` printed."""
    chains: dict[str, list[RuleText]] = {}
    hooks: dict[str, list[RuleText]] = {}
    for chain, text in _declared(lines):
        if chain in BUILT_IN:
            rules = hooks.setdefault(chain, [])
        elif chain in chains or ours(chain):
            rules = chains.setdefault(chain, [])
        else:
            continue
        if text is not None:
            rules.append(text)
    return FilterTable({name: tuple(rules) for name, rules in chains.items()}, {k: tuple(v) for k, v in hooks.items()})


def _declared(lines: Iterable[str]) -> Iterator[tuple[str, RuleText | None]]:
    """(chain, rule) of every rule, (chain, None) of every chain."""
    for line in lines:
        if line.startswith("-A "):
            _, chain, text = line.split(" ", 2)
            yield chain, RuleText(text)
        elif line.startswith(":"):
            yield line[1:].split(" ", 1)[0], None


__all__ = ["BUILT_IN", "TABLE", "ChainDriver", "FilterTable", "IptablesError", "Refused", "parse_saved"]
