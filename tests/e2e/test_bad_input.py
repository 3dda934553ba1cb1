"""Bad input and a hostile machine: one clear line naming object, key, value and rule; the last good state stays.

Each case is one line of a table: what is done to a running node (or before its start), what the log must say, and that
the node's dataplane is untouched and the other objects are followed all the same.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import network
from lab.cluster import Lab, wait_until
from lab.topology import NODES, node_manifest
from support.labstate import dataplane, log_since

NODE2 = NODES[1]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab for all cases; each case puts back what it changed."""
    made = Lab(f"bad{os.getpid()}")
    try:
        made.up(lambda text: None)
        for node in NODES:
            assert wait_until(lambda name=node.name: made.ready(name), 60), made.log_file(node.name).read_text()[-3000:]
        yield made
    finally:
        made.down()


Manifest = dict[str, Any]


def without_ipv6(manifest: Manifest) -> None:
    manifest["status"]["addresses"] = [
        entry for entry in manifest["status"]["addresses"] if ":" not in entry["address"]
    ]


def annotated(key: str, value: str) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        manifest["metadata"]["annotations"] = {f"kube-router.io/{key}": value}

    return change


def overlapping(manifest: Manifest) -> None:
    manifest["spec"]["podCIDRs"] = ["10.244.3.128/25", "fd00:244:2::/64"]


BAD_NODES: dict[str, tuple[Callable[[Manifest], None], list[str]]] = {
    "no address of an enabled family": (without_ipv6, ["node2", "IPv6 was enabled, but no IPv6 address was found"]),
    "peer ASNs that are no numbers": (
        annotated("peers", "- remoteip: 10.10.1.1\n  remoteasn: many\n"),
        ["node2", "peers", "many"],
    ),
    "peers that are no YAML": (annotated("peers", "- {remoteip: [}"), ["node2", "kube-router.io/peers"]),
    "a pod CIDR that is none": (
        annotated("pod-cidrs", "10.244.2.0/24,fd00:244:2::/640"),
        ["node2", "pod-cidrs", "fd00:244:2::/640"],
    ),
    "the deprecated annotation": (
        annotated("pod-cidr", "10.244.2.0/24"),
        ["node2", "kube-router.io/pod-cidr", "deprecated"],
    ),
    "pod CIDRs of two nodes that overlap": (overlapping, ["node2", "node3", "10.244.3.128/25", "10.244.3.0/24"]),
}


@pytest.mark.parametrize("name", BAD_NODES)
def test_a_bad_node_object_is_told_in_one_line_and_spoils_nothing(lab: Lab, name: str) -> None:
    change, words = BAD_NODES[name]
    before = {node.name: dataplane(lab, node.name) for node in (NODES[0], NODES[2])}
    mark = lab.log_file("node2").stat().st_size
    manifest = json.loads(json.dumps(node_manifest(NODE2)))
    change(manifest)
    try:
        lab.write_manifest("node2", manifest)
        found = lambda: [line for line in log_since(lab, "node2", mark) if all(word in line for word in words)]  # noqa: E731
        assert wait_until(lambda: bool(found()), 10), log_since(lab, "node2", mark)
        assert "Traceback" not in "\n".join(log_since(lab, "node2", mark))
    finally:
        lab.write_manifest("node2", node_manifest(NODE2))
    assert wait_until(lambda: all(lab.ready(node.name) for node in NODES), 40)
    assert wait_until(lambda: {name: dataplane(lab, name) for name in before} == before, 20)


def yaml_bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join(['*a' + str(i - 1)] * 9)}]" for i in range(1, 12)]
    return "\n".join(lines) + "\n"


