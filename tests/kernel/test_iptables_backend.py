"""The iptables backend on a kernel, of both kinds: what it writes, what it leaves, and how it gets back what went."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Iterator

import pytest
from support.firewall_world import ALLOW, DATABASE, DENY, OTHER, REMOTE, WEB, WORLD
from support.iptables_node import PROGRAM, TICK, Node, fresh
from support.namespaces import Namespace
from support.policyworld import BOTH, pod, pods, policy, rule
from support.policyworld import select as labels

from kube_router.ipc.messages import NetworkPolicy, Pod
from kube_router.workers.firewall import iptableswatch
from kube_router.workers.firewall.backend import Synced
from kube_router.workers.firewall.chains import ipset_of
from kube_router.workers.firewall.names import dispatch_chain, pod_chain, policy_chain
from kube_router.workers.firewall.rules import BlockSet, Direction, PodSet, PortSet, Ruleset
from kube_router.workers.firewall.topchains import jump_rule
from kube_router.workers.kernel import chains as iptables
from kube_router.workers.kernel.chains import ChainDriver, FilterTable
from kube_router.workers.kernel.iptables import IptablesError
from kube_router.workers.kernel.monitor import Tick
from kube_router.workers.model import Family
from kube_router.workers.rulefacts import ChainPlan


@pytest.fixture(params=["nft", "legacy"])
def node(request: pytest.FixtureRequest, netns: Namespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr(iptableswatch, "Tick", lambda: Tick(TICK))
    with netns.enter():
        made = Node(netns, request.param)
        yield made
        made.close()


def test_a_second_sync_and_a_new_process_write_nothing(node: Node) -> None:
    first = node.start()
    assert (first.failures, first.repaired, first.warnings, first.failed) == ((), (), (), {})
    assert first.writes > 50
    before = node.everything()
    assert node.backend.plan(node.ruleset, node.state.frame) == ()
    for synced in (node.look(), node.become(*WORLD), node.restart(), node.restart(), node.look()):
        assert (synced.writes, synced.failures, synced.repaired, synced.warnings) == (0, (), (), ())
        assert synced.counts == first.counts
    assert node.everything() == before


def test_one_change_after_the_other_leads_where_a_fresh_start_leads(node: Node) -> None:
    node.start()
    moved = pod("a/db", 4, app="db")
    steps: list[tuple[Pod | NetworkPolicy, ...]] = [
        (WEB, DATABASE, OTHER, DENY, ALLOW),  # a remote pod is gone: members
        (WEB, moved, OTHER, REMOTE, DENY, ALLOW),  # another address
        (WEB, moved, OTHER, REMOTE, DENY),  # a policy is gone, with its sets
        (WEB, moved, OTHER, REMOTE, DENY, policy("a/allow", labels(app="web"), ingress=[rule(pods(app="other"))])),
        (WEB, pod("a/db", 4, app="web"), OTHER, REMOTE, DENY, ALLOW),  # a label changes whom policies select
        (*(pod(f"b/p{number}", number, app="db") for number in range(1, 60)), DENY, ALLOW),
        (WEB, policy("b/all", labels(), ingress=[], egress=[])),
        (),
        WORLD,
    ]
    for world in steps:
        synced = node.become(*world)
        assert (synced.failures, synced.failed, synced.repaired, synced.warnings) == ((), {}, (), ())
        assert synced.writes > 0
        assert node.everything() == fresh(node)
        assert node.become(*world).writes == 0
        assert not node.woken()
        assert node.look().writes == 0


def test_a_policy_more_is_put_into_the_chains_of_its_pods(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not emptied: a kernel that has nothing to delete makes nobody wait, and the counters go on."""
    written: list[str] = []
    apply = ChainDriver.apply

    def seen(driver: ChainDriver, plans: Iterable[ChainPlan]) -> dict[Family, IptablesError]:
        kept = list(plans)
        written.extend(str(plan) for plan in kept if plan)
        return apply(driver, kept)

    node.start()
    monkeypatch.setattr(ChainDriver, "apply", seen)
    chain = pod_chain(DATABASE.key, Direction.INGRESS)
    first, last = policy("a/a", labels(app="db"), ingress=[]), policy("a/z", labels(app="db"), ingress=[])
    for world in ((*WORLD, last), (first, *WORLD, last), (*WORLD, first, policy("a/m", labels(), egress=[]), last)):
        written.clear()
        assert not node.become(*world).failures
        assert [f":{chain} " in text for text in written] == [False] * 2
        assert node.everything() == fresh(node)
    written.clear()
    assert not node.become(*WORLD, last).failures
    assert [f":{chain} " in text for text in written] == [True] * 2, "what has to go goes with all the rest"
    assert node.everything() == fresh(node)


