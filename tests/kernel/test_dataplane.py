"""The router's dataplane on the real kernel: what it writes, what it leaves alone, what it puts back."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from support.dataplane import DUAL_STACK, RunningDataplane, connect, facts, pod_routes, state
from support.namespaces import Namespace

from kube_router.workers.model import Family
from kube_router.workers.router.dataplane import cleanup
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings

SINGLE_STACK = Settings(enable_ipv6=False)
FORWARD = [
    '-A FORWARD -o eth0 -m comment --comment "allow outbound node port traffic on node interface with which node ip is '
    'associated" -j ACCEPT',
    '-A FORWARD -o kube-bridge -m comment --comment "allow inbound traffic to pods" -j ACCEPT',
    '-A FORWARD -i kube-bridge -m comment --comment "allow outbound traffic from pods" -j ACCEPT',
]
ROUTES = {"-4": "10.244.2.0/24 via 10.0.0.2 dev eth0 proto 17", "-6": "fd00:244:2::/64 via fd00::2 dev eth0 proto 17"}


@pytest.fixture(params=["nft", "legacy"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def node(backend: str, new_netns: Callable[[], Namespace]) -> Iterator[Namespace]:
    """Node n1's namespace with node n2 on the same link; the test runs inside. A hint chain decides the backend."""
    namespace = new_netns()
    connect(namespace, new_netns())
    namespace.run(f"iptables-{backend} -t mangle -N KUBE-IPTABLES-HINT")
    with namespace.enter():
        yield namespace


@contextlib.contextmanager
def nothing_written(namespace: Namespace) -> Iterator[None]:
    """Neither rtnetlink nor nftables tells of any change of a route, link, rule or set during the block."""
    watchers = [
        namespace.start(command, stdout=subprocess.PIPE) for command in (["ip", "monitor", "all"], ["nft", "monitor"])
    ]
    time.sleep(0.3)
    yield
    time.sleep(0.3)
    seen = ""
    for watcher in watchers:
        watcher.terminate()
        seen += watcher.communicate()[0]
    # Neighbour discovery goes on by itself.
    assert [line for line in seen.splitlines() if "lladdr" not in line and "FAILED" not in line] == []


def forward_chain(namespace: Namespace, program: str) -> list[str]:
    return [line for line in namespace.run(f"{program} -S FORWARD").splitlines() if line.startswith("-A")]


def test_a_clean_node_gets_routes_sets_and_rules_of_both_families(node: Namespace, backend: str) -> None:
    outcome = RunningDataplane().reconcile()
    assert outcome.failures == ()
    # Node n3 exists for BGP only; its next hop is on the subnet all the same.
    assert outcome.counts["host_routes_synced"] == 4
    for family, route in ROUTES.items():
        assert route in node.run(f"ip {family} route")
    for program in ("iptables", "ip6tables"):
        prefix = "inet6:" if program == "ip6tables" else ""
        pods, nodes = f"{prefix}kube-router-pod-subnets", f"{prefix}kube-router-node-ips"
        assert forward_chain(node, f"{program}-{backend}") == FORWARD
        assert node.run(f"{program}-{backend} -t nat -S POSTROUTING").splitlines()[1:] == [
            f"-A POSTROUTING -m set --match-set {pods} src -m set ! --match-set {pods} dst "
            f"-m set ! --match-set {nodes} dst -j MASQUERADE --random-fully"
        ]
    sets = node.run("ipset save").splitlines()
    added = {line.removesuffix(" timeout 0") for line in sets if line.startswith("add")}
    assert added == {
        *(f"add kube-router-pod-subnets 10.244.{n}.0/24" for n in (1, 2, 3)),
        *(f"add kube-router-node-ips 10.0.0.{n}" for n in (1, 2, 3)),
        *(f"add inet6:kube-router-pod-subnets fd00:244:{n}::/64" for n in (1, 2, 3)),
        *(f"add inet6:kube-router-node-ips fd00::{n}" for n in (1, 2, 3)),
    }
    for name, kind, family in (
        ("kube-router-pod-subnets", "hash:net", "inet"),
        ("inet6:kube-router-node-ips", "hash:ip", "inet6"),
    ):
        header = f"create {name} {kind} family {family} hashsize 1024 maxelem 65536 timeout 0"
        assert any(line.startswith(header) for line in sets)


