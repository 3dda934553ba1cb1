"""Which learned routes are injected, and how the injected ones follow what is learned; on the fake kernel."""

from __future__ import annotations

import errno
import ipaddress
import itertools

import pytest
from support.fake_kernel import FakeKernel, FakeRoutes, TableEntry

from kube_router.workers.kernel.routes import KernelRoute
from kube_router.workers.linkfacts import LOOPBACK, Link, Links
from kube_router.workers.model import Family
from kube_router.workers.nodefacts import NodeFacts
from kube_router.workers.routefacts import ActualRoutes, Prefix, Route, RoutePlan, Stray
from kube_router.workers.router.routes import (
    Injection,
    Surroundings,
    decide,
    plan_routes,
    refusals,
    surroundings,
)
from kube_router.workers.router.routesync import RouteSync
from kube_router.workers.settings import Settings


def own() -> NodeFacts:
    addresses = (ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("fd00::1"))
    cidrs = (ipaddress.ip_network("10.244.1.0/24"), ipaddress.ip_network("fd00:244:1::/64"))
    return NodeFacts("n1", "", addresses[0], addresses, cidrs, None, ())


def links(*texts: str, kind: str = "") -> Links:
    return Links((Link(2, "eth0", kind=kind, up=True, addresses=tuple(map(ipaddress.ip_interface, texts))),))


DUAL_STACK = Settings(enable_ipv6=True, enable_overlay=False)
AROUND = surroundings(own(), links("10.0.0.1/24", "fd00::1/64"), DUAL_STACK)


@pytest.mark.parametrize(
    ("prefix", "hop"),
    [
        ("10.244.2.0/24", "10.0.0.2"),
        ("fd00:244:2::/64", "fd00::2"),
        ("203.0.113.7/32", "10.0.0.2"),
        ("10.244.0.0/16", "10.0.0.2"),  # wider than the own pod CIDR: the own one is narrower and wins
        ("10.0.0.0/8", "10.0.0.2"),  # wider than the own subnet
        ("10.0.0.128/25", "10.0.0.2"),  # a part of the own subnet without the own address
        ("fd00::/16", "fd00::2"),
    ],
)
def test_a_next_hop_on_an_own_subnet_is_injected_directly(prefix: str, hop: str) -> None:
    assert decide(prefix, hop, AROUND) == (Injection.DIRECT, Prefix(prefix), Route(hop), "", "")


@pytest.mark.parametrize(
    ("prefix", "hop", "reason"),
    [
        ("0.0.0.0/0", "10.0.0.2", "a default route is never injected"),
        ("::/0", "fd00::2", "a default route is never injected"),
        ("10.244.2.0/24", "192.0.2.1", "next hop 192.0.2.1 is on no subnet of this node's addresses"),
        ("fd00:244:2::/64", "2001:db8::1", "next hop 2001:db8::1 is on no subnet of this node's addresses"),
        ("10.244.2.0/24", "10.0.0.1", "next hop 10.0.0.1 is on no subnet"),
        ("10.244.2.0/24", "fd00::2", "its next hop is of another family"),
        ("fd00:244:2::/64", "10.0.0.2", "its next hop is of another family"),
        ("10.244.1.0/24", "10.0.0.2", "it is inside this node's own pod CIDR"),
        ("10.244.1.7/32", "10.0.0.2", "it is inside this node's own pod CIDR"),
        ("fd00:244:1::7/128", "fd00::2", "it is inside this node's own pod CIDR"),
        ("10.0.0.0/24", "10.0.0.2", "it would take this node's own address away"),
        ("10.0.0.1/32", "10.0.0.2", "it would take this node's own address away"),
        ("fd00::/64", "fd00::2", "it would take this node's own address away"),
        ("127.0.0.0/16", "10.0.0.2", "not a range for unicast routes"),
        ("224.0.0.0/8", "10.0.0.2", "not a range for unicast routes"),
        ("fe80::/64", "fd00::2", "not a range for unicast routes"),
        ("rubbish", "10.0.0.2", "not understood: 'rubbish' does not appear to be an IPv4 or IPv6 network"),
        ("10.244.2.0/24", "", "not understood: '' does not appear to be an IPv4 or IPv6 address"),
    ],
)
def test_what_is_not_injected_has_a_reason(prefix: str, hop: str, reason: str) -> None:
    decision = decide(prefix, hop, AROUND)
    assert (decision.injection, decision.route) == (Injection.NONE, None)
    assert decision.reason.startswith(reason)


