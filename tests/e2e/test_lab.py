"""The whole agent on three nodes: connectivity, kills under traffic, live changes, restarts without a write."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from lab import network
from lab.cluster import Lab, wait_until
from lab.connections import SteadyConnections, post, stop_all, verdicts, verdicts_of, wrong
from lab.pings import SteadyPing, matrix
from lab.shop import GUARDED, STAGES, UNWANTED, WANTED, WEB1, WEB3, Question
from lab.topology import EXTERNAL_HOSTS, NODES, node_manifest
from support.labstate import dataplane, output, pod_routes, rules

NOBODYS = re.compile(r" lladdr |^# new generation|^\d+: veth|^\s+link/ether")
"""What the kernel tells by itself: neighbour entries, and the bridge's own notes about the state of pods' ports."""


def pid_of(lab: Lab, node: str, worker: str) -> int:
    return int(lab.workers(node)[worker]["pid"])


@contextmanager
def kernel_writes(lab: Lab, node: str) -> Iterator[list[str]]:
    """Collects what the kernel tells of changes to links, addresses, routes, rules and nftables in a node."""
    seen: list[str] = []
    watchers = [
        subprocess.Popen(
            lab.namespaces.command(node, command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in (["ip", "monitor", "link", "address", "route", "rule"], ["nft", "monitor"])
    ]
    time.sleep(0.3)
    try:
        yield seen
    finally:
        time.sleep(0.3)
        for watcher in watchers:
            watcher.terminate()
            text, _ = watcher.communicate(timeout=10)
            seen += [line for line in text.splitlines() if line.strip() and not NOBODYS.search(line)]


@contextmanager
def nothing_lost_nor_let_through(lab: Lab, wanted: Sequence[Question] = WANTED) -> Iterator[None]:
    """Attempts to be answered and attempts to be refused, at 50 Hz each, around what happens inside."""
    streams = {question: SteadyConnections(lab, question) for question in (*wanted, *UNWANTED)}
    time.sleep(0.5)
    try:
        yield
        time.sleep(0.5)
    finally:
        ended = stop_all(streams)
    for question, attempts in ended.items():
        bad = attempts.lost if question in wanted else attempts.opened
        assert bad == 0 and attempts.made > 50, f"{question.text}: {dict(attempts.how)}"


def guard(lab: Lab) -> None:
    """Post the policies that let some in and keep others out, and see that they do."""
    post(lab, GUARDED)
    assert wrong(verdicts_of(lab, GUARDED), GUARDED) == []


def harmless_policy(number: int) -> dict[str, object]:
    """A policy for all pods of the shop that gives another block each time, and changes no verdict of the shop's."""
    block = {"ipBlock": {"cidr": f"192.0.2.{number}/32"}}
    spec = {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [block]}],
        "egress": [{"to": [block]}],
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "shop", "name": "harmless"},
        "spec": spec,
    }


def test_every_pod_reaches_every_pod_and_the_external_host(lab: Lab) -> None:
    cells = matrix(lab)
    assert len(cells) == 3 * 3 * 2
    assert [cell for cell in cells if not cell.ok] == []


def test_the_external_router_learns_the_pod_cidrs_and_no_other_prefix_of_the_cluster(lab: Lab) -> None:
    wanted = {cidr for node in NODES for cidr in node.pod_cidrs}

    def learned() -> set[str]:
        text = network.bird_routes(lab.namespaces, "external", lab.folder / "external")
        return {word for word in text.split() if "/" in word and word.startswith(("10.244", "fd00:244"))}

    assert wait_until(lambda: learned() == wanted, 20), learned()


VIPS = {"10.96.0.50/32", "fd00:96::50/128"}


