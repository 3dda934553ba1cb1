"""Law 3 for the firewall's engine: whatever happened in whatever order and portions, the ruleset is that of the end.

A small world that is full of trouble (shared addresses, pods that end, namespaces that are not known, policies without
a pod) is changed at random. After each step the engine must hold what plain loops over the objects give, what a fresh
engine gives, and what one gets who applies `Changed` to what he had; and `Changed` names nothing that did not change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from kube_router.ipc.messages import (
    ContainerPort,
    IpBlock,
    Key,
    Kind,
    LabelExpression,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    Pod,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Projection,
    SourceState,
)
from kube_router.ipc.replica import Changes, Cluster
from kube_router.workers.firewall.engine import Engine
from kube_router.workers.firewall.owners import Owners
from kube_router.workers.firewall.podfacts import PodFacts, pod_facts
from kube_router.workers.firewall.policies import compile_policy
from kube_router.workers.firewall.rules import (
    BlockSet,
    Changed,
    Direction,
    LocalPod,
    PodSelection,
    PodSet,
    Ruleset,
    SetKey,
)
from kube_router.workers.model import Family

NODE = "here"
KINDS: tuple[Kind, ...] = ("pods", "namespaces", "networkpolicies")
BOTH = (Family.IPV4, Family.IPV6)
SPACES = st.sampled_from(["x", "y", "z"])
LABELS = st.dictionaries(st.sampled_from(["app", "tier"]), st.sampled_from(["a", "b"]), max_size=2)
PROTOCOLS = st.sampled_from(["TCP", "TCP", "UDP"])
PORT_NAMES = st.sampled_from(["http", "http", "dns"])
ADDRESSES = st.sampled_from(
    [f"10.0.0.{number}" for number in range(1, 6)] + [f"fd00::{number}" for number in range(1, 6)] + ["FD00:0::5", "no"]
)


def tuples(of: st.SearchStrategy[Any], most: int, least: int = 0) -> st.SearchStrategy[Any]:
    return st.lists(of, min_size=least, max_size=most).map(tuple)


@st.composite
def expressions(draw: st.DrawFn) -> LabelExpression:
    operator = draw(st.sampled_from(["In", "NotIn", "Exists", "DoesNotExist"]))
    values = draw(tuples(st.sampled_from(["a", "b"]), 2, 1)) if operator.endswith("In") else ()
    return LabelExpression(key=draw(st.sampled_from(["app", "tier"])), operator=operator, values=values)


everybody = st.just(LabelSelector())
selectors = everybody | st.builds(
    LabelSelector,
    match_labels=st.dictionaries(st.just("app"), st.sampled_from(["a", "b"]), max_size=1),
    match_expressions=tuples(expressions(), 1),
)
peers = st.one_of(
    st.builds(PolicyPeer, pod_selector=selectors),
    st.builds(PolicyPeer, namespace_selector=selectors),
    st.builds(PolicyPeer, pod_selector=selectors, namespace_selector=selectors),
    st.builds(PolicyPeer, ip_block=st.builds(IpBlock, cidr=st.sampled_from(["10.0.0.0/8", "fd00::/16", "bad"]))),
)
ports = st.one_of(
    st.builds(PolicyPort, protocol=PROTOCOLS, port=PORT_NAMES),
    st.builds(PolicyPort, protocol=PROTOCOLS, port=st.sampled_from([80, None])),
)
rules = st.builds(PolicyRule, peers=tuples(peers, 3, 1) | st.none(), ports=tuples(ports, 2))
policies = st.builds(
    NetworkPolicy,
    namespace=SPACES,
    name=st.sampled_from(["m", "n"]),
    pod_selector=everybody | selectors,
    policy_types=st.sampled_from([("Ingress", "Egress"), ("Ingress",), ("Egress",), None, ("Ingress", "Nonsense")]),
    ingress=tuples(rules, 2, 1) | st.none(),
    egress=tuples(rules, 2, 1) | st.none(),
)
pods = st.builds(
    Pod,
    namespace=SPACES,
    name=st.sampled_from(["p", "q", "r"]),
    uid=st.sampled_from(["1", "2"]),
    labels=LABELS,
    node_name=st.sampled_from([NODE, "there"]),
    host_network=st.sampled_from([False] * 9 + [True]),
    phase=st.sampled_from([*["Running"] * 6, "Pending", "Succeeded", "Failed"]),
    ips=tuples(ADDRESSES, 3, 1),
    ports=tuples(st.builds(ContainerPort, PORT_NAMES, st.sampled_from([80, 81]), PROTOCOLS), 3),
    deletion_seconds=st.sampled_from([None, None, 30]),
)
spaces = st.builds(Namespace, name=SPACES, labels=LABELS)
objects = {"pods": pods, "namespaces": spaces, "networkpolicies": policies}
puts = [st.tuples(st.just(kind), each) for kind, each in objects.items()]
gone = st.tuples(st.just("gone"), st.integers(0, 99))
TOUCHES = {
    "relabel": ["labels"],
    "renumber": ["ips"],
    "reopen": ["ports"],
    "end": ["phase", "deletion_seconds"],
    "replace": ["uid", "node_name"],
}
touched = st.tuples(st.sampled_from(sorted(TOUCHES)), st.tuples(st.integers(0, 99), pods))
events = st.lists(st.one_of(*puts, touched, touched, touched, gone), min_size=1, max_size=5)
beginnings = st.tuples(tuples(pods, 10, 5), tuples(spaces, 3, 1), tuples(policies, 5, 2))
turns = st.tuples(
    events, st.sampled_from(["changes", "changes", "twice", "late", "compare"]), st.sampled_from([0, 1, 1])
)
"""Events that come together, how the engine learns of them, and whether somebody takes what has changed."""
ways = st.lists(turns, min_size=2, max_size=8)
Way = list[tuple[list[tuple[str, Any]], str, int]]


@dataclass
class World:
    """The objects as they are, and what nobody has been told of yet: as the worker loop hands it on."""

    tables: dict[Kind, dict[Key, Projection]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    pending: Changes = field(default_factory=dict)
    delivered: Changes = field(default_factory=dict)

    def put(self, kind: Kind, key: Key, new: Projection | None) -> None:
        table = self.tables[kind]
        old = table.pop(key, None)
        if new is not None:
            table[key] = new
        first = self.pending.setdefault(kind, {}).get(key, (old, None))[0]
        self.pending[kind][key] = (first, new)

    def drop_any(self, number: int) -> None:
        present = [(kind, key) for kind in KINDS for key in sorted(self.tables[kind])]
        if present:
            kind, key = present[number % len(present)]
            self.put(kind, key, None)

    def touch_any(self, how: str, number: int, like: Pod) -> None:
        """Change a pod in one respect, to what ``like`` has."""
        present = sorted(self.tables["pods"])
        if present:
            pod = self.tables["pods"][present[number % len(present)]]
            changed = {name: getattr(like, name) for name in TOUCHES[how]}
            self.put("pods", pod.key, msgspec.structs.replace(pod, **changed))

    def do(self, what: str, value: Any) -> None:
        """One event of the cluster."""
        if what == "gone":
            self.drop_any(value)
        elif what in KINDS:
            self.put(what, value.key, value)
        else:
            self.touch_any(what, *value)

    @classmethod
    def begun(cls, beginning: tuple[tuple[Projection, ...], ...]) -> World:
        world = cls()
        for kind, items in zip(KINDS, beginning, strict=True):
            for item in items:
                world.put(kind, item.key, item)
        return world

    @property
    def cluster(self) -> Cluster:
        return Cluster(SourceState(source="test", in_sync=True), {kind: dict(self.tables[kind]) for kind in KINDS})


# What the specification says, in plain loops


def takes(world: World, selection: PodSelection, pod: PodFacts) -> bool:
    if not all(condition.matches(pod.labels) for condition in selection.pods):
        return False
    if selection.namespaces is None:
        return pod.namespace == selection.namespace
    space = world.cluster.namespaces.get(pod.namespace)
    return space is not None and all(condition.matches(space.labels) for condition in selection.namespaces)


def owned_addresses(world: World) -> list[tuple[PodFacts, tuple[str, ...]]]:
    every = [facts for pod in world.tables["pods"].values() if (facts := pod_facts(pod, NODE, BOTH))]
    owners = {}
    for facts in sorted(every, key=lambda facts: (facts.terminating, facts.key)):
        for address in facts.addresses:
            owners.setdefault(address, facts)
    return [(facts, tuple(each for each in facts.addresses if owners[each] is facts)) for facts in every]


def members(world: World, key: SetKey) -> dict[Family, set[str]]:
    if isinstance(key, BlockSet):
        return {key.family: set(key.prefixes)}
    found: dict[Family, set[str]] = {Family.IPV4: set(), Family.IPV6: set()}
    for facts, addresses in owned_addresses(world):
        if not any(takes(world, selection, facts) for selection in key.selections):
            continue
        for address in addresses:
            family = Family.IPV6 if ":" in address else Family.IPV4
            if isinstance(key, PodSet):
                found[family].add(address)
            elif facts.local or not key.local_only:
                for port in facts.ports:
                    if (port.name, port.protocol) == (key.port_name, key.protocol):
                        found[family].add(f"{address},{port.protocol.lower()}:{port.port}")
    return found


def naive(world: World) -> Ruleset:
    compiled = {key: compile_policy(each, BOTH) for key, each in world.tables["networkpolicies"].items()}
    local = {}
    for facts, addresses in owned_addresses(world):
        if not facts.local or not addresses:
            continue
        isolating: dict[Direction, list[Key]] = {Direction.INGRESS: [], Direction.EGRESS: []}
        for key in sorted(compiled):
            for direction in Direction:
                if takes(world, compiled[key].target, facts) and compiled[key].clauses(direction) is not None:
                    isolating[direction].append(key)
        sides = [tuple(isolating[each]) or None for each in (Direction.INGRESS, Direction.EGRESS)]
        local[facts.key] = LocalPod(facts, addresses, *sides)
    named = {key for pod in local.values() for keys in (pod.ingress, pod.egress) for key in keys or ()}
    in_force = {key: compiled[key] for key in named}
    sets = {
        each
        for policy in in_force.values()
        for direction in Direction
        for clause in policy.clauses(direction) or ()
        for each in clause.sets
    }
    return Ruleset(in_force, local, {key: members(world, key) for key in sets})


# Who only ever sees `Changed`


def copy(ruleset: Ruleset) -> Ruleset:
    every = {key: {family: set(all_) for family, all_ in each.items()} for key, each in ruleset.members.items()}
    return Ruleset(dict(ruleset.policies), dict(ruleset.pods), every)


def difference(old: Ruleset, new: Ruleset) -> Changed:
    """The one right `Changed`."""
    changed = Changed()
    changed.policies = {k for k in {*old.policies, *new.policies} if old.policies.get(k) != new.policies.get(k)}
    changed.pods = {key for key in {*old.pods, *new.pods} if old.pods.get(key) != new.pods.get(key)}
    changed.new_sets = new.members.keys() - old.members.keys()
    changed.gone_sets = old.members.keys() - new.members.keys()
    for key in old.members.keys() & new.members.keys():
        for family, now in new.members[key].items():
            before = old.members[key][family]
            if now - before:
                changed.added.setdefault(key, {})[family] = set(now - before)
            if before - now:
                changed.removed.setdefault(key, {})[family] = set(before - now)
    return changed


@settings(max_examples=200)
@given(beginnings, ways)
def test_any_way_leads_to_the_same_end(beginning: Any, way: Way) -> None:
    world, engine, seen = World.begun(beginning), Engine(NODE, BOTH), Ruleset()
    assert engine.take_changed() == Changed(everything=True)
    for happens, told, look in [([], "changes", 1), *way, ([], "changes", 1)]:
        for event in happens:
            world.do(*event)
        if told == "late":  # a call with old changes, after a failure, to whom the new state shows already
            engine.update(world.cluster, world.delivered)
        for _ in range(2 if told == "twice" else 1):
            engine.update(world.cluster, None if told == "compare" else world.pending)
        world.delivered, world.pending = world.pending, {}
        now = copy(engine.ruleset)
        assert now == naive(world)
        if look:
            assert engine.take_changed() == difference(seen, now)
            seen = now
    fresh = Engine(NODE, BOTH)
    fresh.update(world.cluster, None)
    assert engine.ruleset == fresh.ruleset
    assert engine.problems == fresh.problems


@given(beginnings, ways)
def test_nothing_is_left_of_a_world_that_is_gone(beginning: Any, way: Way) -> None:
    world, engine = World.begun(beginning), Engine(NODE, BOTH)
    for happens, _, look in [([], "", 0), *way]:
        for event in happens:
            world.do(*event)
        engine.update(world.cluster, None)
        if look:
            engine.take_changed()
    world.tables = {kind: {} for kind in KINDS}
    engine.update(world.cluster, None)
    engine.take_changed()
    assert left_in(engine) == {}


def left_in(engine: Engine) -> dict[str, Any]:
    """Its tables, and those of what it is made of, as far as they hold anything."""
    memberships, owners = engine._memberships, engine._memberships._owners
    tables = {f"engine.{name}": value for name, value in vars(engine).items()}
    tables |= {f"memberships.{name}": value for name, value in vars(memberships).items()}
    tables |= {f"owners.{name}": getattr(owners, name) for name in Owners.__slots__}
    return {name: value for name, value in tables.items() if isinstance(value, dict | set) and value}


@given(beginnings, st.sampled_from(BOTH))
def test_a_family_alone_is_half_of_both(beginning: Any, family: Family) -> None:
    """Law 7: both families come from one code path, and neither looks at the other."""
    world = World.begun(beginning)
    both, one = Engine(NODE, BOTH), Engine(NODE, (family,))
    for engine in (both, one):
        engine.update(world.cluster, None)
    pods = {key: pod.addresses_of(family) for key, pod in both.ruleset.pods.items() if pod.addresses_of(family)}
    assert {key: pod.addresses for key, pod in one.ruleset.pods.items()} == pods
    for key, each in one.ruleset.members.items():
        assert each == {family: both.ruleset.members[key][family]}
