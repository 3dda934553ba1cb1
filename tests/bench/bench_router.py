"""The router worker with a real gobgpd at the size of a large cluster: learned routes, Service addresses, memory.

The worker is the real program in a namespace of its own. This process is its watcher, and a scripted peer announces to
it and listens. Every figure of a way through gobgpd and worker ends at the kernel's or the peer's side.
"""

from __future__ import annotations

import contextlib
import gc
import ipaddress
import os
import select
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench.firewall_shapes import Objects, change
from bench.workerprocess import MIB, WorkerProcess
from bench_agent import pss_kib
from bench_firewall import percentile
from run import Baseline, Result, median_of
from support import bgpspeaker
from support.gobgpd import PORT, Daemon, attached, daemons
from support.namespaces import Namespace, namespaces

from kube_router.ipc.messages import Node, NodeAddress, Service
from kube_router.workers.kernel.monitor import RouteEvent, RouteListener
from kube_router.workers.kernel.routes import RouteDriver
from kube_router.workers.nodefacts import NodeFacts, node_facts
from kube_router.workers.routefacts import Prefix, Route, RoutePlan
from kube_router.workers.router.bgpstate import FRESH, BgpState
from kube_router.workers.router.desired import desired_bgp
from kube_router.workers.router.plan import AddPath, Plan, StartSpeaker, diff
from kube_router.workers.router.vips import NO_VIPS, Vips
from kube_router.workers.settings import SECRETS_FILE, Secrets, Settings, save

GENERATION = 3
"""Debian's gobgpd."""
PEER, PEER_ASN = "10.0.0.9", 65000
HOPS = {4: ("10.0.0.7", "10.0.0.8"), 6: ("fd00::7", "fd00::8")}
V4 = [f"100.{64 + i // 256}.{i % 256}.0/24" for i in range(2000)]
V6 = [f"2001:db8:{i:x}::/48" for i in range(1, 2001)]
NODES, SERVICES = 1000, 2500
MOVES = 200


def settings(folder: Path, **flags: object) -> Settings:
    """Node n0000 with one external peer; without overlay, which this kernel lacks."""
    values = {
        "node_name": "n0000",
        "run_dir": str(folder),
        "state_dir": str(folder),
        "enable_ipv6": True,
        "enable_overlay": False,
        "bgp_port": PORT,
        "bgp_graceful_restart_time": 1.0,
        "peer_router_ips": (PEER,),
        "peer_router_asns": (PEER_ASN,),
        "advertise_cluster_ip": True,
        **flags,
    }
    return Settings(**values)  # type: ignore[arg-type]


def node(number: int) -> Node:
    """A dual-stack node; n0000 is 10.0.0.1 and fd00::1."""
    v4, v6 = ipaddress.IPv4Address("10.0.0.1") + (number and number + 99), ipaddress.IPv6Address("fd00::1") + number
    addresses = (NodeAddress("InternalIP", str(v4)), NodeAddress("InternalIP", str(v6)))
    pods = (f"10.{128 + number // 256}.{number % 256}.0/24", f"fd01:0:0:{number:x}::/64")
    return Node(name=f"n{number:04}", uid=f"uid-{number}", addresses=addresses, pod_cidrs=pods)


def service(number: int) -> Service:
    """A Service with an address of each family."""
    addresses = (str(ipaddress.IPv4Address("10.96.0.1") + number), str(ipaddress.IPv6Address("fd96::1") + number))
    return Service(name=f"s{number:04}", namespace="default", uid=f"uid-s{number}", cluster_ips=addresses)


def cluster(nodes: int, services: int) -> Objects:
    """What the watcher knows."""
    return {
        "nodes": {item.key: item for item in map(node, range(nodes))},
        "services": {item.key: item for item in map(service, range(services))},
        "endpointslices": {},
    }


