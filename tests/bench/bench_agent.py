"""The whole agent in the lab: memory of every process, start to first sync, kill to in sync."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from lab import demo
from lab.cluster import Lab, wait_until
from lab.topology import NODES
from run import Result


def pss_kib(pid: int) -> int:
    """Proportional set size of a process in KiB (proc(5) smaps_rollup)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def command_of(pid: int) -> str:
    """A short name of a process of the agent, from its command line."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    text = " ".join(words)
    for name in ("watcher", "router", "cni", "firewall", "health"):
        if f"workers.{name}" in text:
            return name
    for name in ("listener", "supervisord", "gobgpd"):
        if name in text:
            return name
    return words[0].rsplit("/", 1)[-1]


def run() -> Iterator[Result]:
    """One lab for all figures; the last agent figures are taken on node1."""
    lab = Lab(f"bench{os.getpid()}")
    try:
        lab.up(lambda text: None)
        for node in NODES:
            if not wait_until(lambda name=node.name: lab.ready(name), 60):  # type: ignore[misc]
                raise RuntimeError(f"{node.name} is not in sync:\n{lab.log_file(node.name).read_text()[-3000:]}")
        yield from memory(lab)
        yield from killed(lab)
        yield from started(lab)
    finally:
        lab.down()


def memory(lab: Lab) -> Iterator[Result]:
    """PSS of each process of node1's agent after a while of running."""
    time.sleep(5)
    output = subprocess.run(["ip", "netns", "pids", lab.namespaces.full("node1")], capture_output=True, text=True)
    sizes = {command_of(int(pid)): pss_kib(int(pid)) / 1024 for pid in output.stdout.split()}
    for name, size in sorted(sizes.items()):
        yield Result(
            f"agent.pss.{name}", f"memory of {name}", size, "MiB PSS", 60.0, None, "3 nodes, manifests, dual-stack"
        )
    total = sum(sizes.values())
    yield Result(
        "agent.pss", "memory of all processes of one agent", total, "MiB PSS", 150.0, None, f"{len(sizes)} processes"
    )


def killed(lab: Lab) -> Iterator[Result]:
    """SIGKILL until the new process has synced, the worst of three for each worker."""
    for name in demo.KILLED_WORKERS:
        worst = 0.0
        for _ in range(3):
            time.sleep(1.5)
            pid = lab.workers("node1")[name]["pid"]
            began = time.monotonic()
            os.kill(int(str(pid)), signal.SIGKILL)

            def back(name: str = name, pid: object = pid) -> bool:
                worker = lab.workers("node1").get(name, {})
                return worker.get("pid") not in (None, 0, pid) and lab.ready("node1")

            if not wait_until(back, 20, 0.02):
                raise RuntimeError(f"{name} did not come back")
            worst = max(worst, time.monotonic() - began)
        yield Result(
            f"agent.killed.{name}", f"kill -9 of {name} until in sync again", worst, "s", 2.0, None, "worst of 3"
        )


def started(lab: Lab) -> Iterator[Result]:
    """From exec of kube-router to the first heartbeat after a successful sync of cni and router."""
    node = NODES[0]
    times = []
    for _ in range(3):
        agent = lab.agents[node.name]
        agent.send_signal(signal.SIGTERM)
        agent.wait(timeout=15)
        time.sleep(1)
        began = time.time()
        lab.start_agent(node)

        def synced() -> bool:
            workers = lab.workers(node.name)
            return all(workers.get(name, {}).get("last_sync_age") is not None for name in ("cni", "router"))

        if not wait_until(synced, 30, 0.02):
            raise RuntimeError("the agent did not sync")
        times.append(time.time() - began)
    value = sorted(times)[1]
    yield Result(
        "agent.start", "agent start until first full sync", value, "s", 2.0, None, "median of 3, other agents run"
    )
