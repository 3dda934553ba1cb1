"""Desired state and plan of the cni worker: MTU rule, ownership, order of steps, and whole files (golden)."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kube_router.ipc.messages import Node, NodeAddress
from kube_router.workers.cni.desired import (
    ActualBridge,
    ActualCni,
    ActualConf,
    DesiredBridge,
    DesiredCni,
    desired_state,
    own_node,
)
from kube_router.workers.cni.plan import (
    CreateBridge,
    DeleteBridge,
    LoadModule,
    RecordRanges,
    RemoveGateway,
    SetBridgeMtu,
    SetBridgeUp,
    WriteConf,
    WriteSysctl,
    diff,
)
from kube_router.workers.linkfacts import LOOPBACK, Link, Links
from kube_router.workers.model import Family, IPNetwork
from kube_router.workers.settings import Settings

GOLDEN = Path(__file__).parent.parent / "golden" / "cni"
ETH0 = Link(2, "eth0", mtu=1500, up=True, addresses=(ipaddress.ip_interface("192.0.2.1/24"),))
GOOD_SYSCTLS = {
    "net/bridge/bridge-nf-call-iptables": "1",
    "net/bridge/bridge-nf-call-ip6tables": "1",
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
}
BRIDGE = ActualBridge(index=7, kind="bridge", up=True, mtu=1500)


def settings(**more: Any) -> Settings:
    return Settings(**{"node_name": "n1", "enable_ipv6": True, "cni_conf_file": "/etc/cni/net.d/x.conf", **more})


def node(*pod_cidrs: str, addresses: tuple[str, ...] = ("192.0.2.1", "2001:db8::1"), **annotations: str) -> Node:
    return Node(
        name="n1",
        addresses=tuple(NodeAddress("InternalIP", address) for address in addresses),
        pod_cidrs=pod_cidrs,
        annotations={f"kube-router.io/{key.replace('_', '-')}": value for key, value in annotations.items()},
    )


def wanted(
    node: Node | None = None, *links: Link, refused: bool = False, confirmed: bool = True, **more: Any
) -> DesiredCni:
    chosen = settings(**more)
    own = own_node("n1", node, chosen.families, confirmed)
    return desired_state(own, Links(links or (ETH0,)), chosen, mtu_refused=refused)


def networks(*texts: str) -> tuple[IPNetwork, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


def conf_text(*ranges: str) -> str:
    sets = ",".join(f'[{{"subnet":"{each}"}}]' for each in ranges)
    return f'{{"type":"bridge","bridge":"kube-bridge","ipam":{{"ranges":[{sets}]}},"mtu":1500}}'


def actual(*ranges: str, recorded: tuple[str, ...] | None = None, bridge: ActualBridge | None = BRIDGE) -> ActualCni:
    record = None if recorded is None else networks(*recorded)
    return ActualCni(bridge, GOOD_SYSCTLS, ActualConf(conf_text(*ranges), None, record))


# --- MTU


@pytest.mark.parametrize(("mtu", "expected"), [(1500, 1500), (9000, 9000), (65536, 65535), (1280, 1280)])
def test_mtu_is_the_uplinks_within_what_a_bridge_takes(mtu: int, expected: int) -> None:
    desired = wanted(node("10.0.0.0/24", "fd00::/64"), replace(ETH0, mtu=mtu))
    assert desired.bridge == DesiredBridge(expected)
    assert desired.conf is not None and desired.conf.mtu == expected
    assert desired.warnings == ()


def test_ipv6_needs_1280_and_ipv4_does_not() -> None:
    desired = wanted(node("10.0.0.0/24", "fd00::/64"), replace(ETH0, mtu=1000))
    assert desired.bridge == DesiredBridge(1280)
    assert desired.warnings == ("link eth0: MTU 1000 is less than IPv6 needs, kube-bridge gets 1280",)
    assert wanted(node("10.0.0.0/24"), replace(ETH0, mtu=1000), enable_ipv6=False).bridge == DesiredBridge(1000)


@pytest.mark.parametrize(
    ("link", "words"),
    [
        (replace(ETH0, name="lo", kind=LOOPBACK, mtu=65536), "is on loopback link lo"),
        (replace(ETH0, addresses=()), "no link carries its address 192.0.2.1"),
    ],
)
def test_no_uplink_leaves_the_mtu_alone_and_says_so(link: Link, words: str) -> None:
    desired = wanted(node("10.0.0.0/24", "fd00::/64"), link)
    assert desired.bridge == DesiredBridge(None)
    assert desired.conf is not None and desired.conf.mtu is None
    assert len(desired.warnings) == 1 and words in desired.warnings[0]
    assert desired.failures == ()


def test_without_auto_mtu_nothing_is_looked_up() -> None:
    desired = wanted(node("10.0.0.0/24", "fd00::/64"), replace(ETH0, addresses=()), auto_mtu=False)
    assert desired.bridge == DesiredBridge(None)
    assert desired.warnings == ()


def test_mtu_comes_from_the_primary_address_of_an_enabled_family() -> None:
    six = Link(3, "eth1", mtu=1400, addresses=(ipaddress.ip_interface("2001:db8::1/64"),))
    assert wanted(node("fd00::/64"), ETH0, six, enable_ipv4=False).bridge == DesiredBridge(1400)


def test_a_refused_mtu_puts_the_bridges_own_into_the_file() -> None:
    bridge = Link(7, "kube-bridge", kind="bridge", mtu=1300)
    desired = wanted(node("10.0.0.0/24", "fd00::/64"), ETH0, bridge, refused=True)
    assert desired.bridge == DesiredBridge(None)
    assert desired.conf is not None and desired.conf.mtu == 1300


# --- what the Node says


def test_a_missing_node_leaves_the_file_and_still_wants_the_bridge() -> None:
    desired = wanted(None)
    assert desired.conf is None
    assert desired.bridge == DesiredBridge(None)
    assert [failure.phase for failure in desired.failures] == ["node"]
    assert "node n1: not found" in desired.failures[0].text


def test_no_pod_cidr_is_a_failure_that_removes_nothing() -> None:
    desired = wanted(node())
    assert "node n1: no pod CIDR" in desired.failures[0].text
    plan = diff(actual("10.0.0.0/24", recorded=("10.0.0.0/24",)), desired)
    assert plan.steps == ()
    assert plan.failures == desired.failures


def test_a_family_without_pod_cidr_is_told() -> None:
    desired = wanted(node("10.0.0.0/24"))
    assert desired.warnings == ("node n1: no IPv6 pod CIDR, pods get no IPv6 address",)
    assert desired.failures == ()


def test_an_unreadable_item_removes_nothing() -> None:
    bad = node("10.9.0.0/24", "fd00::/64", pod_cidrs="10.1.0.0/240")
    plan = diff(actual("10.1.0.0/24", "fd00::/64", recorded=("10.1.0.0/24", "fd00::/64")), wanted(bad))
    assert plan.steps == ()


def test_sysctls_by_family() -> None:
    assert list(wanted(node("10.0.0.0/24")).sysctls) == list(GOOD_SYSCTLS)[:3]
    assert dict(wanted(node("10.0.0.0/24"), enable_ipv6=False).sysctls) == {"net/bridge/bridge-nf-call-iptables": "1"}


# --- the plan


def test_all_as_wanted_is_an_empty_plan() -> None:
    both = ("10.0.0.0/24", "fd00::/64")
    plan = diff(actual(*both, recorded=both), wanted(node(*both)))
    assert (plan.steps, plan.failures, plan.warnings, str(plan)) == ((), (), (), "")


def test_nothing_there_yet_is_made_in_order() -> None:
    both = ("10.0.0.0/24", "fd00::/64")
    missing = dict.fromkeys(GOOD_SYSCTLS, None) | {"net/ipv6/conf/all/disable_ipv6": "1"}
    plan = diff(replace(actual(bridge=None), sysctls=missing), wanted(node(*both)))
    assert [type(step) for step in plan.steps] == [
        CreateBridge,
        SetBridgeUp,
        SetBridgeMtu,
        LoadModule,
        WriteSysctl,
        WriteSysctl,
        WriteSysctl,
        RecordRanges,
        WriteConf,
    ]
    assert plan.steps[7] == RecordRanges("/etc/cni/net.d/x.conf", networks(*both))


def test_a_module_is_not_tried_at_every_event() -> None:
    sysctls = GOOD_SYSCTLS | {"net/bridge/bridge-nf-call-iptables": None}
    both = ("10.0.0.0/24", "fd00::/64")
    plan = diff(replace(actual(*both, recorded=both), sysctls=sysctls), wanted(node(*both)), load_modules=False)
    assert plan.steps == ()
    assert len(plan.warnings) == 1 and "br_netfilter is not loaded" in plan.warnings[0]


def test_a_kernel_without_ipv6_is_told() -> None:
    sysctls = GOOD_SYSCTLS | {"net/ipv6/conf/all/disable_ipv6": None}
    both = ("10.0.0.0/24", "fd00::/64")
    plan = diff(replace(actual(*both, recorded=both), sysctls=sysctls), wanted(node(*both)))
    assert plan.steps == ()
    assert plan.warnings == ("sysctl net/ipv6/conf/all/disable_ipv6: not there, the kernel has no IPv6",)


@pytest.mark.parametrize(
    ("bridge", "steps"),
    [
        (replace(BRIDGE, up=False), (SetBridgeUp("kube-bridge"),)),
        (replace(BRIDGE, mtu=1400), (SetBridgeMtu("kube-bridge", 1500),)),
    ],
)
def test_only_what_differs_is_set(bridge: ActualBridge, steps: tuple[object, ...]) -> None:
    both = ("10.0.0.0/24", "fd00::/64")
    assert diff(actual(*both, recorded=both, bridge=bridge), wanted(node(*both))).steps == steps


def test_a_new_cidr_is_recorded_before_and_the_old_one_forgotten_last() -> None:
    gateway = ipaddress.ip_interface("10.0.0.1/24")
    bridge = replace(BRIDGE, addresses=(gateway, ipaddress.ip_interface("fd00::1/64")))
    plan = diff(
        actual("10.0.0.0/24", "fd00::/64", recorded=("10.0.0.0/24", "fd00::/64"), bridge=bridge),
        wanted(node("10.5.0.0/24", "fd00::/64")),
    )
    assert [type(step) for step in plan.steps] == [RecordRanges, WriteConf, RemoveGateway, RecordRanges]
    first, conf, removal, last = plan.steps
    assert first == RecordRanges("/etc/cni/net.d/x.conf", networks("10.0.0.0/24", "10.5.0.0/24", "fd00::/64"))
    assert isinstance(conf, WriteConf) and conf.text == conf_text("10.5.0.0/24", "fd00::/64")
    assert removal == RemoveGateway("kube-bridge", 7, gateway)
    assert last == RecordRanges("/etc/cni/net.d/x.conf", networks("10.5.0.0/24", "fd00::/64"))


def test_after_a_crash_behind_the_file_the_rest_is_done() -> None:
    gateway = ipaddress.ip_interface("10.0.0.1/24")
    now = actual("10.5.0.0/24", recorded=("10.0.0.0/24", "10.5.0.0/24"), bridge=replace(BRIDGE, addresses=(gateway,)))
    plan = diff(now, wanted(node("10.5.0.0/24")))
    assert [type(step) for step in plan.steps] == [RemoveGateway, RecordRanges]


def test_other_addresses_on_the_bridge_are_never_touched() -> None:
    texts = ("10.0.0.1/25", "10.0.0.1/32", "172.16.0.1/24", "10.5.0.1/24")
    bridge = replace(BRIDGE, addresses=tuple(map(ipaddress.ip_interface, texts)))
    plan = diff(actual("10.0.0.0/24", recorded=("10.0.0.0/24",), bridge=bridge), wanted(node("10.5.0.0/24")))
    assert not any(isinstance(step, RemoveGateway) for step in plan.steps)


def test_without_a_record_what_equals_a_pod_cidr_is_ours_and_the_rest_the_users() -> None:
    """The IPv6 range was put in while IPv6 was enabled; the third one is the user's."""
    now = actual("10.0.0.0/24", "fd00::/64", "10.9.0.0/24")
    plan = diff(now, wanted(node("10.0.0.0/24", "fd00::/64"), enable_ipv6=False))
    (conf,) = [step for step in plan.steps if isinstance(step, WriteConf)]
    assert conf.text == conf_text("10.0.0.0/24", "10.9.0.0/24")
    assert plan.steps[-1] == RecordRanges("/etc/cni/net.d/x.conf", networks("10.0.0.0/24"))