class KernelLog(threading.Thread):
    """When routes of the namespace came, changed and went: a netlink listener that only notes the time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._listener = RouteListener(())
        self._ending = os.eventfd(0)
        self.there: dict[str, str] = {}
        self.at = 0.0
        self.start()

    def run(self) -> None:
        while True:
            ready = select.select([self._listener.fileno(), self._ending], [], [])[0]
            now = time.monotonic()
            if self._ending in ready:
                break
            for event in self._listener.events():
                if isinstance(event, RouteEvent) and event.route.protocol == 17:
                    if event.gone:
                        self.there.pop(event.route.prefix, None)
                    else:
                        self.there[event.route.prefix] = event.route.gateway
                    self.at = now

    def close(self) -> None:
        """Stop listening."""
        os.eventfd_write(self._ending, 1)
        self.join()
        self._listener.close()
        os.close(self._ending)


class Delivery(threading.Thread):
    """gobgpd's own delivery of the same routes to a second reader of its events, and when the last one was there."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon=True)
        self._client = attached(daemon)
        self._stream = self._client.watch()
        self.there: set[str] = set()
        self.at = 0.0
        self.start()

    def run(self) -> None:
        dialect = self._client.dialect
        with contextlib.suppress(Exception):
            for event in self._stream:
                if event.WhichOneof("event") == "table":
                    for path in event.table.paths:
                        prefix = dialect.prefix_of(path) or ""
                        (self.there.discard if path.is_withdraw else self.there.add)(prefix)
                    self.at = time.monotonic()

    def close(self) -> None:
        """End the stream."""
        self._stream.cancel()
        self.join(timeout=2)
        self._client.close()


class Bench:
    """A worker, its gobgpd, and a peer with a session."""

    def __init__(self, namespace: Namespace, daemon: Daemon, found: Objects, folder: Path, **flags: object) -> None:
        self.namespace, self.daemon = namespace, daemon
        save(folder / SECRETS_FILE, Secrets(), 0o600)
        self.worker = WorkerProcess("router", settings(folder, **flags), found, folder)
        self.started = self.worker.start()
        self.peer = bgpspeaker.Speaker(PEER_ASN, "9.9.9.9").connect("10.0.0.1", PORT, local=PEER, seconds=30)
        self.kernel = KernelLog()

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Be the watcher until ``condition`` holds; looks every millisecond."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                beat = self.worker.beat
                raise RuntimeError(f"not reached: kernel {len(self.kernel.there)}, {beat and beat.warnings[:3]}")
            self.worker.serve(0.001)

    def announce(self, hop: int) -> None:
        """All learned routes, by the first or the second next hop."""
        self.peer.announce(V4, HOPS[4][hop])
        self.peer.announce(V6, HOPS[6][hop])

    def close(self) -> None:
        """End everything."""
        self.peer.close()
        self.kernel.close()
        self.worker.close()


@contextlib.contextmanager
def bench(nodes: int, services: int, **flags: object) -> Iterator[Bench]:
    """A bench at a cluster of this size; the calling thread is in its namespace."""
    with namespaces() as (namespace,), namespace.enter(), tempfile.TemporaryDirectory() as name:
        prepare(namespace)
        with daemons((namespace, GENERATION, Path(name))) as (daemon,):
            made = Bench(namespace, daemon, cluster(nodes, services), Path(name), **flags)
            try:
                yield made
            finally:
                made.close()


def prepare(namespace: Namespace) -> None:
    """One link whose peer end is in the same namespace, and the peer's address beside the node's."""
    namespace.run("ip link add eth0 type veth peer name far; ip link set far up; ip link set eth0 up")
    namespace.run("ip address add 10.0.0.1/16 dev eth0; ip -6 address add fd00::1/64 dev eth0 nodad")
    namespace.run(f"ip address add {PEER}/32 dev lo")


def learned() -> Iterator[Result]:
    """4,000 routes at once, and single ones, from a peer through gobgpd into the kernel."""
    one_by_one = upstream_seconds()
    with bench(1, 0) as made:
        delivery = Delivery(made.daemon)
        everything = {*V4, *V6}
        beyond, alone = [], []
        for _ in range(5):
            began = time.monotonic()
            made.announce(0)
            made.until(lambda: everything <= made.kernel.there.keys() and everything <= delivery.there)
            beyond.append(max(0.0, made.kernel.at - delivery.at))
            alone.append(delivery.at - began)
            made.peer.withdraw(V4)
            made.peer.withdraw(V6)
            made.until(lambda: not made.kernel.there and not everything & delivery.there)
        delivery.close()
        shape = f"2,000 IPv4 and 2,000 IPv6, median of 5; gobgpd's own delivery {sorted(alone)[2]:.2f} s"
        name = "one request a route, waited for, as upstream does: 4,000 routes"
        what = "4,000 learned routes in the kernel, beyond gobgpd's delivery"
        yield Result("router.learned.4k", what, sorted(beyond)[2], "s", 0.5, Baseline(name, one_by_one), shape)
        made.announce(0)
        made.until(lambda: len(made.kernel.there) == 4000)
        name = "all 4,000 routes once more for each event, as upstream does"
        yield single(made, "moved", moves(made), Baseline(name, one_by_one * 1000))
        yield single(made, "withdrawn", withdrawals(made), Baseline(name, one_by_one * 1000))


