"""The router controller with a real gobgpd and a real kernel: both halves joined, and each without the other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from select import select
from typing import Any

import pytest
from support.bgp import node
from support.gobgpd import BINARIES, PORT, Daemon, Outsider, daemons, segment, wait_for
from support.namespaces import Namespace, namespaces

from kube_router.ipc.messages import EndpointSlice, Kind, Node, Service, SourceState
from kube_router.ipc.replica import Changes, Cluster
from kube_router.workers.model import Family, Outcome
from kube_router.workers.router import bgp
from kube_router.workers.router.bgpstate import OPEN, BgpState, Neighbor, Speaker
from kube_router.workers.router.controller import RouterController
from kube_router.workers.router.gobgp import client
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Secrets, Settings

A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
B = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"])
THEIRS = {"10.244.2.0/24": "10.0.0.2", "fd00:2::/64": "2001:db8::2"}


def other_node(paths: dict[str, str]) -> BgpState:
    neighbor = Neighbor("10.0.0.1", 64512, "10.0.0.2", PORT, (Family.IPV4, Family.IPV6))
    speaker = Speaker(64512, "10.0.0.2", PORT, frozenset({"10.0.0.2", "2001:db8::2"}))
    return BgpState(speaker, export=OPEN, import_=OPEN, paths=paths, neighbors={"10.0.0.1": neighbor})


class Driven:
    """The controller of node a, turned by hand; records what the dataplane is asked."""

    def __init__(self, namespace: Namespace, daemon: Daemon) -> None:
        self.namespace = namespace
        values = {"run_dir": str(daemon.run_dir), "enable_ipv6": True, "bgp_port": PORT, "node_name": "a"}
        with namespace.enter():
            self.controller = RouterController(Settings(**values), Secrets())  # type: ignore[arg-type]
        self.nodes: Mapping[str, Node] = {"a": A, "b": B}
        self.services: Mapping[str, Service] = {}
        self.slices: Mapping[str, EndpointSlice] = {}
        self.outcome = Outcome()
        self.asked: list[tuple[frozenset[str] | None, bool]] = []
        self.started = False
        dataplane: Any = self.controller._dataplane
        inner = dataplane.reconcile

        def recorded(
            own: Any, nodes: Any, learned: Any, changed: Any, trigger: Any, keep: bool, learning: bool
        ) -> Outcome:
            self.asked.append((changed, keep or learning))
            return inner(own, nodes, learned, changed, trigger, keep, learning)  # type: ignore[no-any-return]

        dataplane.reconcile = recorded

    def reconcile(self, changes: Changes | None = None, *, retry: bool = False, stale: bool = False) -> Outcome:
        state = SourceState(source="test", in_sync=not stale, stale=stale)
        trigger = Trigger(start=not self.started, retry=retry, changes=changes or {})
        with self.namespace.enter():
            self.outcome = self.controller.reconcile(Cluster(state, self.objects()), trigger)
        self.started = True
        return self.outcome

    def objects(self) -> dict[Kind, Mapping[str, Any]]:
        return {"nodes": self.nodes, "services": self.services, "endpointslices": self.slices}

    def turn(self) -> None:
        with self.namespace.enter():
            wakers = self.controller.wakers()
            for descriptor in select(list(wakers), [], [], 0.05)[0]:
                wakers[descriptor]()
        self.reconcile(retry=True)

    def routes(self) -> dict[str, str]:
        found = {}
        for family in ("-4", "-6"):
            for line in self.namespace.run(f"ip {family} route show table main proto 17").splitlines():
                words = line.split()
                found[words[0]] = words[words.index("via") + 1]
        return found


@pytest.fixture(params=BINARIES, ids=lambda generation: f"gobgpd{generation}")
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Driven, Outsider, Daemon]]:
    with namespaces(3) as (hub, a, b), ExitStack() as stack:
        segment(hub, *((ns, (f"10.0.0.{n}/24", f"2001:db8::{n}/64")) for ns, n in ((a, 1), (b, 2))))
        first, second = stack.enter_context(
            daemons((a, request.param, tmp_path / "a"), (b, request.param, tmp_path / "b"))
        )
        driven = Driven(a, first)
        stack.callback(driven.controller.close)
        other = Outsider(second, other_node(THEIRS))
        stack.callback(other.close)
        yield driven, other, first


def until(driven: Driven, other: Outsider, condition: Callable[[], bool], what: str) -> None:
    wait_for(condition, 25, what, driven, other)  # type: ignore[arg-type]


def test_a_learned_route_takes_the_short_way_into_the_kernel_and_out_again(
    pair: tuple[Driven, Outsider, Daemon],
) -> None:
    driven, other, daemon = pair
    outcome = driven.reconcile()
    assert outcome.failures == ()
    until(driven, other, lambda: driven.routes() == THEIRS and not driven.asked[-1][1], "routes in the kernel")
    assert other.routes() == {"10.244.1.0/24": "10.0.0.1", "fd00:1::/64": "2001:db8::1"}
    names = {component.name for component in driven.outcome.components}
    assert names == {"NetworkRoutesController", "RouteSyncController"}
    assert all(component.last_success for component in driven.outcome.components)

    driven.asked.clear()
    listings: list[str] = []
    client: Any = driven.controller._bgp._client
    inner = client.observe

    def listing(*paths: Any) -> Any:
        listings.append("observe")
        return inner(*paths)

    client.observe = listing
    more = {**THEIRS, "10.244.9.0/24": "10.0.0.2"}
    other.plan(other_node(more))
    until(driven, other, lambda: driven.routes() == more, "one more route")
    other.plan(other_node(THEIRS))
    until(driven, other, lambda: driven.routes() == THEIRS, "and it is gone")
    assert {changed for changed, _ in driven.asked} <= {frozenset(), frozenset({"10.244.9.0/24"})}
    assert listings == []

    # gobgpd dies: the kernel keeps the routes, also while a fresh daemon has none of them.
    starts = daemon.starts
    daemon.kill()
    until(driven, other, lambda: daemon.starts > starts and driven.outcome.sessions != (), "a fresh gobgpd")
    assert driven.routes() == THEIRS
    until(driven, other, lambda: not driven.asked[-1][1] and driven.routes() == THEIRS, "settled with all routes")


def test_a_missing_own_node_is_one_failure_and_changes_nothing(pair: tuple[Driven, Outsider, Daemon]) -> None:
    driven, other, _ = pair
    driven.reconcile()
    until(driven, other, lambda: driven.routes() == THEIRS and not driven.asked[-1][1], "routes in the kernel")
    driven.nodes = {"b": B}
    outcome = driven.reconcile({"nodes": {"a": (A, None)}})
    (failure,) = outcome.failures
    assert "node a: is not in the cluster" in failure.text
    assert driven.routes() == THEIRS
    assert other.established("10.0.0.1")


def test_each_half_works_while_the_other_fails(pair: tuple[Driven, Outsider, Daemon]) -> None:
    driven, other, _ = pair
    dataplane: Any = driven.controller._dataplane
    bgp: Any = driven.controller._bgp
    kernel, peers = dataplane.reconcile, bgp.reconcile

    def broken(*_: Any, **__: Any) -> Outcome:
        raise RuntimeError("broken on purpose")

    dataplane.reconcile = broken
    driven.reconcile()
    until(driven, other, lambda: other.routes() != {}, "BGP works without the dataplane")
    assert [failure.text for failure in driven.outcome.failures] == ["dataplane: RuntimeError: broken on purpose"]
    dataplane.reconcile, bgp.reconcile = kernel, broken
    until(driven, other, lambda: driven.routes() == THEIRS, "the dataplane works without BGP")
    assert [failure.text for failure in driven.outcome.failures] == ["BGP: RuntimeError: broken on purpose"]
    bgp.reconcile = peers
    driven.reconcile(retry=True)
    assert driven.outcome.failures == ()


@pytest.mark.parametrize("pair", [4], indirect=True, ids=["gobgpd4"])
def test_a_gobgpd_that_hangs_is_told_in_one_line_and_keeps_nothing_else_from_work(
    pair: tuple[Driven, Outsider, Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CALL_SECONDS", 1.0)
    monkeypatch.setattr(bgp, "STUCK_SECONDS", 2.0)
    driven, other, daemon = pair
    driven.reconcile()
    until(driven, other, lambda: driven.routes() == THEIRS and not driven.asked[-1][1], "routes in the kernel")
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        # Another node changes: BGP would have to do something.
        driven.nodes = {**driven.nodes, "c": node("c", ["10.0.0.3"], ["10.244.3.0/24"])}
        driven.reconcile({"nodes": {"c": (None, driven.nodes["c"])}})
        (failure,) = driven.outcome.failures
        assert failure.phase == "bgp-daemon" and "does not answer: stopped or overloaded" in failure.text
        driven.namespace.run("ip route flush proto 17; ip -6 route flush proto 17")
        began = time.monotonic()
        wait_for(lambda: driven.routes() == THEIRS, 5, "routes are repaired", driven)  # type: ignore[arg-type]
        assert time.monotonic() - began < 2, "the other half hardly waits"
        assert len(driven.outcome.failures) == 1
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    until(driven, other, lambda: driven.outcome.failures == (), "it goes on")
    assert driven.routes() == THEIRS and other.established("10.0.0.1")
    bgp_half: Any = driven.controller._bgp
    assert "10.0.0.3" in bgp_half._believed.neighbors
    assert daemon.starts == 1
