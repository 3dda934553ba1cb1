"""The overlay's decisions: which routes lead through tunnels, how devices are named, and which ones are ours."""

from __future__ import annotations

import ipaddress

import pytest
from support.overlaynode import OWN, links, node

from kube_router.workers.linkfacts import LOOPBACK, Links
from kube_router.workers.model import Family
from kube_router.workers.routefacts import Prefix, Route
from kube_router.workers.router.routes import Decider, Decision, Injection, surroundings
from kube_router.workers.router.tunnels import (
    RECEIVERS,
    choose_name,
    is_our_host,
    is_ours,
    names_of,
    other_addresses,
    overlay,
    plan_rules,
    plan_tunnels,
    wanted_ports,
)
from kube_router.workers.settings import Settings
from kube_router.workers.tunnelfacts import FouPort, PodRule, PodRulePlan, Tunnel, TunnelPlan

OWN_NODE = node("n1", OWN)
LINKS = links("10.0.0.1/24", "fd00::1/64")
OTHERS = frozenset({"10.0.0.2", "10.4.0.4", "fd00::2", "fd04::4"})
SUBNET = Settings(enable_ipv6=True)
FULL = Settings(enable_ipv6=True, overlay_type="full")
GUE = Settings(enable_ipv6=True, overlay_encap="fou", overlay_encap_port=6000)
OFF = Settings(enable_ipv6=True, enable_overlay=False)
POD = {4: "10.244.4.0/24", 6: "fd00:244:4::/64"}


def decide(prefix: str, hop: str, settings: Settings, found: Links = LINKS) -> Decision:
    return Decider(surroundings(OWN_NODE, found, settings), OTHERS).decide(prefix, hop)


@pytest.mark.parametrize(
    ("hop", "settings", "injection"),
    [
        ("10.0.0.2", SUBNET, Injection.DIRECT),
        ("10.0.0.2", FULL, Injection.TUNNEL),
        ("10.0.0.2", OFF, Injection.DIRECT),
        ("10.0.0.9", FULL, Injection.DIRECT),  # a router of the segment: no node, no tunnel
        ("10.4.0.4", SUBNET, Injection.TUNNEL),
        ("10.4.0.4", FULL, Injection.TUNNEL),
        ("10.4.0.4", OFF, Injection.NONE),
        ("10.4.0.9", SUBNET, Injection.NONE),
        ("10.4.0.9", FULL, Injection.NONE),
        ("10.0.0.1", FULL, Injection.NONE),  # our own address
        ("fd00::2", SUBNET, Injection.DIRECT),
        ("fd00::2", FULL, Injection.TUNNEL),
        ("fd04::4", SUBNET, Injection.TUNNEL),
        ("fd04::4", OFF, Injection.NONE),
        ("fd04::9", FULL, Injection.NONE),
    ],
)
def test_who_is_reached_how(hop: str, settings: Settings, injection: Injection) -> None:
    decision = decide(POD[ipaddress.ip_address(hop).version], hop, settings)
    assert decision.injection is injection
    assert (decision.route is None) == (injection is Injection.NONE)
    assert decision.remote == (hop if injection is Injection.TUNNEL else "")


@pytest.mark.parametrize(
    ("hop", "settings", "route"),
    [
        ("10.4.0.4", SUBNET, Route("", "", "10.0.0.1", 1480, 1440)),
        ("fd04::4", SUBNET, Route("", "", "fd00::1", 1460, 1400)),
        ("10.4.0.4", GUE, Route("", "", "10.0.0.1", 1468, 1428)),
        ("fd04::4", GUE, Route("", "", "fd00::1", 1448, 1388)),
    ],
)
def test_a_tunnelled_route_carries_source_mtu_and_mss(hop: str, settings: Settings, route: Route) -> None:
    assert decide(POD[ipaddress.ip_address(hop).version], hop, settings).route == route


