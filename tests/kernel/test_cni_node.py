"""The cni worker on a real kernel, with the real bridge and host-local plugins taking its file for real pods."""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.cni import CURRENT_PLUGINS, DEBIAN_PLUGINS, PluginError, Runtime, eventually_pings
from support.namespaces import Namespace, veth

from kube_router.ipc.messages import Node, NodeAddress, SourceState
from kube_router.ipc.replica import Cluster
from kube_router.workers.cni.cleanup import cleanup
from kube_router.workers.cni.controller import CniController
from kube_router.workers.model import Outcome
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings

START = Trigger(start=True)
WOKEN = Trigger(woken=True)


@dataclass
class Agent:
    """One node's cni worker, turned by hand; ``conf`` and ``settings`` are its own."""

    namespace: Namespace
    settings: Settings
    controller: CniController
    node: Node
    state: SourceState = field(default_factory=lambda: SourceState(source="test", in_sync=True))

    @property
    def conf(self) -> Path:
        return Path(self.settings.cni_conf_file)

    def reconcile(self, trigger: Trigger = START) -> Outcome:
        cluster = Cluster(self.state, {"nodes": {self.node.name: self.node}})
        with self.namespace.enter():
            return self.controller.reconcile(cluster, trigger)

    def woken(self, seconds: float = 1.0) -> bool:
        """Whether a waker asks for a reconciliation within ``seconds``."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            wakers = self.controller.wakers()
            for descriptor in select.select(list(wakers), [], [], left)[0]:
                if wakers[descriptor]():
                    return True
        return False

    def restart(self) -> None:
        self.controller.close()
        with self.namespace.enter():
            self.controller = CniController(self.settings)

    def ranges(self) -> list[list[dict[str, Any]]]:
        document = json.loads(self.conf.read_text())
        plugin = document["plugins"][0] if "plugins" in document else document
        return plugin["ipam"]["ranges"]  # type: ignore[no-any-return]


def node_object(*cidrs: str, annotations: dict[str, str] | None = None) -> Node:
    addresses = (NodeAddress("InternalIP", "192.0.2.1"), NodeAddress("InternalIP", "2001:db8::1"))
    return Node(name="n1", uid="u1", addresses=addresses, pod_cidrs=cidrs, annotations=annotations or {})


DUAL = node_object("10.244.1.0/24", "fd00:10:244:1::/64")


def conflist(folder: Path) -> str:
    """The list that the shipped manifests put there, with the pods' leases kept in the test's folder."""
    ipam = {"type": "host-local", "dataDir": str(folder / "leases")}
    plugin = {
        "name": "kubernetes",
        "type": "bridge",
        "bridge": "kube-bridge",
        "isDefaultGateway": True,
        "hairpinMode": True,
        "ipam": ipam,
    }
    return json.dumps({"cniVersion": "0.3.0", "name": "mynet", "plugins": [plugin]}, indent=2) + "\n"


@pytest.fixture
def host(new_netns: Callable[[], Namespace]) -> Namespace:
    """A node: eth0 with both addresses, MTU 1450."""
    host, switch = new_netns(), new_netns()
    veth(host, "eth0", switch, "port0", left_addresses=("192.0.2.1/24", "2001:db8::1/64"))
    host.run("ip link set eth0 mtu 1450")
    return host


@pytest.fixture
def agent(host: Namespace, tmp_path: Path) -> Iterator[Agent]:
    folder = tmp_path / "net.d"
    folder.mkdir()
    conf = folder / "10-kuberouter.conflist"
    conf.write_text(conflist(tmp_path))
    settings = Settings(node_name="n1", enable_ipv6=True, cni_conf_file=str(conf), state_dir=str(tmp_path / "state"))
    with host.enter():
        controller = CniController(settings)
    agent = Agent(host, settings, controller, DUAL)
    yield agent
    agent.controller.close()


@pytest.fixture(params=[DEBIAN_PLUGINS, CURRENT_PLUGINS], ids=["debian-plugins", "current-plugins"])
def runtime(request: pytest.FixtureRequest, agent: Agent) -> Runtime:
    return Runtime(agent.namespace, agent.conf, request.param)


def links(namespace: Namespace) -> dict[str, Any]:
    return {entry["ifname"]: entry for entry in json.loads(namespace.run("ip -json -details link show"))}


def test_pods_of_both_families_come_and_go(agent: Agent, runtime: Runtime, new_netns: Callable[[], Namespace]) -> None:
    outcome = agent.reconcile()
    assert outcome.failures == ()
    first, second = new_netns(), new_netns()
    assert runtime.addresses(first) == ["10.244.1.2/24", "fd00:10:244:1::2/64"]
    assert runtime.addresses(second) == ["10.244.1.3/24", "fd00:10:244:1::3/64"]
    for target in ("10.244.1.3", "fd00:10:244:1::3", "10.244.1.1", "fd00:10:244:1::1"):
        eventually_pings(first, target)
    assert "mtu 1450" in first.run("ip link show eth0")
    assert agent.reconcile(Trigger(period=True)).warnings == ()  # forwarding is on: the plugin saw to it
    leases = Path(json.loads(agent.conf.read_text())["plugins"][0]["ipam"]["dataDir"]) / "mynet"
    assert {"10.244.1.2", "fd00:10:244:1::2"} <= set(os.listdir(leases))
    runtime.delete(first)
    runtime.delete(second)
    assert not [name for name in os.listdir(leases) if name.startswith(("10.", "fd00"))]


def test_a_changed_cidr_moves_new_pods_and_takes_the_old_range_away(
    agent: Agent, runtime: Runtime, new_netns: Callable[[], Namespace]
) -> None:
    agent.reconcile()
    old, new = new_netns(), new_netns()
    runtime.add(old)
    agent.node = node_object("10.244.9.0/24", "fd00:10:244:9::/64")
    assert agent.reconcile(Trigger(changes={"nodes": {"n1": (DUAL, agent.node)}})).failures == ()
    assert agent.ranges() == [[{"subnet": "10.244.9.0/24"}], [{"subnet": "fd00:10:244:9::/64"}]]
    assert runtime.addresses(new) == ["10.244.9.2/24", "fd00:10:244:9::2/64"]
    eventually_pings(new, "10.244.9.1")
    eventually_pings(new, "fd00:10:244:9::1")
    shown = json.loads(agent.namespace.run("ip -json address show kube-bridge"))[0]["addr_info"]
    assert sorted(entry["local"] for entry in shown if entry["scope"] == "global") == ["10.244.9.1", "fd00:10:244:9::1"]
    runtime.delete(old)
    assert agent.reconcile(Trigger(period=True)).writes == 0


def test_single_configuration(agent: Agent, runtime: Runtime, new_netns: Callable[[], Namespace]) -> None:
    document = json.loads(agent.conf.read_text())
    single = agent.conf.with_suffix(".conf")
    single.write_text(json.dumps({"cniVersion": "0.3.0", **document["plugins"][0], "name": "mynet"}))
    agent.settings = Settings(
        node_name="n1", enable_ipv6=True, cni_conf_file=str(single), state_dir=agent.settings.state_dir
    )
    agent.restart()
    assert agent.reconcile().failures == ()
    pod = new_netns()
    addresses = Runtime(runtime.node, single, runtime.folder).addresses(pod)
    assert addresses == ["10.244.1.2/24", "fd00:10:244:1::2/64"]


def test_bridge_is_there_before_the_first_pod_without_addresses(agent: Agent) -> None:
    agent.reconcile()
    bridge = links(agent.namespace)["kube-bridge"]
    assert (bridge["linkinfo"]["info_kind"], bridge["mtu"], "UP" in bridge["flags"]) == ("bridge", 1450, True)
    shown = json.loads(agent.namespace.run("ip -json address show kube-bridge"))[0]["addr_info"]
    assert [entry for entry in shown if entry.get("scope") != "link"] == []


def test_restart_with_nothing_changed_writes_nothing(
    agent: Agent, runtime: Runtime, new_netns: Callable[[], Namespace]
) -> None:
    agent.reconcile()
    runtime.add(new_netns())
    record = Path(agent.settings.state_dir) / "cni" / "ranges.json"
    before = [(os.stat(path).st_ino, os.stat(path).st_mtime_ns) for path in (agent.conf, record)]
    agent.restart()
    for trigger in (START, Trigger(period=True), WOKEN):
        outcome = agent.reconcile(trigger)
        assert (outcome.writes, outcome.failures) == (0, ())
    assert agent.controller.link_writes == 0
    assert before == [(os.stat(path).st_ino, os.stat(path).st_mtime_ns) for path in (agent.conf, record)]


def test_a_deleted_bridge_comes_back_within_a_second(agent: Agent) -> None:
    agent.reconcile()
    agent.woken(0.2)
    agent.reconcile(WOKEN)
    agent.namespace.run("ip link delete kube-bridge")
    assert agent.woken()
    outcome = agent.reconcile(WOKEN)
    assert outcome.writes > 0
    assert outcome.counters == {'controller_repairs{what="bridge"}': 1}
    assert links(agent.namespace)["kube-bridge"]["mtu"] == 1450


def test_own_writes_settle(agent: Agent) -> None:
    """Our own events may wake the worker, but not for ever."""
    agent.reconcile()
    for turn in itertools.count():
        if not agent.woken(0.3):
            break
        assert agent.reconcile(WOKEN).writes == 0
        assert turn < 3


def test_mtu_follows_the_uplink(agent: Agent) -> None:
    agent.reconcile()
    agent.woken(0.2)
    agent.reconcile(WOKEN)
    agent.namespace.run("ip link set eth0 mtu 1400")
    assert agent.woken()
    agent.reconcile(WOKEN)
    assert links(agent.namespace)["kube-bridge"]["mtu"] == 1400
    assert json.loads(agent.conf.read_text())["plugins"][0]["mtu"] == 1400


def test_address_on_loopback_leaves_the_mtu_alone(agent: Agent) -> None:
    agent.namespace.run("ip address flush dev eth0 && ip address add 192.0.2.1/32 dev lo")
    outcome = agent.reconcile()
    assert outcome.failures == ()
    assert any("192.0.2.1 is on loopback link lo" in warning for warning in outcome.warnings)
    assert "mtu" not in json.loads(agent.conf.read_text())["plugins"][0]
    assert links(agent.namespace)["kube-bridge"]["mtu"] == 1500


def test_a_link_of_another_kind_is_not_touched(agent: Agent) -> None:
    agent.namespace.run("ip link add kube-bridge type veth peer name other")
    outcome = agent.reconcile()
    assert [failure.phase for failure in outcome.failures] == ["bridge"]
    assert "kube-bridge: is veth, not a bridge" in outcome.failures[0].text
    assert agent.ranges() == [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:10:244:1::/64"}]]
    assert links(agent.namespace)["kube-bridge"]["mtu"] == 1500


def test_bridge_sysctls(agent: Agent) -> None:
    names = (
        "net.bridge.bridge-nf-call-iptables",
        "net.bridge.bridge-nf-call-ip6tables",
        "net.ipv6.conf.all.disable_ipv6",
    )
    agent.namespace.run(f"sysctl -qw {names[0]}=0 {names[1]}=0 {names[2]}=1")
    agent.reconcile()
    assert agent.namespace.run(f"sysctl -n {' '.join(names)}").split() == ["1", "1", "0"]


def test_ipv6_sysctls_are_left_alone_without_ipv6(agent: Agent) -> None:
    agent.settings = Settings(
        node_name="n1", cni_conf_file=str(agent.conf), state_dir=agent.settings.state_dir, enable_ipv6=False
    )
    agent.restart()
    names = (
        "net.bridge.bridge-nf-call-iptables",
        "net.bridge.bridge-nf-call-ip6tables",
        "net.ipv6.conf.all.disable_ipv6",
    )
    agent.namespace.run(f"sysctl -qw {names[0]}=0 {names[1]}=0 {names[2]}=1")
    agent.reconcile()
    assert agent.namespace.run(f"sysctl -n {' '.join(names)}").split() == ["1", "0", "1"]
    assert agent.ranges() == [[{"subnet": "10.244.1.0/24"}]]


def test_forwarding_off_with_a_pod_is_told(agent: Agent, runtime: Runtime, new_netns: Callable[[], Namespace]) -> None:
    agent.reconcile()
    runtime.add(new_netns())
    agent.namespace.run("sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0")
    warnings = agent.reconcile(Trigger(period=True)).warnings
    assert [warning.split(":")[0] for warning in warnings] == [
        "sysctl net/ipv4/ip_forward",
        "sysctl net/ipv6/conf/all/forwarding",
    ]


def test_a_broken_file_is_left_told_and_mended_as_soon_as_it_is_whole(agent: Agent) -> None:
    agent.reconcile()
    good = agent.conf.read_text()
    agent.conf.write_text('{\n  "cniVersion": "0.3.0",\n  "plugins": [}\n')
    assert agent.woken()
    outcome = agent.reconcile(WOKEN)
    assert [failure.text for failure in outcome.failures] == [
        f"{agent.conf}: line 3 column 15: Expecting value; the file is left as it is"
    ]
    assert agent.conf.read_text() == '{\n  "cniVersion": "0.3.0",\n  "plugins": [}\n'
    agent.woken(0.1)
    agent.conf.write_text(good.replace("10.244.1.0/24", "10.244.1.0/25"))
    assert agent.woken()
    assert agent.reconcile(WOKEN).failures == ()


def test_a_missing_file_stops_nothing_else(agent: Agent) -> None:
    agent.conf.unlink()
    outcome = agent.reconcile()
    assert [failure.phase for failure in outcome.failures] == ["cni-file"]
    assert f"{agent.conf}: does not exist" in outcome.failures[0].text
    assert "kube-bridge" in links(agent.namespace)
    agent.woken(0.1)
    temporary = agent.conf.with_name("incoming")
    temporary.write_text(conflist(agent.conf.parent))
    temporary.rename(agent.conf)
    assert agent.woken()
    assert agent.reconcile(WOKEN).failures == ()
    assert len(agent.ranges()) == 2


def test_overlapping_ranges_are_what_the_plugin_refuses(
    agent: Agent, runtime: Runtime, new_netns: Callable[[], Namespace]
) -> None:
    """Why the worker takes old ranges out, normalises CIDRs and warns of overlaps."""
    document = json.loads(agent.conf.read_text())
    document["plugins"][0]["ipam"]["ranges"] = [[{"subnet": "10.244.1.0/25"}]]
    agent.conf.write_text(json.dumps(document))
    warnings = agent.reconcile().warnings
    assert any("10.244.1.0/25 overlaps 10.244.1.0/24" in warning for warning in warnings)
    with pytest.raises(PluginError, match="overlap"):
        runtime.add(new_netns())


def test_a_cidr_with_host_bits_is_put_right(agent: Agent, runtime: Runtime, new_netns: Callable[[], Namespace]) -> None:
    document = json.loads(agent.conf.read_text())
    document["plugins"][0]["ipam"]["ranges"] = [[{"subnet": "10.244.1.7/24", "rangeStart": "10.244.1.50"}]]
    agent.conf.write_text(json.dumps(document))
    with pytest.raises(PluginError, match="host bits"):
        runtime.add(new_netns())
    assert agent.reconcile().failures == ()
    assert runtime.addresses(new_netns()) == ["10.244.1.50/24", "fd00:10:244:1::2/64"]


def test_a_stale_snapshot_adds_and_never_removes(
    agent: Agent, runtime: Runtime, new_netns: Callable[[], Namespace]
) -> None:
    agent.node = node_object("10.244.1.0/24")
    agent.reconcile()
    runtime.add(new_netns())
    agent.state = SourceState(source="test", stale=True)
    before, agent.node = agent.node, node_object("10.244.9.0/24", "fd00:10:244:9::/64")
    agent.reconcile(Trigger(changes={"nodes": {"n1": (before, agent.node)}}))
    assert agent.ranges() == [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:10:244:9::/64"}]]
    assert runtime.addresses(new_netns()) == ["10.244.1.3/24", "fd00:10:244:9::2/64"]
    agent.state = SourceState(source="test", in_sync=True)
    agent.reconcile(WOKEN)
    assert agent.ranges() == [[{"subnet": "10.244.9.0/24"}], [{"subnet": "fd00:10:244:9::/64"}]]
    assert runtime.addresses(new_netns()) == ["10.244.9.2/24", "fd00:10:244:9::3/64"]


def test_two_ipv4_cidrs_are_what_the_bridge_plugin_refuses(
    agent: Agent, runtime: Runtime, new_netns: Callable[[], Namespace]
) -> None:
    agent.node = node_object("10.244.1.0/24", "10.244.2.0/24", "fd00:10:244:1::/64", "fd00:10:244:2::/64")
    assert any("10.244.1.0/24 and 10.244.2.0/24" in warning for warning in agent.reconcile().warnings)
    with pytest.raises(PluginError, match="already has an IP address"):
        runtime.add(new_netns())


def test_cleanup_removes_an_empty_bridge_and_leaves_the_file(agent: Agent) -> None:
    agent.reconcile()
    text = agent.conf.read_text()
    with agent.namespace.enter():
        assert cleanup(agent.settings) == []
        assert cleanup(agent.settings) == []
    assert "kube-bridge" not in links(agent.namespace)
    assert agent.conf.read_text() == text


def test_cleanup_leaves_a_bridge_in_use(agent: Agent, runtime: Runtime, new_netns: Callable[[], Namespace]) -> None:
    agent.reconcile()
    pod = new_netns()
    runtime.add(pod)
    with agent.namespace.enter():
        failures = cleanup(agent.settings)
    assert len(failures) == 1 and "has ports" in failures[0].text
    eventually_pings(pod, "10.244.1.1")


def test_deprecated_annotation_is_told_as_an_event(agent: Agent) -> None:
    agent.node = node_object(
        "10.244.1.0/24", "fd00:10:244:1::/64", annotations={"kube-router.io/pod-cidr": "10.244.7.0/24"}
    )
    outcome = agent.reconcile()
    assert [(notice.kind, notice.name, notice.uid, notice.reason) for notice in outcome.notices] == [
        ("Node", "n1", "u1", "DeprecatedAnnotation")
    ]
    assert outcome.notices[0].text in outcome.warnings
    assert agent.ranges() == [[{"subnet": "10.244.7.0/24"}], [{"subnet": "fd00:10:244:1::/64"}]]
    assert ipaddress.ip_network(agent.ranges()[1][0]["subnet"]).version == 6
