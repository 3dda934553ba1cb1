"""The firewall in a whole agent, both backends: a policy file is edited, the worker is killed, the kernel follows.

Each agent has a network namespace of its own; the state comes from a directory of manifests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.agent import Agent, new_agent, wait_until

NODE = """
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDRs: [10.244.1.0/24, "fd00:244:1::/64"]}
status:
  addresses: [{type: InternalIP, address: 192.0.2.1}, {type: InternalIP, address: "2001:db8::1"}]
---
apiVersion: v1
kind: Namespace
metadata: {name: x, labels: {team: a}}
"""
POD = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: x, labels: {{app: {name}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, image: i}}]}}
status:
  phase: Running
  podIP: 10.244.{subnet}.{last}
  podIPs: [{{ip: 10.244.{subnet}.{last}}}, {{ip: "fd00:244:{subnet}::{last}"}}]
"""
POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: web, namespace: x}}
spec:
  podSelector: {{matchLabels: {{app: web}}}}
  policyTypes: [Ingress]
  ingress: [{{from: [{peer}], ports: [{{port: {port}}}]}}]
"""
CLIENT = "{podSelector: {matchLabels: {app: client}}}"
BACKENDS = ("iptables", "nftables")


class Node:
    """An agent with its manifests and its kernel."""

    def __init__(self, agent: Agent, manifests: Path, backend: str) -> None:
        self.agent, self.manifests, self.backend = agent, manifests, backend

    def write(self, name: str, text: str) -> None:
        """A manifest appears whole, as by an atomic editor."""
        temporary = self.manifests / f".{name}.new"
        temporary.write_text(text)
        temporary.rename(self.manifests / f"{name}.yaml")

    def policy(self, port: int, peer: str = CLIENT) -> None:
        self.write("policy", POLICY.format(port=port, peer=peer))

    def kernel(self) -> str:
        """Everything that filters, of both backends, without counters."""
        commands = ("nft -s list ruleset", "ipset save | sort")
        return "".join(self.agent.run("sh", "-c", command).stdout for command in commands)

    def shows(self, *texts: str, absent: tuple[str, ...] = (), seconds: float = 15.0) -> bool:
        """Whether the kernel comes to hold these texts, and those not."""

        def held() -> bool:
            state = self.kernel()
            return all(text in state for text in texts) and not any(text in state for text in absent)

        return bool(wait_until(held, seconds))

    def worker(self) -> dict[str, Any]:
        """The firewall's line of ``kube-routerctl status``."""
        text = self.agent.ctl("status", "-o", "json").stdout
        workers = json.loads(text)["workers"] if text else []
        return next((worker for worker in workers if worker["name"] == "firewall"), {})

    def plan(self, *arguments: str) -> tuple[int, str]:
        """``kube-routerctl plan firewall``."""
        done = self.agent.ctl("plan", "firewall", *arguments)
        assert done.returncode in (0, 2), done.stderr
        return done.returncode, done.stdout


def dport(port: int) -> str:
    """As a rule of either backend has it in nft's words."""
    return f"dport {port} "


@pytest.fixture(scope="module", params=BACKENDS)
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("fw")
    manifests = folder / "manifests"
    manifests.mkdir()
    with new_agent(
        folder,
        manifests=str(manifests),
        node_name="n1",
        enable_ipv6=True,
        run_router=False,
        run_service_proxy=False,
        use_nftables_for_netpol=request.param == "nftables",
        health_port=20244,
    ) as agent:
        made = Node(agent, manifests, request.param)
        made.write("node", NODE)
        made.write("web", POD.format(name="web", node="n1", subnet=1, last=10))
        made.write("client", POD.format(name="client", node="n2", subnet=2, last=20))
        made.policy(8080)
        agent.start()
        agent.wait_running("watcher", "firewall", "health")
        yield made


def test_manifests_become_rules_of_both_families(node: Node) -> None:
    assert node.shows("10.244.2.20", "fd00:244:2::20", dport(8080)), node.agent.log[-4000:]
    assert wait_until(lambda: node.worker().get("last_sync_age") is not None)
    worker = node.worker()
    assert (worker["state"], worker["errors"], worker["pending"]) == ("RUNNING", {}, 0)
    assert worker["privileges"] == "uid=0 caps=net_admin,net_raw no_new_privs=1"


def test_the_status_shows_its_counts_and_the_agent_is_healthy(node: Node) -> None:
    shown = node.agent.ctl("status")
    assert shown.returncode == 0, shown.stdout
    for text in ("policy_enforced 1", "policy_isolated_pods 1", "policy_local_pods 1", "controller_policy_chains"):
        assert f"\n  {text}" in shown.stdout, shown.stdout


