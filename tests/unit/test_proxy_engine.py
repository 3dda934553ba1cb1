"""The engine's table over time: who owns an address, what a changed object touches, health checks, zones, headless."""

from __future__ import annotations

import msgspec
import pytest
from support.proxyworld import (
    EXTERNAL,
    NODE,
    OTHER_NODE,
    SETTINGS,
    Objects,
    balanced,
    both,
    node,
    pods,
    service,
    slices,
)

from kube_router.ipc.messages import ServicePort
from kube_router.workers.model import Family
from kube_router.workers.proxy.engine import Engine
from kube_router.workers.proxy.model import Changed, Frontend, HealthCheck, PoolKey, PortKey, Scope

EARLY, LATE = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
SHARED = Frontend(Family.IPV4, "192.0.2.7", "tcp", 80)


class Turned:
    """An engine that follows objects."""

    def __init__(self, *objects: object) -> None:
        self.objects = Objects().put(node(), *objects)  # type: ignore[arg-type]
        self.engine = Engine(SETTINGS)
        self.turn()

    def turn(self) -> Changed:
        self.engine.update(self.objects.cluster(), self.objects.changes())
        return self.engine.take_changed()

    def owner(self, frontend: Frontend = SHARED) -> str | None:
        found = self.engine.table.frontends.get(frontend)
        return found.owner.service if found is not None else None

    def lines(self) -> list[str]:
        return [problem.text for _, problem in self.engine.problems()]


def claiming(name: str, created: str, number: int) -> object:
    return service(name, number, external_ips=("192.0.2.7",), created=created)


def test_the_oldest_service_owns_an_address_and_port_and_the_other_is_told() -> None:
    turned = Turned(claiming("young", LATE, 1))
    assert turned.owner() == "shop/young"
    turned.objects.put(claiming("old", EARLY, 2))
    assert turned.turn().frontends >= {SHARED}
    assert turned.owner() == "shop/old"
    line = "service shop/young: 192.0.2.7:80/tcp is not served: it belongs to the older service shop/old"
    assert turned.lines() == [line]
    turned.objects.remove("services", "shop/old")
    turned.turn()
    assert turned.owner() == "shop/young" and turned.lines() == []


def test_of_equal_age_the_name_decides_and_a_third_is_told_who_has_it_now() -> None:
    turned = Turned(*(claiming(name, EARLY, number) for number, name in enumerate("cab", 1)))
    assert turned.owner() == "shop/a"
    turned.objects.remove("services", "shop/a")
    turned.turn()
    assert turned.owner() == "shop/b"
    text = "service shop/c: 192.0.2.7:80/tcp is not served: it belongs to the older service shop/b"
    assert turned.lines() == [text]


def test_another_port_of_the_same_address_is_another_services() -> None:
    turned = Turned(claiming("one", EARLY, 1))
    ports = (ServicePort(name="https", port=443),)
    turned.objects.put(service("two", 2, *ports, external_ips=("192.0.2.7",), created=LATE))
    turned.turn()
    assert turned.owner(SHARED._replace(port=443)) == "shop/two"
    assert turned.lines() == []


def test_a_service_that_is_made_anew_is_younger_than_it_was() -> None:
    turned = Turned(claiming("one", EARLY, 1), claiming("two", LATE, 2))
    turned.objects.put(claiming("one", "2026-01-03T00:00:00Z", 1))
    turned.turn()
    assert turned.owner() == "shop/two"


def test_an_endpoint_that_changes_touches_its_pools_alone() -> None:
    turned = Turned(*(service(name, number) for number, name in enumerate("ab", 1)), *slices("a", pods(1)))
    turned.objects.put(*slices("a", pods(1, 2)))
    changed = turned.turn()
    assert not changed.frontends and not changed.everything
    assert changed.pools == {PoolKey(PortKey("shop/a", "http", "tcp"), family, Scope.CLUSTER) for family in Family}


