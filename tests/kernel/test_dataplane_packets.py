"""Packets through the dataplane: a pod behind node n1, a router namespace outside; and plans cut off after any step."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
from support.dataplane import RunningDataplane, connect, facts, pod_routes
from support.namespaces import Namespace, veth

from kube_router.workers.kernel.iptables import RuleDriver
from kube_router.workers.kernel.netlink import NetlinkError, NetlinkSocket, Request
from kube_router.workers.model import Family
from kube_router.workers.router.cleanup import cleanup
from kube_router.workers.rulefacts import RulePlan

TARGETS = {
    # what it is: (address, source that the target must see)
    Family.IPV4: {
        "node": ("10.0.0.2", "10.244.1.5"),
        "pod": ("10.244.2.5", "10.244.1.5"),
        "outside": ("192.0.2.2", "10.0.0.1"),
    },
    Family.IPV6: {
        "node": ("fd00::2", "fd00:244:1::5"),
        "pod": ("fd00:244:2::5", "fd00:244:1::5"),
        "outside": ("2001:db8::2", "fd00::1"),
    },
}


RECEIVE = """
import json, select, socket, sys, time
sockets = {}
for address in sys.argv[1:]:
    one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    one.bind((address, 9999))
    sockets[one] = address
print("ready", flush=True)
seen = {}
deadline = time.monotonic() + 10
while sockets.keys() - {one for one in sockets if sockets[one] in seen} and deadline > time.monotonic():
    for one in select.select([*sockets, sys.stdin], [], [], 0.1)[0]:
        if one is sys.stdin:  # the sender has ended
            deadline = min(deadline, time.monotonic() + 0.2)
            select.select([*sockets], [], [], 0.1)
        else:
            seen[sockets[one]] = one.recvfrom(9)[1][0]
print(json.dumps(seen))
"""
SEND = """
import contextlib, socket, sys, time
for _ in range(3):
    for address in sys.argv[1:]:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as one:
            with contextlib.suppress(OSError):
                one.sendto(b"x", (address, 9999))
    time.sleep(0.05)
