"""What the overlay's drivers may rely on, and what they are refused: one suite for a real kernel and that in memory.

A test module derives `TunnelContract` and gives it a fixture ``host``: the real one runs where the kernel has tunnels
(`tests/vm`), the fake one everywhere (`tests/contract`). Own addresses are 10.0.0.1 and fd00::1, on link number `link`.
"""

from __future__ import annotations

import errno
from typing import Protocol

import pytest

from kube_router.workers.model import Family
from kube_router.workers.routefacts import ActualRoutes, Prefix, Route, RoutePlan
from kube_router.workers.router.overlay import Drivers
from kube_router.workers.router.routetable import Routes
from kube_router.workers.router.tunnels import names_of
from kube_router.workers.tunnelfacts import FouPort, PodRule, PodRulePlan, Tunnel, TunnelPlan

LOCAL = {Family.IPV4: "10.0.0.1", Family.IPV6: "fd00::1"}
REMOTE = {Family.IPV4: "10.4.0.4", Family.IPV6: "fd04::4"}
OTHER = {Family.IPV4: "10.4.0.5", Family.IPV6: "fd04::5"}
PREFIX = {Family.IPV4: Prefix("10.244.4.0/24"), Family.IPV6: Prefix("fd00:244:4::/64")}
MTU = {Family.IPV4: 1480, Family.IPV6: 1460}
CIDR = {Family.IPV4: "10.244.1.0/24", Family.IPV6: "fd00:244:1::/64"}


class Host(Protocol):
    """A kernel, its drivers, and what a foreign hand does to it."""

    @property
    def drivers(self) -> Drivers: ...

    @property
    def routes(self) -> Routes: ...

    @property
    def link(self) -> int: ...

    def set_down(self, device: str) -> None: ...

    def remove(self, device: str) -> None: ...

    def dummy(self, name: str) -> None: ...

    def boot_route(self, prefix: str, device: str) -> None: ...

    def foreign_rule(self, source: str) -> None: ...

    def direct_port(self, port: FouPort) -> None: ...


def tunnel(family: Family, remote: str = "", port: int = 0) -> Tunnel:
    """As the overlay wants it."""
    mtu = MTU[family] - (12 if port else 0)
    pmtudisc = bool(port) and family is Family.IPV4
    return Tunnel(LOCAL[family], remote or REMOTE[family], port, 225 if port else 0, pmtudisc, mtu)


def add(name: str, wanted: Tunnel) -> TunnelPlan:
    return TunnelPlan(add=((name, wanted),))


def numbers(failures: object) -> list[tuple[str, str, int | None]]:
    return [(one.step, one.name, one.error.errno) for one in failures]  # type: ignore[attr-defined]


