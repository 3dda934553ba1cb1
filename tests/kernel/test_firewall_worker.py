"""The firewall worker on a real kernel, with both backends: real loop, controller, engine and drivers."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import pytest
from support.firewallnode import IN_SYNC, STALE, FirewallNode, firewall, kernel_state
from support.namespaces import Namespace
from support.policyworld import NODE, block, namespaces, pod, pods, policy, port, rule, select

from kube_router.ipc.messages import Namespace as ApiNamespace
from kube_router.ipc.messages import Node, Projection, Service, ServicePort
from kube_router.workers.firewall.cleanup import cleanup
from kube_router.workers.firewall.engine import Engine
from kube_router.workers.firewall.frame import FrameMaker, NodePorts
from kube_router.workers.firewall.names import NFT_TABLES
from kube_router.workers.firewall.reach import reach
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings

DUAL = Settings(
    node_name=NODE,
    enable_ipv6=True,
    service_cluster_ip_range=("10.96.0.0/12", "fd00:96::/112"),
    service_external_ip_range=("198.51.100.0/24",),
)
BACKENDS = {
    "iptables": DUAL,
    "nftables": msgspec.structs.replace(DUAL, use_nftables_for_netpol=True),
}
WORLD: tuple[Projection, ...] = (
    Node(name=NODE, pod_cidrs=("10.0.0.0/24", "fd00::/64")),
    ApiNamespace(name="x", labels={"name": "x"}),
    ApiNamespace(name="y", labels={"name": "y"}),
    pod("x/web", 1, ports={"http": 8080}, app="web"),
    pod("x/db", 2, app="db"),
    pod("y/client", 3, "n2", app="client"),
    pod("y/other", 4, "n2", app="other"),
    policy("x/web-in", select(app="web"), ingress=[rule(pods(app="db"), namespaces(name="y"), ports=[port("http")])]),
    policy(
        "x/db",
        select(app="db"),
        ingress=[rule(pods(app="web"), ports=[port(5432)])],
        egress=[rule(block("10.0.0.0/8", "10.1.0.0/16"), block("::/0")), rule(ports=[port(53, protocol="UDP")])],
    ),
    policy("y/nobody-here", select(app="client"), ingress=[]),
    Service(name="web", namespace="x", type="NodePort", ports=(ServicePort(port=80, node_port=30080),)),
)
FOREIGN = """
for p in iptables ip6tables; do
  $p -P FORWARD ACCEPT; $p -P INPUT ACCEPT; $p -P OUTPUT ACCEPT
  $p -N DOCKER-USER; $p -A FORWARD -j DOCKER-USER; $p -A DOCKER-USER -j RETURN
  $p -A INPUT -p tcp --dport 22 -m comment --comment "mine" -j ACCEPT
done
ipset create blocklist hash:net; ipset add blocklist 192.0.2.0/24
iptables -A INPUT -m set --match-set blocklist src -j DROP
nft add table ip foreign; nft add chain ip foreign input '{ type filter hook input priority 10; }'
nft add rule ip foreign input ip saddr 192.0.2.1 drop
"""


@dataclass
class Host:
    """A namespace with foreign rules and sets, and the settings of a backend."""

    netns: Namespace
    settings: Settings
    before: dict[str, str]

    @property
    def backend(self) -> str:
        return "nftables" if self.settings.use_nftables_for_netpol else "iptables"

    def state(self) -> dict[str, str]:
        return kernel_state(self.netns)

    def wreck(self) -> None:
        """A foreign hand empties what is ours."""
        if self.backend == "nftables":
            self.netns.run(f"nft delete table ip {NFT_TABLES[4]}; nft flush table ip6 {NFT_TABLES[6]}")  # type: ignore[index]
        else:
            self.netns.run("iptables -F KUBE-ROUTER-FORWARD; ip6tables -F KUBE-NWPLCY-COMMON; iptables -D INPUT 1")


@pytest.fixture(params=list(BACKENDS))
def host(netns: Namespace, request: pytest.FixtureRequest) -> Iterator[Host]:
    netns.run(FOREIGN)
    with netns.enter():
        yield Host(netns, BACKENDS[request.param], kernel_state(netns))


@contextmanager
def nothing_written(netns: Namespace) -> Iterator[None]:
    """No table or rule is touched during the block; sets are compared by the caller."""
    listener = netns.start(["nft", "monitor"], stdout=subprocess.PIPE)
    time.sleep(0.3)
    try:
        yield
    finally:
        time.sleep(0.2)
        listener.terminate()
        text, _ = listener.communicate(timeout=10)
    assert text == ""


def restart_writes(host: Host, *objects: Projection) -> float:
    """What a worker with no memory changes when it starts on this kernel with these objects."""
    with firewall(host.settings, *objects) as node:
        assert node.beat.errors == {}, node.beat.warnings
        return node.beat.writes


def plan(host: Host, node: FirewallNode) -> tuple[str, ...]:
    """As ``kube-routerctl plan firewall`` makes it: by another process's engine and backend."""
    cluster = node.replica.cluster
    engine, ports = Engine(NODE, host.settings.families), NodePorts()
    engine.update(cluster, None)
    ports.replace(cluster.services)
    kernel = reach(host.settings)
    try:
        frame = FrameMaker(host.settings).make(cluster.nodes.get(NODE), ports.all).frame
        return kernel.backend.plan(engine.ruleset, frame)
    finally:
        kernel.close()