def test_a_range_that_the_user_put_in_is_not_ours_because_another_is() -> None:
    plan = diff(
        actual("10.0.0.0/24", "fd00::/64", recorded=("10.0.0.0/24",)),
        wanted(node("10.0.0.0/24", "fd00::/64"), enable_ipv6=False),
    )
    assert plan.steps == ()


def test_an_unconfirmed_snapshot_removes_nothing_and_adds_a_missing_family() -> None:
    desired = wanted(node("10.5.0.0/24", "fd00::/64"), confirmed=False)
    plan = diff(actual("10.0.0.0/24", recorded=("10.0.0.0/24",)), desired)
    (conf,) = [step for step in plan.steps if isinstance(step, WriteConf)]
    assert conf.text == conf_text("10.0.0.0/24", "fd00::/64")
    assert plan.steps[-1] == RecordRanges("/etc/cni/net.d/x.conf", networks("10.0.0.0/24", "fd00::/64"))


@pytest.mark.parametrize("error", ["does not exist", "cannot be read: Permission denied"])
def test_an_unreadable_file_stops_only_itself(error: str) -> None:
    now = ActualCni(None, GOOD_SYSCTLS, ActualConf(None, error, None))
    plan = diff(now, wanted(node("10.0.0.0/24", "fd00::/64")))
    assert [type(step) for step in plan.steps] == [CreateBridge, SetBridgeUp, SetBridgeMtu]
    assert [failure.text for failure in plan.failures] == [f"/etc/cni/net.d/x.conf: {error}"]