def test_a_disabled_family_is_not_injected() -> None:
    around = surroundings(own(), links("10.0.0.1/24", "fd00::1/64"), Settings(enable_overlay=False))
    assert decide("fd00:244:2::/64", "fd00::2", around).reason == "IPv6 is not enabled"


@pytest.mark.parametrize("found", [links("10.0.0.1/32", "fd00::1/128"), links("10.0.0.1/24", kind=LOOPBACK), Links()])
def test_host_addresses_and_loopback_make_no_subnet(found: Links) -> None:
    assert surroundings(own(), found, DUAL_STACK).subnets == ()


def test_refusals_are_a_line_a_reason() -> None:
    decisions = [
        decide("10.7.0.0/16", "192.0.2.1", AROUND),
        decide("10.8.0.0/16", "192.0.2.1", AROUND),
        decide("0.0.0.0/0", "10.0.0.2", AROUND),
        decide("10.9.0.0/16", "10.0.0.2", AROUND),
    ]
    assert refusals(decisions) == [
        "route 0.0.0.0/0: not injected: a default route is never injected",
        "2 routes, first 10.7.0.0/16: not injected: next hop 192.0.2.1 is on no subnet of this node's addresses, and "
        "the overlay is off",
    ]


A, B, C = Prefix("10.1.0.0/16"), Prefix("10.2.0.0/16"), Prefix("fd03::/64")


def test_a_plan_says_what_it_does_in_order() -> None:
    actual = ActualRoutes({B: Route("10.0.0.9"), C: Route("fd00::2")}, (Stray(A, 7, "10.0.0.2"),))
    plan = plan_routes(actual, {A: Route("10.0.0.2"), B: Route("10.0.0.2")}, [C])
    assert str(plan).splitlines() == [
        "route add 10.1.0.0/16 via 10.0.0.2 proto 17",
        "route replace 10.2.0.0/16 via 10.0.0.2 proto 17",
        "route delete fd03::/64 proto 17",
        "route delete 10.1.0.0/16 metric 7 proto 17",
    ]
    assert plan_routes(actual, {}, [C], hold=True) == RoutePlan()


def test_ours_yields_to_a_foreign_route() -> None:
    actual = ActualRoutes({B: Route("10.0.0.2")}, foreign=frozenset({A, B}))
    assert plan_routes(actual, {A: Route("10.0.0.2")}, []) == RoutePlan(delete=(B,))


def fake() -> tuple[FakeKernel, FakeRoutes]:
    kernel = FakeKernel()
    kernel.connect("10.0.0.0/24")
    kernel.connect("fd00::/64")
    return kernel, FakeRoutes(kernel)


def test_law_3_the_order_of_events_does_not_matter() -> None:
    """Learn, change, withdraw, a foreign route comes: every order ends in the same table as one full compare."""
    events = [
        ("10.1.0.0/16", "10.0.0.2"),
        ("10.1.0.0/16", None),
        ("10.2.0.0/16", "10.0.0.3"),
        ("fd03::/64", "fd00::2"),
    ]
    for order in itertools.permutations(events):
        kernel, driver = fake()
        kernel.table.append(TableEntry(B, 5, 4, "10.0.0.7"))
        sync, learned = RouteSync(driver), {"10.1.0.0/16": "10.0.0.9"}
        sync.sync(learned, None, AROUND)
        for prefix, hop in order:
            learned.pop(prefix, None)
            if hop:
                learned[prefix] = hop
            sync.sync(learned, {prefix}, AROUND)
        other, other_driver = fake()
        other.table.append(TableEntry(B, 5, 4, "10.0.0.7"))
        RouteSync(other_driver).sync(learned, None, AROUND)
        assert sorted(map(repr, kernel.table)) == sorted(map(repr, other.table)), order


