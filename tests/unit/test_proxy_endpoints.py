"""Which endpoints of a Service's slices may be used: conditions, policies, hints, merging; and what is bad in them."""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec
import pytest
from support.proxyworld import NODE, OTHER_NODE, endpoint, pods, slices

from kube_router.ipc.messages import Endpoint, EndpointPort, EndpointSlice
from kube_router.workers.model import Family
from kube_router.workers.proxy.endpoints import Place, Selected, canonical, select
from kube_router.workers.proxy.model import PoolKey, PortKey, Scope

V4, V6 = Family.IPV4, Family.IPV6
HTTP = PortKey("shop/web", "http", "tcp")
LOST = OTHER_NODE


def pool(scope: Scope = Scope.CLUSTER, family: Family = V4, owner: PortKey = HTTP) -> PoolKey:
    return PoolKey(owner, family, scope)


def chosen(*items: EndpointSlice, scope: Scope = Scope.CLUSTER, zone: str = "", **options: Any) -> list[str]:
    """The last bytes of the IPv4 endpoints."""
    found = selected(*items, keys=(pool(scope),), zone=zone, **options).pools[pool(scope)]
    return [item.address.rpartition(".")[2] for item in found]


def selected(*items: EndpointSlice, keys: tuple[PoolKey, ...] = (), zone: str = "", always: bool = False) -> Selected:
    return select(items, keys, Place(NODE, zone), always=always)


def state(number: int, where: str, ready: bool | None, serving: bool | None, terminating: bool | None) -> Endpoint:
    return endpoint(f"10.1.0.{number}", where, ready=ready, serving=serving, terminating=terminating)


CONDITIONS = [
    # ready, serving, terminating: ready | leaving | not
    (True, True, False, "ready"),
    (True, None, None, "ready"),
    (None, None, None, "ready"),
    (None, True, None, "ready"),
    (True, True, True, "ready"),  # the control plane says so where what is not ready is published
    (False, True, True, "leaving"),
    (None, True, True, "leaving"),
    (False, False, True, "not"),
    (False, None, True, "not"),
    (None, None, True, "not"),
    (False, False, False, "not"),
    (False, True, False, "not"),
    (False, None, None, "not"),
]


@pytest.mark.parametrize(("ready", "serving", "terminating", "kind"), CONDITIONS)
def test_conditions(ready: bool | None, serving: bool | None, terminating: bool | None, kind: str) -> None:
    one = state(1, NODE, ready, serving, terminating)
    assert chosen(*slices("web", [one])) == ([] if kind == "not" else ["1"])
    beside_ready = chosen(*slices("web", [one, *pods(2)]))
    assert beside_ready == (["1", "2"] if kind == "ready" else ["2"])
    assert chosen(*slices("web", [one]), always=True) == ["1"]


@pytest.mark.parametrize(
    ("states", "everywhere", "local"),
    [
        # (where, ready, serving, terminating) numbered from 1
        ([(NODE, True, True, False), (LOST, True, True, False)], "12", "1"),
        ([(LOST, True, True, False)], "1", ""),
        ([(NODE, False, True, True), (LOST, True, True, False)], "2", "1"),
        ([(NODE, False, True, True), (LOST, False, True, True)], "12", "1"),
        ([(NODE, False, False, True), (LOST, True, True, False)], "2", ""),
        ([(NODE, True, True, False), (NODE, False, True, True)], "1", "1"),
        ([(None, True, True, False)], "1", ""),
    ],
)
def test_terminating_endpoints_serve_only_where_no_ready_one_does(
    states: list[tuple[Any, ...]], everywhere: str, local: str
) -> None:
    items = slices("web", [state(number, *one) for number, one in enumerate(states, 1)])
    assert "".join(chosen(*items)) == everywhere
    assert "".join(chosen(*items, scope=Scope.LOCAL)) == local


@pytest.mark.parametrize(
    ("hints", "zone", "used"),
    [
        (["a", "b"], "a", "1"),
        (["a", "b"], "b", "2"),
        (["a", "b"], "c", "12"),
        (["a", "b"], "", "12"),
        (["a", ""], "a", "12"),
        (["a,b", "b"], "b", "12"),
        (["a,b", "b"], "a", "1"),
    ],
)
def test_hints_count_when_they_are_complete_and_know_this_zone(hints: list[str], zone: str, used: str) -> None:
    items = [
        endpoint(f"10.1.0.{number}", NODE, hint_zones=tuple(filter(None, text.split(","))))
        for number, text in enumerate(hints, 1)
    ]
    assert "".join(chosen(*slices("web", items), zone=zone)) == used
    assert "".join(chosen(*slices("web", items), zone=zone, scope=Scope.LOCAL)) == "12", "no hint crosses policy Local"


def test_hints_of_endpoints_that_are_not_ready_do_not_count() -> None:
    items = [
        endpoint("10.1.0.1", NODE, hint_zones=("a",)),
        endpoint("10.1.0.2", NODE, hint_zones=("b",)),
        endpoint("10.1.0.3", NODE, ready=False),
    ]
    assert chosen(*slices("web", items), zone="a") == ["1"]


def test_slices_are_merged_and_an_endpoint_of_two_counts_once_with_its_best_condition() -> None:
    leaving = state(1, NODE, False, True, True)
    one = slices("web", [leaving, *pods(2)], suffix="a")
    other = slices("web", [state(1, NODE, True, True, False), *pods(3)], suffix="b")
    for items in ((*one, *other), (*other, *one)):
        assert chosen(*items) == ["1", "2", "3"]


