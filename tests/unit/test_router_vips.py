"""Which Service addresses a node announces: kube-router's test cases, and the faults that its users report, by name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from support.vips import LEADER, TRUE, endpoint, endpoint_slice, facts, service, settings

from kube_router.ipc.messages import Endpoint, EndpointSlice, IngressAddress, Service
from kube_router.workers.router.viprules import VipRules
from kube_router.workers.router.vips import NO_VIPS, Vips, VipTable

CLUSTER = frozenset({"10.96.0.1", "fd00:96::1"})
EXTERNAL = frozenset({"192.0.2.1", "2001:db8:e::1"})
BALANCER = frozenset({"198.51.100.1", "2001:db8:b::1"})
NO: frozenset[str] = frozenset()
EVERY_KIND = {"advertise_cluster_ip": True, "advertise_external_ip": True, "advertise_loadbalancer_ip": True}
V4 = endpoint("10.244.1.5")
V6 = endpoint("fd00:1::5")


class Cluster:
    """A table that is told every change as the loop tells it."""

    def __init__(self, *objects: Service | EndpointSlice, own: Iterable[str] | None = None, **flags: Any) -> None:
        self.table = VipTable(settings(**flags))
        self.services: dict[str, Service] = {}
        self.slices: dict[str, EndpointSlice] = {}
        self.own = facts() if own is None else facts(own)
        self.table.update(self.own, {}, {}, None)
        self.put(*objects)

    def put(self, *objects: Service | EndpointSlice) -> Vips:
        changes: dict[Any, dict[str, Any]] = {}
        for item in objects:
            table: dict[str, Any] = self.services if isinstance(item, Service) else self.slices
            kind = "services" if isinstance(item, Service) else "endpointslices"
            changes.setdefault(kind, {})[item.key] = (table.get(item.key), item)
            table[item.key] = item
        return self.table.update(self.own, self.services, self.slices, changes)

    def drop(self, item: Service | EndpointSlice) -> Vips:
        kind: Any = "services" if isinstance(item, Service) else "endpointslices"
        (self.services if isinstance(item, Service) else self.slices).pop(item.key)  # type: ignore[attr-defined]
        return self.table.update(self.own, self.services, self.slices, {kind: {item.key: (item, None)}})

    @property
    def advertised(self) -> frozenset[str]:
        return self.table.vips.advertised

    @property
    def known(self) -> frozenset[str]:
        return self.table.vips.known


def balanced(**fields: Any) -> Service:
    return service(external=sorted(EXTERNAL), ingress=sorted(BALANCER), **fields)


@pytest.mark.parametrize(
    ("flags", "advertised"),
    [
        ({}, NO),
        ({"advertise_cluster_ip": True}, CLUSTER),
        ({"advertise_external_ip": True}, EXTERNAL),
        ({"advertise_loadbalancer_ip": True}, BALANCER),
        (EVERY_KIND, CLUSTER | EXTERNAL | BALANCER),
    ],
)
def test_each_kind_has_its_flag(flags: dict[str, bool], advertised: frozenset[str]) -> None:
    assert Cluster(balanced(), **flags).table.vips == Vips(advertised, advertised)


@pytest.mark.parametrize("value", TRUE)
@pytest.mark.parametrize(
    ("annotation", "advertised"),
    [("clusterip", CLUSTER), ("externalip", EXTERNAL), ("loadbalancerip", BALANCER)],
)
def test_an_annotation_opts_in(annotation: str, value: str, advertised: frozenset[str]) -> None:
    assert Cluster(balanced(annotations={f"advertise.{annotation}": value})).advertised == advertised


@pytest.mark.parametrize("value", ["0", "f", "F", "FALSE", "false", "False"])
@pytest.mark.parametrize(
    ("annotation", "left"),
    [
        ("clusterip", EXTERNAL | BALANCER),
        ("externalip", CLUSTER | BALANCER),
        ("loadbalancerip", CLUSTER | EXTERNAL),
    ],
)
def test_an_annotation_opts_out(annotation: str, value: str, left: frozenset[str]) -> None:
    cluster = Cluster(balanced(annotations={f"advertise.{annotation}": value}), **EVERY_KIND)
    assert cluster.table.vips == Vips(left, left)
    assert cluster.table.lines == ()


@pytest.mark.parametrize("value", ["yes", "", "tRUE", " true", "on", "2"])
@pytest.mark.parametrize("flag", [True, False])
def test_a_value_that_is_no_boolean_counts_as_false_and_is_told(value: str, flag: bool) -> None:
    cluster = Cluster(
        balanced(annotations={"advertise.externalip": value}),
        service("other", "10.96.0.2"),
        advertise_cluster_ip=True,
        advertise_external_ip=flag,
    )
    assert cluster.advertised == CLUSTER | {"10.96.0.2"}
    assert cluster.table.lines == (
        f"service shop/web: annotation kube-router.io/service.advertise.externalip: {value!r} is not true or false; it "
        "counts as false",
    )


@pytest.mark.parametrize("annotation", [{}, {"local": "true"}])
@pytest.mark.parametrize(
    ("slices", "families"),
    [
        ((), ""),
        ((endpoint_slice("v4", "web", V4), endpoint_slice("v6", "web", V6, kind="IPv6")), "46"),
        ((endpoint_slice("v4", "web", V4),), "4"),
        ((endpoint_slice("v6", "web", V6, kind="IPv6"),), "6"),
        ((endpoint_slice("v4", "web", endpoint("10.244.2.5", node="b")),), ""),
    ],
)
def test_external_traffic_policy_and_service_local_need_an_own_endpoint_of_the_family(
    annotation: dict[str, str], slices: tuple[EndpointSlice, ...], families: str
) -> None:
    policy = "" if annotation else "Local"
    cluster = Cluster(balanced(external_traffic_policy=policy, annotations=annotation), *slices, **EVERY_KIND)
    served = {ip for ip in EXTERNAL | BALANCER if ("6" if ":" in ip else "4") in families}
    assert cluster.advertised == CLUSTER | served
    assert cluster.known == CLUSTER | EXTERNAL | BALANCER


@pytest.mark.parametrize("own", [True, False])
def test_internal_traffic_policy_is_for_the_cluster_ips(own: bool) -> None:
    slices = [endpoint_slice("v4", "web", V4)] if own else []
    cluster = Cluster(balanced(internal_traffic_policy="Local"), *slices, **EVERY_KIND)
    assert cluster.advertised == EXTERNAL | BALANCER | ({"10.96.0.1"} if own else NO)


@pytest.mark.parametrize(("value", "told"), [("True", 1), ("1", 1), ("", 1), ("false", 0)])
def test_service_local_is_the_exact_word(value: str, told: int) -> None:
    cluster = Cluster(balanced(annotations={"local": value}), **EVERY_KIND)
    assert cluster.advertised == CLUSTER | EXTERNAL | BALANCER
    assert [line.count(f"service.local: {value!r}: only 'true' has an effect") for line in cluster.table.lines] == (
        [1] * told
    )


def test_an_address_of_two_kinds_is_announced_when_one_of_them_needs_no_endpoint() -> None:
    both = service("web", "10.96.0.1", external=("10.96.0.1",), external_traffic_policy="Local")
    cluster = Cluster(both, strict_external_ip_validation=False, **EVERY_KIND)
    assert cluster.advertised == {"10.96.0.1"}


@pytest.mark.parametrize("value", ["", "false", "true"])
def test_skiplbips_counts_by_being_there(value: str) -> None:
    assert Cluster(balanced(annotations={"skiplbips": value}), **EVERY_KIND).advertised == CLUSTER | EXTERNAL
    opted_in = balanced(annotations={"skiplbips": value, "advertise.loadbalancerip": "true"})
    assert Cluster(opted_in).advertised == NO


@pytest.mark.parametrize(
    "fields", [{"cluster_ips": ("None",)}, {"cluster_ips": ()}, {"type": "ExternalName"}, {"type": "Nonsense"}]
)
def test_headless_and_foreign_types_announce_nothing(fields: dict[str, Any]) -> None:
    values: dict[str, Any] = {"type": "LoadBalancer", "cluster_ips": ("10.96.0.1",), **fields}
    item = Service(
        name="web",
        namespace="shop",
        external_ips=("192.0.2.1",),
        ingress=(IngressAddress(ip="198.51.100.1"),),
        **values,
    )
    assert Cluster(item, **EVERY_KIND).table.vips == NO_VIPS


def test_a_load_balancer_without_address_yet() -> None:
    assert Cluster(service(type="LoadBalancer"), advertise_loadbalancer_ip=True).table.vips == NO_VIPS


@pytest.mark.parametrize(
    ("strict", "ranges", "value", "advertised"),
    [
        (True, ("192.0.2.0/24",), "192.0.2.1", True),
        (True, ("192.0.2.0/24",), "203.0.113.1", False),
        (True, ("10.96.0.0/12",), "10.96.0.7", False),
        (True, (), "192.0.2.1", False),
        (False, ("192.0.2.0/24",), "203.0.113.1", True),
        (False, (), "10.96.0.7", True),
    ],
)
def test_a_rejected_address_is_neither_announced_nor_known(
    strict: bool, ranges: tuple[str, ...], value: str, advertised: bool
) -> None:
    flags = {"strict_external_ip_validation": strict, "service_external_ip_range": ranges}
    cluster = Cluster(service(external=(value,)), advertise_external_ip=True, **flags)
    wanted = frozenset({value}) if advertised else NO
    assert cluster.table.vips == Vips(wanted, wanted)
    assert len(cluster.table.lines) == (not advertised)


def test_a_bad_address_of_a_kind_that_nobody_announces_is_not_told() -> None:
    assert Cluster(service(external=("nonsense", "203.0.113.1"))).table.lines == ()


READY = [
    ({}, True),
    ({"ready": True}, True),
    ({"ready": None, "terminating": None}, True),
    ({"ready": True, "terminating": False}, True),
    ({"ready": False}, False),
    ({"ready": False, "serving": True, "terminating": True}, False),
    ({"ready": True, "terminating": True}, False),
    ({"ready": None, "terminating": True}, False),
]


@pytest.mark.parametrize(("conditions", "counts"), READY)
def test_only_a_ready_endpoint_that_is_not_terminating_counts(conditions: dict[str, Any], counts: bool) -> None:
    cluster = Cluster(
        service(internal_traffic_policy="Local"),
        endpoint_slice("v4", "web", endpoint("10.244.1.5", **conditions)),
        advertise_cluster_ip=True,
    )
    assert cluster.advertised == ({"10.96.0.1"} if counts else NO)


def test_a_vip_is_withdrawn_when_its_last_own_endpoint_begins_to_terminate() -> None:
    other = endpoint("10.244.1.6")
    cluster = Cluster(
        service(internal_traffic_policy="Local"), endpoint_slice("v4", "web", V4, other), advertise_cluster_ip=True
    )
    ending = endpoint("10.244.1.5", ready=False, serving=True, terminating=True)
    assert cluster.put(endpoint_slice("v4", "web", ending, other)).advertised == {"10.96.0.1"}
    last = endpoint("10.244.1.6", ready=False, serving=True, terminating=True)
    assert cluster.put(endpoint_slice("v4", "web", ending, last)).advertised == NO
    assert cluster.known == CLUSTER


@pytest.mark.parametrize(
    ("one", "counts"),
    [
        (endpoint("10.0.0.1", node=None), True),
        (endpoint("10.0.0.2", "10.0.0.1", node=None), True),
        (endpoint("10.0.0.2", node=None), False),
        (endpoint("10.0.0.1", node="b"), False),
        (endpoint("2001:db8::1", node=None), False),
        (endpoint("nonsense", node=None), False),
        (endpoint("fd00:1::5"), False),
        (endpoint("nonsense"), False),
        (endpoint(), False),
    ],
)
def test_which_endpoint_is_on_this_node(one: Endpoint, counts: bool) -> None:
    cluster = Cluster(
        service(internal_traffic_policy="Local"), endpoint_slice("v4", "web", one), advertise_cluster_ip=True
    )
    assert cluster.advertised == ({"10.96.0.1"} if counts else NO)


def test_an_endpoint_without_node_name_in_ipv6_is_compared_as_an_address() -> None:
    cluster = Cluster(
        service(internal_traffic_policy="Local"),
        endpoint_slice("v6", "web", endpoint("2001:DB8:0::1", node=None), kind="IPv6"),
        advertise_cluster_ip=True,
    )
    assert cluster.advertised == {"fd00:96::1"}
    cluster.own = facts(("10.0.0.1", "2001:db8::9"))
    assert cluster.put().advertised == NO


@pytest.mark.parametrize(
    "part",
    [
        endpoint_slice("v4", "web", V4, kind="FQDN"),
        endpoint_slice("v4", "web", V4, kind="IPv6"),
        endpoint_slice("v4", "other", V4),
        endpoint_slice("v4", "", V4),
        endpoint_slice("v4", "web", V4, annotations={LEADER: ""}),
    ],
)
def test_slices_that_are_not_of_this_service_and_family(part: EndpointSlice) -> None:
    cluster = Cluster(service(internal_traffic_policy="Local"), part, advertise_cluster_ip=True)
    assert cluster.table.vips == Vips(NO, CLUSTER)


def test_several_slices_with_the_same_addresses() -> None:
    one, two = endpoint_slice("one", "web", V4), endpoint_slice("two", "web", V4)
    cluster = Cluster(service(internal_traffic_policy="Local"), one, two, advertise_cluster_ip=True)
    assert cluster.drop(one).advertised == {"10.96.0.1"}
    assert cluster.drop(two).advertised == NO


def test_a_slice_may_change_its_service() -> None:
    services = [
        service(name, ip, internal_traffic_policy="Local") for name, ip in (("x", "10.96.1.1"), ("y", "10.96.1.2"))
    ]
    cluster = Cluster(*services, endpoint_slice("s", "x", V4), advertise_cluster_ip=True)
    assert cluster.advertised == {"10.96.1.1"}
    assert cluster.put(endpoint_slice("s", "y", V4)).advertised == {"10.96.1.2"}


def test_a_slice_may_change_its_family() -> None:
    """Not through the API, but in a file."""
    cluster = Cluster(
        service(internal_traffic_policy="Local"), endpoint_slice("s", "web", V4), advertise_cluster_ip=True
    )
    assert cluster.advertised == {"10.96.0.1"}
    assert cluster.put(endpoint_slice("s", "web", V6, kind="IPv6")).advertised == {"fd00:96::1"}


@pytest.mark.parametrize("slice_first", [True, False])
def test_service_and_slice_may_come_and_go_in_any_order(slice_first: bool) -> None:
    item, part = service(internal_traffic_policy="Local"), endpoint_slice("v4", "web", V4)
    pair: list[Any] = [part, item] if slice_first else [item, part]
    cluster = Cluster(advertise_cluster_ip=True)
    for thing in pair:
        cluster.put(thing)
    assert cluster.advertised == {"10.96.0.1"}
    for thing in pair:
        cluster.drop(thing)
    assert cluster.table.vips == NO_VIPS
    cluster.put(part)
    assert cluster.table.vips == NO_VIPS
    assert cluster.put(item).advertised == {"10.96.0.1"}


def test_upstream_1917_a_service_without_slices_touches_no_other() -> None:
    """kube-router: one Service without an EndpointSlice aborts the pass, and all VIPs leave the export set."""
    cluster = Cluster(
        service("web", "10.96.0.1", internal_traffic_policy="Local"),
        endpoint_slice("v4", "web", V4),
        service("bare", "10.96.0.2", internal_traffic_policy="Local"),
        service("open", "10.96.0.3"),
        advertise_cluster_ip=True,
    )
    assert cluster.advertised == {"10.96.0.1", "10.96.0.3"}
    assert cluster.table.lines == ()


def test_upstream_1916_a_fresh_table_finds_everything_that_was_there_before() -> None:
    """kube-router: events before BGP is up are dropped, so VIPs are not announced after a restart."""
    services = {item.key: item for item in (balanced(external_traffic_policy="Local"), service("b", "10.96.0.2"))}
    slices = {
        part.key: part for part in (endpoint_slice("v4", "web", V4), endpoint_slice("v6", "web", V6, kind="IPv6"))
    }
    fresh = VipTable(settings(**EVERY_KIND))
    assert fresh.update(facts(), services, slices, None).advertised == CLUSTER | EXTERNAL | BALANCER | {"10.96.0.2"}


@pytest.mark.parametrize("last", ["deleted", "not ready", "opted out", "address gone"])
def test_upstream_1012_an_address_of_two_services_stays_while_one_wants_it(last: str) -> None:
    """kube-router (also 818, 262, 347, 334): withdrawn by one Service although another still serves it."""
    flags = {"advertise_external_ip": True}
    values: dict[str, Any] = {"external": ("192.0.2.1",), "external_traffic_policy": "Local"}
    one, two = service("one", "10.96.0.1", **values), service("two", "10.96.0.2", **values)
    cluster = Cluster(one, two, endpoint_slice("a", "one", V4), endpoint_slice("b", "two", V4), **flags)
    for item, part in ((one, "a"), (two, "b")):
        assert cluster.advertised == {"192.0.2.1"}
        match last:
            case "deleted":
                cluster.drop(item)
            case "not ready":
                cluster.put(endpoint_slice(part, item.name, endpoint("10.244.1.5", ready=False)))
            case "opted out":
                cluster.put(service(item.name, *item.cluster_ips, annotations={"advertise.externalip": "0"}, **values))
            case _:
                cluster.put(service(item.name, *item.cluster_ips))
    assert cluster.advertised == NO


def test_a_slice_event_of_one_service_does_not_withdraw_what_another_serves() -> None:
    """kube-router: a slice event of a Service without own endpoints withdraws the address until the next sync."""
    values: dict[str, Any] = {"external": ("192.0.2.1",), "external_traffic_policy": "Local"}
    cluster = Cluster(
        service("one", "10.96.0.1", **values),
        service("two", "10.96.0.2", **values),
        endpoint_slice("a", "one", V4),
        advertise_external_ip=True,
    )
    assert cluster.put(endpoint_slice("b", "two", endpoint("10.244.2.5", node="b"))).advertised == {"192.0.2.1"}


def test_the_last_slice_of_a_live_service_may_be_deleted() -> None:
    """kube-router ignores the deletion of slices until its next sync."""
    part = endpoint_slice("v4", "web", V4)
    cluster = Cluster(service(internal_traffic_policy="Local"), part, advertise_cluster_ip=True)
    assert cluster.drop(part) == Vips(NO, CLUSTER)


def test_what_changes_no_address_gives_the_same_object() -> None:
    many = [endpoint(f"10.244.1.{number % 250}", node="b") for number in range(999)]
    local = service(internal_traffic_policy="Local")
    cluster = Cluster(local, endpoint_slice("v4", "web", V4, *many), advertise_cluster_ip=True)
    vips = cluster.table.vips
    assert cluster.put(local) is vips
    assert cluster.put(endpoint_slice("v4", "web", V4, *many)) is vips
    assert cluster.put(endpoint_slice("v4", "web", *many, V4)) is vips
    assert cluster.put(endpoint_slice("more", "web", V4)) is vips
    assert cluster.put(service(internal_traffic_policy="Local", labels={"x": "y"})) is vips
    assert cluster.put(endpoint_slice("unknown", "nobody", V4)) is vips
    assert cluster.table.update(cluster.own, cluster.services, cluster.slices, None) is vips
    assert cluster.put(endpoint_slice("v4", "web", *many), endpoint_slice("more", "web")) is not vips


def test_an_event_costs_what_it_changes_and_not_what_there_is() -> None:
    """In steps of the interpreter, not in time: 5,000 Services more do not make a slice's event dearer."""

    def calls(number: int) -> int:
        cluster = Cluster(advertise_cluster_ip=True)
        cluster.put(*(service(f"s{n}", f"10.97.{n // 250}.{n % 250}") for n in range(number)))
        cluster.put(service(internal_traffic_policy="Local"))
        return counted(lambda: cluster.put(endpoint_slice("v4", "web", endpoint("10.244.2.5", node="b"), V6)))

    assert calls(2000) == calls(2)