def test_an_edited_policy_and_a_relabelled_pod_are_followed(node: Node) -> None:
    node.policy(9090)
    assert node.shows(dport(9090), absent=(dport(8080),)), node.agent.log[-4000:]
    node.write("client", POD.format(name="client", node="n2", subnet=2, last=21))
    assert node.shows("10.244.2.21", "fd00:244:2::21", absent=("10.244.2.20", "fd00:244:2::20"))
    node.policy(9090, peer="{namespaceSelector: {matchLabels: {team: b}}}")
    assert node.shows(absent=("10.244.2.21",))
    node.policy(8080)
    node.write("client", POD.format(name="client", node="n2", subnet=2, last=20))
    assert node.shows("10.244.2.20", dport(8080))


def test_the_plan_is_empty_on_a_healthy_node_and_tells_what_would_be_repaired(node: Node) -> None:
    assert wait_until(lambda: node.plan() == (0, "")), node.plan()
    code, text = node.plan("-o", "json")
    assert (code, json.loads(text)) == (
        0,
        {"worker": "firewall", "backend": node.backend, "stale": False, "changes": []},
    )
    pid = node.agent.pid_of("firewall")
    os.kill(pid, signal.SIGSTOP)  # else it would repair before anybody looks
    try:
        if node.backend == "iptables":
            node.agent.run("iptables", "-F", "KUBE-NWPLCY-COMMON")
        else:
            node.agent.run("nft", "delete", "table", "ip6", "kube-router-filter-ipv6")
        before = node.kernel()
        code, text = node.plan()
        assert code == 2 and text.count("\n") >= 1, text
        code, text = node.plan("-o", "json")
        assert (code, len(json.loads(text)["changes"]) >= 1) == (2, True)
        assert node.kernel() == before, "a plan writes nothing"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert wait_until(lambda: node.plan() == (0, "")), node.plan()


def test_a_killed_worker_leaves_the_rules_and_its_successor_writes_nothing(node: Node) -> None:
    assert wait_until(lambda: node.plan() == (0, ""))
    before, pid = node.kernel(), node.agent.table()["firewall"]["pid"]
    os.kill(node.agent.pid_of("firewall"), signal.SIGKILL)
    assert node.kernel() == before

    def back() -> bool:
        worker = node.worker()
        return worker.get("pid") not in (None, 0, pid) and worker.get("last_sync_age") is not None

    assert wait_until(back, 20), node.agent.log[-4000:]
    assert (node.worker()["writes"], node.worker()["errors"]) == (0, {})
    assert node.kernel() == before
    node.policy(7070)
    assert node.shows(dport(7070)), "in sync again"
    node.policy(8080)
    assert node.shows(dport(8080))


def test_a_bad_policy_file_changes_nothing_of_the_others(node: Node) -> None:
    bad = POLICY.format(port=53, peer='{ipBlock: {cidr: "10.0.0.0/99"}}').replace("name: web,", "name: bad,")
    node.write("bad", bad)

    def told() -> bool:
        text = node.agent.ctl("status", "-o", "json").stdout
        return any("x/bad" in line and "10.0.0.0/99" in line for line in json.loads(text)["warnings"])

    assert wait_until(told), node.agent.log[-3000:]
    assert node.shows("10.244.2.20", dport(8080), absent=(dport(53),))
    assert node.agent.ctl("status").returncode == 0
    (node.manifests / "bad.yaml").unlink()
    assert wait_until(lambda: node.plan() == (0, ""))


def test_stopping_the_agent_leaves_the_rules_and_cleaning_up_removes_them(node: Node) -> None:
    """Last in the file: the agent does not come back."""
    namespace = os.open(f"/proc/{node.agent.supervisord()}/ns/net", os.O_RDONLY)
    try:
        before = node.kernel()
        assert node.agent.stop()[0] == 0
        inside = ["nsenter", f"--net=/proc/self/fd/{namespace}", "--"]
        assert look(inside, namespace) == before
        clean = [*inside, sys.executable, "-P", "-m", "kube_router.supervisor.cli", "--cleanup-config"]
        done = subprocess.run(clean, capture_output=True, text=True, pass_fds=(namespace,), timeout=60)
        assert "clean-up of firewall: done" in done.stdout, done.stdout
        state = look(inside, namespace)
        assert "KUBE" not in state and "kube-router" not in state
    finally:
        os.close(namespace)


def look(inside: list[str], namespace: int) -> str:
    return "".join(
        subprocess.run([*inside, "sh", "-c", command], capture_output=True, text=True, pass_fds=(namespace,)).stdout
        for command in ("nft -s list ruleset", "ipset save | sort")
    )
