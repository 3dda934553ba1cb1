"""The ipsets of the iptables backend: made and filled before rules name them, emptied and destroyed after.

Drives a set driver (a parameter). What a set was last given is what it is believed to hold; that is not kept here a
second time, but is the ruleset. A change of members costs a message a set, whatever the set holds; sets are listed when
they are new, when a change of theirs failed, and when the caller observes.

A set that cannot be made or filled is a failure of its own: rules that name it must be left out (`failed`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol

from kube_router.workers.firewall.chains import ipset_of
from kube_router.workers.firewall.names import IPSET_NODE_PORTS, LOCAL_PODS, SOURCE_PREFIX, digest, ipset_name
from kube_router.workers.firewall.removal import is_our_set
from kube_router.workers.firewall.rules import BlockSet, Changed, Member, PodSet, Ruleset, SetKey
from kube_router.workers.kernel.ipset import SetError, SetFull, SetReferenced
from kube_router.workers.model import Failure, Family
from kube_router.workers.rulefacts import DEFAULT_MOST, Members, SetName, SetPlan, SetSpec, SetType, plan_set

MOST_MEMBERS = 1 << 20
"""No set is made larger: it would be some hundred megabytes of kernel memory on every node."""
SPARE = SetName(SOURCE_PREFIX + digest("spare"))
"""The name of a larger set until it takes the place of one that is full; ours by its form, if a crash leaves it."""
CHECKED_AT_ONCE = 256
"""Sets whose number of members one look compares; a count takes the kernel some microseconds."""

_HALVES = {"0.0.0.0/0": ("0.0.0.0/1", "128.0.0.0/1"), "::/0": ("::/1", "8000::/1")}


class Sets(Protocol):
    """What this module asks of a set driver."""

    def observe(self, spec: SetSpec) -> Members | None: ...

    def count(self, spec: SetSpec) -> int | None: ...

    def names(self, ours: Callable[[str], bool]) -> frozenset[SetName]: ...

    def apply(self, plan: SetPlan) -> None: ...

    def change(self, spec: SetSpec, add: Members, delete: Members) -> None: ...

    def replace(self, spec: SetSpec, members: Members, spare: SetName) -> None: ...

    def remove(self, name: SetName) -> bool: ...


def set_type(key: SetKey) -> SetType:
    """The type of ipset that holds a set of the ruleset."""
    if isinstance(key, BlockSet):
        return "hash:net"
    return "hash:ip" if isinstance(key, PodSet) else "hash:ip,port"


def families_of(key: SetKey, families: Iterable[Family]) -> tuple[Family, ...]:
    """The families in which a set exists."""
    return tuple(family for family in families if not isinstance(key, BlockSet) or key.family is family)


def local_pods_spec(family: Family) -> SetSpec:
    """The set of the addresses of this node's pods."""
    return SetSpec(SetName(ipset_name(LOCAL_PODS, family)), "hash:ip", family)


def node_port_specs() -> dict[str, SetSpec]:
    """The sets of node ports by protocol; both families' rules name them."""
    return {protocol: SetSpec(SetName(name), "bitmap:port", Family.IPV4) for protocol, name in IPSET_NODE_PORTS.items()}


def local_pods(ruleset: Ruleset, family: Family) -> frozenset[str]:
    """The addresses that pods of this node own."""
    return frozenset(address for pod in ruleset.pods.values() for address in pod.addresses_of(family))


@dataclass(slots=True)
class SetResult:
    """What became of the sets in one sync."""

    writes: int = 0
    failures: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


