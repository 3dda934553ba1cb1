"""Network namespaces of the lab: made by one ``ip -batch`` a namespace, removed by name prefix.

Touches the kernel: only namespaces whose names begin with the lab's prefix, and what lies inside them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from lab.topology import EXTERNAL_HOSTS, NODES, SEGMENTS, UPLINK_EXTERNAL, UPLINK_FABRIC, Interface


class LabError(Exception):
    """A step of the lab failed; the text is one line for the user."""


def run(command: Sequence[str], *, stdin: str | None = None) -> str:
    """Run a command to its end and return its output; `LabError` with its last error line when it fails."""
    done = subprocess.run(command, input=stdin, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise LabError(f"{' '.join(command)}: exit {done.returncode}: {reason}")
    return done.stdout


class Namespaces:
    """All network namespaces of one lab, by short name (``node1``, ``fabric``, ``node1-pod1``)."""

    def __init__(self, lab: str) -> None:
        """``lab`` names the lab; its namespaces are ``kr-<lab>-<short name>``."""
        self.prefix = f"kr-{lab}-"

    def full(self, name: str) -> str:
        """The namespace's name as ``ip netns`` knows it."""
        return self.prefix + name

    def path(self, name: str) -> str:
        """The file that keeps the namespace alive, as CNI_NETNS wants it."""
        return f"/run/netns/{self.full(name)}"

    def add(self, name: str) -> None:
        """Create a namespace with its loopback interface up."""
        run(["ip", "netns", "add", self.full(name)])
        self.ip(name, ["link set lo up"])

    def delete(self, name: str) -> None:
        """Delete one namespace."""
        run(["ip", "netns", "delete", self.full(name)])

    def ip(self, name: str, lines: Iterable[str]) -> None:
        """Run ``ip`` command lines inside a namespace, in one process; stops at the first failure."""
        run(["ip", "-n", self.full(name), "-batch", "-"], stdin="\n".join(lines) + "\n")

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """``command`` as it must be started to run inside a namespace."""
        return ["ip", "netns", "exec", self.full(name), *command]

    def existing(self) -> list[str]:
        """Full names of this lab's namespaces."""
        names = [line.split()[0] for line in run(["ip", "netns", "list"]).splitlines() if line.strip()]
        return [name for name in names if name.startswith(self.prefix)]

    def stop_processes(self, names: Iterable[str]) -> None:
        """Stop every process inside some namespaces, by short name."""
        _stop([self.full(name) for name in names])

    def remove_all(self) -> None:
        """Stop every process inside this lab's namespaces and delete them."""
        names = self.existing()
        _stop(names)
        for name in names:
            run(["ip", "netns", "delete", name])


def _stop(names: Sequence[str]) -> None:
    for signum, patience in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 3.0)):
        deadline = time.monotonic() + patience
        _signal(_processes(names), signum)
        while _processes(names) and time.monotonic() < deadline:
            time.sleep(0.05)


def _processes(names: Iterable[str]) -> set[int]:
    pids: set[int] = set()
    for name in names:
        pids |= {int(pid) for pid in run(["ip", "netns", "pids", name]).split()}
    return pids


def _signal(pids: Iterable[int], signum: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def build(namespaces: Namespaces) -> None:
    """Nodes, two segments, the router between them and the external router, with addresses and default routes.

    The nodes' FORWARD policy is DROP, as on many hosts: pods reach each other only by what the agent accepts.
    """
    for name in ("fabric", "external", *(node.name for node in NODES)):
        namespaces.add(name)
        forwarding = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1") if name == "fabric" else ()
        settings = (*forwarding, "net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.all.accept_dad=0")
        run(namespaces.command(name, ["sysctl", "-qw", *settings]))
    for segment in SEGMENTS:
        namespaces.ip(
            "fabric",
            [
                f"link add {segment.name} type bridge",
                *_addresses(segment.name, segment.fabric),
                f"link set {segment.name} up",
            ],
        )
    for node in NODES:
        port = f"to-{node.name}"
        namespaces.ip("fabric", [f"link add {port} type veth peer name eth0 netns {namespaces.full(node.name)}"])
        namespaces.ip("fabric", [f"link set {port} master {node.segment.name}", f"link set {port} up"])
        namespaces.ip(node.name, [*_addresses("eth0", node.addresses), "link set eth0 up"])
        namespaces.ip(node.name, [f"route add default via {gateway.ip}" for gateway in node.segment.fabric])
        for tool in ("iptables", "ip6tables"):
            run(namespaces.command(node.name, [tool, "-P", "FORWARD", "DROP"]))
    namespaces.ip("fabric", [f"link add uplink type veth peer name uplink netns {namespaces.full('external')}"])
    namespaces.ip("fabric", [*_addresses("uplink", UPLINK_FABRIC), "link set uplink up"])
    namespaces.ip("external", [*_addresses("uplink", UPLINK_EXTERNAL), "link set uplink up"])
    namespaces.ip("external", [f"address add {host} dev lo" for host in EXTERNAL_HOSTS])


def _addresses(link: str, addresses: Iterable[Interface]) -> list[str]:
    # nodad: a lab that has just been built must not wait a second for duplicate address detection.
    return [f"address add {a.with_prefixlen} dev {link}{' nodad' if a.version == 6 else ''}" for a in addresses]


def start_bird(namespaces: Namespaces, name: str, configuration: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start BIRD in a namespace with its files in ``folder``; it runs until `Namespaces.remove_all`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "bird.conf"
    config.write_text(configuration)
    command = ["bird", "-f", "-c", str(config), "-s", str(folder / "bird.ctl"), "-P", str(folder / "bird.pid")]
    log = (folder / "bird.log").open("ab")
    return subprocess.Popen(namespaces.command(name, command), stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def bird_routes(namespaces: Namespaces, name: str, folder: Path) -> str:
    """``show route`` of a BIRD."""
    return run(namespaces.command(name, ["birdc", "-r", "-s", str(folder / "bird.ctl"), "show", "route"]))
