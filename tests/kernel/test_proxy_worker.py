"""The proxy worker on a real kernel: real loop, controller, engine and backend; the test is the watcher."""

from __future__ import annotations

import datetime
import http.client
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from support.firewallnode import IN_SYNC, STALE, WorkerNode, kernel_state
from support.namespaces import Namespace
from support.proxyworld import EXTERNAL, SETTINGS, balanced, both, node, pods, service, slices

from kube_router.ipc.messages import Projection, SourceState
from kube_router.workers.proxy.__main__ import make
from kube_router.workers.proxy.cleanup import cleanup
from kube_router.workers.proxy.names import NFT_TABLES
from kube_router.workers.settings import Settings

WORLD: tuple[Projection, ...] = (
    node(),
    service("web", 1),
    balanced("lb", 2, external_traffic_policy="Local", health_check_node_port=31999),
    *slices("web", pods(1, 2)),
    *slices("lb", pods(3, 4)),
)
FOREIGN = """
iptables -t nat -N DOCKER; iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
iptables -t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE
nft add table ip kube-proxy; nft add chain ip kube-proxy services; nft add rule ip kube-proxy services counter
"""


@pytest.fixture
def host(netns: Namespace) -> Iterator[Namespace]:
    netns.run(FOREIGN)
    with netns.enter():
        yield netns


@contextmanager
def worker(*objects: Projection, settings: Settings = SETTINGS, state: SourceState = IN_SYNC) -> Iterator[WorkerNode]:
    made = WorkerNode(make(settings), state)
    try:
        made.begin(*objects)
        yield made
    finally:
        made.close()


def test_a_cold_start_programs_both_families_and_a_restart_writes_nothing(host: Namespace) -> None:
    with worker(*WORLD) as made:
        beat = made.beat
        assert (beat.errors, beat.warnings, beat.pending) == ({}, (), 0)
        assert beat.writes > 0
        assert [component.name for component in beat.components] == ["NetworkServicesController"]
        assert beat.counts["controller_ipvs_services"] == beat.counts["service_frontends"] == 8
        assert (beat.counts["service_ports"], beat.counts["service_health_ports"]) == (2, 1)
    before = kernel_state(host)
    with worker(*WORLD) as made:
        assert (made.beat.errors, made.beat.writes, made.beat.counters["service_drift_repairs"]) == ({}, 0, 0)
    assert kernel_state(host) == before


def test_a_change_is_programmed_and_its_time_told(host: Namespace) -> None:
    with worker(*WORLD) as made:
        assert made.samples("kubeproxy_network_programming_duration_seconds") == []
        stamp = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=2)).isoformat()
        changed = [msgspec.structs.replace(item, last_change=stamp) for item in slices("web", pods(1, 2, 3))]
        made.put(*changed)
        told = made.samples("kubeproxy_network_programming_duration_seconds")
        assert len(told) == 2 and all(2 <= seconds < 12 for seconds in told)
        assert "10.1.0.3" in host.run(f"nft list map ip {NFT_TABLES[4]} endpoints")  # type: ignore[index]


def test_drift_is_repaired_when_the_kernel_tells_of_it(host: Namespace) -> None:
    with worker(*WORLD) as made:
        before = kernel_state(host)
        host.run(f"nft delete table ip {NFT_TABLES[4]}; nft flush map ip6 {NFT_TABLES[6]} services")  # type: ignore[index]
        assert made.until(lambda: made.beat.counters["service_drift_repairs"] >= 2, 1.0)
        made.settle()
        assert sorted(kernel_state(host)["nft"].splitlines()) == sorted(before["nft"].splitlines())
        assert made.beat.errors == {}


def test_a_stale_state_deletes_nothing_until_it_is_confirmed(host: Namespace) -> None:
    with worker(*WORLD):
        pass
    less = [item for item in WORLD if item.key != "shop/web"]
    with worker(*less, state=STALE) as made:
        assert "10.96.0.1" in host.run(f"nft list map ip {NFT_TABLES[4]} services")  # type: ignore[index]
        made.say(IN_SYNC)
        assert "10.96.0.1" not in host.run(f"nft list map ip {NFT_TABLES[4]} services")  # type: ignore[index]
        assert made.beat.errors == {}


def test_events_tell_what_is_wrong_and_only_that(host: Namespace) -> None:
    quarrel = [service(name, number, external_ips=both(EXTERNAL, 9)) for number, name in enumerate(("a", "b"), 5)]
    asking = service("c", 7, annotations={"kube-router.io/service.scheduler": "lc"}, session_affinity="Cookie")
    with worker(*WORLD, *quarrel, asking) as made:
        told = {(notice.name, notice.reason) for notice in made.told()}
        assert told == {
            ("b", "ServiceAddressConflict"),
            ("c", "InvalidService"),
            ("c", "ServiceNotSupported"),
        }
        assert len(made.beat.warnings) == 4 and made.beat.errors == {}


def test_health_check_ports_are_served(host: Namespace) -> None:
    with worker(*WORLD) as made:
        connection = http.client.HTTPConnection("127.0.0.1", 31999, timeout=5)
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"2 Service Endpoints found\n"
        made.put(*slices("lb", ()))
        connection = http.client.HTTPConnection("127.0.0.1", 31999, timeout=5)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 503


def test_cleanup_takes_back_all_of_ours_and_nothing_else(host: Namespace) -> None:
    before = kernel_state(host)
    with worker(*WORLD):
        assert kernel_state(host) != before
    assert cleanup(SETTINGS) == []
    assert kernel_state(host) == before
    assert cleanup(SETTINGS) == []


def test_a_family_that_is_turned_off_is_taken_back(host: Namespace) -> None:
    with worker(*WORLD):
        pass
    with worker(*WORLD, settings=msgspec.structs.replace(SETTINGS, enable_ipv6=False)) as made:
        assert made.beat.errors == {}
    listed = host.run("nft list tables")
    assert NFT_TABLES[4] in listed and NFT_TABLES[6] not in listed  # type: ignore[index]


def test_a_backend_that_is_not_built_is_one_clear_line(host: Namespace) -> None:
    before = kernel_state(host)
    with worker(*WORLD, settings=msgspec.structs.replace(SETTINGS, service_proxy_backend="ipvs")) as made:
        line = "backend: --service-proxy-backend ipvs: this backend is not built yet; use nftables"
        assert made.beat.warnings[0] == line
        assert made.beat.components[0].last_success is None
    assert kernel_state(host) == before
