"""Which addresses of a Service may be used: the filter of external and load balancer IPs, value by value."""

from __future__ import annotations

from typing import Any

import pytest

from kube_router.ipc.messages import IngressAddress, Service
from kube_router.workers.serviceips import ServiceAddresses, ServiceIps, is_served
from kube_router.workers.settings import Settings

FLAGS: dict[str, Any] = {
    "enable_ipv6": True,
    "service_cluster_ip_range": ("10.96.0.0/12", "fd00:96::/112"),
    "service_external_ip_range": ("192.0.2.0/24", "2001:db8:e::/64"),
    "loadbalancer_ip_range": ("198.51.100.0/24", "2001:db8:b::/64"),
}


def rules(**flags: Any) -> ServiceIps:
    return ServiceIps(Settings(**{**FLAGS, **flags}))


def service(*external: str, ingress: tuple[IngressAddress, ...] = (), **fields: Any) -> Service:
    values: dict[str, Any] = {"type": "LoadBalancer" if ingress else "ClusterIP", "cluster_ips": ("10.96.0.1",)}
    return Service(name="web", namespace="shop", external_ips=external, ingress=ingress, **{**values, **fields})


def balanced(*entries: str | IngressAddress, **fields: Any) -> Service:
    return service(ingress=tuple(IngressAddress(ip=e) if isinstance(e, str) else e for e in entries), **fields)


def texts(found: ServiceAddresses) -> list[str]:
    return [problem.text for problem in found.problems]


@pytest.mark.parametrize(
    ("value", "accepted", "problem"),
    [
        ("192.0.2.7", "192.0.2.7", ""),
        ("2001:db8:e::7", "2001:db8:e::7", ""),
        ("2001:DB8:e:0:0::7", "2001:db8:e::7", ""),
        ("::ffff:192.0.2.7", "192.0.2.7", ""),
        ("10.96.0.9", None, "'10.96.0.9' is a cluster IP (--service-cluster-ip-range 10.96.0.0/12); not used"),
        ("fd00:96::9", None, "'fd00:96::9' is a cluster IP (--service-cluster-ip-range fd00:96::/112); not used"),
        (
            "203.0.113.1",
            None,
            "'203.0.113.1': outside of --service-external-ip-range 192.0.2.0/24,2001:db8:e::/64 "
            "(--strict-external-ip-validation)",
        ),
        ("198.51.100.1", None, "outside of --service-external-ip-range"),
        ("web.example.org", None, "'web.example.org' is not an IP address"),
        ("192.0.2.07", None, "'192.0.2.07' is not an IP address"),
        ("192.0.2.7/32", None, "'192.0.2.7/32' is not an IP address"),
        ("2001:db8:e::7%eth0", None, "'2001:db8:e::7%eth0' is not an IP address"),
        ("", None, "'' is not an IP address"),
    ],
)
def test_a_strict_external_ip_is_inside_its_range_and_no_cluster_ip(
    value: str, accepted: str | None, problem: str
) -> None:
    found = rules().external(service(value))
    assert found.accepted == ((accepted,) if accepted else ())
    if problem:
        (text,) = texts(found)
        assert text.startswith("service shop/web: spec.externalIPs: ") and problem in text
    else:
        assert found.problems == ()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "value", ["0.0.0.0", "0.1.2.3", "127.0.0.1", "169.254.1.1", "224.0.0.5", "255.255.255.255", "::", "::1", "fe80::1"]
)
def test_an_address_that_no_service_can_have_is_refused_in_every_mode(strict: bool, value: str) -> None:
    everything = ("0.0.0.0/0", "::/0")
    judge = rules(strict_external_ip_validation=strict, service_external_ip_range=everything, enable_ipv6=True)
    (text,) = texts(judge.external(service(value)))
    assert text == f"service shop/web: spec.externalIPs: {value!r} is not an address that a Service can have"


def test_strict_without_a_range_refuses_all_in_one_line() -> None:
    found = rules(service_external_ip_range=()).external(service("192.0.2.7", "2001:db8:e::7"))
    assert found.accepted == ()
    assert texts(found) == [
        "service shop/web: spec.externalIPs: '192.0.2.7', '2001:db8:e::7': not used, as --service-external-ip-range is "
        "not set (--strict-external-ip-validation)"
    ]