def vip_manifests(**conditions: bool) -> dict[str, dict[str, object]]:
    """A Service that is announced only where it has an endpoint, and its endpoints, on node1."""
    spec = {"clusterIP": "10.96.0.50", "clusterIPs": ["10.96.0.50", "fd00:96::50"], "internalTrafficPolicy": "Local"}
    note = {"kube-router.io/service.advertise.clusterip": "true"}
    service = {"apiVersion": "v1", "kind": "Service", "spec": {**spec, "ports": [{"port": 80}]}}
    found: dict[str, dict[str, object]] = {
        "vip": {**service, "metadata": {"namespace": "shop", "name": "vip", "annotations": note}}
    }
    for family, address in (("IPv4", "10.244.1.200"), ("IPv6", "fd00:244:1::200")):
        labels = {"kubernetes.io/service-name": "vip"}
        found[f"vip-{family}"] = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"namespace": "shop", "name": f"vip-{family.lower()}", "labels": labels},
            "addressType": family,
            "endpoints": [{"addresses": [address], "nodeName": "node1", "conditions": conditions}],
            "ports": [{"port": 8080}],
        }
    return found


def test_the_external_router_follows_the_addresses_of_a_service(lab: Lab) -> None:
    def vips() -> set[str]:
        text = network.bird_routes(lab.namespaces, "external", lab.folder / "external")
        return {word for word in text.split() if word.startswith(("10.96.", "fd00:96:"))}

    assert vips() == set()
    try:
        for name, manifest in vip_manifests(ready=True).items():
            lab.write_manifest(name, manifest)
        assert wait_until(lambda: vips() == VIPS, 20), vips()
        for name, manifest in vip_manifests(ready=False, serving=True, terminating=True).items():
            lab.write_manifest(name, manifest)
        assert wait_until(lambda: vips() == set(), 20), vips()
    finally:
        for name in vip_manifests():
            lab.remove_manifest(name)


def test_learned_routes_are_in_the_main_table_for_next_hops_on_the_own_segment(lab: Lab) -> None:
    routes = pod_routes(lab, "node1")
    assert any(route.startswith("10.244.2.0/24 via 10.10.1.12 ") for route in routes), routes
    assert any(route.startswith("fd00:244:2::/64 via fd10:1::12 ") for route in routes), routes
    assert any(route.startswith("198.51.100.0/24 via 10.10.1.1 ") for route in routes), routes
    assert not any(route.startswith(("10.244.3.0/24", "fd00:244:3::/64")) for route in routes), routes