class SetSync:
    """The sets of policies, of local pods and of node ports. `add` before the chains are written, `remove` after."""

    def __init__(self, driver: Sets, families: tuple[Family, ...]) -> None:
        self._driver, self._families = driver, families
        self._specs: dict[tuple[SetKey, Family], SetSpec] = {}
        self._counts: dict[SetSpec, int | None] = {}
        """The sets that stand and the members they have; None where that is not known for certain."""
        self._fixed: dict[SetSpec, frozenset[str]] = {}
        self._deletes: list[tuple[SetSpec, Members]] = []
        self._garbage: set[SetName] = set()
        self._stuck: set[SetName] = set()
        self._look = 0
        self.again = False
        """Whether the next changes may hold some that were carried out before: then they do not count."""
        self.failed: dict[tuple[SetKey, Family], str] = {}
        """Sets that rules must not name, and why."""
        self.failed_fixed: dict[SetName, str] = {}

    @property
    def standing(self) -> int:
        """The number of sets of policies that stand."""
        return sum(spec not in self._fixed for spec in self._counts)

    def spec(self, key: SetKey, family: Family) -> SetSpec:
        """What the set is in the kernel."""
        found = self._specs.get((key, family))
        if found is None:
            found = SetSpec(SetName(ipset_of(key, family)), set_type(key), family)
            self._specs[key, family] = found
        return found

    def name(self, key: SetKey, family: Family) -> SetName:
        """Its name, for rules."""
        return self.spec(key, family).name

    # ------------------------------------------------------------------------------------------------- adding

    def add(self, ruleset: Ruleset, changed: Changed, family: Family, *, everything: bool, result: SetResult) -> None:
        """Make the sets of a family and add members; what is to be deleted waits for `remove`."""
        if everything:
            self._forget(ruleset, family)
            keys: Iterable[SetKey] = ruleset.members
        else:
            keys = [key for key in changed.new_sets if key in ruleset.members]
        for key in keys:
            if families_of(key, (family,)):
                self._whole(ruleset, changed, key, family, result)
        if everything:
            return
        for key in {*changed.added, *changed.removed} - changed.new_sets:
            added, removed = _moves(changed.added, key, family), _moves(changed.removed, key, family)
            if (added or removed) and key in ruleset.members and (key, family) not in self.failed:
                self._delta(ruleset, changed, key, family, result)

    def _forget(self, ruleset: Ruleset, family: Family) -> None:
        """What the ruleset has no more is to be destroyed."""
        for key, of_family in [pair for pair in self._specs if pair[1] is family and pair[0] not in ruleset.members]:
            spec = self._specs.pop((key, of_family))
            self._garbage.add(spec.name)
            self._counts.pop(spec, None)
            self.failed.pop((key, of_family), None)

    def _whole(self, ruleset: Ruleset, changed: Changed, key: SetKey, family: Family, result: SetResult) -> None:
        """Compare a set with the kernel's, member by member."""
        spec = self.spec(key, family)
        self._garbage.discard(spec.name)
        try:
            desired = _members(spec, ruleset.members[key].get(family, frozenset()))
            actual = self._driver.observe(spec)
            plan = plan_set(_sized(spec, len(desired)) if actual is None else spec, actual, desired)
            result.repaired += self._surprises(spec, plan, changed, key, family)
            result.writes += self._add(plan, desired)
            if spec.type == "hash:net" and actual == desired and self._driver.count(spec) != len(desired):
                # Exceptions (nomatch) are counted but are no members: none is ours.
                self._driver.replace(_sized(spec, len(desired)), desired, SPARE)
                result.writes += 1
                result.repaired.append(f"{family}: ipset {spec.name} had exceptions")
        except SetError as error:
            self.failed[key, family] = str(error)
            self._counts.pop(spec, None)
            return
        self.failed.pop((key, family), None)
        self._counts[spec] = len(desired)
        if plan.delete:
            self._deletes.append((spec, plan.delete))

    def _delta(self, ruleset: Ruleset, changed: Changed, key: SetKey, family: Family, result: SetResult) -> None:
        """Add what is new; nothing is listed unless that fails, nor is the set gone through to count it."""
        spec = self.spec(key, family)
        added, removed = _moves(changed.added, key, family), _moves(changed.removed, key, family)
        try:
            self._driver.change(spec, _members(spec, added), spec.members())
            gone = _members(spec, removed)
        except SetError:
            self._whole(ruleset, changed, key, family, result)
            return
        result.writes += len(added)
        count = self._counts.get(spec)
        self._counts[spec] = None if count is None or self.again else count + len(added) - len(removed)
        if gone:
            self._deletes.append((spec, gone))

    def _add(self, plan: SetPlan, desired: Members) -> int:
        """Carry out the additions of a plan; in a set that is full, by an exchange for a larger one."""
        adding = dataclasses.replace(plan, delete=plan.spec.members())
        if not adding:
            return 0
        try:
            self._driver.apply(adding)
        except SetFull:
            actual = self._driver.observe(plan.spec) or plan.spec.members()
            both = plan.spec.members([*desired.texts(), *actual.texts()])
            self._driver.replace(_sized(plan.spec, len(both)), both, SPARE)
        return len(adding)

    def _surprises(self, spec: SetSpec, plan: SetPlan, changed: Changed, key: SetKey, family: Family) -> Iterator[str]:
        """What somebody else did to a set that was as it should be."""
        if self._counts.get(spec) is None or changed.everything or key in changed.new_sets:
            return
        if plan.create:
            yield f"{family}: ipset {spec.name} was gone"
            return
        added, removed = _moves(changed.added, key, family), _moves(changed.removed, key, family)
        missing = [text for text in plan.add.texts() if text not in added]
        surplus = [text for text in plan.delete.texts() if text not in removed]
        if missing:
            yield f"{family}: ipset {spec.name}: {len(missing)} members were missing, first: {missing[0]}"
        if surplus:
            yield f"{family}: ipset {spec.name}: {len(surplus)} members were too many, first: {surplus[0]}"

    # -------------------------------------------------------------------------------------------- fixed sets

    def fix(
        self, spec: SetSpec, desired: frozenset[str], *, observe: bool, add: bool, delete: bool, result: SetResult
    ) -> bool:
        """Bring a small set that is always there to ``desired``, or as near as it may; whether that went well.

        ``add``, ``delete``: what may be done to its members.
        """
        try:
            desired = frozenset(spec.members(desired).texts())  # in the words in which the kernel's are read
            before = self._fixed.get(spec)
            if before == desired and not observe:
                return True
            actual = self._driver.observe(spec) if observe or before is None else spec.members(before)
            if before is not None and actual != spec.members(before):
                result.repaired.append(f"ipset {spec.name} was gone, or had other members than it was given")
            present = frozenset(actual.texts() if actual is not None else ())
            target = (present & desired) | (desired if add else frozenset()) | (frozenset() if delete else present)
            plan = plan_set(spec, actual, spec.members(target))
            self._fixed.pop(spec, None)
            result.writes += self._add(plan, plan.result) + len(plan.delete)
            self._driver.change(spec, spec.members(), plan.delete)
        except (SetError, ValueError) as error:
            self._counts.pop(spec, None)
            self.failed_fixed[spec.name] = str(error)
            return False
        self.failed_fixed.pop(spec.name, None)
        self._fixed[spec] = target
        self._counts[spec] = len(target)
        return True

    # ----------------------------------------------------------------------------------------------- removing

    def remove(self, changed: Changed, *, hold: bool, result: SetResult) -> None:
        """Delete members that are to go. ``hold``: none, and it is no longer known what the sets hold."""
        deletes, self._deletes = self._deletes, []
        for key in changed.gone_sets:
            for family in families_of(key, self._families):
                spec = self.spec(key, family)
                self._garbage.add(spec.name)
                self._counts.pop(spec, None)
                self.failed.pop((key, family), None)
                del self._specs[key, family]
        for spec, members in deletes:
            if hold:
                self._counts[spec] = None
                continue
            try:
                self._driver.change(spec, spec.members(), members)
                result.writes += len(members)
            except SetError as error:
                self._counts[spec] = None
                result.failures.append(Failure("ipset", str(error)))

    def destroy(self, *, observe: bool, result: SetResult) -> None:
        """Destroy the sets that no rule names any more; one that is still referred to waits for the next time."""
        if observe:
            try:
                known = {spec.name for spec in self._counts} | {self.spec(*pair).name for pair in self.failed}
                known |= {SetName(name) for name in self._reserved()}
                self._garbage |= {name for name in self._driver.names(is_our_set) if name not in known}
            except SetError as error:
                result.failures.append(Failure("ipset", str(error)))
        stuck, self._stuck = self._stuck, set()
        for name in sorted(self._garbage):
            try:
                result.writes += self._driver.remove(name)
                self._garbage.discard(name)
            except SetReferenced as error:
                # nftables frees the rules that named it some time after their removal.
                self._stuck.add(name)
                if name in stuck:
                    result.warnings.append(f"{error}; it is not needed any more, and stays as long as that is so")
            except SetError as error:
                result.failures.append(Failure("ipset", str(error)))

    def _reserved(self) -> Iterator[str]:
        """Names of sets that stand or fall with the worker; and those of a family that is not ours to touch."""
        yield from IPSET_NODE_PORTS.values()
        yield from (ipset_name(LOCAL_PODS, family) for family in Family)

    # --------------------------------------------------------------------------------------------------- drift

    def differs(self) -> bool:
        """Whether some set is gone or has another number of members than it was given; looks at a part each time."""
        known = [(spec, count) for spec, count in self._counts.items() if count is not None]
        start = self._look if self._look < len(known) else 0
        self._look = start + CHECKED_AT_ONCE
        try:
            return any(self._driver.count(spec) != count for spec, count in known[start : self._look])
        except SetError:
            return True

    def plan(self, ruleset: Ruleset, fixed: Mapping[SetSpec, frozenset[str]]) -> Iterator[str]:
        """What `add`, `remove` and `destroy` would do now, a line each; reads and writes nothing."""
        wanted: dict[SetSpec, Iterable[str]] = dict(fixed)
        for key, by_family in ruleset.members.items():
            for family in families_of(key, self._families):
                wanted[self.spec(key, family)] = by_family.get(family, frozenset())
        for spec, texts in wanted.items():
            try:
                desired = _members(spec, texts)
                plan = plan_set(_sized(spec, len(desired)), self._driver.observe(spec), desired)
                yield from str(plan).splitlines() if plan else ()
            except SetError as error:
                yield f"cannot: {error}"
        names = {spec.name for spec in wanted} | set(self._reserved())
        try:
            yield from (f"destroy {name}" for name in sorted(self._driver.names(is_our_set)) if name not in names)
        except SetError as error:
            yield f"cannot: {error}"


def _members(spec: SetSpec, texts: Iterable[str]) -> Members:
    """Packed; the whole of a family in two halves, as hash:net has no prefix length 0."""
    try:
        if spec.type != "hash:net":
            return spec.members(texts)
        return spec.members([half for text in texts for half in _HALVES.get(text, (text,))])
    except ValueError as error:
        raise SetError(f"ipset {spec.name}: {error}") from error


def _moves(
    moves: Mapping[SetKey, Mapping[Family, AbstractSet[Member]]], key: SetKey, family: Family
) -> AbstractSet[Member]:
    """The members of one set that were added, or removed."""
    return moves.get(key, {}).get(family, frozenset())


def _sized(spec: SetSpec, count: int) -> SetSpec:
    """The set with room for so many members; the default as long as that is enough. Raises `SetFull`."""
    if count > MOST_MEMBERS:
        raise SetFull(f"ipset {spec.name}: {count} members, and no set is made for more than {MOST_MEMBERS}")
    if count <= DEFAULT_MOST:
        return spec
    return dataclasses.replace(spec, max_members=1 << (count - 1).bit_length())
