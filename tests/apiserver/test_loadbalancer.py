"""The allocator against a real API server: addresses, families, faults, two agents; never one address twice."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.allocator import Allocator, turn_until
from support.apiserver import ApiServer

from kube_router.workers.kubeapi.apiserver import ApiError

NUMBERS = itertools.count(1)


class Shop:
    """A namespace of its own with Services of type LoadBalancer."""

    def __init__(self, server: ApiServer) -> None:
        self.server, self.namespace = server, f"shop-{next(NUMBERS)}"
        server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})

    def open(self, name: str, *families: str, policy: str = "SingleStack", **spec: Any) -> None:
        """Create a Service, or change it."""
        body = {
            "type": "LoadBalancer",
            "ports": [{"port": 80}],
            "ipFamilies": list(families or ("IPv4",)),
            "ipFamilyPolicy": policy,
            **spec,
        }
        annotations = body.pop("annotations", {})
        meta = {"name": name, "namespace": self.namespace, "annotations": annotations}
        self.server.apply({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": body})

    def patch(self, name: str, body: dict[str, Any], part: str = "") -> None:
        path = f"/api/v1/namespaces/{self.namespace}/services/{name}{part}"
        self.server.request("PATCH", path, body, content_type="application/merge-patch+json")

    def close(self, name: str) -> None:
        self.server.request("DELETE", f"/api/v1/namespaces/{self.namespace}/services/{name}")

    def status(self, name: str) -> dict[str, Any]:
        path = f"/api/v1/namespaces/{self.namespace}/services/{name}"
        return dict(self.server.request("GET", path)[1].get("status") or {})

    def addresses(self, name: str) -> list[str]:
        return [entry.get("ip") or entry["hostname"] for entry in self.status(name)["loadBalancer"].get("ingress", [])]

    def condition(self, name: str) -> tuple[str, str, str]:
        found = [item for item in self.status(name).get("conditions", []) if item["type"].startswith("kube-router.io/")]
        return (found[0]["status"], found[0]["reason"], found[0]["message"]) if found else ("", "", "")

    def clear(self) -> None:
        for item in self.server.request("GET", f"/api/v1/namespaces/{self.namespace}/services")[1]["items"]:
            self.close(item["metadata"]["name"])


@pytest.fixture
def shop(apiserver: ApiServer) -> Iterator[Shop]:
    found = Shop(apiserver)
    yield found
    found.clear()


@pytest.fixture
def namespace(shop: Shop) -> str:
    """The Lease's namespace: one of its own for each test."""
    return shop.namespace


def test_addresses_of_both_families_and_a_condition(
    apiserver: ApiServer, shop: Shop, namespace: str, tmp_path: Path
) -> None:
    shop.open("four")
    shop.open("six", "IPv6")
    shop.open("both", "IPv4", "IPv6", policy="RequireDualStack")
    shop.open("other", loadBalancerClass="example.com/other")
    shop.open("inside", type="ClusterIP")
    with Allocator(apiserver, tmp_path, "a", namespace) as allocator:
        turn_until(lambda: all(shop.addresses(name) for name in ("four", "six", "both")), allocator)
        assert [text.count(".") for text in shop.addresses("both")] == [3, 0]
        assert shop.addresses("six")[0].startswith("2001:db8:5::")
        assert shop.condition("both") == ("True", "Allocated", "")
        assert not shop.addresses("other")
        assert not shop.addresses("inside")
        assert not shop.condition("other")[0]
        asked = len(allocator.way.asked)
        turn_until(lambda: not allocator.turn().writes and not allocator.controller._reserved, allocator)
        written = [call for call in allocator.way.asked[asked:] if call[0] == "PUT" and "/services/" in call[1]]
        assert not written, "what is done is not done again"


def test_d11_services_made_together_never_share(
    apiserver: ApiServer, shop: Shop, namespace: str, tmp_path: Path
) -> None:
    with Allocator(apiserver, tmp_path, "a", namespace) as allocator:
        turn_until(lambda: allocator.leads, allocator)
        allocator.turn()
        names = [f"web-{n}" for n in range(30)]
        for name in names:
            shop.open(name, "IPv4", "IPv6", policy="RequireDualStack")
        turn_until(lambda: all(len(shop.addresses(name)) == 2 for name in names), allocator)
        counted = Counter(text for name in names for text in shop.addresses(name))
        assert set(counted.values()) == {1}
        assert "192.0.2.0" not in counted
        assert "2001:db8:5::" not in counted