def test_a_cold_start_programs_both_families_and_leaves_foreign_rules_alone(host: Host) -> None:
    with firewall(host.settings, *WORLD) as node:
        beat = node.beat
        assert (beat.errors, beat.warnings, beat.pending) == ({}, (), 0)
        assert beat.writes > 0
        assert [component.name for component in beat.components] == ["NetworkPolicyController"]
        assert (beat.counts["policy_enforced"], beat.counts["policy_isolated_pods"]) == (2, 2)
        assert beat.counts["controller_policy_chains"] > 0
        state = host.state()
    for address in ("10.0.0.3", "fd00::3", "10.0.0.4", "fd00::4"):
        assert address in state["ipset"] + state["nft"], "members of a peer set"
    assert "30080" in state["ipset"] + state["nft"]
    assert all(line in state["nft"] for line in host.before["nft"].splitlines())
    assert all(line in state["ipset"] for line in host.before["ipset"].splitlines())


def test_a_restarted_worker_writes_nothing_and_neither_does_a_check(host: Host) -> None:
    with firewall(host.settings, *WORLD):
        pass
    before = host.state()
    with nothing_written(host.netns), firewall(host.settings, *WORLD) as node:
        assert (node.beat.writes, node.beat.errors) == (0, {})
        assert node.controller.reconcile(node.replica.cluster, Trigger(period=True)).writes == 0
        assert plan(host, node) == ()
    assert host.state() == before


def test_pod_and_policy_events_end_where_a_cold_start_would(host: Host) -> None:
    with firewall(host.settings, *WORLD) as node:
        node.put(pod("y/client", 3, "n2", app="client", extra="yes"))
        node.put(pod("x/db2", 5, app="db"), pod("y/late", 6, "n2", app="late"))
        node.put(ApiNamespace(name="y", labels={"name": "other"}))
        node.put(policy("x/web-in", select(app="web"), ingress=[rule(pods(app="db"), ports=[port(81), port("http")])]))
        node.put(policy("x/all", ingress=[], egress=[rule(namespaces())]))
        node.put(gone=(pod("x/db", 2), policy("y/nobody-here")))
        node.put(Service(name="web", namespace="x", type="NodePort", ports=(ServicePort(port=80, node_port=30081),)))
        assert (node.beat.errors, node.beat.pending) == ({}, 0), node.beat.warnings
        assert node.samples("policy_enforcement_latency_seconds")
        assert plan(host, node) == ()
        objects = [item for table in node.objects.values() for item in table.values()]
    assert restart_writes(host, *objects) == 0
    state = host.state()
    assert "30080" not in state["ipset"] + state["nft"]


def test_own_writes_wake_nobody(host: Host) -> None:
    with firewall(host.settings, *WORLD) as node:
        node.put(policy("x/all", ingress=[], egress=[rule(namespaces())]), pod("x/db2", 5, app="db"))
        node.put(gone=(policy("x/all"),))
        syncs = node.beat.syncs
        assert not node.until(lambda: node.beat.syncs > syncs, 1.5)


def test_what_a_foreign_hand_wrecks_is_repaired_within_a_second_and_counted(host: Host) -> None:
    with firewall(host.settings, *WORLD) as node:
        right = host.state()
        assert node.beat.counters.get("policy_drift_repairs", 0) == 0
        host.wreck()
        assert host.state() != right
        assert node.until(lambda: sorted_lines(host.state()) == sorted_lines(right), 1.0), plan(host, node)
        assert node.until(lambda: node.beat.counters["policy_drift_repairs"] >= 2, 1.0)
        assert node.beat.errors == {}
        assert plan(host, node) == ()
        # Somebody else's business is none of ours.
        node.settle()
        writes, repairs, state = node.beat.writes, node.beat.counters["policy_drift_repairs"], host.state()
        host.netns.run("iptables -A INPUT -p tcp --dport 23 -j ACCEPT; nft add table ip elsewhere")
        host.netns.run("ipset add blocklist 198.51.100.0/24")
        assert host.state() != state
        node.settle(quiet=1.2)
        assert (node.beat.writes, node.beat.counters["policy_drift_repairs"]) == (writes, repairs)