def test_pods_leave_the_cluster_with_the_nodes_address(lab: Lab) -> None:
    capture = subprocess.Popen(
        lab.namespaces.command("external", ["tcpdump", "-nli", "uplink", "-c", "2", "icmp[0]=8 or icmp6[0]=128"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    time.sleep(1)
    for host in EXTERNAL_HOSTS:
        network.run(lab.namespaces.command("node1-pod1", ["ping", "-c", "1", "-W", "2", host]))
    text, _ = capture.communicate(timeout=10)
    assert "10.10.1.11 > 198.51.100.1" in text, text
    assert "fd10:1::11 > 2001:db8:100::1" in text, text


@pytest.mark.parametrize("worker", ["watcher", "cni", "router", "firewall", "health"])
def test_killing_a_worker_loses_no_packet_and_changes_nothing(lab: Lab, worker: str) -> None:
    before = dataplane(lab, "node1")
    pid = pid_of(lab, "node1", worker)
    pings = [
        SteadyPing(lab, "node1-pod1", pod.name, address)
        for pod in lab.pods.values()
        if pod.name != "node1-pod1"
        for address in pod.addresses
    ]
    with kernel_writes(lab, "node1") as writes:
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: lab.restarted("node1", worker, pid), 20), lab.status("node1")
    for ping in pings:
        sent, lost = ping.stop()
        assert lost == 0 and sent > 50, f"{ping.family} to {ping.target}: lost {lost} of {sent}"
    assert dataplane(lab, "node1") == before
    assert writes == []


@pytest.mark.parametrize("worker", ["cni", "router", "firewall"])
def test_restarting_a_worker_by_supervisorctl_writes_nothing(lab: Lab, worker: str) -> None:
    pid = pid_of(lab, "node1", worker)
    with kernel_writes(lab, "node1") as writes:
        output(lab, "node1", "supervisorctl", "restart", worker)
        assert wait_until(lambda: lab.restarted("node1", worker, pid), 20)
    assert writes == []
    workers = lab.workers("node1")
    assert workers[worker]["writes"] == 0, workers[worker]


def test_killing_gobgpd_keeps_the_nodes_own_routes_and_heals(lab: Lab) -> None:
    pid = pid_of(lab, "node1", "gobgpd")
    before = pod_routes(lab, "node1")
    with kernel_writes(lab, "node1") as writes:
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: lab.restarted("node1", "gobgpd", pid), 40), lab.status("node1")
    assert not [line for line in writes if line.startswith("Deleted")], writes
    assert pod_routes(lab, "node1") == before
    assert wait_until(lambda: any(r.startswith("10.244.1.0/24 via") for r in pod_routes(lab, "node2")), 20)


@pytest.mark.parametrize(
    "foreign",
    [
        [
            "iptables",
            "-D",
            "FORWARD",
            "-i",
            "kube-bridge",
            "-m",
            "comment",
            "--comment",
            "allow outbound traffic from pods",
            "-j",
            "ACCEPT",
        ],
        ["ip6tables", "-t", "nat", "-F", "POSTROUTING"],
        ["ip", "route", "del", "10.244.2.0/24"],
        ["ip", "-6", "route", "del", "fd00:244:2::/64"],
        ["ipset", "flush", "kube-router-pod-subnets"],
        ["ipset", "del", "inet6:kube-router-node-ips", "fd10:1::12"],
    ],
    ids=lambda command: " ".join(command[:6]),
)
def test_what_someone_removes_is_there_again(lab: Lab, foreign: list[str]) -> None:
    before = dataplane(lab, "node1")
    output(lab, "node1", *foreign)
    assert wait_until(lambda: dataplane(lab, "node1") == before, 5), dataplane(lab, "node1")


def test_a_changed_pod_cidr_is_followed_everywhere_without_a_restart(lab: Lab) -> None:
    pids = {name: worker["pid"] for name, worker in lab.workers("node2").items()}
    manifest = node_manifest(NODES[1])
    changed = json.loads(json.dumps(manifest))
    changed["spec"]["podCIDRs"] = ["10.244.22.0/24", "fd00:244:22::/64"]
    changed["spec"]["podCIDR"] = "10.244.22.0/24"
    lab.delete_pod("node2-pod1")
    try:
        lab.write_manifest("node2", changed)

        def followed() -> bool:
            routes = pod_routes(lab, "node1")
            return (
                any(route.startswith("10.244.22.0/24 via 10.10.1.12") for route in routes)
                and any(route.startswith("fd00:244:22::/64 via fd10:1::12") for route in routes)
                and not any(route.startswith(("10.244.2.0/24", "fd00:244:2::/64")) for route in routes)
                and "10.244.22.0/24" in lab.conf_file("node2").read_text()
                and "10.244.2.0/24" not in lab.conf_file("node2").read_text()
                and "10.244.22.0/24" in output(lab, "node3", "ipset", "list", "kube-router-pod-subnets")
            )

        assert wait_until(followed, 15), pod_routes(lab, "node1")
        assert lab.add_pod("node2", 2).addresses[0].startswith("10.244.22.")
        assert wait_until(lambda: all(cell.ok for cell in matrix(lab)), 10)
        lab.delete_pod("node2-pod2")
    finally:
        lab.write_manifest("node2", manifest)
    assert wait_until(lambda: any(r.startswith("10.244.2.0/24 via") for r in pod_routes(lab, "node1")), 15)
    assert wait_until(lambda: "10.244.2.0/24" in lab.conf_file("node2").read_text(), 15)
    lab.add_pod("node2")
    assert {name: worker["pid"] for name, worker in lab.workers("node2").items()} == pids


def test_a_node_that_goes_takes_its_routes_and_session_with_it(lab: Lab) -> None:
    manifest = node_manifest(NODES[1])
    (lab.manifests / "node2.yaml").unlink()
    try:
        assert wait_until(lambda: not any("10.10.1.12" in r for r in pod_routes(lab, "node1")), 15), pod_routes(
            lab, "node1"
        )
        sessions = lab.status("node1")["sessions"]
        assert "10.10.1.12" not in {session["address"] for session in sessions}
    finally:
        lab.write_manifest("node2", manifest)
    assert wait_until(lambda: all(lab.ready(node.name) for node in NODES), 40)
    assert wait_until(lambda: any(r.startswith("10.244.2.0/24 via") for r in pod_routes(lab, "node1")), 20)


def test_policies_decide_alike_in_both_families_and_on_every_node(shop_lab: Lab) -> None:
    for stage in STAGES:
        post(shop_lab, stage)
        assert wrong(verdicts_of(shop_lab, stage), stage) == [], stage.title
        assert wrong(verdicts(shop_lab), stage) == [], f"{stage.title}, a moment later"


def test_a_pods_labels_are_followed(shop_lab: Lab) -> None:
    guard(shop_lab)
    allowed = tuple(question for question in GUARDED.allowed if question.source != WEB3.short)
    without = dataclasses.replace(GUARDED, allowed=allowed)
    shop_lab.tell(dataclasses.replace(WEB3, labels={"app": "other"}))
    assert wrong(verdicts_of(shop_lab, without), without) == []
    shop_lab.tell(WEB3)
    assert wrong(verdicts_of(shop_lab, GUARDED), GUARDED) == []


def test_killing_the_firewall_again_and_again_lets_nothing_through_and_loses_nothing(shop_lab: Lab) -> None:
    guard(shop_lab)
    before = dataplane(shop_lab, "node1")
    with kernel_writes(shop_lab, "node1") as writes, nothing_lost_nor_let_through(shop_lab):
        for _ in range(3):
            pid = pid_of(shop_lab, "node1", "firewall")
            os.kill(pid, signal.SIGKILL)
            assert wait_until(lambda pid=pid: shop_lab.restarted("node1", "firewall", pid), 20)  # type: ignore[misc]
            assert shop_lab.workers("node1")["firewall"]["writes"] == 0
    assert writes == []
    assert dataplane(shop_lab, "node1") == before


def test_the_router_shows_all_of_itself_and_plans_nothing(lab: Lab) -> None:
    run_dir = str(lab.run_dir("node1"))

    def shown() -> dict[str, Any]:
        done = lab.on("node1", ["kube-routerctl", "--run-dir", run_dir, "status", "router", "-o", "json"])
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def complete() -> bool:
        sessions = shown().get("sessions", [])
        return bool(sessions) and all(session["advertised"] for session in sessions)

    assert wait_until(complete, 20), shown()
    found = shown()
    assert found["healthy"] and found["changes"] == 0 and found["daemon"] in ("gobgpd 3", "gobgpd 4")
    assert {session["state"] for session in found["sessions"]} == {"established"}
    assert all(session["since"] > 0 and session["families"] for session in found["sessions"])
    assert {path["kind"] for path in found["announced"]} == {"pods"}
    injected = {route["prefix"] for route in found["learned"] if route["route"]}
    kernel = {line.split()[0] for line in pod_routes(lab, "node1")}
    assert injected and {str(ipaddress.ip_network(item)) for item in kernel} == injected
    text = output(lab, "node1", "kube-routerctl", "--run-dir", run_dir, "status", "router")
    assert "established" in text and "Announced: " in text and "Learned: " in text

    with kernel_writes(lab, "node1") as writes:
        plan = lab.on("node1", ["kube-routerctl", "--run-dir", run_dir, "plan", "router"])
        assert (plan.returncode, plan.stdout, plan.stderr) == (0, "", "")
    assert not writes
    neighbors = output(lab, "node1", "gobgp", "neighbor")
    assert all(session["address"] in neighbors for session in found["sessions"])


def test_killing_the_firewall_while_policies_change_lets_nothing_through_and_loses_nothing(shop_lab: Lab) -> None:
    guard(shop_lab)
    with nothing_lost_nor_let_through(shop_lab):
        for number in range(6):
            pid = pid_of(shop_lab, "node1", "firewall")
            shop_lab.write_manifest("policy-harmless", harmless_policy(number))
            time.sleep(0.04 + number * 0.005)  # somewhere in the middle of its sync
            os.kill(pid, signal.SIGKILL)
            assert wait_until(lambda pid=pid: shop_lab.restarted("node1", "firewall", pid), 20)  # type: ignore[misc]
        shop_lab.remove_manifest("policy-harmless")
    assert wrong(verdicts(shop_lab), GUARDED) == []


def test_policies_stand_while_no_agent_runs(shop_lab: Lab) -> None:
    """Of the node's own pods: routes from others go with the BGP sessions of an agent that is stopped."""
    guard(shop_lab)
    before = dataplane(shop_lab, "node1")
    beside = tuple(question for question in WANTED if question.source == WEB1.short)
    with kernel_writes(shop_lab, "node1") as writes, nothing_lost_nor_let_through(shop_lab, beside):
        agent = shop_lab.agents["node1"]
        agent.send_signal(signal.SIGTERM)
        agent.wait(timeout=15)
        assert dataplane(shop_lab, "node1") == before
        shop_lab.start_agent(NODES[0])
        assert wait_until(lambda: shop_lab.ready("node1"), 40), shop_lab.log_file("node1").read_text()[-3000:]
    assert not [line for line in writes if line.startswith("Deleted")], writes
    assert shop_lab.workers("node1")["firewall"]["writes"] == 0
    assert dataplane(shop_lab, "node1") == before


def test_changing_the_backend_and_back_lets_nothing_through_and_loses_nothing(shop_lab: Lab) -> None:

    def state() -> dict[str, str]:
        """Sets that are made anew have another seed of their hash."""
        found = dataplane(shop_lab, "node1")
        return found | {"ipset": re.sub(r" initval \S+", "", found["ipset"])}

    guard(shop_lab)
    before = state()
    other = f"--use-nftables-for-netpol={'false' if uses_nftables(shop_lab) else 'true'}"
    beside = tuple(question for question in WANTED if question.source == WEB1.short)
    with nothing_lost_nor_let_through(shop_lab, beside):
        for flags in ([other], []):
            shop_lab.agents["node1"].send_signal(signal.SIGTERM)
            shop_lab.agents["node1"].wait(timeout=15)
            shop_lab.start_agent(NODES[0], flags)
            assert wait_until(lambda: shop_lab.ready("node1"), 40), shop_lab.log_file("node1").read_text()[-3000:]
            after = state()
            expected = uses_nftables(shop_lab) ^ bool(flags)
            assert (
                bool(after["nftables"]) is expected and ("KUBE-" in after["iptables"] + after["ipset"]) is not expected
            )
    assert after == before


def uses_nftables(lab: Lab) -> bool:
    """Whether policies are in nftables in this lab."""
    return "--use-nftables-for-netpol" in lab.agent_command(NODES[0])


def flush_forward(lab: Lab) -> None:
    for tool in ("iptables", "ip6tables"):
        output(lab, "node1", tool, "-F", "KUBE-ROUTER-FORWARD")


def unhook_forward(lab: Lab) -> None:
    for tool in ("iptables", "ip6tables"):
        output(lab, "node1", tool, "-D", "FORWARD", "1")


def delete_tables(lab: Lab) -> None:
    output(lab, "node1", "nft", "delete table ip kube-router-filter-ipv4; delete table ip6 kube-router-filter-ipv6")


VANDALS: dict[str, list[Callable[[Lab], None]]] = {
    "iptables": [flush_forward, unhook_forward],
    "nftables": [delete_tables],
}


def test_what_someone_takes_from_the_firewall_is_there_again_within_a_second(shop_lab: Lab) -> None:
    guard(shop_lab)
    before = dataplane(shop_lab, "node1")
    nftables = uses_nftables(shop_lab)
    assert bool(before["nftables"]) is nftables and ("KUBE-NWPLCY" in before["iptables"]) is not nftables
    first = [output(shop_lab, "node1", tool, "-S", "FORWARD", "1") for tool in ("iptables", "ip6tables")]
    for vandal in VANDALS["nftables" if nftables else "iptables"]:
        vandal(shop_lab)
        time.sleep(1)
        assert dataplane(shop_lab, "node1") == before, vandal.__name__
        assert first == [output(shop_lab, "node1", tool, "-S", "FORWARD", "1") for tool in ("iptables", "ip6tables")]
        assert wrong(verdicts(shop_lab), GUARDED) == []


def test_upgrade_by_stop_and_start_leaves_the_dataplane(lab: Lab) -> None:
    before = dataplane(lab, "node3")
    agent = lab.agents["node3"]
    began = time.monotonic()
    agent.send_signal(signal.SIGTERM)
    agent.wait(timeout=15)
    assert time.monotonic() - began <= 10
    assert dataplane(lab, "node3") == before
    with kernel_writes(lab, "node3") as writes:
        lab.start_agent(NODES[2])
        assert wait_until(lambda: lab.ready("node3"), 40), lab.log_file("node3").read_text()[-3000:]
    assert not [line for line in writes if line.startswith("Deleted")], writes
    assert dataplane(lab, "node3") == before
    assert wait_until(lambda: all(cell.ok for cell in matrix(lab)), 20)


def test_killing_supervisord_leaves_the_dataplane_and_a_new_agent_takes_over(lab: Lab) -> None:
    before = dataplane(lab, "node3")
    agent = lab.agents["node3"]
    agent.kill()
    agent.wait(timeout=5)
    in_namespace = lambda: network.run(["ip", "netns", "pids", lab.namespaces.full("node3")]).split()  # noqa: E731
    assert wait_until(lambda: not in_namespace(), 10), "orphans are left in the node"
    assert dataplane(lab, "node3") == before
    lab.start_agent(NODES[2])
    assert wait_until(lambda: lab.ready("node3"), 40), lab.log_file("node3").read_text()[-3000:]
    assert dataplane(lab, "node3") == before
    assert wait_until(lambda: all(cell.ok for cell in matrix(lab)), 20)


def test_cleanup_config_removes_what_the_agent_made_and_nothing_else(shop_lab: Lab) -> None:
    """Runs last: the agent of node3 does not come back."""
    lab = shop_lab
    guard(lab)
    made = dataplane(lab, "node3")
    assert "KUBE-NWPLCY" in made["iptables"] + made["nftables"]
    output(lab, "node3", "iptables", "-A", "FORWARD", "-s", "192.0.2.1", "-j", "ACCEPT")
    output(lab, "node3", "ipset", "create", "foreign", "hash:ip")
    output(lab, "node3", "ip", "route", "add", "192.0.2.0/24", "via", "10.10.2.1")
    agent = lab.agents["node3"]
    agent.terminate()
    agent.wait(timeout=15)
    done = subprocess.run(
        lab.namespaces.command("node3", [*lab.agent_command(NODES[2]), "--cleanup-config"]),
        capture_output=True,
        text=True,
        env=lab.environment("node3"),
    )
    assert done.returncode == 0, done.stderr
    assert pod_routes(lab, "node3") == set()
    assert not re.search("kube-router|KUBE-", output(lab, "node3", "ipset", "save"))
    assert not re.search("kube-router|KUBE-", output(lab, "node3", "nft", "list", "ruleset"))
    assert "foreign" in output(lab, "node3", "ipset", "save")
    assert rules(output(lab, "node3", "iptables-save")) == "-A FORWARD -s 192.0.2.1/32 -j ACCEPT"
    assert rules(output(lab, "node3", "ip6tables-save")) == ""
    assert "192.0.2.0/24" in output(lab, "node3", "ip", "route")
