"""A node that loses its address of one family, own or other: the other family's BGP, routes, sets and rules stay."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from select import select
from typing import Any

import pytest
from support.bgp import node
from support.gobgpd import PORT, Daemon, daemons, segment, wait_for
from support.namespaces import Namespace, namespaces

from kube_router.ipc.messages import Kind, Node, SourceState
from kube_router.ipc.replica import Cluster
from kube_router.workers.model import Family, Outcome
from kube_router.workers.router.controller import RouterController
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Secrets, Settings

ADDRESSES = {name: (f"10.0.0.{number}", f"2001:db8::{number}") for number, name in enumerate("abc", 1)}
CIDRS = {name: (f"10.244.{number}.0/24", f"fd00:{number}::/64") for number, name in enumerate("abc", 1)}


def full(name: str) -> Node:
    return node(name, ADDRESSES[name], CIDRS[name])


def without(name: str, family: Family) -> Node:
    return node(name, [ADDRESSES[name][family is Family.IPV4]], CIDRS[name])


class RouterNode:
    """A whole router worker of one node, turned by hand."""

    def __init__(self, name: str, namespace: Namespace, daemon: Daemon) -> None:
        self.name, self.namespace = name, namespace
        settings = Settings(
            run_dir=str(daemon.run_dir), enable_ipv6=True, bgp_port=PORT, node_name=name, enable_overlay=False
        )
        with namespace.enter():
            self.controller = RouterController(settings, Secrets())
        self.nodes: Mapping[str, Node] = {}
        self.outcome = Outcome()
        self.started = False

    def see(self, nodes: Sequence[Node]) -> None:
        changes: Any = {"nodes": {item.name: (self.nodes.get(item.name), item) for item in nodes}}
        self.nodes = {item.name: item for item in nodes}
        self.reconcile(Trigger(start=not self.started, changes=changes))

    def reconcile(self, trigger: Trigger) -> None:
        objects: dict[Kind, Mapping[str, Any]] = {"nodes": self.nodes, "services": {}, "endpointslices": {}}
        with self.namespace.enter():
            self.outcome = self.controller.reconcile(Cluster(SourceState(source="t", in_sync=True), objects), trigger)
        self.started = True

    def turn(self) -> None:
        with self.namespace.enter():
            wakers = self.controller.wakers()
            for descriptor in select(list(wakers), [], [], 0.02)[0]:
                wakers[descriptor]()
        self.reconcile(Trigger(retry=True))

    def routes(self) -> set[str]:
        """Destinations of the routes of ours, both families."""
        text = "".join(self.namespace.run(f"ip {family} route show proto 17") for family in ("-4", "-6"))
        return {line.split()[0] for line in text.splitlines()}

    def members(self, name: str) -> set[str]:
        lines = self.namespace.run(f"ipset save {name}").splitlines()
        return {line.split()[2] for line in lines if line.startswith("add")}

    def rules(self, program: str) -> list[str]:
        return [line for line in self.namespace.run(f"{program}-save").splitlines() if line.startswith("-A")]

    def connections(self) -> set[tuple[str, str]]:
        """Both ends of the established BGP connections: another port is another session."""
        text = self.namespace.run(f"ss -Htn state established '( sport = :{PORT} or dport = :{PORT} )'")
        return {(line.split()[2], line.split()[3]) for line in text.splitlines()}

    def __str__(self) -> str:
        return f"{self.name}: {self.outcome.failures} {self.outcome.warnings} {self.routes()}"


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[list[RouterNode]]:
    """Nodes a, b and c on one segment, with all sessions up and all routes in the kernel.

    With gobgpd 4, which connects sooner: nothing of this depends on the version.
    """
    with namespaces(4) as (hub, *spaces), ExitStack() as stack:
        members = zip(spaces, "abc", strict=True)
        segment(hub, *((space, (f"{ADDRESSES[n][0]}/24", f"{ADDRESSES[n][1]}/64")) for space, n in members))
        places = [(space, 4, tmp_path / name) for space, name in zip(spaces, "abc", strict=True)]
        running = stack.enter_context(daemons(*places))
        nodes = [RouterNode(name, *pair) for name, pair in zip("abc", zip(spaces, running, strict=True), strict=True)]
        for item in nodes:
            stack.callback(item.controller.close)
            item.see([full(name) for name in "abc"])
        turn_until(nodes, lambda: all(len(item.routes()) == 4 for item in nodes), "all routes")
        yield nodes


def turn_until(nodes: Sequence[RouterNode], condition: Any, what: str, seconds: float = 40) -> None:
    wait_for(condition, seconds, what, *nodes)  # type: ignore[arg-type]


@contextmanager
def routes_stay(item: RouterNode, prefixes: set[str]) -> Iterator[None]:
    """None of these routes is removed from the kernel in between, not even for a moment."""
    watcher = item.namespace.start(["ip", "monitor", "route"], stdout=subprocess.PIPE)
    try:
        yield
    finally:
        watcher.terminate()
        text = watcher.communicate()[0]
    gone = [line for line in text.splitlines() if line.startswith("Deleted") and line.split()[1] in prefixes]
    assert gone == []


def of(family: Family, names: str) -> set[str]:
    return {CIDRS[name][family is Family.IPV6] for name in names}


def test_a_node_that_loses_ipv6_loses_only_that(trio: list[RouterNode]) -> None:
    """Seen by the others and by itself: no session bounces, no IPv4 route, set or rule changes."""
    a, b, _ = trio
    connections = {item.name: item.connections() for item in trio}
    rules = {item.name: item.rules("iptables") for item in trio}
    members = a.members("kube-router-node-ips")
    with routes_stay(a, of(Family.IPV4, "bc")), routes_stay(b, of(Family.IPV4, "ac")):
        for item in trio:
            item.see([full("a"), without("b", Family.IPV6), full("c")])
        turn_until(trio, lambda: ADDRESSES["b"][1] not in a.members("inet6:kube-router-node-ips"), "the set")
        for item in trio:
            for _ in range(10):
                item.turn()
    assert {item.name: item.connections() for item in trio} == connections
    assert {item.name: item.rules("iptables") for item in trio} == rules
    assert a.members("kube-router-node-ips") == members
    assert a.members("inet6:kube-router-pod-subnets") == {CIDRS[name][1] for name in "abc"}
    assert of(Family.IPV4, "bc") <= a.routes() and of(Family.IPV4, "ac") <= b.routes()
    assert all(item.outcome.failures == () for item in trio)


def test_a_node_that_loses_ipv4_keeps_ipv6_over_a_session_of_ipv6(trio: list[RouterNode]) -> None:
    """Sessions run between primary addresses, so those with it move; those of the others do not."""
    a, b, c = trio
    between = {pair for pair in a.connections() if all(ADDRESSES["b"][0] not in end for end in pair)}
    assert len(between) == 1
    with routes_stay(a, {*CIDRS["c"]}), routes_stay(c, {*CIDRS["a"]}):
        for item in trio:
            item.see([full("a"), without("b", Family.IPV4), full("c")])
        moved = lambda: any(ADDRESSES["b"][1] in end for pair in a.connections() for end in pair)  # noqa: E731
        turn_until(trio, moved, "a session over IPv6")
        turn_until(trio, lambda: CIDRS["b"][1] in a.routes() and CIDRS["a"][1] in b.routes(), "IPv6 routes")
        turn_until(trio, lambda: CIDRS["b"][0] not in a.routes(), "no IPv4 route to b")
    assert between <= a.connections()
    for item in trio:
        item.see([full(name) for name in "abc"])
    turn_until(trio, lambda: all(len(item.routes()) == 4 for item in trio), "all routes again")
    assert between <= a.connections()