def test_a_foreign_route_heard_of_before_ours_is_learned_is_not_shadowed() -> None:
    """Of another metric, the kernel would take ours beside it, and prefer it."""
    kernel, driver = fake()
    sync = RouteSync(driver)
    sync.sync({}, None, AROUND)
    kernel.table.append(TableEntry(A, 5, 4, "10.0.0.7"))
    event = KernelRoute(A, Family.IPV4, 254, 4, 5, "10.0.0.7", False)
    assert not sync.concerns(event, gone=False)
    done = sync.sync({"10.1.0.0/16": "10.0.0.2"}, {"10.1.0.0/16"}, AROUND)
    assert (done.added, done.not_injected) == (0, 1)
    kernel.table.pop()
    assert sync.concerns(event, gone=True)
    assert sync.sync({"10.1.0.0/16": "10.0.0.2"}, frozenset(), AROUND).added == 1


def test_one_change_is_one_write_and_no_change_none() -> None:
    _, driver = fake()
    sync = RouteSync(driver)
    learned = {f"10.1.{number}.0/24": "10.0.0.2" for number in range(100)}
    sync.sync(learned, None, AROUND)
    assert driver.writes == 100
    learned["10.1.7.0/24"] = "10.0.0.3"
    sync.sync(learned, {"10.1.7.0/24"}, AROUND)
    sync.sync(learned, frozenset(), AROUND)
    sync.sync(learned, None, AROUND, observe=True)
    assert driver.writes == 101


def test_law_5_a_refused_route_stays_dirty_and_stops_no_other() -> None:
    kernel, driver = fake()
    around = Surroundings(
        (*AROUND.subnets, (ipaddress.ip_address("172.16.0.1"), ipaddress.ip_network("172.16.0.0/24"))),
        (),
        tuple(Family),
    )
    sync = RouteSync(driver)
    learned = {"10.1.0.0/16": "172.16.0.2", "10.2.0.0/16": "10.0.0.2"}
    done = sync.sync(learned, None, around)
    assert [failure.text for failure in done.failures] == ["add 10.1.0.0/16 via 172.16.0.2: Network is unreachable"]
    assert (done.added, done.synced) == (1, 1)
    kernel.connect("172.16.0.0/24")
    assert sync.sync(learned, frozenset(), around).added == 1


def test_held_deletions_happen_when_they_are_no_longer_held() -> None:
    kernel, driver = fake()
    sync = RouteSync(driver)
    sync.sync({"10.1.0.0/16": "10.0.0.2"}, None, AROUND)
    assert sync.sync({}, {"10.1.0.0/16"}, AROUND, hold_deletions=True).removed == 0
    assert any(entry.protocol == 17 for entry in kernel.table)
    assert sync.sync({}, frozenset(), AROUND).removed == 1
    assert not any(entry.protocol == 17 for entry in kernel.table)


def test_an_error_while_applying_makes_the_next_sync_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, driver = fake()
    sync = RouteSync(driver)

    def fail(plan: RoutePlan) -> None:
        raise OSError(errno.ENOBUFS, "lost")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "apply", fail)
        with pytest.raises(OSError, match="lost"):
            sync.sync({"10.1.0.0/16": "10.0.0.2"}, None, AROUND)
    kernel.table.append(TableEntry(A, 0, 17, "10.0.0.2"))  # it had got through all the same
    assert sync.sync({"10.1.0.0/16": "10.0.0.2"}, frozenset(), AROUND).added == 0


def test_a_change_of_surroundings_decides_everything_anew() -> None:
    kernel, driver = fake()
    sync = RouteSync(driver)
    learned = {"10.1.0.0/16": "10.0.0.2"}
    assert sync.sync(learned, None, Surroundings(families=tuple(Family))).not_injected == 1
    assert sync.sync(learned, frozenset(), AROUND).added == 1
    assert sync.sync(learned, frozenset(), Surroundings(families=tuple(Family))).removed == 1
    assert not any(entry.protocol == 17 for entry in kernel.table)
