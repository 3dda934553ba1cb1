"""Who is in which address set, kept up to date by what changes.

Pure. Pods with the same labels in the same namespace are selected by the same selections, so it is those groups
(`Profile`) that selections are matched with, once. A set holds no members: it is a view of the pods that its
selections take (`MemberView`). Of what came and went since the last `Memberships.take` only the difference is kept, and
a set that goes out of use is kept up until then, so that one that comes back has lost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from itertools import chain

from kube_router.ipc.messages import Key
from kube_router.workers.firewall.entries import (
    MemberView,
    NamespaceEntry,
    PodEntry,
    Profile,
    Scope,
    SelectionEntry,
    SetEntry,
    link,
    unlink,
)
from kube_router.workers.firewall.owners import Owners
from kube_router.workers.firewall.podfacts import PodFacts
from kube_router.workers.firewall.rules import BlockSet, Changed, Member, PodSelection, SetKey
from kube_router.workers.firewall.selectors import Selector, matches
from kube_router.workers.model import Family


class Memberships:
    """Pods, namespaces and the sets in use; `take` tells how the sets differ from what it told before."""

    def __init__(self, families: tuple[Family, ...]) -> None:
        self.pods: dict[Key, PodEntry] = {}
        self.members: dict[SetKey, Mapping[Family, AbstractSet[Member]]] = {}
        """Of the sets in use; see `Ruleset.members`."""
        self._families = families
        self._owners: Owners[PodEntry] = Owners()
        self._namespaces: dict[str, NamespaceEntry] = {}
        self._by_name: dict[str, Scope] = {}
        self._by_selector: dict[Selector, Scope] = {}
        self._selections: dict[PodSelection, SelectionEntry] = {}
        self._sets: dict[SetKey, SetEntry] = {}
        self._changed_sets: set[SetEntry] = set()
        self._changed_local: set[Key] = set()

    # Namespaces and pods

    def put_namespace(self, name: str, labels: Mapping[str, str] | None) -> None:
        """The namespace has these labels now; None: it is gone."""
        if labels is None and name not in self._namespaces:
            return
        namespace = self._namespace(name)
        if namespace.labels == labels:
            return
        namespace.labels = labels
        for conditions, scope in self._by_selector.items():
            inside = labels is not None and matches(conditions, labels)
            if inside is not (namespace in scope.namespaces):
                self._place(namespace, scope, inside)
        self._tidy(namespace)

    def put_pod(self, key: Key, facts: PodFacts | None) -> None:
        """The pod is like this now; None: it is gone, or policy does not concern it."""
        pod = self.pods.get(key)
        if facts is None:
            if pod is not None:
                self._remove(pod)
        elif pod is None:
            self._add(key, facts)
        elif (
            pod.addresses != facts.addresses
            or pod.ports != facts.ports
            or pod.terminating is not facts.terminating
            or (pod.facts is not None) is not facts.local
        ):
            self._remove(pod)
            self._add(key, facts)
        else:
            if pod.profile.labels != facts.labels:
                self._relabel(pod, facts.labels)
            if facts.local and pod.facts != facts:
                pod.facts = facts
                self._changed_local.add(key)

    def take_changed_local(self) -> set[Key]:
        """The local pods whose facts or own addresses may differ from those at the last call, and those gone."""
        changed, self._changed_local = self._changed_local, set()
        return changed

    # Sets

    def acquire(self, key: SetKey) -> None:
        """One more clause names the set."""
        entry = self._sets.get(key) or self._new_set(key)
        entry.uses += 1
        if entry.uses == 1:
            self.members[key] = entry.members
            self._changed_sets.add(entry)

    def release(self, key: SetKey) -> None:
        """One clause less names the set."""
        entry = self._sets[key]
        entry.uses -= 1
        if not entry.uses:
            del self.members[key]
            self._changed_sets.add(entry)

    def take(self, changed: Changed) -> None:
        """Write down how the sets differ from those at the last call."""
        for entry in self._changed_sets:
            if not entry.uses:
                if entry.known:
                    changed.gone_sets.add(entry.key)
                self._drop_set(entry)
                continue
            if not entry.known:
                changed.new_sets.add(entry.key)
                entry.known = True
                continue
            added = {family: members for family, members in entry.added.items() if members}
            removed = {family: members for family, members in entry.removed.items() if members}
            if added:
                changed.added[entry.key] = added
            if removed:
                changed.removed[entry.key] = removed
            entry.added, entry.removed = {}, {}
        self._changed_sets = set()

    # How pods come and go

    def _add(self, key: Key, facts: PodFacts) -> None:
        profile = self._profile(self._namespace(facts.namespace), facts.labels)
        own = facts if facts.local else None
        pod = PodEntry(key, facts.addresses, facts.ports, facts.terminating, own, profile)
        self.pods[key] = pod
        profile.pods.add(pod)
        self._settle_owners([pod, *self._owners.claim(pod)])

    def _remove(self, pod: PodEntry) -> None:
        rivals = self._owners.withdraw(pod)
        self._note((pod,), pod.profile.sets(), False)
        if pod.facts is not None:
            self._changed_local.add(pod.key)
        del self.pods[pod.key]
        self._leave(pod)
        if rivals:
            self._settle_owners(rivals)

    def _relabel(self, pod: PodEntry, labels: Mapping[str, str]) -> None:
        before = pod.profile.sets()
        profile = self._profile(pod.profile.namespace, labels)
        self._leave(pod)
        pod.profile = profile
        profile.pods.add(pod)
        after = profile.sets()
        self._note((pod,), before - after, False)
        self._note((pod,), after - before, True)

    def _settle_owners(self, pods: Iterable[PodEntry]) -> None:
        """Give each what is its own now: everything is taken away first, as one may get what was another's."""
        moved = [(pod, self._owners.owned(pod)) for pod in dict.fromkeys(pods)]
        moved = [(pod, owned) for pod, owned in moved if pod.owned != owned]
        for pod, _ in moved:
            if pod.owned:
                self._note((pod,), pod.profile.sets(), False)
        for pod, owned in moved:
            pod.owned = owned
            self._note((pod,), pod.profile.sets(), True)
            if pod.facts is not None:
                self._changed_local.add(pod.key)

    def _note(self, pods: Iterable[PodEntry], sets: set[SetEntry], joined: bool) -> None:
        for entry in sets:
            for pod in pods:
                entry.note(pod, joined)
        self._changed_sets |= sets

    def _profile(self, namespace: NamespaceEntry, labels: Mapping[str, str]) -> Profile:
        identity = tuple(chain.from_iterable(sorted(labels.items())))
        profile = namespace.profiles.get(identity)
        if profile is None:
            profile = namespace.profiles[identity] = Profile(namespace, identity, labels)
            for scope in namespace.scopes:
                for selection in scope.index.matching(labels):
                    link(profile, selection)
        return profile

    def _leave(self, pod: PodEntry) -> None:
        profile = pod.profile
        profile.pods.discard(pod)
        if not profile.pods:
            for selection in profile.selections:
                selection.profiles.discard(profile)
            del profile.namespace.profiles[profile.identity]
            self._tidy(profile.namespace)

    # How namespaces, selections and sets come and go

    def _namespace(self, name: str) -> NamespaceEntry:
        found = self._namespaces.get(name)
        if found is None:
            found = self._namespaces[name] = NamespaceEntry(name)
        return found

    def _tidy(self, namespace: NamespaceEntry) -> None:
        if namespace.labels is None and not namespace.profiles and not namespace.scopes:
            self._namespaces.pop(namespace.name, None)

    def _place(self, namespace: NamespaceEntry, scope: Scope, inside: bool) -> None:
        """Let the selections of a scope look into a namespace, or no more."""
        if inside:
            scope.namespaces.add(namespace)
            namespace.scopes.append(scope)
        else:
            scope.namespaces.discard(namespace)
            namespace.scopes.remove(scope)
        for profile in namespace.profiles.values():
            selections = scope.index.matching(profile.labels)
            if not selections:
                continue
            before = profile.sets()
            for selection in selections:
                (link if inside else unlink)(profile, selection)
            after = profile.sets()
            self._note(profile.pods, before - after, False)
            self._note(profile.pods, after - before, True)

    def _new_set(self, key: SetKey) -> SetEntry:
        if isinstance(key, BlockSet):
            entry = SetEntry(key, (), {key.family: frozenset(map(Member, key.prefixes))})
        else:
            entry = SetEntry(key, tuple(map(self._selection, key.selections)))
            entry.members = {family: MemberView(entry, family, self._owners) for family in self._families}
        for selection in entry.selections:
            selection.sets.append(entry)
        self._sets[key] = entry
        return entry

    def _drop_set(self, entry: SetEntry) -> None:
        del self._sets[entry.key]
        for selection in entry.selections:
            selection.sets.remove(entry)
            if not selection.sets:
                self._drop_selection(selection)

    def _selection(self, wanted: PodSelection) -> SelectionEntry:
        found = self._selections.get(wanted)
        if found is None:
            scope = self._scope(wanted)
            found = self._selections[wanted] = SelectionEntry(wanted, scope)
            scope.index.add(wanted.pods, found)
            for namespace in scope.namespaces:
                for profile in namespace.profiles.values():
                    if matches(wanted.pods, profile.labels):
                        link(profile, found)
        return found

    def _drop_selection(self, entry: SelectionEntry) -> None:
        wanted, scope = entry.selection, entry.scope
        del self._selections[wanted]
        for profile in entry.profiles:
            profile.selections.remove(entry)
        scope.index.remove(wanted.pods, entry)
        if scope.index:
            return
        if wanted.namespace is not None:
            del self._by_name[wanted.namespace]
        else:
            del self._by_selector[wanted.namespaces or ()]
        for namespace in scope.namespaces:
            namespace.scopes.remove(scope)
            self._tidy(namespace)

    def _scope(self, wanted: PodSelection) -> Scope:
        name, conditions = wanted.namespace, wanted.namespaces or ()
        found = self._by_selector.get(conditions) if name is None else self._by_name.get(name)
        if found is not None:
            return found
        if name is None:
            scope = self._by_selector[conditions] = Scope()
            for each in self._namespaces.values():
                if each.labels is not None and matches(conditions, each.labels):
                    scope.namespaces.add(each)
        else:
            scope = self._by_name[name] = Scope({self._namespace(name)})
        for namespace in scope.namespaces:
            namespace.scopes.append(scope)
        return scope
