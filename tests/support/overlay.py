"""Four nodes with a pod each, on two subnets with a router between them: what tunnels are for. Dual-stack.

Touches the kernel. Nodes 1 to 3 are on one segment, node 4 is behind the router:

    pod1 - kube-bridge n1 eth0 -+
    pod2 - kube-bridge n2 eth0 -+- underlay (a bridge, and the router) - eth0 n4 kube-bridge - pod4
    pod3 - kube-bridge n3 eth0 -+

Pods have 10.244.<n>.2 and fd00:244:<n>::2; nodes 10.0.0.<n> and fd00::<n>, node 4 10.4.0.4 and fd04::4. Nodes filter
by reverse path (rp_filter=1). The underlay knows nothing of pods.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
from support.namespaces import Namespace, create_all

from kube_router.ipc.messages import Node, NodeAddress
from kube_router.workers.model import Family, Outcome
from kube_router.workers.nodefacts import NodeFacts, node_facts
from kube_router.workers.router.dataplane import Dataplane
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings

ADDRESSES = {number: (f"10.0.0.{number}", f"fd00::{number}") for number in (1, 2, 3)} | {4: ("10.4.0.4", "fd04::4")}
PODS = {number: (f"10.244.{number}.2", f"fd00:244:{number}::2") for number in ADDRESSES}
CIDRS = {number: (f"10.244.{number}.0/24", f"fd00:244:{number}::/64") for number in ADDRESSES}
_LENGTHS = (24, 64)


def name_of(remote: str) -> str:
    """The name of the tunnel to an address, by the recipe and not by the code under test."""
    return "tun-" + hashlib.sha256(remote.replace(".", "").replace(":", "").encode()).hexdigest()[:11]


def facts(number: int) -> NodeFacts:
    """Node n<number>."""
    addresses = tuple(NodeAddress("InternalIP", address) for address in ADDRESSES[number])
    return node_facts(Node(name=f"n{number}", addresses=addresses, pod_cidrs=CIDRS[number]), tuple(Family))


@dataclass
class OverlayNode:
    """One node with its pod. `start` is a start of its worker with these settings, in place of the last one."""

    number: int
    node: Namespace
    pod: Namespace
    state_dir: str
    dataplane: Dataplane | None = None
    settings: Settings = field(default_factory=Settings)
    known: Sequence[int] = tuple(ADDRESSES)
    more: Mapping[str, str] = field(default_factory=dict)
    """Other nodes yet, which are nowhere: their pods' range by the node's address."""

    @property
    def others(self) -> tuple[int, ...]:
        """The other nodes that it knows."""
        return tuple(number for number in self.known if number != self.number)

    def start(self, settings: Settings) -> Outcome:
        """A new worker with these settings makes its first reconciliation; the last one ended before."""
        self.stop()
        self.settings = msgspec.structs.replace(settings, state_dir=self.state_dir, enable_ipv6=True)
        with self.node.enter():
            self.dataplane = Dataplane(self.settings)
        return self.reconcile(Trigger(start=True))

    def reconcile(self, trigger: Trigger) -> Outcome:
        """One reconciliation with what the node knows now."""
        assert self.dataplane is not None
        nodes = [facts(number) for number in self.known]
        own = next(one for one in nodes if one.name == f"n{self.number}")
        learned = {cidr: hop for n in self.others for cidr, hop in zip(CIDRS[n], ADDRESSES[n], strict=True)}
        for address, cidr in self.more.items():
            node = Node(name=address, addresses=(NodeAddress("InternalIP", address),), pod_cidrs=(cidr,))
            nodes.append(node_facts(node, tuple(Family)))
            learned[cidr] = address
        with self.node.enter():
            outcome = self.dataplane.reconcile(own, nodes, learned, None, trigger, False)
        assert not outcome.failures, outcome.failures
        return outcome

    def repair_until(self, done: Callable[[], bool], seconds: float = 15.0) -> float:
        """Reconcile whenever the kernel's events ask for it, until ``done`` or the time is over (long, for a busy
        machine); the seconds that it took.
        """
        assert self.dataplane is not None
        began = time.monotonic()
        while not done() and time.monotonic() < began + seconds:
            wakers = self.dataplane.wakers()
            ready, _, _ = select.select(list(wakers), [], [], 0.05)
            with self.node.enter():
                woken = [wakers[descriptor]() for descriptor in ready]
            if any(woken):
                self.reconcile(Trigger(woken=True))
        return time.monotonic() - began

    def stop(self) -> None:
        """The worker ends; the kernel keeps everything."""
        if self.dataplane is not None:
            self.dataplane.close()
            self.dataplane = None

    def tunnels(self) -> dict[str, dict[str, Any]]:
        """The tunnel devices by name as iproute2 tells them, without those that the kernel makes for itself."""
        links = json.loads(self.node.run("ip -d -j link show"))
        return {
            link["ifname"]: link | link["linkinfo"]["info_data"]
            for link in links
            if link.get("linkinfo", {}).get("info_kind") in ("ipip", "ip6tnl") and not link["ifname"].endswith("tnl0")
            if link["ifname"] != "tunl0"
        }


@dataclass
class Overlay:
    """All of it."""

    nodes: dict[int, OverlayNode]
    underlay: Namespace

    def __getitem__(self, number: int) -> OverlayNode:
        return self.nodes[number]

    def unreachable(self, *, from_pods: bool = True, options: str = "") -> set[tuple[int, str]]:
        """Which node's pod (or which node) does not reach which other pod or node; all is tried at once."""
        running = []
        for number, one in self.nodes.items():
            others = [other for other in self.nodes if other != number]
            tries = [
                f"(ping -q -n -c 2 -i 0.1 -w 5 {options} {target} >/dev/null 2>&1 || echo {target}) &"
                for other in others
                for target in (*PODS[other], *ADDRESSES[other])
            ]
            source = one.pod if from_pods else one.node
            running.append((number, source.start(["sh", "-c", " ".join([*tries, "wait"])], stdout=subprocess.PIPE)))
        return {(number, target) for number, process in running for target in process.communicate()[0].split()}


