"""IPC: a snapshot of 10,000 pods to a new replica, and the time of one delta, both between two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from run import Baseline, Result, median_of

from kube_router.ipc.channels import Poller, Publisher
from kube_router.ipc.messages import ContainerPort, Key, Kind, Pod, Projection, SourceState
from kube_router.ipc.replica import Replica

PODS = 10_000
DELTAS = 2_000


def pods(count: int = PODS) -> dict[Key, Projection]:
    """Pods as a cluster has them: a few labels, two addresses, one named port."""
    made = (
        Pod(
            name=f"app-{i}-6f7c9d{i:04x}",
            namespace=f"team-{i % 40}",
            uid=f"00000000-0000-4000-8000-{i:012d}",
            labels={"app": f"app-{i % 300}", "pod-template-hash": f"6f7c9d{i:04x}", "tier": "backend"},
            node_name=f"node-{i % 100}",
            phase="Running",
            ips=(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", f"fd00::{i:x}"),
            host_ips=(f"192.168.0.{i % 100}",),
            ports=(ContainerPort("http", 8080),),
        )
        for i in range(count)
    )
    return {pod.key: pod for pod in made}


class Store:
    """What the publishing process knows."""

    state = SourceState(source="bench", in_sync=True)

    def __init__(self) -> None:
        self._pods = pods()

    def objects(self, kind: Kind) -> Mapping[Key, Projection]:
        """The pods."""
        return self._pods if kind == "pods" else {}


def publish() -> None:
    """The watcher's part: serve snapshots until stdin ends; a line on stdin starts the stream of deltas."""
    store, publisher = Store(), Publisher(str(os.getpid()))
    os.set_blocking(0, False)
    print("ready", flush=True)
    beacon_at = 0.0
    while True:
        Poller.wait([*publisher.sockets, 0], 0.2)
        publisher.serve(store)
        if time.monotonic() > beacon_at:
            publisher.beacon(store.state)
            beacon_at = time.monotonic() + 1
        try:
            line = os.read(0, 100)
        except BlockingIOError:
            continue
        if not line:
            return
        for number in range(DELTAS):
            # The phase carries the time of sending: both processes read the same monotonic clock.
            publisher.publish("pods", [Pod(name=f"changed-{number}", namespace="x", phase=repr(time.monotonic()))])
            time.sleep(0.001)


def run() -> Iterator[Result]:
    """Start the publisher, measure from here."""
    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        os.chdir(folder)
        command = [sys.executable, "-P", str(Path(__file__)), "publish"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        publisher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        try:
            assert publisher.stdout is not None and publisher.stdout.readline() == b"ready\n"
            yield from measure(publisher)
        finally:
            assert publisher.stdin is not None
            publisher.stdin.close()
            publisher.wait(timeout=10)
            os.chdir(here)


def snapshot_seconds() -> float:
    """A new replica until it is usable."""
    began = time.perf_counter()
    replica = Replica("bench", ("pods",))
    replica.receive(time.monotonic())
    while not replica.usable:
        Poller.wait(replica.sockets, min(0.05, replica.wait(time.monotonic())))
        replica.receive(time.monotonic())
    took = time.perf_counter() - began
    assert len(replica.cluster.pods) == PODS
    replica.close()
    return took


def json_seconds() -> float:
    """The same pods through the standard library's JSON, both ways, without any socket."""
    builtins = [msgspec.to_builtins(pod) for pod in pods().values()]
    began = time.perf_counter()
    json.loads(json.dumps(builtins))
    return time.perf_counter() - began


def measure(publisher: subprocess.Popen[bytes]) -> Iterator[Result]:
    """Snapshot first, then the stream of deltas."""
    baseline = Baseline("stdlib json dumps+loads of the same pods", median_of(json_seconds) * 1000)
    value = median_of(snapshot_seconds) * 1000
    yield Result(
        "ipc.snapshot.10k", "snapshot of 10,000 pods to a new replica", value, "ms", 150.0, baseline, "median of 5"
    )
    replica = Replica("bench", ("pods",))
    while not replica.usable:
        replica.receive(time.monotonic())
        Poller.wait(replica.sockets, 0.05)
    assert publisher.stdin is not None
    publisher.stdin.write(b"go\n")
    publisher.stdin.flush()
    latencies: list[float] = []
    while len(latencies) < DELTAS:
        Poller.wait(replica.sockets, 1)
        for _, new in replica.receive(time.monotonic()).get("pods", {}).values():
            assert isinstance(new, Pod)
            latencies.append((time.monotonic() - float(new.phase)) * 1000)
    replica.close()
    value = sorted(latencies)[int(len(latencies) * 0.99)]
    yield Result(
        "ipc.delta.p99", "one delta, watcher to replica, p99", value, "ms", 3.0, None, f"{DELTAS} deltas, 1 ms apart"
    )


if __name__ == "__main__":
    publish()
