"""One family's nftables table: works out what differs, and has it changed.

Touches the kernel, through the drivers that it is given. A sync of members alone is one message and lists nothing.
Everything else is: members that come, one transaction with all chains, sets, verdicts and addresses of local pods, then
members that go. So no clause ever lacks members that it had, and a process that ends between two of these leaves
traffic as it was.

What the kernel refuses is found line by line and left out, and the rest goes in; see `Refusals`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kube_router.ipc.messages import Key
from kube_router.workers.firewall import names
from kube_router.workers.firewall.nftlook import Elements, Expected, Lister, MemberChange, Seen, hash_of, look
from kube_router.workers.firewall.nftplan import (
    Line,
    NewSet,
    RuleOwner,
    SetOwner,
    Steps,
    degraded,
)
from kube_router.workers.firewall.nftrender import Chain, frame_shapes
from kube_router.workers.firewall.nftstate import (
    EMPTY,
    OTHER,
    Believed,
    PodLayout,
    Refusals,
    SetNames,
    chain_steps,
    element_steps,
    fixed_chains,
    frame_elements,
    gone_steps,
    new_set,
    pod_layout,
    policy_chains,
    rules_hash,
    wanted_sets,
)
from kube_router.workers.firewall.rules import BlockSet, Changed, Direction, Frame, Ruleset, SetKey
from kube_router.workers.kernel.nftelements import ElementChange, pack_member, unpack_member
from kube_router.workers.kernel.nftsocket import NftError
from kube_router.workers.model import Family

BULK = 4096
"""A new set with more members is made and filled by itself, before anything names it: as text it would take memory."""
_ROUNDS = 30
"""Most attempts at a transaction, each without what the last one was refused; the library tells 10 errors at a time."""
_FIXED = frozenset({names.DEFAULT_CHAIN, names.COMMON_CHAIN, names.TAIL_CHAIN, *names.TOP_CHAINS.values()})


class Channel(Lister, Protocol):
    """What is asked of `kernel.nft.Nft`."""

    def run(self, commands: Sequence[str]) -> None: ...


class ElementChannel(Elements, Protocol):
    """What is asked of `kernel.nftelements.ElementDriver`."""

    def apply(self, family: Family, table: str, changes: Iterable[ElementChange]) -> None: ...


class _Refused(Exception):
    """Something was left out; the rest is to be tried."""


class _Surprised(Exception):
    """The kernel does not hold what is believed: it must be looked at."""


@dataclass(slots=True)
class Asked:
    """What a sync is asked for. ``full``: everything is compared, not only what ``changed`` names.

    ``members_known``: the sets held just what the last rule set said, so that anything else is a foreign hand's.
    """

    ruleset: Ruleset
    changed: Changed
    frame: Frame
    hold: bool
    full: bool
    members_known: bool = False


@dataclass(slots=True)
class Work:
    """All that one sync has to do. ``keys``: by name, the clause sets that it concerns.

    ``members``: by name, what enters and leaves those of them that exist. ``elements``: by name, what the sets of the
    frame and the pods should hold; empty when they are not concerned.
    """

    steps: Steps
    pods: PodLayout
    keys: dict[str, SetKey]
    members: dict[str, MemberChange] = field(default_factory=dict)
    elements: Mapping[str, set[str]] = field(default_factory=dict)


@dataclass(slots=True)
class TableResult:
    """What a sync of one table came to. ``commits``: transactions; ``looked``: whether the kernel was read."""

    writes: int = 0
    commits: int = 0
    looked: bool = False
    repaired: list[str] = field(default_factory=list)


class TableSync:
    """The table of one family and what is believed of it."""

    def __init__(self, family: Family, nft: Channel, elements: ElementChannel, refused: Refusals | None = None) -> None:
        self.family, self._nft, self._elements = family, nft, elements
        self.refused = refused or Refusals()
        self.believed = Believed()
        self.policy_chains = 0
        self._names = SetNames(family)
        self._pods = PodLayout()
        self._frame: Frame | None = None
        self._doubtful = True

    def sync(
        self, ruleset: Ruleset, changed: Changed, frame: Frame, *, observe: bool, unchanged: bool, hold: bool
    ) -> TableResult:
        """Bring the table to ``ruleset`` and ``frame``. Raises `NftError` when nothing could be done.

        ``unchanged``: nobody changed any table since this process last knew that all was right; nothing is read then.
        """
        result = TableResult(looked=self._doubtful or changed.everything or (observe and not unchanged))
        asked = Asked(ruleset, changed, frame, hold, full=result.looked or frame != self._frame)
        if observe and self.refused:
            self.refused, asked.full = Refusals(), True
        asked.members_known = not (self._doubtful or changed.everything)
        self._doubtful = True
        seen: Seen | None = None
        for _ in range(_ROUNDS):
            if result.looked and seen is None:
                seen = self._look(asked)
            work = self._work(asked, seen)
            try:
                self._apply(work, asked, result)
                break
            except _Refused:
                asked.full = True
            except _Surprised:
                result.looked = asked.full = True
        else:
            raise NftError(f"table {names.NFT_TABLES[self.family]}: refused {_ROUNDS} times, each time something else")
        if seen is not None:
            result.repaired += seen.repaired
        self._pods, self._frame = work.pods, frame
        # What a stale state kept may be of nobody: the next one that counts is compared with the kernel.
        self._doubtful = hold
        return result

    def plan(self, ruleset: Ruleset, frame: Frame) -> tuple[str, ...]:
        """What `sync` would do, a line each, from a look. Raises `NftError`."""
        asked = Asked(ruleset, Changed(everything=True), frame, hold=False, full=True)
        work = self._work(asked, self._look(asked))
        lines = [line.text for line in work.steps.lines()]
        for name, change in work.members.items():
            for verb, keys in (("add", change.add), ("delete", change.delete)):
                if keys:
                    texts = ", ".join(sorted(unpack_member(key, self.family) for key in keys))
                    lines.append(f"{verb} element {work.steps.table} {name} {{ {texts} }}")
        return tuple(lines)

    def failed(self, ruleset: Ruleset) -> dict[Key, str]:
        """Policies of which something was left out, and why."""
        found: dict[Key, str] = {}
        if not self.refused:
            return found
        chains = {owner.chain: reason for owner, reason in self.refused.rules.items()}
        for key, rules in ruleset.policies.items():
            for direction in Direction:
                reason = chains.get(names.policy_chain(key, direction))
                for clause in rules.clauses(direction) or ():
                    for part in clause.sets:
                        reason = reason or self.refused.sets.get(part)
                if reason is not None:
                    found[key] = f"{self.family} {direction}: {reason}"
        return found

    def replaced(self) -> tuple[str, ...]:
        """Rules of no policy that this kernel refuses, and why."""
        return tuple(
            f"{self.family}: chain {owner.chain}: {owner.rule!r} is replaced or left out: {reason}"
            for owner, reason in self.refused.rules.items()
            if owner.chain in _FIXED or owner.chain.startswith(names.POD_PREFIX)
        )

    # What is to be done

    def _work(self, asked: Asked, seen: Seen | None) -> Work:
        """Compute everything that one sync has to do; ``seen`` is what a look has found."""
        changed, hold, full = asked.changed, asked.hold, asked.full
        pods = pod_layout(asked.ruleset, self.family) if full or changed.pods else self._pods
        work = Work(Steps(self.family), pods, self._sets(asked))
        steps, believed = work.steps, self.believed
        if seen is not None:
            self._differing_members(work, asked, seen)
        else:
            self._changed_members(work, asked)
        chains = self._chains(asked, pods)
        for name, chain in chains.items() if seen is not None else ():
            # Since the look, a rule may have been left out of it: perhaps that is what stands.
            if believed.chains.get(name) == OTHER and seen is not None:
                believed.chains[name] = hash_of(seen.listed.chains[name], chain, self.family)
        steps.new_table = not believed.table
        steps.new_sets += [
            NewSet(shape) for shape in frame_shapes(self.family) if shape.name not in believed.frame_sets
        ]
        steps.new_sets += [
            new_set(key, name, asked.ruleset, self.family)
            for name, key in work.keys.items()
            if name not in believed.sets
        ]
        chain_steps(steps, chains.values(), believed, hold=hold)
        if full or changed.pods:
            work.elements = frame_elements(asked.frame, pods)
            element_steps(steps, work.elements, pods, believed, hold=hold)
        if not hold:
            words = seen.words if seen is not None else {}
            gone_steps(steps, self._gone_chains(asked, chains, pods), self._gone_sets(asked, work), words)
        return work

    def _chains(self, asked: Asked, pods: PodLayout) -> dict[str, Chain]:
        """All chains that should stand, or those that the change concerns, without what was refused."""
        policies, changed = asked.ruleset.policies, asked.changed
        keys = policies.keys() if asked.full else policies.keys() & changed.policies
        chains = policy_chains((policies[key] for key in keys), self.family, self._names, self.refused)
        if asked.full or changed.pods:
            # The name of a group's chain says what is in it: one that stands needs no look, unless all is looked at.
            stand = () if asked.full else self.believed.chains
            groups = {name: chain for name, chain in pods.groups.items() if name not in stand}
            chains |= {name: self.refused.applied_to(chain, clauses=False) for name, chain in groups.items()}
        if asked.full:
            chains |= fixed_chains(self.family, asked.frame, self.refused)
        return chains

    def _sets(self, asked: Asked) -> dict[str, SetKey]:
        """All clause sets that should stand, or the new ones, by name."""
        keys = wanted_sets(asked.ruleset, self.family, self.refused)
        if asked.full:
            wanted = [*keys]
            self._names.keep(wanted)
            return {self._names(key): key for key in wanted}
        new = asked.changed.new_sets
        return {self._names(key): key for key in keys if key in new} if new else {}

    def _look(self, asked: Asked) -> Seen:
        """Look at the kernel, and believe what is there."""
        pods = pod_layout(asked.ruleset, self.family)
        seen = look(
            self._nft,
            self._elements,
            asked.ruleset,
            Expected(
                self.family,
                self._sets(dataclasses.replace(asked, full=True)),
                self._chains(dataclasses.replace(asked, full=True), pods),
                self.believed,
                asked.changed,
                asked.members_known,
            ),
        )
        if seen.misfits and asked.hold:
            words = "; ".join(seen.misfits)
            raise NftError(
                f"table {names.NFT_TABLES[self.family]} can be made anew only by a state that is current: {words}"
            )
        self.believed = Believed(known=True) if seen.misfits else seen.believed
        self.policy_chains = sum(map(is_policy_chain, self.believed.chains))
        return seen

    def _differing_members(self, work: Work, asked: Asked, seen: Seen) -> None:
        work.steps.rebuild = bool(seen.misfits)
        for name, change in seen.members.items():
            if name in work.keys:
                work.members[name] = MemberChange(change.add, set() if asked.hold else change.delete)
        refill = [name for name in sorted(seen.blocks) if name in work.keys]
        work.steps.refill += [new_set(work.keys[name], name, asked.ruleset, self.family) for name in refill]

    def _changed_members(self, work: Work, asked: Asked) -> None:
        sides = ((asked.changed.added, "add"), *(() if asked.hold else ((asked.changed.removed, "delete"),)))
        for by_key, side in sides:
            for key, by_family in by_key.items():
                members = by_family.get(self.family)
                name = self._names(key) if members else ""
                if members and not isinstance(key, BlockSet) and name in self.believed.sets:
                    keys: set[bytes] = getattr(work.members.setdefault(name, MemberChange()), side)
                    keys.update(pack_member(member, self.family) for member in members)

    def _gone_chains(self, asked: Asked, chains: Mapping[str, Chain], pods: PodLayout) -> Iterable[str]:
        stand = self.believed.chains
        if asked.full:
            return stand.keys() - chains.keys()
        policies = (names.policy_chain(key, direction) for key in asked.changed.policies for direction in Direction)
        gone = {name for name in policies if name in stand and name not in chains}
        if asked.changed.pods:
            gone |= {name for name in stand if name.startswith(names.POD_PREFIX) and name not in pods.groups}
        return gone

    def _gone_sets(self, asked: Asked, work: Work) -> Iterable[str]:
        if asked.full:
            return self.believed.sets - work.keys.keys()
        gone = [key for key in asked.changed.gone_sets if not isinstance(key, BlockSet) or key.family is self.family]
        found = {self._names(key) for key in gone} & self.believed.sets
        self._names.forget(gone)
        return found

    # Having it done

    def _apply(self, work: Work, asked: Asked, result: TableResult) -> None:
        looked = result.looked
        if not work.steps:
            self._change_members(work, result, looked, add=True, delete=True)
            return
        self._change_members(work, result, looked, add=True, delete=False)
        self._make_bulk(work, asked, result, looked)
        self._transact(work.steps, result, looked)
        self._believe(work, asked.hold)
        self._change_members(work, result, looked, add=False, delete=True)

    def _change_members(self, work: Work, result: TableResult, looked: bool, *, add: bool, delete: bool) -> None:
        changes = [
            ElementChange(name, [*change.add] if add else (), [*change.delete] if delete else ())
            for name, change in work.members.items()
            if (add and change.add) or (delete and change.delete)
        ]
        if not changes:
            return
        try:
            self._elements.apply(self.family, names.NFT_TABLES[self.family], changes)
        except NftError as error:
            if not looked:
                raise _Surprised from error
            self._change_one_by_one(changes, work.keys)
        result.commits += 1
        result.writes += sum(len(change.add) + len(change.delete) for change in changes)

    def _change_one_by_one(self, changes: Sequence[ElementChange], keys: Mapping[str, SetKey]) -> None:
        """Find the set that the kernel refuses to fill: its clauses are left out, the others get their members."""
        news = False
        for change in changes:
            try:
                self._elements.apply(self.family, names.NFT_TABLES[self.family], [change])
            except NftError as error:
                if not change.add or change.name not in keys:
                    raise
                news |= self.refused.note(SetOwner(keys[change.name]), str(error))
        if news:
            raise _Refused

    def _make_bulk(self, work: Work, asked: Asked, result: TableResult, looked: bool) -> None:
        steps = work.steps
        large = [new for new in steps.new_sets if len(new.elements) > BULK and not new.shape.interval and new.owner]
        if not large or steps.rebuild:
            return
        empty = [NewSet(new.shape, owner=new.owner) for new in large]
        self._transact(Steps(self.family, new_table=steps.new_table, new_sets=empty), result, looked)
        self.believed.table, steps.new_table = True, False
        for new in large:
            self.believed.sets.add(new.shape.name)
            steps.new_sets.remove(new)
            members = asked.ruleset.members[work.keys[new.shape.name]].get(self.family, ())
            keys = {pack_member(member, self.family) for member in members}
            filling = Work(Steps(self.family), work.pods, work.keys, {new.shape.name: MemberChange(keys)})
            self._change_members(filling, result, looked, add=True, delete=False)

    def _transact(self, steps: Steps, result: TableResult, looked: bool) -> None:
        lines = steps.lines()
        if not lines:
            return
        try:
            self._nft.run([line.text for line in lines])
        except NftError as error:
            if not looked:
                raise _Surprised from error
            if not self._note_refusals(lines, error):
                raise
            raise _Refused from error
        result.commits += 1
        result.writes += sum(line.writes for line in lines)

    def _note_refusals(self, lines: Sequence[Line], error: NftError) -> bool:
        """Remember whose lines are at fault; whether anything can be left out that was still there."""
        news = False
        for index, reason in error.refused:
            owner = lines[index].owner
            if isinstance(owner, RuleOwner) and not is_policy_chain(owner.chain) and degraded(owner.rule) is None:
                continue
            if owner is not None:
                news |= self.refused.note(owner, reason)
        return news

    def _believe(self, work: Work, hold: bool) -> None:
        """The transaction has happened: everything in it stands."""
        steps, believed = work.steps, self.believed
        believed.table = True
        for chain in steps.new_chains:
            believed.chains[chain.name] = EMPTY
        for chain in steps.fill:
            believed.chains[chain.name] = rules_hash(chain.rules)
        for name in steps.gone_chains:
            believed.chains.pop(name, None)
        for new in steps.new_sets:
            (believed.sets if new.owner else believed.frame_sets).add(new.shape.name)
        believed.sets -= steps.gone_sets.keys()
        if steps.new_chains or steps.gone_chains:
            self.policy_chains = sum(map(is_policy_chain, believed.chains))
        if not work.elements:
            return
        for name, members in work.elements.items():
            believed.elements[name] = members | believed.elements.get(name, set()) if hold else members
        for direction, wants in work.pods.dispatch.items():
            stands = {address: chain for address, (chain, _) in wants.items()}
            kept = {address: chain for address, chain in believed.dispatch[direction].items() if chain and hold}
            believed.dispatch[direction] = stands | kept


def is_policy_chain(name: str) -> bool:
    """Whether a chain holds the clauses of a policy."""
    return name.startswith(names.POLICY_PREFIX) and name not in _FIXED