def sorted_lines(state: dict[str, str]) -> list[str]:
    """A chain that is made anew stands at another place of its table."""
    return sorted(line for text in state.values() for line in text.splitlines())


def test_a_foreign_member_or_rule_is_found_by_the_check_and_told_in_the_plan(host: Host) -> None:
    with firewall(host.settings, *WORLD) as node:
        right = host.state()
        if host.backend == "iptables":
            name = next(line.split()[1] for line in right["ipset"].splitlines() if line.startswith("add KUBE-SRC"))
            host.netns.run(f"ipset add {name} 10.66.66.66; ipset del kube-router-local-pods 10.0.0.1")
            host.netns.run("iptables -I KUBE-ROUTER-FORWARD 1 -j ACCEPT")
        else:
            host.netns.run(f"nft insert rule ip {NFT_TABLES[4]} KUBE-ROUTER-FORWARD accept")  # type: ignore[index]
        assert plan(host, node) != ()
        assert node.until(lambda: host.state() == right, 2.5)
        assert node.until(lambda: node.beat.counters["policy_drift_repairs"] >= 1, 1.0)


def test_a_stale_state_adds_and_keeps_and_a_confirmed_one_removes(host: Host) -> None:
    with firewall(host.settings, *WORLD):
        pass
    before = sorted_lines(host.state())
    fewer = [item for item in WORLD if item.key not in ("x/db", "y/other")]
    more = pod("y/more", 9, "n2", app="more")
    with firewall(host.settings, *fewer, more, state=STALE) as node:
        assert node.beat.errors == {}
        kept = sorted_lines(host.state())
        text = "\n".join(kept)
        assert "10.0.0.9" in text and "10.0.0.4" in text, "added, and kept"
        if host.backend == "iptables":
            assert set(before) <= set(kept)
        node.say(IN_SYNC)
        assert node.beat.errors == {}
        assert "10.0.0.4" not in "\n".join(sorted_lines(host.state()))
        assert plan(host, node) == ()
    assert restart_writes(host, *fewer, more) == 0


def test_switching_backends_leaves_nothing_of_the_other(host: Host) -> None:
    other = BACKENDS["iptables" if host.backend == "nftables" else "nftables"]
    with firewall(host.settings, *WORLD):
        pass
    first = sorted_lines(host.state())
    with firewall(other, *WORLD) as node:
        assert node.beat.errors == {}, node.beat.warnings
        text = "\n".join(sorted_lines(host.state()))
        if host.backend == "nftables":
            assert "KUBE-ROUTER-FORWARD" in text and NFT_TABLES[4] not in text  # type: ignore[index]
        else:
            assert NFT_TABLES[4] in text and "kube-router-local-pods hash:ip" not in text  # type: ignore[index]
            assert "KUBE-ROUTER-FORWARD" not in host.netns.run("iptables-save")
    with firewall(host.settings, *WORLD):
        pass
    assert sorted_lines(host.state()) == first


def test_cleanup_leaves_the_host_byte_for_byte_as_it_was(host: Host) -> None:
    with firewall(host.settings, *WORLD):
        assert host.state() != host.before
    assert cleanup(host.settings) == []
    assert host.state() == host.before


def test_a_policy_that_cannot_be_understood_is_told_and_the_others_are_enforced(host: Host) -> None:
    bad = policy("x/bad", select(app="web"), ingress=[rule(block("10.0.0.0/99")), rule(block("10.3.0.0/16"))])
    with firewall(host.settings, *WORLD, bad) as node:
        assert node.beat.errors == {}
        [warning] = node.beat.warnings
        assert "x/bad" in warning and "10.0.0.0/99" in warning
        [notice] = node.told()
        assert (notice.kind, notice.namespace, notice.name) == ("NetworkPolicy", "x", "bad")
        assert "10.3.0.0" in "\n".join(sorted_lines(host.state()))
        assert plan(host, node) == ()


def test_default_deny_follows_the_nodes_pod_cidrs(host: Host) -> None:
    host.settings = msgspec.structs.replace(host.settings, netpol_default_deny=True)
    bare = [item for item in WORLD if not isinstance(item, Node)]
    with firewall(host.settings, *bare, Node(name=NODE)) as node:
        assert node.beat.errors == {}
        [warning] = node.beat.warnings
        assert "has no IPv4 and IPv6 pod CIDR" in warning
        node.put(Node(name=NODE, pod_cidrs=("10.77.0.0/24", "fd77::/64")))
        assert node.beat.warnings == ()
        text = "\n".join(sorted_lines(host.state()))
        assert "10.77.0.0/24" in text and "fd77::/64" in text
        node.put(Node(name=NODE, pod_cidrs=("10.78.0.0/24",)))
        text = "\n".join(sorted_lines(host.state()))
        assert "10.78.0.0/24" in text and "10.77.0.0/24" not in text
        assert plan(host, node) == ()
