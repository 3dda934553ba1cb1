"""The container runtime's part for tests: it runs the real CNI plugins of a configuration file for one pod.

Touches the kernel and the file system: plugins run inside the node's namespace, as libcni does it (CNI specification
1.0, section 4).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.namespaces import Namespace

DEBIAN_PLUGINS = "/usr/lib/cni"
CURRENT_PLUGINS = os.environ.get("KUBE_ROUTER_TOOLS", str(Path.home() / ".cache" / "kube-router-tools"))


class PluginError(AssertionError):
    """A plugin ended with a status other than 0; the text is what it printed."""


@dataclass(frozen=True)
class Runtime:
    """Runs the plugins named in ``conf`` (a conflist or a single configuration) out of ``folder``."""

    node: Namespace
    conf: Path
    folder: str

    def add(self, pod: Namespace) -> dict[str, Any]:
        """ADD ``eth0`` to the pod; the last plugin's result."""
        result: dict[str, Any] = {}
        for plugin in self._plugins():
            result = self._run("ADD", plugin, pod, result)
        return result

    def delete(self, pod: Namespace) -> None:
        """DEL, in reverse order."""
        for plugin in reversed(self._plugins()):
            self._run("DEL", plugin, pod, {})

    def addresses(self, pod: Namespace) -> list[str]:
        """ADD, and the addresses with prefix lengths that the pod got, in order."""
        return [ip["address"] for ip in self.add(pod)["ips"]]

    def _plugins(self) -> list[dict[str, Any]]:
        document = json.loads(self.conf.read_text())
        if "plugins" not in document:
            return [document]
        head = {"cniVersion": document["cniVersion"], "name": document["name"]}
        return [{**plugin, **head} for plugin in document["plugins"]]

    def _run(self, command: str, plugin: dict[str, Any], pod: Namespace, previous: dict[str, Any]) -> dict[str, Any]:
        environment = {
            **os.environ,
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod.name,
            "CNI_NETNS": pod.path,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": self.folder,
        }
        done = subprocess.run(
            ["ip", "netns", "exec", self.node.name, f"{self.folder}/{plugin['type']}"],
            input=json.dumps({**plugin, **({"prevResult": previous} if previous else {})}),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise PluginError(f"{plugin['type']} {command}: {done.stdout.strip()} {done.stderr.strip()}")
        return json.loads(done.stdout) if done.stdout.strip() else {}


def eventually_pings(pod: Namespace, target: str, tries: Callable[[], range] = lambda: range(5)) -> None:
    """Ping ``target`` once from the pod, a few times until it answers (the first packet may wait for a neighbour)."""
    for _ in tries():
        if "1 received" in pod.run(f"ping -c 1 -W 1 {target}", check=False):
            return
    raise AssertionError(f"{pod.name}: {target} does not answer")
