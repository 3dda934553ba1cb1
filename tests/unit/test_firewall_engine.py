"""What the engine makes of one event after another: which sets and policies stand, and what it says has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kube_router.ipc.messages import (
    ContainerPort,
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
from kube_router.workers.firewall import engine as engine_module
from kube_router.workers.firewall.engine import Engine
from kube_router.workers.firewall.index import SelectorIndex
from kube_router.workers.firewall.owners import Owners
from kube_router.workers.firewall.podfacts import pod_facts
from kube_router.workers.firewall.policies import compile_policy
from kube_router.workers.firewall.rules import (
    BlockSet,
    Changed,
    Direction,
    Member,
    PodSelection,
    PodSet,
    PortSet,
    SetKey,
)
from kube_router.workers.firewall.selectors import Requirement, Selector, matches
from kube_router.workers.model import Family

NODE = "here"
V4, V6 = BOTH = (Family.IPV4, Family.IPV6)
KINDS: dict[type[Projection], Kind] = {Pod: "pods", Namespace: "namespaces", NetworkPolicy: "networkpolicies"}


class World:
    """An engine, and a cluster that tells it of each change at once."""

    def __init__(self, *objects: Projection, families: tuple[Family, ...] = BOTH) -> None:
        self.tables: dict[Kind, dict[Key, Projection]] = {kind: {} for kind in KINDS.values()}
        self.engine = Engine(NODE, families)
        for item in objects:
            self.tables[KINDS[type(item)]][item.key] = item
        self.engine.update(self.cluster, None)
        self.engine.take_changed()

    @property
    def cluster(self) -> Cluster:
        return Cluster(
            SourceState(source="test", in_sync=True), {kind: dict(all_) for kind, all_ in self.tables.items()}
        )

    def put(self, *objects: Projection) -> Changed:
        changes: Changes = {}
        for item in objects:
            kind = KINDS[type(item)]
            changes.setdefault(kind, {})[item.key] = (self.tables[kind].get(item.key), item)
            self.tables[kind][item.key] = item
        self.engine.update(self.cluster, changes)
        return self.engine.take_changed()

    def drop(self, *objects: Projection) -> Changed:
        changes: Changes = {}
        for item in objects:
            kind = KINDS[type(item)]
            changes.setdefault(kind, {})[item.key] = (self.tables[kind].pop(item.key), None)
        self.engine.update(self.cluster, changes)
        return self.engine.take_changed()

    def members(self, key: SetKey) -> dict[Family, set[str]]:
        return {family: set(each) for family, each in self.engine.ruleset.members[key].items()}

    @property
    def sets(self) -> set[SetKey]:
        return set(self.engine.ruleset.members)


def pod(name: str, number: int, node: str = "there", namespace: str = "shop", **changed: Any) -> Pod:
    given: dict[str, Any] = {
        "labels": {"app": name.rstrip("0123456789-")},
        "ips": (f"10.0.0.{number}", f"fd00::{number:x}"),
        "phase": "Running",
        **changed,
    }
    return Pod(name=name, namespace=namespace, node_name=node, **given)


def selector(**labels: str) -> LabelSelector:
    return LabelSelector(match_labels=labels)


def policy(
    name: str, target: LabelSelector, *rules: PolicyRule, namespace: str = "shop", **changed: Any
) -> NetworkPolicy:
    given = {"ingress": rules, "policy_types": ("Ingress",), **changed}
    return NetworkPolicy(name=name, namespace=namespace, pod_selector=target, **given)


def rule(*peers: PolicyPeer, ports: tuple[PolicyPort, ...] = ()) -> PolicyRule:
    return PolicyRule(peers=peers, ports=ports)


def replace(item: Any, **changed: Any) -> Any:
    return msgspec.structs.replace(item, **changed)


def both(number: int) -> dict[Family, set[Member]]:
    """The members of a pod with this number in a set of pods."""
    return {V4: {Member(f"10.0.0.{number}")}, V6: {Member(f"fd00::{number:x}")}}


EMPTY: dict[Family, set[str]] = {V4: set(), V6: set()}
WEB = PolicyPeer(pod_selector=selector(app="web"))
DB, WEB1, WEB2 = pod("db-1", 1, NODE), pod("web-1", 2), pod("web-2", 3)
SHOP, OPS = Namespace(name="shop", labels={"team": "shop"}), Namespace(name="ops", labels={"team": "ops"})
ALLOW = policy("allow", selector(app="db"), rule(WEB))
WEB_PODS = PodSelection((Requirement("app", "In", ("web",)),), namespace="shop")
WEB_SET = PodSet(Direction.INGRESS, (WEB_PODS,))


# What stands


def test_policies_without_a_pod_of_this_node_are_not_in_force() -> None:
    other = policy("other", selector(app="web"), rule(PolicyPeer(pod_selector=selector(app="db"))))
    world = World(DB, WEB1, WEB2, ALLOW, other)
    assert dict(world.engine.ruleset.policies) == {"shop/allow": compile_policy(ALLOW, BOTH)}
    assert world.sets == {WEB_SET}
    assert world.members(WEB_SET) == {V4: {"10.0.0.2", "10.0.0.3"}, V6: {"fd00::2", "fd00::3"}}


def test_local_pods_know_who_isolates_them_in_which_direction() -> None:
    out = policy("out", selector(), policy_types=("Egress",))
    world = World(DB, WEB1, replace(WEB2, node_name=NODE), ALLOW, out, policy("elsewhere", selector(), namespace="ops"))
    local = world.engine.ruleset.pods
    assert {key: (each.ingress, each.egress) for key, each in local.items()} == {
        "shop/db-1": (("shop/allow",), ("shop/out",)),
        "shop/web-2": (None, ("shop/out",)),
    }
    assert local["shop/db-1"].addresses == DB.ips
    assert local["shop/db-1"].facts == pod_facts(DB, NODE, BOTH)


def test_a_policy_comes_into_force_with_its_first_pod_and_goes_with_its_last() -> None:
    world = World(WEB1, ALLOW)
    assert world.sets == set()
    changed = world.put(DB)
    assert changed == Changed(policies={"shop/allow"}, pods={"shop/db-1"}, new_sets={WEB_SET})
    assert world.members(WEB_SET) == both(2)
    second = replace(DB, name="db-2", ips=("10.0.0.9",))
    assert world.put(second) == Changed(pods={"shop/db-2"})
    assert world.drop(DB) == Changed(pods={"shop/db-1"})
    assert world.put(replace(second, phase="Succeeded")) == Changed(
        policies={"shop/allow"}, pods={"shop/db-2"}, gone_sets={WEB_SET}
    )
    assert (dict(world.engine.ruleset.policies), world.sets) == ({}, set())


def test_equal_rules_of_two_policies_share_a_set_until_the_last_is_gone() -> None:
    twin = policy("twin", selector(), rule(WEB))
    world = World(DB, WEB1, ALLOW)
    assert world.put(twin) == Changed(policies={"shop/twin"}, pods={"shop/db-1"})
    assert world.drop(ALLOW).gone_sets == set()
    assert world.drop(twin).gone_sets == {WEB_SET}


def test_a_set_that_is_empty_stands_in_every_family() -> None:
    world = World(DB, ALLOW)
    assert world.members(WEB_SET) == EMPTY


def test_a_set_of_blocks_has_the_members_of_its_name_in_its_family() -> None:
    blocks = BlockSet(Direction.INGRESS, V4, ("192.0.2.0/24",))
    peer = msgspec.json.decode(b'{"ip_block": {"cidr": "192.0.2.0/24"}}', type=PolicyPeer)
    world = World(DB, policy("blocks", selector(), rule(peer)))
    assert world.members(blocks) == {V4: {"192.0.2.0/24"}}


def test_addresses_of_a_disabled_family_do_not_exist() -> None:
    world = World(DB, WEB1, replace(WEB2, ips=("fd00::7",)), ALLOW, families=(V4,))
    assert world.members(WEB_SET) == {V4: {"10.0.0.2"}}
    assert world.engine.ruleset.pods["shop/db-1"].addresses == ("10.0.0.1",)


# Ports by name


HTTP = PolicyPort(port="http")
HTTP_OF_DB = PortSet(
    Direction.INGRESS, (PodSelection((Requirement("app", "In", ("db",)),), namespace="shop"),), "http", "TCP", True
)


def test_a_named_port_is_looked_up_at_each_pod_of_this_node() -> None:
    """S2, S3: names that nobody has allow nothing, and each name holds its own pods."""
    named = policy("named", selector(app="db"), rule(WEB, ports=(HTTP,)))
    ports = (ContainerPort("http", 80), ContainerPort("http", 81), ContainerPort("http", 80), ContainerPort("dns", 53))
    remote = replace(DB, name="db-9", node_name="there", ips=("10.0.0.9",), ports=ports)
    world = World(DB, WEB1, remote, named)
    assert world.members(HTTP_OF_DB) == EMPTY
    changed = world.put(replace(DB, ports=ports))
    assert changed.added == {
        HTTP_OF_DB: {
            V4: {"10.0.0.1,tcp:80", "10.0.0.1,tcp:81"},
            V6: {"fd00::1,tcp:80", "fd00::1,tcp:81"},
        }
    }
    assert world.members(HTTP_OF_DB) == changed.added[HTTP_OF_DB]
    udp = (ContainerPort("http", 80, "UDP"),)
    assert world.put(replace(DB, ports=udp)).removed == changed.added
    assert world.members(HTTP_OF_DB) == EMPTY


def test_a_set_answers_for_single_members_and_as_a_set() -> None:
    world = World(DB, WEB1, WEB2, ALLOW, policy("named", selector(app="db"), rule(ports=(HTTP,))))
    world.put(replace(DB, ports=(ContainerPort("http", 80),)))
    pods, ports = world.engine.ruleset.members[WEB_SET][V4], world.engine.ruleset.members[HTTP_OF_DB][V4]
    assert "10.0.0.2" in pods and "10.0.0.3" in pods
    assert all(each not in pods for each in ("10.0.0.1", "fd00::2", "10.0.0.77", "10.0.0.2,tcp:80", None))
    assert "10.0.0.1,tcp:80" in ports
    assert all(each not in ports for each in ("10.0.0.1", "10.0.0.1,tcp:81", "10.0.0.2,tcp:80"))
    assert len(pods) == 2
    assert pods == {"10.0.0.2", "10.0.0.3"}
    assert pods - {"10.0.0.2"} == {"10.0.0.3"}
    assert {"10.0.0.2", "10.0.0.4"} - pods == {"10.0.0.4"}
    assert repr(pods) == "MemberView(['10.0.0.2', '10.0.0.3'])"


# Namespaces


ANYWHERE = PodSelection((), namespaces=())
OPS_PODS = PodSelection((), namespaces=(Requirement("team", "In", ("ops",)),))


def test_a_namespaces_labels_decide_over_its_pods() -> None:
    of_ops = PolicyPeer(namespace_selector=selector(team="ops"))
    world = World(DB, WEB1, pod("tool-1", 7, namespace="ops"), SHOP, policy("ops", selector(app="db"), rule(of_ops)))
    key = PodSet(Direction.INGRESS, (OPS_PODS,))
    assert world.members(key) == EMPTY  # nobody knows the labels of a namespace that is not there
    changed = world.put(OPS)
    assert changed.only_members and changed.added == {key: both(7)}
    assert world.put(replace(OPS, labels={"team": "shop"})).removed == {key: both(7)}
    assert world.put(replace(SHOP, labels={"team": "ops"})).added == {
        key: {V4: {"10.0.0.1", "10.0.0.2"}, V6: {"fd00::1", "fd00::2"}}
    }
    assert world.drop(SHOP).removed == {key: {V4: {"10.0.0.1", "10.0.0.2"}, V6: {"fd00::1", "fd00::2"}}}
    assert world.members(key) == EMPTY


def test_a_namespace_event_changes_nothing_that_does_not_ask_for_it() -> None:
    world = World(DB, WEB1, SHOP, ALLOW)
    assert not world.put(replace(SHOP, labels={"team": "another"}))
    assert not world.drop(SHOP)
    assert world.members(WEB_SET) == both(2)


def test_a_pod_taken_by_two_selections_of_a_set_stays_until_both_let_go() -> None:
    peers = (WEB, PolicyPeer(namespace_selector=selector(team="shop")))
    world = World(DB, WEB1, SHOP, policy("either", selector(app="db"), rule(*peers)))
    (key,) = world.sets
    assert world.members(key) == {V4: {"10.0.0.1", "10.0.0.2"}, V6: {"fd00::1", "fd00::2"}}
    assert world.put(replace(WEB1, labels={"app": "other"})) == Changed()
    assert world.put(replace(SHOP, labels={})).removed == {
        key: {V4: {"10.0.0.1", "10.0.0.2"}, V6: {"fd00::1", "fd00::2"}}
    }
    assert world.put(WEB1).added == {key: both(2)}


# Only what changed


def test_a_remote_pods_labels_change_members_only() -> None:
    world = World(DB, WEB1, ALLOW)
    changed = world.put(replace(WEB1, labels={"app": "other"}))
    assert changed.only_members
    assert changed == Changed(removed={WEB_SET: both(2)})
    assert world.put(WEB1) == Changed(added={WEB_SET: both(2)})


@pytest.mark.parametrize(
    "noise",
    [
        replace(WEB1, labels={"app": "web", "more": "x"}),
        replace(WEB1, container_id="2", host_ips=("192.0.2.1",)),
        replace(WEB1, phase="Pending"),
        replace(WEB1, uid="2"),
        replace(WEB1, deletion_seconds=30),
        replace(WEB1, ports=(ContainerPort("http", 80),)),
        replace(WEB1, ips=("fd00:0::2", "10.0.0.2")),
    ],
)
def test_what_no_rule_asks_for_is_no_change(noise: Pod) -> None:
    world = World(DB, WEB1, ALLOW)
    assert not world.put(noise)
    assert world.members(WEB_SET) == both(2)


def test_what_comes_and_goes_between_two_looks_is_no_change() -> None:
    world = World(DB, WEB1, ALLOW)
    engine, take = world.engine, world.engine.take_changed
    steps: list[tuple[Callable[..., Changed], Projection]] = [
        (world.put, WEB2),
        (world.put, replace(DB, labels={"app": "other"})),
        (world.put, policy("more", selector(), rule(WEB), rule(PolicyPeer(pod_selector=selector(app="x"))))),
        (world.drop, WEB1),
        (world.put, WEB1),
        (world.drop, policy("more", selector())),
        (world.put, DB),
        (world.drop, WEB2),
    ]
    engine.take_changed = Changed  # type: ignore[method-assign]  # nobody looks in between
    for step, item in steps:
        step(item)
    assert not take()
    assert world.members(WEB_SET) == both(2)


def test_a_set_out_of_use_for_a_while_tells_what_it_missed() -> None:
    world = World(DB, WEB1, ALLOW)
    take = world.engine.take_changed
    world.engine.take_changed = Changed  # type: ignore[method-assign]
    world.drop(ALLOW)
    assert world.sets == set()
    world.put(WEB2)
    world.drop(WEB1)
    world.put(ALLOW)
    assert take() == Changed(added={WEB_SET: both(3)}, removed={WEB_SET: both(2)})


def test_a_changed_policy_names_new_sets_and_leaves_the_others_alone() -> None:
    """S15: a rule put in front moves no members between the sets of the rules behind it."""
    world = World(DB, WEB1, ALLOW)
    front = rule(PolicyPeer(pod_selector=selector(app="front")))
    changed = world.put(replace(ALLOW, ingress=(front, *ALLOW.ingress)))
    new = PodSet(Direction.INGRESS, (PodSelection((Requirement("app", "In", ("front",)),), namespace="shop"),))
    assert changed == Changed(policies={"shop/allow"}, new_sets={new})


def test_a_policy_moves_to_other_pods() -> None:
    other = pod("cache-1", 8, NODE)
    world = World(DB, other, WEB1, ALLOW)
    changed = world.put(replace(ALLOW, pod_selector=selector(app="cache")))
    assert changed == Changed(policies={"shop/allow"}, pods={"shop/db-1", "shop/cache-1"})
    assert world.engine.ruleset.pods["shop/db-1"].ingress is None
    assert world.engine.ruleset.pods["shop/cache-1"].ingress == ("shop/allow",)


# Robustness


def test_the_same_changes_again_change_nothing() -> None:
    world = World(DB, WEB1, ALLOW)
    changes: Changes = {
        "pods": {WEB2.key: (None, WEB2), DB.key: (DB, DB)},
        "networkpolicies": {ALLOW.key: (None, ALLOW)},
    }
    world.tables["pods"][WEB2.key] = WEB2
    for expected in (Changed(added={WEB_SET: both(3)}), Changed()):
        world.engine.update(world.cluster, changes)
        assert world.engine.take_changed() == expected


def test_changes_only_say_where_to_look() -> None:
    """Old values that were never seen, keys that are not there and kinds that are no concern: the cluster decides."""
    world = World(DB, WEB1, ALLOW)
    never = pod("never", 9)
    changes: Changes = {
        "pods": {"shop/never": (never, None), "shop/nowhere": (None, never), WEB1.key: (never, None)},
        "namespaces": {"gone": (OPS, None)},
        "networkpolicies": {"shop/unknown": (ALLOW, None)},
        "nodes": {"n": (None, None)},
    }
    world.engine.update(world.cluster, changes)
    assert not world.engine.take_changed()


def test_the_first_update_looks_everywhere_and_says_so() -> None:
    engine = Engine(NODE, BOTH)
    world = World(DB, WEB1, ALLOW)
    engine.update(world.cluster, {"pods": {DB.key: (None, DB)}})
    assert engine.ruleset == world.engine.ruleset
    changed = engine.take_changed()
    assert changed.everything and not changed.only_members
    assert changed.new_sets == {WEB_SET} and not changed.added
    assert not engine.take_changed()


def test_comparing_finds_what_no_change_told_of() -> None:
    world = World(DB, WEB1, SHOP, ALLOW)
    world.tables = {"pods": {WEB2.key: WEB2, DB.key: DB}, "namespaces": {}, "networkpolicies": {ALLOW.key: ALLOW}}
    world.engine.update(world.cluster, None)
    assert world.engine.take_changed() == Changed(added={WEB_SET: both(3)}, removed={WEB_SET: both(2)})


def test_a_policy_with_a_problem_concerns_nobody_else() -> None:
    """Its lines stand as long as it does; the policies beside it are not touched."""
    wrong = LabelSelector(match_expressions=(LabelExpression(key="app", operator="Like"),))
    bad = policy("bad", selector(app="db"), rule(PolicyPeer(pod_selector=wrong)), rule(WEB))
    world = World(DB, WEB1, ALLOW)
    assert dict(world.engine.problems) == {}
    assert world.put(bad) == Changed(policies={"shop/bad"}, pods={"shop/db-1"})
    (line,) = world.engine.problems["shop/bad"]
    assert "shop/bad" in line and "'Like'" in line
    world.put(replace(bad, name="far", namespace="ops"))
    assert set(world.engine.problems) == {"shop/bad", "ops/far"}
    world.put(policy("bad", selector(app="db"), rule(WEB)))
    world.drop(replace(bad, name="far", namespace="ops"))
    assert dict(world.engine.problems) == {}


# Whose an address is


def test_a_finished_pods_address_is_the_new_ones_at_once() -> None:
    world = World(DB, WEB1, ALLOW)
    heir = pod("other-1", 2)
    assert world.put(replace(WEB1, phase="Failed"), heir) == Changed(removed={WEB_SET: both(2)})
    assert world.put(replace(heir, labels={"app": "web"})) == Changed(added={WEB_SET: both(2)})


@pytest.mark.parametrize("turned", [False, True])
def test_an_address_of_two_pods_belongs_to_the_one_that_stays_whoever_came_first(turned: bool) -> None:
    ending, heir = replace(WEB1, deletion_seconds=30), pod("a-1", 2, ips=("10.0.0.2",))
    first, second = (heir, ending) if turned else (ending, heir)
    world = World(DB, ALLOW)
    world.put(first)
    world.put(second)
    assert world.members(WEB_SET) == {V4: set(), V6: {"fd00::2"}}
    assert world.drop(heir) == Changed(added={WEB_SET: {V4: {"10.0.0.2"}}})
    assert world.members(WEB_SET) == both(2)


def test_of_two_that_stay_the_first_by_key_has_the_address() -> None:
    world = World(DB, ALLOW, WEB1, replace(WEB1, name="web-0", labels={"app": "other"}))
    assert world.members(WEB_SET) == EMPTY
    assert world.put(replace(WEB1, name="web-0", labels={}, deletion_seconds=1)).added == {WEB_SET: both(2)}


def test_an_address_that_passes_on_within_a_set_stays_a_new_member() -> None:
    world = World(DB, ALLOW)
    take = world.engine.take_changed
    world.engine.take_changed = Changed  # type: ignore[method-assign]
    world.put(WEB1)
    world.put(replace(WEB1, name="web-0"))
    assert take() == Changed(added={WEB_SET: both(2)})


def test_a_local_pod_without_an_address_of_its_own_is_not_enforced() -> None:
    world = World(replace(DB, deletion_seconds=30), WEB1, ALLOW)
    heir = pod("heir-1", 1)
    assert world.put(heir) == Changed(policies={"shop/allow"}, pods={"shop/db-1"}, gone_sets={WEB_SET})
    assert dict(world.engine.ruleset.pods) == {}
    half = replace(heir, ips=("fd00::1",))
    assert world.put(half) == Changed(policies={"shop/allow"}, pods={"shop/db-1"}, new_sets={WEB_SET})
    assert world.engine.ruleset.pods["shop/db-1"].addresses == ("10.0.0.1",)


def test_the_address_passes_on_among_many() -> None:
    class Claimant(msgspec.Struct, frozen=True, eq=False):
        key: str
        addresses: tuple[str, ...] = ("10.0.0.1", "fd00::1")
        terminating: bool = False

    a, b, c = Claimant("a", ("10.0.0.1",)), Claimant("b"), Claimant("c", terminating=True)
    owners: Owners[Claimant] = Owners()
    assert list(owners.claim(c)) == []
    assert owners.owned(c) is c.addresses
    assert list(owners.claim(b)) == [c, c]
    assert list(owners.claim(a)) == [b]
    assert [owners.owned(each) for each in (a, b, c)] == [("10.0.0.1",), ("fd00::1",), ()]
    assert list(owners.withdraw(b)) == [a, c]
    assert [owners.owned(each) for each in (a, c)] == [("10.0.0.1",), ("fd00::1",)]
    assert list(owners.withdraw(a)) == [c]
    assert list(owners.withdraw(c)) == []
    assert owners.owner("10.0.0.1") is None


# What it costs, counted


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """The keys of the policies that were compiled."""
    keys: list[Key] = []

    def counting(item: NetworkPolicy, families: tuple[Family, ...]) -> Any:
        keys.append(item.key)
        return compile_policy(item, families)

    monkeypatch.setattr(engine_module, "compile_policy", counting)
    return keys


def test_pods_and_namespaces_compile_no_policy_but_one_that_comes_into_force(compiled: list[Key]) -> None:
    idle = policy("idle", selector(app="cache"), rule(WEB))
    world = World(DB, WEB1, SHOP, ALLOW, idle)
    assert sorted(compiled) == ["shop/allow", "shop/idle"]
    compiled.clear()
    world.put(WEB2, replace(SHOP, labels={}), replace(DB, labels={"app": "db", "x": "y"}))
    world.engine.update(world.cluster, None)
    assert compiled == []
    world.put(pod("cache-1", 5, NODE))
    assert compiled == ["shop/idle"]


def test_a_label_change_asks_only_selectors_that_may_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 policies about other labels are not looked at, one by one, for a pod that none of them takes."""
    others = [
        policy(f"p{i}", selector(app="db"), rule(PolicyPeer(pod_selector=selector(app=f"a{i}")))) for i in range(200)
    ]
    world = World(DB, WEB1, *others)
    asked: list[Requirement] = []
    original = Requirement.matches
    monkeypatch.setattr(Requirement, "matches", lambda self, labels: asked.append(self) or original(self, labels))
    changed = world.put(replace(WEB1, labels={"app": "a7"}))
    assert len(changed.added) == 1 and asked == []


SELECTORS: list[Selector] = [
    (),
    (Requirement("app", "In", ("a",)),),
    (Requirement("app", "In", ("a", "b")),),
    (Requirement("app", "In", ("a", "b")), Requirement("tier", "In", ("x",))),
    (Requirement("app", "Exists"), Requirement("tier", "In", ("x", "y"))),
    (Requirement("app", "NotIn", ("a",)),),
    (Requirement("tier", "DoesNotExist"),),
    (Requirement("app", "In", ("a",)), Requirement("app", "In", ("b",))),
]


def test_the_index_finds_what_matches_and_nothing_else() -> None:
    index: SelectorIndex[int] = SelectorIndex()
    for number, conditions in enumerate(SELECTORS):
        index.add(conditions, number)
    for labels in ({}, {"app": "a"}, {"app": "b", "tier": "x"}, {"tier": "y"}, {"app": "c", "tier": "x"}):
        expected = [number for number, conditions in enumerate(SELECTORS) if matches(conditions, labels)]
        assert sorted(index.matching(labels)) == expected
    for number, conditions in enumerate(SELECTORS):
        assert index
        index.remove(conditions, number)
        assert number not in index.matching({"app": "a", "tier": "x"})
    assert not index
