"""Egress sets, the masquerade rule and the FORWARD accepts: desired values, plans, and keeping them."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import pytest
from support.fake_kernel import FakeKernel, FakeRules, FakeSets

from kube_router.workers.linkfacts import LOOPBACK, Link, Links
from kube_router.workers.model import Family
from kube_router.workers.nodefacts import NodeFacts
from kube_router.workers.router.dataplane import node_interfaces
from kube_router.workers.router.egress import (
    desired_sets,
    egress_forms,
    egress_rule,
    forward_rules,
    is_forward_accept,
    plan_egress,
    plan_forward,
    set_specs,
)
from kube_router.workers.router.rulesync import RuleSync, SetSync
from kube_router.workers.rulefacts import Members, RuleText, SetName, SetSpec, plan_set

OTHER = RuleText("-i kube-bridge -j ACCEPT")
JUMP = RuleText('-m comment --comment "kube-router netpol - TEMCG2JMHZYE7H7T" -j KUBE-ROUTER-FORWARD')


def node(name: str, addresses: Iterable[str], cidrs: Iterable[str]) -> NodeFacts:
    parsed = tuple(map(ipaddress.ip_address, addresses))
    return NodeFacts(name, "", parsed[0], parsed, tuple(map(ipaddress.ip_network, cidrs)), None, ())


NODES = (
    node("n1", ["10.0.0.1", "fd00::1"], ["10.244.1.0/24", "fd00:244:1::/64"]),
    node("n2", ["10.0.0.2", "192.0.2.2", "fd00::2"], ["10.244.2.0/24", "fd00:244:2::/64"]),
    node("control-plane", ["10.0.0.9", "fd00::9"], []),
)


def by_name(family: Family) -> dict[str, list[str]]:
    return {spec.name: sorted(members) for spec, members in desired_sets(family, NODES).items()}


def test_sets_hold_what_upstream_s_hold() -> None:
    assert by_name(Family.IPV4) == {
        "kube-router-node-ips": ["10.0.0.1", "10.0.0.2", "192.0.2.2"],
        "kube-router-pod-subnets": ["10.244.1.0/24", "10.244.2.0/24"],
    }
    assert by_name(Family.IPV6) == {
        "inet6:kube-router-node-ips": ["fd00::1", "fd00::2"],
        "inet6:kube-router-pod-subnets": ["fd00:244:1::/64", "fd00:244:2::/64"],
    }


def test_set_creation_is_upstream_s_text() -> None:
    assert [str(spec) for family in Family for spec in set_specs(family)] == [
        "create kube-router-node-ips hash:ip timeout 0",
        "create kube-router-pod-subnets hash:net timeout 0",
        "create inet6:kube-router-node-ips hash:ip timeout 0 family inet6",
        "create inet6:kube-router-pod-subnets hash:net timeout 0 family inet6",
    ]


def test_egress_rule_is_upstream_s_text() -> None:
    assert egress_rule(Family.IPV4, random_fully=True) == (
        "-m set --match-set kube-router-pod-subnets src -m set ! --match-set kube-router-pod-subnets dst "
        "-m set ! --match-set kube-router-node-ips dst -j MASQUERADE --random-fully"
    )
    assert egress_rule(Family.IPV6, random_fully=False) == (
        "-m set --match-set inet6:kube-router-pod-subnets src -m set ! --match-set inet6:kube-router-pod-subnets dst "
        "-m set ! --match-set inet6:kube-router-node-ips dst -j MASQUERADE"
    )
    assert len(egress_forms(Family.IPV4) | egress_forms(Family.IPV6)) == 8


@pytest.mark.parametrize("family", list(Family), ids=str)
def test_egress_plan_leaves_exactly_the_wanted_form(family: Family) -> None:
    wanted = egress_rule(family, random_fully=True)
    forms = sorted(egress_forms(family))
    assert [str(step) for step in plan_egress(family, [OTHER], wanted).steps] == [f"-A POSTROUTING {wanted}"]
    assert plan_egress(family, [OTHER, wanted], wanted).steps == ()
    plan = plan_egress(family, [*forms, OTHER, wanted], wanted)
    assert sorted(step.rule for step in plan.steps) == forms
    assert {step.verb for step in plan.steps} == {"delete"}
    assert len(plan_egress(family, [*forms, OTHER], None)) == 4


def test_forward_plan_on_a_clean_chain_ends_in_upstream_s_order() -> None:
    plan = plan_forward(Family.IPV4, [OTHER], forward_rules("eth0"))
    assert str(plan) == (
        "*filter\n"
        '-I FORWARD 1 -i kube-bridge -m comment --comment "allow outbound traffic from pods" -j ACCEPT\n'
        '-I FORWARD 1 -o kube-bridge -m comment --comment "allow inbound traffic to pods" -j ACCEPT\n'
        '-I FORWARD 1 -o eth0 -m comment --comment "allow outbound node port traffic on node interface with which node '
        'ip is associated" -j ACCEPT\n'
        "COMMIT\n"
    )


def test_forward_plan_goes_below_the_network_policy_jump() -> None:
    actual = [JUMP, forward_rules("eth0")[0]]
    plan = plan_forward(Family.IPV6, actual, forward_rules("eth0"))
    assert [(step.verb, step.position) for step in plan.steps] == [("insert", 2), ("insert", 2)]


def test_forward_plan_replaces_the_rule_of_an_old_node_interface_and_surplus_ones() -> None:
    actual = [*reversed(forward_rules("eth0")), forward_rules("")[0], OTHER]
    plan = plan_forward(Family.IPV4, actual, forward_rules("eth1"))
    assert [(step.verb, step.rule) for step in plan.steps] == [
        ("insert", forward_rules("eth1")[2]),
        ("delete", forward_rules("eth0")[0]),
        ("delete", forward_rules("eth0")[2]),
    ]
    held = plan_forward(Family.IPV4, actual, forward_rules("eth1"), hold_deletions=True)
    assert [step.verb for step in held.steps] == ["insert"]


@pytest.mark.parametrize(
    "rule",
    [
        OTHER,
        JUMP,
        '-i kube-bridge -m comment --comment "allow inbound traffic to pods" -j ACCEPT',
        '-o kube-bridge -m comment --comment "allow inbound traffic to pods" -j DROP',
        '-s 10.0.0.0/8 -o eth0 -m comment --comment "allow outbound node port traffic on node interface with which '
        'node ip is associated" -j ACCEPT',
    ],
)
def test_a_rule_that_only_resembles_ours_is_not_ours(rule: str) -> None:
    assert not is_forward_accept(RuleText(rule))
    assert plan_forward(Family.IPV4, [RuleText(rule)], ()).steps == ()


def link(index: int, name: str, address: str, kind: str = "") -> Link:
    return Link(index, name, kind=kind, addresses=(ipaddress.ip_interface(address),))


def test_node_interface_is_that_of_the_family_s_address_then_of_the_primary() -> None:
    own = NODES[0]
    two = Links((link(2, "eth0", "10.0.0.1/24"), link(3, "eth1", "fd00::1/64")))
    assert node_interfaces(own, two, tuple(Family)) == {Family.IPV4: "eth0", Family.IPV6: "eth1"}
    one = Links((link(2, "eth0", "10.0.0.1/24"),))
    assert node_interfaces(own, one, tuple(Family)) == {Family.IPV4: "eth0", Family.IPV6: "eth0"}
    assert node_interfaces(own, Links((link(1, "lo", "10.0.0.1/32", LOOPBACK),)), tuple(Family)) == {}


def test_a_set_plan_holds_deletions_and_knows_its_result() -> None:
    spec = SetSpec(SetName("s"), "hash:net", Family.IPV4)
    actual, desired = Members.of(Family.IPV4, ["10.1.0.0/16"]), Members.of(Family.IPV4, ["10.2.0.0/16"])
    plan = plan_set(spec, actual, desired)
    assert str(plan) == "add s 10.2.0.0/16\ndel s 10.1.0.0/16"
    assert (len(plan), plan.result) == (2, desired)
    held = plan_set(spec, actual, desired, hold=True)
    assert str(held) == "add s 10.2.0.0/16"
    assert held.result.texts() == ["10.1.0.0/16", "10.2.0.0/16"]
    assert len(plan_set(spec, None, Members(Family.IPV4))) == 1
    assert not plan_set(spec, desired, desired)


def test_sets_and_rules_are_made_once_and_put_back() -> None:
    kernel = FakeKernel()
    sets, rules = FakeSets(kernel), FakeRules(kernel)
    set_sync, rule_sync = SetSync(sets), RuleSync(rules)

    def sync(*, observe: bool) -> tuple[int, int, list[object]]:
        written, failed = set_sync.sync(tuple(Family), NODES, observe=observe, hold_deletions=False)
        count, failures = rule_sync.sync(
            tuple(Family),
            dict.fromkeys(Family, "eth0"),
            True,
            without_sets=failed,
            observe=observe,
            hold_deletions=False,
        )
        return written, count, [*failed.values(), *failures]

    assert sync(observe=True) == (4 + 9, 8, [])
    assert sync(observe=True) == sync(observe=False) == (0, 0, [])
    kernel.chain(Family.IPV6, "filter", "FORWARD").clear()
    kernel.sets["kube-router-node-ips"][1].clear()
    assert sync(observe=False) == (0, 0, [])
    assert sync(observe=True) == (3, 3, [])


def test_law_5_a_conflicting_set_keeps_its_family_s_rule_away_and_nothing_else() -> None:
    kernel = FakeKernel()
    name = SetName("inet6:kube-router-pod-subnets")
    kernel.sets[name] = (SetSpec(name, "hash:ip", Family.IPV6), set())
    sets, rules = SetSync(FakeSets(kernel)), RuleSync(FakeRules(kernel))
    _, failed = sets.sync(tuple(Family), NODES, observe=True, hold_deletions=False)
    assert list(failed) == [Family.IPV6]
    assert "inet6:kube-router-pod-subnets: exists as hash:ip" in failed[Family.IPV6].text
    written, failures = rules.sync(tuple(Family), {}, True, without_sets=failed, observe=True, hold_deletions=False)
    assert (written, failures) == (5, [])
    assert kernel.chain(Family.IPV6, "nat", "POSTROUTING") == []
    assert len(kernel.chain(Family.IPV4, "nat", "POSTROUTING")) == 1


def test_an_old_iptables_gets_no_random_fully() -> None:
    kernel = FakeKernel()
    rules = FakeRules(kernel, version=(1, 6, 1))
    SetSync(FakeSets(kernel)).sync([Family.IPV4], NODES, observe=True, hold_deletions=False)
    RuleSync(rules).sync_egress(Family.IPV4, True, observe=True)
    assert kernel.chain(Family.IPV4, "nat", "POSTROUTING") == [egress_rule(Family.IPV4, random_fully=False)]
