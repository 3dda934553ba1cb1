"""One Service and its frontends: kinds of addresses, policies, annotations; and a line for what is not understood."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.proxyworld import BALANCER, EXTERNAL, IPS, SETTINGS, balanced, both, service

from kube_router.ipc.messages import IngressAddress, Service, ServicePort
from kube_router.workers.model import Family
from kube_router.workers.proxy.model import AddressKind, Balancing, Forwarding, Frontend, PortKey, Scheduler, Scope
from kube_router.workers.proxy.services import ServicePlan, plan_service
from kube_router.workers.serviceips import ServiceIps

V4, V6 = Family.IPV4, Family.IPV6
ALL, LOCAL = Scope.CLUSTER, Scope.LOCAL
HTTP = PortKey("shop/web", "http", "tcp")
SCHEDULER, FLAGS = "kube-router.io/service.scheduler", "kube-router.io/service.schedflags"


def plan(item: Service) -> ServicePlan:
    return plan_service(item, IPS)


def lines(item: Service) -> list[str]:
    return [problem.text for problem in plan(item).problems]


def of_kind(item: Service, kind: AddressKind) -> dict[Frontend, Forwarding]:
    return {frontend: made for frontend, made in plan(item).frontends.items() if made.kind is kind}


def scopes(item: Service, kind: AddressKind) -> set[tuple[Scope, Scope]]:
    return {(made.inside, made.outside) for made in of_kind(item, kind).values()}


def test_every_kind_of_address_is_a_frontend_of_both_families() -> None:
    item = balanced("web", 1, external_ips=both(EXTERNAL, 1))
    assert {(str(frontend), made.kind) for frontend, made in plan(item).frontends.items()} == {
        ("10.96.0.1:80/tcp", AddressKind.CLUSTER),
        ("[fd00:96::1]:80/tcp", AddressKind.CLUSTER),
        ("198.51.100.1:80/tcp", AddressKind.LOAD_BALANCER),
        ("[2001:db8:b::1]:80/tcp", AddressKind.LOAD_BALANCER),
        ("192.0.2.1:80/tcp", AddressKind.EXTERNAL),
        ("[2001:db8:e::1]:80/tcp", AddressKind.EXTERNAL),
        ("IPv4 node port 30001/tcp", AddressKind.NODE_PORT),
        ("IPv6 node port 30001/tcp", AddressKind.NODE_PORT),
    }
    assert {made.owner for made in plan(item).frontends.values()} == {HTTP}
    assert not plan(item).problems


@pytest.mark.parametrize(
    ("fields", "served"),
    [
        ({}, True),
        ({"cluster_ips": ("None",)}, False),
        ({"cluster_ips": ()}, False),
        ({"type": "ExternalName"}, False),
        ({"labels": {"service.kubernetes.io/service-proxy-name": "another"}}, False),
        ({"labels": {"service.kubernetes.io/service-proxy-name": "kube-router"}}, True),
        ({"labels": {"service.kubernetes.io/headless": ""}}, False),
    ],
)
def test_which_services_are_ours(fields: dict[str, Any], served: bool) -> None:
    assert bool(plan(service(**fields)).frontends) is served


@pytest.mark.parametrize(
    ("fields", "families"),
    [
        ({}, {V4, V6}),
        ({"ip_families": ()}, {V4, V6}),
        ({"ip_families": ("IPv6",), "cluster_ips": ("fd00:96::1",)}, {V6}),
        ({"ip_families": ("IPv4",), "cluster_ips": ("10.96.0.1",)}, {V4}),
    ],
)
def test_node_ports_and_other_addresses_have_the_families_of_the_service(
    fields: dict[str, Any], families: set[Family]
) -> None:
    item = balanced("web", 1, external_ips=both(EXTERNAL, 1), **fields)
    for kind in AddressKind:
        assert {frontend.family for frontend in of_kind(item, kind)} == families
    told = lines(item)
    assert len(told) == (0 if len(families) == 2 else 2), (
        "an external and a load balancer's address of the other family"
    )
    assert all("none of the Service's families" in line for line in told)


def test_a_port_has_no_node_port_of_number_zero_and_a_cluster_ip_service_none_at_all() -> None:
    ports = (ServicePort(name="a", port=80, node_port=0), ServicePort(name="b", port=81, node_port=30081))
    item = service("web", 1, *ports, type="NodePort")
    assert {frontend.port for frontend in of_kind(item, AddressKind.NODE_PORT)} == {30081}
    assert not of_kind(service("web", 1, *ports), AddressKind.NODE_PORT)


@pytest.mark.parametrize(
    ("fields", "internal", "external"),
    [
        ({}, (ALL, ALL), (ALL, ALL)),
        ({"internal_traffic_policy": "Local"}, (LOCAL, LOCAL), (ALL, ALL)),
        ({"external_traffic_policy": "Local"}, (ALL, ALL), (ALL, LOCAL)),
        ({"internal_traffic_policy": "Local", "external_traffic_policy": "Local"}, (LOCAL, LOCAL), (ALL, LOCAL)),
        ({"internal_traffic_policy": ""}, (ALL, ALL), (ALL, ALL)),
        ({"annotations": {"kube-router.io/service.local": "true"}}, (ALL, ALL), (ALL, LOCAL)),
        (
            {"annotations": {"kube-router.io/service.local": "true"}, "internal_traffic_policy": "Local"},
            (ALL, ALL),
            (ALL, LOCAL),
        ),
        ({"annotations": {"kube-router.io/service.local": "True"}}, (ALL, ALL), (ALL, ALL)),
    ],
)
def test_traffic_policies(fields: dict[str, Any], internal: tuple[Scope, Scope], external: tuple[Scope, Scope]) -> None:
    item = balanced("web", 1, external_ips=both(EXTERNAL, 1), **fields)
    assert scopes(item, AddressKind.CLUSTER) == {internal}
    for kind in (AddressKind.NODE_PORT, AddressKind.EXTERNAL, AddressKind.LOAD_BALANCER):
        assert scopes(item, kind) == {external}, kind


@pytest.mark.parametrize(
    ("entries", "used"),
    [
        ((IngressAddress(ip="198.51.100.1"),), {"198.51.100.1"}),
        ((IngressAddress(ip="198.51.100.1", ip_mode="VIP"), IngressAddress(hostname="lb.example")), {"198.51.100.1"}),
        ((IngressAddress(ip="198.51.100.1", ip_mode="Proxy"), IngressAddress(ip="198.51.100.2")), {"198.51.100.2"}),
        ((IngressAddress(ip="203.0.113.1"),), set()),
    ],
)
def test_ingress_addresses(entries: tuple[IngressAddress, ...], used: set[str]) -> None:
    item = balanced("web", 1, ingress=entries)
    assert {frontend.address for frontend in of_kind(item, AddressKind.LOAD_BALANCER)} == used


def test_skiplbips_takes_them_out_by_being_there() -> None:
    item = balanced("web", 1, annotations={"kube-router.io/service.skiplbips": "false"})
    assert not of_kind(item, AddressKind.LOAD_BALANCER)
    assert of_kind(item, AddressKind.NODE_PORT)


@pytest.mark.parametrize(
    ("fields", "balancing", "problem"),
    [
        ({}, Balancing(), ""),
        ({"annotations": {SCHEDULER: "lc"}}, Balancing(Scheduler.LEAST_CONNECTIONS), ""),
        ({"annotations": {SCHEDULER: "mh", FLAGS: "flag-2, flag-1"}}, Balancing(Scheduler.MAGLEV_HASH, (1, 2)), ""),
        (
            {"annotations": {SCHEDULER: "mh", FLAGS: "flag-1,flag-9"}},
            Balancing(Scheduler.MAGLEV_HASH, (1,)),
            f"annotation {FLAGS}: 'flag-9' is none of flag-1, flag-2, flag-3; not used",
        ),
        (
            {"annotations": {SCHEDULER: "sh", FLAGS: "flag-1"}},
            Balancing(Scheduler.SOURCE_HASH),
            f"annotation {FLAGS}: 'flag-1' is not used: only scheduler mh has flags",
        ),
        (
            {"annotations": {SCHEDULER: "wrr"}},
            Balancing(),
            f"annotation {SCHEDULER}: 'wrr' is none of rr, lc, dh, sh, mh; rr is used",
        ),
        ({"session_affinity": "ClientIP"}, Balancing(affinity=10800), ""),
        ({"session_affinity": "ClientIP", "affinity_timeout": 10}, Balancing(affinity=10), ""),
        (
            {"session_affinity": "ClientIP", "affinity_timeout": 0},
            Balancing(affinity=10800),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: 0 is not within 1 and 86400; 10800 is used",
        ),
        (
            {"session_affinity": "ClientIP", "affinity_timeout": 86401},
            Balancing(affinity=86400),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is not within 1 and 86400; 86400 is used",
        ),
        (
            {"session_affinity": "Cookie"},
            Balancing(),
            "spec.sessionAffinity: 'Cookie' is neither None nor ClientIP; None is used",
        ),
    ],
)
def test_balancing(fields: dict[str, Any], balancing: Balancing, problem: str) -> None:
    item = service(**fields)
    assert {made.balancing for made in plan(item).frontends.values()} == {balancing}
    assert lines(item) == ([f"service shop/web: {problem}"] if problem else [])


@pytest.mark.parametrize(
    ("value", "used", "problem"),
    [
        ("tunnel", True, ""),
        ("yes", False, "annotation kube-router.io/service.dsr: 'yes' is not 'tunnel', the only mode; not used"),
    ],
)
def test_dsr_is_of_external_and_load_balancer_addresses(value: str, used: bool, problem: str) -> None:
    item = balanced("web", 1, external_ips=both(EXTERNAL, 1), annotations={"kube-router.io/service.dsr": value})
    found = {made.kind for made in plan(item).frontends.values() if made.dsr}
    assert found == ({AddressKind.EXTERNAL, AddressKind.LOAD_BALANCER} if used else set())
    assert lines(item) == ([f"service shop/web: {problem}"] if problem else [])


@pytest.mark.parametrize(
    ("annotations", "kinds"),
    [
        ({}, set()),
        ({"kube-router.io/service.hairpin": "false"}, {AddressKind.CLUSTER, AddressKind.NODE_PORT}),
        ({"kube-router.io/service.hairpin.externalips": ""}, set()),
        (
            {"kube-router.io/service.hairpin": "", "kube-router.io/service.hairpin.externalips": ""},
            {AddressKind.CLUSTER, AddressKind.NODE_PORT, AddressKind.EXTERNAL},
        ),
    ],
)
def test_hairpin_is_asked_for_by_presence(annotations: dict[str, str], kinds: set[AddressKind]) -> None:
    item = balanced("web", 1, external_ips=both(EXTERNAL, 1), annotations=annotations)
    assert {made.kind for made in plan(item).frontends.values() if made.hairpin} == kinds


@pytest.mark.parametrize(
    ("ranges", "of_family", "problem"),
    [
        ((), {V4: None, V6: None}, ""),
        (("10.0.0.0/8", " 192.0.2.7/24 "), {V4: ("10.0.0.0/8", "192.0.2.0/24"), V6: ()}, ""),
        (("10.0.0.0/8", "2001:db8::/32"), {V4: ("10.0.0.0/8",), V6: ("2001:db8::/32",)}, ""),
        (("everywhere",), {V4: (), V6: ()}, "'everywhere' is no CIDR; nobody is allowed by it"),
    ],
)
def test_source_ranges_are_of_load_balancer_addresses_only_and_a_bad_one_opens_nothing(
    ranges: tuple[str, ...], of_family: dict[Family, tuple[str, ...] | None], problem: str
) -> None:
    item = balanced("web", 1, load_balancer_source_ranges=ranges)
    found = of_kind(item, AddressKind.LOAD_BALANCER)
    assert {frontend.family: made.sources for frontend, made in found.items()} == of_family
    assert all(
        made.sources is None for made in plan(item).frontends.values() if made.kind is not AddressKind.LOAD_BALANCER
    )
    assert lines(item) == ([f"service shop/web: spec.loadBalancerSourceRanges: {problem}"] if problem else [])


def test_an_address_that_is_external_and_of_the_load_balancer_keeps_its_source_ranges() -> None:
    item = balanced("web", 1, load_balancer_source_ranges=("10.0.0.0/8",))
    one = both(BALANCER, 1)[0]
    loose = plan_service(
        balanced("web", 1, load_balancer_source_ranges=("10.0.0.0/8",), external_ips=(one,)),
        ServiceIps(msgspec.structs.replace(SETTINGS, strict_external_ip_validation=False)),
    )
    assert plan(item).frontends[Frontend(V4, one, "tcp", 80)] == loose.frontends[Frontend(V4, one, "tcp", 80)]


@pytest.mark.parametrize(
    ("ports", "kept", "problem"),
    [
        ((ServicePort(port=0),), set(), "spec.ports.port: 0 is no port; it is not used"),
        ((ServicePort(port=70000),), set(), "spec.ports.port: 70000 is no port; it is not used"),
        ((ServicePort(port=80, protocol="ICMP"),), set(), "spec.ports.protocol: 'ICMP' is none of TCP, UDP, SCTP;"),
        ((ServicePort(port=80, node_port=-1),), set(), "spec.ports.nodePort: -1 is no port; the port is not used"),
        (
            (ServicePort(name="a", port=80), ServicePort(name="b", port=80)),
            {("a", 80)},
            "spec.ports: '80/TCP' is there twice; the first is used",
        ),
        ((ServicePort(name="a", port=53), ServicePort(name="b", port=53, protocol="UDP")), {("a", 53), ("b", 53)}, ""),
    ],
)
def test_bad_ports_cost_themselves(ports: tuple[ServicePort, ...], kept: set[tuple[str, int]], problem: str) -> None:
    item = service("web", 1, *ports, ServicePort(name="good", port=443))
    found = {(made.owner.port, frontend.port) for frontend, made in plan(item).frontends.items()}
    assert found == kept | {("good", 443)}
    assert len(lines(item)) == bool(problem)
    assert all(line.startswith(f"service shop/web: {problem}") for line in lines(item))


def test_unknown_policies_and_families_are_told() -> None:
    item = service(internal_traffic_policy="Nearby", ip_families=("IPv4", "IPX"), health_check_node_port=70000)
    assert sorted(lines(item)) == [
        "service shop/web: spec.clusterIPs: 'fd00:96::1' is not used: IPv6 is none of the Service's families",
        "service shop/web: spec.healthCheckNodePort: 70000 is no port",
        "service shop/web: spec.internalTrafficPolicy: 'Nearby' is neither Cluster nor Local; Cluster is used",
        "service shop/web: spec.ipFamilies: 'IPX' is no family; not used",
    ]
    assert scopes(item, AddressKind.CLUSTER) == {(ALL, ALL)}
    assert plan(item).health_port == 0