def test_not_strict_passes_what_parses_also_cluster_ips() -> None:
    judge = rules(strict_external_ip_validation=False, service_external_ip_range=())
    found = judge.external(service("203.0.113.1", "10.96.0.9", "nonsense", "2001:db8::1"))
    assert found.accepted == ("203.0.113.1", "10.96.0.9", "2001:db8::1")
    assert texts(found) == ["service shop/web: spec.externalIPs: 'nonsense' is not an IP address"]


def test_one_bad_value_spoils_only_itself_and_order_is_kept() -> None:
    found = rules().external(service("192.0.2.9", "bad", "192.0.2.1", "192.0.2.9", "2001:db8:e::1"))
    assert found.accepted == ("192.0.2.9", "192.0.2.1", "2001:db8:e::1")
    assert len(found.problems) == 1


@pytest.mark.parametrize(
    ("flags", "accepted"),
    [
        ({"enable_ipv6": False}, ("192.0.2.1",)),
        ({"enable_ipv4": False, "service_cluster_ip_range": ("fd00:96::/112",)}, ("2001:db8:e::1",)),
    ],
)
def test_the_other_family_is_left_out_without_a_word(flags: dict[str, Any], accepted: tuple[str, ...]) -> None:
    found = rules(**flags).external(service("192.0.2.1", "2001:db8:e::1"))
    assert found == ServiceAddresses(accepted)
    dual = service(cluster_ips=("10.96.0.1", "fd00:96::1"))
    assert rules(**flags).cluster(dual).accepted in (("10.96.0.1",), ("fd00:96::1",))


def test_load_balancer_ips_have_a_range_of_their_own() -> None:
    found = rules().load_balancer(balanced("198.51.100.1", "2001:db8:b::1", "192.0.2.1", "10.96.0.1"))
    assert found.accepted == ("198.51.100.1", "2001:db8:b::1")
    assert [text.partition(": ")[2].partition(" ")[0] for text in texts(found)] == ["status.loadBalancer.ingress:"] * 2


def test_ip_mode_and_hostname() -> None:
    entries = (
        IngressAddress(ip="198.51.100.1", ip_mode="VIP"),
        IngressAddress(ip="198.51.100.2", ip_mode="Proxy"),
        IngressAddress(hostname="lb.example.org"),
        IngressAddress(ip="198.51.100.3", ip_mode="Later"),
        IngressAddress(ip="198.51.100.4", hostname="both.example.org"),
    )
    found = rules().load_balancer(balanced(*entries))
    assert found.accepted == ("198.51.100.1", "198.51.100.4")
    assert texts(found) == [
        "service shop/web: status.loadBalancer.ingress: '198.51.100.3' has ipMode 'Later', which is not known; not used"
    ]


def test_only_a_load_balancer_has_ingress_ips() -> None:
    assert rules().load_balancer(balanced("198.51.100.1", type="NodePort")) == ServiceAddresses()
    assert rules().load_balancer(service(type="LoadBalancer")) == ServiceAddresses()


@pytest.mark.parametrize(
    "fields",
    [
        {"cluster_ips": ("None",)},
        {"cluster_ips": ()},
        {"cluster_ips": ("",)},
        {"type": "ExternalName"},
        {"type": "Nonsense"},
    ],
)
def test_headless_and_foreign_types_have_no_addresses_at_all(fields: dict[str, Any]) -> None:
    values: dict[str, Any] = {"type": "LoadBalancer", **fields}
    item = service("192.0.2.1", ingress=(IngressAddress(ip="198.51.100.1"),), **values)
    judge = rules()
    assert not is_served(item)
    assert judge.cluster(item) == judge.external(item) == judge.load_balancer(item) == ServiceAddresses()


def test_cluster_ips_need_no_range() -> None:
    item = service(cluster_ips=("172.20.0.1", "2001:db8:c::1", "x"))
    found = rules().cluster(item)
    assert found.accepted == ("172.20.0.1", "2001:db8:c::1")
    assert texts(found) == ["service shop/web: spec.clusterIPs: 'x' is not an IP address"]
