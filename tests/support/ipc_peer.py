"""Processes for tests of the IPC: a watcher, a replica and a worker, driven by lines on stdin, telling on stdout.

Run as a script by `Peer`; every line in either direction is one JSON object.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kube_router.ipc.messages import Key, Kind, Node, Notice, Projection, SourceState

KINDS: tuple[Kind, ...] = ("nodes",)
STATES = {
    "in_sync": SourceState(source="test", in_sync=True),
    "stale": SourceState(source="test", stale=True),
    "listing": SourceState(source="test"),
}


class Peer:
    """A child process; `stop` it, or leave it to the end of the ``with`` block."""

    def __init__(self, role: str, directory: Path, **options: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, role, json.dumps(options)],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(json.loads(line))

    def tell(self, **command: object) -> None:
        """Give it a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def until(self, wanted: Callable[[dict[str, Any]], bool], timeout: float = 20.0) -> list[dict[str, Any]]:
        """All it said up to and with the first line that is ``wanted``; fails with what came instead."""
        end = time.monotonic() + timeout
        heard: list[dict[str, Any]] = []
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"not heard in {timeout} s; heard {heard[-5:]}") from None
            heard.append(line)
            if wanted(line):
                return heard

    def signal(self, number: int) -> None:
        """Send a signal to it."""
        os.kill(self.process.pid, number)

    def memory(self) -> int:
        """Its resident memory in bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def say(**words: object) -> None:
    """Tell the test."""
    print(json.dumps(words), flush=True)


def nodes(versions: Mapping[str, int]) -> dict[Key, Projection]:
    """Nodes by name whose provider id is the version."""
    return {name: Node(name=name, provider_id=str(version)) for name, version in versions.items()}


class Watcher:
    """A publisher with a table of nodes; commands: put, gone, state, flood, tell."""

    def __init__(self, epoch: str, state: str, table: Mapping[str, int]) -> None:
        from kube_router.ipc.channels import Publisher

        self.state = STATES[state]
        self.table = nodes(table)
        self.publisher = Publisher(epoch)

    def objects(self, kind: Kind) -> Mapping[Key, Projection]:
        return {"nodes": self.table}[kind]

    def run(self) -> None:
        from kube_router.ipc.channels import Poller

        say(ready=True)
        beacon_at = 0.0
        commands = sys.stdin.fileno()
        while True:
            ready = Poller.wait([*self.publisher.sockets, commands], max(0.0, beacon_at - time.monotonic()))
            if commands in ready and not self.obey(json.loads(os.read(commands, 1 << 16).decode() or "{}")):
                return
            self.publisher.serve(self)
            for notice in self.publisher.notices():
                say(notice=notice.text)
            if time.monotonic() >= beacon_at:
                self.publisher.beacon(self.state)
                beacon_at = time.monotonic() + 0.2

    def obey(self, command: dict[str, Any]) -> bool:
        if not command:
            return False
        put, gone = nodes(command.get("put", {})), command.get("gone", [])
        self.table = {key: item for key, item in {**self.table, **put}.items() if key not in gone}
        if put or gone:
            self.publisher.publish("nodes", put.values(), gone)
        if "state" in command:
            self.state = STATES[command["state"]]
            self.publisher.beacon(self.state)
        for number in range(command.get("flood", 0)):
            item = Node(name=f"n{number % 1000}", labels={"filler": "x" * 300}, provider_id=str(number))
            self.table[item.key] = item
            self.publisher.publish("nodes", [item])
        say(obeyed=command, dropped=self.publisher.dropped)
        return True


def watcher(options: dict[str, Any]) -> None:
    """``epoch``, ``state``, ``table``."""
    Watcher(options["epoch"], options["state"], options["table"]).run()


def replica(options: dict[str, Any]) -> None:
    """Says what changes and how it stands."""
    from kube_router.ipc.channels import Poller
    from kube_router.ipc.replica import Replica

    replica = Replica("worker", KINDS)
    before = None
    say(ready=True)
    while True:
        Poller.wait(replica.sockets, min(0.5, replica.wait(time.monotonic())))
        changes = replica.receive(time.monotonic()).get("nodes", {})
        state = replica.cluster.state
        if changes or state != before:
            before = state
            versions = {
                key: [getattr(side, "provider_id", None) for side in change]
                for key, change in list(changes.items())[:20]
            }
            latest = max((int(node.provider_id) for node in replica.cluster.nodes.values()), default=-1)
            standing = {"in_sync": state.in_sync, "stale": state.stale, "usable": replica.usable}
            say(changes=versions, count=len(changes), nodes=len(replica.cluster.nodes), latest=latest, **standing)


def worker(options: dict[str, Any]) -> None:
    """A worker under the runtime, with a heartbeat so rare that only a signal can end its wait."""
    from kube_router.workers.model import Outcome
    from kube_router.workers.runtime import Pace, run

    class Controller:
        name = "worker"
        kinds = KINDS
        period = 3600.0
        turning = False

        def reconcile(self, cluster: Any, trigger: Any) -> Outcome:
            say(reconciled=sorted(cluster.nodes), start=trigger.start, confirmed=trigger.confirmed)
            notice = Notice(worker="worker", kind="Node", name="a", reason="R", text="hello")
            return Outcome(notices=(notice,))

        def wakers(self) -> dict[int, Callable[[], bool]]:
            if not self.turning:
                self.turning = True
                say(ready=True)
            return {}

        def close(self) -> None:
            say(closed=True)

    sys.exit(run(Controller(), Pace(beat=3600.0)))


if __name__ == "__main__":
    {"watcher": watcher, "replica": replica, "worker": worker}[sys.argv[1]](json.loads(sys.argv[2]))