def test_exhausted_then_released(apiserver: ApiServer, shop: Shop, namespace: str, tmp_path: Path) -> None:
    with Allocator(apiserver, tmp_path, "a", namespace, loadbalancer_ip_range=("192.0.2.8/30",)) as allocator:
        shop.open("one")
        shop.open("two")
        turn_until(lambda: bool(shop.addresses("one") and shop.addresses("two")), allocator)
        shop.open("three")
        turn_until(lambda: shop.condition("three")[1] == "AddressesExhausted", allocator)
        assert allocator.outcome.counts["loadbalancer_services_waiting"] == 1
        freed = shop.addresses("one")
        shop.close("one")
        turn_until(lambda: shop.addresses("three") == freed, allocator)
        assert shop.condition("three") == ("True", "Allocated", "")


def test_requested_addresses(apiserver: ApiServer, shop: Shop, namespace: str, tmp_path: Path) -> None:
    with Allocator(apiserver, tmp_path, "a", namespace) as allocator:
        shop.open("field", loadBalancerIP="192.0.2.40")
        turn_until(lambda: shop.addresses("field") == ["192.0.2.40"], allocator)
        shop.open("note", annotations={"kube-router.io/loadbalancer-ip": "192.0.2.40"})
        turn_until(lambda: shop.condition("note")[1] == "LoadBalancerIPInUse", allocator)
        assert not shop.addresses("note")
        assert f"service {shop.namespace}/field" in shop.condition("note")[2]
        shop.patch("field", {"spec": {"loadBalancerIP": "192.0.2.41"}})
        turn_until(lambda: shop.addresses("field") == ["192.0.2.41"], allocator)
        turn_until(lambda: shop.addresses("note") == ["192.0.2.40"], allocator)


def test_what_another_controller_gave_stays(apiserver: ApiServer, shop: Shop, namespace: str, tmp_path: Path) -> None:
    shop.open("web")
    shop.patch("web", {"status": {"loadBalancer": {"ingress": [{"hostname": "lb.example.com"}]}}}, "/status")
    with Allocator(apiserver, tmp_path, "a", namespace) as allocator:
        turn_until(lambda: shop.condition("web")[1] == "ServedByAnother", allocator)
        assert shop.addresses("web") == ["lb.example.com"]
        assert any("lb.example.com" in notice.text for notice in allocator.turn().notices) or allocator.outcome.warnings


