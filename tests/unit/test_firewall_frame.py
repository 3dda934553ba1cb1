"""The firewall's frame: ranges of the settings, pod CIDRs of the Node as it is now, and the node ports that exist."""

from __future__ import annotations

import ipaddress

import msgspec

from kube_router.ipc.messages import Node, Service, ServicePort
from kube_router.workers.firewall.frame import FrameMaker, NodePorts
from kube_router.workers.settings import Settings

DUAL = Settings(
    node_name="n1",
    enable_ipv6=True,
    netpol_default_deny=True,
    service_cluster_ip_range=("10.96.0.0/12", "fd00:10:96::/112"),
    service_external_ip_range=("203.0.113.0/24",),
    loadbalancer_ip_range=("fd00:99::/64",),
    service_node_port_range="30000:32000",
)
NODE = Node(name="n1", pod_cidrs=("10.1.0.0/24", "fd01::/64"))


def service(name: str, *ports: tuple[str, int]) -> Service:
    listed = tuple(ServicePort(port=80, protocol=protocol, node_port=port) for protocol, port in ports)
    return Service(name=name, namespace="ns", type="NodePort", ports=listed)


def networks(*texts: str) -> tuple[object, ...]:
    return tuple(map(ipaddress.ip_network, texts))


def test_settings_become_ranges_of_both_families() -> None:
    frame = FrameMaker(DUAL).make(NODE, frozenset({("tcp", 30001)})).frame
    assert frame.families == DUAL.families
    assert frame.cluster_ranges == networks("10.96.0.0/12", "fd00:10:96::/112")
    assert frame.external_ranges == networks("203.0.113.0/24")
    assert frame.load_balancer_ranges == networks("fd00:99::/64")
    assert (frame.node_port_range, frame.node_ports) == ((30000, 32000), frozenset({("tcp", 30001)}))
    assert frame.pod_cidrs == networks("10.1.0.0/24", "fd01::/64")
    assert frame.default_deny


def test_a_range_of_a_family_that_is_off_is_left_out() -> None:
    settings = msgspec.structs.replace(DUAL, enable_ipv6=False)
    frame = FrameMaker(settings).make(NODE, frozenset()).frame
    assert frame.cluster_ranges == networks("10.96.0.0/12")
    assert frame.load_balancer_ranges == ()
    assert frame.pod_cidrs == networks("10.1.0.0/24")


def test_pod_cidrs_are_followed_live() -> None:
    maker = FrameMaker(DUAL)
    assert maker.make(NODE, frozenset()).frame.pod_cidrs == networks("10.1.0.0/24", "fd01::/64")
    annotated = Node(name="n1", annotations={"kube-router.io/pod-cidrs": "10.2.0.0/24, fd02::/64"})
    assert maker.make(annotated, frozenset()).frame.pod_cidrs == networks("10.2.0.0/24", "fd02::/64")


def test_nothing_changed_is_the_same_frame() -> None:
    maker, ports = FrameMaker(DUAL), frozenset({("tcp", 30001)})
    assert maker.make(NODE, ports).frame is maker.make(NODE, ports).frame
    assert maker.make(NODE, frozenset({("udp", 30001)})).frame.node_ports == {("udp", 30001)}


def test_default_deny_without_pod_cidrs_is_one_warning_and_no_failure() -> None:
    made = FrameMaker(DUAL).make(Node(name="n1"), frozenset())
    assert made.frame.pod_cidrs == () and made.frame.default_deny
    [warning] = made.warnings
    assert warning.startswith("node n1: has no IPv4 and IPv6 pod CIDR, so --netpol-default-deny")
    [warning] = FrameMaker(DUAL).make(Node(name="n1", pod_cidrs=("10.1.0.0/24",)), frozenset()).warnings
    assert warning.startswith("node n1: has no IPv6 pod CIDR")


def test_without_default_deny_pod_cidrs_are_nobodys_concern() -> None:
    settings = msgspec.structs.replace(DUAL, netpol_default_deny=False)
    made = FrameMaker(settings).make(Node(name="n1", pod_cidr="none"), frozenset())
    assert made.warnings == ()
    assert not made.frame.default_deny


def test_a_node_that_is_gone_leaves_its_pod_cidrs_and_a_warning() -> None:
    maker = FrameMaker(DUAL)
    maker.make(NODE, frozenset())
    made = maker.make(None, frozenset())
    assert made.frame.pod_cidrs == networks("10.1.0.0/24", "fd01::/64")
    assert made.warnings == (
        "node n1: is not in the cluster; --netpol-default-deny goes on with the pod CIDRs known before",
    )
    assert maker.make(NODE, frozenset()).warnings == ()


def test_a_pod_cidr_that_is_none_is_told_and_the_others_count() -> None:
    node = Node(name="n1", pod_cidrs=("10.1.0.0/24", "fd01::/640"))
    made = FrameMaker(DUAL).make(node, frozenset())
    assert made.frame.pod_cidrs == networks("10.1.0.0/24")
    assert len(made.warnings) == 2
    assert "'fd01::/640'" in made.warnings[0]


def test_node_ports_are_those_of_services_and_stay_while_one_has_them() -> None:
    ports = NodePorts()
    first, second = service("a", ("TCP", 30001), ("UDP", 30001)), service("b", ("TCP", 30001), ("SCTP", 30002))
    ports.replace({item.key: item for item in (first, second, Service(name="c", namespace="ns"))})
    assert ports.all == {("tcp", 30001), ("udp", 30001), ("sctp", 30002)}
    ports.update({"ns/a": (first, None)})
    assert ports.all == {("tcp", 30001), ("sctp", 30002)}
    ports.update({"ns/b": (second, service("b", ("TCP", 30003)))})
    assert ports.all == {("tcp", 30003)}


def test_node_ports_told_twice_count_once() -> None:
    """After a failed sync the changes are delivered again."""
    ports, new = NodePorts(), service("a", ("TCP", 30001))
    ports.update({"ns/a": (None, new)})
    ports.update({"ns/a": (None, new)})
    ports.update({"ns/a": (new, None)})
    assert ports.all == frozenset()


def test_node_ports_are_one_object_until_they_change() -> None:
    ports, new = NodePorts(), service("a", ("TCP", 30001))
    ports.update({"ns/a": (None, new)})
    before = ports.all
    ports.update({"ns/a": (new, service("a", ("TCP", 30001))), "ns/x": (None, Service(name="x", namespace="ns"))})
    assert ports.all is before


def test_a_whole_list_replaces_what_was_known() -> None:
    ports = NodePorts()
    ports.replace({"ns/a": service("a", ("TCP", 30001))})
    ports.replace({"ns/b": service("b", ("TCP", 30002))})
    assert ports.all == {("tcp", 30002)}