def single(made: Bench, kind: str, values: Sequence[float], baseline: Baseline) -> Result:
    """p99 of single changes, from the peer's message to the kernel."""
    shape = f"{len(values)} one after the other beside 4,000 routes, median {percentile(values, 0.5):.1f} ms"
    what = f"one {kind} prefix, from the peer's message to the kernel, p99"
    return Result(f"router.{kind}.one", what, percentile(values, 0.99), "ms", 20.0, baseline, shape)


def moves(made: Bench) -> list[float]:
    """Milliseconds of each of many changes of next hop."""
    values = []
    for number in range(MOVES):
        prefix, hop = V4[number], HOPS[4][1]
        began = time.monotonic()
        made.peer.announce([prefix], hop)
        made.until(lambda prefix=prefix, hop=hop: made.kernel.there.get(prefix) == hop)  # type: ignore[misc]
        values.append((made.kernel.at - began) * 1000)
    return values


def withdrawals(made: Bench) -> list[float]:
    """Milliseconds of each of many withdrawals."""
    values = []
    for prefix in V6[:MOVES]:
        began = time.monotonic()
        made.peer.withdraw([prefix])
        made.until(lambda prefix=prefix: prefix not in made.kernel.there)  # type: ignore[misc]
        values.append((made.kernel.at - began) * 1000)
    return values


def upstream_seconds() -> float:
    """4,000 routes with one request each, waited for."""
    with namespaces() as (namespace,), namespace.enter():
        prepare(namespace)
        driver = RouteDriver()
        hops = [(prefix, HOPS[4][0]) for prefix in V4] + [(prefix, HOPS[6][0]) for prefix in V6]
        began = time.monotonic()
        for prefix, hop in hops:
            driver.apply(RoutePlan(replace=((Prefix(prefix), Route(hop)),)))
        took = time.monotonic() - began
        driver.close()
    return took


def join() -> Iterator[Result]:
    """CPU time of a node's coming into a full mesh, and of one Service address among 5,000."""
    flags = settings(Path("/nonexistent"))
    nodes = [node(number) for number in range(501)]
    facts = [node_facts(item, flags.families) for item in nodes]

    def state(known: Sequence[NodeFacts], actual: BgpState, vips: Vips = NO_VIPS) -> BgpState:
        return desired_bgp(nodes[0], known[0], known, flags, Secrets(), actual, vips).state

    def cpu(work: Callable[[], object]) -> float:
        began = time.process_time()
        work()
        return (time.process_time() - began) * 1000

    actual = state(facts[:-1], FRESH)
    value = median_of(lambda: cpu(lambda: diff(actual, state(facts, actual), learned={})))
    everything = median_of(
        lambda: cpu(lambda: diff(FRESH, state([node_facts(item, flags.families) for item in nodes], FRESH)))
    )
    baseline = Baseline("everything from Node objects to steps anew", everything)
    what = "a node joins a full mesh of 500: desired state and steps"
    yield Result("router.join.500", what, value, "ms CPU", 100.0, baseline, "500 dual-stack nodes, median of 5")

    addresses = frozenset(address for number in range(SERVICES) for address in service(number).cluster_ips)
    more = addresses | {"10.97.255.1"}
    few = facts[:11]
    before = state(few, FRESH, Vips(addresses, addresses))
    value = median_of(lambda: cpu(lambda: diff(before, state(few, before, Vips(more, more)), learned={})))
    whole = median_of(lambda: cpu(lambda: diff(FRESH, state(few, FRESH, Vips(more, more)))))
    baseline = Baseline("all 5,001 anew", whole)
    what = "one Service address more: desired state and steps"
    yield Result("router.vip.cpu", what, value, "ms CPU", 20.0, baseline, "5,000 Service addresses, median of 5")