@pytest.mark.parametrize(
    ("prefix", "hop", "reason"),
    [
        ("10.4.0.0/16", "10.4.0.4", "it holds its own next hop, so its tunnel would lead into itself"),
        ("10.4.0.4/32", "10.4.0.4", "it holds its own next hop, so its tunnel would lead into itself"),
        ("fd04::/32", "fd04::4", "it holds its own next hop, so its tunnel would lead into itself"),
        ("10.0.0.2/32", "10.4.0.4", "it is the address of another node, so tunnels to that node would lead into this"),
        ("fd00::2/128", "fd04::4", "it is the address of another node, so tunnels to that node would lead into this"),
        ("0.0.0.0/0", "10.4.0.4", "a default route is never injected"),
        (POD[6], "10.4.0.4", "its next hop is of another family"),
        (POD[4], "10.4.0.9", "next hop 10.4.0.9 is on no subnet of this node's addresses, and it is no address of "),
    ],
)
def test_what_no_tunnel_takes_has_a_reason(prefix: str, hop: str, reason: str) -> None:
    decision = decide(prefix, hop, SUBNET)
    assert decision.route is None
    assert decision.reason.startswith(reason)


def test_without_a_link_there_is_no_tunnel_and_that_is_told() -> None:
    decision = decide(POD[6], "fd04::4", SUBNET, links("10.0.0.1/24"))
    assert decision.reason == "it needs a tunnel, and this node's IPv6 address is on no link"
    assert decide(POD[4], "10.4.0.4", SUBNET, links("10.0.0.1/24")).injection is Injection.TUNNEL


def test_an_address_on_loopback_leaves_the_mtu_to_the_kernel() -> None:
    found = links("10.0.0.1/32", "fd00::1/128", mtu=65536, kind=LOOPBACK)
    assert decide(POD[4], "10.4.0.4", SUBNET, found).route == Route("", "", "10.0.0.1")


@pytest.mark.parametrize(("mtu", "family", "wanted"), [(9000, 4, 8980), (80, 4, 68), (1300, 6, 1280), (9000, 6, 8960)])
def test_the_mtu_follows_the_link_down_to_the_least(mtu: int, family: int, wanted: int) -> None:
    around = overlay(OWN_NODE, links("10.0.0.1/24", "fd00::1/64", mtu=mtu), SUBNET)
    assert around is not None
    end = around.end(Family(family))
    assert end is not None
    assert end.mtu == wanted


@pytest.mark.parametrize(
    ("remote", "name"),
    [
        ("10.0.0.1", "tun-e443169117a"),
        ("100.200.300.400", "tun-9033d7906c7"),
        ("2001:db8:42:2::/64", "tun-ba56986ef05"),
        ("fd00::1", "tun-5393ee7fb5c"),
        ("21.3.0.4", "tun-8bbcaad3138"),
        ("2.13.0.4", "tun-8bbcaad3138"),
    ],
)
def test_names_are_kube_routers(remote: str, name: str) -> None:
    assert names_of(remote)[0] == name
    assert all(len(each) == 15 for each in names_of(remote))


def test_second_names_differ_where_first_ones_do_not() -> None:
    first, second = names_of("21.3.0.4"), names_of("2.13.0.4")
    assert first[0] == second[0]
    assert len({*first, *second}) == 3


@pytest.mark.parametrize(
    ("name", "remote", "ours"),
    [
        ("tun-e443169117a", "10.0.0.1", True),
        ("tun-e443169117a", "10.0.0.2", False),
        ("tun-10001", "10.0.0.1", True),  # v0.4 to v1.6
        ("tun-10001", "10.0.0.11", False),
        ("tun100200101102", "100.200.101.102", True),
        ("tun-10020010110", "100.200.101.10", True),  # eleven digits, like a name of today
        ("tun-5393ee7fb5c", "fd00::1", True),
        ("mytunnel", "10.0.0.1", False),
        ("tunl0", "", False),
        ("ip6tnl0", "", False),
        (RECEIVERS[Family.IPV6], "", True),
        (RECEIVERS[Family.IPV6], "fd00::1", False),
    ],
)
def test_ours_is_what_its_own_remote_address_names(name: str, remote: str, ours: bool) -> None:
    assert is_ours(name, Tunnel("fd00::9" if name in RECEIVERS.values() else "10.0.0.9", remote)) is ours