def _batch(namespace: Namespace, *commands: str, options: tuple[str, ...] = ()) -> None:
    """Commands of ``ip`` inside a namespace, by one process."""
    arguments = ["ip", *options, "-n", namespace.name, "-batch", "-"]
    done = subprocess.run(arguments, input="\n".join(commands), capture_output=True, text=True)
    assert done.returncode == 0, (namespace.name, done.stderr)


def _sysctl(namespace: Namespace, **values: int) -> None:
    """Values below net; ``__`` is a dot."""
    with namespace.enter():
        for name, value in values.items():
            Path("/proc/sys/net", *name.split("__")).write_text(str(value))


def _address(address: str, device: str, family: int) -> str:
    return f"address add {address}/{_LENGTHS[family]} dev {device}" + (" nodad" if family else "")


def _wire(net: Overlay, one: OverlayNode) -> None:
    number, node, pod = one.number, one.node, one.pod
    _sysctl(node, ipv4__ip_forward=1, ipv6__conf__all__forwarding=1, ipv4__icmp_ratelimit=0, ipv6__icmp__ratelimit=0)
    _sysctl(node, ipv4__conf__all__rp_filter=1, ipv4__conf__default__rp_filter=1, ipv6__conf__default__accept_dad=0)
    routers = [f"{ADDRESSES[number][0].rsplit('.', 1)[0]}.254", f"{ADDRESSES[number][1].split('::')[0]}::fe"]
    _batch(
        node,
        f"link add eth0 type veth peer name n{number} netns {net.underlay.name}",
        f"link add vethpod type veth peer name eth0 netns {pod.name}",
        "link add kube-bridge type bridge mcast_snooping 0",
        "link set vethpod up master kube-bridge",
        *(_address(address, "eth0", family) for family, address in enumerate(ADDRESSES[number])),
        *(_address(address[:-1] + "1", "kube-bridge", family) for family, address in enumerate(PODS[number])),
        "link set kube-bridge up",
        "link set eth0 up",
        *(f"route add default via {router} dev eth0 onlink" for router in routers),
    )
    _batch(
        pod,
        *(_address(address, "eth0", family) for family, address in enumerate(PODS[number])),
        "link set eth0 up",
        *(f"route add default via {address[:-1]}1 dev eth0 onlink" for address in PODS[number]),
    )
    to_node = ("10.4.0.254", "fd04::fe") if number == 4 else ()
    _batch(
        net.underlay,
        f"link set n{number} up" + ("" if to_node else " master segment"),
        *(_address(address, f"n{number}", family) for family, address in enumerate(to_node)),
    )


@contextlib.contextmanager
def overlay() -> Iterator[Overlay]:
    """The network, without any worker on it."""
    made = create_all(1 + 2 * len(ADDRESSES))
    folder = tempfile.TemporaryDirectory()
    states = {number: Path(folder.name, f"n{number}") for number in ADDRESSES}
    for path in states.values():
        path.mkdir()
    net = Overlay({n: OverlayNode(n, made[2 * n - 1], made[2 * n], str(states[n])) for n in ADDRESSES}, made[0])
    try:
        _sysctl(net.underlay, ipv4__ip_forward=1, ipv6__conf__all__forwarding=1, ipv6__conf__default__accept_dad=0)
        segment = (_address(address, "segment", family) for family, address in enumerate(("10.0.0.254", "fd00::fe")))
        _batch(net.underlay, "link add segment type bridge mcast_snooping 0", *segment, "link set segment up")
        for one in net.nodes.values():
            _wire(net, one)
        yield net
    finally:
        for one in net.nodes.values():
            one.stop()
        for namespace in made:
            namespace.delete()
        folder.cleanup()