@pytest.fixture(params=list(Family), ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


class TunnelContract:
    """The suite; every test says what the kernel does."""

    def seen(self, host: Host, name: str) -> Tunnel | None:
        return host.drivers.tunnels.observe().get(name)

    @pytest.mark.parametrize("port", [0, 5555])
    def test_a_device_is_made_seen_and_removed(self, host: Host, family: Family, port: int) -> None:
        host.drivers.load_fou(Family)
        wanted = tunnel(family, port=port)
        assert host.drivers.tunnels.apply(add("tun-a", wanted)) == ()
        assert self.seen(host, "tun-a") == wanted
        assert host.drivers.tunnels.apply(TunnelPlan(delete=("tun-a", "tun-b"))) == ()
        assert self.seen(host, "tun-a") is None

    def test_an_mtu_of_which_nothing_is_said_is_the_kernels(self, host: Host, family: Family) -> None:
        host.drivers.load_fou(Family)
        for remote, port in ((REMOTE[family], 0), (OTHER[family], 5555)):
            wanted = tunnel(family, remote, port)
            host.drivers.tunnels.apply(add(f"tun-{port}", wanted._replace(mtu=0)))
            assert self.seen(host, f"tun-{port}") == wanted
        # In a change, that of ip6tnl is found again; that of ipip stays, although the header is larger now.
        changed = tunnel(family, port=5555)
        host.drivers.tunnels.apply(TunnelPlan(change=(("tun-0", changed._replace(mtu=0)),)))
        stays = family is Family.IPV4
        assert self.seen(host, "tun-0") == (changed._replace(mtu=MTU[family]) if stays else changed)

    def test_everything_is_changed_in_place_and_routes_stay(self, host: Host, family: Family) -> None:
        host.drivers.load_fou(Family)
        host.drivers.tunnels.apply(add("tun-a", tunnel(family)))
        host.routes.apply(RoutePlan(add=((PREFIX[family], Route("", "tun-a")),)))
        for changed in (
            tunnel(family, port=5555),
            tunnel(family, port=6666),
            tunnel(family),
            tunnel(family)._replace(ttl=9, pmtudisc=family is Family.IPV4),
            tunnel(family, OTHER[family]),
            tunnel(family)._replace(mtu=1400),
            tunnel(family)._replace(link=host.link),
            tunnel(family),
        ):
            plan = TunnelPlan((("tun-r", Tunnel(LOCAL[family], "")),), (("tun-a", changed),))
            assert host.drivers.tunnels.apply(plan) == ()
            assert self.seen(host, "tun-a") == changed
            assert self.seen(host, "tun-r") is None
            assert host.routes.observe().ours == {PREFIX[family]: Route("", "tun-a")}

    def test_two_devices_have_the_same_ends_only_with_different_links(self, host: Host, family: Family) -> None:
        drivers = host.drivers
        assert drivers.tunnels.apply(add("tun-a", tunnel(family))) == ()
        assert numbers(drivers.tunnels.apply(add("tun-b", tunnel(family)))) == [("add", "tun-b", errno.EEXIST)]
        bound = tunnel(family)._replace(link=host.link)
        assert drivers.tunnels.apply(TunnelPlan((), (("tun-a", bound),), (("tun-b", tunnel(family)),))) == ()
        assert (self.seen(host, "tun-a"), self.seen(host, "tun-b")) == (bound, tunnel(family))
        back = TunnelPlan(change=(("tun-a", tunnel(family)),))
        assert numbers(drivers.tunnels.apply(back)) == [("change", "tun-a", errno.EEXIST)]

    def test_a_refused_step_stops_no_other(self, host: Host, family: Family) -> None:
        host.dummy("tun-d")
        host.drivers.tunnels.apply(add("tun-a", tunnel(family)))
        plan = TunnelPlan(
            change=(("tun-d", tunnel(family)), ("tun-x", tunnel(family)), ("tun-a", tunnel(family)._replace(up=False))),
            add=(("tun-d", tunnel(family, OTHER[family])), ("tun-b", tunnel(family, OTHER[family]))),
        )
        assert numbers(host.drivers.tunnels.apply(plan)) == [
            ("change", "tun-d", errno.EOPNOTSUPP),
            ("change", "tun-x", errno.ENODEV),
            ("add", "tun-d", errno.EEXIST),
        ]
        assert self.seen(host, "tun-a") == tunnel(family)._replace(up=False)
        assert self.seen(host, "tun-b") == tunnel(family, OTHER[family])

    def test_a_device_of_one_kind_is_not_changed_into_the_other(self, host: Host) -> None:
        host.drivers.tunnels.apply(add("tun-a", tunnel(Family.IPV4)))
        failures = host.drivers.tunnels.apply(TunnelPlan(change=(("tun-a", tunnel(Family.IPV6)),)))
        assert numbers(failures) == [("change", "tun-a", errno.EOPNOTSUPP)]

    def test_a_route_leads_through_a_device_with_source_mtu_and_mss(self, host: Host, family: Family) -> None:
        host.drivers.tunnels.apply(add("tun-a", tunnel(family)))
        wanted = Route("", "tun-a", LOCAL[family], MTU[family], MTU[family] - 60)
        assert host.routes.apply(RoutePlan(add=((PREFIX[family], wanted),))).failures == ()
        assert host.routes.observe().ours == {PREFIX[family]: wanted}
        other = wanted._replace(mtu=1400, advmss=0)
        assert host.routes.apply(RoutePlan(replace=((PREFIX[family], other),))).failures == ()
        assert host.routes.observe().ours == {PREFIX[family]: other}
        host.remove("tun-a")
        assert host.routes.observe().ours == {}

    def test_direct_and_tunnelled_take_each_others_place(self, host: Host, family: Family) -> None:
        host.drivers.tunnels.apply(add("tun-a", tunnel(family)))
        direct, through = Route(LOCAL[family][:-1] + "2"), Route("", "tun-a", LOCAL[family])
        host.routes.apply(RoutePlan(add=((PREFIX[family], direct),)))
        for wanted in (through, direct):
            assert host.routes.apply(RoutePlan(replace=((PREFIX[family], wanted),))).failures == ()
            assert host.routes.observe().ours == {PREFIX[family]: wanted}

    def test_what_routes_through_devices_are_refused(self, host: Host, family: Family) -> None:
        def refused(route: Route) -> int | None:
            failures = host.routes.apply(RoutePlan(add=((PREFIX[family], route),))).failures
            return failures[0].error.errno if failures else None

        assert refused(Route("", "tun-a")) == errno.ENODEV
        host.drivers.tunnels.apply(add("tun-a", tunnel(family)))
        assert refused(Route("", "tun-a", OTHER[family])) == errno.EINVAL
        host.set_down("tun-a")
        assert refused(Route("", "tun-a")) == errno.ENETDOWN

    def test_a_device_that_goes_down_loses_routes_of_ipv4_and_is_set_up_again(self, host: Host, family: Family) -> None:
        host.drivers.tunnels.apply(add("tun-a", tunnel(family)))
        host.routes.apply(RoutePlan(add=((PREFIX[family], Route("", "tun-a")),)))
        host.set_down("tun-a")
        assert self.seen(host, "tun-a") == tunnel(family)._replace(up=False)
        kept = {PREFIX[family]: Route("", "tun-a")} if family is Family.IPV6 else {}
        assert host.routes.observe().ours in ({}, kept)
        assert host.drivers.tunnels.apply(TunnelPlan(change=(("tun-a", tunnel(family)),))) == ()
        assert self.seen(host, "tun-a") == tunnel(family)

    def test_table_77_holds_ours_and_what_kube_router_left(self, host: Host, family: Family) -> None:
        name = names_of(REMOTE[family])[0]
        host.drivers.tunnels.apply(add(name, tunnel(family)))
        to = f"{REMOTE[family]}/{family.bits}"
        host.boot_route(to, name)
        host.boot_route(f"{OTHER[family]}/{family.bits}", name)
        found = host.drivers.hosts.observe()
        assert found == ActualRoutes(
            {Prefix(to): Route("", name)}, foreign=frozenset({Prefix(f"{OTHER[family]}/{family.bits}")})
        )
        assert host.drivers.hosts.apply(RoutePlan(replace=((Prefix(to), Route("", name)),))).failures == ()
        assert host.drivers.hosts.apply(RoutePlan(delete=(Prefix(to),))).removed == 1
        assert host.drivers.hosts.observe().ours == {}
        assert host.routes.observe().ours == {}

    def test_ports_are_opened_seen_and_closed(self, host: Host, family: Family) -> None:
        fou, port = host.drivers.fou, FouPort(family, 5555)
        assert host.drivers.load_fou([family]) is None
        assert fou.available()
        assert fou.open([port]) == {}
        assert fou.open([port, FouPort(family, 5556)]) == {}
        assert fou.observe() == {port, FouPort(family, 5556)}
        assert fou.shut([port, FouPort(family, 5557)]) == {}
        assert fou.observe() == {FouPort(family, 5556)}

    def test_a_port_of_another_kind_is_in_the_way(self, host: Host, family: Family) -> None:
        host.drivers.load_fou(Family)
        port = FouPort(family, 5555)
        host.direct_port(port)
        assert host.drivers.fou.observe() == {port._replace(gue=False)}
        assert host.drivers.fou.open([port]).keys() == {port}
        assert host.drivers.fou.observe() == {port._replace(gue=False)}

    def test_rules_of_two_hands_stand_side_by_side(self, host: Host, family: Family) -> None:
        rules = host.drivers.rules
        host.foreign_rule(CIDR[family])
        assert rules.apply(PodRulePlan(add=(PodRule(CIDR[family]),))) == {}
        found = rules.observe()
        assert [(rule.source, rule.protocol == 17) for rule in found] == [(CIDR[family], True), (CIDR[family], False)]
        assert rules.apply(PodRulePlan(delete=(found[1],))) == {}
        assert rules.observe() == found[:1]
        assert rules.apply(PodRulePlan(delete=(found[1],))) == {}