@pytest.mark.parametrize("foreign", ["-F", "-I 2 -j RETURN", "-D 1"])
def test_a_policy_more_is_in_force_also_where_somebody_changed_the_chain_before(node: Node, foreign: str) -> None:
    node.start()
    chain = pod_chain(DATABASE.key, Direction.INGRESS)
    verb, _, rest = foreign.partition(" ")
    for family in BOTH:
        node.iptables(family, f"{verb} {chain} {rest}")
    node.become(*WORLD, policy("a/z", labels(app="db"), ingress=[]))
    synced = node.look()
    assert not synced.failures
    assert node.everything() == fresh(node)
    assert node.look().writes == 0


def test_rules_are_read_again_only_when_somebody_has_changed_some(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts the changes of nftables; of legacy tables it does not."""
    reads: list[Family] = []
    observe = ChainDriver.observe

    def counted(driver: ChainDriver, family: Family, ours: Callable[[str], bool]) -> FilterTable:
        reads.append(family)
        return observe(driver, family, ours)

    monkeypatch.setattr(ChainDriver, "observe", counted)

    def look() -> tuple[int, Synced]:
        reads.clear()
        synced = node.look()
        return len(reads), synced

    node.start()
    assert look()[0] == 2, "what was written has not been read yet"
    unread = 0 if node.kind == "nft" else 2
    assert [look()[0] for _ in range(2)] == [unread] * 2
    node.iptables(Family.IPV6, "-A FORWARD -s fd00::77 -j ACCEPT")
    assert [look()[0], look()[0]] == [2, unread], "a stranger's rule, of which nothing is to be done"
    node.iptables(Family.IPV4, "-F KUBE-NWPLCY-TAIL")
    count, synced = look()
    assert count >= 2 and synced.repaired and synced.writes
    assert look()[0] == 2, "the repair has not been read yet"
    node.become(WEB, OTHER, REMOTE, DENY, ALLOW)
    assert [look()[0], look()[0]] == [2, unread], "own changes are read once"
    node.namespace.run("ipset flush kube-router-local-pods")
    count, synced = look()
    assert (count, len(synced.repaired)) == (unread, 1), "sets are looked at all the same"
    assert look()[1].writes == 0


def test_a_change_of_members_forks_nothing_and_costs_a_message_a_set(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.start()
    chains = "".join(map(node.saved, BOTH))
    monkeypatch.setattr(iptables, "Running", None)
    monkeypatch.setattr(node.backend._sets._driver, "observe", None)
    monkeypatch.setattr(node.backend._sets._driver, "names", None)
    more = [pod(f"a/more{number}", 20 + number, node="n2", app="db") for number in range(50)]
    before = node.backend._set_driver.writes
    added = node.become(*WORLD, *more)
    assert (added.writes, added.failures) == (50 * 2 * 2, ())  # of both families, as peers of both directions
    assert node.backend._set_driver.writes == before + 4
    assert all(item.ips[0] in node.sets() for item in more)
    removed = node.become(*WORLD)
    assert (removed.writes, removed.failures) == (50 * 2 * 2, ())
    assert node.backend._set_driver.writes == before + 8
    assert not any(item.ips[0] in node.sets() for item in more)
    monkeypatch.undo()
    assert "".join(map(node.saved, BOTH)) == chains
    assert node.look().writes == 0


# ------------------------------------------------------------------------------------------------------- foreign hands

FOREIGN = {
    "iptables": "-N OTHER; {0} -A OTHER -s 9.9.9.9 -j DROP; {0} -A FORWARD -j OTHER; {0} -A INPUT -p tcp -j ACCEPT",
    "ip6tables": "-N OTHER; {0} -A OTHER -s 9::9 -j DROP; {0} -A FORWARD -j OTHER; {0} -A INPUT -p tcp -j ACCEPT",
}


def test_what_others_have_stays_as_it_is_and_where_it_is(node: Node) -> None:
    node.namespace.run("ipset create foreign hash:ip; ipset add foreign 1.2.3.4; ipset create KUBE-SRC-SHORT hash:net")
    for family, program in PROGRAM.items():
        node.iptables(family, FOREIGN[program].format(f"{program}-{node.kind}"))
        node.iptables(family, "-P FORWARD DROP")
        node.iptables(family, "-N KUBE-POD-FW-SHORT")
    before = node.everything()
    node.start()
    node.become(WEB, DENY)
    after = node.everything()
    lost = [line for line in before.splitlines() if line not in after.splitlines()]
    assert lost == []
    node.give(Ruleset())
    for chain in ("FORWARD", "INPUT"):
        rules = [line for line in node.saved(Family.IPV4).splitlines() if line.startswith(f"-A {chain}")]
        assert "kube-router netpol" in rules[0]
        assert len(rules) == 2


def test_rules_that_somebody_adds_while_we_write_survive(node: Node) -> None:
    """A writer as fast as it can, beside twenty syncs that each write both families' chains."""
    node.start()
    script = (
        f"for n in $(seq 1 40); do for p in iptables ip6tables; do $p-{node.kind} -w 5 -A FORWARD -m mark --mark $n "
        "|| exit 1; done; done"
    )
    writer = node.namespace.start(["sh", "-c", script], stderr=subprocess.PIPE)
    for turn in range(20):
        assert node.become(*WORLD, *((DENY_OTHER,) if turn % 2 else ())).failures == ()
    _, errors = writer.communicate()
    assert (writer.returncode, errors) == (0, "")
    for family in BOTH:
        marks = [line for line in node.saved(family).splitlines() if line.startswith("-A FORWARD -m mark")]
        assert len(marks) == 40
    node.look()
    assert node.look().writes == 0


DENY_OTHER = policy("b/deny", labels(app="other"), ingress=[], egress=[])


@pytest.mark.parametrize("family", BOTH, ids=str)
@pytest.mark.parametrize(
    ("hook", "action"),
    [
        ("FORWARD", "-I FORWARD -s 7.7.7.7 -j ACCEPT"),
        ("INPUT", "-I INPUT -j ACCEPT"),
        ("OUTPUT", "-D OUTPUT 1"),
        ("FORWARD", "-F FORWARD"),
        ("INPUT", "-I INPUT -s 7.7.7.7; {program} -A INPUT {jump}; {program} -I INPUT {jump}"),
        ("INPUT", "-A INPUT {jump}"),
    ],
)
def test_the_jump_is_put_back_first_and_alone(node: Node, family: Family, hook: str, action: str) -> None:
    node.start()
    assert not node.woken()
    action = action.format(program=f"{PROGRAM[family]}-{node.kind}", jump=jump_rule(hook))
    if family is Family.IPV6:
        action = action.replace("7.7.7.7", "7::7")
    node.iptables(family, action)
    assert node.woken()
    foreign = [line for line in node.saved(family).splitlines() if "netpol" not in line and f"-A {hook} " in line]
    synced = node.look()
    assert synced.repaired == (f"{family}: the jump in {hook} was not first, or not the only one",)
    rules = [line for line in node.saved(family).splitlines() if f"-A {hook} " in line]
    assert rules == [f"-A {hook} {jump_rule(hook)}", *foreign]
    assert node.look().writes == 0
    assert not node.woken()


@pytest.mark.parametrize("family", BOTH, ids=str)
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("-F KUBE-ROUTER-FORWARD", "chain KUBE-ROUTER-FORWARD: 7 rules missing, first: -j MARK"),
        ("-D KUBE-NWPLCY-COMMON 2", "chain KUBE-NWPLCY-COMMON: 1 rules missing, first: -m comment"),
        ("-A KUBE-NWPLCY-DEFAULT -j ACCEPT", "chain KUBE-NWPLCY-DEFAULT: 1 rules too many, first: -j ACCEPT"),
        ("-I {policy} -j KUBE-NWPLCY-DEFAULT", "chain {policy}: 1 rules too many, first: -j KUBE-NWPLCY-DEFAULT"),
        ("-F {policy}", "chain {policy}: 11 rules missing, first: -"),
        ("-N KUBE-NWPLCY-AAAAAAAAAAAAAAAA", "chain KUBE-NWPLCY-AAAAAAAAAAAAAAAA was added"),
        ("-F {pod}; {program} -D {root} 1; {program} -X {pod}", "chain {pod} was gone"),
        ("-F", "chain KUBE-ROUTER-INPUT: "),
    ],
)
def test_foreign_changes_of_our_chains_are_repaired_and_told(node: Node, family: Family, what: str, told: str) -> None:
    node.start()
    before = node.everything()
    words = {
        "policy": policy_chain(ALLOW.key, Direction.INGRESS),
        "pod": pod_chain(WEB.key, Direction.INGRESS),
        "root": dispatch_chain(Direction.INGRESS),
        "program": f"{PROGRAM[family]}-{node.kind}",
    }
    node.iptables(family, what.format(**words))
    if "-N" not in what:  # a chain that nothing leads to does no harm, and is found at the next full check
        assert node.woken()
    synced = node.look()
    assert synced.failures == ()
    assert synced.writes >= 1
    assert [line for line in synced.repaired if line.startswith(f"{family}: {told.format(**words)}")]
    assert node.everything() == before
    assert (node.look().writes, node.look().repaired) == (0, ())


