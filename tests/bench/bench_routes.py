"""Learned routes into the kernel: 10,000 at once, and one change through the router's whole dataplane."""

from __future__ import annotations

import ipaddress
import subprocess
import time
from collections.abc import Iterator

from run import Baseline, Result, median_of
from support.namespaces import Namespace, namespaces

from kube_router.ipc.messages import Node, NodeAddress
from kube_router.workers.kernel.routes import RouteDriver
from kube_router.workers.model import Family
from kube_router.workers.nodefacts import node_facts
from kube_router.workers.routefacts import Prefix, Route, RoutePlan
from kube_router.workers.router.dataplane import Dataplane
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings

COUNT = 10_000
GATEWAYS = {Family.IPV4: "10.0.0.2", Family.IPV6: "fd00::2"}


def prefixes(count: int = COUNT) -> dict[str, str]:
    """Half IPv4 /24, half IPv6 /64, each with its next hop."""
    v4 = (f"{ipaddress.IPv4Address(0x64000000 + (i << 8))}/24" for i in range(count // 2))
    v6 = (f"{ipaddress.IPv6Address((0xFD01 << 112) + (i << 64))}/64" for i in range(count // 2))
    return {**dict.fromkeys(v4, GATEWAYS[Family.IPV4]), **dict.fromkeys(v6, GATEWAYS[Family.IPV6])}


def prepare(namespace: Namespace) -> None:
    """A node with one link: its peer end stays in the same namespace, nothing is sent."""
    namespace.run("ip link add eth0 type veth peer name far")
    namespace.run("ip link set far up")
    namespace.run("ip address add 10.0.0.1/24 dev eth0")
    namespace.run("ip -6 address add fd00::1/64 dev eth0 nodad")
    namespace.run("ip link set eth0 up")


def flush(namespace: Namespace) -> None:
    namespace.run("ip -4 route flush proto 17")
    namespace.run("ip -6 route flush proto 17")


def run() -> Iterator[Result]:
    """10,000 routes by the driver against ``ip -batch``; one change and 10,000 through the dataplane."""
    learned = prefixes()
    plan = RoutePlan(add=tuple((Prefix(prefix), Route(gateway)) for prefix, gateway in learned.items()))
    with namespaces() as (namespace,):
        prepare(namespace)

        def driver() -> float:
            flush(namespace)
            with namespace.enter():
                routes = RouteDriver()
                began = time.perf_counter()
                applied = routes.apply(plan)
                took = time.perf_counter() - began
                routes.close()
            assert applied.added == COUNT, applied
            return took

        def ip_batch() -> float:
            flush(namespace)
            lines = "".join(f"route replace {prefix} via {gateway} proto 17\n" for prefix, gateway in learned.items())
            began = time.perf_counter()
            subprocess.run(["ip", "-n", namespace.name, "-batch", "-"], input=lines, text=True, check=True)
            return time.perf_counter() - began

        baseline = Baseline("ip -batch with the same 10,000 routes", median_of(ip_batch, 3))
        shape = "5,000 IPv4 /24 and 5,000 IPv6 /64, median of 5"
        yield Result(
            "routes.driver.10k", "10,000 routes into the kernel, driver", median_of(driver), "s", 0.5, baseline, shape
        )
        flush(namespace)
        with namespace.enter():
            yield from dataplane(learned, baseline)


def dataplane(learned: dict[str, str], baseline: Baseline) -> Iterator[Result]:
    """The whole way: decision, tracker, kernel."""
    settings = Settings(enable_ipv6=True, enable_pod_egress=False)
    addresses = (NodeAddress("InternalIP", "10.0.0.1"), NodeAddress("InternalIP", "fd00::1"))
    own = node_facts(Node(name="n", addresses=addresses, pod_cidrs=("10.244.0.0/24",)), settings.families)
    router = Dataplane(settings)
    try:
        router.reconcile(own, [own], {}, None, Trigger(start=True), False)
        began = time.perf_counter()
        outcome = router.reconcile(own, [own], learned, frozenset(learned), Trigger(), False)
        took = time.perf_counter() - began
        assert not outcome.failures, outcome.failures[:3]
        yield Result(
            "routes.dataplane.10k", "10,000 learned routes through the dataplane", took, "s", 0.5, baseline, "one run"
        )
        changes = []
        for number in range(200):
            prefix = f"100.200.{number}.0/24"
            learned[prefix] = GATEWAYS[Family.IPV4]
            began = time.perf_counter()
            router.reconcile(own, [own], learned, frozenset([prefix]), Trigger(), False)
            changes.append((time.perf_counter() - began) * 1000)
        shape = "200 single changes beside 10,000 routes, worst but two"
        yield Result(
            "routes.dataplane.one", "one learned route into the kernel", sorted(changes)[-3], "ms", 20.0, None, shape
        )
    finally:
        router.close()
