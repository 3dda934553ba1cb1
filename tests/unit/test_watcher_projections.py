"""From the API's JSON to projections: every kind, nulls and gaps as Go writes them, the server's defaults."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from kube_router.ipc.messages import (
    KINDS,
    OBJECT_TYPES,
    ContainerPort,
    Endpoint,
    EndpointPort,
    EndpointSlice,
    IngressAddress,
    IpBlock,
    Kind,
    LabelExpression,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    Node,
    NodeAddress,
    Pod,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Projection,
    Service,
    ServicePort,
)
from kube_router.workers.settings import Settings
from kube_router.workers.watcher.apiobjects import page_decoder
from kube_router.workers.watcher.kinds import RESOURCES, WORKER_KINDS, enabled_workers, wanted_kinds
from kube_router.workers.watcher.projections import (
    LAST_CHANGE_ANNOTATION,
    LEADER_ANNOTATION,
    PROJECT,
    ObjectError,
    check_identity,
)


def project(kind: Kind, item: dict[str, Any]) -> Projection:
    data = {"kind": "x", "metadata": {"resourceVersion": "1"}, "items": [item]}
    page = page_decoder(kind).decode(json.dumps(data).encode())
    assert page.items
    return PROJECT[kind](page.items[0])


def test_node() -> None:
    item = {
        "metadata": {
            "name": "n1",
            "uid": "u",
            "labels": {"zone": "a"},
            "annotations": {
                "kube-router.io/pod-cidrs": "10.1.0.0/24",
                "x/last-applied": "long",
                "kube-router.io": "no",
            },
        },
        "spec": {"podCIDR": "10.2.0.0/24", "podCIDRs": ["10.2.0.0/24", "fd00:2::/64"], "providerID": "aws:///z/i-1"},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": "192.0.2.1"},
                {"type": "InternalIP", "address": "2001:db8::1"},
                {"type": "Hostname", "address": "n1"},
            ]
        },
    }
    assert project("nodes", item) == Node(
        name="n1",
        uid="u",
        labels={"zone": "a"},
        annotations={"kube-router.io/pod-cidrs": "10.1.0.0/24"},
        addresses=(
            NodeAddress("InternalIP", "192.0.2.1"),
            NodeAddress("InternalIP", "2001:db8::1"),
            NodeAddress("Hostname", "n1"),
        ),
        pod_cidr="10.2.0.0/24",
        pod_cidrs=("10.2.0.0/24", "fd00:2::/64"),
        provider_id="aws:///z/i-1",
    )


def test_pod() -> None:
    item = {
        "metadata": {
            "name": "p",
            "namespace": "d",
            "labels": {"app": "web"},
            "deletionTimestamp": "2026-01-01T00:00:00Z",
            "deletionGracePeriodSeconds": 30,
        },
        "spec": {
            "nodeName": "n1",
            "hostNetwork": True,
            "containers": [
                {"ports": [{"name": "http", "containerPort": 80}, {"containerPort": 81}]},
                {"ports": None},
                {"ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}]},
            ],
            "initContainers": [
                {"restartPolicy": "Always", "ports": [{"name": "proxy", "containerPort": 15001}]},
                {"ports": [{"name": "once", "containerPort": 1}]},
            ],
        },
        "status": {
            "phase": "Running",
            "podIP": "10.1.0.5",
            "podIPs": [{"ip": "10.1.0.5"}, {"ip": "fd00:1::5"}],
            "hostIP": "192.0.2.1",
            "hostIPs": [{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}],
            "containerStatuses": [{"containerID": "containerd://abc"}, {"containerID": "containerd://def"}],
        },
    }
    assert project("pods", item) == Pod(
        name="p",
        namespace="d",
        labels={"app": "web"},
        node_name="n1",
        host_network=True,
        phase="Running",
        ips=("10.1.0.5", "fd00:1::5"),
        host_ips=("192.0.2.1", "2001:db8::1"),
        ports=(ContainerPort("http", 80), ContainerPort("dns", 53, "UDP"), ContainerPort("proxy", 15001)),
        deletion_seconds=30,
        container_id="containerd://abc",
    )


@pytest.mark.parametrize(("ip", "host"), [("10.1.0.5", "192.0.2.1"), ("fd00:1::5", "2001:db8::1")])
def test_pod_of_an_old_server_has_single_addresses(ip: str, host: str) -> None:
    pod = project("pods", {"metadata": {"name": "p", "namespace": "d"}, "status": {"podIP": ip, "hostIP": host}})
    assert isinstance(pod, Pod)
    assert (pod.ips, pod.host_ips, pod.deletion_seconds) == ((ip,), (host,), None)


def test_service() -> None:
    item = {
        "metadata": {
            "name": "s",
            "namespace": "d",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "annotations": {"kube-router.io/service.dsr": "tunnel", "other": "x"},
        },
        "spec": {
            "type": "LoadBalancer",
            "selector": {"app": "web"},
            "clusterIP": "10.96.0.1",
            "clusterIPs": ["10.96.0.1", "fd00:96::1"],
            "externalIPs": ["203.0.113.1"],
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
            "ports": [
                {"name": "a", "port": 80, "targetPort": "http", "nodePort": 30080},
                {"port": 81, "protocol": "UDP"},
            ],
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}},
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 31000,
            "loadBalancerClass": "kube-router",
            "loadBalancerSourceRanges": ["198.51.100.0/24"],
            "trafficDistribution": "PreferClose",
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.9", "ipMode": "VIP"}, {"hostname": "h"}]}},
    }
    assert project("services", item) == Service(
        name="s",
        namespace="d",
        annotations={"kube-router.io/service.dsr": "tunnel"},
        created="2026-01-01T00:00:00Z",
        type="LoadBalancer",
        selector={"app": "web"},
        cluster_ips=("10.96.0.1", "fd00:96::1"),
        external_ips=("203.0.113.1",),
        ip_families=("IPv4", "IPv6"),
        ip_family_policy="RequireDualStack",
        ports=(
            ServicePort(name="a", port=80, target_port="http", node_port=30080),
            ServicePort(protocol="UDP", port=81, target_port=81),
        ),
        session_affinity="ClientIP",
        affinity_timeout=5,
        external_traffic_policy="Local",
        health_check_node_port=31000,
        load_balancer_class="kube-router",
        load_balancer_source_ranges=("198.51.100.0/24",),
        traffic_distribution="PreferClose",
        ingress=(IngressAddress(ip="203.0.113.9", ip_mode="VIP"), IngressAddress(hostname="h")),
    )


def test_endpoint_slice() -> None:
    item = {
        "metadata": {
            "name": "s-1",
            "namespace": "d",
            "labels": {"kubernetes.io/service-name": "s"},
            "annotations": {
                LEADER_ANNOTATION: '{"renewTime": "now"}',
                LAST_CHANGE_ANNOTATION: "2026-01-01T00:00:00.5Z",
            },
        },
        "addressType": "IPv6",
        "endpoints": [
            {
                "addresses": ["fd00:1::5"],
                "conditions": {"ready": False, "serving": True, "terminating": True},
                "nodeName": "n1",
                "zone": "a",
                "hints": {"forZones": [{"name": "a"}, {"name": "b"}]},
            },
            {"addresses": ["fd00:1::6"], "conditions": {}},
        ],
        "ports": [{"name": "http", "port": 80, "protocol": "TCP"}, {"port": None}],
    }
    assert project("endpointslices", item) == EndpointSlice(
        name="s-1",
        namespace="d",
        labels={"kubernetes.io/service-name": "s"},
        annotations={LEADER_ANNOTATION: ""},
        service="s",
        last_change="2026-01-01T00:00:00.5Z",
        address_type="IPv6",
        endpoints=(
            Endpoint(
                addresses=("fd00:1::5",),
                ready=False,
                serving=True,
                terminating=True,
                node_name="n1",
                zone="a",
                hint_zones=("a", "b"),
            ),
            Endpoint(addresses=("fd00:1::6",)),
        ),
        ports=(EndpointPort(name="http", port=80), EndpointPort(port=None)),
    )


@pytest.mark.parametrize(
    ("meta", "service"),
    [
        (
            {"labels": {"kubernetes.io/service-name": "l"}, "ownerReferences": [{"name": "o"}], "generateName": "g-"},
            "l",
        ),
        ({"labels": {"kubernetes.io/service-name": ""}, "ownerReferences": [{"name": "o"}], "generateName": "g-"}, "o"),
        ({"ownerReferences": [{"name": "o"}, {"name": "p"}], "generateName": "g-"}, "g"),
        ({"generateName": "a-b-"}, "a-b"),
        ({}, ""),
    ],
)
def test_owner_of_a_slice(meta: dict[str, Any], service: str) -> None:
    found = project("endpointslices", {"metadata": {"name": "x", "namespace": "d", **meta}})
    assert isinstance(found, EndpointSlice)
    assert found.service == service


def test_network_policy() -> None:
    item = {
        "metadata": {"name": "p", "namespace": "d"},
        "spec": {
            "podSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["x"]}]},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {
                    "from": [
                        {"podSelector": {}, "namespaceSelector": {"matchLabels": {"t": "a"}}},
                        {"ipBlock": {"cidr": "fd00::/8", "except": ["fd00:1::/32"]}},
                    ],
                    "ports": [{"port": "http"}, {"protocol": "UDP", "port": 53, "endPort": 60}, {}],
                },
                {"from": [], "ports": []},
                {},
            ],
            "egress": [],
        },
    }
    assert project("networkpolicies", item) == NetworkPolicy(
        name="p",
        namespace="d",
        pod_selector=LabelSelector(match_expressions=(LabelExpression(key="a", operator="In", values=("x",)),)),
        policy_types=("Ingress", "Egress"),
        ingress=(
            PolicyRule(
                peers=(
                    PolicyPeer(pod_selector=LabelSelector(), namespace_selector=LabelSelector(match_labels={"t": "a"})),
                    PolicyPeer(ip_block=IpBlock(cidr="fd00::/8", excepted=("fd00:1::/32",))),
                ),
                ports=(
                    PolicyPort(port="http"),
                    PolicyPort(protocol="UDP", port=53, end_port=60),
                    PolicyPort(),
                ),
            ),
            PolicyRule(peers=(), ports=()),
            PolicyRule(peers=None, ports=None),
        ),
        egress=(),
    )


def test_egress_rules_read_to_and_not_from() -> None:
    item = {
        "metadata": {"name": "p", "namespace": "d"},
        "spec": {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "from": [{"podSelector": {}}]}]},
    }
    policy = project("networkpolicies", item)
    assert isinstance(policy, NetworkPolicy)
    assert policy.ingress is None
    assert policy.policy_types is None
    assert policy.egress == (PolicyRule(peers=(PolicyPeer(ip_block=IpBlock(cidr="10.0.0.0/8")),), ports=None),)


def test_namespace() -> None:
    item = {"metadata": {"name": "x", "labels": {"team": "a"}}, "spec": {"finalizers": ["kubernetes"]}}
    assert project("namespaces", item) == Namespace(name="x", labels={"team": "a"})


@pytest.mark.parametrize("kind", KINDS)
def test_bare_objects_and_nulls_are_defaults(kind: Kind) -> None:
    meta = {"name": "x", "namespace": "d"} if RESOURCES[kind].namespaced else {"name": "x"}
    bare = project(kind, {"metadata": meta})
    assert bare == OBJECT_TYPES[kind](**meta)
    nulls: dict[str, Any] = {
        "metadata": {**meta, "labels": None, "annotations": None, "uid": None, "creationTimestamp": None},
        "spec": None,
        "status": None,
        "endpoints": None,
        "ports": None,
    }
    assert project(kind, nulls) == bare
    deeper = dict.fromkeys(
        ["containers", "podCIDRs", "ports", "clusterIPs", "ingress", "egress", "podSelector", "policyTypes"]
    )
    below = dict.fromkeys(["addresses", "podIPs", "hostIPs", "loadBalancer", "containerStatuses"])
    assert project(kind, {**nulls, "spec": deeper, "status": below}) == bare


@pytest.mark.parametrize(
    ("kind", "item", "path"),
    [
        ("nodes", {"metadata": {"name": 1}}, "$.items[0].metadata.name"),
        ("nodes", {"metadata": {"name": "x", "labels": {"a": True}}}, "$.items[0].metadata.labels[...]"),
        ("pods", {"metadata": {"name": "x"}, "status": {"podIPs": "10.0.0.1"}}, "$.items[0].status.podIPs"),
        ("services", {"metadata": {"name": "x"}, "spec": {"ports": [{"port": "80"}]}}, "$.items[0].spec.ports[0].port"),
        (
            "services",
            {"metadata": {"name": "x"}, "spec": {"ports": [{"port": 2**40}]}},
            "$.items[0].spec.ports[0].port",
        ),
    ],
)
def test_wrong_types_are_errors_that_name_the_field(kind: Kind, item: dict[str, Any], path: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        project(kind, item)
    assert f"`{path}`" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "namespace"), [("", "d"), ("a/b", "d"), ("a", ""), ("a", "d/e"), ("-a", "d"), ("a\n", "d")]
)
def test_names_that_would_blur_keys_are_refused(name: str, namespace: str) -> None:
    with pytest.raises(ObjectError, match=r"\$\.metadata\.name"):
        check_identity(Pod(name=name, namespace=namespace), namespaced=True)


# --- which kinds


def test_every_worker_is_in_the_table_and_every_kind_has_a_reader() -> None:
    assert set(WORKER_KINDS) == set(enabled_workers(Settings(run_loadbalancer=True)))
    assert {kind for kinds in WORKER_KINDS.values() for kind in kinds} == set(KINDS)


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        (Settings(run_firewall=False, unbuilt_workers=("proxy",)), ("nodes", "services", "endpointslices")),
        (Settings(unbuilt_workers=("proxy",)), KINDS),
        (Settings(), KINDS),
        (
            Settings(run_router=False, run_service_proxy=False),
            ("nodes", "pods", "services", "networkpolicies", "namespaces"),
        ),
        (Settings(run_router=False, run_firewall=False), ("nodes", "services", "endpointslices")),
        (Settings(run_router=False, run_firewall=False, unbuilt_workers=("proxy",)), ()),
    ],
)
def test_only_kinds_with_a_reader_are_watched(settings: Settings, kinds: tuple[Kind, ...]) -> None:
    assert wanted_kinds(settings) == kinds


def test_paths_and_selectors() -> None:
    assert RESOURCES["nodes"].path == "/api/v1/nodes"
    assert RESOURCES["endpointslices"].path == "/apis/discovery.k8s.io/v1/endpointslices"
    assert RESOURCES["networkpolicies"].path == "/apis/networking.k8s.io/v1/networkpolicies"
    assert RESOURCES["pods"].selector == "status.phase!=Succeeded,status.phase!=Failed"
