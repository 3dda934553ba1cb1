"""Rule sets for backend tests: computed at once from a whole cluster, and what differs between two of them.

Naive on purpose, and no code of the engine's: what a backend is given here is what the types promise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from support.policyworld import Owners

from kube_router.ipc.messages import Key
from kube_router.workers.firewall.podfacts import PodFacts, pod_facts
from kube_router.workers.firewall.policies import compile_policy
from kube_router.workers.firewall.rules import (
    BlockSet,
    Changed,
    Direction,
    LocalPod,
    Member,
    PolicyRules,
    PortSet,
    Ruleset,
    SetKey,
)
from kube_router.workers.firewall.verdict import ClusterState
from kube_router.workers.model import Family

T = TypeVar("T")


def ruleset_of(state: ClusterState, compiled: Iterable[PolicyRules] | None = None) -> Ruleset:
    """What stands for a cluster; ``compiled``: policies to use instead of those of the state."""
    families, owners = state.frame.families, Owners(state)
    rules = (
        [compile_policy(policy, families) for policy in state.policies.values()] if compiled is None else [*compiled]
    )
    facts = [pod_facts(pod, state.node_name, families) for pod in state.pods.values()]
    owned = _owned(filter(None, facts), owners)
    pods = {
        found.key: LocalPod(found, addresses, *(_policies(found, rules, owners, direction) for direction in Direction))
        for found, addresses in owned
        if found.local and addresses
    }
    active = {key for pod in pods.values() for keys in (pod.ingress, pod.egress) for key in keys or ()}
    policies = {item.key: item for item in rules if item.key in active}
    members = {
        key: _members(key, owned, owners, families)
        for item in policies.values()
        for direction in Direction
        for clause in item.clauses(direction) or ()
        for key in clause.sets
    }
    return Ruleset(policies, pods, members)


def _owned(facts: Iterable[PodFacts], owners: Owners) -> list[tuple[PodFacts, tuple[str, ...]]]:
    """Pods with those of their addresses that no other pod has a better claim to."""

    def of(found: PodFacts, address: str) -> bool:
        owner = owners.of(address)
        return owner is not None and owner.key == found.key

    return [(found, tuple(address for address in found.addresses if of(found, address))) for found in facts]


def _policies(
    facts: PodFacts, rules: Iterable[PolicyRules], owners: Owners, direction: Direction
) -> tuple[Key, ...] | None:
    keys = sorted(
        item.key for item in rules if item.clauses(direction) is not None and owners.takes((item.target,), facts)
    )
    return tuple(keys) or None


def _members(
    key: SetKey, owned: list[tuple[PodFacts, tuple[str, ...]]], owners: Owners, families: tuple[Family, ...]
) -> dict[Family, set[Member]]:
    if isinstance(key, BlockSet):
        return {key.family: {Member(prefix) for prefix in key.prefixes}}
    found: dict[Family, set[Member]] = {family: set() for family in families}
    for facts, addresses in owned:
        if not owners.takes(key.selections, facts) or (isinstance(key, PortSet) and key.local_only and not facts.local):
            continue
        for address in addresses:
            family = Family.IPV6 if ":" in address else Family.IPV4
            if not isinstance(key, PortSet):
                found[family].add(Member(address))
                continue
            for port in facts.ports:
                if (port.name, port.protocol) == (key.port_name, key.protocol):
                    found[family].add(Member(f"{address},{port.protocol.lower()}:{port.port}"))
    return found


def changed_between(old: Ruleset, new: Ruleset) -> Changed:
    """What an engine would say of the way from one to the other."""
    changed = Changed(
        policies=_differing(old.policies, new.policies),
        pods=_differing(old.pods, new.pods),
        new_sets=new.members.keys() - old.members.keys(),
        gone_sets=old.members.keys() - new.members.keys(),
    )
    for key in old.members.keys() & new.members.keys():
        for family, after in new.members[key].items():
            before = old.members[key].get(family, set())
            if after - before:
                changed.added.setdefault(key, {})[family] = set(after - before)
            if before - after:
                changed.removed.setdefault(key, {})[family] = set(before - after)
    return changed


def _differing(old: Mapping[T, object], new: Mapping[T, object]) -> set[T]:
    return {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