def test_a_storm_of_conflicts_ends_in_one_address(
    apiserver: ApiServer, shop: Shop, namespace: str, tmp_path: Path
) -> None:
    shop.open("web")
    storms = iter(range(5))

    def disturb(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("/services/web/status") and (number := next(storms, None)) is not None:
            shop.patch("web", {"metadata": {"labels": {"storm": str(number)}}})

    with Allocator(apiserver, tmp_path, "a", namespace) as allocator:
        allocator.way.before = disturb
        turn_until(lambda: bool(shop.addresses("web")), allocator)
        assert next(storms, None) is None, "the storm was over before it began"
        assert len(shop.addresses("web")) == 1


def test_a_write_whose_answer_is_lost_is_not_repeated_with_another_address(
    apiserver: ApiServer, shop: Shop, namespace: str, tmp_path: Path
) -> None:
    shop.open("web")
    lost = []

    def lose(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("/services/web/status") and not lost:
            lost.append(shop.addresses("web"))
            raise ApiError("the answer is lost")

    with Allocator(apiserver, tmp_path, "a", namespace) as allocator:
        allocator.way.after = lose
        turn_until(lambda: bool(lost), allocator)
        assert any(failure.phase == "loadbalancer-write" for failure in allocator.outcome.failures)
        shop.open("next")
        turn_until(lambda: bool(shop.addresses("next")) and not allocator.outcome.failures, allocator)
        assert shop.addresses("web") == lost[0]
        assert shop.addresses("next") != lost[0]


def test_one_leads_and_the_next_takes_over(apiserver: ApiServer, shop: Shop, namespace: str, tmp_path: Path) -> None:
    with Allocator(apiserver, tmp_path, "b", namespace) as second:
        with Allocator(apiserver, tmp_path, "a", namespace) as first:
            turn_until(lambda: first.leads or second.leads, first, second)
            shop.open("web")
            turn_until(lambda: bool(shop.addresses("web")), first, second)
            assert first.leads != second.leads
            if second.leads:
                first.die()  # nothing to hand over: the other one goes on
        turn_until(lambda: second.leads, second)
        shop.open("next")
        turn_until(lambda: bool(shop.addresses("next")), second)
        assert shop.addresses("next") != shop.addresses("web")


def test_a_dead_leader_is_replaced_and_its_last_write_respected(
    apiserver: ApiServer, shop: Shop, namespace: str, tmp_path: Path
) -> None:
    """D15. The second hears nothing of the watch: it must learn by itself what the first gave out."""
    shop.open("web")
    shop.open("later", loadBalancerClass="example.com/later")
    with Allocator(apiserver, tmp_path, "a", namespace) as first:
        turn_until(lambda: first.leads, first)
        with Allocator(apiserver, tmp_path, "b", namespace) as second:
            second.turn()
            shop.open("late", annotations={})
            turn_until(lambda: "late" in str(second.follower.objects("services")), second)
            second.deaf = True
            turn_until(lambda: bool(shop.addresses("web") and shop.addresses("late")), first)
            shop.close("late")
            first.die()
            turn_until(lambda: second.leads, second, seconds=40)
            second.turn()
            held = shop.addresses("web")
            second.deaf = False
            shop.open("fresh")
            turn_until(lambda: bool(shop.addresses("fresh")), second)
            assert shop.addresses("web") == held
            assert shop.addresses("fresh") != held


def test_no_write_after_the_lease_is_lost_in_the_middle(
    apiserver: ApiServer, shop: Shop, namespace: str, tmp_path: Path
) -> None:
    with Allocator(apiserver, tmp_path, "a", namespace) as first:
        turn_until(lambda: first.leads, first)
        first.turn()

        def lose_lease(method: str, path: str) -> None:
            if method == "GET" and path.endswith("/services/web"):
                first.controller._lease._election.resign()

        first.way.after = lose_lease
        first.controller._lease._stopping.set()  # it does not win it again meanwhile
        first.controller._lease._thread.join()
        shop.open("web")
        turn_until(lambda: ("GET", f"/api/v1/namespaces/{namespace}/services/web") in first.way.asked, first)
        first.turn()
        assert not shop.addresses("web")
        assert not [call for call in first.way.asked if call[0] == "PUT" and "/services/" in call[1]]


def test_without_the_right_to_write_it_says_so_and_goes_on(
    apiserver: ApiServer, shop: Shop, namespace: str, tmp_path: Path
) -> None:
    shop.open("web")
    refusing = threading.Event()
    refusing.set()

    def refuse(method: str, path: str) -> None:
        if refusing.is_set() and method == "PUT" and "/services/" in path:
            raise ApiError("403 Forbidden: no", status=403)

    with Allocator(apiserver, tmp_path, "a", namespace) as allocator:
        allocator.way.before = refuse
        turn_until(lambda: bool(allocator.outcome.failures), allocator)
        assert f"service {shop.namespace}/web: its status cannot be written" in allocator.outcome.failures[0].text
        refusing.clear()
        turn_until(lambda: bool(shop.addresses("web")), allocator)


def test_a_server_that_is_away_is_a_warning(apiserver: ApiServer, shop: Shop, namespace: str, tmp_path: Path) -> None:
    away = threading.Event()

    def cut(method: str, path: str) -> None:
        if away.is_set():
            raise ApiError("Kubernetes API: connection refused")

    with Allocator(apiserver, tmp_path, "a", namespace) as allocator:
        turn_until(lambda: allocator.leads, allocator)
        allocator.way.before = cut
        away.set()
        deadline = time.monotonic() + 10
        while not any("Lease" in text for text in allocator.turn().warnings):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        away.clear()
        shop.open("web")
        turn_until(lambda: bool(shop.addresses("web")), allocator)
        turn_until(lambda: not allocator.outcome.warnings, allocator)
