"""A BGP password given on the command line is gone from the process list once the agent runs."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.namespaces import Namespace

SECRET = "ganz geheim"
ENCODED = base64.b64encode(SECRET.encode()).decode()


def descendants(pid: int) -> Iterator[int]:
    """A process and everything below it."""
    yield pid
    for child in content_of(Path(f"/proc/{pid}/task/{pid}/children")).split():
        yield from descendants(int(child))


def content_of(path: Path) -> bytes:
    """What a file holds; nothing if its process has just ended or the file was just replaced."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def wait_for(path: Path, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.fixture
def agent(netns: Namespace, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """An agent in a namespace that was told a password; its output is in ``tmp_path/output``."""
    (tmp_path / "manifests").mkdir()
    command = [sys.executable, "-P", "-m", "kube_router.supervisor.cli", f"--manifests={tmp_path}/manifests"]
    command += [f"--run-dir={tmp_path}/run", f"--state-dir={tmp_path}/state", "--hostname-override=node-1", "-v=2"]
    command += ["--peer-router-ips=10.0.0.1", "--peer-router-asns=65001", f"--peer-router-passwords={ENCODED}"]
    command += ["--enable-cni=false", "--health-port=0"]
    with (tmp_path / "output").open("w") as output:
        process = netns.start(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def test_no_process_and_no_log_holds_the_password(agent: subprocess.Popen[str], tmp_path: Path) -> None:
    wait_for(tmp_path / "run" / "supervisord.sock")
    wait_for(tmp_path / "run" / "ipc" / "processes.json")
    pids = list(descendants(agent.pid))
    assert len(pids) > 3
    assert b"supervisord" in Path(f"/proc/{agent.pid}/cmdline").read_bytes()
    for pid in pids:
        for name in ("cmdline", "environ"):
            content = content_of(Path(f"/proc/{pid}/{name}"))
            assert ENCODED.encode() not in content
            assert SECRET.encode() not in content
    for path in [tmp_path / "output", *(tmp_path / "run").rglob("*")]:
        if path.is_file() and path.name != "secrets.json":
            content = content_of(path)
            assert ENCODED.encode() not in content, path
            assert SECRET.encode() not in content, path
    secrets = tmp_path / "run" / "secrets.json"
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o600
    assert json.loads(secrets.read_bytes())["peer_router_passwords"] == [SECRET]
