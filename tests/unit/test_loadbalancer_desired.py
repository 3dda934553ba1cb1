"""What a Service is given: classes, families, requests, foreign entries, duplicates, exhaustion."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from kube_router.ipc.messages import IngressAddress, Service
from kube_router.workers.loadbalancer import desired, names
from kube_router.workers.loadbalancer.desired import Decision, Ledger, decide, held_addresses
from kube_router.workers.loadbalancer.pool import Pool, pools
from kube_router.workers.model import Family

V4, V6 = "192.0.2.0/29", "2001:db8::/125"


def service(name: str = "web", *, ingress: tuple[str, ...] = (), hostname: str = "", **fields: Any) -> Service:
    entries = tuple(IngressAddress(ip=text) for text in ingress)
    entries += (IngressAddress(hostname=hostname),) if hostname else ()
    values = {"type": "LoadBalancer", "ip_families": ("IPv4",), "ip_family_policy": "SingleStack", **fields}
    return Service(name=name, namespace="shop", uid=f"uid-{name}", ingress=entries, **values)


def asked(
    one: Service, *others: Service, ranges: tuple[str, ...] = (V4, V6), nodes: tuple[str, ...] = (), **keywords: Any
) -> Decision:
    """The decision about ``one`` in a cluster with ``others``."""
    ledger = Ledger()
    for item in (one, *others):
        ledger.record(item.key, held_addresses(item))
    ledger.close(map(ip_address, nodes))
    found: dict[Family, Pool] = pools(list(map(ip_network, ranges)), Family)
    return decide(one, found, ledger, **{"default_class": True, **keywords})


def texts(decision: Decision) -> list[str]:
    return list(map(str, decision.addresses))


BOTH = {"ip_families": ("IPv4", "IPv6"), "ip_family_policy": "RequireDualStack"}
PREFER = {**BOTH, "ip_family_policy": "PreferDualStack"}


@pytest.mark.parametrize(
    ("of_class", "default_class", "served"),
    [
        ("kube-router", True, True),
        ("kube-router", False, True),
        (None, True, True),
        ("", True, True),
        ("default", True, True),
        (None, False, False),
        ("", False, False),
        ("default", False, False),
        ("metallb", True, False),
        ("metallb", False, False),
    ],
)
def test_classes(of_class: str | None, default_class: bool, served: bool) -> None:
    assert asked(service(load_balancer_class=of_class), default_class=default_class).served is served


@pytest.mark.parametrize("of_type", ["ClusterIP", "NodePort", "ExternalName"])
def test_other_types_are_not_served(of_type: str) -> None:
    assert not asked(service(type=of_type)).served


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({}, ["192.0.2.1"]),
        ({"ip_families": ("IPv6",)}, ["2001:db8::1"]),
        (BOTH, ["192.0.2.1", "2001:db8::1"]),
        ({**BOTH, "ip_families": ("IPv6", "IPv4")}, ["2001:db8::1", "192.0.2.1"]),
        (PREFER, ["192.0.2.1", "2001:db8::1"]),
        ({"ip_families": ()}, ["192.0.2.1"]),
    ],
)
def test_an_address_for_each_family(fields: dict[str, Any], given: list[str]) -> None:
    decision = asked(service(**fields))
    assert (texts(decision), decision.changed, decision.ok, decision.text) == (given, True, True, "")


def test_what_a_service_holds_is_kept() -> None:
    decision = asked(service(ingress=("192.0.2.5",)))
    assert (texts(decision), decision.changed, decision.ok) == (["192.0.2.5"], False, True)


def test_d12_single_stack_becomes_dual_stack() -> None:
    decision = asked(service(ingress=("192.0.2.5",), **BOTH))
    assert (texts(decision), decision.changed, decision.ok) == (["192.0.2.5", "2001:db8::1"], True, True)


def test_a_family_that_the_service_gives_up_is_released() -> None:
    decision = asked(service(ingress=("192.0.2.5", "2001:db8::3")))
    assert (texts(decision), decision.changed) == (["192.0.2.5"], True)


def test_require_needs_both_families() -> None:
    decision = asked(service(**BOTH), ranges=(V4,))
    assert (texts(decision), decision.changed, decision.ok, decision.reason) == ([], False, False, "NoAddressRange")
    assert decision.text == "service shop/web: there is no IPv6 range in --loadbalancer-ip-range"


def test_prefer_is_content_with_one() -> None:
    decision = asked(service(**PREFER), ranges=(V4,))
    assert (texts(decision), decision.changed, decision.ok, decision.text) == (["192.0.2.1"], True, True, "")


def test_no_range_at_all() -> None:
    decision = asked(service(**PREFER), ranges=())
    assert (decision.changed, decision.ok, decision.reason) == (False, False, "NoAddressRange")


def test_exhausted() -> None:
    others = [service(f"s{n}", ingress=(f"192.0.2.{n}",)) for n in range(1, 7)]
    decision = asked(service(), *others)
    assert (decision.changed, decision.reason) == (False, "AddressesExhausted")
    assert decision.text == "service shop/web: no IPv4 address of --loadbalancer-ip-range is free"


def test_external_ips_and_nodes_are_never_given_out() -> None:
    other = service("other", external_ips=("192.0.2.1",), type="ClusterIP")
    assert texts(asked(service(), other, nodes=("192.0.2.2",))) == ["192.0.2.3"]


@pytest.mark.parametrize("fields", [{"hostname": "lb.example.com"}, {"ingress": ("203.0.113.9",)}])
def test_another_controllers_entry_keeps_us_away(fields: dict[str, Any]) -> None:
    decision = asked(service(**fields))
    assert (decision.changed, decision.ok, decision.reason) == (False, False, "ServedByAnother")
    entry = fields.get("hostname") or fields["ingress"][0]
    assert entry in decision.text


class TestRequestedAddress:
    def test_by_annotation(self) -> None:
        decision = asked(service(annotations={names.REQUESTED: "192.0.2.6"}))
        assert (texts(decision), decision.changed, decision.ok) == (["192.0.2.6"], True, True)

    def test_by_field(self) -> None:
        assert texts(asked(service(load_balancer_ip="192.0.2.6"))) == ["192.0.2.6"]

    def test_the_annotation_wins(self) -> None:
        one = service(load_balancer_ip="192.0.2.6", annotations={names.REQUESTED: "192.0.2.4"})
        assert texts(asked(one)) == ["192.0.2.4"]

    def test_one_a_family(self) -> None:
        one = service(annotations={names.REQUESTED: " 2001:db8::5 , 192.0.2.6"}, **BOTH)
        assert texts(asked(one)) == ["192.0.2.6", "2001:db8::5"]

    def test_of_one_family_only(self) -> None:
        one = service(annotations={names.REQUESTED: "2001:db8::5"}, **BOTH)
        assert texts(asked(one)) == ["192.0.2.1", "2001:db8::5"]

    def test_it_moves_a_service(self) -> None:
        decision = asked(service(ingress=("192.0.2.1",), load_balancer_ip="192.0.2.6"))
        assert (texts(decision), decision.changed) == (["192.0.2.6"], True)

    @pytest.mark.parametrize(
        ("text", "reason", "words"),
        [
            ("junk", "InvalidLoadBalancerIP", "'junk' is not an IP address"),
            ("192.0.2.300", "InvalidLoadBalancerIP", "'192.0.2.300' is not an IP address"),
            ("2001:db8::5", "InvalidLoadBalancerIP", "is IPv6, which the Service does not have"),
            ("192.0.2.3,192.0.2.4", "InvalidLoadBalancerIP", "is a second IPv4 address"),
            ("203.0.113.1", "InvalidLoadBalancerIP", "is not a usable address of a --loadbalancer-ip-range"),
            ("192.0.2.7", "InvalidLoadBalancerIP", "is not a usable address"),  # the broadcast address
            ("192.0.2.2", "LoadBalancerIPInUse", "requested address 192.0.2.2 is held by service shop/other"),
            ("192.0.2.4", "LoadBalancerIPInUse", "requested address 192.0.2.4 is a node's"),
        ],
    )
    def test_refused_and_the_last_state_stays(self, text: str, reason: str, words: str) -> None:
        one = service(ingress=("192.0.2.1",), annotations={names.REQUESTED: text})
        decision = asked(one, service("other", ingress=("192.0.2.2",)), nodes=("192.0.2.4",))
        assert (texts(decision), decision.changed, decision.ok, decision.reason) == (
            ["192.0.2.1"],
            False,
            False,
            reason,
        )
        assert decision.text.startswith("service shop/web: ")
        assert words in decision.text


def test_d11_a_reservation_is_chosen_again_and_by_nobody_else() -> None:
    ledger = Ledger()
    ledger.record("shop/first", [ip_address("192.0.2.1")])
    found = pools([ip_network(V4)], Family)
    again = decide(service("first"), found, ledger, [ip_address("192.0.2.1")], default_class=True)
    second = decide(service("second"), found, ledger, default_class=True)
    assert texts(again) == ["192.0.2.1"]
    assert texts(second) == ["192.0.2.2"]


def test_a_duplicate_that_is_there_is_told_and_left() -> None:
    decision = asked(service(ingress=("192.0.2.1",)), service("other", ingress=("192.0.2.1",)))
    assert (texts(decision), decision.changed, decision.ok, decision.reason) == (
        ["192.0.2.1"], False, False, "DuplicateLoadBalancerIP",
    )  # fmt: skip
    assert decision.text == "service shop/web: its address 192.0.2.1 is also held by service shop/other"


def test_the_ledger_forgets() -> None:
    ledger = Ledger()
    address = ip_address("192.0.2.1")
    ledger.record("a/a", [address, address])
    ledger.record("b/b", [address])
    ledger.record("a/a", [])
    assert ledger.others(address, "a/a") == {"b/b"}
    ledger.record("b/b", [])
    assert address not in ledger
    assert len(ledger) == 0
    assert desired.problem(asked(service())) is None
