"""Looks at our nftables table: what stands in it, and how that differs from what this process left there.

Touches the kernel, reading only, through the drivers that it is given. One listing of the table's structure, then the
elements of each of our sets, a message each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kube_router.workers.firewall import names
from kube_router.workers.firewall.nftrender import Chain, frame_shapes
from kube_router.workers.firewall.nftrender import set_shape as shape_of
from kube_router.workers.firewall.nftstate import ALTERED, EMPTY, OTHER, Believed, rules_hash
from kube_router.workers.firewall.rules import BlockSet, Changed, Direction, PortSet, Ruleset, SetKey
from kube_router.workers.kernel.nft import ListedChain, ListedTable
from kube_router.workers.kernel.nftelements import Key, pack_blocks, pack_member, unpack_member
from kube_router.workers.model import Family
from kube_router.workers.nftcode import canonical, compile_rule


class Lister(Protocol):
    """What is asked of `kernel.nft.Nft`."""

    def list_table(self, family: Family, name: str) -> ListedTable | None: ...


class Elements(Protocol):
    """What is asked of `kernel.nftelements.ElementDriver`."""

    def keys(self, family: Family, table: str, name: str, length: int) -> set[Key] | None: ...

    def intervals(self, family: Family, table: str, name: str) -> list[tuple[int, int]] | None: ...

    def verdicts(self, family: Family, table: str, name: str) -> dict[Key, str] | None: ...


@dataclass(slots=True)
class MemberChange:
    """Keys that a clause set lacks, and keys that it has too many."""

    add: set[Key] = field(default_factory=set)
    delete: set[Key] = field(default_factory=set)


@dataclass(slots=True)
class Seen:
    """A look. ``misfits``: what has one of our names and cannot be changed into ours; the table must be made anew.

    ``members``: by set name, what differs from the rule set; ``blocks``: interval sets that differ. ``words``: ``set``
    or ``map`` of those that are nobody's. ``repaired``: a line for each thing that is not as this process left it.
    """

    believed: Believed
    listed: ListedTable = field(default_factory=ListedTable)
    misfits: list[str] = field(default_factory=list)
    members: dict[str, MemberChange] = field(default_factory=dict)
    blocks: set[str] = field(default_factory=set)
    words: dict[str, str] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)


def key_length(key: SetKey, family: Family) -> int:
    """Bytes of a member's key."""
    return family.bits // 8 + (8 if isinstance(key, PortSet) else 0)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a look is compared with. ``sets`` and ``chains``: what should stand, by name.

    ``before``: what this process left, and ``changed`` what the rule set has become since; ``members_known`` tells
    whether that holds for members.
    """

    family: Family
    sets: Mapping[str, SetKey]
    chains: Mapping[str, Chain]
    before: Believed
    changed: Changed
    members_known: bool


def look(nft: Lister, elements: Elements, ruleset: Ruleset, expected: Expected) -> Seen:
    """What stands now. Raises `NftError`."""
    family, before = expected.family, expected.before
    listed = nft.list_table(family, names.NFT_TABLES[family])
    seen = Seen(Believed(known=True))
    if listed is None:
        if before.table:
            seen.repaired.append(f"table {names.NFT_TABLES[family]} was deleted")
        return seen
    seen.listed = listed
    seen.believed.table = True
    _see_chains(seen, expected)
    _see_shapes(seen, expected)
    if not seen.misfits:
        _see_frame_elements(seen, elements, family, before)
        for name, key in expected.sets.items():
            if name not in seen.believed.sets:
                continue
            if isinstance(key, BlockSet):
                _see_blocks(seen, elements, expected, name, key)
            else:
                _see_members(seen, elements, expected, name, key, ruleset)
    _see_names(seen, before)
    return seen


def _see_chains(seen: Seen, expected: Expected) -> None:
    before = expected.before
    for name, listed in seen.listed.chains.items():
        wanted = expected.chains.get(name)
        if wanted is not None and listed.header != wanted.header:
            seen.misfits.append(f"chain {name} is hooked as {listed.header or 'no base chain'!r}")
        found = hash_of(listed, wanted, expected.family)
        was = before.chains.get(name)
        if before.known and was is None:
            seen.repaired.append(f"chain {name} was added")
        elif before.known and found != was and (found == EMPTY or (wanted and rules_hash(wanted.rules) == was)):
            seen.repaired.append(f"chain {name} was {'flushed' if found == EMPTY else 'changed'}")
            found = ALTERED
        seen.believed.chains[name] = found
    seen.repaired += [f"chain {name} was deleted" for name in before.chains if name not in seen.believed.chains]


def hash_of(listed: ListedChain, wanted: Chain | None, family: Family) -> int:
    """`rules_hash` of what is wanted, if that is what stands."""
    if not listed.rules:
        return EMPTY
    if wanted is None or len(wanted.rules) != len(listed.rules):
        return OTHER
    for rule, stands in zip(wanted.rules, listed.rules, strict=True):
        try:
            code = compile_rule(rule, family)
        except ValueError:  # it will be refused
            return OTHER
        # Mostly the same bytes, and then they need no reading.
        if stands != code and (canonical(stands[0]), stands[1]) != code:
            return OTHER
    return rules_hash(wanted.rules)


def _see_shapes(seen: Seen, expected: Expected) -> None:
    family, sets = expected.family, expected.sets
    frame = {shape.name: shape for shape in frame_shapes(family)}
    for name, shape in seen.listed.sets.items():
        if name in frame:
            seen.believed.frame_sets.add(name)
            wanted = frame[name]
        else:
            seen.believed.sets.add(name)
            if name not in sets:
                seen.words[name] = shape.word
                continue
            wanted = shape_of(sets[name], name, family)
        if (wanted.type, wanted.interval) != (shape.type, shape.interval):
            seen.misfits.append(f"{shape.word} {name} is of type {shape.type!r}")


def _see_frame_elements(seen: Seen, elements: Elements, family: Family, before: Believed) -> None:
    size, table = family.bits // 8, names.NFT_TABLES[family]
    lengths = {names.LOCAL_PODS: size, names.THEMSELVES: 2 * size} | dict.fromkeys(names.NODE_PORTS.values(), 2)
    for name in seen.believed.frame_sets & set(lengths):
        keys = elements.keys(family, table, name, lengths[name]) or set()
        texts = {unpack_member(key, family) for key in keys}
        seen.believed.elements[name] = texts
        if before.known and name in before.elements:
            was = before.elements[name]
            seen.repaired += _member_lines(f"set {name}", len(was - texts), len(texts - was))
    for direction, name in names.POD_MAPS.items():
        if name not in seen.believed.frame_sets:
            continue
        found = elements.verdicts(family, table, name) or {}
        seen.believed.dispatch[direction] = {unpack_member(key, family): chain for key, chain in found.items()}
        if before.known:
            _see_dispatch(seen, direction, name, before)


def _see_dispatch(seen: Seen, direction: Direction, name: str, before: Believed) -> None:
    was, found = before.dispatch[direction], seen.believed.dispatch[direction]
    for address, chain in was.items():
        if address in found and found[address] != chain:
            seen.repaired.append(f"map {name}: {address} was led to {found[address] or 'no chain'}")
            found[address] = ""
    seen.repaired += _member_lines(f"map {name}", len(was.keys() - found.keys()), len(found.keys() - was.keys()))


def _see_blocks(seen: Seen, elements: Elements, expected: Expected, name: str, key: BlockSet) -> None:
    family = expected.family
    if elements.intervals(family, names.NFT_TABLES[family], name) != pack_blocks(key.prefixes, family):
        seen.blocks.add(name)
        if name in expected.before.sets:
            seen.repaired.append(f"set {name}: its blocks were changed")


def _see_members(seen: Seen, elements: Elements, expected: Expected, name: str, key: SetKey, ruleset: Ruleset) -> None:
    family, length = expected.family, key_length(key, expected.family)
    wanted = _packed(ruleset.members[key].get(family, ()), family)
    stands = elements.keys(family, names.NFT_TABLES[family], name, length) or set()
    if stands != wanted:
        # A set that grows while it is read can be read in part: what is there a second time is there.
        stands |= elements.keys(family, names.NFT_TABLES[family], name, length) or set()
    difference = MemberChange(wanted - stands, stands - wanted)
    if difference.add or difference.delete:
        seen.members[name] = difference
    if expected.members_known and name in expected.before.sets:
        added = _packed(expected.changed.added.get(key, {}).get(family, ()), family)
        removed = _packed(expected.changed.removed.get(key, {}).get(family, ()), family)
        was = (wanted - added) | removed
        seen.repaired += _member_lines(f"set {name}", len(was - stands), len(stands - was))


def _packed(members: Iterable[str], family: Family) -> set[Key]:
    return {pack_member(member, family) for member in members}


def _see_names(seen: Seen, before: Believed) -> None:
    if not before.known:
        return
    for name in sorted((before.sets | before.frame_sets) - seen.listed.sets.keys()):
        seen.repaired.append(f"set {name} was deleted")
    for name in sorted(seen.listed.sets.keys() - before.sets - before.frame_sets):
        seen.repaired.append(f"set {name} was added")


def _member_lines(what: str, missing: int, foreign: int) -> Iterable[str]:
    if missing:
        yield f"{what}: {missing} of its elements were missing"
    if foreign:
        yield f"{what}: {foreign} foreign elements were in it"
