"""The engine: API objects in, the `Ruleset` of this node out, kept up to date by what changes.

Pure. `Engine.update` always brings the engine to the cluster that it is given; changes only tell where to look. So the
same changes twice, changes that undo each other and changes of objects that were never seen are all the same to it, and
the end state depends on the cluster alone, not on the way there. What an event costs depends on what it touches.

A policy is in force when it isolates a pod of this node that has an address of its own; only of such policies the
compiled form and the sets are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from kube_router.ipc.messages import Key, Kind, NetworkPolicy
from kube_router.workers.firewall.index import SelectorIndex
from kube_router.workers.firewall.memberships import Memberships
from kube_router.workers.firewall.podfacts import pod_facts
from kube_router.workers.firewall.policies import compile_policy
from kube_router.workers.firewall.rules import Changed, Direction, LocalPod, PodSelection, PolicyRules, Ruleset, SetKey
from kube_router.workers.firewall.selectors import matches
from kube_router.workers.model import Family

if TYPE_CHECKING:
    from kube_router.ipc.replica import Changes, Cluster


@dataclass(slots=True)
class _Policy:
    """A policy that exists: whom it is about, and in which directions. ``rules``: only while it may be in force."""

    policy: NetworkPolicy
    target: PodSelection
    covers: tuple[Direction, ...]
    rules: PolicyRules | None


class Engine:
    """What network policy comes to on one node. `ruleset` is live: the next `update` changes it."""

    def __init__(self, node_name: str, families: Iterable[Family]) -> None:
        """``node_name``: pods scheduled there are local. Addresses and blocks of other families do not exist."""
        self._node_name = node_name
        self._families = tuple(families)
        self._memberships = Memberships(self._families)
        self._policies: dict[Key, _Policy] = {}
        self._problems: dict[Key, tuple[str, ...]] = {}
        self._targets: dict[str, SelectorIndex[Key]] = {}
        """By namespace: its policies, by the pods that they are about."""
        self._isolating: dict[Key, int] = {}
        """By policy: how many local pods it isolates, if any."""
        self._local: dict[str, set[Key]] = {}
        """By namespace: the keys of `Ruleset.pods`."""
        self._namespaces: set[str] = set()
        self._compared = False
        self._everything = True
        self._unsettled_pods: set[Key] = set()
        self._unsettled_policies: set[Key] = set()
        self._policies_before: dict[Key, PolicyRules | None] = {}
        self._pods_before: dict[Key, LocalPod | None] = {}
        """By key: what stood at the last `take_changed`, for keys that may have changed since."""
        self._active: dict[Key, PolicyRules] = {}
        self._pods: dict[Key, LocalPod] = {}
        self.ruleset = Ruleset(self._active, self._pods, self._memberships.members)

    @property
    def problems(self) -> Mapping[Key, tuple[str, ...]]:
        """By policy, in force or not: a line for each thing in it that could not be understood."""
        return MappingProxyType(self._problems)

    def update(self, cluster: Cluster, changes: Changes | None) -> None:
        """Bring the ruleset to ``cluster``. ``changes``: where it may differ from the last one; None: anywhere.

        The first call looks everywhere. Of the changes only the keys count.
        """
        if changes is None or not self._compared:
            self._compare(cluster)
        else:
            self._apply(
                cluster,
                changes.get("namespaces", ()),
                changes.get("networkpolicies", ()),
                changes.get("pods", ()),
            )

    def take_changed(self) -> Changed:
        """How the ruleset differs from that at the last call; the first call says ``everything`` as well."""
        changed = Changed(everything=self._everything)
        changed.policies = {k for k, before in self._policies_before.items() if self._active.get(k) != before}
        changed.pods = {key for key, before in self._pods_before.items() if self._pods.get(key) != before}
        self._memberships.take(changed)
        self._everything, self._policies_before, self._pods_before = False, {}, {}
        return changed

    def _compare(self, cluster: Cluster) -> None:
        known: dict[Kind, Iterable[Key]] = {
            "namespaces": self._namespaces,
            "networkpolicies": self._policies,
            "pods": self._memberships.pods,
        }
        keys = {kind: dict.fromkeys([*cluster.objects(kind), *mine]) for kind, mine in known.items()}
        self._apply(cluster, keys["namespaces"], keys["networkpolicies"], keys["pods"])
        self._compared = True

    def _apply(self, cluster: Cluster, namespaces: Iterable[Key], policies: Iterable[Key], pods: Iterable[Key]) -> None:
        """Local pods come first: then it is known which policies matter, and remote ones are sorted in only once."""
        for name in namespaces:
            self._on_namespace(cluster, name)
        remote = []
        for key in pods:
            pod = cluster.pods.get(key)
            if pod is not None and pod.node_name == self._node_name:
                self._memberships.put_pod(key, pod_facts(pod, self._node_name, self._families))
            else:
                remote.append(key)
        self._settle()
        for key in policies:
            self._on_policy(key, cluster.networkpolicies.get(key))
        self._settle()
        for key in remote:
            pod = cluster.pods.get(key)
            facts = None if pod is None else pod_facts(pod, self._node_name, self._families)
            self._memberships.put_pod(key, facts)
        self._settle()

    def _on_namespace(self, cluster: Cluster, name: str) -> None:
        namespace = cluster.namespaces.get(name)
        if namespace is None:
            self._namespaces.discard(name)
        else:
            self._namespaces.add(name)
        self._memberships.put_namespace(name, None if namespace is None else namespace.labels)

    def _on_policy(self, key: Key, policy: NetworkPolicy | None) -> None:
        old = self._policies.get(key)
        if (old and old.policy) == policy:
            return
        if old is not None:
            self._retarget(key, old.target, None)
            self._problems.pop(key, None)
            del self._policies[key]
        if policy is not None:
            rules = compile_policy(policy, self._families)
            if rules.problems:
                self._problems[key] = rules.problems
            covers = tuple(each for each in Direction if rules.clauses(each) is not None)
            touched = self._retarget(key, None, rules.target)
            self._policies[key] = _Policy(policy, rules.target, covers, rules if touched else None)
        self._unsettled_policies.add(key)

    def _retarget(self, key: Key, old: PodSelection | None, new: PodSelection | None) -> bool:
        """Move a policy to other pods; whether it is about a local one, before or after."""
        touched = False
        for selection in (old, new):
            if selection is None:
                continue
            namespace = selection.namespace or ""
            index = self._targets.setdefault(namespace, SelectorIndex())
            if selection is new:
                index.add(selection.pods, key)
            else:
                index.remove(selection.pods, key)
                if not index:
                    del self._targets[namespace]
            for pod in self._local.get(namespace, ()):
                if matches(selection.pods, self._pods[pod].facts.labels):
                    self._unsettled_pods.add(pod)
                    touched = True
        return touched

    def _settle(self) -> None:
        """Bring local pods, then policies, to what the rest has come to."""
        pods, self._unsettled_pods = self._unsettled_pods | self._memberships.take_changed_local(), set()
        for key in pods:
            self._settle_pod(key)
        policies, self._unsettled_policies = self._unsettled_policies, set()
        for key in policies:
            self._settle_policy(key)

    def _settle_pod(self, key: Key) -> None:
        old, new = self._pods.get(key), self._local_pod(key)
        if old == new:
            return
        self._pods_before.setdefault(key, old)
        if old is not None:
            del self._pods[key]
            self._forget_local(key, old.facts.namespace)
            self._count(old, -1)
        if new is not None:
            self._pods[key] = new
            self._local.setdefault(new.facts.namespace, set()).add(key)
            self._count(new, 1)

    def _forget_local(self, key: Key, namespace: str) -> None:
        self._local[namespace].discard(key)
        if not self._local[namespace]:
            del self._local[namespace]

    def _local_pod(self, key: Key) -> LocalPod | None:
        pod = self._memberships.pods.get(key)
        if pod is None or pod.facts is None or not pod.owned:
            return None
        index = self._targets.get(pod.facts.namespace)
        matching = sorted(index.matching(pod.facts.labels)) if index else []
        isolating = {
            direction: tuple(policy for policy in matching if direction in self._policies[policy].covers) or None
            for direction in Direction
        }
        return LocalPod(pod.facts, pod.owned, isolating[Direction.INGRESS], isolating[Direction.EGRESS])

    def _count(self, pod: LocalPod, change: int) -> None:
        for key in {*(pod.ingress or ()), *(pod.egress or ())}:
            count = self._isolating[key] = self._isolating.get(key, 0) + change
            if not count:
                del self._isolating[key]
            self._unsettled_policies.add(key)

    def _settle_policy(self, key: Key) -> None:
        policy = self._policies.get(key)
        old, new = self._active.get(key), None
        if policy is not None:
            if key not in self._isolating:
                policy.rules = None
            elif policy.rules is None:
                policy.rules = compile_policy(policy.policy, self._families)
            new = policy.rules
        if old == new:
            if policy is not None:
                policy.rules = old  # one copy is enough
            return
        self._policies_before.setdefault(key, old)
        if new is None:
            del self._active[key]
        else:
            self._active[key] = new
        for each in _sets(new):
            self._memberships.acquire(each)
        for each in _sets(old):
            self._memberships.release(each)


def _sets(rules: PolicyRules | None) -> Iterable[SetKey]:
    """The sets that a policy names, each once."""
    if rules is None:
        return ()
    return dict.fromkeys(each for clause in (*(rules.ingress or ()), *(rules.egress or ())) for each in clause.sets)
