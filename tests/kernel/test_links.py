"""The link driver and monitor on a real kernel."""

from __future__ import annotations

import errno
import ipaddress
import json
import select
from collections.abc import Callable, Iterator

import pytest
from support.namespaces import Namespace, veth

from kube_router.workers.kernel.links import LinkDriver, LinkMonitor
from kube_router.workers.kernel.netlink import NetlinkError
from kube_router.workers.linkfacts import LOOPBACK, Links


@pytest.fixture
def node(new_netns: Callable[[], Namespace]) -> Namespace:
    """A namespace with eth0 (192.0.2.1, 2001:db8::1, MTU 1400) to a switch."""
    node, switch = new_netns(), new_netns()
    veth(node, "eth0", switch, "port0", left_addresses=("192.0.2.1/24", "2001:db8::1/64"))
    switch.run("ip link set port0 mtu 1400")
    node.run("ip link set eth0 mtu 1400")
    return node


@pytest.fixture
def driver(node: Namespace) -> Iterator[LinkDriver]:
    with node.enter():
        driver = LinkDriver()
    yield driver
    driver.close()


@pytest.fixture
def monitor(node: Namespace) -> Iterator[LinkMonitor]:
    with node.enter():
        monitor = LinkMonitor()
    yield monitor
    monitor.close()


def heard(monitor: LinkMonitor) -> bool:
    """Whether the monitor has something to read, and it matters."""
    return bool(select.select([monitor], [], [], 1.0)[0]) and monitor.drain()


def follow_all(monitor: LinkMonitor, links: Links, *names: str) -> None:
    known = [link for link in links.links if link.name in names]
    monitor.follow(known, names, {ipaddress.ip_address("192.0.2.1")})


def test_reads_what_iproute2_reads(node: Namespace, driver: LinkDriver) -> None:
    node.run("ip link add br0 type bridge && ip link add d1 type veth peer name d2 && ip link set d1 master br0")
    node.run("ip address add 10.9.0.1 peer 10.9.0.2/32 dev d2")
    links = driver.observe()
    shown = {entry["ifname"]: entry for entry in json.loads(node.run("ip -json -details address show"))}
    assert {link.name for link in links.links} == set(shown)
    for link in links.links:
        entry = shown[link.name]
        assert (link.index, link.mtu, link.up) == (entry["ifindex"], entry["mtu"], "UP" in entry["flags"])
        assert link.kind == (LOOPBACK if link.name == "lo" else entry["linkinfo"]["info_kind"])
        ours = [str(address.ip) for address in link.addresses]
        assert ours == [address["local"] for address in entry["addr_info"]]
    eth0, br0 = links.named("eth0"), links.named("br0")
    assert eth0 is not None and br0 is not None
    assert ipaddress.ip_interface("192.0.2.1/24") in eth0.addresses
    assert ipaddress.ip_interface("2001:db8::1/64") in eth0.addresses
    assert [port.name for port in links.ports_of(br0)] == ["d1"]


def test_link_of_prefers_a_link_that_is_not_loopback(node: Namespace, driver: LinkDriver) -> None:
    node.run("ip address add 192.0.2.1/32 dev lo && ip address add 198.51.100.1/32 dev lo")
    links = driver.observe()
    carrier, loopback = (links.link_of(ipaddress.ip_address(text)) for text in ("192.0.2.1", "198.51.100.1"))
    assert carrier is not None and carrier.name == "eth0"
    assert loopback is not None and loopback.kind == LOOPBACK
    assert links.link_of(ipaddress.ip_address("2001:db8::2")) is None


def test_makes_changes_and_removes_a_bridge(node: Namespace, driver: LinkDriver) -> None:
    driver.create_bridge("br1")
    driver.create_bridge("br1")
    driver.set_up("br1")
    driver.set_mtu("br1", 1400)
    bridge = driver.observe().named("br1")
    assert bridge is not None and (bridge.kind, bridge.mtu, bridge.up) == ("bridge", 1400, True)
    driver.delete("br1")
    driver.delete("br1")
    assert driver.observe().named("br1") is None
    assert driver.writes == 6


def test_refusals_carry_errno(driver: LinkDriver) -> None:
    with pytest.raises(NetlinkError) as missing:
        driver.set_mtu("br9", 1400)
    assert missing.value.errno == errno.ENODEV
    driver.create_bridge("br1")
    with pytest.raises(NetlinkError) as refused:
        driver.set_mtu("br1", 70000)
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(NetlinkError):
        driver.create_bridge("a-name-longer-than-a-link-may-have")


def test_an_mtu_once_set_no_longer_follows_the_ports(node: Namespace, driver: LinkDriver) -> None:
    driver.create_bridge("br1")
    node.run("ip link add d1 mtu 1300 type veth peer name d2 && ip link set d1 master br1")
    followed = driver.observe().named("br1")
    assert followed is not None and followed.mtu == 1300
    driver.set_mtu("br1", 1500)
    node.run("ip link add e1 mtu 1280 type veth peer name e2 && ip link set e1 master br1")
    bridge = driver.observe().named("br1")
    assert bridge is not None and bridge.mtu == 1500


def test_everything_matters_before_follow(node: Namespace, monitor: LinkMonitor) -> None:
    node.run("ip link add other type bridge")
    assert heard(monitor)


@pytest.mark.parametrize(
    "command",
    [
        "ip link delete br0",
        "ip link set br0 mtu 1300",
        "ip link set br0 down",
        "ip link set br0 name br5",
        "ip link set eth0 mtu 1300",
        "ip address delete 192.0.2.1/24 dev eth0",
        "ip link add late type bridge",
        "ip address add 192.0.2.1/32 dev lo",
    ],
)
def test_what_is_followed_is_heard(node: Namespace, driver: LinkDriver, monitor: LinkMonitor, command: str) -> None:
    node.run("ip link add br0 type bridge && ip link set br0 up")
    follow_all(monitor, driver.observe(), "br0", "eth0", "late")
    monitor.drain()
    node.run(command)
    assert heard(monitor)


def test_what_is_not_followed_is_not_heard(node: Namespace, driver: LinkDriver, monitor: LinkMonitor) -> None:
    node.run("ip link add br0 type bridge && ip link set br0 up")
    follow_all(monitor, driver.observe(), "br0", "eth0")
    monitor.drain()
    node.run("ip link add d1 type veth peer name d2 && ip link set d1 master br0 up && ip link set d2 up")
    node.run("ip address add 10.0.0.1/24 dev d2 && ip address add 2001:db8:9::1/64 dev br0 && ip link delete d1")
    while select.select([monitor], [], [], 0.3)[0]:
        assert not monitor.drain()


def test_lost_events_matter(node: Namespace, monitor: LinkMonitor) -> None:
    monitor.follow((), (), ())
    lines = "\n".join(f"link add v{number} type veth peer name w{number}" for number in range(600))
    node.run("ip -batch -", stdin=lines)
    assert monitor.drain()