_REPLY = re.compile(r"icmp_seq=(\d+) (?:ttl|hlim)=")


@dataclass
class Flow:
    """One ping that goes on, and what its output told so far; the output is read as it grows."""

    name: str
    process: subprocess.Popen[str]
    output: IO[str]
    answered: set[int] = field(default_factory=set)
    other: list[str] = field(default_factory=list)
    last: int = 0
    _rest: str = ""

    def read(self) -> int:
        """Take in what is new; the highest number that was answered."""
        text, _, self._rest = (self._rest + self.output.read()).rpartition("\n")
        for line in text.split("\n") if text else ():
            if match := _REPLY.search(line):
                self.answered.add(int(match[1]))
                self.last = max(self.last, int(match[1]))
            elif not line.startswith("PING "):
                self.other.append(line)
        return self.last

    def lost(self) -> list[str]:
        """The numbers that were not answered though later ones were, and every line that is no answer."""
        return [str(number) for number in range(1, self.last) if number not in self.answered] + self.other


class Pings:
    """Pings that go on all the time, 50 a second each; what got lost is told by the numbers of the answers."""

    def __init__(self, flows: Iterable[tuple[Namespace, str]], interval: float = 0.02) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._flows: list[Flow] = []
        for source, target in flows:
            path = Path(self._folder.name, str(len(self._flows)))
            with path.open("w") as output:
                arguments = ["ping", "-n", "-i", str(interval), target]
                process = source.start(arguments, stdout=output, stderr=subprocess.STDOUT)
            self._flows.append(Flow(f"{source.name} to {target}", process, path.open()))

    def __enter__(self) -> Pings:
        self.advance()
        return self

    def __exit__(self, *exception: object) -> None:
        for flow in self._flows:
            flow.process.kill()
            flow.process.wait()
            flow.output.close()
        self._folder.cleanup()

    def advance(self, by: int = 5, seconds: float = 30.0) -> None:
        """Wait until every one of them had ``by`` more answers; raises AssertionError."""
        goals = [flow.read() + by for flow in self._flows]
        deadline = time.monotonic() + seconds
        for flow, goal in zip(self._flows, goals, strict=True):
            while flow.read() < goal:
                assert time.monotonic() < deadline, f"{flow.name}: no answers after {flow.last}; {flow.other[-3:]}"
                time.sleep(0.02)

    def lost(self) -> dict[str, list[str]]:
        """By flow: what got lost until its last answer."""
        for flow in self._flows:
            flow.read()
        return {flow.name: lost for flow in self._flows if (lost := flow.lost())}

    def answers(self) -> int:
        """How many answers there were in all."""
        return sum(len(flow.answered) for flow in self._flows)


def as_upstream_left_it(net: Overlay, style: str) -> None:
    """What kube-router of before made on the nodes: full overlay, routes, policy rules and table 77.

    ``v1``: devices of v0.4 to v1.6 with their names, bound to the interface (IPv4 only). ``v2``: those of v2.x, which
    it makes by netlink. ``gue``: those of v2.x with ``--overlay-encap=fou``, made by iproute2.
    """
    for number, one in net.nodes.items():
        for family, cidr in enumerate(CIDRS[number]):
            port = ["fou add port 5555 gue"] if style == "gue" else []
            _batch(one.node, f"rule add from {cidr} lookup 77", *port, options=("-6",) if family else ())
        commands = []
        for other in one.others:
            for family, (local, remote) in enumerate(zip(ADDRESSES[number], ADDRESSES[other], strict=True)):
                name = "tun-" + remote.replace(".", "") if style == "v1" else name_of(remote)
                kind, mode = [("ipip", "ipip"), ("ip6tnl", "ip6ip6")][family]
                if style == "v1" and family:
                    continue
                if style == "v1":
                    commands.append(f"tunnel add {name} mode ipip local {local} remote {remote} dev eth0")
                elif style == "v2":
                    commands.append(
                        f"link add {name} type {kind} local {local} remote {remote}"
                        + (" mode any encaplimit 4 hoplimit 0" if family else " mode any nopmtudisc")
                    )
                else:
                    commands.append(
                        f"link add name {name} type {kind} remote {remote} local {local} ttl 225 encap gue"
                        f" encap-sport auto encap-dport 5555 mode {mode}"
                    )
                commands += [
                    f"link set {name} up",
                    f"route add {CIDRS[other][family]} dev {name} src {local} proto 17",
                    f"route add {remote} dev {name} table 77",
                ]
        _batch(one.node, *commands)
