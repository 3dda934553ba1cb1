"""The records that `Memberships` keeps: pods, their profiles, namespaces, selections, and sets as views of them.

Pure, and mutable: only `Memberships` changes them, and it keeps the two ends of each reference in step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from kube_router.ipc.messages import ContainerPort, Key
from kube_router.workers.firewall.index import SelectorIndex
from kube_router.workers.firewall.owners import Owners
from kube_router.workers.firewall.podfacts import PodFacts
from kube_router.workers.firewall.rules import Member, PodSelection, PortSet, SetKey
from kube_router.workers.model import Family


@dataclass(slots=True, eq=False)
class PodEntry:
    """A pod that policy concerns. ``owned``: those of its addresses that are its own; ``facts``: of local pods only."""

    key: Key
    addresses: tuple[str, ...]
    ports: tuple[ContainerPort, ...]
    terminating: bool
    facts: PodFacts | None
    profile: Profile
    owned: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Profile:
    """The pods of one namespace that have the same labels, and the selections that take them."""

    namespace: NamespaceEntry
    identity: tuple[str, ...]
    labels: Mapping[str, str]
    selections: list[SelectionEntry] = field(default_factory=list)
    pods: set[PodEntry] = field(default_factory=set)

    def sets(self) -> set[SetEntry]:
        """The sets that its pods are in, as far as anybody has been told of them."""
        return {each for selection in self.selections for each in selection.sets if each.known}


@dataclass(slots=True, eq=False)
class NamespaceEntry:
    """A namespace with its profiles; ``labels`` are None while there is no such object, whatever pods say."""

    name: str
    labels: Mapping[str, str] | None = None
    profiles: dict[tuple[str, ...], Profile] = field(default_factory=dict)
    scopes: list[Scope] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Scope:
    """The namespaces of one name or of one selector, and the selections that look there."""

    namespaces: set[NamespaceEntry] = field(default_factory=set)
    index: SelectorIndex[SelectionEntry] = field(default_factory=SelectorIndex)


@dataclass(slots=True, eq=False)
class SelectionEntry:
    """A selection in use: the profiles that it takes, and the sets that it feeds."""

    selection: PodSelection
    scope: Scope
    profiles: set[Profile] = field(default_factory=set)
    sets: list[SetEntry] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class SetEntry:
    """A set. ``known``: it stood at the last take; then ``added`` and ``removed`` are the members since."""

    key: SetKey
    selections: tuple[SelectionEntry, ...]
    members: Mapping[Family, AbstractSet[Member]] = field(default_factory=dict)
    uses: int = 0
    known: bool = False
    added: dict[Family, set[Member]] = field(default_factory=dict)
    removed: dict[Family, set[Member]] = field(default_factory=dict)

    def members_of(self, pod: PodEntry) -> Collection[tuple[Family, Member]]:
        """What a pod that is taken brings into the set; two pods never bring the same."""
        port = self.key
        if not isinstance(port, PortSet):
            return [(family_of(address), Member(address)) for address in pod.owned]
        if port.local_only and pod.facts is None:
            return ()
        return {
            (family_of(address), Member(f"{address},{port.protocol.lower()}:{each.port}"))
            for each in pod.ports
            if each.name == port.port_name and each.protocol == port.protocol
            for address in pod.owned
        }

    def pods(self) -> Iterator[PodEntry]:
        """The pods that it takes, each once."""
        profiles = [selection.profiles for selection in self.selections]
        for profile in profiles[0] if len(profiles) == 1 else set().union(*profiles):
            yield from profile.pods

    def note(self, pod: PodEntry, joined: bool) -> None:
        """Remember that a pod has come in or gone out; both in turn is nothing."""
        now, before = (self.added, self.removed) if joined else (self.removed, self.added)
        for family, member in self.members_of(pod):
            undone = before.get(family)
            if undone and member in undone:
                undone.discard(member)
            else:
                now.setdefault(family, set()).add(member)


class MemberView(AbstractSet[Member]):
    """The members of one family in a set, as they are when they are looked at. Counting them takes as long as that."""

    __slots__ = ("_entry", "_family", "_owners")

    def __init__(self, entry: SetEntry, family: Family, owners: Owners[PodEntry]) -> None:
        self._entry, self._family, self._owners = entry, family, owners

    def __iter__(self) -> Iterator[Member]:
        wanted = self._family
        for pod in self._entry.pods():
            for family, member in self._entry.members_of(pod):
                if family is wanted:
                    yield member

    def __contains__(self, member: object) -> bool:
        if not isinstance(member, str):
            return False
        pod = self._owners.owner(member.partition(",")[0])
        if pod is None or not any(pod.profile in selection.profiles for selection in self._entry.selections):
            return False
        return (self._family, Member(member)) in self._entry.members_of(pod)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @classmethod
    def _from_iterable(cls, members: Iterable[Member]) -> AbstractSet[Member]:  # type: ignore[override]
        return frozenset(members)

    def __repr__(self) -> str:
        return f"MemberView({sorted(self)})"


def family_of(address: str) -> Family:
    """Of an address in canonical text."""
    return Family.IPV6 if ":" in address else Family.IPV4


def link(profile: Profile, selection: SelectionEntry) -> None:
    """The selection takes the profile."""
    profile.selections.append(selection)
    selection.profiles.add(profile)


def unlink(profile: Profile, selection: SelectionEntry) -> None:
    """The selection takes the profile no more."""
    profile.selections.remove(selection)
    selection.profiles.discard(profile)