def vips() -> Iterator[Result]:
    """5,000 Service addresses given to gobgpd: in streams, and one by one as upstream does."""
    flags = settings(Path("/nonexistent"))
    own = node(0)
    facts = node_facts(own, flags.families)
    addresses = frozenset(address for number in range(SERVICES) for address in service(number).cluster_ips)
    wanted = desired_bgp(own, facts, [facts], flags, Secrets(), FRESH, Vips(addresses, addresses)).state
    wanted = replace(wanted, neighbors={})
    paths = tuple(AddPath(*item) for item in wanted.paths.items())

    def seconds(steps: Sequence[Sequence[AddPath]]) -> float:
        with namespaces() as (namespace,), namespace.enter(), tempfile.TemporaryDirectory() as name:
            prepare(namespace)
            with daemons((namespace, GENERATION, Path(name))) as (daemon,):
                client = attached(daemon)
                assert wanted.speaker is not None
                client.apply_step(StartSpeaker(wanted.speaker))
                began = time.monotonic()
                for each in steps:
                    assert client.apply(Plan(tuple(each))) == (len(each), ())
                took = time.monotonic() - began
                client.close()
        return took

    baseline = Baseline("a call a path, as upstream does at each sync", seconds([(path,) for path in paths]))
    what = "5,000 Service addresses originated"
    yield Result("router.vip.5k", what, seconds([paths]), "s", 0.5, baseline, "5,002 paths, one run")


def large() -> Iterator[Result]:
    """The worker at 1,000 nodes, 5,000 Service addresses and 4,000 learned routes."""
    with bench(NODES, SERVICES) as made:
        addresses = 2 * SERVICES
        made.until(lambda: len(made.peer.routes) == addresses + 2)
        made.announce(0)
        made.until(lambda: len(made.kernel.there) == 4000)
        yield from memory(made, "worker", "")
        yield from announced(made)
        yield from memory(made, "churned", ", after 80 changes of Services")
        yield from restarted(made)


def announced(made: Bench) -> Iterator[Result]:
    """One Service more and less, from the watcher's message to the peer's table."""
    added, withdrawn = [], []
    for number in range(SERVICES, SERVICES + 40):
        item = service(number)
        prefix = f"{item.cluster_ips[0]}/32"
        began = time.monotonic()
        made.worker.publish(change(made.worker.found, "services", item.key, item))
        made.until(lambda prefix=prefix: prefix in made.peer.routes)  # type: ignore[misc]
        added.append((made.peer.updates[-1].at - began) * 1000)
        began = time.monotonic()
        made.worker.publish(change(made.worker.found, "services", item.key, None))
        made.until(lambda prefix=prefix: prefix not in made.peer.routes)  # type: ignore[misc]
        withdrawn.append((made.peer.updates[-1].at - began) * 1000)
    for kind, values in (("added", added), ("withdrawn", withdrawn)):
        # Without an address that it refused so far, gobgpd judges the peer's 4,000 routes anew: the next change waits.
        shape = f"40 Services in turns beside {SERVICES}, {NODES} nodes; median {percentile(values, 0.5):.0f} ms"
        what = f"one Service {kind}, from the watcher's message to the peer's table, p95"
        yield Result(f"router.vip.{kind}", what, percentile(values, 0.95), "ms", 100.0, None, shape)


def memory(made: Bench, name: str, when: str) -> Iterator[Result]:
    """Of the worker, and beside it of gobgpd."""
    made.worker.quiet(6.0)
    gobgpd = pss_kib(made.daemon.pid) / MIB
    value, own = pss_kib(made.worker.pid) / MIB, anonymous_kib(made.worker.pid) / MIB
    shape = (
        f"{NODES} nodes, {2 * SERVICES} Service addresses, 4,000 learned routes; {own:.0f} MiB of it anonymous, the "
    )
    shape += f"rest programs, shared with whoever else runs them; gobgpd itself {gobgpd:.0f} MiB"
    yield Result(f"router.memory.{name}", f"memory of the router worker{when}", value, "MiB PSS", 45.0, None, shape)


def anonymous_kib(pid: int) -> int:
    """What a process has written itself, in KiB (proc(5) smaps_rollup)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))


def restarted(made: Bench) -> Iterator[Result]:
    """The worker killed and started again, with nothing changed."""
    values, writes = [], 0.0
    for _ in range(3):
        os.kill(made.worker.pid, signal.SIGKILL)
        gc.collect()
        made.worker.beat = None
        values.append(made.worker.start())
        made.worker.quiet(2.0)
        assert made.worker.beat is not None
        writes = max(writes, made.worker.beat.writes)
    shape = f"{NODES} nodes, {2 * SERVICES} Service addresses, 4,000 learned routes; process start included; of 3"
    first = Baseline("the first start, on a fresh gobgpd", made.started)
    what = "restart with nothing changed, to the end of the first sync"
    yield Result("router.restart.seconds", what, sorted(values)[1], "s", 1.5, first, shape)
    yield Result(
        "router.restart.writes", "writes to kernel and gobgpd of a restart", writes, "writes", 0.0, None, shape
    )
