"""What of the overlay every kernel has: the pods' rules and table 77. Tunnel devices are in `tests/vm`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import msgspec
import pytest
from support.dataplane import DUAL_STACK, RunningDataplane
from support.namespaces import Namespace

from kube_router.workers.kernel.routes import RouteDriver
from kube_router.workers.model import Family
from kube_router.workers.routefacts import ActualRoutes, Prefix, Route, RoutePlan
from kube_router.workers.router.dataplane import cleanup
from kube_router.workers.router.tunnels import is_our_host, names_of
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings
from kube_router.workers.tunnelfacts import OVERLAY_TABLE

RULES = ["from 10.244.1.0/24 lookup 77 proto 17", "from fd00:244:1::/64 lookup 77 proto 17"]
FLUSH = "ip rule flush; ip -6 rule flush; ip rule add lookup main; ip -6 rule add lookup main"
REMOTE = {Family.IPV4: "10.4.0.4", Family.IPV6: "fd04::4"}
SOURCE = {Family.IPV4: "10.0.0.1", Family.IPV6: "fd00::1"}


@pytest.fixture
def node(netns: Namespace) -> Iterator[Namespace]:
    """Node n1's namespace; the other end of its link is in it too."""
    netns.run("ip link add eth0 type veth peer name far; ip link set far up; ip address add 10.0.0.1/24 dev eth0")
    netns.run("ip address add fd00::1/64 dev eth0 nodad; ip link set eth0 up")
    netns.run("iptables-nft -t mangle -N KUBE-IPTABLES-HINT")
    with netns.enter():
        yield netns


def rules(namespace: Namespace) -> list[str]:
    lines = namespace.run("ip -N rule show table 77; ip -6 -N rule show table 77").splitlines()
    return [line.split("\t", 1)[1].strip() for line in lines]


def test_pods_rules_come_with_the_overlay_and_go_with_it(node: Namespace) -> None:
    node.run("ip rule add from 10.244.1.0/24 lookup 77; ip rule add from 10.99.0.0/16 lookup 77 protocol boot")
    foreign = "from 10.99.0.0/16 lookup 77 proto 3"
    assert RunningDataplane().reconcile().failures == ()
    assert sorted(rules(node)) == sorted([*RULES, foreign])
    assert RunningDataplane().reconcile().writes == 0
    assert RunningDataplane(msgspec.structs.replace(DUAL_STACK, enable_overlay=False)).reconcile().failures == ()
    assert rules(node) == [foreign]


def test_pods_rules_follow_the_pod_cidrs(node: Namespace) -> None:
    running = RunningDataplane()
    running.reconcile()
    own = running.nodes[0]
    running.nodes = (dataclasses.replace(own, pod_cidrs=own.pod_cidrs[:1]), *running.nodes[1:])
    running.reconcile(Trigger(changes={}), frozenset())
    assert rules(node) == RULES[:1]


@pytest.mark.parametrize("removal", ["ip rule del table 77", "ip -6 rule del table 77", FLUSH])
def test_removed_rules_are_put_back_at_once(node: Namespace, removal: str) -> None:
    running = RunningDataplane()
    running.reconcile()
    running.drain()
    node.run(removal)
    assert running.repair_until(lambda: rules(node) == RULES, 5.0)
    assert not running.drain()  # own writes wake nobody


def test_cleanup_takes_our_rules_and_nobody_elses(node: Namespace) -> None:
    node.run("ip rule add from 10.99.0.0/16 lookup 77; ip -6 rule add from fd99::/64 lookup 77")
    before = rules(node)
    RunningDataplane().reconcile()
    assert len(rules(node)) == 4
    assert cleanup(Settings()) == []
    assert rules(node) == before


@pytest.mark.parametrize("family", list(Family), ids=str)
def test_routes_of_table_77_lead_through_a_device_and_are_told_from_others(node: Namespace, family: Family) -> None:
    ip, remote = f"ip -{family.value}", REMOTE[family]
    device, host = names_of(remote)[0], Prefix(f"{remote}/{family.bits}")
    node.run(f"ip link add {device} type veth peer name x; ip link set x up; ip link set {device} up")
    node.run(f"ip link set {device} addrgenmode none")
    node.run(f"{ip} route add {host} dev {device} table 77; {ip} route add {remote[:-1]}9 dev {device} table 77")
    driver = RouteDriver(OVERLAY_TABLE, is_our_host)
    main = RouteDriver()
    foreign = frozenset({Prefix(f"{remote[:-1]}9/{family.bits}")})
    assert driver.observe() == ActualRoutes({host: Route("", device)}, foreign=foreign)
    wanted = Route("", device, SOURCE[family], 1400, 1340)
    assert driver.apply(RoutePlan(replace=((host, wanted),))).failures == ()
    assert driver.observe() == ActualRoutes({host: wanted}, foreign=foreign)
    assert driver.apply(RoutePlan(delete=(host,))).removed == 1
    assert driver.observe() == ActualRoutes(foreign=foreign)
    failures = driver.apply(RoutePlan(add=((host, Route("", "missing")),))).failures
    assert [(failure.way, failure.error.strerror) for failure in failures] == [("dev missing", "No such device")]
    assert main.observe().ours == {}
    driver.close()
    main.close()


def test_the_table_of_a_clean_node_does_not_exist_and_is_empty(node: Namespace) -> None:
    driver = RouteDriver(OVERLAY_TABLE, is_our_host)
    assert driver.observe() == ActualRoutes()
    driver.close()