def test_a_plan_prints_one_line_a_step() -> None:
    now = actual("10.0.0.0/24", recorded=("10.0.0.0/24",), bridge=None)
    plan = diff(replace(now, sysctls={}), wanted(node("10.5.0.0/24", "fd00::/64")))
    assert str(plan).splitlines() == (GOLDEN / "renumbered-plan.txt").read_text().splitlines()


# --- nothing wanted: cleanup


def test_cleanup_deletes_an_empty_bridge_and_nothing_else() -> None:
    assert diff(actual("10.0.0.0/24"), DesiredCni()).steps == (DeleteBridge("kube-bridge"),)
    assert diff(actual("10.0.0.0/24", bridge=None), DesiredCni()).steps == ()


def test_cleanup_leaves_a_bridge_with_ports_and_a_link_of_another_kind() -> None:
    used = diff(actual(bridge=replace(BRIDGE, ports=("veth1", "veth2"))), DesiredCni())
    assert used.steps == ()
    assert used.warnings == ("link kube-bridge: has ports (veth1, veth2), left in place",)
    assert diff(actual(bridge=replace(BRIDGE, kind="dummy")), DesiredCni()).steps == ()


# --- whole files


@pytest.mark.parametrize(
    ("case", "suffix", "pod_cidrs", "recorded"),
    [
        ("kubeadm-hostport", "conflist", ("10.244.0.0/24", "fd00:10:244::/64"), None),
        ("legacy-single", "conf", ("10.244.0.0/24", "fd00:10:244::/64"), None),
        ("renumbered", "conflist", ("10.244.7.0/24", "fd00:10:244:7::/64"), ("10.244.0.0/24", "fd00:10:244::/64")),
    ],
)
def test_whole_files(case: str, suffix: str, pod_cidrs: tuple[str, ...], recorded: tuple[str, ...] | None) -> None:
    before = (GOLDEN / f"{case}.before.{suffix}").read_text()
    record = None if recorded is None else networks(*recorded)
    desired = wanted(node(*pod_cidrs), replace(ETH0, mtu=1450), cni_conf_file=f"/etc/cni/net.d/x.{suffix}")
    now = ActualCni(BRIDGE, GOOD_SYSCTLS, ActualConf(before, None, record))
    (conf,) = [step for step in diff(now, desired).steps if isinstance(step, WriteConf)]
    assert conf.text == (GOLDEN / f"{case}.after.{suffix}").read_text()
    settled = ActualCni(replace(BRIDGE, mtu=1450), GOOD_SYSCTLS, ActualConf(conf.text, None, networks(*pod_cidrs)))
    assert diff(settled, desired).steps == ()


def test_families_of_the_settings_decide() -> None:
    assert settings(enable_ipv4=False).families == (Family.IPV6,)
