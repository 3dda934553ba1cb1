"""The cni worker when the disk will not take its file: full, or read-only; on real mounts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.namespaces import Namespace

from kube_router.ipc.messages import Node, NodeAddress, SourceState
from kube_router.ipc.replica import Cluster
from kube_router.workers.cni.controller import CniController
from kube_router.workers.model import Outcome
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings

NODE = Node(
    name="n1",
    addresses=(NodeAddress("InternalIP", "192.0.2.1"), NodeAddress("InternalIP", "2001:db8::1")),
    pod_cidrs=("10.244.1.0/24", "fd00:10:244:1::/64"),
)
CONF = json.dumps({"name": "mynet", "type": "bridge", "bridge": "kube-bridge", "ipam": {"type": "host-local"}})


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 pages, with the configuration file in it."""
    folder = tmp_path / "net.d"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True)
    try:
        (folder / "x.conf").write_text(CONF)
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def controller(netns: Namespace, folder: Path, tmp_path: Path) -> Iterator[CniController]:
    settings = Settings(
        node_name="n1", enable_ipv6=True, cni_conf_file=str(folder / "x.conf"), state_dir=str(tmp_path / "state")
    )
    with netns.enter():
        controller = CniController(settings)
    yield controller
    controller.close()


def reconcile(netns: Namespace, controller: CniController) -> Outcome:
    cluster = Cluster(SourceState(source="test", in_sync=True), {"nodes": {"n1": NODE}})
    with netns.enter():
        return controller.reconcile(cluster, Trigger(start=True))


def check_refusal(netns: Namespace, outcome: Outcome, folder: Path, words: str) -> None:
    """One clear line; the file as it was, nothing beside it; the bridge there all the same."""
    assert [failure.phase for failure in outcome.failures] == ["cni-file"]
    assert str(folder / "x.conf") in outcome.failures[0].text and outcome.failures[0].text.endswith(words)
    assert (folder / "x.conf").read_text() == CONF
    assert not list(folder.glob(".*"))
    assert "kube-bridge" in netns.run("ip -oneline link show")


def test_full_disk(netns: Namespace, controller: CniController, folder: Path) -> None:
    filler = folder / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(b"x" * 100_000)
    check_refusal(netns, reconcile(netns, controller), folder, "No space left on device")
    filler.unlink()
    assert reconcile(netns, controller).failures == ()
    assert "fd00:10:244:1::/64" in (folder / "x.conf").read_text()


def test_read_only_folder(netns: Namespace, controller: CniController, folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    check_refusal(netns, reconcile(netns, controller), folder, "Read-only file system")
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    assert reconcile(netns, controller).failures == ()