A, B = "21.3.0.4", "2.13.0.4"
PLAIN_NAME = names_of(A)[0]


def test_a_clash_of_names_is_resolved_the_device_that_is_there_keeps_its_name() -> None:
    for there in (A, B):
        other = B if there == A else A
        actual = {PLAIN_NAME: Tunnel("10.0.0.1", there)}
        assert choose_name(there, actual, {}, {}) == PLAIN_NAME
        assert choose_name(other, actual, {}, {}) == names_of(other)[1]
    assert choose_name(A, {}, {}, {PLAIN_NAME: B}) == names_of(A)[1]
    assert choose_name(A, {names_of(A)[1]: Tunnel("10.0.0.1", A)}, {}, {}) == names_of(A)[1]


def test_a_name_that_is_somebody_elses_is_not_taken() -> None:
    assert choose_name(A, {}, {PLAIN_NAME: "veth"}, {}) == names_of(A)[1]
    assert choose_name(A, {}, {PLAIN_NAME: "ip6tnl"}, {}) == names_of(A)[1]


def test_a_device_of_the_right_name_and_kind_with_a_wrong_remote_is_mended() -> None:
    actual = {PLAIN_NAME: Tunnel("10.0.0.1", "9.9.9.9")}
    assert choose_name(A, actual, {PLAIN_NAME: "ipip"}, {}) == PLAIN_NAME


def test_a_name_of_another_remote_is_never_given_away() -> None:
    holders = dict.fromkeys(names_of(A), B)
    del holders[names_of(A)[1]]
    kinds = {names_of(A)[1]: "veth"}
    assert choose_name(A, {}, kinds, holders) == names_of(A)[1]


def test_tunnels_lead_to_addresses_of_other_nodes_only() -> None:
    nodes = [OWN_NODE, node("n2", ("10.0.0.2", "fd00::2")), node("n3", ("10.0.0.1", "10.0.0.3"))]
    assert other_addresses(OWN_NODE, nodes) == {"10.0.0.2", "fd00::2", "10.0.0.3"}


def test_an_old_device_makes_way_without_losing_what_comes_in() -> None:
    around = overlay(OWN_NODE, LINKS, SUBNET)
    assert around is not None
    for remote, old in (("10.4.0.4", "tun-10404"), ("10.4.0.4", names_of("10.4.0.4")[1])):
        wanted = around.tunnel(remote)
        assert wanted is not None
        standing = wanted._replace(ttl=64)
        plan = plan_tunnels({old: standing}, {names_of(remote)[0]: wanted}, (), around)
        assert plan == TunnelPlan(
            receivers=((RECEIVERS[Family.IPV4], Tunnel("10.0.0.1", "")),),
            change=((old, standing._replace(link=2)),),
            add=((names_of(remote)[0], wanted),),
            loosen=(old,),
        )
    # bound already, or foreign: it stays as it is
    wanted = around.tunnel("10.4.0.4")
    assert wanted is not None
    bound = wanted._replace(link=2)
    assert plan_tunnels({old: bound}, {"x": wanted}, (), around).change == ()
    assert plan_tunnels({"theirs": wanted}, {"x": wanted}, (), around).change == ()


def test_a_receiver_stands_in_while_tunnels_are_changed() -> None:
    around = overlay(OWN_NODE, LINKS, GUE)
    assert around is not None
    for remote, local in (("fd04::4", "fd00::1"), ("10.4.0.4", "10.0.0.1")):
        receivers = ((RECEIVERS[Family.IPV6 if ":" in remote else Family.IPV4], Tunnel(local, "")),)
        wanted = around.tunnel(remote)
        assert wanted is not None
        plan = plan_tunnels({"t": wanted._replace(port=0)}, {"t": wanted}, (), around)
        assert plan.receivers == receivers
        # nothing came in through these: down, or of other ends
        for actual in (wanted._replace(up=False), wanted._replace(remote="fd09::9")):
            assert plan_tunnels({"t": actual}, {"t": wanted}, (), around).receivers == ()


