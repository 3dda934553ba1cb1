"""The cni worker through any history: changed CIDRs, families, stale snapshots, lost records, crashes between steps.

The host is played by values that obey the steps; the end state must not depend on the way to it (laws 2, 3, 4 and 6).
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from kube_router.ipc.messages import Node, NodeAddress
from kube_router.workers.cni.desired import ActualBridge, ActualCni, ActualConf, DesiredCni, desired_state, own_node
from kube_router.workers.cni.plan import Plan, RecordRanges, RemoveGateway, SetBridgeMtu, WriteConf, diff
from kube_router.workers.linkfacts import IPInterface, Link, Links
from kube_router.workers.model import IPNetwork
from kube_router.workers.settings import Settings

USERS = ("10.9.0.0/24", "fd00:9::/64")
CIDRS = ("10.0.0.0/24", "10.1.0.0/24", "10.2.0.0/24", "fd00::/64", "fd00:1::/64", "fd00:2::/64")
ETH0 = Link(2, "eth0", mtu=1500, up=True, addresses=(ipaddress.ip_interface("192.0.2.1/24"),))


@dataclass(frozen=True)
class Situation:
    """What a snapshot and the settings say at one moment; the worker dies after ``steps`` steps of its plan."""

    cidrs: tuple[str, ...]
    ipv4: bool
    ipv6: bool
    confirmed: bool
    steps: int

    def desired(self) -> DesiredCni:
        settings = Settings(node_name="n1", enable_ipv4=self.ipv4, enable_ipv6=self.ipv6, cni_conf_file="/x.conf")
        addresses = (NodeAddress("InternalIP", "192.0.2.1"), NodeAddress("InternalIP", "2001:db8::1"))
        node = Node(name="n1", addresses=addresses, pod_cidrs=self.cidrs)
        return desired_state(own_node("n1", node, settings.families, self.confirmed), Links((ETH0,)), settings)


def one_or_none(version: int) -> st.SearchStrategy[tuple[str, ...]]:
    of_family = [cidr for cidr in CIDRS if ipaddress.ip_network(cidr).version == version]
    return st.sampled_from([(), *((cidr,) for cidr in of_family)])


situations = st.builds(
    Situation,
    cidrs=st.tuples(one_or_none(4), one_or_none(6)).map(lambda pair: (*pair[0], *pair[1])),
    ipv4=st.booleans(),
    ipv6=st.booleans(),
    confirmed=st.booleans(),
    steps=st.integers(0, 6),
)


def start() -> ActualCni:
    sets = [[{"subnet": subnet}] for subnet in USERS]
    text = json.dumps({"type": "bridge", "ipam": {"type": "host-local", "ranges": sets}})
    return ActualCni(ActualBridge(7, "bridge", True, 1500), {}, ActualConf(text, None, None))


def subnets(actual: ActualCni) -> list[str]:
    assert actual.conf is not None and actual.conf.text is not None
    return [entry["subnet"] for each in json.loads(actual.conf.text)["ipam"]["ranges"] for entry in each]


def carried_out(actual: ActualCni, plan: Plan, steps: int) -> ActualCni:
    """The host after the first ``steps`` steps, as the drivers would leave it."""
    conf, bridge = actual.conf, actual.bridge
    assert conf is not None and bridge is not None
    for step in plan.steps[:steps]:
        if isinstance(step, RecordRanges):
            conf = replace(conf, recorded=step.ranges)
        elif isinstance(step, WriteConf):
            conf = replace(conf, text=step.text)
        elif isinstance(step, RemoveGateway):
            left = tuple(address for address in bridge.addresses if address != step.address)
            bridge = replace(bridge, addresses=left)
        elif isinstance(step, SetBridgeMtu):
            bridge = replace(bridge, mtu=step.mtu)
    return replace(actual, conf=conf, bridge=bridge)


def after_a_pod(actual: ActualCni) -> ActualCni:
    """The bridge plugin has put the gateways of all ranges on the bridge (users' too)."""
    assert actual.bridge is not None
    gateways = {gateway_of(ipaddress.ip_network(subnet)) for subnet in subnets(actual)}
    addresses = sorted(gateways | set(actual.bridge.addresses), key=str)
    return replace(actual, bridge=replace(actual.bridge, addresses=tuple(addresses)))


def gateway_of(network: IPNetwork) -> IPInterface:
    return ipaddress.ip_interface(f"{network[1]}/{network.prefixlen}")


def lived_through(history: list[Situation]) -> ActualCni:
    actual = start()
    for situation in history:
        actual = after_a_pod(
            carried_out(actual, diff(actual, situation.desired(), load_modules=False), situation.steps)
        )
    return actual


@given(st.lists(situations, max_size=6), situations)
def test_the_end_does_not_depend_on_the_way(history: list[Situation], last: Situation) -> None:
    last = replace(last, confirmed=True, ipv4=True, cidrs=last.cidrs or ("10.0.0.0/24",))
    desired = last.desired()
    actual = lived_through(history)
    actual = carried_out(actual, diff(actual, desired, load_modules=False), 99)
    assert actual.bridge is not None and actual.conf is not None and desired.conf is not None
    wanted = [str(network) for network in desired.conf.ranges]
    present = subnets(actual)
    assert diff(actual, desired, load_modules=False).steps == ()
    if not wanted:  # only a family that is not enabled has a CIDR: nothing is removed on that
        return
    assert sorted(present) == sorted([*USERS, *wanted])
    assert [subnet for subnet in present if subnet in USERS] == list(USERS)
    assert [subnet for subnet in present if subnet in wanted] == wanted
    allowed = {gateway_of(ipaddress.ip_network(subnet)) for subnet in present}
    assert set(actual.bridge.addresses) <= allowed
    assert {str(network) for network in actual.conf.recorded or ()} == set(wanted)


@given(st.lists(situations, max_size=6), situations)
def test_an_unconfirmed_snapshot_never_removes(history: list[Situation], last: Situation) -> None:
    actual = lived_through(history)
    plan = diff(actual, replace(last, confirmed=False).desired(), load_modules=False)
    assert not any(isinstance(step, RemoveGateway) for step in plan.steps)
    assert set(subnets(carried_out(actual, plan, 99))) >= set(subnets(actual))


@given(st.lists(situations, max_size=6))
def test_the_users_ranges_and_gateways_always_survive(history: list[Situation]) -> None:
    actual = lived_through(history)
    assert [subnet for subnet in subnets(actual) if subnet in USERS] == list(USERS)
    assert actual.bridge is not None
    if history:
        assert {gateway_of(ipaddress.ip_network(subnet)) for subnet in USERS} <= set(actual.bridge.addresses)