def test_law_2_a_restart_with_nothing_changed_writes_nothing(node: Namespace, backend: str) -> None:
    RunningDataplane().reconcile()
    before = state(node, backend)
    with nothing_written(node):
        restarted = RunningDataplane()
        assert restarted.reconcile().writes == 0
        assert restarted.dataplane.writes == 0
        assert restarted.reconcile(Trigger(period=True)).writes == 0
    assert state(node, backend) == before


def test_the_watch_for_writes_sees_a_write(netns: Namespace) -> None:
    """The checker of law 2 can fail."""
    for command in ("ip route add 10.5.0.0/16 dev lo proto 17", "iptables-nft -A FORWARD -j ACCEPT"):
        with pytest.raises(AssertionError), nothing_written(netns):
            netns.run(command)


def test_own_writes_do_not_wake_for_ever(node: Namespace) -> None:
    running = RunningDataplane()
    running.reconcile()
    deadline = time.monotonic() + 2.5
    wakes = 0
    while time.monotonic() < deadline:
        if running.woken_within(deadline - time.monotonic()):
            wakes += 1
            assert running.reconcile(Trigger(woken=True), frozenset()).writes == 0
    assert wakes <= 1


def test_foreign_state_survives_everything(node: Namespace, backend: str) -> None:
    node.run(
        "ip link add other type veth peer name other2; ip link set other up; ip link set other2 up;"
        "ip route add 172.16.0.0/16 via 10.0.0.9; ip route add 172.17.0.0/16 via 10.0.0.9 proto 18;"
        "ip route add 172.18.0.0/16 via 10.0.0.9 proto 17 table 99;"
        "ip -6 route add 2001:db8::/32 via fd00::9; ip -6 route add 2001:db9::/32 via fd00::9 proto bird;"
        "ip rule add from 1.2.3.4 lookup 99;"
        "ipset create theirs hash:net; ipset add theirs 10.0.0.0/8; ipset create kube-router-svip hash:ip;"
        f"iptables-{backend} -A FORWARD -i kube-bridge -c 7 420 -j ACCEPT; iptables-{backend} -N THEIRS;"
        f"iptables-{backend} -A THEIRS -m set --match-set theirs src -j DROP;"
        f"ip6tables-{backend} -A FORWARD -i other -c 3 180 -j DROP;"
        f"iptables-{backend} -t nat -A POSTROUTING -s 10.99.0.0/16 -j MASQUERADE;"
        f"iptables-{backend} -t nat -A POSTROUTING -m set --match-set theirs src -j MASQUERADE"
    )
    # Makes the built-in chains, which nobody removes, so that the comparison below is exact.
    for program in (f"iptables-{backend}", f"ip6tables-{backend}"):
        for table in ("filter", "nat"):
            node.run(
                f"{program} -t {table} -A INPUT -i nobody -j ACCEPT; {program} -t {table} -A OUTPUT -o nobody -j ACCEPT"
            )
        node.run(f"{program} -A FORWARD -i nobody -j ACCEPT; {program} -t nat -A POSTROUTING -o nobody -j ACCEPT")
        node.run(f"{program} -t nat -A PREROUTING -i nobody -j ACCEPT")
    before = state(node, backend)
    running = RunningDataplane()
    assert running.reconcile().failures == ()
    middle = state(node, backend)
    assert set(before.splitlines()) <= set(middle.splitlines())
    running.nodes = (facts(1),)
    running.learned = {}
    running.reconcile()
    assert set(before.splitlines()) <= set(state(node, backend).splitlines())
    assert cleanup(DUAL_STACK) == []
    assert state(node, backend) == before


def test_cleanup_takes_both_families_and_kinds_whatever_is_enabled(node: Namespace) -> None:
    RunningDataplane().reconcile()
    other = ("iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy")
    pods = "--match-set {0}kube-router-pod-subnets"
    old = f"-m set {pods} src -m set ! {pods} dst -j MASQUERADE"
    for program in other:
        node.run(f"{program} -t nat -A POSTROUTING " + old.format("inet6:" if "ip6" in program else ""))
        node.run(f"{program} -A FORWARD " + FORWARD[0].removeprefix("-A FORWARD "))
    assert cleanup(SINGLE_STACK) == []
    rules = node.run("; ".join(f"{program}-save" for program in other))
    assert [line for line in rules.splitlines() if line.startswith("-A")] == []
    assert node.run("ipset list -n") == ""
    assert node.run("ip route show proto 17; ip -6 route show proto 17") == ""
    assert cleanup(DUAL_STACK) == []


