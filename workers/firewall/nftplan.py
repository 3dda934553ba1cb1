"""Writes the transaction that turns what stands in our nftables table into what should.

Pure: texts and values. A transaction's lines are in the order that the kernel needs: what is named comes before what
names it, and goes after it. All of it happens at one moment, so no packet sees a part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kube_router.workers.firewall import names
from kube_router.workers.firewall.nftrender import KIND, Chain, Shape
from kube_router.workers.firewall.rules import SetKey
from kube_router.workers.model import Family


class SetOwner(NamedTuple):
    """A line that is there for a set of clauses."""

    key: SetKey


class RuleOwner(NamedTuple):
    """A line that is a rule of a chain."""

    chain: str
    rule: str


class Line(NamedTuple):
    """A command, whose failure concerns ``owner`` alone (None: everything), and how many things it changes."""

    text: str
    owner: SetOwner | RuleOwner | None = None
    writes: int = 1


class NewSet(NamedTuple):
    """A set to be made, with its elements in nftables' words."""

    shape: Shape
    elements: Sequence[str] = ()
    owner: SetOwner | None = None


@dataclass(slots=True)
class Steps:
    """One transaction on one table. ``rebuild``: the table goes first, because something in it cannot be changed.

    ``refill``: sets that are emptied and get their elements anew; ``fill``: chains whose rules are written anew, of
    which those in ``new_chains`` are made first. ``add`` and ``delete``: elements of sets and maps by name; deletions
    come first, so that a key of a map can change its verdict.
    """

    family: Family
    rebuild: bool = False
    new_table: bool = False
    new_sets: list[NewSet] = field(default_factory=list)
    refill: list[NewSet] = field(default_factory=list)
    new_chains: list[Chain] = field(default_factory=list)
    fill: list[Chain] = field(default_factory=list)
    delete: dict[str, list[str]] = field(default_factory=dict)
    add: dict[str, list[str]] = field(default_factory=dict)
    gone_chains: list[str] = field(default_factory=list)
    gone_sets: Mapping[str, str] = field(default_factory=dict)
    """By name, the word for it: ``set`` or ``map``."""

    @property
    def structural(self) -> bool:
        """Whether anything but elements is concerned."""
        return bool(
            self.rebuild
            or self.new_table
            or self.new_sets
            or self.refill
            or self.new_chains
            or self.fill
            or self.gone_chains
            or self.gone_sets
        )

    def __bool__(self) -> bool:
        return self.structural or any(self.add.values()) or any(self.delete.values())

    def lines(self) -> list[Line]:
        """The commands, in the order in which they can be carried out."""
        return [*self._table(), *self._sets(), *self._chains(), *self._elements(), *self._gone()]

    @property
    def table(self) -> str:
        """Family and name of the table."""
        return f"{KIND[self.family]} {names.NFT_TABLES[self.family]}"

    def _table(self) -> Iterable[Line]:
        if self.rebuild:
            yield Line(f"add table {self.table}", writes=0)
            yield Line(f"delete table {self.table}")
        if self.new_table or self.rebuild:
            yield Line(f'add table {self.table} {{ comment "rules for {names.NFT_TABLES[self.family]}"; }}')

    def _sets(self) -> Iterable[Line]:
        for shape, elements, owner in self.new_sets:
            yield Line(f"add {shape.word} {self.table} {shape.name} {shape}", owner)
            if elements:
                yield self._change("add", shape.name, elements, owner)

        for shape, elements, owner in self.refill:
            yield Line(f"flush set {self.table} {shape.name}", owner)
            if elements:
                yield self._change("add", shape.name, elements, owner)

    def _chains(self) -> Iterable[Line]:
        new = {chain.name for chain in self.new_chains}
        for chain in self.new_chains:
            yield Line(f"add chain {self.table} {chain.name}{chain}")
        for chain in self.fill:
            if chain.name not in new:
                yield Line(f"flush chain {self.table} {chain.name}")
            for rule in chain.rules:
                yield Line(f"add rule {self.table} {chain.name} {rule}", RuleOwner(chain.name, rule))

    def _elements(self) -> Iterable[Line]:
        for verb, by_name in (("delete", self.delete), ("add", self.add)):
            for name, elements in by_name.items():
                if elements:
                    yield self._change(verb, name, elements)

    def _change(self, verb: str, name: str, elements: Sequence[str], owner: SetOwner | None = None) -> Line:
        text = f"{verb} element {self.table} {name} {{ {', '.join(elements)} }}"
        return Line(text, owner, len(elements))

    def _gone(self) -> Iterable[Line]:
        # Emptied first, all of them: a chain goes only when no rule leads to it.
        for name in self.gone_chains:
            yield Line(f"flush chain {self.table} {name}", writes=0)
        for name in self.gone_chains:
            yield Line(f"delete chain {self.table} {name}")
        for name, word in self.gone_sets.items():
            yield Line(f"delete {word} {self.table} {name}")


def degraded(rule: str) -> str | None:
    """What to put in place of a rule of the frame or of a pod's chain that this kernel refuses, for want of a module.

    Never more open: a reject becomes a drop, a log is left out (empty text), an exemption goes. None: nothing fits.
    """
    if " log group " in rule:
        return ""
    if " counter reject" in rule:
        without_fib = re.sub(r" fib \w+ type != local", "", rule)
        return (
            without_fib if without_fib != rule else re.sub(r" counter reject( with tcp reset)?", " counter drop", rule)
        )
    if rule.startswith("fib "):
        return ""
    return None
