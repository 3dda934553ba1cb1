"""The proxy's nftables backend: the first load, one change, nothing changed, a restart; its memory; and a comparison.

From API objects to the kernel's word: engine, elements, netlink. The comparison is the layout of a chain for each
Service and for each endpoint, loaded by the ``nft`` program, at a size at which that is still done within seconds.
"""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from bench.workerprocess import MIB, WorkerProcess
from bench_agent import pss_kib
from run import Baseline, Result
from support.namespaces import Namespace, namespaces

from kube_router.ipc.messages import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Node,
    NodeAddress,
    Service,
    ServicePort,
    SourceState,
)
from kube_router.ipc.replica import Changes, Cluster
from kube_router.workers.proxy.backend import Synced
from kube_router.workers.proxy.engine import Engine
from kube_router.workers.proxy.frame import FrameMaker
from kube_router.workers.proxy.model import Changed
from kube_router.workers.proxy.nftables import Nftables
from kube_router.workers.settings import Settings

SERVICES, ENDPOINTS, EVENTS = 10_000, 5, 400
FEW = 2_000
SHAPE = f"{SERVICES:,} Services of {ENDPOINTS} endpoints, both families"
IN_SYNC = SourceState(source="bench", in_sync=True)
LATENCY = "kubeproxy_network_programming_duration_seconds"
SETTINGS = Settings(enable_ipv6=True, node_name="n1", service_cluster_ip_range=("10.96.0.0/12", "fd00:96::/108"))
Objects = dict[Any, dict[str, Any]]


def service(number: int) -> Service:
    """A ClusterIP Service of both families."""
    return Service(
        name=f"s{number}",
        namespace=f"ns{number % 50}",
        uid=f"{number:032x}",
        created="2026-01-01T00:00:00Z",
        cluster_ips=(f"10.96.{number >> 8}.{number & 255}", f"fd00:96::{number:x}"),
        ip_families=("IPv4", "IPv6"),
        ports=(ServicePort(name="http", port=80, target_port=8080),),
    )


def slice_of(number: int, version: int, moved: int = 0) -> EndpointSlice:
    """Its slice of a family; ``moved``: by how much the last endpoint's address is another."""
    found = []
    for index in range(ENDPOINTS):
        last = number * ENDPOINTS + index + (moved if index == ENDPOINTS - 1 else 0)
        address = f"10.{128 + (last >> 16)}.{(last >> 8) & 255}.{last & 255}" if version == 4 else f"fd00:1::{last:x}"
        found.append(
            Endpoint(addresses=(address,), ready=True, serving=True, terminating=False, node_name=f"n{index + 1}")
        )
    return EndpointSlice(
        name=f"s{number}-{version}",
        namespace=f"ns{number % 50}",
        uid=f"{number:030x}{version:02x}",
        service=f"s{number}",
        address_type=f"IPv{version}",
        endpoints=tuple(found),
        ports=(EndpointPort(name="http", port=8080),),
    )


def objects(count: int = SERVICES) -> Objects:
    """The cluster."""
    node = Node(
        name="n1",
        addresses=(NodeAddress("InternalIP", "192.168.0.1"), NodeAddress("InternalIP", "fd00:aa::1")),
        pod_cidrs=("10.128.0.0/24", "fd00:1::/112"),
    )
    services = [service(number) for number in range(count)]
    slices = [slice_of(number, version) for number in range(count) for version in (4, 6)]
    return {
        "nodes": {"n1": node},
        "services": {item.key: item for item in services},
        "endpointslices": {item.key: item for item in slices},
    }


class Node1:
    """Engine and backend; use it inside a network namespace."""

    def __init__(self, found: Objects, settings: Settings = SETTINGS) -> None:
        self.found = found
        self.engine, self.frames, self.backend = Engine(settings), FrameMaker(settings), Nftables()

    def sync(self, changes: Changes | None, *, observe: bool = False) -> Synced:
        """One turn of the worker."""
        cluster = Cluster(IN_SYNC, self.found)
        self.engine.update(cluster, changes)
        self.frames.update(cluster.nodes, None if changes is None else changes.get("nodes", {}))
        return self.checked(self.engine.take_changed(), observe=observe)

    def checked(self, changed: Changed, *, observe: bool) -> Synced:
        """A sync without a failure."""
        done = self.backend.sync(self.engine.table, changed, self.frames.make().frame, observe=observe, hold=False)
        assert not done.failures, done.failures
        return done

    def restart(self) -> Synced:
        """A backend without memory."""
        self.backend.close()
        self.backend = Nftables()
        return self.checked(Changed(everything=True), observe=True)


def timed(act: Any) -> tuple[float, Synced]:
    """Seconds, and what was done."""
    gc.collect()
    began = time.perf_counter()
    done = act()
    return time.perf_counter() - began, done


def event(number: int, turn: int, version: int) -> EndpointSlice:
    """One endpoint moves, or goes, or comes back."""
    made = slice_of(number, version, moved=100_000 + turn)
    return made if turn % 3 else msgspec.structs.replace(made, endpoints=made.endpoints[:-1])


