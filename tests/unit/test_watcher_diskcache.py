"""The snapshot on disk: what is written is read; what is damaged, foreign or of another version is not."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kube_router.ipc.messages import KINDS, OBJECT_TYPES, Kind, Node, Pod, Projection
from kube_router.workers.watcher import diskcache
from kube_router.workers.watcher.diskcache import DiskCache, SavedCluster, decode, encode, saved_cluster

NODE, POD = Node(name="n", pod_cidrs=("10.1.0.0/24", "fd00:1::/64")), Pod(namespace="d", name="p", ips=("fd00:1::5",))
OBJECTS: dict[Kind, tuple[Projection, ...]] = {"nodes": (NODE,), "pods": (POD,)}
CLUSTER = saved_cluster("here", 1.5, OBJECTS)


def written(folder: Path) -> DiskCache:
    cache = DiskCache(folder / "watcher" / "snapshot")
    cache.save(CLUSTER)
    cache.save_at_exit(None, 10)
    assert cache.trouble is None
    return cache


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    cache = written(tmp_path)
    assert cache.load("here", ("nodes", "pods")) == CLUSTER
    assert cache.load("here", ("nodes",)) == CLUSTER
    assert stat.S_IMODE(cache.path.stat().st_mode) == 0o600
    assert os.listdir(cache.path.parent) == ["snapshot"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_place(kind: Kind) -> None:
    item = OBJECT_TYPES[kind](name="x", namespace="d")
    loaded = decode(encode(saved_cluster("s", 0, {kind: [item]})))
    assert loaded.objects(kind) == (item,)
    assert all(loaded.objects(other) is None for other in KINDS if other != kind)


def test_nothing_there_is_no_complaint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert DiskCache(tmp_path / "no" / "file").load("here", KINDS) is None
    assert not caplog.records


def _flip(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a snapshot"),
    "truncated": (lambda data: data[:-1], "checksum"),
    "head only": (lambda data: data.partition(b"\n")[0], "not a snapshot"),
    "one bit": (_flip(-1), "checksum"),
    "longer": (lambda data: data + b"x", "checksum"),
    "other file": (lambda data: b"\x7fELF" + data, "not a snapshot"),
    "other version": (lambda data: data.replace(b"snapshot 1 ", b"snapshot 2 ", 1), "this program reads 1.1 only"),
    "other protocol": (lambda data: data.replace(b"snapshot 1 1 ", b"snapshot 1 7 ", 1), "version 1.7"),
    "zeros": (lambda data: bytes(len(data)), "not a snapshot"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_and_no_cluster(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    change, text = DAMAGE[damage]
    cache = written(tmp_path)
    cache.path.write_bytes(change(cache.path.read_bytes()))
    assert cache.load("here", ("nodes",)) is None
    assert len(caplog.records) == 1
    assert text in caplog.text


def test_valid_checksum_over_another_shape_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = written(tmp_path)
    payload = b"\x93\x01\x02\x03"
    cache.path.write_bytes(
        b"kube-router-snapshot 1 1 " + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload
    )
    assert cache.load("here", ("nodes",)) is None
    assert "damaged" in caplog.text


def test_other_source_and_missing_kind_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = written(tmp_path)
    assert cache.load("elsewhere", ("nodes",)) is None
    assert "of another source: here" in caplog.text
    assert cache.load("here", ("nodes", "services")) is None
    assert "it has no services" in caplog.text


def test_writes_are_spaced(tmp_path: Path) -> None:
    now = [100.0]
    cache = DiskCache(tmp_path / "snapshot", lambda: now[0])
    assert cache.due_in() == 0
    cache.save(CLUSTER)
    cache._join(10)
    assert cache.due_in() == diskcache.MIN_INTERVAL
    now[0] += diskcache.MIN_INTERVAL
    assert cache.due_in() == 0


def test_failed_write_is_a_trouble_and_leaves_the_old_file(tmp_path: Path) -> None:
    cache = written(tmp_path)
    before = cache.path.read_bytes()
    blocked = cache.path.with_name(".snapshot.new")
    blocked.mkdir()
    cache.save(SavedCluster(source="other", saved=2))
    cache._join(10)
    assert cache.trouble == f"snapshot on disk {cache.path} not written: Is a directory"
    assert cache.due_in() > diskcache.MIN_INTERVAL
    assert cache.path.read_bytes() == before
    blocked.rmdir()
    cache.save(CLUSTER)
    cache._join(10)
    assert cache.trouble is None


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from kube_router.ipc.messages import Node\n"
        "from kube_router.workers.watcher.diskcache import encode, replace_file, saved_cluster\n"
        "print('go', flush=True)\n"
        "for n in range(10**9):\n"
        "    nodes = [Node(name=f'n{i}') for i in range(n % 2000)]\n"
        "    replace_file(pathlib.Path(sys.argv[1]), encode(saved_cluster('s', n, {'nodes': nodes})))\n"
    )
    path = tmp_path / "snapshot"
    for wait in (0.05, 0.11, 0.2):
        child = subprocess.Popen([sys.executable, "-P", "-c", script, path], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"go\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(wait + 0.2)
        child.kill()
        child.wait()
        child.stdout.close()
        loaded = decode(path.read_bytes())
        assert loaded.nodes is not None
        assert len(loaded.nodes) == loaded.saved % 2000
