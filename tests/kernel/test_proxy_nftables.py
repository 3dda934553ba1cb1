"""The nftables backend on the real kernel: elements for Services, restarts without a write, drift, stale states."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.namespaces import Namespace, namespaces
from support.proxynode import KIND, ProxyNode
from support.proxyworld import (
    EXTERNAL,
    NODE_ADDRESS,
    OTHER_NODE,
    balanced,
    both,
    node,
    pods,
    service,
    slices,
)

from kube_router.ipc.messages import Projection, ServicePort
from kube_router.workers.model import Family
from kube_router.workers.proxy.names import NFT_TABLES

V4, V6 = Family.IPV4, Family.IPV6
SCHEDULER = "kube-router.io/service.scheduler"
WORLD: tuple[Projection, ...] = (
    node(OTHER_NODE),
    service("web", 1, external_ips=both(EXTERNAL, 1)),
    service("sticky", 2, session_affinity="ClientIP", affinity_timeout=60),
    balanced("lb", 3, external_traffic_policy="Local", load_balancer_source_ranges=("203.0.113.0/24", "2001:db8::/32")),
    service("hashed", 4, annotations={SCHEDULER: "sh"}),
    service("empty", 5, type="NodePort"),
    *slices("web", pods(1, 2, 3)),
    *slices("sticky", pods(4, 5)),
    *slices("lb", [*pods(6), *pods(7, where=OTHER_NODE)]),
    *slices("hashed", pods(8, 9)),
)


@pytest.fixture
def world(netns: Namespace) -> Iterator[ProxyNode]:
    with netns.enter():
        made = ProxyNode(netns, *WORLD)
        assert not made.start().failures
        yield made
        made.backend.close()


def fresh(world: ProxyNode) -> list[str]:
    """The tables that a new process makes of the same cluster in an empty kernel."""
    with namespaces() as (other,), other.enter():
        twin = ProxyNode(other, *world.objects.items.values())
        twin.start()
        twin.backend.close()
        return twin.tables()


def test_a_second_look_and_a_restarted_worker_write_nothing(world: ProxyNode) -> None:
    before = world.tables()
    assert world.sync().writes == 0
    assert world.look().writes == 0
    again = world.restart()
    assert again.writes == 0 and not again.failures and not again.repaired
    assert world.backend.plan(world.engine.table, world.frame) == ()
    assert world.tables() == before


@pytest.mark.parametrize("family", list(Family), ids=str)
def test_both_families_hold_the_same(world: ProxyNode, family: Family) -> None:
    assert len(world.elements(family, "services")) == 6, "cluster IPs with endpoints, an external IP, a balancer's"
    assert len(world.elements(family, "services-inside")) == 1
    assert len(world.elements(family, "node-ports")) == 1
    assert len(world.elements(family, "closed")) == 1
    assert len(world.elements(family, "closed-node-ports")) == 0
    assert len(world.elements(family, "hairpin")) == 8
    assert len(world.elements(family, "node-addresses")) == 1


CHANGES = [
    ("an endpoint more", (*slices("web", pods(1, 2, 3, 11)),)),
    ("an endpoint less", (*slices("web", pods(1, 2)),)),
    ("another endpoint", (*slices("web", pods(1, 2, 12)),)),
    ("no endpoint left", (*slices("web", ()),)),
    ("another count of a sticky one", (*slices("sticky", pods(4)),)),
    ("a new service", (service("new", 6), *slices("new", pods(13, 14)))),
    ("another scheduler", (service("hashed", 4),)),
    (
        "hashing begins",
        (service("web", 1, annotations={SCHEDULER: "mh", "kube-router.io/service.schedflags": "flag-2"}),),
    ),
    ("all to one", (service("web", 1, annotations={SCHEDULER: "dh"}),)),
    ("another affinity", (service("sticky", 2, session_affinity="ClientIP", affinity_timeout=61),)),
    ("policy Cluster", (balanced("lb", 3),)),
    ("other sources", (balanced("lb", 3, load_balancer_source_ranges=("10.0.0.0/9", "fd00::/17")),)),
    ("another port", (service("web", 1, ServicePort(name="http", port=81)),)),
    ("no external IP", (service("web", 1),)),
    ("a node with the external IP", (node("n3", addresses=node(OTHER_NODE).addresses, pod_cidrs=()),)),
    ("another pod CIDR", (node(pod_cidrs=("10.1.0.0/25", "10.2.0.0/24", "fd00:1::/64")),)),
    ("another node address", (node(addresses=node(OTHER_NODE).addresses),)),
]


@pytest.mark.parametrize("objects", [objects for _, objects in CHANGES], ids=[name for name, _ in CHANGES])
def test_a_change_leads_to_what_a_new_process_would_make(world: ProxyNode, objects: tuple[Projection, ...]) -> None:
    changed = world.sync(*objects)
    assert not changed.failures and not changed.repaired
    assert world.tables() == fresh(world)
    assert world.restart().writes == 0
    world.sync(*WORLD, node())
    world.drop(("services", "shop/new"), ("nodes", "n3"))
    world.drop(*(("endpointslices", f"shop/new-{family}-a") for family in ("ipv4", "ipv6")))
    assert world.tables() == fresh(world)
    assert world.restart().writes == 0


def test_an_endpoint_change_writes_its_elements_alone(world: ProxyNode) -> None:
    # Three endpoints, at a cluster IP and an external IP, in two families; the middle one is another: delete and add.
    assert world.sync(*slices("web", pods(1, 12, 3))).writes <= 2 * 2 * 2 * 2 + 4
    assert world.sync(*slices("web", pods(1, 12, 3))).writes == 0


def test_services_are_elements_never_rules(world: ProxyNode) -> None:
    before = [len([line for line in world.table(family).splitlines() if "chain " in line]) for family in Family]
    for number in range(100, 200):
        world.objects.put(service(f"s{number}", number), *slices(f"s{number}", pods(1, 2, 3)))
    assert not world.sync().failures
    after = [len([line for line in world.table(family).splitlines() if "chain " in line]) for family in Family]
    assert all(now - then <= 8 for then, now in zip(before, after, strict=True))
    assert all(len(world.elements(family, "services")) == 106 for family in Family)


DRIFT = [
    ("flush map {kind} {table} services", "set services: 6 of its elements were missing"),
    ("flush map {kind} {table} endpoints", "of its elements were missing"),
    ("flush chain {kind} {table} outside", "chain outside was changed"),
    ("delete table {kind} {table}", "table {table} was deleted"),
    ("add element {kind} {table} closed {{ {address} . tcp . 99 }}", "set closed: 1 foreign elements were in it"),
    ("add chain {kind} {table} mine", "chain mine was added"),
    ("add rule {kind} {table} inside counter drop", "chain inside was changed"),
    ("add set {kind} {table} mine {{ type inet_service; }}", "set mine was added"),
]


@pytest.mark.parametrize("family", list(Family), ids=str)
@pytest.mark.parametrize(("command", "line"), DRIFT)
def test_what_somebody_changes_is_noticed_told_and_repaired(
    world: ProxyNode, family: Family, command: str, line: str
) -> None:
    before = world.tables()
    names = {"kind": KIND[family], "table": NFT_TABLES[family], "address": NODE_ADDRESS[family]}
    assert not world.woken()
    world.nft(command.format(**names))
    assert world.woken()
    repaired = world.look()
    assert not repaired.failures and repaired.writes
    assert any(line.format(**names) in told for told in repaired.repaired), repaired.repaired
    assert world.tables() == before
    assert world.look().writes == 0 and not world.woken()


def test_an_element_that_was_led_elsewhere_is_led_back(world: ProxyNode) -> None:
    before = world.tables()
    key = "10.96.0.1 . tcp . 80 . 0x00000000"
    table = NFT_TABLES[V4]
    world.nft(f"delete element ip {table} endpoints {{ {key} }}")
    world.nft(f"add element ip {table} endpoints {{ {key} : 203.0.113.1 . 1 }}")
    assert world.look().repaired == ("set endpoints: 1 of its elements were others",)
    assert world.tables() == before


def test_drift_that_meets_a_change_is_mended_and_the_change_is_made(world: ProxyNode) -> None:
    world.nft(f"flush map ip {NFT_TABLES[V4]} services")
    assert not world.sync(*slices("sticky", pods(4, 5, 6))).failures
    assert world.tables() == fresh(world)


def test_tables_of_others_are_not_touched(world: ProxyNode) -> None:
    for command in (
        "add table ip kube-proxy",
        "add map ip kube-proxy services { type ipv4_addr : verdict; }",
        "add chain ip kube-proxy services",
        "add rule ip kube-proxy services counter drop",
    ):
        world.nft(command)
    before = world.namespace.run("nft -s list table ip kube-proxy")
    world.sync(*slices("web", pods(1)))
    world.restart()
    assert world.namespace.run("nft -s list table ip kube-proxy") == before


def test_a_stale_state_adds_and_takes_nothing_away(world: ProxyNode) -> None:
    before = {family: world.elements(family, "services") for family in Family}
    world.objects.put(service("new", 6), *slices("new", pods(13)), *slices("web", ()))
    world.objects.remove("services", "shop/sticky")
    world.follow()
    held = world.restart(hold=True)
    assert not held.failures
    for family in Family:
        assert world.elements(family, "services") > before[family]
    assert len(world.elements(V4, "closed")) == 1
    world.look()
    assert world.tables() == fresh(world)


def test_a_stale_state_in_a_running_process_adds_too(world: ProxyNode) -> None:
    world.objects.put(service("new", 6), *slices("new", pods(13)), *slices("web", ()))
    world.objects.remove("services", "shop/sticky")
    before = world.elements(V6, "services")
    assert not world.sync(hold=True).failures
    assert world.elements(V6, "services") == before | {"fd00:96::6 . tcp . 80 : jump pick-turn-1"}
    assert not world.sync(observe=True).failures
    assert world.tables() == fresh(world)


def test_a_table_of_another_kind_is_made_anew(world: ProxyNode) -> None:
    before = world.tables()
    table = NFT_TABLES[V4]
    world.nft(f"delete table ip {table}")
    world.nft(f"add table ip {table}")
    world.nft(f"add set ip {table} services {{ type ipv4_addr; }}")
    assert not world.restart().failures
    assert world.tables() == before


def test_what_cannot_be_said_is_told_once_a_service(world: ProxyNode) -> None:
    annotations = {SCHEDULER: "lc", "kube-router.io/service.dsr": "tunnel"}
    told = world.sync(service("web", 1, external_ips=both(EXTERNAL, 1), annotations=annotations)).unable
    assert told == {
        "shop/web": (
            "direct server return needs IPVS; its addresses are translated like all others",
            "scheduler lc needs IPVS; connections go to its endpoints by turns",
        )
    }
    assert world.sync(service("web", 1)).unable == {}