def run() -> Iterator[Result]:
    """In wall time."""
    found = objects()
    gc.freeze()
    with namespaces() as (netns,), netns.enter():
        node = Node1(found)
        took, done = timed(lambda: node.sync(None, observe=True))
        shape = f"{SHAPE}; {done.writes:,} writes"
        yield Result("proxy.nft.cold", "from objects to an empty kernel", took, "s", 2.0, None, shape)
        took, done = timed(lambda: node.checked(Changed(), observe=True))
        yield Result("proxy.nft.idle", "writes when nothing has changed", done.writes, "writes", 0, None, SHAPE)
        times = []
        chance = random.Random(7)
        for turn in range(EVENTS):
            item = event(chance.randrange(SERVICES), turn, 4 + 2 * (turn & 1))
            before, found["endpointslices"][item.key] = found["endpointslices"][item.key], item
            began = time.perf_counter()
            done = node.sync({"endpointslices": {item.key: (before, item)}})
            times.append(1000 * (time.perf_counter() - began))
            assert done.writes < 20
        times.sort()
        shape = f"{SHAPE}; 99th percentile of {EVENTS}, median {statistics.median(times):.2f} ms"
        what = "one endpoint changes, from event to kernel"
        yield Result("proxy.nft.event", what, times[EVENTS * 99 // 100], "ms", 15.0, None, shape)
        took, done = timed(node.restart)
        shape = f"{SHAPE}; {done.writes} writes"
        yield Result("proxy.nft.restart", "a process without memory compares", took, "s", 2.0, None, shape)
        assert done.writes == 0
        node.backend.close()


def chains(count: int) -> str:
    """A chain for each Service and each endpoint, as text for ``nft -f``; one family."""
    services = "\n".join(map(chain_of, range(count)))
    keys = ", ".join(key_of(number) for number in range(count))
    base = "type nat hook prerouting priority dstnat\nip daddr . meta l4proto . th dport vmap @services"
    return (
        "table ip chains {\nmap services { type ipv4_addr . inet_proto . inet_service : verdict\n}\n"
        f"{services}\nchain pre {{ {base}\n}}\n}}\nadd element ip chains services {{ {keys} }}\n"
    )


def chain_of(number: int) -> str:
    """Of one Service."""
    endpoints = range(number * ENDPOINTS, (number + 1) * ENDPOINTS)
    made = []
    for last in endpoints:
        address = f"10.{128 + (last >> 16)}.{(last >> 8) & 255}.{last & 255}"
        made.append(f"chain e{last} {{ meta l4proto tcp dnat to {address}:8080\n}}")
    choice = ", ".join(f"{index} : goto e{last}" for index, last in enumerate(endpoints))
    return "\n".join([*made, f"chain s{number} {{ numgen random mod {ENDPOINTS} vmap {{ {choice} }}\n}}"])


def key_of(number: int) -> str:
    """The element that leads to one Service."""
    return f"10.96.{number >> 8}.{number & 255} . tcp . 80 : goto s{number}"


def against_chains() -> Iterator[Result]:
    """The same Services both ways, one family; ours with all that it does from objects on."""
    with namespaces() as (netns,), netns.enter():
        cold, one = _chains_take(netns)
        netns.run("nft flush ruleset")
        settings = msgspec.structs.replace(SETTINGS, enable_ipv6=False)
        node = Node1(objects(FEW), settings)
        took, _ = timed(lambda: node.sync(None, observe=True))
        shape = f"{FEW:,} Services of {ENDPOINTS} endpoints, IPv4"
        baseline = Baseline("a chain for each, by nft", cold)
        yield Result("proxy.nft.chains.cold", "from objects to an empty kernel", took, "s", cold, baseline, shape)
        new = {item.key: item for item in (service(FEW),)}
        slices = {item.key: item for item in (slice_of(FEW, 4),)}
        node.found["services"] |= new
        node.found["endpointslices"] |= slices
        changes: Changes = {"services": {key: (None, item) for key, item in new.items()}}
        changes["endpointslices"] = {key: (None, item) for key, item in slices.items()}
        took, _ = timed(lambda: node.sync(changes))
        baseline = Baseline("a chain for each, by nft", 1000 * one)
        yield Result("proxy.nft.chains.one", "one Service more", 1000 * took, "ms", 1000 * one, baseline, shape)
        node.backend.close()


def _chains_take(netns: Namespace) -> tuple[float, float]:
    """Seconds for all of them, and for one more."""
    text = chains(FEW)
    began = time.perf_counter()
    netns.run("nft -f -", stdin=text)
    cold = time.perf_counter() - began
    more = f"table ip chains {{\n{chain_of(FEW)}\n}}\nadd element ip chains services {{ {key_of(FEW)} }}\n"
    began = time.perf_counter()
    netns.run("nft -f -", stdin=more)
    return cold, time.perf_counter() - began


def memory() -> Iterator[Result]:
    """Of the real process: the snapshot that it holds, the engine and the backend."""
    with namespaces() as (netns,), tempfile.TemporaryDirectory() as folder, netns.enter():
        worker = WorkerProcess("proxy", SETTINGS, objects(), Path(folder), LATENCY)
        try:
            started = worker.start()
            worker.settle()
            shape = f"{SHAPE}; {started:.1f} s from the start of the process to its first sync"
            size = pss_kib(worker.pid) / MIB
            yield Result("proxy.nft.memory", "the worker after its first sync", size, "MiB PSS", 90.0, None, shape)
            for turn in range(1_000):
                item = event(turn % SERVICES, turn, 4 + 2 * (turn & 1))
                before = worker.found["endpointslices"][item.key]
                worker.publish({"endpointslices": {item.key: (before, item)}})
                worker.quiet(0.005)
            worker.settle()
            size = pss_kib(worker.pid) / MIB
            what = "the worker after 1,000 changed endpoints"
            yield Result("proxy.nft.memory.later", what, size, "MiB PSS", 90.0, None, SHAPE)
        finally:
            worker.close()
