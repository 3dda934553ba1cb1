"""Rule facts: iptables rules and ipsets as frozen values, what is there and what is to be done.

Pure: types and their text only. `kernel/iptables.py` and `kernel/ipset.py` observe and apply them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NewType

from kube_router._fast.ipset import diff_members, pack_members, unpack_members
from kube_router.workers.model import Family

RuleText = NewType("RuleText", str)
"""What follows ``-A CHAIN`` in the words of ``iptables -S``; two rules are the same if their texts are."""

SetName = NewType("SetName", str)
"""Name of an ipset, at most 31 bytes."""

SetType = Literal["hash:ip", "hash:net"]


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
class SetSpec:
    """What an ipset is, without its members; the options are upstream's: ``timeout 0`` and the default size.

    A set of the same name that differs in ``type`` or ``family`` is not ours. ``max_members`` is used at creation only:
    upstream's ``create -exist`` fails on a set of another size, so the sets that it shares with us keep the default.
    """

    name: SetName
    type: SetType
    family: Family
    max_members: int = 65536

    def __str__(self) -> str:
        family = " family inet6" if self.family is Family.IPV6 else ""
        return f"create {self.name} {self.type} timeout 0{family}"


@dataclass(frozen=True, slots=True)
class Members:
    """The members of a set, packed (`_fast.ipset`): sorted, each once; equal sets are equal bytes."""

    family: Family
    packed: bytes = b""

    @classmethod
    def of(cls, family: Family, texts: Iterable[str]) -> Members:
        """Addresses and CIDRs of one family; ValueError names the first that is none."""
        return cls(family, pack_members(texts, family))

    def texts(self) -> list[str]:
        """The members as text, in packed order."""
        return unpack_members(self.packed, self.family)

    def __len__(self) -> int:
        return len(self.packed) // (self.family.bits // 8 + 1)

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
    before = actual or Members(spec.family)
    to_add, to_delete = diff_members(before.packed, desired.packed, spec.family)
    add, delete, result = Members(spec.family, to_add), Members(spec.family, to_delete), desired
    if hold and delete:
        result = Members.of(spec.family, [*desired.texts(), *delete.texts()])
        delete = Members(spec.family)
    return SetPlan(spec, actual is None, add, delete, result)
