"""One suite for the real kernel and the fake one: what a driver may rely on, and what it is refused.

Every test says what the kernel does; the fake must do the same, or the tests that build on it prove nothing.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
from support.fake_kernel import METRIC, FakeKernel, FakeRoutes, FakeRules, FakeSets, TableEntry
from support.namespaces import Namespace, namespaces

from kube_router.workers.kernel.ipset import SetDriver, SetError, SetFull, SetReferenced
from kube_router.workers.kernel.iptables import IptablesError, Programs, RuleDriver
from kube_router.workers.kernel.routes import RouteDriver
from kube_router.workers.model import Family
from kube_router.workers.routefacts import ActualRoutes, Prefix, Route, RoutePlan
from kube_router.workers.rulefacts import Members, RulePlan, RuleStep, RuleText, SetName, SetSpec, plan_set

PREFIX = {Family.IPV4: Prefix("10.9.0.0/16"), Family.IPV6: Prefix("2001:db8:9::/48")}
NEXT_HOP = {Family.IPV4: "10.0.0.2", Family.IPV6: "fd00::2"}
OTHER_HOP = {Family.IPV4: "10.0.0.3", Family.IPV6: "fd00::3"}
UNREACHABLE = {Family.IPV4: "192.0.2.1", Family.IPV6: "2001:db8:ffff::1"}
MEMBERS = {Family.IPV4: ["10.1.0.0/16", "10.2.0.1"], Family.IPV6: ["fd01::/64", "fd02::1"]}


@dataclass
class FakeHost:
    """The fake kernel, with what a foreign hand can do to it."""

    kernel: FakeKernel

    def __post_init__(self) -> None:
        self.routes, self.sets, self.rules = FakeRoutes(self.kernel), FakeSets(self.kernel), FakeRules(self.kernel)

    def foreign_route(self, prefix: Prefix, gateway: str, protocol: int = 4, metric: int | None = None) -> None:
        default = METRIC[6 if ":" in prefix else 4]
        self.kernel.table.append(TableEntry(prefix, default if metric is None else metric, protocol, gateway))

    def protocols(self, prefix: Prefix) -> list[int]:
        return sorted(entry.protocol for entry in self.kernel.table if entry.prefix == prefix)

    def foreign_set(self, name: str, kind: str, family: Family) -> None:
        self.kernel.sets[name] = (SetSpec(SetName(name), cast(Any, kind), family), set())


@dataclass
class KernelHost:
    """A network namespace with two connected subnets."""

    namespace: Namespace
    backend: str

    def __post_init__(self) -> None:
        # Without link-local addresses: their routes would come in the middle of a test, when the link has its carrier.
        self.namespace.run("ip link add x type veth peer name y")
        self.namespace.run("ip link set x addrgenmode none; ip link set y addrgenmode none; ip link set y up")
        self.namespace.run("ip address add 10.0.0.1/24 dev x; ip address add fd00::1/64 dev x nodad; ip link set x up")
        self.routes, self.sets = RouteDriver(), SetDriver()
        self.rules = RuleDriver(Programs(cast(Any, self.backend), f"-{self.backend}", (1, 8, 9)))

    def foreign_route(self, prefix: Prefix, gateway: str, protocol: int = 4, metric: int | None = None) -> None:
        suffix = "" if metric is None else f" metric {metric}"
        self.namespace.run(f"ip route append {prefix} via {gateway} proto {protocol}{suffix}")

    def protocols(self, prefix: Prefix) -> list[int]:
        family = "-6" if ":" in prefix else "-4"
        lines = self.namespace.run(f"ip -N {family} route show {prefix} table main").splitlines()
        return sorted(int(line.split(" proto ")[1].split()[0]) for line in lines if " proto " in line)

    def foreign_set(self, name: str, kind: str, family: Family) -> None:
        self.namespace.run(f"ipset create {name} {kind} family {'inet6' if family is Family.IPV6 else 'inet'}")


Host = FakeHost | KernelHost


@pytest.fixture(params=["fake", "nft", "legacy"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    if request.param == "fake":
        kernel = FakeKernel()
        kernel.connect("10.0.0.0/24", "10.0.0.1")
        kernel.connect("fd00::/64", "fd00::1")
        yield FakeHost(kernel)
        return
    with namespaces() as (namespace,), namespace.enter():
        made = KernelHost(namespace, request.param)
        yield made
        made.routes.close()
        made.sets.close()


@pytest.fixture(params=list(Family), ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return cast(Family, request.param)


def ours(host: Host) -> ActualRoutes:
    """What is there, without the routes of others."""
    return dataclasses.replace(host.routes.observe(), foreign=frozenset())


def add(family: Family, gateway: str) -> RoutePlan:
    return RoutePlan(add=((PREFIX[family], Route(gateway)),))


def test_a_route_is_added_seen_replaced_and_removed(host: Host, family: Family) -> None:
    prefix = PREFIX[family]
    assert host.routes.apply(add(family, NEXT_HOP[family])).added == 1
    assert ours(host) == ActualRoutes({prefix: Route(NEXT_HOP[family])})
    assert host.routes.apply(RoutePlan(replace=((prefix, Route(OTHER_HOP[family])),))).added == 1
    assert ours(host) == ActualRoutes({prefix: Route(OTHER_HOP[family])})
    assert host.protocols(prefix) == [17]
    assert host.routes.apply(RoutePlan(delete=(prefix,))).removed == 1
    assert ours(host) == ActualRoutes()


def test_adding_takes_no_other_route_s_place(host: Host, family: Family) -> None:
    prefix = PREFIX[family]
    host.foreign_route(prefix, OTHER_HOP[family])
    applied = host.routes.apply(add(family, NEXT_HOP[family]))
    assert [failure.error.errno for failure in applied.failures] == [errno.EEXIST]
    assert applied.added == 0
    assert host.protocols(prefix) == [4]


def test_replacing_takes_any_route_s_place(host: Host, family: Family) -> None:
    """Why a plan replaces only where a route of ours was seen."""
    prefix = PREFIX[family]
    host.foreign_route(prefix, OTHER_HOP[family])
    host.routes.apply(RoutePlan(replace=((prefix, Route(NEXT_HOP[family])),)))
    assert host.protocols(prefix) == [17]


def test_deleting_leaves_other_protocols(host: Host, family: Family) -> None:
    prefix = PREFIX[family]
    host.foreign_route(prefix, OTHER_HOP[family])
    applied = host.routes.apply(RoutePlan(delete=(prefix,)))
    assert (applied.removed, applied.failures) == (0, ())
    assert host.protocols(prefix) == [4]


@pytest.mark.parametrize("metric", [None, 5])
def test_foreign_routes_are_seen_whatever_their_metric(host: Host, family: Family, metric: int | None) -> None:
    prefix = PREFIX[family]
    connected = host.routes.observe().foreign
    assert {"10.0.0.0/24", "fd00::/64"} <= connected
    host.foreign_route(prefix, OTHER_HOP[family], metric=metric)
    assert host.routes.observe().foreign - connected == {prefix}


def test_a_route_of_our_protocol_with_a_metric_is_a_stray(host: Host, family: Family) -> None:
    prefix = PREFIX[family]
    host.routes.apply(add(family, NEXT_HOP[family]))
    host.foreign_route(prefix, OTHER_HOP[family], protocol=17, metric=77)
    actual = host.routes.observe()
    assert actual.ours == {prefix: Route(NEXT_HOP[family])}
    assert [(stray.prefix, stray.metric) for stray in actual.strays] == [(prefix, 77)]
    assert host.routes.apply(RoutePlan(strays=actual.strays)).removed == 1
    assert ours(host) == ActualRoutes({prefix: Route(NEXT_HOP[family])})


def test_an_unreachable_gateway_is_refused_and_stops_no_other_route(host: Host, family: Family) -> None:
    good, bad = PREFIX[family], Prefix("10.8.0.0/16" if family is Family.IPV4 else "2001:db8:8::/48")
    plan = RoutePlan(add=((bad, Route(UNREACHABLE[family])), (good, Route(NEXT_HOP[family]))))
    applied = host.routes.apply(plan)
    assert [failure.prefix for failure in applied.failures] == [bad]
    assert applied.failures[0].error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
    assert host.routes.observe().ours.keys() == {good}


def net_set(family: Family, size: int = 65536) -> SetSpec:
    return SetSpec(SetName("test-nets"), "hash:net", family, size)


def test_a_set_is_made_filled_changed_counted_and_destroyed(host: Host, family: Family) -> None:
    spec, members = net_set(family), Members.of(family, MEMBERS[family])
    assert host.sets.observe(spec) is None
    assert host.sets.count(spec) is None
    host.sets.apply(plan_set(spec, None, members))
    assert host.sets.observe(spec) == members
    assert host.sets.count(spec) == 2
    fewer = Members.of(family, MEMBERS[family][:1])
    host.sets.apply(plan_set(spec, members, fewer))
    assert host.sets.observe(spec) == fewer
    assert host.sets.destroy(spec) is True
    assert host.sets.destroy(spec) is False
    assert host.sets.observe(spec) is None


def test_members_that_are_there_or_gone_already_are_no_error(host: Host, family: Family) -> None:
    spec, members = net_set(family), Members.of(family, MEMBERS[family])
    host.sets.apply(plan_set(spec, None, members))
    host.sets.apply(plan_set(spec, Members(family), members))
    assert host.sets.observe(spec) == members
    elsewhere = Members.of(family, ["10.7.0.0/16"] if family is Family.IPV4 else ["fd07::/64"])
    host.sets.apply(plan_set(spec, elsewhere, Members(family)))
    assert host.sets.observe(spec) == members


def test_a_member_for_a_set_that_is_gone_is_refused(host: Host, family: Family) -> None:
    with pytest.raises(SetError, match="test-nets"):
        host.sets.apply(plan_set(net_set(family), Members(family), Members.of(family, MEMBERS[family])))


def test_a_full_set_is_refused_by_name(host: Host, family: Family) -> None:
    with pytest.raises(SetError, match="test-nets: add: it is full"):
        host.sets.apply(plan_set(net_set(family, 1), None, Members.of(family, MEMBERS[family])))


def test_a_set_of_another_type_is_a_conflict_and_stays(host: Host, family: Family) -> None:
    host.foreign_set("test-nets", "hash:ip", family)
    for act in (host.sets.observe, host.sets.count, host.sets.destroy):
        with pytest.raises(SetError, match=r"test-nets: exists as hash:ip.* but must be hash:net"):
            act(net_set(family))
    assert host.sets.count(SetSpec(SetName("test-nets"), "hash:ip", family)) == 0


ENDPOINTS = {
    Family.IPV4: ["10.2.0.1,tcp:80", "10.2.0.1,udp:80", "10.2.0.2,sctp:65535"],
    Family.IPV6: ["fd02::1,tcp:80", "fd02::1,udp:80", "fd02::2,sctp:65535"],
}


def test_a_set_of_endpoints_is_filled_and_changed(host: Host, family: Family) -> None:
    spec = SetSpec(SetName("test-endpoints"), "hash:ip,port", family)
    members = spec.members(ENDPOINTS[family])
    host.sets.apply(plan_set(spec, None, members))
    assert host.sets.observe(spec) == members
    assert host.sets.count(spec) == 3
    host.sets.change(spec, spec.members(), spec.members(ENDPOINTS[family][1:]))
    assert host.sets.observe(spec) == spec.members(ENDPOINTS[family][:1])
    other = spec.members([ENDPOINTS[family][0].replace("tcp", "udp")])
    host.sets.change(spec, other, spec.members())
    assert len(host.sets.observe(spec) or ()) == 2


def test_a_set_of_ports_serves_both_families(host: Host) -> None:
    of = {family: SetSpec(SetName("test-ports"), "bitmap:port", family) for family in Family}
    members = of[Family.IPV4].members(["30000", "0", "65535"])
    host.sets.apply(plan_set(of[Family.IPV4], None, members))
    assert host.sets.observe(of[Family.IPV4]) == members
    host.sets.change(of[Family.IPV4], members, of[Family.IPV4].members(["0"]))
    assert host.sets.count(of[Family.IPV4]) == 2
    for family in Family:
        matching = RuleText("-p tcp -m set --match-set test-ports dst -j ACCEPT")
        host.rules.apply(rules(family, ("append", matching, 1)))
        assert host.rules.observe(family, "filter", "FORWARD") == (matching,)


def test_a_change_costs_a_message_whatever_the_set_holds(host: Host, family: Family) -> None:
    spec, members = net_set(family), Members.of(family, MEMBERS[family])
    host.sets.apply(plan_set(spec, None, members))
    writes = host.sets.writes
    host.sets.change(spec, spec.members(), spec.members())
    assert host.sets.writes == writes
    host.sets.change(spec, members, spec.members(MEMBERS[family][:1]))
    assert host.sets.writes == writes + 2
    assert host.sets.observe(spec) == spec.members(MEMBERS[family][1:])
    host.sets.remove(spec.name)
    with pytest.raises(SetError, match="test-nets: delete"):
        host.sets.change(spec, spec.members(), members)


def test_names_are_listed_by_what_is_asked_for(host: Host, family: Family) -> None:
    assert host.sets.names(lambda name: True) == frozenset()
    host.foreign_set("foreign", "hash:ip", family)
    host.sets.apply(plan_set(net_set(family), None, Members(family)))
    assert host.sets.names(lambda name: True) == {"foreign", "test-nets"}
    assert host.sets.names(lambda name: name.startswith("test-")) == {"test-nets"}


def test_a_set_that_is_too_small_is_replaced_under_the_rules_that_name_it(host: Host, family: Family) -> None:
    small, members = net_set(family, 1), Members.of(family, MEMBERS[family])
    host.sets.apply(plan_set(small, None, Members.of(family, MEMBERS[family][:1])))
    matching = RuleText("-m set --match-set test-nets src -j ACCEPT")
    host.rules.apply(rules(family, ("append", matching, 1)))
    with pytest.raises(SetFull):
        host.sets.change(small, members, small.members())
    with pytest.raises(SetFull):
        host.sets.replace(small, members, SetName("test-spare"))
    assert host.sets.observe(small) == Members.of(family, MEMBERS[family][:1])
    host.sets.replace(net_set(family, 2), members, SetName("test-spare"))
    assert host.sets.observe(small) == members
    assert host.sets.names(lambda name: True) == {"test-nets"}
    assert host.rules.observe(family, "filter", "FORWARD") == (matching,)
    with pytest.raises(SetReferenced):
        host.sets.remove(SetName("test-nets"))


def test_a_set_is_removed_by_name_whatever_its_type(host: Host, family: Family) -> None:
    host.foreign_set("KUBE-OLD", "hash:ip", family)
    assert host.sets.remove(SetName("KUBE-OLD")) is True
    assert host.sets.remove(SetName("KUBE-OLD")) is False


ACCEPT = RuleText("-i a -j ACCEPT")
DROP = RuleText("-i b -j DROP")
OTHER = RuleText('-i c -m comment --comment "two words" -j ACCEPT')


def rules(family: Family, *steps: tuple[str, RuleText, int]) -> RulePlan:
    return RulePlan(family, "filter", tuple(RuleStep(cast(Any, verb), "FORWARD", rule, at) for verb, rule, at in steps))


def test_rules_are_inserted_appended_and_deleted(host: Host, family: Family) -> None:
    host.rules.apply(rules(family, ("append", DROP, 1), ("insert", ACCEPT, 1), ("insert", OTHER, 2)))
    assert host.rules.observe(family, "filter", "FORWARD") == (ACCEPT, OTHER, DROP)
    host.rules.apply(rules(family, ("delete", OTHER, 1)))
    assert host.rules.observe(family, "filter", "FORWARD") == (ACCEPT, DROP)


def test_a_deletion_takes_one_of_two_equal_rules(host: Host, family: Family) -> None:
    host.rules.apply(rules(family, ("append", ACCEPT, 1), ("append", ACCEPT, 1), ("delete", ACCEPT, 1)))
    assert host.rules.observe(family, "filter", "FORWARD") == (ACCEPT,)


@pytest.mark.parametrize("bad", [("delete", OTHER, 1), ("insert", OTHER, 9)])
def test_rule_steps_happen_together_or_not_at_all(host: Host, family: Family, bad: tuple[str, RuleText, int]) -> None:
    host.rules.apply(rules(family, ("append", ACCEPT, 1)))
    with pytest.raises(IptablesError):
        host.rules.apply(rules(family, ("append", DROP, 1), bad))
    assert host.rules.observe(family, "filter", "FORWARD") == (ACCEPT,)


def test_a_rule_cannot_name_a_missing_set_and_keeps_the_one_it_names(host: Host, family: Family) -> None:
    matching = RuleText("-m set --match-set test-nets src -j ACCEPT")
    with pytest.raises(IptablesError):
        host.rules.apply(rules(family, ("append", matching, 1)))
    host.sets.apply(plan_set(net_set(family), None, Members(family)))
    host.rules.apply(rules(family, ("append", matching, 1)))
    assert host.rules.observe(family, "filter", "FORWARD") == (matching,)
    with pytest.raises(SetError, match="something still refers to it"):
        host.sets.destroy(net_set(family))
    host.rules.apply(rules(family, ("delete", matching, 1)))
    if isinstance(host, FakeHost) or host.backend == "legacy":
        assert host.sets.destroy(net_set(family)) is True  # nftables lets go of it a moment later
