"""Rule facts: iptables rules and ipsets as frozen values, what is there and what is to be done.

Pure: types and their text only. `kernel/iptables.py` and `kernel/ipset.py` observe and apply them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NewType

from kube_router._fast.ipset import diff_members, pack_members, unpack_members
from kube_router.workers.model import Family

if TYPE_CHECKING:
    from kube_router._fast.ipset import Kind

RuleText = NewType("RuleText", str)
"""What follows ``-A CHAIN`` in the words of ``iptables -S``; two rules are the same if their texts are."""

SetName = NewType("SetName", str)
"""Name of an ipset, at most 31 bytes."""

SetType = Literal["hash:ip", "hash:net", "hash:ip,port", "bitmap:port"]
DEFAULT_MOST = 65536
"""Members that a set can hold unless its creator says another number."""


@dataclass(frozen=True, slots=True)
class RuleStep:
    """One change of one chain. ``position`` (from 1) is only of an insert."""

    verb: Literal["insert", "append", "delete"]
    chain: str
    rule: RuleText
    position: int = 1

    def __str__(self) -> str:
        """A line for ``iptables-restore``."""
        if self.verb == "insert":
            return f"-I {self.chain} {self.position} {self.rule}"
        return f"-{'A' if self.verb == 'append' else 'D'} {self.chain} {self.rule}"


@dataclass(frozen=True, slots=True)
class RulePlan:
    """Steps on one table of one family; they happen together or not at all (one restore)."""

    family: Family
    table: str
    steps: tuple[RuleStep, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def __str__(self) -> str:
        """Input for ``iptables-restore --noflush``."""
        return "\n".join([f"*{self.table}", *map(str, self.steps), "COMMIT", ""])


@dataclass(frozen=True, slots=True)
class ChainPlan:
    """What is to be written to table filter of one family; all of it happens, or nothing (one restore).

    ``write``: chains of our own with all of their rules, made or emptied first. ``steps``: on built-in chains.
    ``remove``: chains of our own that nothing refers to once the rest is written. Only chains that are named here are
    touched. ``grow``: those of ``write`` that stand and only lack rules: (position from 1, rule), in their order; they
    are not emptied. A restore that deletes no rule ends in 2 ms, any other one waits for the kernel's grace period.
    """

    family: Family
    write: Mapping[str, tuple[RuleText, ...]] = field(default_factory=dict)
    steps: tuple[RuleStep, ...] = ()
    remove: tuple[str, ...] = ()
    grow: Mapping[str, tuple[tuple[int, RuleText], ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.write) + len(self.steps) + len(self.remove)

    def __str__(self) -> str:
        """Input for ``iptables-restore --noflush``.

        A chain to be removed is emptied by its declaration: chains that are to go may refer to each other.
        """
        lines = ["*filter"]
        whole = {chain: rules for chain, rules in self.write.items() if chain not in self.grow}
        lines += [f":{chain} - [0:0]" for chain in (*whole, *self.remove)]
        lines += [f"-A {chain} {rule}" for chain, rules in whole.items() for rule in rules]
        lines += [f"-I {chain} {position} {rule}" for chain, rules in self.grow.items() for position, rule in rules]
        lines += map(str, self.steps)
        lines += [f"-X {chain}" for chain in self.remove]
        return "\n".join([*lines, "COMMIT", ""])


_KINDS: Mapping[SetType, Kind] = {
    "hash:ip": "address",
    "hash:net": "address",
    "hash:ip,port": "address,port",
    "bitmap:port": "port",
}


@dataclass(frozen=True, slots=True)
class SetSpec:
    """What an ipset is, without its members; the options are upstream's: ``timeout 0`` and the default size.

    A set of the same name that differs in ``type`` or ``family`` is not ours. ``max_members`` is used at creation only:
    upstream's ``create -exist`` fails on a set of another size, so the sets that it shares with us keep the default.
    A ``bitmap:port`` holds any port, has no timeout (8 KiB instead of 512) and no family: whichever is given, both
    families' rules may name it.
    """

    name: SetName
    type: SetType
    family: Family
    max_members: int = DEFAULT_MOST

    @property
    def kind(self) -> Kind:
        """Kind of its members, for `_fast.ipset`."""
        return _KINDS[self.type]

    def members(self, texts: Iterable[str] = ()) -> Members:
        """Members for this set, from their text; ValueError names the first that fits no set of its type."""
        return Members.of(self.family, texts, self.kind)

    def __str__(self) -> str:
        if self.type == "bitmap:port":
            return f"create {self.name} bitmap:port range 0-65535"
        family = " family inet6" if self.family is Family.IPV6 else ""
        most = "" if self.max_members == DEFAULT_MOST else f" maxelem {self.max_members}"
        return f"create {self.name} {self.type} timeout 0{family}{most}"


@dataclass(frozen=True, slots=True)
class Members:
    """The members of a set, packed (`_fast.ipset`): sorted, each once; equal sets are equal bytes."""

    family: Family
    packed: bytes = b""
    kind: Kind = "address"

    @classmethod
    def of(cls, family: Family, texts: Iterable[str], kind: Kind = "address") -> Members:
        """Members of one family and kind: addresses and CIDRs, or others; ValueError names the first that is none."""
        return cls(family, pack_members(texts, family, kind), kind)

    def texts(self) -> list[str]:
        """The members as text, in packed order."""
        return unpack_members(self.packed, self.family, self.kind)

    def __len__(self) -> int:
        address = self.family.bits // 8
        return len(self.packed) // {"address": address + 1, "address,port": address + 3, "port": 2}[self.kind]

    def __bool__(self) -> bool:
        return bool(self.packed)


@dataclass(frozen=True, slots=True)
class SetPlan:
    """Steps on one set, in their order: create it, add, delete. ``result``: its members afterwards."""

    spec: SetSpec
    create: bool
    add: Members
    delete: Members
    result: Members

    def __len__(self) -> int:
        return self.create + len(self.add) + len(self.delete)

    def __str__(self) -> str:
        """In the words of ``ipset restore``."""
        lines = [str(self.spec)] if self.create else []
        lines += [f"add {self.spec.name} {member}" for member in self.add.texts()]
        lines += [f"del {self.spec.name} {member}" for member in self.delete.texts()]
        return "\n".join(lines)


def plan_set(spec: SetSpec, actual: Members | None, desired: Members, *, hold: bool = False) -> SetPlan:
    """Steps that turn ``actual`` (None: there is no such set) into ``desired``; ``hold``: nothing is removed."""
    before = actual or spec.members()
    to_add, to_delete = diff_members(before.packed, desired.packed, spec.family, spec.kind)
    add, delete = Members(spec.family, to_add, spec.kind), Members(spec.family, to_delete, spec.kind)
    result = desired
    if hold and delete:
        result = spec.members([*desired.texts(), *delete.texts()])
        delete = spec.members()
    return SetPlan(spec, actual is None, add, delete, result)
