"""The firewall worker as a process of its own: over the wire, under churn, and the memory that it takes.

This process is the watcher: it publishes the cluster and its changes, and receives the heartbeats. The worker is the
real program in a network namespace of its own. Each change is known to be enforced when the worker's heartbeat after
the sync has arrived; so the figures hold both sockets and the worker's own wait for more changes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.firewall_shapes import LARGE, Objects, Shape, apply, churn_events, member_events, objects
from bench_agent import pss_kib
from bench_firewall import BACKENDS, load, percentile, settings
from run import Result
from support.namespaces import namespaces

from kube_router.ipc.channels import HeartbeatReceiver, Poller, Publisher
from kube_router.ipc.messages import Heartbeat, Key, Kind, Projection, SourceState
from kube_router.ipc.replica import Changes
from kube_router.workers.settings import SETTINGS_FILE, Settings, save

CHURN_A_SECOND = 200
MANY_EVENTS = 10_000
WIRE_EVENTS = 200
LATENCY = "policy_enforcement_latency_seconds"
MIB = 1024


class Store:
    """What the publishing process knows."""

    state = SourceState(source="bench", in_sync=True)

    def __init__(self, found: Objects) -> None:
        self.found = found

    def objects(self, kind: Kind) -> Mapping[Key, Projection]:
        """All of a kind."""
        return self.found[kind]


class Worker:
    """The real worker process and its surroundings: a run directory, a watcher, a receiver of heartbeats."""

    module, latency = "firewall", LATENCY

    def __init__(self, found: Objects, backend: str, folder: Path) -> None:
        self.found = found
        self.beat: Heartbeat | None = None
        self.latencies: list[float] = []
        self.syncs: list[float] = []
        """When the heartbeats after a sync came in, in monotonic seconds."""
        self._ipc = folder / "ipc"
        self._ipc.mkdir()
        save(self._ipc / SETTINGS_FILE, self.settings(backend), 0o640)
        self._store = Store(found)
        self._publisher = Publisher(str(os.getpid()), self._ipc)
        self._heartbeats = HeartbeatReceiver(self._ipc)
        self._beacon_at = 0.0
        self._log = (folder / "log").open("w+")
        self._process: subprocess.Popen[bytes] | None = None

    def settings(self, backend: str) -> Settings:
        """What it reads."""
        return settings(backend)

    def start(self) -> float:
        """Start it; seconds from the start of the process to its first sync."""
        before, began = len(self.syncs), time.monotonic()
        command = [sys.executable, "-P", "-m", f"kube_router.workers.{self.module}"]
        self._process = subprocess.Popen(command, cwd=self._ipc, stdout=self._log, stderr=self._log)
        self.until(lambda: len(self.syncs) > before, 60)
        return time.monotonic() - began

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        """End the process and close the sockets."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(timeout=20)
        self._publisher.close()
        self._heartbeats.close()
        self._log.close()

    def publish(self, changes: Changes) -> None:
        """Let changes happen, and tell."""
        apply(self.found, changes)
        for kind, by_key in changes.items():
            put = [new for _, new in by_key.values() if new is not None]
            self._publisher.publish(kind, put, [key for key, (_, new) in by_key.items() if new is None])

    def serve(self, seconds: float) -> None:
        """A watcher's turn: at most ``seconds`` of waiting."""
        Poller.wait([*self._publisher.sockets, self._heartbeats], seconds)
        self._publisher.serve(self._store)
        if time.monotonic() >= self._beacon_at:
            self._publisher.beacon(self._store.state)
            self._beacon_at = time.monotonic() + 1
        for beat in self._heartbeats.receive():
            if beat.syncs and (self.beat is None or beat.syncs > self.beat.syncs):
                assert not beat.pending, beat.warnings[:3]
                self.syncs.append(time.monotonic())
            self.latencies.extend(beat.observations.get(self.latency, ()))
            self.beat = beat

    def until(self, condition: object, seconds: float) -> None:
        """Serve until ``condition()`` holds; raises RuntimeError with the worker's log."""
        deadline = time.monotonic() + seconds
        while not condition():  # type: ignore[operator]
            if time.monotonic() > deadline or (self._process is not None and self._process.poll() is not None):
                self._log.seek(0)
                raise RuntimeError(f"the worker does not get there:\n{self._log.read()[-3000:]}")
            self.serve(0.05)

    def quiet(self, seconds: float) -> None:
        """Serve for so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.serve(left)

    def settle(self) -> None:
        """Until nothing has been synced for a second."""
        self.until(lambda: time.monotonic() - self.syncs[-1] > 1, 60)

    def cpu_seconds(self) -> float:
        """Of the process and of the programs that it ran."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self) -> float:
        assert self.beat is not None
        return self.beat.rss / MIB / MIB


