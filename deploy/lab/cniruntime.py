"""What a container runtime does with a CNI network: run the plugin chain of a conflist for one pod.

Follows the CNI specification 1.0, section "Execution protocol": one process a plugin, the network's ``cniVersion`` and
``name`` put into each plugin's configuration, the result of each handed to the next as ``prevResult``.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.network import LabError, Namespaces


class CniRuntime:
    """CNI of one node: its configuration file and the plugins' folders."""

    def __init__(self, namespaces: Namespaces, node: str, conf_file: Path, plugin_dirs: Sequence[Path]) -> None:
        self._namespaces, self._node, self._conf_file = namespaces, node, conf_file
        self._path = ":".join(map(str, plugin_dirs))
        self._plugin_dirs = plugin_dirs

    def add(self, pod: str) -> dict[str, Any]:
        """Connect the namespace of ``pod`` as eth0; returns the CNI result (``ips``, ``routes``, ``interfaces``)."""
        self._run("ADD", pod, "lo", {"cniVersion": "0.3.1", "name": "lo", "type": "loopback"})
        result: dict[str, Any] = {}
        for configuration in self._chain():
            if result:
                configuration["prevResult"] = result
            result = self._run("ADD", pod, "eth0", configuration)
        return result

    def delete(self, pod: str) -> None:
        """Take ``pod`` off the network and free its addresses."""
        for configuration in reversed(self._chain()):
            self._run("DEL", pod, "eth0", configuration)

    def _chain(self) -> list[dict[str, Any]]:
        network = json.loads(self._conf_file.read_text())
        head = {"cniVersion": network["cniVersion"], "name": network["name"]}
        return [{**plugin, **head} for plugin in network.get("plugins", [network])]

    def _run(self, command: str, pod: str, interface: str, configuration: dict[str, Any]) -> dict[str, Any]:
        environment = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self._namespaces.full(pod),
            "CNI_NETNS": self._namespaces.path(pod),
            "CNI_IFNAME": interface,
            "CNI_PATH": self._path,
        }
        plugin = self._find(configuration["type"])
        done = subprocess.run(
            self._namespaces.command(self._node, [str(plugin)]),
            input=json.dumps(configuration),
            text=True,
            capture_output=True,
            env=environment,
            check=False,
        )
        if done.returncode != 0:
            reason = done.stdout.strip() or done.stderr.strip()
            raise LabError(f"CNI plugin {configuration['type']} {command} {pod}: {reason}")
        return json.loads(done.stdout) if done.stdout.strip() else {}

    def _find(self, plugin: str) -> Path:
        for folder in self._plugin_dirs:
            if (folder / plugin).exists():
                return folder / plugin
        raise LabError(f"CNI plugin {plugin} not found in {self._path}")