def test_a_port_is_found_by_name_and_protocol_and_may_differ_from_slice_to_slice() -> None:
    old = slices("web", pods(1), EndpointPort(name="http", port=8080), EndpointPort(name="dns", port=53), suffix="a")
    new = slices("web", pods(2), EndpointPort(name="http", port=9090), suffix="b")
    udp = slices("web", pods(3), EndpointPort(name="http", port=8080, protocol="UDP"), suffix="c")
    found = selected(*old, *new, *udp, keys=(pool(), pool(owner=PortKey("shop/web", "http", "udp"))))
    assert [(item.address, item.port) for item in found.pools[pool()]] == [("10.1.0.1", 8080), ("10.1.0.2", 9090)]
    assert [item.address for item in found.pools[pool(owner=PortKey("shop/web", "http", "udp"))]] == ["10.1.0.3"]


def test_a_port_without_a_name_belongs_to_a_service_port_without_one() -> None:
    key = pool(owner=PortKey("shop/web", "", "tcp"))
    found = selected(*slices("web", pods(1), EndpointPort(port=8080)), keys=(key, pool()))
    assert [item.port for item in found.pools[key]] == [8080]
    assert found.pools[pool()] == ()


def test_families_are_apart() -> None:
    found = selected(*slices("web", pods(1)), keys=(pool(), pool(family=V6)))
    assert {item.address for item in found.pools[pool()]} == {"10.1.0.1"}
    assert {item.address for item in found.pools[pool(family=V6)]} == {"fd00:1::1"}


def test_a_headless_slice_and_one_of_names_are_left_alone() -> None:
    assert chosen(*slices("web", pods(1), labels={"service.kubernetes.io/headless": ""})) == []
    assert chosen(*slices("web", pods(1), address_type="FQDN")) == []


@pytest.mark.parametrize(
    ("address", "family"),
    [
        ("10.1.0.300", V4),
        ("fd00:1::1", V4),
        ("10.1.0.1", V6),
        ("::ffff:10.1.0.1", V6),
        ("127.0.0.1", V4),
        ("fe80::1", V6),
    ],
)
def test_a_bad_address_costs_itself_and_is_told(address: str, family: Family) -> None:
    items = (endpoint(address), *(item for item in pods(7) if (":" in item.addresses[0]) == (family is V6)))
    made = slices("web", items)[0 if family is V4 else 1]
    item = msgspec.structs.replace(made, endpoints=items)
    found = selected(item, keys=(pool(family=family),))
    assert [one.address[-1] for one in found.pools[pool(family=family)]] == ["7"]
    assert [problem.text for problem in found.problems] == [
        f"endpointslice {item.key}: endpoints.addresses: {address!r} is no {family} address of a pod; not used"
    ]


@pytest.mark.parametrize(
    ("port", "rule"),
    [
        (EndpointPort(name="http", port=None), "ports.port: None of port 'http' stands for all ports; not used"),
        (EndpointPort(name="http", port=0), "ports.port: 0 is no port; not used"),
        (EndpointPort(name="http", port=8080, protocol="X"), "ports.protocol: 'X' is none of TCP, UDP, SCTP; not used"),
    ],
)
def test_a_bad_port_costs_itself_and_is_told(port: EndpointPort, rule: str) -> None:
    item = slices("web", pods(1), port, EndpointPort(name="other", port=1))[0]
    other = pool(owner=PortKey("shop/web", "other", "tcp"))
    found = selected(item, keys=(pool(), other))
    assert found.pools[pool()] == () and len(found.pools[other]) == 1
    assert [problem.text for problem in found.problems] == [f"endpointslice {item.key}: {rule}"]


def test_addresses_are_canonical() -> None:
    item = slices("web", [endpoint("FD00:1:0::5")])[1]
    assert [one.address for one in selected(item, keys=(pool(family=V6),)).pools[pool(family=V6)]] == ["fd00:1::5"]


@pytest.mark.parametrize(
    ("count", "conditions", "local"),
    [(0, {}, 0), (1, {}, 1), (200, {}, 200), (3, {"ready": False, "serving": True, "terminating": True}, 0)],
)
def test_health_checks_count_each_ready_pod_of_this_node_once(
    count: int, conditions: dict[str, Any], local: int
) -> None:
    ports = (EndpointPort(name="http", port=8080), EndpointPort(name="dns", port=53))
    here, there = pods(*range(1, count + 1), **conditions), pods(*range(1, 9), where=OTHER_NODE)
    assert selected(*slices("web", [*here, *there], *ports)).local == local


@pytest.mark.parametrize(
    "text",
    [
        *(
            "10.1.0.1",
            "1.2.3.4",
            "223.255.255.255",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "0.0.0.0",
            "127.0.0.1",
        ),
        *("169.254.0.1", "169.25.0.1", "01.2.3.4", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1.2.3.٤"),
        *("fd00::1", "fd00:1:2:3:4:5:6:7", "fd00:0:1::1", "fd00::0:1", "fd00:1:2:3:4:5::7", "fd00:1:2:3:4::7", "::1"),
        *("fd00:1:2:3:4:5:6::", "fd00::", "::", "fd00::1::2", "FD00::1", "fd00::01", "fe80::1", "ff02::1", "febf::1"),
        *("fec0::1", "fd00:1::2:3:4:5:6", "fd00:1::2:3:4:5:6:7", "::ffff:10.0.0.1", "fd00::10.0.0.1", "fd00::1%eth0"),
        *("", "x", "10.1.0.1/32", "fd00:1:0:0:2::1", "fd00::1:0:0:1"),
    ],
)
def test_an_address_is_canonical_by_the_short_way_as_by_the_long_one(text: str) -> None:
    for family in Family:
        assert canonical(text, family) == plainly(text, family)


def plainly(text: str, family: Family) -> str | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id:
            return None
        address = address.ipv4_mapped or address
    bad = address.is_unspecified or address.is_loopback or address.is_link_local or address.is_multicast
    return None if bad or address.version != family else str(address)
