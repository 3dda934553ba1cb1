"""The overlay kept together: tunnels before routes, routes before removals, repairs, leftovers, ports; in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.fake_kernel import TableEntry
from support.overlaynode import OWN, OWN_CIDRS, FakeNode, links, new_kernel

from kube_router.workers.kernel.monitor import RuleEvent
from kube_router.workers.kernel.routes import KernelRoute
from kube_router.workers.kernel.tunnels import TunnelEvent
from kube_router.workers.model import Family
from kube_router.workers.routefacts import Prefix
from kube_router.workers.router.collected import Collected
from kube_router.workers.router.tunnels import RECEIVERS, names_of
from kube_router.workers.tunnelfacts import FouPort, PodRule, Tunnel

FAR = ("10.4.0.4", "fd04::4")
NEAR = ("10.0.0.2", "fd00::2")
PODS = {"10.244.4.0/24": FAR[0], "fd00:244:4::/64": FAR[1]}
NEAR_PODS = {"10.244.2.0/24": NEAR[0], "fd00:244:2::/64": NEAR[1]}
NAME = {remote: names_of(remote)[0] for remote in (*FAR, *NEAR)}
GUE = {FouPort(family, 5555) for family in Family}


@pytest.fixture
def n1(tmp_path: Path) -> FakeNode:
    return FakeNode(new_kernel(), str(tmp_path), others={"n2": NEAR, "n4": FAR}, learned={**PODS, **NEAR_PODS})


def through(n1: FakeNode) -> dict[str, str]:
    """Prefix to device or gateway of our routes."""
    return {prefix: entry.device or entry.gateway for prefix, entry in n1.ours().items()}


def test_a_clean_node_gets_everything_in_both_families(n1: FakeNode) -> None:
    result = n1.reconcile()
    assert result.failures == []
    assert result.warnings == []
    assert n1.devices == {
        NAME[FAR[0]]: Tunnel(OWN[0], FAR[0], mtu=1480),
        NAME[FAR[1]]: Tunnel(OWN[1], FAR[1], mtu=1460),
    }
    assert through(n1) == NEAR_PODS | {prefix: NAME[hop] for prefix, hop in PODS.items()}
    entry = n1.ours()["10.244.4.0/24"]
    assert (entry.source, entry.mtu, entry.advmss) == (OWN[0], 1480, 1440)
    assert {prefix: entry.device for prefix, entry in n1.ours(77).items()} == {
        "10.4.0.4/32": NAME[FAR[0]],
        "fd04::4/128": NAME[FAR[1]],
    }
    assert {(rule.source, rule.protocol) for rule in n1.overlay.rules} == {(cidr, 17) for cidr in OWN_CIDRS}
    assert n1.overlay.ports == GUE
    assert result.counters["host_tunnels_added"] == 2
    assert result.counts["host_tunnels_synced"] == 2


def test_law_2_the_same_again_and_a_restart_write_nothing(n1: FakeNode) -> None:
    n1.reconcile()
    before = n1.writes
    n1.reconcile()
    n1.reconcile(observe=True)
    assert n1.writes == before
    n1.start()
    result = n1.reconcile()
    assert (n1.writes, result.writes, result.failures) == (0, 0, [])


def test_one_changed_prefix_costs_one_message_however_many_stand(n1: FakeNode) -> None:
    n1.learned |= {f"10.{number}.0.0/16": FAR[0] for number in range(100, 200)}
    n1.reconcile()
    before = n1.writes
    n1.learned["10.100.0.0/16"] = NEAR[0]
    n1.reconcile(frozenset({"10.100.0.0/16"}))
    assert n1.writes == before + 1
    n1.learned["10.201.0.0/16"] = FAR[0]
    n1.reconcile(frozenset({"10.201.0.0/16"}))
    assert n1.writes == before + 2


def test_direct_and_tunnelled_change_in_place(n1: FakeNode) -> None:
    n1.reconcile()
    gone = []
    standing = set(n1.ours())
    n1.before = lambda: gone.extend(standing - n1.ours().keys())
    for kind in ("full", "subnet"):
        n1.start(overlay_type=kind)
        assert n1.reconcile().failures == []
        wanted = {hop: NAME[hop] for hop in (FAR if kind == "subnet" else (*FAR, *NEAR))}
        assert through(n1) == {prefix: wanted.get(hop, hop) for prefix, hop in n1.learned.items()}
        assert set(n1.devices) == set(wanted.values())
    assert gone == []


def test_encapsulation_and_port_change_in_place_and_no_device_is_made_anew(n1: FakeNode) -> None:
    n1.reconcile()
    lost = []
    devices, routes = set(n1.devices), set(n1.ours())
    n1.before = lambda: lost.extend([*(devices - n1.devices.keys()), *(routes - n1.ours().keys())])
    for port, changed in (
        (5555, {"overlay_encap": "fou"}),
        (6000, {"overlay_encap_port": 6000, "overlay_encap_accept_ports": (5555,)}),
        (0, {"overlay_encap": "ipip", "overlay_encap_accept_ports": ()}),
    ):
        n1.start(**changed)
        assert n1.reconcile().failures == []
        assert {tunnel.port for tunnel in n1.devices.values()} == {port}
        extra = 12 if port else 0
        assert {tunnel.mtu for tunnel in n1.devices.values()} == {1480 - extra, 1460 - extra}
        assert n1.ours()["10.244.4.0/24"].mtu == 1480 - extra
        assert set(n1.devices) == devices
    assert lost == []


def test_ports_of_ours_are_closed_when_no_flag_names_them_and_others_never(n1: FakeNode) -> None:
    n1.overlay.ports |= {FouPort(Family.IPV4, 4444), FouPort(Family.IPV4, 6000)}
    n1.start(overlay_encap="fou", overlay_encap_accept_ports=(6000, 7000))
    n1.reconcile()
    mine = GUE | {FouPort(family, 7000) for family in Family} | {FouPort(Family.IPV6, 6000)}
    theirs = {FouPort(Family.IPV4, 4444), FouPort(Family.IPV4, 6000)}
    assert n1.overlay.ports == mine | theirs
    n1.start(overlay_encap_accept_ports=())
    assert n1.reconcile().failures == []
    assert n1.overlay.ports == GUE | theirs
    n1.start(enable_overlay=False)
    n1.reconcile()
    assert n1.overlay.ports == theirs


def test_a_closed_port_is_noticed_and_opened(n1: FakeNode) -> None:
    n1.reconcile()
    assert not n1.sync.ports_differ()
    n1.overlay.ports.clear()
    assert n1.sync.ports_differ()
    n1.reconcile(observe=True)
    assert n1.overlay.ports == GUE


def test_without_fou_plain_tunnels_work_in_silence_and_others_fail_in_words(n1: FakeNode) -> None:
    n1.overlay.modules.remove("fou")
    result = n1.reconcile()
    assert (result.failures, result.warnings, len(n1.devices)) == ([], [], 2)
    n1.start(overlay_encap="fou")
    result = n1.reconcile()
    assert "kernel module fou: not found" in result.warnings
    assert any(failure.phase == "overlay-ports" for failure in result.failures)
    # What stands goes on: plain tunnels are received everywhere.
    assert set(through(n1)) == set(n1.learned)


def test_a_port_that_a_program_holds_is_a_failure_only_where_it_is_needed(n1: FakeNode) -> None:
    n1.overlay.busy_ports = set(GUE)
    result = n1.reconcile()
    assert result.failures == []
    assert result.warnings == [f"UDP {port} cannot be opened: Address already in use" for port in sorted(GUE)]
    n1.start(overlay_encap="fou")
    assert {failure.phase for failure in n1.reconcile().failures} == {"overlay-ports"}
    assert set(through(n1)) == set(n1.learned)


@pytest.mark.parametrize("observe", [False, True])
def test_law_5_a_missing_module_is_one_line_and_stops_nothing_else(n1: FakeNode, observe: bool) -> None:
    n1.overlay.modules.remove("ip6tnl")
    n1.others["n5"] = ("10.4.0.5", "fd04::5")
    n1.learned["fd00:244:5::/64"] = "fd04::5"
    result = n1.reconcile()
    first = min(names_of("fd04::5")[0], NAME[FAR[1]])
    remote = "fd04::5" if first == names_of("fd04::5")[0] else FAR[1]
    assert [str(failure) for failure in result.failures] == [
        f"tunnels: add 2 tunnels, first {first} to {remote}: Operation not supported"
    ]
    assert through(n1) == NEAR_PODS | {"10.244.4.0/24": NAME[FAR[0]]}
    n1.overlay.modules.add("ip6tnl")
    assert n1.reconcile(observe=observe).failures == []
    assert set(through(n1)) == set(n1.learned)


def test_a_route_waits_as_it_is_while_its_tunnel_cannot_be_made(n1: FakeNode) -> None:
    n1.reconcile()
    n1.overlay.modules.remove("ipip")
    n1.start(overlay_type="full")
    assert len(n1.reconcile().failures) == 1
    assert through(n1)["10.244.2.0/24"] == NEAR[0]
    assert through(n1)["fd00:244:2::/64"] == NAME[NEAR[1]]


def test_tunnels_go_with_their_last_route_and_not_before(n1: FakeNode) -> None:
    n1.learned["10.99.0.0/16"] = FAR[0]
    n1.reconcile()
    del n1.learned["10.99.0.0/16"]
    n1.reconcile(frozenset({"10.99.0.0/16"}))
    assert set(n1.devices) == {NAME[FAR[0]], NAME[FAR[1]]}
    del n1.learned["10.244.4.0/24"]
    result = n1.reconcile(frozenset({"10.244.4.0/24"}))
    assert set(n1.devices) == {NAME[FAR[1]]}
    assert set(n1.ours(77)) == {"fd04::4/128"}
    assert result.counters["host_tunnels_removed"] == 1


def test_a_device_that_a_route_still_leads_through_stays(n1: FakeNode) -> None:
    n1.reconcile()
    device = NAME[FAR[0]]
    n1.sync.release(FAR[0])
    result = Collected()
    n1.sync.sweep(lambda: frozenset({device}), False, result)
    assert device in n1.devices
    n1.sync.sweep(frozenset, False, result)
    assert device not in n1.devices


def test_law_1_held_deletions_keep_routes_and_tunnels(n1: FakeNode) -> None:
    n1.reconcile()
    n1.learned.clear()
    n1.others.clear()
    n1.reconcile(hold=True)
    n1.start()
    n1.reconcile(hold=True)
    assert len(n1.devices) == 2
    assert len(n1.ours()) == 4
    n1.reconcile()
    assert (dict(n1.devices), n1.ours(), n1.ours(77)) == ({}, {}, {})


def test_a_node_that_comes_to_be_known_gets_its_tunnel_and_loses_it_again(n1: FakeNode) -> None:
    n1.others.clear()
    result = n1.reconcile()
    assert set(through(n1)) == set(NEAR_PODS)
    assert len(result.warnings) == 2
    n1.others["n4"] = FAR
    assert n1.reconcile(frozenset()).warnings == []
    assert set(through(n1)) == set(n1.learned)
    del n1.others["n4"]
    n1.reconcile(frozenset())
    assert (set(through(n1)), dict(n1.devices)) == (set(NEAR_PODS), {})


def test_a_host_route_of_a_node_that_comes_to_be_known_is_no_longer_tunnelled(n1: FakeNode) -> None:
    n1.learned["10.5.0.5/32"] = FAR[0]
    n1.reconcile()
    assert "10.5.0.5/32" in through(n1)
    n1.others["n5"] = ("10.5.0.5",)
    n1.reconcile(frozenset())
    assert "10.5.0.5/32" not in through(n1)


def legacy(n1: FakeNode) -> None:
    """As v1 left it: bound to the interface."""
    n1.overlay.put("tun-10404", Tunnel(OWN[0], FAR[0], mtu=1480, link=2))


def unbound(n1: FakeNode) -> None:
    """As v1 left it on a node whose address is on lo."""
    n1.overlay.put("tun-10404", Tunnel(OWN[0], FAR[0], mtu=1480))


@pytest.mark.parametrize("left", [legacy, unbound])
def test_a_used_device_under_an_old_name_gives_way_without_a_gap(
    n1: FakeNode, left: Callable[[FakeNode], None]
) -> None:
    left(n1)
    n1.overlay.kernel.table.append(TableEntry(Prefix("10.244.4.0/24"), 0, 17, "", "tun-10404", OWN[0]))
    gap = []
    n1.before = lambda: (
        gap.append("10.244.4.0/24" not in n1.ours())
        or gap.append(  # type: ignore[func-returns-value]
            not any(tunnel.remote == FAR[0] for tunnel in n1.devices.values())
        )
    )
    assert n1.reconcile().failures == []
    assert set(n1.devices) == {NAME[FAR[0]], NAME[FAR[1]]}
    assert not any(gap)


def test_what_an_earlier_run_left_goes_and_what_is_foreign_stays(n1: FakeNode) -> None:
    n1.learned.clear()
    foreign = {
        "mytunnel": Tunnel(OWN[0], "10.7.0.7"),
        "tun-theirs": Tunnel(OWN[0], "10.7.0.8"),
        names_of("10.7.0.1")[0]: Tunnel(OWN[0], "10.7.0.2"),
        "tunl0": Tunnel("", "", up=False),
    }
    ours = {
        names_of("10.8.0.1")[0]: Tunnel(OWN[0], "10.8.0.1"),
        "tun-10802": Tunnel("10.0.0.99", "10.8.0.2", link=2),
        names_of("fd08::1")[1]: Tunnel(OWN[1], "fd08::1", port=5555),
        RECEIVERS[Family.IPV6]: Tunnel(OWN[1], ""),
    }
    for name, tunnel in (foreign | ours).items():
        n1.overlay.put(name, tunnel)
    theirs = TableEntry(Prefix("10.7.0.7/32"), 0, 3, "", "mytunnel")
    n1.overlay.kernel.overlay_table += [theirs, TableEntry(Prefix("10.8.0.2/32"), 0, 3, "", "tun-10802")]
    n1.overlay.add_rule(PodRule("10.77.0.0/16", 0))
    n1.overlay.add_rule(PodRule("10.78.0.0/16", 17))
    rule = n1.overlay.rules[1]
    assert n1.reconcile().failures == []
    assert n1.devices == foreign
    assert n1.overlay.kernel.overlay_table == [theirs]
    assert [each for each in n1.overlay.rules if each.source not in OWN_CIDRS] == [rule]


@pytest.mark.parametrize(
    "altered",
    [
        {"local": "10.0.0.99"},
        {"remote": "10.9.9.9"},
        {"ttl": 64, "pmtudisc": True},
        {"port": 4444},
        {"port": -1},
        {"mtu": 1280},
        {"link": 2},
        {"up": False},
    ],
)
@pytest.mark.parametrize("restart", [False, True])
def test_an_altered_device_is_noticed_and_mended(n1: FakeNode, altered: dict[str, object], restart: bool) -> None:
    n1.reconcile()
    name = NAME[FAR[0]]
    right = n1.devices[name]
    wrong = right._replace(**altered)  # type: ignore[arg-type]
    n1.overlay.put(name, wrong)
    assert n1.sync.tunnel_matters(TunnelEvent(name, wrong, gone=False))
    assert not n1.sync.tunnel_matters(TunnelEvent(name, right, gone=False))
    if restart:
        n1.start()
    assert n1.reconcile(observe=True).failures == []
    assert n1.devices[name] == right
    assert set(through(n1)) == set(n1.learned)


def test_a_removed_device_comes_back_with_its_routes(n1: FakeNode) -> None:
    n1.reconcile()
    name = NAME[FAR[0]]
    gone = TunnelEvent(name, n1.devices[name], gone=True)
    n1.overlay.remove(name)
    assert n1.sync.tunnel_matters(gone)
    n1.overlay.remove(NAME[FAR[1]])
    # The look at the overlay finds out that routes must have gone too.
    result = n1.reconcile(frozenset(), look=True)
    assert result.failures == []
    assert set(through(n1)) == set(n1.learned)
    assert len(n1.ours(77)) == 2
    assert result.counters["host_tunnels_added"] == 2


def test_removed_rules_and_routes_of_table_77_are_noticed_and_put_back(n1: FakeNode) -> None:
    n1.reconcile()
    rule = n1.overlay.rules.pop()
    assert n1.sync.rule_matters(RuleEvent(rule, gone=True))
    assert not n1.sync.rule_matters(RuleEvent(PodRule("10.77.0.0/16", 0), gone=True))
    entry = n1.overlay.kernel.overlay_table.pop()
    family = Family.IPV6 if ":" in entry.prefix else Family.IPV4
    event = KernelRoute(entry.prefix, family, 77, 17, entry.metric, "", False)
    assert n1.sync.host_matters(event, True)
    n1.reconcile(observe=True)
    assert {rule.source for rule in n1.overlay.rules} == set(OWN_CIDRS)
    assert len(n1.ours(77)) == 2


def test_a_foreign_route_in_table_77_stays_and_is_told(n1: FakeNode) -> None:
    entry = TableEntry(Prefix("10.4.0.4/32"), 0, 4, "10.0.0.2")
    n1.overlay.kernel.overlay_table.append(entry)
    result = n1.reconcile()
    assert result.failures == []
    assert result.warnings == ["table 77 has another route for 10.4.0.4/32; it stays"]
    assert entry in n1.overlay.kernel.overlay_table


def test_rules_of_kube_router_are_replaced_and_go_with_the_overlay(n1: FakeNode) -> None:
    n1.overlay.add_rule(PodRule(OWN_CIDRS[0], 0))
    n1.reconcile()
    assert sorted((rule.source, rule.protocol) for rule in n1.overlay.rules) == [(cidr, 17) for cidr in OWN_CIDRS]
    n1.start(enable_overlay=False)
    n1.reconcile()
    assert n1.overlay.rules == []
    assert dict(n1.devices) == {}
    assert through(n1) == NEAR_PODS


def test_two_remotes_of_one_name_have_a_device_each_whoever_comes_first(n1: FakeNode) -> None:
    a, b = "21.3.0.4", "2.13.0.4"
    n1.others = {"a": (a,), "b": (b,)}
    for first, second in ((a, b), (b, a)):
        n1.learned = {"10.61.0.0/16": first}
        n1.reconcile()
        n1.learned["10.62.0.0/16"] = second
        n1.reconcile()
        wanted = {names_of(first)[0]: first, names_of(second)[1]: second}
        for _ in range(2):
            assert {name: tunnel.remote for name, tunnel in n1.devices.items()} == wanted
            assert through(n1) == {"10.61.0.0/16": names_of(first)[0], "10.62.0.0/16": names_of(second)[1]}
            n1.start()
            n1.reconcile()
            assert n1.writes == 0
        n1.learned = {}
        n1.reconcile()
        assert dict(n1.devices) == {}


def test_a_foreign_link_in_the_place_of_a_name_costs_the_second_name(n1: FakeNode) -> None:
    n1.overlay.others[NAME[FAR[0]]] = "veth"
    both = links("10.0.0.1/24", "fd00::1/64")
    veth = links(kind="veth").links[0]
    n1.links = type(both)((*both.links, type(veth)(9, NAME[FAR[0]], kind="veth")))
    assert n1.reconcile().failures == []
    assert through(n1)["10.244.4.0/24"] == names_of(FAR[0])[1]


def test_the_underlays_mtu_is_followed(n1: FakeNode) -> None:
    n1.reconcile()
    n1.links = links("10.0.0.1/24", "fd00::1/64", mtu=9000)
    assert n1.reconcile().failures == []
    assert {tunnel.mtu for tunnel in n1.devices.values()} == {8980, 8960}
    assert n1.ours()["fd00:244:4::/64"].advmss == 8900


def test_a_record_that_cannot_be_written_is_told_and_the_port_opened(n1: FakeNode, tmp_path: Path) -> None:
    (tmp_path / "router").write_text("in the way")
    result = n1.reconcile()
    assert result.failures == []
    assert any("fou-ports.json" in warning for warning in result.warnings)
    assert n1.overlay.ports == GUE


@pytest.mark.parametrize("content", ["", "rubbish", '{"version":1,"ports":[[5,1]]}', '{"version":1}'])
def test_a_record_that_cannot_be_read_is_no_record(n1: FakeNode, tmp_path: Path, content: str) -> None:
    n1.reconcile()
    (tmp_path / "router/fou-ports.json").write_text(content)
    n1.start(enable_overlay=False)
    assert n1.reconcile().failures == []
    assert n1.overlay.ports == GUE  # nobody knows any more whose they are
