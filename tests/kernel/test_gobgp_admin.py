"""The operator's ``gobgp`` against ``--gobgp-admin-address`` and ``-port``, both generations of daemon and command.

gobgpd is started by the agent's own launcher with the agent's own list of hosts.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.bgp import asking, node
from support.gobgpd import BINARIES, wait_for
from support.namespaces import Namespace

from kube_router.supervisor.conf import admin_hosts
from kube_router.workers.router.bgpstate import FRESH
from kube_router.workers.router.gobgp.client import GobgpError, connect
from kube_router.workers.router.plan import diff

A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
COMMANDS = {3: Path("/usr/bin/gobgp"), 4: BINARIES[4].with_name("gobgp")}
PORT = 50051


@contextmanager
def launched(namespace: Namespace, generation: int, folder: Path, address: str, port: int = PORT) -> Iterator[None]:
    """gobgpd as the agent launches it, with BGP started."""
    path = folder / "gobgpd.sock"
    arguments = [sys.executable, "-P", "-m", "kube_router.supervisor.gobgpd", f"--binary={BINARIES[generation]}"]
    arguments += [f"--socket={path}", *(f"--admin={host}" for host in admin_hosts(address, port))]
    with (folder / "log").open("w") as log:
        process = namespace.start(arguments, cwd=folder, stdout=log, stderr=log)
        try:
            wait_for(lambda: answers(path), 10, "gobgpd answers")
            client = connect(path)
            plan = diff(FRESH, asking(A, bgp_port=1790).state)
            assert client.apply(plan) == (len(plan.steps), ())
            client.close()
            yield
        finally:
            process.kill()
            process.wait()


def answers(path: Path) -> bool:
    try:
        connect(path).close()
    except GobgpError:
        return False
    return True


def gobgp(namespace: Namespace, generation: int, host: str, *words: str) -> subprocess.CompletedProcess[str]:
    process = namespace.start(
        [str(COMMANDS[generation]), "-u", host, "-p", str(PORT), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, error = process.communicate(timeout=20)
    return subprocess.CompletedProcess([], process.returncode, out, error)


def listening(namespace: Namespace) -> set[str]:
    """Local addresses of the admin port, by ``ss``."""
    lines = namespace.run(f"ss -Hltn sport = :{PORT}").splitlines()
    return {line.split()[3].rpartition(":")[0].strip("[]") for line in lines}


@pytest.fixture(params=BINARIES, ids=lambda generation: f"gobgpd{generation}")
def generation(request: pytest.FixtureRequest, netns: Namespace) -> int:
    netns.run("ip address add 10.0.0.1/24 dev lo; ip address add 2001:db8::1/64 dev lo nodad")
    return int(request.param)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", {"127.0.0.1"}),
        ("10.0.0.1", {"10.0.0.1", "127.0.0.1"}),
        ("2001:db8::1", {"2001:db8::1", "127.0.0.1"}),
        ("::1", {"::1"}),
        ("0.0.0.0", {"*"}),  # Go takes it for every address of both families
    ],
)
def test_the_operator_s_command(
    generation: int, netns: Namespace, tmp_path: Path, address: str, expected: set[str]
) -> None:
    with launched(netns, generation, tmp_path, address):
        assert listening(netns) == expected
        for host in {"127.0.0.1", "10.0.0.1"} if address == "0.0.0.0" else expected:
            shown = gobgp(netns, generation, host, "global")
            assert shown.returncode == 0, shown.stderr
            assert "64512" in shown.stdout and "10.0.0.1" in shown.stdout
            assert "10.244.1.0/24" in gobgp(netns, generation, host, "global", "rib").stdout
            policies = gobgp(netns, generation, host, "global", "policy").stdout
            assert "kube_router_import1" in policies and "kube_router_export1" in policies


def test_port_0_is_no_listener_at_all(generation: int, netns: Namespace, tmp_path: Path) -> None:
    with launched(netns, generation, tmp_path, "127.0.0.1", 0):
        assert listening(netns) == set()
        # gobgpd listens for BGP, and nowhere else: no pprof, no metrics.
        ports = {line.split()[3].rpartition(":")[2] for line in netns.run("ss -Hltn").splitlines()}
        assert ports == {"1790"}