def test_a_table_that_is_gone_is_made_again(node: Node) -> None:
    if node.kind == "nft":
        node.start()
        before = node.everything()
        node.namespace.run("nft flush ruleset")
        assert node.woken()
        assert any("chain KUBE-ROUTER-FORWARD was gone" in line for line in node.look().repaired)
        assert node.everything() == before


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("ipset flush {sources}", "ipset {sources}: 2 members were missing, first: 10.0.0.2"),
        ("ipset add {sources} 10.0.0.77", "ipset {sources}: 1 members were too many, first: 10.0.0.77"),
        ("ipset del {sources} 10.0.0.2; ipset add {sources} 10.0.0.78", "ipset {sources}: 1 members were missing"),
        ("ipset add {ports} 10.0.0.1,tcp:1", "ipset {ports}: 1 members were too many, first: 10.0.0.1,tcp:1"),
        ("ipset add {blocks} 10.0.0.99 nomatch", "ipset {blocks} had exceptions"),
        ("ipset flush kube-router-local-pods", "ipset kube-router-local-pods was gone, or had other members"),
        ("ipset add kube-router-node-ports-tcp 22", "ipset kube-router-node-ports-tcp was gone, or had other members"),
    ],
)
def test_foreign_changes_of_our_sets_are_repaired_and_told(node: Node, what: str, told: str) -> None:
    node.start()
    before = node.everything()
    keys = {key for key in node.ruleset.members if key.direction is Direction.INGRESS}
    words = {
        "sources": next(ipset_of(key, Family.IPV4) for key in keys if isinstance(key, PodSet)),
        "ports": next(ipset_of(key, Family.IPV4) for key in keys if isinstance(key, PortSet)),
        "blocks": next(
            ipset_of(key, Family.IPV4)
            for key in keys
            if isinstance(key, BlockSet) and key.family is Family.IPV4 and len(key.prefixes) > 1
        ),
    }
    node.namespace.run(what.format(**words))
    if what.count("{sources}") == 1 or "{sources}" not in what:  # an exchange leaves the number as it was
        assert node.woken()
    synced = node.look()
    assert any(told.format(**words) in line for line in synced.repaired), synced.repaired
    assert node.everything() == before
    assert (node.look().writes, node.look().repaired) == (0, ())
    assert not node.woken()
