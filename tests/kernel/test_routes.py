"""The route driver on the real kernel: many routes, few messages, and IPv6's own rules."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

import pytest
from support.namespaces import Namespace

from kube_router.workers.kernel.routes import RouteDriver, describe
from kube_router.workers.model import Family
from kube_router.workers.routefacts import Prefix, Route, RoutePlan
from kube_router.workers.router.routes import Surroundings
from kube_router.workers.router.routesync import RouteSync

COUNT = 10_000
AROUND = Surroundings(
    subnets=(
        (ipaddress.ip_address("10.0.0.1"), ipaddress.ip_network("10.0.0.0/24")),
        (ipaddress.ip_address("fd00::1"), ipaddress.ip_network("fd00::/64")),
    ),
    families=tuple(Family),
)


def many(hop: int = 2) -> dict[str, str]:
    """Half IPv4, half IPv6."""
    v4 = (f"{ipaddress.IPv4Address((100 << 24) + (number << 8))}/24" for number in range(COUNT // 2))
    v6 = (f"{ipaddress.IPv6Address((0x20010DB8 << 96) + (number << 64))}/64" for number in range(COUNT // 2))
    return {**dict.fromkeys(v4, f"10.0.0.{hop}"), **dict.fromkeys(v6, f"fd00::{hop}")}


@pytest.fixture
def node(netns: Namespace) -> Iterator[Namespace]:
    netns.run("ip link add eth0 type veth peer name far; ip link set far up; ip address add 10.0.0.1/24 dev eth0")
    netns.run("ip address add fd00::1/64 dev eth0 nodad; ip link set eth0 up")
    with netns.enter():
        yield netns


def count(namespace: Namespace) -> int:
    return namespace.run("ip route show proto 17; ip -6 route show proto 17").count(" via ")


def test_ten_thousand_routes_and_one_change(node: Namespace) -> None:
    driver = RouteDriver()
    sync = RouteSync(driver)
    learned = many()
    done = sync.sync(learned, None, AROUND)
    assert (done.added, done.synced, done.failures) == (COUNT, COUNT, ())
    assert count(node) == COUNT
    writes = driver.writes
    for prefix in ("100.0.7.0/24", "2001:db8:0:7::/64"):
        learned[prefix] = "10.0.0.3" if "." in prefix else "fd00::3"
    sync.sync(learned, {"100.0.7.0/24", "2001:db8:0:7::/64"}, AROUND)
    assert driver.writes == writes + 2
    shown = node.run("ip route show proto 17; ip -6 route show proto 17")
    assert (shown.count("via 10.0.0.3 "), shown.count("via fd00::3 ")) == (1, 1)
    assert RouteSync(driver).sync(learned, None, AROUND).added == 0
    assert driver.writes == writes + 2
    assert sync.sync({}, None, AROUND).removed == COUNT
    assert count(node) == 0


def test_a_link_that_goes_down_is_a_line_a_next_hop_not_a_line_a_route(node: Namespace) -> None:
    sync = RouteSync(RouteDriver())
    node.run("ip link set eth0 down")
    done = sync.sync(many(), None, AROUND)
    assert len(done.failures) == 2
    assert all(f"{COUNT // 2} routes, first" in failure.text for failure in done.failures)
    node.run("ip link set eth0 up; ip address replace fd00::1/64 dev eth0 nodad")
    assert sync.sync(many(), frozenset(), AROUND, observe=True).failures == ()
    assert count(node) == COUNT


def test_several_next_hops_of_our_protocol_are_replaced_by_one(node: Namespace) -> None:
    node.run("ip -6 route add 2001:db8::/64 proto 17 nexthop via fd00::2 nexthop via fd00::3")
    node.run("ip route add 100.0.0.0/24 proto 17 nexthop via 10.0.0.2 nexthop via 10.0.0.3")
    driver = RouteDriver()
    assert set(driver.observe().ours.values()) == {Route("")}
    done = RouteSync(driver).sync({"2001:db8::/64": "fd00::2", "100.0.0.0/24": "10.0.0.2"}, None, AROUND)
    assert (done.added, done.removed, done.failures) == (2, 0, ())
    assert count(node) == 2


def test_a_prefix_text_is_the_same_from_the_kernel_and_from_ipaddress(node: Namespace) -> None:
    prefixes = [
        "2001:db8::/32",
        "2001:db8:0:0:1::/80",
        "::ffff:1.2.3.0/120",
        "64:ff9b::/96",
        "::102:300/120",
        "2000::/3",
    ]
    wanted = {Prefix(str(ipaddress.ip_network(prefix))): Route("fd00::2") for prefix in prefixes}
    driver = RouteDriver()
    assert driver.apply(RoutePlan(add=tuple(wanted.items()))).failures == ()
    assert driver.observe().ours == wanted


def test_what_the_kernel_refuses_is_told_with_its_words(node: Namespace) -> None:
    bad = (Prefix("100.0.0.0/24"), Route("192.0.2.1")), (Prefix("2001:db8::/64"), Route("2001:db8:f::1"))
    lines = describe(RouteDriver().apply(RoutePlan(add=bad)).failures)
    assert lines == [
        "add 100.0.0.0/24 via 192.0.2.1: Nexthop has invalid gateway",
        "add 2001:db8::/64 via 2001:db8:f::1: No route to host",
    ]


def test_other_tables_are_never_seen(node: Namespace) -> None:
    node.run(
        "ip route add 100.0.0.0/24 via 10.0.0.2 proto 17 table 100; ip -6 route add 2001:db8::/64 dev eth0 table 100"
    )
    assert RouteDriver().observe().foreign == {"10.0.0.0/24", "fd00::/64", "fe80::/64"}
    assert RouteDriver().observe().ours == {}
