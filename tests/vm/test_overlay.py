"""Tunnels that the router makes, between nodes on real wires: who reaches whom, in which packets, of which size."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from support.capture import IPIP, IPV6_IN_IP, UDP, Packet, capture
from support.namespaces import Namespace
from support.overlay import ADDRESSES, CIDRS, PODS, Overlay, name_of, overlay
from support.vm import modprobe

from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings

FULL = {
    "ipip": Settings(overlay_type="full"),
    "fou": Settings(overlay_type="full", overlay_encap="fou"),
}
MTU = {"ipip": {4: 1480, 6: 1460}, "fou": {4: 1468, 6: 1448}}
"""1500 less the outer header, and for GUE 8 bytes of UDP and 4 of its own; no encapsulation limit."""


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    modprobe("ipip", "ip6_tunnel", "fou", "fou6")


@pytest.fixture(scope="module", params=list(FULL))
def encapsulation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def full(encapsulation: str) -> Iterator[Overlay]:
    """All nodes tunnel to all others. The tests leave it as it was."""
    with overlay() as net:
        for node in net.nodes.values():
            node.start(FULL[encapsulation])
        yield net


def version(address: str) -> int:
    return 6 if ":" in address else 4


def is_tunnelled(packet: Packet, encapsulation: str) -> bool:
    """Whether the outer header is as the encapsulation makes it, without anything between the headers."""
    plain = packet.protocol == (IPIP if version(packet.source) == 4 else IPV6_IN_IP)
    gue = (packet.protocol, packet.port) == (UDP, 5555)
    return (plain if encapsulation == "ipip" else gue) and packet.inner is not None and not packet.extensions


def test_pods_reach_pods_and_nodes_and_all_of_it_is_in_tunnels(full: Overlay, encapsulation: str) -> None:
    with capture(full[1].node, "eth0") as wire:
        assert full.unreachable() == set()
        packets = wire.packets()
    pods = {address for both in PODS.values() for address in both}
    assert not [one for one in packets if {one.source, one.destination} & pods], "in the clear"
    carried = {(one.inner.source, one.inner.destination) for one in packets if one.inner is not None}
    for family, own in enumerate(PODS[1]):
        # A pod's packet to a node's address leaves by the tunnel, and the answer comes back by it.
        for other in (*(PODS[number][family] for number in (2, 3, 4)), *(ADDRESSES[n][family] for n in (2, 3, 4))):
            assert {(own, other), (other, own)} <= carried
    for one in packets:
        if one.inner is not None:
            assert is_tunnelled(one, encapsulation), one
            if one.sent:
                assert one.ttl == (225 if encapsulation == "fou" else one.inner.ttl), one


def test_nodes_reach_pods(full: Overlay) -> None:
    assert full.unreachable(from_pods=False) == set()


def test_devices_routes_and_rules_are_as_kube_router_has_them(full: Overlay, encapsulation: str) -> None:
    for number, one in full.nodes.items():
        devices = one.tunnels()
        assert set(devices) == {name_of(remote) for other in one.others for remote in ADDRESSES[other]}
        for other in one.others:
            for family, remote in enumerate(ADDRESSES[other]):
                device = devices[name_of(remote)]
                assert (device["local"], device["remote"]) == (ADDRESSES[number][family], remote)
                assert device["mtu"] == MTU[encapsulation][version(remote)]
                assert "UP" in device["flags"]
                assert device.get("encap", {}).get("type") == (None if encapsulation == "ipip" else "gue"), device
        for family, cidr in enumerate(CIDRS[number]):
            option = f"-{(4, 6)[family]}"
            assert f"from {cidr} lookup 77" in one.node.run(f"ip {option} rule")
            table = one.node.run(f"ip {option} route show table 77").splitlines()
            main = one.node.run(f"ip {option} route show proto 17").splitlines()
            for other in one.others:
                name = name_of(ADDRESSES[other][family])
                assert [line for line in table if line.startswith(f"{ADDRESSES[other][family]} dev {name}")]
                mtu = MTU[encapsulation][(4, 6)[family]]
                (route,) = [line for line in main if line.startswith(f"{CIDRS[other][family]} dev {name}")]
                for words in (f"src {ADDRESSES[number][family]} ", f"mtu {mtu} ", f"advmss {mtu - (40, 60)[family]} "):
                    assert words in route + " ", route


def test_a_new_worker_writes_nothing(full: Overlay, encapsulation: str) -> None:
    for node in full.nodes.values():
        assert node.start(FULL[encapsulation]).writes == 0


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_packets_of_the_full_size_pass_and_larger_ones_are_told(full: Overlay, encapsulation: str, family: int) -> None:
    """No black hole: what is too large is answered, so that TCP through 1500-byte pods finds its size."""
    source, target = full[1].pod, PODS[4][family]
    mtu = MTU[encapsulation][(4, 6)[family]]
    payload = mtu - (28, 48)[family]
    ping = "ping -q -n -M do -c 1 -w 5 -s"
    assert (
        carry(source, full[4].pod, target, 400_000) == carry(full[4].pod, source, PODS[1][family], 400_000) == 400_000
    )
    source.run(f"{ping} {payload} {target}")
    assert "1 received" not in source.run(f"{ping} {payload + 1} {target}; true")
    assert f"mtu {mtu}" in source.run(f"ip route get {target}")


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_a_nodes_own_connections_offer_the_segment_that_fits(full: Overlay, encapsulation: str, family: int) -> None:
    with capture(full[1].node, "eth0") as wire:
        assert carry(full[1].node, full[4].pod, PODS[4][family], 100_000) == 100_000
        (offered,) = {one.inner.mss for one in wire.packets() if one.inner is not None and one.inner.syn and one.sent}
    assert offered == MTU[encapsulation][(4, 6)[family]] - (40, 60)[family]


def carry(source: Namespace, target: Namespace, address: str, size: int) -> int:
    """The number of bytes that a TCP connection carried within 20 s."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as stack:
        with target.enter():
            listener = stack.enter_context(socket.create_server((address, 0), family=family))
        with source.enter():
            sender = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        for one in (listener, sender):
            one.settimeout(20.0)
        port = listener.getsockname()[1]
        thread = threading.Thread(target=_send, args=(sender, address, port, size), daemon=True)
        thread.start()
        receiver = stack.enter_context(listener.accept()[0])
        receiver.settimeout(20.0)
        received = 0
        with contextlib.suppress(TimeoutError):
            while data := receiver.recv(1 << 16):
                received += len(data)
        thread.join()
    return received