@contextlib.contextmanager
def worker(shape: Shape, backend: str) -> Iterator[Worker]:
    """A worker at a cluster of this shape, not started yet; the calling thread is in its namespace."""
    with namespaces() as (namespace,), namespace.enter(), tempfile.TemporaryDirectory() as folder:
        made = Worker(objects(shape), backend, Path(folder))
        try:
            yield made
        finally:
            made.close()


def run(churn_seconds: float) -> Iterator[Result]:
    """One worker a backend: start, single events, churn, then many events for its memory."""
    for backend in BACKENDS:
        with worker(LARGE, backend) as process:
            started = process.start()
            process.settle()
            first = pss_kib(process.pid) / MIB
            shape = f"{LARGE}; {backend}; RSS {process.rss_mib():.0f} MiB, start to first sync {started:.2f} s"
            what = "memory of the worker after its first sync"
            yield Result(f"firewall.memory.{backend}", what, first, "MiB PSS", 80.0, None, shape)
            yield from wire(process, backend)
            yield from churn(process, backend, churn_seconds)
            yield from growth(process, backend)


def wire(process: Worker, backend: str) -> Iterator[Result]:
    """One change at a time, some time apart, from the watcher's socket to the heartbeat behind the sync."""
    times = []
    for changes in member_events(process.found, LARGE, WIRE_EVENTS):
        process.quiet(0.02)
        before, began = len(process.syncs), time.monotonic()
        process.publish(changes)
        process.until(lambda before=before: len(process.syncs) > before, 10)  # type: ignore[misc]
        times.append((process.syncs[-1] - began) * 1000)
    inside = percentile(process.latencies[-len(times) :], 0.5) * 1000
    shape = f"{LARGE}; {len(times)} events, 20 ms apart; of the p50 {inside:.1f} ms from seen to enforced; {load()}"
    what = "a peer's label changes or a peer is new, watcher's socket to the worker's heartbeat, "
    yield Result(f"firewall.wire.{backend}.p50", f"{what}p50", percentile(times, 0.5), "ms", 5.0, None, shape)
    yield Result(f"firewall.wire.{backend}.p99", f"{what}p99", percentile(times, 0.99), "ms", 20.0, None, shape)


def churn(process: Worker, backend: str, seconds: float) -> Iterator[Result]:
    """Changes at a steady pace, all over the cluster."""
    assert process.beat is not None
    events = churn_events(process.found, LARGE)
    process.settle()
    process.latencies.clear()
    syncs, cpu, began = process.beat.syncs, process.cpu_seconds(), time.monotonic()
    sent = 0
    while (passed := time.monotonic() - began) < seconds:
        while sent < passed * CHURN_A_SECOND:
            process.publish(next(events))
            sent += 1
        process.serve(1 / CHURN_A_SECOND)
    used = (process.cpu_seconds() - cpu) / (time.monotonic() - began) * 100
    ended = time.monotonic()
    process.settle()
    shape = (
        f"{LARGE}; {sent} pod changes in {seconds:g} s, {process.beat.syncs - syncs} syncs, "
        f"{process.beat.dropped} messages dropped; {load()}"
    )
    what = f"CPU of the worker and its programs at {CHURN_A_SECOND} pod changes a second"
    yield Result(f"firewall.churn.{backend}", what, used, "% of a core", 30.0, None, shape)
    longest = max([*process.latencies, process.syncs[-1] - ended]) * 1000
    what = "longest wait of a change in the worker under that churn: the queue is bounded"
    shape = f"{LARGE}; p50 {percentile(process.latencies, 0.5) * 1000:.1f} ms of {len(process.latencies)} syncs"
    yield Result(f"firewall.churn.lag.{backend}", what, longest, "ms", 250.0, None, shape)


def growth(process: Worker, backend: str) -> Iterator[Result]:
    """Twice the same number of events: what the second half adds is a leak."""
    sizes = []
    events = churn_events(process.found, LARGE, seed=2)
    for _ in range(2):
        for _ in range(MANY_EVENTS // 2 // 25):
            for _ in range(25):
                process.publish(next(events))
            process.serve(0.01)
        process.settle()
        sizes.append(pss_kib(process.pid) / MIB)
    what = f"memory of the worker after {MANY_EVENTS:,} events more"
    yield Result(f"firewall.memory.later.{backend}", what, sizes[1], "MiB PSS", 80.0, None, f"{LARGE}; {backend}")
    what = "growth of the worker's memory over the second half of them"
    shape = f"{LARGE}; {backend}; {MANY_EVENTS // 2:,} events"
    yield Result(f"firewall.memory.growth.{backend}", what, sizes[1] - sizes[0], "MiB PSS", 2.0, None, shape)