def test_cleanup_says_which_set_somebody_else_still_uses(node: Namespace, backend: str) -> None:
    RunningDataplane().reconcile()
    node.run(f"iptables-{backend} -A INPUT -m set --match-set kube-router-node-ips src -j ACCEPT")
    failures = cleanup(DUAL_STACK)
    assert [str(failure) for failure in failures] == [
        "ipset: ipset kube-router-node-ips: destroy: something still refers to it"
    ]
    assert node.run("ipset list -n").split() == ["kube-router-node-ips"]


ROUTE, SET, RULE = "route", "ipset", "rule"
BOTH_ROUTES = "ip route show 10.244.2.0/24 proto 17 | grep . && ip -6 route show fd00:244:3::/64 proto 17 | grep ."
REMOVALS = {
    "ipv4 route": ("ip route del 10.244.2.0/24", "ip route show 10.244.2.0/24 proto 17", {ROUTE: 1}),
    "ipv6 route": ("ip -6 route del fd00:244:2::/64", "ip -6 route show fd00:244:2::/64 proto 17", {ROUTE: 1}),
    "ipv4 next hop": (
        "ip route replace 10.244.2.0/24 via 10.0.0.77 proto 17",
        "ip route show 10.244.2.0/24 via 10.0.0.2 proto 17",
        {ROUTE: 1},
    ),
    "all routes of protocol 17": (
        "ip route flush proto 17; ip -6 route flush proto 17",
        BOTH_ROUTES,
        {ROUTE: 4},
    ),
    # As systemd-networkd does at its start with all routes that are not its own (ManageForeignRoutes=yes).
    "all routes with a next hop": (
        "ip route flush scope global table main; ip -6 route flush table main proto 17",
        BOTH_ROUTES,
        {ROUTE: 4},
    ),
    "link down and up": (
        "ip link set eth0 down; ip link set eth0 up; ip -6 address replace fd00::1/64 dev eth0 nodad",
        BOTH_ROUTES,
        {ROUTE: 4},
    ),
    "ipv4 forward accept": (
        "iptables-{0} -D FORWARD 2",
        "iptables-{0} -S FORWARD | grep -e '-o kube-bridge'",
        {RULE: 1},
    ),
    "ipv6 forward chain": ("ip6tables-{0} -F FORWARD", "ip6tables-{0} -S FORWARD | grep -e '-o eth0'", {RULE: 3}),
    "ipv4 masquerade": ("iptables-{0} -t nat -F", "iptables-{0} -t nat -S POSTROUTING | grep node-ips", {RULE: 1}),
    "ipv6 masquerade": ("ip6tables-{0} -t nat -F", "ip6tables-{0} -t nat -S POSTROUTING | grep node-ips", {RULE: 1}),
    "ipv4 set": (
        "ipset flush kube-router-pod-subnets",
        "ipset test kube-router-pod-subnets 10.244.3.9 2>&1 | grep -v NOT",
        {SET: 1},
    ),
    "ipv6 member": (
        "ipset del inet6:kube-router-node-ips fd00::3",
        "ipset test inet6:kube-router-node-ips fd00::3 2>&1 | grep -v NOT",
        {SET: 1},
    ),
    "both sets of ipv4, and their rule": (
        "iptables-{0} -t nat -F POSTROUTING; sleep 0.1; "
        "ipset destroy kube-router-node-ips; ipset destroy kube-router-pod-subnets",
        "ipset test kube-router-node-ips 10.0.0.2 2>/dev/null && iptables-{0} -t nat -S POSTROUTING | grep node-ips",
        {RULE: 1, SET: 2},
    ),
}