def _send(sender: socket.socket, address: str, port: int, size: int) -> None:
    with contextlib.suppress(TimeoutError):
        sender.connect((address, port))
        sender.sendall(bytes(size))
        sender.shutdown(socket.SHUT_WR)


DAMAGES = {
    # What is done to the device to node 4, in iproute2's words.
    "deleted": "link del {name}",
    "down": "link set {name} down",
    "another remote": "link del {name}\nlink add {name} up type {kind} mode {mode} local {local} remote {elsewhere}",
    "another local": "link del {name}\nlink add {name} up type {kind} mode {mode} local {other} remote {remote}",
    "another ttl": "link change {name} type {kind} local {local} remote {remote} ttl 3 {path} {encap}",
    "another port": "link change {name} type {kind} local {local} remote {remote} ttl 225 {path}"
    " encap gue encap-sport auto encap-dport 4444",
    "another MTU": "link set {name} mtu 1300",
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_tunnel_is_repaired_when_the_kernel_tells(full: Overlay, encapsulation: str, damage: str) -> None:
    one = full[1]
    names = [name_of(remote) for remote in ADDRESSES[4]]
    elsewhere = [("10.9.9.9", "10.244.1.1"), ("fd99::9", "fd00:244:1::1")]

    def state() -> list[object]:
        devices = one.tunnels()
        kept = ("local", "remote", "ttl", "mtu", "flags", "encap", "pmtudisc", "proto")
        routes = one.node.run("ip route show table all; ip -6 route show table all").splitlines()
        told = sorted(line for line in routes if any(name in line for name in names) and "fe80" not in line)
        return [*told, *(devices.get(name, {}).get(key) for name in names for key in kept)]

    before = state()
    for family, name in enumerate(names):
        words = DAMAGES[damage].format(
            name=name,
            kind=("ipip", "ip6tnl")[family],
            mode=("ipip", "ip6ip6")[family],
            local=ADDRESSES[1][family],
            remote=ADDRESSES[4][family],
            elsewhere=elsewhere[family][0],
            other=elsewhere[family][1],
            path=("pmtudisc", "")[family],
            encap="encap gue encap-sport auto encap-dport 5555" if encapsulation == "fou" else "",
        )
        one.node.run("ip -batch -", stdin=words)
    assert state() != before
    took = one.repair_until(lambda: state() == before)
    assert state() == before
    print(f"{damage}, {encapsulation}: repaired after {took:.2f} s")
    one.node.run("; ".join(f"ping -q -n -c 1 -w 5 {target}" for target in PODS[4]))
    assert one.reconcile(Trigger(period=True)).writes == 0
