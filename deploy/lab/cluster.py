"""A running lab: namespaces, routers, one agent a node from plain manifests, pods by the real CNI plugins.

Touches processes and files: everything lies in one folder (default ``/run/kube-router-lab/<name>``) and in namespaces
with the lab's prefix; `Lab.down` removes exactly these.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import network, topology
from lab.cniruntime import CniRuntime
from lab.topology import NODES, LabNode, LabPod

LAB_ROOT = Path("/run/kube-router-lab")
CNI_PLUGIN_DIRS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))


SYNCING_WORKERS = ("cni", "router", "firewall")


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of the lab: its network namespace's short name, its node, its addresses (IPv4, IPv6)."""

    name: str
    node: str
    addresses: tuple[str, ...]
    manifest: str
    """Name of its manifest."""


class Lab:
    """One lab; its name keeps several apart on one machine."""

    def __init__(
        self,
        name: str = "lab",
        *,
        gobgpd_dir: Path | None = None,
        plugin_dirs: Sequence[Path] = CNI_PLUGIN_DIRS,
        extra_flags: Sequence[str] = (),
    ) -> None:
        """``gobgpd_dir`` goes in front of PATH, to run with another gobgpd; ``extra_flags`` go to every agent."""
        self.name = name
        self.folder = LAB_ROOT / name
        self.namespaces = network.Namespaces(name)
        self.manifests = self.folder / "manifests"
        self._gobgpd_dir, self._plugin_dirs, self._extra_flags = gobgpd_dir, plugin_dirs, tuple(extra_flags)
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self.pods: dict[str, Pod] = {}

    # -- files and commands of a node ---------------------------------------------------------------------------

    def run_dir(self, node: str) -> Path:
        """The agent's run directory."""
        return self.folder / node / "run"

    def log_file(self, node: str) -> Path:
        """Where the agent's one stream of log lines goes."""
        return self.folder / node / "agent.log"

    def conf_file(self, node: str) -> Path:
        """The node's CNI configuration."""
        return self.folder / node / "cni" / "10-kuberouter.conflist"

    def environment(self, node: str) -> dict[str, str]:
        """Environment of everything that runs on a node."""
        scripts = str(Path(sys.executable).parent)
        path = [scripts, os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        if self._gobgpd_dir is not None:
            path.insert(0, str(self._gobgpd_dir))
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith("KUBE")},
            "PATH": ":".join(filter(None, path)),
            "KUBE_ROUTER_CNI_CONF_FILE": str(self.conf_file(node)),
        }

    def agent_command(self, node: LabNode, flags: Sequence[str] = ()) -> list[str]:
        """The agent's command line; ``flags`` come last, and win."""
        return [
            str(Path(sys.executable).parent / "kube-router"),
            f"--manifests={self.manifests}",
            f"--run-dir={self.run_dir(node.name)}",
            f"--state-dir={self.folder / node.name / 'state'}",
            *topology.agent_flags(node),
            *self._extra_flags,
            *flags,
        ]

    def on(self, node: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command on a node: in its namespace, with the run directory as working directory."""
        return subprocess.run(
            self.namespaces.command(node, command),
            text=True,
            capture_output=True,
            cwd=self.run_dir(node) if self.run_dir(node).exists() else self.folder,
            env=self.environment(node),
            check=False,
        )

    def status(self, node: str) -> dict[str, Any]:
        """``kube-routerctl status -o json`` of a node; empty while the agent does not answer."""
        command = ["kube-routerctl", "--run-dir", str(self.run_dir(node)), "status", "-o", "json"]
        done = self.on(node, command)
        try:
            reply = json.loads(done.stdout)
        except ValueError:
            return {}
        return reply if isinstance(reply, dict) else {}

    def workers(self, node: str) -> dict[str, dict[str, Any]]:
        """The workers' part of a node's status, by name."""
        return workers_of(self.status(node))

    def ready(self, node: str) -> bool:
        """Whether a node is healthy, its workers have synced what they have to, and all its BGP sessions are up."""
        status = self.status(node)
        workers = workers_of(status)
        synced = all(workers.get(name, {}).get("last_sync_age") is not None for name in SYNCING_WORKERS)
        sessions = status.get("sessions", [])
        established = bool(sessions) and all(session["state"] == "established" for session in sessions)
        return bool(status.get("healthy")) and synced and established

    def restarted(self, node: str, worker: str, before: int) -> bool:
        """Whether a worker runs in another process than ``before`` and the node is ready."""
        found = self.workers(node).get(worker, {})
        return found.get("state") == "RUNNING" and found.get("pid") not in (None, 0, before) and self.ready(node)

    # -- life --------------------------------------------------------------------------------------------------

    def up(self, progress: Callable[[str], None]) -> None:
        """Build everything and start the agents; returns when they are started, not when they are in sync."""
        if self.namespaces.existing() or self.folder.exists():
            raise network.LabError(f"lab {self.name} is there already; remove it with: make lab-down")
        self.folder.mkdir(parents=True)
        progress("building namespaces, segments and the two routers")
        network.build(self.namespaces)
        for name, text in (("fabric", topology.fabric_bird()), ("external", topology.external_bird())):
            network.start_bird(self.namespaces, name, text, self.folder / name)
        self.manifests.mkdir()
        for node in NODES:
            self.write_manifest(node.name, topology.node_manifest(node))
        for node in NODES:
            progress(f"starting the agent of {node.name}")
            conf = self.conf_file(node.name)
            conf.parent.mkdir(parents=True)
            conf.write_text(topology.conflist(self.folder / node.name / "host-local"))
            self.start_agent(node)

    def write_manifest(self, name: str, manifest: Mapping[str, object]) -> None:
        """Put one object into the manifest directory, by rename as an editor or kubelet would."""
        new = self.manifests / f".{name}.yaml.new"
        new.write_text(json.dumps(manifest, indent=2) + "\n")
        new.rename(self._manifest_file(name))

    def remove_manifest(self, name: str) -> None:
        """Delete an object; fine if it is not there."""
        self._manifest_file(name).unlink(missing_ok=True)

    def _manifest_file(self, name: str) -> Path:
        return self.manifests / f"{name}.yaml"

    def start_agent(self, node: LabNode, flags: Sequence[str] = ()) -> None:
        """Start one node's agent, in its namespace; ``flags`` come behind those that it always has."""
        with self.log_file(node.name).open("ab") as log:
            self.agents[node.name] = subprocess.Popen(
                self.namespaces.command(node.name, self.agent_command(node, flags)),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self.environment(node.name),
                start_new_session=True,
            )

    def add_pod(self, node: str, number: int = 1) -> Pod:
        """A pod of the default namespace, named after its node."""
        return self.run_pod(LabPod("default", f"{node}-pod{number}", node, {"app": "ping"}))

    def run_pod(self, wanted: LabPod) -> Pod:
        """Connect a pod by its node's CNI configuration, then tell its addresses in its manifest, as kubelet does."""
        if not self._manifest_file(f"namespace-{wanted.namespace}").exists():
            self.write_manifest(f"namespace-{wanted.namespace}", topology.namespace_manifest(wanted.namespace))
        name, node = wanted.short, wanted.node
        self.namespaces.add(name)
        result = CniRuntime(self.namespaces, node, self.conf_file(node), self._plugin_dirs).add(name)
        addresses = sorted((entry["address"].split("/")[0] for entry in result["ips"]), key=lambda text: ":" in text)
        self.pods[name] = Pod(name, node, tuple(addresses), f"pod-{wanted.namespace}-{wanted.name}")
        self.tell(wanted)
        return self.pods[name]

    def tell(self, wanted: LabPod) -> None:
        """Write the manifest of a connected pod; with other labels, say, than before."""
        pod = self.pods[wanted.short]
        self.write_manifest(pod.manifest, topology.pod_manifest(wanted, pod.addresses))

    def find_pods(self) -> None:
        """Know the pods of a standing lab from their manifests, which another process has written."""
        for path in sorted(self.manifests.glob("pod-*.yaml")):
            found = json.loads(path.read_text())
            meta, node = found["metadata"], found["spec"]["nodeName"]
            name = LabPod(meta["namespace"], meta["name"], node).short
            self.pods[name] = Pod(name, node, tuple(entry["ip"] for entry in found["status"]["podIPs"]), path.stem)

    def delete_pod(self, name: str) -> None:
        """Stop what runs in a pod, take it off the network, delete its network namespace and its manifest."""
        pod = self.pods.pop(name)
        self.namespaces.stop_processes([name])
        CniRuntime(self.namespaces, pod.node, self.conf_file(pod.node), self._plugin_dirs).delete(name)
        self.namespaces.delete(name)
        self.remove_manifest(pod.manifest)

    def down(self) -> None:
        """Stop what runs in the lab's namespaces, delete them and the lab's folder."""
        self.namespaces.remove_all()
        for agent in self.agents.values():
            agent.wait()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        if LAB_ROOT.exists() and not any(LAB_ROOT.iterdir()):
            LAB_ROOT.rmdir()


def workers_of(status: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The workers' part of a status reply, by name."""
    workers = status.get("workers", [])
    return {str(worker["name"]): worker for worker in workers} if isinstance(workers, list) else {}


def wait_until(check: Callable[[], bool], seconds: float, interval: float = 0.1) -> bool:
    """Poll ``check`` until it holds or the time is over; returns whether it held."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() >= deadline:
            return False
        time.sleep(interval)
    return True
