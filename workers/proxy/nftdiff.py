"""The difference between an nftables table that stands and one that should, and its steps in order.

Pure but for the batch that it writes into, which only gathers. Elements that go come before elements that come: so a
key of a map can change its data. Chains are made before anything leads to them, and go when nothing does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kube_router.workers.model import Family
from kube_router.workers.nfttypes import CodedChain, Element, ElementData, SetShape
from kube_router.workers.proxy import nftlayout as layout
from kube_router.workers.proxy.nftlayout import WordedChain

Elements = dict[str, dict[bytes, ElementData]]
"""By set, its elements: keys and data."""


class Left(NamedTuple):
    """An endpoint that gets no more packets of a frontend; all as the kernel holds it.

    ``address``: the frontend's; empty for a node port. ``target``: address and port of the endpoint.
    """

    family: Family
    protocol: int
    address: bytes
    port: int
    target: bytes


def departed(difference: Difference, family: Family) -> Iterator[Left]:
    """The endpoints that leave a frontend by a difference."""
    for name in (layout.ENDPOINTS, layout.NODE_PORT_ENDPOINTS):
        # The key ends in protocol, port and number, of four bytes each.
        deleted = {(key[:-4], data) for key, data in difference.delete.get(name, {}).items()}
        added = {(key[:-4], data) for key, data in difference.add.get(name, {}).items()}
        for key, data in deleted - added:
            if isinstance(data, bytes):
                yield Left(family, key[-8], key[:-8], int.from_bytes(key[-4:-2], "big"), data)


class Writer(Protocol):
    """What is asked of `kernel.nftbatch.Batch`."""

    def add_table(self, comment: str) -> None: ...

    def delete_table(self) -> None: ...

    def add_set(self, shape: SetShape) -> None: ...

    def delete_set(self, name: str) -> None: ...

    def add_chain(self, chain: CodedChain) -> None: ...

    def add_rules(self, chain: CodedChain) -> None: ...

    def flush_chain(self, name: str) -> None: ...

    def delete_chain(self, name: str) -> None: ...

    def add_elements(self, shape: SetShape, elements: Iterable[Element]) -> None: ...

    def delete_elements(self, shape: SetShape, elements: Iterable[Element]) -> None: ...


class Stands(Protocol):
    """What is asked of `kernel.nftbatch.Standing`."""

    @property
    def sets(self) -> Mapping[str, object]: ...

    @property
    def chains(self) -> Mapping[str, CodedChain]: ...


@dataclass(slots=True)
class Difference:
    """What is to be done with a table. ``refill``: chains whose rules are written anew."""

    rebuild: bool = False
    new_table: bool = False
    new_sets: list[SetShape] = field(default_factory=list)
    new_chains: list[WordedChain] = field(default_factory=list)
    refill: list[WordedChain] = field(default_factory=list)
    delete: Elements = field(default_factory=dict)
    add: Elements = field(default_factory=dict)
    gone_chains: list[str] = field(default_factory=list)
    gone_sets: list[str] = field(default_factory=list)

    @classmethod
    def whole(cls, shapes: Iterable[SetShape], chains: Iterable[WordedChain]) -> Difference:
        """A table from nothing, but for its elements."""
        return cls(new_table=True, new_sets=[*shapes], new_chains=[*chains])

    def __bool__(self) -> bool:
        parts = (self.new_sets, self.new_chains, self.refill, self.delete, self.add, self.gone_chains, self.gone_sets)
        return self.rebuild or self.new_table or any(parts)

    def put(self, name: str, key: bytes, before: ElementData | None, after: ElementData | None) -> None:
        """An element that is ``before`` and should be ``after``; None: not there. What came and went is nothing."""
        if before == after:
            return
        if before is not None and self.add.get(name, {}).pop(key, None) is None:
            self.delete.setdefault(name, {})[key] = before
        if after is not None:
            if self.delete.get(name, {}).get(key) == after:
                del self.delete[name][key]
            else:
                self.add.setdefault(name, {})[key] = after

    def need(self, chain: WordedChain) -> None:
        """A chain that must be there."""
        if chain.name in self.gone_chains:
            self.gone_chains.remove(chain.name)
        else:
            self.new_chains.append(chain)

    def spare(self, name: str) -> None:
        """A chain that nobody needs any more."""
        new = [chain for chain in self.new_chains if chain.name == name]
        if new:
            self.new_chains.remove(new[0])
        else:
            self.gone_chains.append(name)

    def write(self, batch: Writer, shapes: Mapping[str, SetShape], comment: str) -> None:
        """All steps, in the order in which they can be carried out."""
        if self.rebuild:
            batch.delete_table()
        if self.new_table:
            batch.add_table(comment)
        for shape in self.new_sets:
            batch.add_set(shape)
        new = [chain.coded for chain in self.new_chains]
        for chain in new:
            batch.add_chain(chain)
        for chain in new:
            batch.add_rules(chain)
        for worded in self.refill:
            batch.flush_chain(worded.name)
            batch.add_rules(worded.coded)
        for name, elements in self.delete.items():
            batch.delete_elements(shapes[name], elements.items())
        for name, shape in shapes.items():
            if name in self.add:
                batch.add_elements(shape, self.add[name].items())
        for gone in self.gone_chains:
            batch.flush_chain(gone)
        for gone in self.gone_chains:
            batch.delete_chain(gone)
        for gone in self.gone_sets:
            batch.delete_set(gone)

    def lines(self, where: str) -> Iterator[str]:
        """The same for people, elements by their number."""
        if self.rebuild:
            yield f"{where}: make it anew"
        elif self.new_table:
            yield f"{where}: make it"
        yield from (f"{where}: make set {shape.name}" for shape in self.new_sets)
        yield from (f"{where}: make chain {chain.name}" for chain in self.new_chains)
        for chain in self.refill:
            words = "; ".join(rule.words for rule in chain.rules)
            yield f"{where}: write the rules of chain {chain.name} anew: {words}"
        for name, elements in self.delete.items():
            yield from (f"{where}: delete element {key.hex(' ', 4)} of {name}" for key in elements)
        for name, elements in self.add.items():
            yield from (f"{where}: add element {key.hex(' ', 4)} of {name}" for key in elements)
        yield from (f"{where}: delete chain {name}" for name in self.gone_chains)
        yield from (f"{where}: delete set {name}" for name in self.gone_sets)


def differences(
    standing: Stands,
    shapes: Mapping[str, SetShape],
    chains: Mapping[str, WordedChain],
    stand: Mapping[str, Iterable[Element]],
    wanted: Elements,
    told: list[str],
    *,
    hold: bool,
) -> Difference:
    """What makes ``standing`` with the elements ``stand`` into what is wanted; ``told`` gets a line for each thing.

    ``wanted`` is used up. ``hold``: only what is missing comes; nothing goes, nothing is written anew.
    """
    found = Difference()
    _compare_chains(found, standing, chains, told, hold=hold)
    for name, shape in shapes.items():
        if name not in standing.sets:
            found.new_sets.append(shape)
            told.append(f"set {name} was deleted")
    found.gone_sets = [] if hold else sorted(standing.sets.keys() - shapes.keys())
    told += [f"set {name} was added" for name in sorted(standing.sets.keys() - shapes.keys())]
    served: dict[str, set[bytes]] = {}
    for name in shapes:
        _compare_elements(found, name, stand.get(name, ()), wanted[name], told, served if hold else None)
    if hold:
        _leave_what_is_served(found, served)
    return found


def _compare_chains(
    found: Difference, standing: Stands, chains: Mapping[str, WordedChain], told: list[str], *, hold: bool
) -> None:
    for name, chain in chains.items():
        stands = standing.chains.get(name)
        if stands is None:
            found.new_chains.append(chain)
            told.append(f"chain {name} was deleted")
        elif stands.rules != chain.coded.rules:
            told.append(f"chain {name} was changed")
            if not hold or not stands.rules:
                found.refill.append(chain)
    foreign = sorted(standing.chains.keys() - chains.keys())
    told += [f"chain {name} was added" for name in foreign]
    if not hold:
        found.gone_chains = foreign


def _compare_elements(
    found: Difference,
    name: str,
    stand: Iterable[Element],
    wanted: dict[bytes, ElementData],
    told: list[str],
    served: dict[str, set[bytes]] | None,
) -> None:
    foreign = altered = 0
    for key, data in stand:
        if served is not None and name in _DISPATCH:
            served.setdefault(_DISPATCH[name], set()).add(key)
        should = wanted.pop(key, None)
        if should == data:
            continue
        foreign, altered = foreign + (should is None), altered + (should is not None)
        if served is None:
            found.put(name, key, data, should)
    for key, should in wanted.items():
        found.put(name, key, None, should)
    if wanted:
        told.append(f"set {name}: {len(wanted)} of its elements were missing")
    if foreign:
        told.append(f"set {name}: {foreign} foreign elements were in it")
    if altered:
        told.append(f"set {name}: {altered} of its elements were others")


_DISPATCH = {
    layout.SERVICES: "service",
    layout.SERVICES_INSIDE: "service",
    layout.CLOSED: "service",
    layout.NODE_PORTS: "node port",
    layout.NODE_PORTS_INSIDE: "node port",
    layout.CLOSED_NODE_PORTS: "node port",
}
"""Sets whose keys tell what is served already."""
_BELONGS = {
    **_DISPATCH,
    layout.ENDPOINTS: "service",
    layout.NODE_PORT_ENDPOINTS: "node port",
    layout.STICKY: "service",
    layout.STICKY_NODE_PORTS: "node port",
    layout.RESTRICTED: "service",
    layout.SOURCES: "service",
}


def _leave_what_is_served(found: Difference, served: Mapping[str, set[bytes]]) -> None:
    """A frontend that stands in part stays as it is: a stale state may not mix with what is there."""
    for name, elements in found.add.items():
        keys = served.get(_BELONGS.get(name, ""), set())
        lengths = {len(key) for key in keys}
        for key in [key for key in elements if any(key[:length] in keys for length in lengths)]:
            del elements[key]
