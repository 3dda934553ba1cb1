"""Tunnels while nodes change: take-over from kube-router, other encapsulations under traffic, nodes gone, cleanup."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace
from support.capture import IPIP, UDP, capture
from support.overlay import (
    ADDRESSES,
    CIDRS,
    PODS,
    Overlay,
    OverlayNode,
    Pings,
    as_upstream_left_it,
    name_of,
    overlay,
)
from support.vm import modprobe

from kube_router.workers.router.cleanup import cleanup
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings

FULL = Settings(overlay_type="full")
SUBNET = Settings(overlay_type="subnet")
THREE = (1, 2, 4)
"""Nodes of both subnets."""


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    modprobe("ipip", "ip6_tunnel", "fou", "fou6")


@pytest.fixture
def net() -> Iterator[Overlay]:
    with overlay() as made:
        yield made


def traffic(net: Overlay, nodes: tuple[int, ...] = THREE, families: tuple[int, ...] = (0, 1)) -> Pings:
    """Between the pods of all pairs of nodes, there and back, and from pods to nodes."""
    pairs = [(a, b) for a in nodes for b in nodes if a < b]
    flows = [(net[a].pod, PODS[b][family]) for a, b in pairs for family in families]
    return Pings([*flows, *((net[nodes[0]].pod, ADDRESSES[nodes[-1]][family]) for family in families)])


def one_by_one(
    net: Overlay, pings: Pings, settings: Settings, nodes: tuple[int, ...] = THREE, most_lost: int = 0
) -> None:
    """The worker of each node is started anew with other settings, and traffic goes on between new and old ones.

    ``most_lost``: packets that one flow may lose each time.
    """
    for turn, number in enumerate(nodes, 1):
        net[number].start(settings)
        pings.advance(3)
        lost = pings.lost()
        assert all(len(numbers) <= most_lost * turn for numbers in lost.values()), (settings, number, lost)


def test_another_encapsulation_or_port_loses_no_packet(net: Overlay) -> None:
    """ipip, GUE at 5555, GUE at 6666, ipip; the receiving side knows of the next one before anybody sends it."""
    for number in THREE:
        net[number].start(FULL)
    steps = {
        "to GUE": replace(FULL, overlay_encap="fou", overlay_encap_accept_ports=(6666,)),
        "to another port": replace(
            FULL, overlay_encap="fou", overlay_encap_port=6666, overlay_encap_accept_ports=(5555,)
        ),
        "to ipip": replace(FULL, overlay_encap_port=6666),
    }
    sent = {}
    with traffic(net) as pings:
        for step, settings in steps.items():
            one_by_one(net, pings, settings)
            with capture(net[1].node, "eth0") as wire:
                pings.advance(5)
                sent[step] = {(packet.protocol, packet.port) for packet in wire.packets() if packet.sent}
        print(f"{pings.answers()} answers, none lost")
    plain = {(IPIP, 0), (41, 0)}
    assert sent == {"to GUE": {(UDP, 5555)}, "to another port": {(UDP, 6666)}, "to ipip": plain}
    # The port of before is closed, ours is open.
    assert net[1].node.run("ip fou show | sort -u").splitlines() == ["port 6666 gue", "port 6666 gue -6"]


@pytest.mark.parametrize("style", ["v1", "v2", "gue"])
def test_a_node_is_taken_over_from_kube_router(net: Overlay, style: str) -> None:
    as_upstream_left_it(net, style)
    gone = {"v1": ("10.0.0.9",)}.get(style, ("10.0.0.9", "fd00::9"))
    for family, remote in enumerate(gone):  # what the node of before left of one that is there no more
        name = "tun-10009" if style == "v1" else name_of(remote)
        kind = ("ipip", "ip6tnl")[family]
        prefix = ("10.244.9.0/24", "fd00:244:9::/64")[family]
        net[1].node.run(
            f"ip link add {name} type {kind} local {ADDRESSES[1][family]} remote {remote}; ip link set {name} up;"
            f"ip route add {prefix} dev {name} proto 17; ip route add {remote} dev {name} table 77"
        )
    families = (0,) if style == "v1" else (0, 1)
    settings = replace(FULL, overlay_encap="fou" if style == "gue" else "ipip")
    with traffic(net, families=families) as pings:
        # Devices of v1 have other names: while the routes move to new ones, a few packets come in by the old ones.
        one_by_one(net, pings, settings, tuple(ADDRESSES), most_lost=15 if style == "v1" else 0)
    assert net.unreachable() == set()
    for number, one in net.nodes.items():
        assert set(one.tunnels()) == {name_of(remote) for other in one.others for remote in ADDRESSES[other]}
        told = one.node.run("ip route show table all; ip -6 route show table all")
        assert not [word for word in ("10.244.9.0", "fd00:244:9::", "10.0.0.9", "fd00::9", "tun-1") if word in told]
        for family, cidr in enumerate(CIDRS[number]):
            assert one.node.run(f"ip -{(4, 6)[family]} rule").count(f"from {cidr} lookup 77") == 1
        assert one.start(settings).writes == 0


def test_only_other_subnets_are_tunnelled_to(net: Overlay) -> None:
    for node in net.nodes.values():
        node.start(SUBNET)
    assert set(net[1].tunnels()) == {name_of(remote) for remote in ADDRESSES[4]}
    with capture(net[1].node, "eth0") as wire:
        assert net.unreachable() == set()
        packets = wire.packets()
    near = {address for number in (2, 3) for address in (*PODS[number], *ADDRESSES[number])}
    far = {*PODS[4], *ADDRESSES[4]}
    for own in PODS[1]:
        direct = {one.destination for one in packets if one.source == own}
        inside = {one.inner.destination for one in packets if one.inner is not None and one.inner.source == own}
        same = {address for address in near | far if (":" in address) == (":" in own)}
        assert (direct, inside) == (same & near, same & far)


def test_a_node_that_goes_takes_its_tunnels_along_and_one_that_comes_gets_them(net: Overlay) -> None:
    for number in THREE:
        net[number].start(FULL)
    with traffic(net) as pings:
        one = net[1]
        one.known = (1, 2, 4)
        one.reconcile(Trigger())
        assert set(one.tunnels()) == {name_of(remote) for other in (2, 4) for remote in ADDRESSES[other]}
        assert "10.0.0.3 " not in one.node.run("ip route show table 77")
        one.known = (1, 2, 3, 4)
        one.reconcile(Trigger())
        assert len(one.tunnels()) == 6
        pings.advance(3)
        assert pings.lost() == {}


def test_two_addresses_with_one_name_both_have_a_tunnel(net: Overlay) -> None:
    """21.3.0.4 and 2.13.0.4 are the same without their dots; kube-router sends the packets of one to the other."""
    one = net[1]
    remotes = {"21.3.0.4": "10.245.1.0/24", "2.13.0.4": "10.245.2.0/24"}
    one.more = remotes
    one.start(FULL)

    def check() -> dict[str, str]:
        devices = {device["remote"]: name for name, device in one.tunnels().items() if device["remote"] in remotes}
        assert devices.keys() == remotes.keys()
        assert name_of("21.3.0.4") == name_of("2.13.0.4") in devices.values()
        for remote, cidr in remotes.items():
            for question in (f"{cidr.replace('0/24', '7')}", f"{remote} from {PODS[1][0]} iif kube-bridge"):
                assert f" dev {devices[remote]} " in one.node.run(f"ip route get {question}")
        return devices

    devices = check()
    assert one.start(FULL).writes == 0
    # It does not matter in which order they come: the one that is there keeps its name.
    for remote, cidr in remotes.items():
        one.more = {remote: cidr}
        one.reconcile(Trigger())
        one.more = remotes
        one.reconcile(Trigger())
        assert check()[remote] == devices[remote]


FOREIGN = (
    "link add foreign4 type ipip local 10.0.0.1 remote 10.0.0.77",
    "link add tun-e443169117a type ipip local 10.0.0.1 remote 10.0.0.78",  # the name says 10.0.0.1
    "link add foreign6 type ip6tnl local fd00::1 remote fd00::77",
    "link set foreign4 up",
    "link set foreign6 up",
    "route add 192.0.2.0/24 dev foreign4 proto static",
    "route add 2001:db8::/64 dev foreign6 proto static",
    "route add 192.0.2.9 via 10.0.0.254 table 77 proto static",
    "rule add from 192.0.2.9 lookup 77",
    "fou add port 7777 gue",
    "fou add port 7778 ipproto 4",
)


def kernel_state(one: OverlayNode) -> dict[str, str]:
    """All that tunnels may touch, by the tools."""
    commands = {
        "links": "ip -d -o link show | sed 's/promiscuity.*minmtu/minmtu/;s/^[0-9]*: //;s/_timer *[0-9.]*//g' | sort",
        "routes": "ip route show table all | sort",
        "routes6": "ip -6 route show table all | grep -v -e fe80 -e ff00 | sort",
        "rules": "ip rule",
        "rules6": "ip -6 rule",
        "ports": "ip fou show; ip -6 fou show",
        "sets": "ipset list -n",
        "filter": "iptables-save | grep -e '^-A'; ip6tables-save | grep -e '^-A'",
    }
    return {name: one.node.run(command, check=False) for name, command in commands.items()}


@pytest.mark.parametrize("encapsulation", ["ipip", "fou"])
def test_cleanup_removes_all_of_ours_and_nothing_else(net: Overlay, encapsulation: str) -> None:
    one = net[1]
    one.node.run("ip -batch -", stdin="\n".join(FOREIGN))
    before = kernel_state(one)
    one.start(replace(FULL, overlay_encap=encapsulation))
    assert len(one.tunnels()) == 6 + 3
    there = kernel_state(one)
    for name, text in before.items():
        kept = set(text.splitlines()) - set(there[name].splitlines())
        assert not kept, (name, kept)
    one.stop()
    with one.node.enter():
        assert cleanup(one.settings) == []
    assert kernel_state(one) == before


def test_without_overlay_tunnels_rules_and_ports_of_before_go(net: Overlay) -> None:
    for number in THREE:
        net[number].start(replace(FULL, overlay_encap="fou"))
    none = Settings(enable_overlay=False)
    net[1].start(none)
    assert net[1].tunnels() == {}
    told = net[1].node.run("ip rule; ip -6 rule; ip fou show; ip -6 fou show; ip route show table 77 2>/dev/null; true")
    assert "77" not in told
    assert "port" not in told


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_rules_and_routes_of_pods_are_put_back_when_somebody_flushes_them(net: Overlay, family: int) -> None:
    one, option = net[1], f"-{(4, 6)[family]}"
    one.start(FULL)
    read: Callable[[], str] = lambda: one.node.run(  # noqa: E731
        f"ip {option} rule; ip {option} route show table 77; ip {option} route show proto 17"
    )
    before = read()
    for damage in (f"rule del from {CIDRS[1][family]} table 77", "route flush table 77", "route flush proto 17"):
        one.node.run(f"ip {option} {damage}")
        assert read() != before
        took = one.repair_until(lambda: sorted(read().split("\n")) == sorted(before.split("\n")))
        assert sorted(read().split("\n")) == sorted(before.split("\n"))
        print(f"{damage}: repaired after {took:.2f} s")
