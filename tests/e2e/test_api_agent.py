"""The agent against a real kube-apiserver, in one network namespace: least RBAC, API cut, restart while it is down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab.cluster import wait_until
from support.apiserver import ALLOCATE, ApiServer
from support.namespaces import Namespace, namespaces, veth

TOKEN = "agent-token-for-tests"
USER = "kube-router"
RULES = [
    {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch", "get"]},
    {"apiGroups": [""], "resources": ["services"], "verbs": ["list", "watch"]},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    {"apiGroups": ["", "events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch", "update"]},
    *ALLOCATE,
]
BIN = Path(sys.executable).parent


def node(name: str, number: int, *, annotations: dict[str, str] | None = None) -> dict[str, Any]:
    addresses = (f"10.20.0.{number}", f"fd20::{number}")
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "annotations": annotations or {}},
        "spec": {"podCIDR": f"10.245.{number}.0/24", "podCIDRs": [f"10.245.{number}.0/24", f"fd00:245:{number}::/64"]},
        "status": {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]},
    }


class Agent:
    """One agent on one node, with its API server in the same namespace."""

    def __init__(self, folder: Path, namespace: Namespace, server: ApiServer) -> None:
        self.folder, self.namespace, self.server = folder, namespace, server
        self.conf = folder / "cni" / "10-kuberouter.conflist"
        self.conf.parent.mkdir()
        self.conf.write_text(
            json.dumps(
                {
                    "cniVersion": "0.3.1",
                    "name": "x",
                    "plugins": [{"type": "bridge", "bridge": "kube-bridge", "ipam": {"type": "host-local"}}],
                }
            )
        )
        self.kubeconfig = server.write_kubeconfig(folder / "kubeconfig", {"token": TOKEN})
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.folder / "agent.log").read_text(errors="replace")

    def start(self) -> None:
        command = [
            str(BIN / "kube-router"),
            f"--kubeconfig={self.kubeconfig}",
            f"--run-dir={self.folder / 'run'}",
            f"--state-dir={self.folder / 'state'}",
            "--hostname-override=alpha",
            "--run-firewall=false",
            "--run-service-proxy=false",
            "--enable-overlay=false",
            "--enable-ipv6",
            "--service-cluster-ip-range=10.96.0.0/12,fd00:10:96::/112",
            "--run-loadbalancer",
            "--loadbalancer-ip-range=192.0.2.0/28,2001:db8:5::/124",
        ]
        pod = {"POD_NAME": "kube-router-alpha", "POD_NAMESPACE": "kube-system"}
        environment = {
            **os.environ,
            **pod,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "KUBE_ROUTER_CNI_CONF_FILE": str(self.conf),
        }
        with (self.folder / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace.name, *command], stdout=log, stderr=log, env=environment
            )

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=15)
            self.process = None

    def status(self) -> dict[str, Any]:
        command = [str(BIN / "kube-routerctl"), "--run-dir", str(self.folder / "run"), "status", "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            reply = json.loads(done.stdout)
        except ValueError:
            return {}
        return reply if isinstance(reply, dict) else {}

    def members(self, name: str) -> set[str]:
        text = self.namespace.run(f"ipset list {name}", check=False)
        return {line.split()[0] for line in text.partition("Members:\n")[2].splitlines() if line.strip()}


@contextmanager
def running() -> Iterator[tuple[Agent, Namespace]]:
    with ExitStack() as stack:
        inside, outside = stack.enter_context(namespaces(2))
        veth(
            inside,
            "eth0",
            outside,
            "eth0",
            left_addresses=("10.20.0.1/24", "fd20::1/64"),
            right_addresses=("10.20.0.9/24", "fd20::9/64"),
        )
        folder = Path(stack.enter_context(temporary_folder()))
        stack.enter_context(inside.enter())
        server = stack.enter_context(ApiServer(folder / "api", tokens={TOKEN: (USER, ())}))
        server.allow(USER, RULES)
        server.apply(node("alpha", 1), node("beta", 2))
        agent = Agent(folder, inside, server)
        agent.start()
        stack.callback(agent.stop)
        yield agent, inside


@contextmanager
def temporary_folder() -> Iterator[str]:
    import tempfile

    # Not pytest's tmp_path: its long name would exceed what a unix socket's path may have.
    with tempfile.TemporaryDirectory(prefix="kr-") as folder:
        yield folder


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with running() as (made, _):
        assert wait_until(lambda: made.members("kube-router-node-ips") == {"10.20.0.1", "10.20.0.2"}, 40), made.log[
            -4000:
        ]
        yield made


def test_the_agent_follows_nodes_with_the_least_rbac(agent: Agent) -> None:
    agent.server.apply(node("gamma", 3))
    assert wait_until(lambda: "10.20.0.3" in agent.members("kube-router-node-ips"), 10)
    assert "fd20::3" in agent.members("inet6:kube-router-node-ips")
    agent.server.delete(node("gamma", 3))
    assert wait_until(lambda: "10.20.0.3" not in agent.members("kube-router-node-ips"), 10)


def test_the_own_nodes_deprecated_annotation_becomes_an_event(agent: Agent) -> None:
    agent.server.apply(node("alpha", 1, annotations={"kube-router.io/pod-cidr": "10.245.1.0/24"}))

    def told() -> bool:
        _, answer = agent.server.request("GET", "/api/v1/events")
        events = [event for event in answer["items"] if event["involvedObject"]["name"] == "alpha"]
        return any("kube-router.io/pod-cidr" in event["message"] for event in events)

    assert wait_until(told, 15), agent.log[-3000:]
    agent.server.apply(
        {**node("alpha", 1), "metadata": {"name": "alpha", "annotations": {"kube-router.io/pod-cidr": None}}}
    )


def test_a_service_gets_its_addresses_and_keeps_them_when_the_allocator_is_killed(agent: Agent) -> None:
    def web(name: str) -> dict[str, Any]:
        spec = {"type": "LoadBalancer", "ipFamilyPolicy": "RequireDualStack", "ports": [{"port": 80}]}
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": "default"},
            "spec": spec,
        }

    def addresses(name: str) -> list[str]:
        _, answer = agent.server.request("GET", f"/api/v1/namespaces/default/services/{name}")
        return [entry["ip"] for entry in answer["status"]["loadBalancer"].get("ingress", [])]

    def pid() -> int:
        found = (worker for worker in agent.status().get("workers", []) if worker["name"] == "loadbalancer")
        return next((worker["pid"] for worker in found if worker["state"] == "RUNNING"), 0)

    agent.server.apply(web("one"))
    assert wait_until(lambda: len(addresses("one")) == 2, 40), agent.log[-4000:]
    given, before = addresses("one"), pid()
    os.kill(before, signal.SIGKILL)
    agent.server.apply(web("two"))
    assert wait_until(lambda: pid() not in (0, before), 20), agent.status()
    assert wait_until(lambda: len(addresses("two")) == 2, 40), agent.log[-4000:]
    assert addresses("one") == given
    assert not set(addresses("two")) & set(given)
    for name in ("one", "two"):
        agent.server.delete(web(name))


def test_a_cut_api_changes_nothing_and_is_told_but_never_unhealthy(agent: Agent) -> None:
    before = agent.namespace.run("ipset save; iptables-save | grep ^-A; ip6tables-save | grep ^-A")
    agent.server.stop_server(kill=True)
    try:
        assert wait_until(lambda: bool(agent.status().get("source", {}).get("degraded")), 30), agent.status()
        assert agent.status()["healthy"] is True
        answer = agent.namespace.run(
            "wget -qO- http://127.0.0.1:20244/healthz 2>/dev/null || curl -s http://127.0.0.1:20244/healthz",
            check=False,
        )
        assert answer.startswith("OK"), answer
        assert agent.namespace.run("ipset save; iptables-save | grep ^-A; ip6tables-save | grep ^-A") == before
    finally:
        agent.server.start_server()
    assert wait_until(lambda: not agent.status().get("source", {}).get("degraded"), 60), agent.status()


def test_an_agent_restarted_while_the_api_is_down_goes_on_from_its_snapshot(agent: Agent) -> None:
    agent.server.apply(node("delta", 4))
    assert wait_until(lambda: "10.20.0.4" in agent.members("kube-router-node-ips"), 10)
    before = agent.namespace.run("ipset save; iptables-save | grep ^-A; ip6tables-save | grep ^-A")
    agent.stop()
    agent.server.stop_server()
    agent.namespace.run("ipset del kube-router-node-ips 10.20.0.4")
    agent.namespace.run("ipset add kube-router-node-ips 10.20.0.77")
    agent.start()
    try:
        # Stale: what is missing is put back, what is there too much stays until the API says so.
        assert wait_until(lambda: "10.20.0.4" in agent.members("kube-router-node-ips"), 30), agent.log[-4000:]
        assert "10.20.0.77" in agent.members("kube-router-node-ips")
        assert wait_until(lambda: agent.status().get("source", {}).get("stale") is True, 10), agent.status()
    finally:
        agent.server.start_server()
    assert wait_until(lambda: "10.20.0.77" not in agent.members("kube-router-node-ips"), 60), agent.log[-4000:]
    # The health worker hears of it by the watcher's next heartbeat, up to a second later.
    assert wait_until(lambda: agent.status().get("source", {}).get("stale") is False, 10), agent.status()
    assert agent.namespace.run("ipset save; iptables-save | grep ^-A; ip6tables-save | grep ^-A") == before


def test_a_token_that_may_not_list_nodes_is_told_and_nothing_is_removed(agent: Agent) -> None:
    before = agent.members("kube-router-node-ips")
    agent.server.allow(USER, RULES[1:])
    try:
        pid = next(worker["pid"] for worker in agent.status()["workers"] if worker["name"] == "watcher")
        os.kill(pid, signal.SIGKILL)
        wanted = lambda: any(  # noqa: E731
            "nodes" in line and "forbidden" in line.lower()
            for line in agent.status().get("source", {}).get("degraded", [])
        )
        assert wait_until(wanted, 30), agent.status()
        assert agent.members("kube-router-node-ips") == before
    finally:
        agent.server.allow(USER, RULES)
    assert wait_until(lambda: not agent.status().get("source", {}).get("degraded"), 60), agent.status()