BAD_FILES: dict[str, tuple[Callable[[], str], list[str]]] = {
    "not YAML": (lambda: "kind: Node\nmetadata: {name: [\n", ["bad.yaml"]),
    "a wrong type": (
        lambda: "apiVersion: v1\nkind: Node\nmetadata: {name: x}\nspec: {podCIDRs: 7}\n",
        ["bad.yaml", "podCIDRs"],
    ),
    "a YAML bomb": (yaml_bomb, ["bad.yaml"]),
    "100 MB": (lambda: "# x\n" * 26_214_400, ["bad.yaml"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_manifest_file_is_told_and_the_others_are_followed(lab: Lab, name: str) -> None:
    content, words = BAD_FILES[name]
    before = dataplane(lab, "node1")
    mark = lab.log_file("node1").stat().st_size
    bad = lab.manifests / "bad.yaml"
    temporary = lab.manifests / ".bad.yaml.new"
    temporary.write_text(content())
    temporary.rename(bad)
    try:
        found = lambda: [line for line in log_since(lab, "node1", mark) if all(word in line for word in words)]  # noqa: E731
        assert wait_until(lambda: bool(found()), 15), log_since(lab, "node1", mark)
        changed = json.loads(json.dumps(node_manifest(NODE2)))
        changed["spec"]["podCIDRs"] = ["10.244.55.0/24", "fd00:244:55::/64"]
        lab.write_manifest("node2", changed)
        assert wait_until(lambda: "10.244.55.0/24" in dataplane(lab, "node1")["routes"], 15)
    finally:
        bad.unlink()
        lab.write_manifest("node2", node_manifest(NODE2))
    assert wait_until(lambda: dataplane(lab, "node1") == before, 20)


def start(
    lab: Lab, *flags: str, prefix: tuple[str, ...] = (), path: str | None = None, without: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Another agent beside node3's, with own directories, for start-up troubles."""
    folder = lab.folder / "other"
    environment = lab.environment("node3")
    environment["KUBE_ROUTER_CNI_CONF_FILE"] = str(folder / "cni" / "10-kuberouter.conflist")
    if path is not None:
        environment["PATH"] = path
    command = [
        *prefix,
        *(word for word in lab.agent_command(NODES[2]) if not word.startswith(without or ("\0",))),
        f"--run-dir={folder / 'run'}",
        f"--state-dir={folder / 'state'}",
        "--bgp-port=1179",
        "--gobgp-admin-port=0",
        "--health-port=0",
        "--metrics-port=0",
        *flags,
    ]
    return subprocess.Popen(
        lab.namespaces.command("node3", command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def ends(process: subprocess.Popen[str], seconds: float = 15) -> tuple[int, str]:
    """Exit status and output of an agent that must end by itself."""
    text, _ = process.communicate(timeout=seconds)
    return process.returncode, text


def test_an_unknown_flag_is_refused_with_status_2(lab: Lab) -> None:
    status, text = ends(start(lab, "--no-such-flag"))
    assert status == 2 and text.rstrip().endswith("unknown flag: --no-such-flag")


def test_a_bad_value_names_flag_value_and_rule(lab: Lab) -> None:
    status, text = ends(start(lab, "--overlay-type=partial"))
    line = next(line for line in text.splitlines() if "overlay-type" in line)
    assert status == 1 and "partial" in line and "subnet" in line and "full" in line


def test_a_missing_kubeconfig_is_named(lab: Lab) -> None:
    process = start(lab, "--kubeconfig=/nonexistent/kubeconfig", without=("--manifests",))
    status, text = ends(process)
    assert status == 1 and "/nonexistent/kubeconfig" in text and "Traceback" not in text


def runs_on(process: subprocess.Popen[str], seconds: float = 8) -> str:
    """Output of an agent that must not end by itself; it is stopped."""
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=seconds)
    process.terminate()
    text, _ = process.communicate(timeout=15)
    assert process.returncode == 0, text
    return text


def test_no_gobgpd_binary_is_told_and_the_rest_of_the_agent_runs(lab: Lab, tmp_path: Path) -> None:
    tools = "ip iptables ip6tables iptables-save ip6tables-save iptables-restore ip6tables-restore setpriv modprobe cat"
    for tool in tools.split():
        found = shutil.which(tool)
        if found:
            (tmp_path / tool).symlink_to(found)
    text = runs_on(start(lab, path=str(tmp_path)))
    assert any("gobgpd" in line and "PATH" in line for line in text.splitlines()), text
    assert "Traceback" not in text


def test_a_missing_capability_is_told_and_the_rest_of_the_agent_runs(lab: Lab) -> None:
    before = dataplane(lab, "node3")
    text = runs_on(start(lab, prefix=("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")))
    assert any("NET_ADMIN" in line.upper() and "missing" in line for line in text.splitlines()), text
    assert "Traceback" not in text
    assert dataplane(lab, "node3") == before


def test_a_port_in_use_is_named(lab: Lab) -> None:
    listener = network.run(lab.namespaces.command("node3", ["sh", "-c", "ss -Hltn 'sport = :20244' | wc -l"])).strip()
    assert listener != "0", "node3's agent listens on its health port"
    status, text = ends(start(lab, "--health-port=20244"))
    assert status == 1 and "20244" in text and "in use" in text.lower(), text


def test_a_second_agent_on_the_same_run_directory_is_refused(lab: Lab) -> None:
    status, text = ends(start(lab, f"--run-dir={lab.run_dir('node3')}"))
    assert status == 1 and str(lab.run_dir("node3")) in text, text
    assert lab.ready("node3")


def test_a_cni_folder_that_cannot_be_written_is_told_and_the_file_stays(lab: Lab) -> None:
    conf = lab.conf_file("node1")
    before = conf.read_text()
    mark = lab.log_file("node1").stat().st_size
    changed = json.loads(json.dumps(node_manifest(NODES[0])))
    changed["spec"]["podCIDRs"] = ["10.244.77.0/24", "fd00:244:77::/64"]
    # Read-only only as the agent sees it: `ip netns exec` gave it a mount namespace of its own.
    inside = ["nsenter", "-t", str(lab.agents["node1"].pid), "-m", "mount"]
    network.run([*inside, "--bind", str(conf.parent), str(conf.parent)])
    network.run([*inside, "-o", "remount,ro,bind", str(conf.parent)])
    try:
        lab.write_manifest("node1", changed)
        found = lambda: [line for line in log_since(lab, "node1", mark) if str(conf) in line]  # noqa: E731
        assert wait_until(lambda: bool(found()), 15), log_since(lab, "node1", mark)
        assert conf.read_text() == before
    finally:
        network.run([*inside, "-o", "remount,rw,bind", str(conf.parent)])
    assert wait_until(lambda: "10.244.77.0/24" in conf.read_text(), 40), "retried when the folder can be written again"
    lab.write_manifest("node1", node_manifest(NODES[0]))
    assert wait_until(lambda: conf.read_text() == before, 40)


def test_sockets_of_the_run_directory_are_closed_to_others(lab: Lab) -> None:
    run_dir = lab.run_dir("node1")
    assert run_dir.stat().st_mode & 0o777 == 0o700
    for path in run_dir.rglob("*"):
        assert path.stat().st_mode & 0o007 == 0 or path.parent != run_dir / "ipc", path
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError):  # noqa: PT011
        probe.connect(str(run_dir / "no-such.sock"))
