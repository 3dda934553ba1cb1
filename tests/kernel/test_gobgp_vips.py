"""Service addresses on the wire: what an external peer gets from a real gobgpd that the router worker drives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from select import select
from typing import Any

import pytest
from support.bgp import node
from support.gobgpd import BINARIES, PORT, Daemon, Outsider, daemons, segment, wait_for
from support.namespaces import Namespace, namespaces
from support.vips import endpoint, endpoint_slice, service

from kube_router.ipc.messages import EndpointSlice, Kind, Node, Service, SourceState
from kube_router.ipc.replica import Changes, Cluster
from kube_router.workers.model import Family, Outcome
from kube_router.workers.router.bgpstate import OPEN, BgpState, Neighbor, Speaker
from kube_router.workers.router.controller import RouterController
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Secrets, Settings

A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
PODS = {"10.244.1.0/24": "10.0.0.1", "fd00:1::/64": "2001:db8::1"}
VIPS = {"192.0.2.1/32": "10.0.0.1", "2001:db8:e::1/128": "2001:db8::1"}
SHARED = ("192.0.2.1", "2001:db8:e::1")
SENT = 'controller_bgp_advertisements_sent{type="%s"}'


def local(name: str, cluster_ip: str, external: tuple[str, ...] = SHARED) -> Service:
    return service(name, cluster_ip, external=external, external_traffic_policy="Local")


def slices_of(name: str, **conditions: bool) -> list[EndpointSlice]:
    return [
        endpoint_slice(f"{name}-4", name, endpoint("10.244.1.5", **conditions)),
        endpoint_slice(f"{name}-6", name, endpoint("fd00:1::5", **conditions), kind="IPv6"),
    ]


ENDING = {"ready": False, "serving": True, "terminating": True}


class Driven:
    """The router controller of node a, told changes as the loop tells them, and a peer of another AS."""

    def __init__(self, namespace: Namespace, daemon: Daemon, peer: Daemon) -> None:
        self.namespace, self.daemon = namespace, daemon
        self.cluster: dict[Kind, dict[str, Any]] = {"nodes": {"a": A}, "services": {}, "endpointslices": {}}
        self.outcome = Outcome()
        self.counters: dict[str, float] = {}
        self.writes = 0
        self.begin()
        neighbor = Neighbor("10.0.0.1", 64512, "10.0.0.2", PORT, (Family.IPV4, Family.IPV6))
        speaker = Speaker(65000, "10.0.0.2", PORT, frozenset({"10.0.0.2"}))
        self.peer = Outsider(peer, BgpState(speaker, export=OPEN, import_=OPEN, neighbors={"10.0.0.1": neighbor}))

    def begin(self) -> None:
        values: dict[str, Any] = {
            "run_dir": str(self.daemon.run_dir),
            "node_name": "a",
            "enable_ipv6": True,
            "enable_ibgp": False,
            "bgp_port": PORT,
            "peer_router_ips": ("10.0.0.2",),
            "peer_router_asns": (65000,),
            "peer_router_ports": (PORT,),
            "advertise_external_ip": True,
            "service_cluster_ip_range": ("10.96.0.0/12", "fd00:96::/112"),
            "service_external_ip_range": ("192.0.2.0/24", "2001:db8:e::/64"),
        }
        with self.namespace.enter():
            self.controller = RouterController(Settings(**values), Secrets())
        self.compared = 0
        bgp: Any = self.controller._bgp
        inner = bgp._compare

        def counted(*arguments: Any) -> None:
            self.compared += 1
            inner(*arguments)

        bgp._compare = counted
        self.started, self.stale, self.writes = False, False, 0

    def close(self) -> None:
        self.controller.close()
        self.peer.close()

    def restart(self) -> None:
        """A new worker process; gobgpd goes on."""
        self.controller.close()
        self.begin()

    def put(self, *objects: Service | EndpointSlice | Node) -> Outcome:
        changes: dict[Kind, dict[str, Any]] = {}
        for item in objects:
            kind: Kind = "services" if isinstance(item, Service) else "nodes"
            kind = "endpointslices" if isinstance(item, EndpointSlice) else kind
            changes.setdefault(kind, {})[item.key] = (self.cluster[kind].get(item.key), item)
            self.cluster[kind][item.key] = item
        return self.reconcile(changes)

    def drop(self, *objects: Service | EndpointSlice) -> Outcome:
        changes: dict[Kind, dict[str, Any]] = {}
        for item in objects:
            kind: Kind = "services" if isinstance(item, Service) else "endpointslices"
            changes.setdefault(kind, {})[item.key] = (self.cluster[kind].pop(item.key), None)
        return self.reconcile(changes)

    def reconcile(self, changes: Changes | None = None, *, retry: bool = False, confirmed: bool = False) -> Outcome:
        state = SourceState(source="test", in_sync=not self.stale, stale=self.stale)
        objects: Mapping[Kind, Mapping[str, Any]] = {kind: dict(table) for kind, table in self.cluster.items()}
        trigger = Trigger(start=not self.started, retry=retry, confirmed=confirmed, changes=changes or {})
        with self.namespace.enter():
            self.outcome = self.controller.reconcile(Cluster(state, objects), trigger)
        self.started = True
        self.writes += self.outcome.writes
        for name, value in self.outcome.counters.items():
            self.counters[name] = self.counters.get(name, 0) + value
        return self.outcome

    def turn(self) -> None:
        with self.namespace.enter():
            wakers = self.controller.wakers()
            for descriptor in select(list(wakers), [], [], 0.05)[0]:
                wakers[descriptor]()
        self.reconcile(retry=bool(self.outcome.failures))
        self.peer.turn()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        wait_for(condition, 25, what, self)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.outcome}\nthe peer has {self.peer.rib.routes}"

    def peer_has(self, routes: Mapping[str, str]) -> bool:
        return self.peer.rib.routes == {**PODS, **routes}

    def sent(self, kind: str) -> float:
        return self.counters.get(SENT % kind, 0)


@pytest.fixture(params=BINARIES, ids=lambda generation: f"gobgpd{generation}")
def driven(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driven]:
    with namespaces(3) as (hub, a, b), ExitStack() as stack:
        segment(hub, *((ns, (f"10.0.0.{n}/24", f"2001:db8::{n}/64")) for ns, n in ((a, 1), (b, 2))))
        own, peer = stack.enter_context(daemons((a, request.param, tmp_path / "a"), (b, 4, tmp_path / "b")))
        found = Driven(a, own, peer)
        stack.callback(found.close)
        yield found


def test_a_peer_gets_host_routes_of_both_families_and_loses_them_when_the_last_own_pod_begins_to_end(
    driven: Driven,
) -> None:
    web, api = local("web", "10.96.0.1"), local("api", "10.96.0.2")
    remote = endpoint_slice("far", "db", endpoint("10.244.2.5", node="b"))
    driven.put(web, api, local("db", "10.96.0.3", ("192.0.2.9",)), remote, *slices_of("web"))
    assert driven.outcome.warnings == ()
    driven.until(lambda: driven.peer_has(VIPS), "pod CIDRs and VIPs, each with the next hop of its family")
    assert (driven.sent("advertise-vip"), driven.sent("withdraw-vip"), driven.sent("pod-route")) == (2, 0, 2)

    # Nothing that leaves the addresses as they are is compared with gobgpd, let alone written.
    driven.compared = driven.writes = 0
    driven.put(*slices_of("web"), web)
    driven.put(endpoint_slice("far", "db", endpoint("10.244.2.6", node="b")))
    driven.put(*slices_of("api"))
    assert (driven.compared, driven.writes) == (0, 0)

    # Two Services share the addresses: one going away is nothing on the wire.
    driven.peer.rib.take()
    driven.put(*slices_of("web", **ENDING))
    driven.drop(web)
    driven.put(local("other", "10.96.0.4", ("192.0.2.4",)), endpoint_slice("other-4", "other", endpoint("10.244.1.7")))
    more = {**VIPS, "192.0.2.4/32": "10.0.0.1"}
    driven.until(lambda: driven.peer_has(more), "a third address after it")
    assert driven.peer.rib.take() == {"192.0.2.4/32"}

    # The last own endpoints terminate: they still serve, and the addresses are gone, family by family.
    driven.put(slices_of("api", **ENDING)[1])
    driven.until(lambda: driven.peer_has({key: hop for key, hop in more.items() if ":" not in key}), "no IPv6 address")
    driven.put(slices_of("api", **ENDING)[0])
    driven.until(lambda: driven.peer_has({"192.0.2.4/32": "10.0.0.1"}), "no address of the ending pods")
    assert driven.sent("withdraw-vip") == 2
    driven.put(*slices_of("api"))
    driven.until(lambda: driven.peer_has(more), "a new pod is ready")


def test_a_restart_writes_nothing_and_a_stale_snapshot_withdraws_nothing(driven: Driven) -> None:
    web = local("web", "10.96.0.1")
    driven.put(web, *slices_of("web"))
    driven.until(lambda: driven.peer_has(VIPS), "VIPs at the peer")
    driven.restart()
    driven.reconcile()
    driven.until(lambda: not driven.controller._bgp.hold_deletions, "settled")
    assert driven.writes == 0

    # The API is away at the start: what the disk remembers lacks one Service and has another.
    driven.restart()
    driven.cluster["services"], driven.stale = {}, True
    driven.put(local("new", "10.96.0.5", ("192.0.2.5",)), *slices_of("new"))
    more = {**VIPS, "192.0.2.5/32": "10.0.0.1"}
    driven.until(lambda: driven.peer_has(more), "added, not withdrawn")
    driven.stale = False
    driven.reconcile(confirmed=True)
    driven.until(lambda: driven.peer_has({"192.0.2.5/32": "10.0.0.1"}), "withdrawn once that is confirmed")

    # gobgpd dies: a fresh one is told the same, and the peer never hears of more.
    driven.put(local("far", "10.96.0.6", ("192.0.2.6",)))
    driven.peer.ever.clear()
    starts = driven.daemon.starts
    driven.daemon.kill()
    driven.until(lambda: driven.daemon.starts > starts and driven.peer.rib.routes == {}, "the session is gone")
    driven.until(lambda: driven.peer_has({"192.0.2.5/32": "10.0.0.1"}), "all is back")
    assert driven.peer.ever == {*PODS, "192.0.2.5/32"}


def test_a_family_without_pod_cidr_does_not_take_service_addresses_for_one(driven: Driven) -> None:
    driven.put(local("web", "10.96.0.1"), *slices_of("web"))
    driven.until(lambda: driven.peer_has(VIPS), "VIPs at the peer")
    driven.restart()
    outcome = driven.put(node("a", ["10.0.0.1", "2001:db8::1"], ["fd00:1::/64"]))
    driven.until(lambda: driven.writes > 0 or driven.compared > 0, "compared")
    assert any("has no IPv4 pod CIDR; 10.244.1.0/24 stays announced" in line for line in driven.outcome.warnings)
    assert outcome.failures == ()
    driven.drop(driven.cluster["services"]["shop/web"])
    driven.until(lambda: driven.peer_has({}), "the Service's addresses go, the pod CIDR stays")


def test_bad_services_are_told_by_name_and_spoil_nothing_else(driven: Driven) -> None:
    bad = service("bad", "10.96.0.7", external=("192.0.2.300", "203.0.113.1"), annotations={"advertise.clusterip": "y"})
    driven.put(local("web", "10.96.0.1"), *slices_of("web"), bad)
    driven.until(lambda: driven.peer_has(VIPS), "the good ones")
    lines = [
        "service shop/bad: annotation kube-router.io/service.advertise.clusterip: 'y' is not true or false; it counts "
        "as false",
        "service shop/bad: spec.externalIPs: '192.0.2.300' is not an IP address",
        "service shop/bad: spec.externalIPs: '203.0.113.1': outside of --service-external-ip-range "
        "192.0.2.0/24,2001:db8:e::/64 (--strict-external-ip-validation)",
    ]
    assert list(driven.outcome.warnings) == lines
    told = [(item.kind, item.namespace, item.name, item.uid, item.text) for item in driven.outcome.notices]
    assert told == [("Service", "shop", "bad", "uid-bad", line) for line in lines]
    first = node("0", ["10.0.0.9"])
    driven.put(first)
    assert driven.outcome.notices == () and list(driven.outcome.warnings)[-3:] == lines
