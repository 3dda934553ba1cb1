"""A real worker process for benchmarks.

This process is its watcher, which publishes the cluster and its changes, and its health worker, which receives the
heartbeats.

Touches sockets and starts one process, in the network namespace of the calling thread.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from bench.firewall_shapes import Objects, apply

from kube_router.ipc.channels import HeartbeatReceiver, Poller, Publisher
from kube_router.ipc.messages import Heartbeat, Key, Kind, Projection, SourceState
from kube_router.ipc.replica import Changes
from kube_router.workers.settings import SETTINGS_FILE, Settings, save

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


class WorkerProcess:
    """The real worker process and its surroundings: a run directory, a watcher, a receiver of heartbeats."""

    def __init__(self, program: str, settings: Settings, found: Objects, folder: Path, latency: str = LATENCY) -> None:
        """``latency``: the histogram whose samples are kept in `latencies`."""
        self.found, self._program, self._latency = found, program, latency
        self.beat: Heartbeat | None = None
        self.latencies: list[float] = []
        self.syncs: list[float] = []
        """When the heartbeats after a sync came in, in monotonic seconds."""
        self._ipc = folder / "ipc"
        self._ipc.mkdir()
        save(self._ipc / SETTINGS_FILE, settings, 0o640)
        self._store = Store(found)
        self._publisher = Publisher(str(os.getpid()), self._ipc)
        self._heartbeats = HeartbeatReceiver(self._ipc)
        self._beacon_at = 0.0
        self._log = (folder / "log").open("w+")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it; seconds from the start of the process to its first sync."""
        before, began = len(self.syncs), time.monotonic()
        command = [sys.executable, "-P", "-m", f"kube_router.workers.{self._program}"]
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
            self.latencies.extend(beat.observations.get(self._latency, ()))
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