def test_what_makes_no_difference_is_no_change() -> None:
    turned = Turned(service("a", 1), *slices("a", pods(1)))
    turned.objects.put(*slices("a", pods(1, ready=None)), service("a", 1, selector={"app": "x"}))
    assert not turned.turn()


def test_slices_may_come_before_their_service_and_stay_after_it() -> None:
    turned = Turned(*slices("a", pods(1)))
    turned.objects.put(service("a", 1))
    turned.turn()
    frontend = Frontend(Family.IPV4, "10.96.0.1", "tcp", 80)
    assert [item.address for item in turned.engine.table.endpoints(frontend, inside=True)] == ["10.1.0.1"]
    turned.objects.remove("services", "shop/a")
    turned.turn()
    assert not turned.engine.table.frontends and not turned.engine.table.pools


def test_a_slice_can_go_over_to_another_service() -> None:
    turned = Turned(service("a", 1), service("b", 2), *slices("a", pods(1)))
    moved = [msgspec.structs.replace(item, service="b") for item in slices("a", pods(1))]
    turned.objects.put(*moved)
    turned.turn()
    pools = turned.engine.table.pools
    assert {key.owner.service: len(found) for key, found in pools.items()} == {"shop/a": 0, "shop/b": 1}


def test_the_own_zone_is_followed() -> None:
    items = [*pods(1, hint_zones=("a",)), *pods(2, hint_zones=("b",))]
    turned = Turned(service("a", 1), *slices("a", items))
    frontend = Frontend(Family.IPV6, "fd00:96::1", "tcp", 80)
    assert len(turned.engine.table.endpoints(frontend, inside=True)) == 2
    turned.objects.put(node(zone="b"))
    assert turned.turn().pools
    assert [item.address for item in turned.engine.table.endpoints(frontend, inside=True)] == ["fd00:1::2"]
    turned.objects.remove("nodes", NODE)
    assert not turned.turn(), "a Node that is gone says nothing"


def test_a_health_check_port_counts_local_ready_pods_and_belongs_to_one_service() -> None:
    local = {"external_traffic_policy": "Local", "health_check_node_port": 31000}
    turned = Turned(balanced("a", 1, created=LATE, **local), *slices("a", [*pods(1, 2), *pods(1, where=OTHER_NODE)]))
    assert turned.engine.table.health == {31000: HealthCheck("shop/a", 2)}
    turned.objects.put(*slices("a", [*pods(1), *pods(2, ready=False, serving=True, terminating=True)]))
    assert turned.turn().health == {31000}
    assert turned.engine.table.health == {31000: HealthCheck("shop/a", 1)}
    turned.objects.put(balanced("b", 2, created=EARLY, **local))
    turned.turn()
    assert turned.engine.table.health == {31000: HealthCheck("shop/b", 0)}
    text = "service shop/a: spec.healthCheckNodePort: 31000 is not served: it belongs to the older service shop/b"
    assert turned.lines() == [text]
    turned.objects.remove("services", "shop/b")
    turned.turn()
    assert turned.engine.table.health == {31000: HealthCheck("shop/a", 1)}


def test_problems_of_a_service_and_its_slices_go_with_them() -> None:
    turned = Turned(service("a", 1, session_affinity="Cookie"), *slices("a", pods(1), address_type="IPv6"))
    assert len(turned.lines()) == 2, "the affinity, and an IPv4 address in a slice of IPv6"
    turned.objects.put(service("a", 1), *slices("a", pods(1)))
    turned.turn()
    assert turned.lines() == []


@pytest.mark.parametrize("created", [EARLY, ""])
def test_a_service_without_a_time_stamp_is_older_than_any_other(created: str) -> None:
    turned = Turned(claiming("b", created, 1), claiming("c", "", 2))
    assert turned.owner() == ("shop/b" if created == "" else "shop/c")


def test_external_addresses_are_frontends_of_both_families() -> None:
    turned = Turned(service("a", 1, external_ips=both(EXTERNAL, 3)))
    found = {frontend.address for frontend in turned.engine.table.frontends}
    assert found == {"10.96.0.1", "fd00:96::1", "192.0.2.3", "2001:db8:e::3"}
