"""Watcher, replica and worker as real processes over real ipc sockets: started, stopped, flooded and killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.ipc_peer import Peer

MEGABYTE = 1 << 20
FLOOD = 200_000


def in_sync(line: dict[str, Any]) -> bool:
    return bool(line.get("in_sync"))


def ready(line: dict[str, Any]) -> bool:
    return "ready" in line


def obeyed(line: dict[str, Any]) -> bool:
    return "obeyed" in line


def start_watcher(directory: Path, table: dict[str, int], epoch: str = "1", state: str = "in_sync") -> Peer:
    peer = Peer("watcher", directory, epoch=epoch, state=state, table=table)
    peer.until(ready)
    return peer


def changes(lines: list[dict[str, Any]]) -> dict[str, list[str | None]]:
    """What the lines of a replica say in sum."""
    total: dict[str, list[str | None]] = {}
    for line in lines:
        for key, (old, new) in line.get("changes", {}).items():
            total[key] = [total[key][0] if key in total else old, new]
    return total


def test_a_snapshot_and_then_deltas(tmp_path: Path) -> None:
    with start_watcher(tmp_path, {"a": 1, "b": 1}) as watcher, Peer("replica", tmp_path) as replica:
        assert changes(replica.until(in_sync)) == {"a": [None, "1"], "b": [None, "1"]}
        watcher.tell(put={"b": 2, "c": 1}, gone=["a"])
        heard = replica.until(lambda line: "c" in line.get("changes", {}))
        assert changes(heard) == {"a": ["1", None], "b": ["1", "2"], "c": [None, "1"]}


def test_a_replica_that_is_there_first_gets_the_snapshot_when_the_watcher_comes(tmp_path: Path) -> None:
    with Peer("replica", tmp_path) as replica:
        replica.until(ready)
        with start_watcher(tmp_path, {"a": 1}):
            assert changes(replica.until(in_sync)) == {"a": [None, "1"]}


def test_a_killed_watcher_comes_back_and_only_the_difference_is_handed_out(tmp_path: Path) -> None:
    with Peer("replica", tmp_path) as replica:
        with start_watcher(tmp_path, {"a": 1, "b": 1, "c": 1}) as watcher:
            replica.until(in_sync)
            watcher.signal(signal.SIGKILL)
            watcher.process.wait()
        assert (tmp_path / "snapshots.sock").is_socket()
        with start_watcher(tmp_path, {"a": 1, "b": 2, "d": 1}, epoch="2") as watcher:
            heard = replica.until(lambda line: "d" in line.get("changes", {}))
            assert changes(heard) == {"b": ["1", "2"], "c": ["1", None], "d": [None, "1"]}
            watcher.tell(put={"e": 1})
            assert changes(replica.until(lambda line: bool(line.get("changes")))) == {"e": [None, "1"]}


def test_law_1_a_watcher_back_from_disk_deletes_nothing_until_it_is_in_sync(tmp_path: Path) -> None:
    with Peer("replica", tmp_path) as replica:
        with start_watcher(tmp_path, {"a": 2, "b": 1}):
            replica.until(in_sync)
        with start_watcher(tmp_path, {"a": 1, "old": 1}, epoch="2", state="stale") as watcher:
            heard = replica.until(lambda line: line.get("stale") is True)
            assert changes(heard) == {"old": [None, "1"]}
            assert heard[-1]["usable"]
            watcher.tell(put={"a": 2}, gone=["old"])
            watcher.until(obeyed)
            watcher.tell(state="in_sync")
            assert changes(replica.until(in_sync)) == {"b": ["1", None], "old": ["1", None]}


def test_a_flood_to_a_stopped_replica_costs_bounded_memory_and_ends_in_the_newest_state(tmp_path: Path) -> None:
    with start_watcher(tmp_path, {"a": 1}) as watcher, Peer("replica", tmp_path) as replica:
        replica.until(in_sync)
        before = watcher.memory(), replica.memory()
        replica.signal(signal.SIGSTOP)
        watcher.tell(flood=FLOOD)
        watcher.until(obeyed, timeout=120.0)
        assert watcher.memory() - before[0] < 24 * MEGABYTE
        replica.signal(signal.SIGCONT)
        heard = replica.until(lambda line: line.get("latest") == FLOOD - 1)
        assert (heard[-1]["nodes"], heard[-1]["in_sync"]) == (1001, True)
        assert replica.memory() - before[1] < 24 * MEGABYTE
        # Far fewer changes than deltas: most were dropped, and a snapshot stood in for them.
        assert sum(line.get("count", 0) for line in heard) < FLOOD / 10


def test_a_flood_to_a_running_replica_ends_in_the_newest_state(tmp_path: Path) -> None:
    with start_watcher(tmp_path, {"a": 1}) as watcher, Peer("replica", tmp_path) as replica:
        replica.until(in_sync)
        watcher.tell(flood=20_000)
        heard = replica.until(lambda line: line.get("latest") == 19_999, timeout=60.0)
        assert heard[-1]["nodes"] == 1001


def test_a_stopped_replica_does_not_delay_another(tmp_path: Path) -> None:
    with start_watcher(tmp_path, {"a": 1}) as watcher, Peer("replica", tmp_path) as stopped:
        stopped.until(in_sync)
        stopped.signal(signal.SIGSTOP)
        with Peer("replica", tmp_path) as running:
            running.until(in_sync)
            watcher.tell(flood=5000)
            running.until(lambda line: line.get("latest") == 4999, timeout=60.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_worker_within_a_second(tmp_path: Path, number: int) -> None:
    with start_watcher(tmp_path, {"a": 1}) as watcher, Peer("worker", tmp_path) as worker:
        assert worker.until(lambda line: "reconciled" in line)[-1] == {
            "reconciled": ["a"],
            "start": True,
            "confirmed": False,
        }
        watcher.until(lambda line: line.get("notice") == "hello")
        worker.signal(number)
        began = time.monotonic()
        assert worker.process.wait(timeout=10.0) == 0
        assert time.monotonic() - began < 1.0
        worker.until(lambda line: "closed" in line)


def test_a_worker_without_a_watcher_waits_and_ends_on_a_signal(tmp_path: Path) -> None:
    with Peer("worker", tmp_path) as worker:
        worker.until(ready)
        worker.signal(signal.SIGTERM)
        assert worker.process.wait(timeout=10.0) == 0
        assert worker.until(lambda line: "closed" in line) == [{"closed": True}]


def test_a_worker_reconciles_again_when_a_stale_cluster_is_confirmed(tmp_path: Path) -> None:
    with start_watcher(tmp_path, {"a": 1}, state="stale") as watcher, Peer("worker", tmp_path) as worker:
        worker.until(lambda line: line.get("start") is True)
        watcher.tell(state="in_sync")
        assert worker.until(lambda line: "reconciled" in line)[-1]["confirmed"]


def test_a_notice_waits_for_a_watcher_that_restarts(tmp_path: Path) -> None:
    with Peer("worker", tmp_path) as worker:
        with start_watcher(tmp_path, {}, state="listing") as watcher:
            watcher.signal(signal.SIGKILL)
            watcher.process.wait()
        with start_watcher(tmp_path, {"a": 1}, epoch="2") as watcher:
            worker.until(lambda line: "reconciled" in line)
            watcher.until(lambda line: line.get("notice") == "hello")