def test_a_plan_says_what_it_does_in_order() -> None:
    tunnel = Tunnel("10.0.0.1", "10.4.0.4", 5555, 225, True, 1468)
    plan = TunnelPlan(
        receivers=(("r", Tunnel("fd00::1", "")),),
        change=(("a", tunnel._replace(port=-1, up=False, link=3)),),
        add=(("b", tunnel),),
        delete=("c",),
    )
    assert str(plan).splitlines() == [
        "tunnel add r ip6tnl local fd00::1 remote any ttl inherit",
        "tunnel change a ipip local 10.0.0.1 remote 10.4.0.4 ttl 225 encap ? mtu 1468 pmtudisc dev 3 down",
        "tunnel delete r",
        "tunnel add b ipip local 10.0.0.1 remote 10.4.0.4 ttl 225 encap gue dport 5555 mtu 1468 pmtudisc",
        "tunnel delete c",
    ]
    assert len(plan) == 3
    rules = PodRulePlan((PodRule("10.244.1.0/24"),), (PodRule("fd00::/64"),))
    assert str(rules) == "rule add from 10.244.1.0/24 lookup 77\nrule delete from fd00::/64 lookup 77"
    assert str(Route("", "tun-a", "10.0.0.1", 1480, 1440)) == "dev tun-a src 10.0.0.1 proto 17 mtu 1480 advmss 1440"


@pytest.mark.parametrize(
    ("prefix", "protocol", "device", "ours"),
    [
        ("10.4.0.4/32", 17, "", True),
        ("10.4.0.0/16", 17, "eth0", True),
        ("10.4.0.4/32", 3, names_of("10.4.0.4")[0], True),
        ("10.4.0.4/32", 3, "tun-10404", True),
        ("10.4.0.4/32", 3, "tun-10405", False),
        ("10.4.0.4/32", 4, "tun-10404", False),
        ("10.4.0.0/24", 3, "tun-10400", False),
        ("fd04::4/128", 3, names_of("fd04::4")[0], True),
    ],
)
def test_routes_of_table_77_are_ours_by_protocol_or_by_name(
    prefix: str, protocol: int, device: str, ours: bool
) -> None:
    assert is_our_host(Prefix(prefix), protocol, Route("", device)) is ours


CIDR, OTHER_CIDR = ipaddress.ip_network("10.244.1.0/24"), ipaddress.ip_network("fd00:244:1::/64")


def test_rules_are_ours_by_protocol_and_replace_those_of_kube_router() -> None:
    theirs, mine = PodRule(str(CIDR), 0, 32765), PodRule(str(CIDR), 17, 32764)
    foreign = PodRule("10.9.0.0/16", 0, 1)
    wanted = (CIDR, OTHER_CIDR)
    assert plan_rules((theirs, foreign), wanted, wanted) == PodRulePlan(
        (PodRule(str(CIDR)), PodRule(str(OTHER_CIDR))), (theirs,)
    )
    assert plan_rules((theirs, foreign), wanted, wanted, hold=True).delete == ()
    assert not plan_rules((mine, PodRule(str(OTHER_CIDR), 17, 5), foreign), wanted, wanted)
    twice = mine._replace(priority=7)
    assert plan_rules((mine, twice), (CIDR,), (CIDR,)) == PodRulePlan((), (twice,))
    assert plan_rules((mine, theirs, foreign), (), (CIDR,)) == PodRulePlan((), (mine, theirs))
    assert plan_rules((mine, theirs, foreign), (), ()) == PodRulePlan((), (mine,))


def test_ports_are_taken_whatever_is_sent() -> None:
    both = {FouPort(family, 5555) for family in Family}
    assert wanted_ports(SUBNET) == both
    more = Settings(enable_ipv6=True, overlay_encap="fou", overlay_encap_port=6000, overlay_encap_accept_ports=(5555,))
    assert wanted_ports(more) == both | {FouPort(family, 6000) for family in Family}
    assert wanted_ports(OFF) == frozenset()
    assert wanted_ports(Settings()) == {FouPort(Family.IPV4, 5555)}
