"""The firewall of an agent against a real kube-apiserver: it follows what changes, survives, and tells by Events."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab.cluster import wait_until
from support.apiserver import ApiServer
from support.namespaces import Namespace, namespaces

from kube_router.workers.firewall.names import set_name
from kube_router.workers.firewall.rules import BlockSet, Direction
from kube_router.workers.model import Family

TOKEN, USER = "agent-token-for-tests", "kube-router"
RULES = [
    {"apiGroups": [""], "resources": ["nodes", "pods", "namespaces", "services"], "verbs": ["list", "watch"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["list", "watch"]},
    {"apiGroups": ["", "events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch", "update"]},
]
BIN = Path(sys.executable).parent
BLOCK = "203.0.113.0/24"


def node() -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "alpha"},
        "spec": {"podCIDR": "10.245.1.0/24", "podCIDRs": ["10.245.1.0/24", "fd00:245:1::/64"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    }


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pod(name: str, last: int, where: str = "beta", space: str = "shop", **labels: str | None) -> dict[str, Any]:
    ips = [{"ip": f"10.245.2.{last}"}, {"ip": f"fd00:245:2::{last}"}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": space, "labels": labels},
        "spec": {"nodeName": where, "containers": [{"name": "c", "image": "i", "ports": [
            {"name": "http", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIP": ips[0]["ip"], "podIPs": ips},
    }  # fmt: skip


def policy(*rules: dict[str, Any], name: str = "web", app: str = "web") -> dict[str, Any]:
    spec = {"podSelector": {"matchLabels": {"app": app}}, "policyTypes": ["Ingress"], "ingress": list(rules)}
    metadata = {"name": name, "namespace": "shop"}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


def from_pods(port: int | str, **labels: str) -> dict[str, Any]:
    return {"from": [{"podSelector": {"matchLabels": labels}}], "ports": [{"port": port}]}


class Agent:
    """One agent on one node, with its API server in the same namespace."""

    def __init__(self, folder: Path, netns: Namespace, server: ApiServer, flags: tuple[str, ...]) -> None:
        self.folder, self.netns, self.server, self.flags = folder, netns, server, flags
        self.kubeconfig = server.write_kubeconfig(folder / "kubeconfig", {"token": TOKEN})
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.folder / "agent.log").read_text(errors="replace")[-4000:]

    def start(self) -> None:
        command = [
            str(BIN / "kube-router"),
            f"--kubeconfig={self.kubeconfig}",
            f"--run-dir={self.folder / 'run'}",
            f"--state-dir={self.folder / 'state'}",
            "--hostname-override=alpha",
            "--run-router=false",
            "--run-service-proxy=false",
            "--enable-ipv6",
            "--service-cluster-ip-range=10.96.0.0/12,fd00:10:96::/112",
            *self.flags,
        ]
        environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
        with (self.folder / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.netns.name, *command], stdout=log, stderr=log, env=environment
            )

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=15)
            self.process = None

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "kube-routerctl"), "--run-dir", str(self.folder / "run"), *arguments]
        return subprocess.run(["ip", "netns", "exec", self.netns.name, *command], capture_output=True, text=True)

    def status(self) -> dict[str, Any]:
        try:
            found = json.loads(self.ctl("status", "-o", "json").stdout)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def worker(self) -> dict[str, Any]:
        return next((each for each in self.status().get("workers", []) if each["name"] == "firewall"), {})

    def kernel(self) -> str:
        return self.netns.run("nft -s list ruleset; ipset save | sort")

    def shows(self, *texts: str, absent: tuple[str, ...] = (), seconds: float = 15.0) -> bool:
        def held() -> bool:
            state = self.kernel()
            return all(text in state for text in texts) and not any(text in state for text in absent)

        return bool(wait_until(held, seconds))

    def events(self, name: str) -> list[str]:
        _, answer = self.server.request("GET", "/api/v1/events")
        return [
            f"{event['reason']}: {event['message']}"
            for event in answer["items"]
            if (event["involvedObject"]["kind"], event["involvedObject"]["name"]) == ("NetworkPolicy", name)
        ]


@contextmanager
def running(flags: tuple[str, ...]) -> Iterator[Agent]:
    with ExitStack() as stack:
        (netns,) = stack.enter_context(namespaces(1))
        # Not pytest's tmp_path: its long name would exceed what a unix socket's path may have.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kr-")))
        stack.enter_context(netns.enter())
        server = stack.enter_context(ApiServer(folder / "api", tokens={TOKEN: (USER, ())}))
        server.allow(USER, RULES)
        server.apply(node(), namespace("shop", team="a"), namespace("away", team="b"))
        server.apply(pod("web", 10, "alpha", app="web"), pod("client", 20, app="client"))
        server.apply(pod("guest", 30, space="away", app="client"), policy(from_pods("http", app="client")))
        agent = Agent(folder, netns, server, flags)
        agent.start()
        stack.callback(agent.stop)
        yield agent


@pytest.fixture(scope="module", params=["iptables", "nftables"])
def agent(request: pytest.FixtureRequest) -> Iterator[Agent]:
    with running(("--use-nftables-for-netpol",) if request.param == "nftables" else ()) as made:
        assert made.shows("10.245.2.20", "fd00:245:2::20", seconds=40), made.log
        yield made


def test_with_the_least_rbac_nothing_is_amiss(agent: Agent) -> None:
    assert wait_until(lambda: agent.worker().get("last_sync_age") is not None, 10)
    assert agent.status()["source"]["degraded"] == []
    assert (agent.worker()["errors"], agent.status()["healthy"]) == ({}, True)
    assert agent.ctl("plan", "firewall").stdout == ""


def test_pods_policies_and_namespaces_are_followed(agent: Agent) -> None:
    agent.server.apply(pod("client", 20, app="other"))
    assert agent.shows(absent=("10.245.2.20", "fd00:245:2::20"))
    agent.server.apply(pod("client", 20, app="client"), pod("late", 21, app="client"))
    assert agent.shows("10.245.2.20", "10.245.2.21", "fd00:245:2::21")
    agent.server.apply(policy({"from": [{"namespaceSelector": {"matchLabels": {"team": "b"}}}]}))
    assert agent.shows("10.245.2.30", "fd00:245:2::30", absent=("10.245.2.20",))
    agent.server.apply(namespace("away", team="c"))
    assert agent.shows(absent=("10.245.2.30",))
    agent.server.apply(namespace("away", team="b"), pod("db", 11, "alpha", app="db"))
    agent.server.apply(policy(from_pods(5432, app="web"), name="db", app="db"))
    assert agent.shows("10.245.2.30", "dport 5432 ")
    agent.server.delete(policy(name="db"))
    assert agent.shows(absent=("dport 5432 ",))
    agent.server.delete(pod("db", 11))
    agent.server.apply(policy(from_pods("http", app="client")))
    assert agent.shows("10.245.2.20", absent=("10.245.2.30",))
    assert wait_until(lambda: agent.ctl("plan", "firewall").returncode == 0, 10), agent.ctl("plan", "firewall").stdout


def test_a_killed_worker_leaves_the_rules_and_is_in_sync_again(agent: Agent) -> None:
    before, pid = agent.kernel(), agent.worker()["pid"]
    os.kill(pid, signal.SIGKILL)
    agent.server.apply(pod("meanwhile", 22, app="client"))

    def back() -> bool:
        worker = agent.worker()
        return worker.get("pid") not in (None, 0, pid) and worker.get("last_sync_age") is not None

    assert wait_until(back, 20), agent.log
    assert agent.shows("10.245.2.22")
    agent.server.delete(pod("meanwhile", 22))
    assert wait_until(lambda: agent.kernel() == before, 15)


def test_a_cut_api_removes_nothing_and_the_plan_says_that_the_state_is_old(agent: Agent) -> None:
    before = agent.kernel()
    agent.stop()
    agent.server.stop_server()
    agent.start()
    try:
        assert wait_until(lambda: agent.worker().get("last_sync_age") is not None, 30), agent.log
        assert agent.kernel() == before
        plan = agent.ctl("plan", "firewall")
        assert (plan.returncode, plan.stdout) == (0, "")
        assert "not confirmed" in plan.stderr
        assert agent.status()["healthy"] is True
    finally:
        agent.server.start_server()
    assert wait_until(lambda: agent.status().get("source", {}).get("in_sync"), 60), agent.log
    assert agent.kernel() == before


def test_a_policy_that_the_kernel_refuses_gets_an_event_and_heals(agent: Agent) -> None:
    """A foreign ipset has the name of one of ours, and another type."""
    name = set_name(BlockSet(Direction.INGRESS, Family.IPV4, (BLOCK,)), Family.IPV4)
    agent.netns.run(f"ipset create {name} bitmap:port range 0-9")
    blocked = policy({"from": [{"ipBlock": {"cidr": BLOCK}}]}, name="blocked")
    agent.server.apply(blocked)
    if "--use-nftables-for-netpol" in agent.flags:
        assert agent.shows(BLOCK), "sets of nftables are in a table of ours, where nobody takes their names"
        assert agent.events("blocked") == []
    else:
        assert wait_until(lambda: any(name in line for line in agent.events("blocked")), 20), agent.log
        assert agent.events("blocked")[0].startswith("NetworkPolicyNotProgrammed: node alpha: ")
        assert wait_until(lambda: agent.status()["counts"]["policy_failed"] == 1, 5)
        agent.server.apply(pod("late", 21, app="other"))
        assert agent.shows(absent=("10.245.2.21",)), "the other policies go on"
        assert agent.status()["healthy"] is True
    agent.netns.run(f"ipset destroy {name}")
    assert agent.shows(BLOCK, seconds=90), agent.log
    assert wait_until(lambda: agent.status()["counts"]["policy_failed"] == 0, 10)
    agent.server.delete(blocked)
    assert agent.shows(absent=(BLOCK,))