def counted(work: Any) -> int:
    """How many Python and C functions ``work`` calls."""
    number = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return number


def test_problems_of_many_services_are_told_in_a_bounded_number_of_lines() -> None:
    cluster = Cluster(advertise_external_ip=True)
    cluster.put(*(service(f"s{number:03}", external=("x",)) for number in range(60)))
    assert len(cluster.table.lines) == 51
    assert cluster.table.lines[0] == "service shop/s000: spec.externalIPs: 'x' is not an IP address"
    assert cluster.table.lines[-1] == "10 more Services with such faults are not shown"
    assert cluster.table.problems[0].uid == "uid-s000"
    cluster.put(*(service(f"s{number:03}") for number in range(60)))
    assert cluster.table.lines == cluster.table.problems == ()


def test_without_flags_and_annotations_a_service_is_not_looked_into() -> None:
    rules = VipRules(settings())
    assert rules.of(balanced()) is VipRules(settings()).of(service("other"))


def test_families_that_are_not_enabled_are_left_out() -> None:
    flags: Mapping[str, Any] = {"enable_ipv6": False, "service_cluster_ip_range": ("10.96.0.0/12",)}
    cluster = Cluster(service(), advertise_cluster_ip=True, **flags)
    assert cluster.table.vips == Vips(frozenset({"10.96.0.1"}), frozenset({"10.96.0.1"}))
