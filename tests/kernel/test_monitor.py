"""The listeners: what they tell, and that lost messages are told too."""

from __future__ import annotations

import select
from collections.abc import Iterator

import pytest
from support.namespaces import Namespace

from kube_router.workers.kernel import monitor
from kube_router.workers.kernel.iptables import Running
from kube_router.workers.kernel.links import AddressEvent, LinkEvent
from kube_router.workers.kernel.monitor import (
    LOST,
    NftAddition,
    NftListener,
    NftRemoval,
    RouteEvent,
    RouteListener,
    Tick,
    legacy_table_mark,
)
from kube_router.workers.kernel.routes import RouteDriver
from kube_router.workers.model import Family
from kube_router.workers.routefacts import Prefix, Route, RoutePlan


@pytest.fixture
def inside(netns: Namespace) -> Iterator[Namespace]:
    netns.run(
        "ip link add x type veth peer name y; ip link set y up; ip link set x up; ip address add 10.0.0.1/24 dev x"
    )
    with netns.enter():
        yield netns


def test_links_addresses_and_routes_are_told_with_who_did_it(inside: Namespace) -> None:
    driver = RouteDriver()
    listener, deaf = RouteListener(), RouteListener({driver.portid})
    driver.apply(RoutePlan(add=((Prefix("10.5.0.0/16"), Route("10.0.0.2")),)))
    inside.run("ip -6 address add fd00::1/64 dev x nodad; ip route del 10.5.0.0/16; ip link set x down")
    events = list(listener.events())
    routes = [event for event in events if isinstance(event, RouteEvent) and event.route.prefix == "10.5.0.0/16"]
    assert [(event.gone, event.portid == driver.portid) for event in routes] == [(False, True), (True, False)]
    heard = [event for event in deaf.events() if isinstance(event, RouteEvent) and event.route.prefix == "10.5.0.0/16"]
    assert heard == routes[1:]
    assert any(isinstance(event, AddressEvent) and str(event.address) == "fd00::1/64" for event in events)
    assert any(isinstance(event, LinkEvent) and event.link.name == "x" and not event.link.up for event in events)
    assert list(listener.events()) == []


def test_lost_route_events_are_told(inside: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "LISTEN_BYTES", 4096)
    listener = RouteListener()
    adds = tuple((Prefix(f"10.5.{number}.0/24"), Route("10.0.0.2")) for number in range(200))
    RouteDriver().apply(RoutePlan(add=adds))
    assert LOST in list(listener.events())
    assert LOST not in list(listener.events())


def test_lost_nft_events_are_told(inside: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "LISTEN_BYTES", 4096)
    listener = NftListener()
    inside.run("for i in 1 2 3 4 5 6 7 8; do iptables-nft -A FORWARD -j ACCEPT; iptables-nft -F FORWARD; done")
    assert LOST in list(listener.events())


@pytest.mark.parametrize(("program", "family"), [("iptables-nft", Family.IPV4), ("ip6tables-nft", Family.IPV6)])
def test_removals_from_nft_tables_are_told(inside: Namespace, program: str, family: Family) -> None:
    inside.run(f"{program} -A FORWARD -j ACCEPT; {program} -t nat -A POSTROUTING -j ACCEPT")
    listener = NftListener()
    inside.run(f"{program} -A FORWARD -j DROP; {program} -D FORWARD -j ACCEPT; {program} -t nat -F")
    assert set(listener.events()) == {
        NftRemoval(family, "filter", "FORWARD"),
        NftRemoval(family, "nat", "POSTROUTING"),
    }
    kind = "ip" if family is Family.IPV4 else "ip6"
    inside.run(f"nft delete table {kind} nat; nft add table inet t; nft delete table inet t")
    assert {NftRemoval(family, "nat", ""), NftRemoval(None, "t", "")} <= set(listener.events())


@pytest.mark.parametrize(("program", "family"), [("iptables-nft", Family.IPV4), ("ip6tables-nft", Family.IPV6)])
def test_additions_are_told_to_those_who_ask_and_own_writes_to_nobody(
    inside: Namespace, program: str, family: Family
) -> None:
    own: set[int] = set()
    listener = NftListener(own, additions=True)
    inside.run(f"{program} -I FORWARD -j DROP")
    assert list(listener.events()) == [NftAddition(family, "filter", "FORWARD")]
    text = "*filter\n:MINE - [0:0]\n-A MINE -j RETURN\n-F FORWARD\n-I FORWARD -j MINE\nCOMMIT\n"
    running = Running([f"{program}-restore", "--noflush"], text)
    own.add(running.pid)
    running.output()
    inside.run(f"{program} -R MINE 1 -j DROP")
    assert set(listener.events()) == {NftAddition(family, "filter", "MINE"), NftRemoval(family, "filter", "MINE")}
    listener.close()


@pytest.mark.parametrize(("program", "family"), [("iptables-legacy", Family.IPV4), ("ip6tables-legacy", Family.IPV6)])
def test_the_mark_of_a_legacy_table_follows_its_rules(inside: Namespace, program: str, family: Family) -> None:
    assert legacy_table_mark(family, "filter") == b""
    assert inside.run("cat /proc/net/ip_tables_names /proc/net/ip6_tables_names") == ""
    inside.run(f"{program} -A FORWARD -j ACCEPT")
    one = legacy_table_mark(family, "filter")
    assert one == legacy_table_mark(family, "filter") != b""
    inside.run(f"{program} -A FORWARD -j ACCEPT")
    assert legacy_table_mark(family, "filter") != one
    inside.run(f"{program} -D FORWARD 1")
    assert legacy_table_mark(family, "filter") == one
    assert legacy_table_mark(family, "nat") == b""


def test_a_tick_comes_and_is_read_once() -> None:
    tick = Tick(0.05)
    try:
        assert select.select([tick.fileno()], [], [], 5)[0]
        assert tick.elapsed()
        assert not tick.elapsed()
    finally:
        tick.close()