"""


@dataclass
class Net:
    """pod - kube-bridge of node n1 - node n2, which also plays a pod of its own and a host outside."""

    node: Namespace
    pod: Namespace
    peer: Namespace

    def seen(self) -> dict[tuple[Family, str], str]:
        """The source with which a packet of the pod arrives at each target; empty when none arrives."""
        targets = {(family, name): TARGETS[family][name][0] for family in Family for name in TARGETS[family]}
        receiver = self.peer.start([sys.executable, "-c", RECEIVE, *targets.values()], stdin=-1, stdout=-1)
        assert receiver.stdout is not None
        assert receiver.stdin is not None
        receiver.stdout.readline()
        self.pod.start([sys.executable, "-c", SEND, *targets.values()]).wait()
        seen = json.loads(receiver.communicate("")[0])
        return {key: seen.get(address, "") for key, address in targets.items()}


@pytest.fixture
def net(new_netns: Callable[[], Namespace]) -> Iterator[Net]:
    node, pod, peer = new_netns(), new_netns(), new_netns()
    connect(node, peer)
    veth(node, "vethpod", pod, "eth0", right_addresses=("10.244.1.5/24", "fd00:244:1::5/64"))
    node.run(
        "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0;"
        "ip link add kube-bridge type bridge; sysctl -qw net.ipv6.conf.kube-bridge.accept_dad=0;"
        "ip link set vethpod master kube-bridge; ip link set kube-bridge up;"
        "ip address add 10.244.1.1/24 dev kube-bridge; ip address add fd00:244:1::1/64 dev kube-bridge nodad;"
        "ip route add default via 10.0.0.2; ip -6 route add default via fd00::2;"
        "iptables-nft -P FORWARD DROP; ip6tables-nft -P FORWARD DROP"
    )
    pod.run("ip route add default via 10.244.1.1; ip -6 route add default via fd00:244:1::1")
    for address in ("10.244.2.5/32", "192.0.2.2/32", "fd00:244:2::5/128", "2001:db8::2/128"):
        peer.run(f"ip address add {address} dev lo")
    peer.run("ip route add 10.244.1.0/24 via 10.0.0.1; ip -6 route add fd00:244:1::/64 via fd00::1")
    # Neighbours are resolved before anything is measured: the first packet over a new link may wait a second.
    pod.run("ping -c 1 -w 10 fd00:244:1::1; ping -c 1 -w 10 10.244.1.1")
    node.run("ping -c 1 -w 10 fd00::2; ping -c 1 -w 10 10.0.0.2; ping -c 1 -w 10 fd00:244:1::5")
    with node.enter():
        yield Net(node, pod, peer)


EXPECTED = {(family, target): TARGETS[family][target][1] for family in Family for target in TARGETS[family]}


def dataplane() -> RunningDataplane:
    return RunningDataplane(nodes=(facts(1), facts(2)), learned=pod_routes(2))


def test_pods_reach_everything_and_only_the_outside_sees_a_masqueraded_source(net: Net) -> None:
    assert set(net.seen().values()) == {""}, "the default policy must drop before the dataplane is there"
    assert dataplane().reconcile().failures == ()
    assert net.seen() == EXPECTED
    assert dataplane().reconcile().writes == 0
    assert cleanup(dataplane().settings) == []
    assert set(net.seen().values()) == {""}


class Killed(BaseException):
    """The process ends here; nothing in the code may catch it."""


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """From now on only that many more steps reach the kernel: netlink requests and restores."""
    left = [10**9]
    batch, apply = NetlinkSocket.batch, RuleDriver.apply

    def limited_batch(self: NetlinkSocket, requests: Sequence[Request]) -> dict[int, NetlinkError]:
        allowed = requests[: max(left[0], 0)]
        left[0] -= len(requests)
        errors = batch(self, allowed)
        if len(allowed) < len(requests):
            raise Killed
        return errors

    def limited_apply(self: RuleDriver, plan: RulePlan) -> None:
        if plan and left[0] <= 0:
            raise Killed
        left[0] -= bool(plan)
        apply(self, plan)

    def start(steps: int) -> None:
        left[0] = steps

    monkeypatch.setattr(NetlinkSocket, "batch", limited_batch)
    monkeypatch.setattr(RuleDriver, "apply", limited_apply)
    return start


def until_done(kill_after: Callable[[int], None], act: Callable[[], object]) -> Iterator[int]:
    """Act, killed after no step, after one, …, until it ends by itself; yields after each kill."""
    for steps in range(100):
        kill_after(steps)
        try:
            act()
        except Killed:
            kill_after(10**9)
            yield steps
        else:
            assert steps > 5, "hardly anything was done"
            kill_after(10**9)
            return


def test_law_4_a_kill_between_any_two_steps_leaves_traffic_right_or_closed(
    net: Net, kill_after: Callable[[int], None]
) -> None:
    """Starting: nothing arrives yet, or with the source that it must have. Each run goes on from the last kill."""
    for steps in until_done(kill_after, lambda: dataplane().reconcile()):
        cleanup(dataplane().settings)
        kill_after(steps)
        with contextlib.suppress(Killed):
            dataplane().reconcile()
        kill_after(10**9)
        wrong = {key: source for key, source in net.seen().items() if source not in ("", EXPECTED[key])}
        assert not wrong, f"after {steps} steps"
    assert net.seen() == EXPECTED


def test_law_4_a_kill_of_the_cleanup_leaves_traffic_right_or_closed(
    net: Net, kill_after: Callable[[int], None]
) -> None:
    dataplane().reconcile()
    for steps in until_done(kill_after, lambda: cleanup(dataplane().settings)):
        dataplane().reconcile()
        kill_after(steps)
        with contextlib.suppress(Killed):
            cleanup(dataplane().settings)
        kill_after(10**9)
        wrong = {key: source for key, source in net.seen().items() if source not in ("", EXPECTED[key])}
        assert not wrong, f"after {steps} steps"


def test_law_4_a_kill_in_a_change_leaves_traffic_as_it_was(net: Net, kill_after: Callable[[int], None]) -> None:
    """Another node comes and a third one goes: the pod's own traffic arrives after every step."""

    def before() -> RunningDataplane:
        return RunningDataplane(nodes=(facts(1), facts(2), facts(3)), learned=pod_routes(2, 3))

    def after() -> None:
        RunningDataplane(nodes=(facts(1), facts(2), facts(4)), learned=pod_routes(2, 4)).reconcile()

    before().reconcile()
    for steps in until_done(kill_after, after):
        assert net.seen() == EXPECTED, f"after {steps} steps"
        before().reconcile()


def test_the_packet_check_sees_a_leaking_pod_address(net: Net) -> None:
    """The checker of law 4 can fail: accepts without masquerading let the pod's address out."""
    for program in ("iptables-nft", "ip6tables-nft"):
        net.node.run(f"{program} -A FORWARD -i kube-bridge -j ACCEPT")
    seen = net.seen()
    assert seen[Family.IPV4, "outside"] == "10.244.1.5"
    assert seen[Family.IPV6, "outside"] == "fd00:244:1::5"
