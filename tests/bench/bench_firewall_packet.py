"""What rules cost a packet: new connections to a pod of a crowded node, against a node without any rule.

Three namespaces: a client, the node, which only routes, and a pod. All other pods of the node are addresses in its
rules. Connections are made one after the other, so the rate is that of one client. The connection is allowed by the
last of the pod's policies, and each is new: all of it is looked at.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from bench.firewall_shapes import LARGE, NODE, Objects, addresses, crowded, local_pods
from bench.upstream_netpol import Upstream
from bench_firewall import BACKENDS, World, compiled
from run import Baseline, Result
from support.namespaces import Namespace, namespaces, veth

from kube_router.ipc.messages import Pod

POLICIES = 20
CONNECTIONS = 4000
ROUNDS = 5
PORT = 6000 + POLICIES - 1
"""Of the last policy of a pod."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run: connections a second, and microseconds of connect(2)."""

    rate: float
    p50: float
    p99: float


def clients_pod(found: Objects, served: Pod) -> Pod:
    """A remote pod that the last policy of a pod lets in."""
    return msgspec.structs.replace(
        served, name="client", labels={"app": f"app-{POLICIES - 1}"}, node_name="node-1", ips=addresses(1, 1)
    )


@contextlib.contextmanager
def network(served: Pod, client: Pod) -> Iterator[tuple[Namespace, Namespace, Namespace]]:
    """A client and a pod, each behind its own link of the node between them; both families."""
    with namespaces(3) as (left, node, right):
        for far, name, pod, number in ((left, "left", client, 1), (right, "right", served, 2)):
            own = tuple(f"{text}/{128 if ':' in text else 32}" for text in pod.ips)
            gateways = (f"169.254.{number}.1/24", f"fd00:ffff:{number}::1/64")
            veth(node, name, far, "eth0", left_addresses=gateways, right_addresses=own)
            far.run(f"ip route add 169.254.{number}.1 dev eth0 && ip route add default via 169.254.{number}.1")
            far.run(f"ip -6 route add fd00:ffff:{number}::1 dev eth0")
            far.run(f"ip -6 route add default via fd00:ffff:{number}::1")
            for text in pod.ips:
                node.run(f"ip {'-6 ' if ':' in text else ''}route add {text} dev {name}")
        node.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
        yield left, node, right


class Probe:
    """A node with some rules, a server behind it, and a client that connects to it."""

    def __init__(self, left: Namespace, right: Namespace, program: Path, address: str) -> None:
        self._left, self._program, self._address = left, program, address
        self.server = right.start([str(program), "serve", address, str(PORT)], stdout=subprocess.PIPE)
        assert self.server.stdout is not None and self.server.stdout.readline() == "ready\n"
        self.figures: list[Figures] = []

    def connect(self) -> None:
        """Some connections, one after the other."""
        words = self._left.run(f"{self._program} connect {self._address} {PORT} {CONNECTIONS}").split()
        self.figures.append(Figures(*map(float, words)))

    def close(self) -> None:
        """End the server."""
        self.server.terminate()
        self.server.wait()

    def median(self, field: str) -> float:
        return statistics.median(getattr(each, field) for each in self.figures)

    @property
    def rate(self) -> float:
        """The best of all rounds: whatever else runs on the machine only slows."""
        return max(each.rate for each in self.figures)


def _ours(found: Objects, backend: str) -> None:
    with World(found, backend) as world:
        world.start()


RULES: dict[str, Callable[[Objects], object]] = {
    "none": lambda found: None,
    "conntrack": lambda found: _tools("-A FORWARD -m conntrack --ctstate INVALID -j DROP"),
    **{backend: functools.partial(_ours, backend=backend) for backend in BACKENDS},
    "upstream": lambda found: Upstream(NODE).sync(found),
}
"""By name: what lays the rules in the namespace of the calling thread."""


def _tools(rule: str) -> None:
    for program in ("iptables-nft", "ip6tables-nft"):
        subprocess.run([program, *rule.split()], check=True)


def run() -> Iterator[Result]:
    """No rules, ours by both backends, and kube-router's, in turns: the machine's mood is everybody's."""
    found = crowded(LARGE, POLICIES)
    served = local_pods(found)[LARGE.local // 2]
    client = clients_pod(found, served)
    found["pods"][client.key] = client
    with contextlib.ExitStack() as stack:
        program = compiled("tcp_connects", stack.enter_context(tempfile.TemporaryDirectory()))
        probes: dict[tuple[str, str], Probe] = {}
        for name, lay in RULES.items():
            left, node, right = stack.enter_context(network(served, client))
            with node.enter():
                lay(found)
            for family, address in zip(("ipv4", "ipv6"), served.ips, strict=True):
                probes[family, name] = probe = Probe(left, right, program, address)
                stack.callback(probe.close)
        for _ in range(ROUNDS + 1):
            for probe in probes.values():
                probe.connect()
    for probe in probes.values():
        del probe.figures[0]  # the first round fills caches
    for family in ("ipv4", "ipv6"):
        for backend in BACKENDS:
            yield from figures({name: probes[family, name] for name in RULES}, f"{backend}.{family}", backend)


def figures(probes: dict[str, Probe], identity: str, backend: str) -> Iterator[Result]:
    """Latency and time a connection against no rules, latency against kube-router's rules."""
    ours, none, upstream = probes[backend], probes["none"], probes["upstream"]
    floor = probes["conntrack"].median("p50")
    shape = (
        f"{LARGE.local} pods with {POLICIES} policies each; {ROUNDS} rounds of {CONNECTIONS} connections, median; "
        f"p99 {ours.median('p99'):.0f} us, without rules {none.median('p99'):.0f} us; "
        f"with one conntrack rule and no other p50 {floor:.1f} us"
    )
    value, empty = ours.median("p50"), none.median("p50")
    what = "connect(2) through the node to a pod, allowed by its last policy, p50"
    goal = empty + 1.5 * (floor - empty) + 10
    yield Result(f"firewall.packet.{identity}.connect", what, value, "us", goal, Baseline("no rules", empty), shape)
    mine, its = 1e6 / ours.rate, 1e6 / none.rate
    shape = f"one client: {ours.rate:.0f} connections a second, {none.rate:.0f} without rules"
    what = "time of a whole new connection, the inverse of the rate, best round"
    goal = its * 1.5
    yield Result(f"firewall.packet.{identity}.rate", what, mine, "us", goal, Baseline("no rules", its), shape)
    baseline = Baseline("kube-router's rules", upstream.median("p50"))
    shape = f"kube-router's: {upstream.rate:.0f} connections a second, p99 {upstream.median('p99'):.0f} us"
    what = "connect(2) as above, against kube-router's rules for the same policies, p50"
    goal = 1.1 * baseline.value  # IPv4's long list of addresses is cheap to compare: there the two are alike
    yield Result(f"firewall.packet.{identity}.upstream", what, value, "us", goal, baseline, shape)