@pytest.mark.parametrize("what", REMOVALS)
def test_what_somebody_removes_is_back_within_a_second_told_and_counted(
    node: Namespace, backend: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    removal, check, kinds = REMOVALS[what]
    removal, check = removal.format(backend), check.format(backend)
    running = RunningDataplane()
    running.reconcile()
    assert node.run(check, check=False).strip()
    running.repair_until(lambda: False, 1.1)  # let the tick see its own writes
    assert running.repairs == {}, "nothing was lost yet"
    caplog.clear()
    node.run(removal)
    assert not node.run(check, check=False).strip()
    done = lambda: bool(node.run(check, check=False).strip()) and running.repairs == kinds  # noqa: E731
    assert running.repair_until(done, 1.5), running.repairs
    told = [line for line in caplog.messages if line.startswith("put back what somebody else took or changed: ")]
    assert len(told) == len(kinds), told
    assert running.reconcile(Trigger(period=True)).writes == 0
    assert running.repairs == kinds


def test_routes_are_put_back_also_when_nothing_may_be_removed(node: Namespace) -> None:
    """gobgpd or the API server is away."""
    running = RunningDataplane()
    running.reconcile()
    node.run("ip route flush proto 17; ip -6 route flush proto 17; ipset flush kube-router-pod-subnets")
    assert running.woken_within(1)
    assert running.reconcile(Trigger(woken=True), frozenset(), hold=True).failures == ()
    assert running.repairs[ROUTE] == 4
    assert node.run(BOTH_ROUTES).strip()


def test_the_churn_of_others_wakes_nobody(node: Namespace, backend: str) -> None:
    running = RunningDataplane()
    running.reconcile()
    running.repair_until(lambda: False, 1.1)
    node.run(
        "ip link add veth1 type veth peer name veth2; ip link set veth1 up; ip address add 192.168.7.1/24 dev veth1;"
        "ip route add 172.20.0.0/16 via 192.168.7.2; ip route del 172.20.0.0/16; ip link del veth1;"
        "iptables-nft -N OTHER; iptables-nft -A OTHER -j ACCEPT; iptables-nft -F OTHER; iptables-nft -X OTHER;"
        "ipset create theirs hash:ip; ipset add theirs 1.2.3.4; ipset destroy theirs"
    )
    assert not running.woken_within(1.2)


def test_a_foreign_route_in_the_place_of_ours_wins_and_is_told(node: Namespace) -> None:
    node.run("ip route add 10.244.2.0/24 via 10.0.0.77 metric 50; ip -6 route add fd00:244:2::/64 via fd00::77")
    running = RunningDataplane()
    outcome = running.reconcile()
    assert outcome.failures == ()
    assert outcome.warnings == (
        "2 routes, first 10.244.2.0/24: not injected: the main table has another route in its place",
    )
    assert outcome.counts == {"host_routes_synced": 2, "host_routes_not_injected": 2, "host_tunnels_synced": 0}
    assert node.run("ip route show 10.244.2.0/24").strip() == "10.244.2.0/24 via 10.0.0.77 dev eth0 metric 50"
    node.run("ip route del 10.244.2.0/24")
    assert running.repair_until(lambda: "proto 17" in node.run("ip route show 10.244.2.0/24"), 1.0)


def test_a_foreign_route_that_came_unseen_is_not_replaced(node: Namespace) -> None:
    running = RunningDataplane(learned={})
    running.reconcile()
    node.run("ip -6 route add fd00:244:2::/64 via fd00::77 proto 4")
    running.learned = pod_routes(2)
    outcome = running.reconcile(Trigger(), frozenset(running.learned))  # without reading the listener first
    assert outcome.failures == ()
    assert "another route in its place" in outcome.warnings[0]
    assert node.run("ip -6 route show fd00:244:2::/64").count("via") == 1
    assert "via fd00::77" in node.run("ip -6 route show fd00:244:2::/64")


def test_a_foreign_replacement_of_our_route_is_noticed(node: Namespace) -> None:
    """``ip route replace`` tells only of the new route."""
    running = RunningDataplane()
    running.reconcile()
    running.drain()
    node.run("ip route replace 10.244.2.0/24 via 10.0.0.77 proto 4")
    assert running.woken_within(1.0)
    assert "another route in its place" in running.reconcile(Trigger(woken=True), frozenset()).warnings[0]


def test_sweep_at_start_removes_what_an_earlier_run_left(node: Namespace) -> None:
    node.run("ip route add 10.250.0.0/16 via 10.0.0.2 proto 17; ip -6 route add fd99::/64 via fd00::2 proto 17")
    node.run("ip route add 10.244.2.0/24 via 10.0.0.2 proto 17 metric 9")
    node.run("ip -6 route add fd00:244:2::/64 proto 17 nexthop via fd00::2 nexthop via fd00::3")
    outcome = RunningDataplane().reconcile()
    assert outcome.failures == ()
    assert outcome.counters["host_routes_removed"] == 3
    assert sorted(line.split()[0] for line in node.run("ip route show proto 17").splitlines()) == [
        "10.244.2.0/24",
        "10.244.3.0/24",
    ]
    assert node.run("ip -6 route show proto 17").count("via") == 2


def test_law_1_held_deletions_leave_routes_members_and_rules(node: Namespace, backend: str) -> None:
    RunningDataplane().reconcile()
    node.run("ip route add 10.250.0.0/16 via 10.0.0.2 proto 17")
    before = state(node, backend)
    stale = RunningDataplane(nodes=(facts(1),), learned={})
    assert stale.reconcile(hold=True).writes == 0
    assert state(node, backend) == before
    stale.reconcile(Trigger(), frozenset())
    assert node.run("ip route show proto 17; ip -6 route show proto 17") == ""
    assert "10.244.2.0/24" not in node.run("ipset save")


def test_one_family_s_broken_set_stops_nothing_else(node: Namespace, backend: str) -> None:
    node.run("ipset create inet6:kube-router-pod-subnets hash:ip,port family inet6")
    running = RunningDataplane()
    outcome = running.reconcile()
    assert [str(failure) for failure in outcome.failures] == [
        "ipset: ipset inet6:kube-router-pod-subnets: exists as hash:ip,port of inet6, but must be hash:net of inet6; "
        "it is left as it is"
    ]
    assert "MASQUERADE" in node.run(f"iptables-{backend} -t nat -S POSTROUTING")
    assert "MASQUERADE" not in node.run(f"ip6tables-{backend} -t nat -S POSTROUTING")
    assert forward_chain(node, f"ip6tables-{backend}") == FORWARD
    assert outcome.counts["host_routes_synced"] == 4
    node.run("ipset destroy inet6:kube-router-pod-subnets")
    assert running.reconcile(Trigger(retry=True)).failures == ()
    assert "MASQUERADE" in node.run(f"ip6tables-{backend} -t nat -S POSTROUTING")


def test_accepts_are_repaired_below_the_network_policy_jump(node: Namespace, backend: str) -> None:
    running = RunningDataplane()
    running.reconcile()
    for program in (f"iptables-{backend}", f"ip6tables-{backend}"):
        node.run(f"{program} -N KUBE-ROUTER-FORWARD; {program} -F FORWARD")
        node.run(f'{program} -A FORWARD -m comment --comment "kube-router netpol - X" -j KUBE-ROUTER-FORWARD')
    running.reconcile(Trigger(period=True))
    for program in (f"iptables-{backend}", f"ip6tables-{backend}"):
        chain = forward_chain(node, program)
        assert chain[0].endswith("-j KUBE-ROUTER-FORWARD")
        assert chain[1:] == FORWARD


def test_egress_off_removes_the_rule_in_all_its_forms_and_keeps_the_sets(node: Namespace, backend: str) -> None:
    RunningDataplane().reconcile()
    pods = "-m set --match-set kube-router-pod-subnets src -m set ! --match-set kube-router-pod-subnets dst"
    node.run(f"iptables-{backend} -t nat -A POSTROUTING {pods} -j MASQUERADE")
    RunningDataplane(settings=msgspec.structs.replace(DUAL_STACK, enable_pod_egress=False)).reconcile()
    assert "MASQUERADE" not in node.run(f"iptables-{backend}-save; ip6tables-{backend}-save")
    assert "kube-router-pod-subnets" in node.run("ipset list -n")


def test_law_7_both_families_hold_the_same(node: Namespace, backend: str) -> None:
    RunningDataplane().reconcile()
    counts = {
        name: node.run(f"ipset save {name} | grep -c ^add").strip()
        for base in ("kube-router-pod-subnets", "kube-router-node-ips")
        for name in (base, f"inet6:{base}")
    }
    assert set(counts.values()) == {"3"}
    texts = [node.run(f"{program}-{backend}-save -t filter") for program in ("iptables", "ip6tables")]
    chains = [[line for line in text.splitlines() if line.startswith("-A")] for text in texts]
    assert chains[0] == chains[1]
    assert node.run("ip route show proto 17").count("\n") == node.run("ip -6 route show proto 17").count("\n") == 2


def test_a_family_that_is_off_and_clean_is_not_touched(node: Namespace, backend: str) -> None:
    before = node.run(f"ip6tables-{backend}-save; ip -6 route")
    running = RunningDataplane(settings=SINGLE_STACK, nodes=tuple(facts(n, [Family.IPV4]) for n in (1, 2)))
    assert running.reconcile().failures == ()
    assert [line for line in node.run(f"ip6tables-{backend}-save; ip -6 route").splitlines() if line[0] != "#"] == [
        line for line in before.splitlines() if line[0] != "#"
    ]
    assert node.run("ipset list -n").split() == ["kube-router-node-ips", "kube-router-pod-subnets"]


IPV6_FOREIGN = """
ip6tables-{backend} -A FORWARD -s 2001:db8::/32 -j ACCEPT
ip6tables-{backend} -t nat -A POSTROUTING -s 2001:db8::/32 -j MASQUERADE
ipset create inet6:foreign hash:net family inet6
ip -6 route add 2001:db8:1::/48 via fd00::2
"""


@pytest.mark.parametrize("off", tuple(Family), ids=str)
def test_a_family_that_is_switched_off_leaves_nothing_behind(node: Namespace, backend: str, off: Family) -> None:
    """After a sync that may delete; what is not ours, and all of the other family, stays as it is."""
    for line in IPV6_FOREIGN.format(backend=backend).strip().splitlines():
        node.run(line)
        node.run(
            line.replace("ip6tables", "iptables")
            .replace("2001:db8:1::/48 via fd00::2", "192.0.2.0/24 via 10.0.0.2")
            .replace("2001:db8::/32", "192.0.2.0/24")
            .replace("inet6:", "")
            .replace(" family inet6", "")
            .replace("ip -6", "ip")
        )
    untouched = state(node, backend)
    kept = Family.IPV6 if off is Family.IPV4 else Family.IPV4
    settings = Settings(enable_ipv4=kept is Family.IPV4, enable_ipv6=kept is Family.IPV6)
    nodes = tuple(facts(number, [kept]) for number in (1, 2, 3))
    learned = {prefix: hop for prefix, hop in pod_routes(2, 3).items() if (":" in prefix) is (kept is Family.IPV6)}

    RunningDataplane(settings=settings, nodes=nodes, learned=learned).reconcile()
    single = state(node, backend)
    cleanup(DUAL_STACK)
    assert state(node, backend) == untouched

    RunningDataplane().reconcile()
    running = RunningDataplane(settings=settings, nodes=nodes, learned=learned)
    before = state(node, backend)
    assert running.reconcile(hold=True).failures == ()
    assert state(node, backend) == before, "on the word of a stale snapshot"
    assert running.reconcile(Trigger(confirmed=True)).failures == ()
    assert without_seeds(state(node, backend)) == without_seeds(single)
    with nothing_written(node):
        assert running.reconcile(Trigger(period=True)).writes == 0
        assert RunningDataplane(settings=settings, nodes=nodes, learned=learned).reconcile().writes == 0


def without_seeds(text: str) -> list[str]:
    """Lines without what differs between two sets that hold the same."""
    return [re.sub(r"initval \S+|Size in memory: .*", "", line) for line in text.splitlines()]


def test_a_set_of_a_family_that_is_off_stays_while_somebody_uses_it_and_is_told(node: Namespace, backend: str) -> None:
    RunningDataplane().reconcile()
    node.run(f"ip6tables-{backend} -A INPUT -m set --match-set inet6:kube-router-node-ips src -j ACCEPT")
    running = RunningDataplane(settings=SINGLE_STACK, nodes=tuple(facts(n, [Family.IPV4]) for n in (1, 2)))
    outcome = running.reconcile()
    assert outcome.failures == ()
    assert [line for line in outcome.warnings if "IPv6 is off" in line and "inet6:kube-router-node-ips" in line]
    assert "inet6:kube-router-node-ips" in node.run("ipset list -n")
