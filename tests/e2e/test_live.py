"""Everything that may change while the agents run, one lab for all: what follows, and which BGP sessions do not bounce.

A session that bounces has other TCP ports afterwards; so a connection that is still there is a session that stayed up.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from threading import Event, Thread
from time import sleep
from typing import Any

import pytest
from lab import network
from lab.cluster import Lab, wait_until
from lab.topology import CLUSTER_ASN, NODES, node_manifest
from support.gotools import tools_dir
from support.labstate import log_since, output, pod_routes

N1, N2, N3 = NODES
FABRIC = {node.name: {str(address.ip) for address in node.segment.fabric} for node in NODES}
Connections = dict[str, set[tuple[str, str]]]
Manifest = dict[str, Any]


class Flags:
    """The flags file and the passwords file of node1."""

    def __init__(self, lab: Lab) -> None:
        self.flags, self.passwords = lab.folder / "node1-flags", lab.folder / "node1-passwords"
        self.write()

    def write(self, *flags: str, passwords: str = ",") -> None:
        for path, text in ((self.passwords, passwords), (self.flags, "\n".join(flags))):
            new = path.with_suffix(".new")
            new.write_text(text + "\n")
            new.rename(path)

    @property
    def arguments(self) -> list[str]:
        return [f"--flags-file={self.flags}", f"--peer-router-passwords-file={self.passwords}"]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    made = Lab(f"live{os.getpid()}", gobgpd_dir=tools_dir())
    try:
        made.up(lambda text: None)
        made.agents["node1"].send_signal(signal.SIGTERM)
        made.agents["node1"].wait(timeout=15)
        made.start_agent(N1, Flags(made).arguments)
        for node in NODES:
            assert wait_until(lambda name=node.name: made.ready(name), 60), made.log_file(node.name).read_text()[-3000:]
        yield made
    finally:
        made.down()


@pytest.fixture
def flags(lab: Lab) -> Iterator[Flags]:
    found = Flags(lab)
    yield found
    found.write()
    assert wait_until(lambda: ready(lab), 40), lab.log_file("node1").read_text()[-3000:]


def ready(lab: Lab) -> bool:
    return all(lab.ready(node.name) for node in NODES) and all(len(connections(lab)[node.name]) == 4 for node in NODES)


def connections(lab: Lab) -> Connections:
    """Both ends of the BGP connections of each node."""
    found = {}
    for node in NODES:
        text = output(lab, node.name, "ss", "-Htn", "state", "established", "( sport = :179 or dport = :179 )")
        found[node.name] = {(line.split()[2], line.split()[3]) for line in text.splitlines()}
    return found


def address(end: str) -> str:
    return end.rpartition(":")[0].strip("[]")


@contextmanager
def bouncing(lab: Lab, expected: Callable[[str, str], bool]) -> Iterator[None]:
    """Of the sessions that are up now just those bounce, or end, that are ``expected`` (node, address of the peer)."""
    assert wait_until(lambda: ready(lab), 40), {node.name: lab.status(node.name) for node in NODES}
    before = connections(lab)
    yield
    after = connections(lab)
    gone = {(node, address(pair[1])) for node, pairs in before.items() for pair in pairs - after[node]}
    wanted = {
        (node, address(pair[1])) for node, pairs in before.items() for pair in pairs if expected(node, address(pair[1]))
    }
    assert gone == wanted


def nobody(node: str, peer: str) -> bool:
    return False


def of_node(name: str) -> Callable[[str, str], bool]:
    """All sessions of a node, seen from both ends."""
    own = {str(item.ip) for node in NODES if node.name == name for item in node.addresses}
    return lambda node, peer: node == name or peer in own


@contextmanager
def changed(lab: Lab, number: int, change: Callable[[Manifest], None]) -> Iterator[int]:
    """A Node object is changed, and put back at the end; gives the size of its log at that moment."""
    node = NODES[number - 1]
    manifest = json.loads(json.dumps(node_manifest(node)))
    change(manifest)
    mark = lab.log_file(node.name).stat().st_size
    lab.write_manifest(node.name, manifest)
    try:
        yield mark
    finally:
        lab.write_manifest(node.name, node_manifest(node))


def annotated(annotations: dict[str, str]) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        manifest["metadata"]["annotations"] |= {f"kube-router.io/{key}": value for key, value in annotations.items()}

    return change


def of_fabric(lab: Lab, prefix: str) -> str:
    """What the fabric router holds of a prefix."""
    control = str(lab.folder / "fabric" / "bird.ctl")
    command = ["birdc", "-r", "-s", control, "show", "route", "all", "for", prefix]
    try:
        return network.run(lab.namespaces.command("fabric", command))
    except network.LabError:  # it is not known there
        return ""


def announced_gobgpd(lab: Lab, node: str, mark: int, *words: str) -> bool:
    lines = [line for line in log_since(lab, node, mark) if " WARN " in line and "restart gobgpd" in line]
    return len(lines) == 1 and all(word in lines[0] for word in words)


# -- what needs no session to bounce ---------------------------------------------------------------------------------


def test_a_changed_pod_cidr_is_followed_and_no_session_bounces(lab: Lab) -> None:
    def change(manifest: Manifest) -> None:
        manifest["spec"] = {"podCIDR": "10.244.22.0/24", "podCIDRs": ["10.244.22.0/24", "fd00:244:22::/64"]}

    def followed(cidr: str) -> bool:
        return any(route.startswith(f"{cidr} via 10.10.1.12") for route in pod_routes(lab, "node1"))

    with bouncing(lab, nobody):
        with changed(lab, 2, change):
            assert wait_until(lambda: followed("10.244.22.0/24") and not followed("10.244.2.0/24"), 15)
        assert wait_until(lambda: followed("10.244.2.0/24") and not followed("10.244.22.0/24"), 15)


def test_an_attribute_is_followed_and_no_session_bounces(lab: Lab) -> None:
    prepended = lambda: "BGP.as_path: 64512 64512 64512" in of_fabric(lab, N2.pod_cidrs[0])  # noqa: E731
    change = annotated({"path-prepend.as": str(CLUSTER_ASN), "path-prepend.repeat-n": "2"})
    with bouncing(lab, nobody):
        with changed(lab, 2, change):
            assert wait_until(prepended, 15), of_fabric(lab, N2.pod_cidrs[0])
        assert wait_until(lambda: not prepended(), 15)


def test_a_flag_about_policies_is_followed_and_no_session_bounces(lab: Lab, flags: Flags) -> None:
    known = lambda: "unicast" in of_fabric(lab, N1.pod_cidrs[0]) and "node1" in of_fabric(lab, N1.pod_cidrs[0])  # noqa: E731
    with bouncing(lab, nobody):
        assert wait_until(known, 15), of_fabric(lab, N1.pod_cidrs[0])
        flags.write("--advertise-pod-cidr=false")
        assert wait_until(lambda: not known(), 15), of_fabric(lab, N1.pod_cidrs[0])
        assert any(route.startswith("10.244.1.0/24 via") for route in pod_routes(lab, "node2"))
        flags.write()
        assert wait_until(known, 15)


# -- what concerns one session ---------------------------------------------------------------------------------------


def test_a_peer_that_goes_takes_its_own_session_with_it(lab: Lab) -> None:
    gone = str(N2.segment.fabric[1].ip)
    kept = {"peer.ips": str(N2.segment.fabric[0].ip), "peer.asns": "64600", "peer.localips": str(N2.addresses[0].ip)}
    change = annotated(kept)
    with (
        bouncing(lab, lambda node, peer: node == "node2" and peer == gone),
        changed(lab, 2, change),
    ):
        assert wait_until(lambda: gone not in {address(pair[1]) for pair in connections(lab)["node2"]}, 15)
    assert wait_until(lambda: ready(lab), 40)


def test_a_changed_password_bounces_the_session_that_it_is_for(lab: Lab, flags: Flags) -> None:
    """The other end knows of no password: the session cannot come back before it is taken back."""
    first = str(N1.segment.fabric[0].ip)
    secret = "ganz-geheim"
    mark = lab.log_file("node1").stat().st_size
    with bouncing(lab, lambda node, peer: node == "node1" and peer == first):
        flags.write(passwords=f"{base64.b64encode(secret.encode()).decode()},")
        assert wait_until(lambda: first not in {address(pair[1]) for pair in connections(lab)["node1"]}, 15)
    assert secret not in "".join(log_since(lab, "node1", mark))


def test_a_changed_hold_time_is_for_the_next_session(lab: Lab, flags: Flags) -> None:
    mark = lab.log_file("node1").stat().st_size
    told = lambda: [line for line in log_since(lab, "node1", mark) if "hold_seconds 90 -> 30" in line]  # noqa: E731
    with bouncing(lab, nobody):
        flags.write("--bgp-holdtime=30s")
        assert wait_until(lambda: len(told()) == 2, 15), log_since(lab, "node1", mark)


# -- nodes and what replaces gobgpd ----------------------------------------------------------------------------------


def test_a_node_that_goes_and_comes_bounces_only_its_own_sessions(lab: Lab) -> None:
    """Its own agent, whose Node is missing, leaves everything as it is."""
    own = {str(item.ip) for item in N2.addresses}
    with bouncing(lab, lambda node, peer: (node == "node2" and peer not in FABRIC["node2"]) or peer in own):
        lab.remove_manifest("node2")
        assert wait_until(lambda: not any("10.10.1.12" in route for route in pod_routes(lab, "node1")), 15)
        lab.write_manifest("node2", node_manifest(N2))
        assert wait_until(lambda: ready(lab), 40)


def test_another_router_id_by_the_flags_file_replaces_gobgpd_of_this_node(lab: Lab, flags: Flags) -> None:
    mark = lab.log_file("node1").stat().st_size
    with bouncing(lab, of_node("node1")):
        flags.write("--router-id=192.0.2.77")
        assert wait_until(lambda: announced_gobgpd(lab, "node1", mark, "10.10.1.11", "192.0.2.77"), 15)
        assert wait_until(lambda: ready(lab), 40)


def test_other_listen_addresses_replace_gobgpd_of_this_node(lab: Lab) -> None:
    only = str(N3.addresses[0].ip)
    with bouncing(lab, of_node("node3")), changed(lab, 3, annotated({"bgp-local-addresses": only})) as mark:
        assert wait_until(lambda: announced_gobgpd(lab, "node3", mark, f"port 179 on {only},", "179 on"), 15)
        listening = lambda: output(lab, "node3", "ss", "-Hltn", "sport = :179")  # noqa: E731
        assert wait_until(lambda: only in listening() and "fd10:2::13" not in listening(), 15), listening()
    assert wait_until(lambda: ready(lab), 40)


def test_another_address_replaces_gobgpd_and_moves_the_routes(lab: Lab) -> None:
    def change(manifest: Manifest) -> None:
        manifest["metadata"]["annotations"] = {}
        manifest["status"]["addresses"][0]["address"] = "10.10.1.112"

    output(lab, "node2", "ip", "address", "add", "10.10.1.112/24", "dev", "eth0")
    try:
        with bouncing(lab, of_node("node2")), changed(lab, 2, change) as mark:
            assert wait_until(lambda: announced_gobgpd(lab, "node2", mark, "10.10.1.12", "10.10.1.112"), 15)
            moved = lambda: any(r.startswith("10.244.2.0/24 via 10.10.1.112 ") for r in pod_routes(lab, "node1"))  # noqa: E731
            assert wait_until(moved, 30), pod_routes(lab, "node1")
    finally:
        output(lab, "node2", "ip", "address", "del", "10.10.1.112/24", "dev", "eth0")
    assert wait_until(lambda: ready(lab), 40)
    assert wait_until(lambda: any(r.startswith("10.244.2.0/24 via 10.10.1.12 ") for r in pod_routes(lab, "node1")), 30)


# -- kills -----------------------------------------------------------------------------------------------------------


@contextmanager
def storm(lab: Lab) -> Iterator[None]:
    """Nodes that come, change and go, and routes that an external router announces and withdraws, without a pause."""
    over = Event()

    def rage() -> None:
        for turn in count():
            if over.is_set():
                return
            number = 100 + turn % 7
            manifest = node_manifest(N3)
            manifest["metadata"] = {"name": f"phantom{number}"}
            manifest["spec"] = {"podCIDRs": [f"10.245.{turn % 250}.0/24", f"fd00:245:{turn % 250}::/64"]}
            manifest["status"] = {"addresses": [{"type": "InternalIP", "address": f"10.10.2.{number}"}]}
            lab.write_manifest(f"phantom{number}", manifest)
            lab.remove_manifest(f"phantom{100 + (turn + 3) % 7}")
            if turn % 16 == 0:  # slow enough for a withdrawal to get through before it is taken back
                announce(lab, "disable" if turn % 32 else "enable")
            sleep(0.03)

    thread = Thread(target=rage)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for number in range(100, 107):
            lab.remove_manifest(f"phantom{number}")
        announce(lab, "enable")


def announce(lab: Lab, word: str) -> None:
    """``enable`` or ``disable`` what the external router announces."""
    for family in ("v4", "v6"):
        command = ["birdc", "-s", str(lab.folder / "external" / "bird.ctl"), word, f"own_{family}"]
        network.run(lab.namespaces.command("external", command))


@contextmanager
def routes_stay(lab: Lab, node: str, *prefixes: str) -> Iterator[None]:
    """The kernel tells of no removal of a route to these in between, not even for a moment."""
    command = lab.namespaces.command(node, ["ip", "monitor", "route"])
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        watcher.terminate()
        text = watcher.communicate()[0]
    assert [line for line in text.splitlines() if line.startswith("Deleted") and line.split()[1] in prefixes] == []
    assert "198.51.100.0/24" in text and "2001:db8:100::/48" in text, "there was no storm of routes"


def test_kills_of_router_and_gobgpd_in_a_storm_lose_no_route(lab: Lab) -> None:
    """Of the other nodes; the kernel's monitor would see it. Afterwards nothing is left to write."""
    assert wait_until(lambda: ready(lab), 40)
    with routes_stay(lab, "node1", *N2.pod_cidrs):
        announce(lab, "disable")  # the monitor does see a route that goes
        assert wait_until(lambda: "198.51.100.0/24" not in " ".join(pod_routes(lab, "node1")), 20)
        kill_in_a_storm(lab)
    assert wait_until(lambda: ready(lab), 40)
    external = {"198.51.100.0/24", "2001:db8:100::/48"}
    assert wait_until(lambda: external <= {route.split()[0] for route in pod_routes(lab, "node1")}, 20)
    pid = int(lab.workers("node1")["router"]["pid"])
    output(lab, "node1", "supervisorctl", "restart", "router")
    assert wait_until(lambda: lab.restarted("node1", "router", pid), 20)
    assert lab.workers("node1")["router"]["writes"] == 0


def kill_in_a_storm(lab: Lab) -> None:
    with storm(lab):
        for worker, pause in (("router", 0.3), ("router", 0.2), ("gobgpd", 0.1), ("router", 1.1), ("gobgpd", 0.5)):
            pid = int(lab.workers("node1")[worker]["pid"])
            sleep(pause)
            os.kill(pid, signal.SIGKILL)
            assert wait_until(lambda w=worker, p=pid: other_process(lab, w, p), 15)  # type: ignore[misc]
        assert wait_until(lambda: len(connections(lab)["node1"]) == 4, 30)


def other_process(lab: Lab, worker: str, before: int) -> bool:
    return lab.workers("node1").get(worker, {}).get("pid") not in (None, 0, before)
