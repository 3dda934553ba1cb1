"""What the iptables backend does when something is in its way: each policy and each family fails alone, and heals."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.firewall_world import ALLOW, DATABASE, DENY, FRAME, OTHER, REMOTE, WEB, WORLD
from support.iptables_node import Node, fresh
from support.iptables_walk import IptablesWalk
from support.namespaces import Namespace
from support.policyworld import BOTH, cluster, pod, pods, policy, port, rule
from support.policyworld import select as labels
from support.rulesets import ruleset_of
from support.walk import WirePacket

from kube_router.workers.firewall import setsync
from kube_router.workers.firewall.chains import ipset_of
from kube_router.workers.firewall.names import pod_chain
from kube_router.workers.firewall.policies import compile_policy
from kube_router.workers.firewall.rules import Changed, Clause, Direction, PodSet, PortRange, Ruleset, SetKey
from kube_router.workers.kernel import iptables
from kube_router.workers.kernel.chains import ChainDriver, FilterTable
from kube_router.workers.kernel.iptables import Programs
from kube_router.workers.model import Family
from kube_router.workers.rulefacts import RuleText


@pytest.fixture(params=["nft", "legacy"])
def node(request: pytest.FixtureRequest, netns: Namespace) -> Iterator[Node]:
    with netns.enter():
        made = Node(netns, request.param)
        yield made
        made.close()


def reaches(node: Node, source: str, destination: str, number: int = 80) -> bool:
    """Whether a new TCP connection through the node is let through."""
    family = Family.IPV6 if ":" in source else Family.IPV4
    walk = IptablesWalk(
        family, node.namespace.run(f"{node.program(family)}-save -t filter"), node.namespace.run("ipset save")
    )
    return walk.walk(WirePacket("FORWARD", source, destination, "tcp", number)).allowed


FROM_DATABASE = policy(
    "a/allow", labels(app="web"), ingress=[rule(pods(app="db"), ports=[port(8080)]), rule(ports=[port(443)])]
)
PLAIN = (WEB, DATABASE, OTHER, REMOTE, DENY, FROM_DATABASE)
"""A world in which one set decides about port 8080, and none about port 443."""


def sources(ruleset: Ruleset) -> SetKey:
    """The pods that may open connections to the web pod."""
    return next(key for key in ruleset.members if isinstance(key, PodSet) and key.direction is Direction.INGRESS)


# ---------------------------------------------------------------------------------------------------------------- sets


@pytest.mark.parametrize("family", BOTH, ids=str)
def test_a_foreign_set_under_our_name_closes_what_needs_it_and_nothing_else(node: Node, family: Family) -> None:
    node.state = cluster(PLAIN, FRAME)
    name = ipset_of(sources(ruleset_of(node.state)), family)
    version = "inet6" if family is Family.IPV6 else "inet"
    node.namespace.run(f"ipset create {name} hash:net family {version}")
    synced = node.start()
    assert synced.failures == ()
    assert list(synced.failed) == [ALLOW.key]
    assert f"ipset {name}: exists as hash:net of {version}, but must be hash:ip" in synced.failed[ALLOW.key]
    assert not reaches(node, *(("10.0.0.2", "10.0.0.1") if family is Family.IPV4 else ("fd00::2", "fd00::1")), 8080)
    assert reaches(node, *(("fd00::2", "fd00::1") if family is Family.IPV4 else ("10.0.0.2", "10.0.0.1")), 8080)
    assert f"create {name} hash:net" in node.sets()
    assert reaches(node, "10.0.0.2", "10.0.0.1", 443) and reaches(node, "fd00::2", "fd00::1", 443)
    again = node.look()
    assert (again.writes, again.failed) == (0, synced.failed)
    other = node.become(*PLAIN, policy("b/deny", labels(app="other"), ingress=[]))
    assert other.failed == synced.failed
    assert not reaches(node, "10.0.0.2", "10.0.0.3")
    node.become(*PLAIN)
    node.namespace.run(f"ipset destroy {name}")
    healed = node.look()
    assert (healed.failed, healed.failures, healed.repaired) == ({}, (), ())
    assert node.everything() == fresh(node)


@pytest.mark.parametrize("family", BOTH, ids=str)
def test_a_foreign_set_under_the_name_of_the_local_pods_stops_its_family_only(node: Node, family: Family) -> None:
    name = "inet6:kube-router-local-pods" if family is Family.IPV6 else "kube-router-local-pods"
    node.namespace.run(f"ipset create {name} hash:net family {'inet6' if family is Family.IPV6 else 'inet'}")
    synced = node.start()
    texts = [str(failure) for failure in synced.failures]
    assert any(text.startswith(f"ipset: ipset {name}: exists as hash:net") for text in texts)
    assert any(text.startswith(f"iptables: {family}: no rules without a set: ipset {name}: ") for text in texts)
    assert len(texts) == 2
    other = Family.IPV4 if family is Family.IPV6 else Family.IPV6
    assert "netpol" not in node.saved(family)
    assert "netpol" in node.saved(other)
    node.namespace.run(f"ipset destroy {name}")
    assert node.look().failures == ()
    assert node.everything() == fresh(node)


def test_a_foreign_set_under_the_name_of_node_ports_costs_their_exemption(node: Node) -> None:
    node.namespace.run("ipset create kube-router-node-ports-tcp hash:ip")
    synced = node.start()
    assert [failure.phase for failure in synced.failures] == ["ipset"]
    assert "kube-router-node-ports-tcp: exists as hash:ip of inet, but must be bitmap:port" in str(synced.failures[0])
    assert "kube-router-node-ports-tcp" not in node.saved(Family.IPV4)
    assert "kube-router-node-ports-udp" in node.saved(Family.IPV4)
    node.namespace.run("ipset destroy kube-router-node-ports-tcp")
    assert node.look().failures == ()
    assert node.everything() == fresh(node)


def peers(count: int) -> list[object]:
    return [pod(f"a/peer{number}", 20 + number, node="n2", app="db") for number in range(count)]


def test_a_set_that_is_full_is_exchanged_for_a_larger_one_while_rules_name_it(node: Node) -> None:
    name = ipset_of(sources(ruleset_of(node.state)), Family.IPV4)
    node.namespace.run(f"ipset create {name} hash:ip timeout 0 maxelem 3")
    assert node.start().failed == {}
    assert "maxelem 3 " in node.namespace.run(f"ipset save {name}")
    rules = node.saved(Family.IPV4)
    synced = node.become(*WORLD, *peers(5))
    assert (synced.failed, synced.failures) == ({}, ())
    assert "maxelem 65536" in node.namespace.run(f"ipset save {name}")
    assert node.saved(Family.IPV4) == rules
    assert node.look().writes == 0
    assert node.everything() == fresh(node)


def test_a_set_larger_than_any_may_be_closes_its_policy_and_says_so(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setsync, "MOST_MEMBERS", 6)
    node.state = cluster(PLAIN, FRAME)
    name = ipset_of(sources(ruleset_of(node.state)), Family.IPV4)
    node.namespace.run(f"ipset create {name} hash:ip timeout 0 maxelem 6")
    node.start()
    assert reaches(node, "10.0.0.2", "10.0.0.1", 8080)
    synced = node.become(*PLAIN, *peers(10))
    assert synced.failures == ()
    assert list(synced.failed) == [ALLOW.key]
    assert f"ipset {name}: 12 members, and no set is made for more than 6" in synced.failed[ALLOW.key]
    assert not reaches(node, "10.0.0.20", "10.0.0.1", 8080)
    assert not reaches(node, "10.0.0.2", "10.0.0.1", 8080)
    assert node.become(*PLAIN, *peers(10)).failed == synced.failed
    assert node.look().failed == synced.failed
    node.become(*PLAIN)
    healed = node.look()
    assert (healed.failed, healed.failures) == ({}, ())
    assert reaches(node, "10.0.0.2", "10.0.0.1", 8080)


# -------------------------------------------------------------------------------------------------------------- chains


def test_what_the_kernel_refuses_of_two_policies_leaves_them_closed_and_forty_in_force(node: Node) -> None:
    compiled = [
        compile_policy(policy(f"a/p{number:02}", labels(app="web"), ingress=[rule(ports=[port(number)])]), BOTH)
        for number in range(100, 142)
    ]
    compiled += [compile_policy(item, BOTH) for item in (DENY,)]
    for at in (7, 30):
        odd = Clause(0, "ingress any", None, PortRange("NOSUCH", 99))
        item = compiled[at]
        compiled[at] = type(item)(item.key, item.uid, item.target, (*(item.ingress or ()), odd), item.egress)
    node.ruleset = ruleset_of(cluster((WEB, DATABASE, OTHER), FRAME), compiled)
    synced = node.restart()
    assert synced.failures == ()
    assert sorted(synced.failed) == ["a/p107", "a/p130"]
    assert all("was refused and allows nothing: " in why for why in synced.failed.values())
    assert all("IPv4" in why and "IPv6" in why for why in synced.failed.values())
    for source, destination in (("10.0.0.2", "10.0.0.1"), ("fd00::2", "fd00::1")):
        found = {number for number in range(100, 142) if reaches(node, source, destination, number)}
        assert found == set(range(100, 142)) - {107, 130}
    again = node.become(WEB, DATABASE, OTHER, DENY)
    assert (again.failed, again.failures) == ({}, ())
    assert node.everything() == fresh(node)


def test_a_refused_policy_is_tried_again_and_costs_no_other_change_anything(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Clause(0, "ingress any", None, PortRange("NOSUCH", 99))
    bad = compile_policy(policy("a/bad", labels(app="web"), ingress=[]), BOTH)
    bad = type(bad)(bad.key, bad.uid, bad.target, (odd,), None)
    good = compile_policy(policy("a/good", labels(app="web"), ingress=[rule(ports=[port(80)])]), BOTH)
    node.ruleset = ruleset_of(cluster((WEB, DATABASE), FRAME), [bad, good])
    assert list(node.restart().failed) == ["a/bad"]
    more = ruleset_of(cluster((WEB, DATABASE, OTHER), FRAME), [bad, good])
    applied = node.backend._chain_driver.writes
    synced = node.give(more)
    assert list(synced.failed) == ["a/bad"]
    assert node.backend._chain_driver.writes == applied, "another pod that nothing isolates touches no chain"
    assert list(node.look().failed) == ["a/bad"]
    assert reaches(node, "10.0.0.2", "10.0.0.1", 80)
    mended = type(bad)(bad.key, bad.uid, bad.target, (Clause(0, "ingress any", None, PortRange("TCP", 99)),), None)
    assert node.give(ruleset_of(cluster((WEB, DATABASE, OTHER), FRAME), [mended, good])).failed == {}
    assert reaches(node, "10.0.0.2", "10.0.0.1", 99)


def test_a_chain_that_somebody_else_uses_stays_empty_and_holds_nothing_up(node: Node) -> None:
    node.start()
    chain = pod_chain(DATABASE.key, Direction.INGRESS)
    node.iptables(Family.IPV4, f"-N THEIRS; {node.program(Family.IPV4)} -A THEIRS -j {chain}")
    synced = node.become(WEB, OTHER, REMOTE, ALLOW)
    assert (synced.failures, synced.failed) == ((), {})
    assert [line for line in synced.warnings if f"chain {chain} is not needed any more; it stays, empty" in line]
    assert f"-A {chain} " not in node.saved(Family.IPV4)
    assert f":{chain} " in node.saved(Family.IPV4)
    assert f":{chain} " not in node.saved(Family.IPV6)
    assert node.become(WEB, REMOTE, ALLOW).warnings == ()
    assert len(node.look().warnings) == 1
    node.iptables(Family.IPV4, f"-F THEIRS; {node.program(Family.IPV4)} -X THEIRS")
    assert node.look().warnings == ()
    assert node.everything() == fresh(node)


def test_the_xtables_lock_held_for_seconds_is_one_clear_line_a_family_and_heals(
    netns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(lock))
    monkeypatch.setattr(iptables, "WAIT_SECONDS", 1)
    with netns.enter():
        node = Node(netns, "legacy")
        node.start()
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        began = time.monotonic()
        synced = node.become(WEB, DATABASE, OTHER, REMOTE, ALLOW)
        assert 0.9 < time.monotonic() - began < 2.5, "both families wait at the same time"
        assert [str(failure) for failure in synced.failures] == [
            f"iptables: {family}: {program}-legacy-restore --noflush --wait 1: another program holds the xtables lock "
            "for more than 1 s"
            for family, program in ((Family.IPV4, "iptables"), (Family.IPV6, "ip6tables"))
        ]
        assert synced.failed == {}
        assert not reaches(node, "10.0.0.1", "10.0.0.2"), "as before: the database is still isolated"
        began = time.monotonic()
        lane = node.become(WEB, DATABASE, OTHER, ALLOW)
        assert lane.writes == 4
        assert time.monotonic() - began < 0.5, "members need no lock"
        assert len(lane.failures) == 2, "what is wrong is still told"
        os.close(descriptor)
        healed = node.look()
        assert (healed.failures, healed.failed) == ((), {})
        assert node.everything() == fresh(node)
        node.close()


def test_a_foreign_nft_table_in_the_way_stops_its_family_and_stays(netns: Namespace) -> None:
    netns.run("nft add table ip filter")
    netns.run("nft 'add chain ip filter FORWARD { type filter hook forward priority 5 ; policy drop ; }'")
    before = netns.run("nft list table ip filter")
    with netns.enter():
        node = Node(netns, "nft")
        synced = node.start()
        assert len(synced.failures) == 1
        assert str(synced.failures[0]).startswith("iptables: IPv4: iptables-nft")
        assert netns.run("nft list table ip filter") == before
        assert "netpol" in node.saved(Family.IPV6)
        netns.run("nft delete table ip filter")
        assert node.look().failures == ()
        assert node.everything() == fresh(node)
        node.close()


def test_without_the_programs_sets_are_still_kept_and_the_program_is_named(netns: Namespace) -> None:
    with netns.enter():
        node = Node(netns, "nft")
        node.close()
        node.backend = node.new(chains=ChainDriver(Programs("nft", "-none", ())))
        synced = node.start()
        assert [str(failure).split(":")[2].strip() for failure in synced.failures] == [
            "iptables-none-save",
            "ip6tables-none-save",
        ]
        assert "KUBE-SRC-" in node.sets()
        node.restart()
        assert node.everything() == fresh(node)
        node.close()


def test_a_program_with_other_words_is_learned_once_and_not_fought(node: Node) -> None:
    class Verbose(ChainDriver):
        """As a version that says ``minute``."""

        def observe(self, family: Family, ours: Callable[[str], bool]) -> FilterTable:
            table = super().observe(family, ours)
            chains = {
                chain: tuple(RuleText(text.replace("10/min ", "10/minute ")) for text in rules)
                for chain, rules in table.chains.items()
            }
            return FilterTable(chains, table.hooks)

    node.close()
    node.backend = node.new(chains=Verbose(node.programs))
    node.start()
    synced = node.look()
    assert all("a rule is written as " in line and "10/minute" in line for line in synced.warnings)
    assert len(synced.warnings) == 4, "two isolated directions of one pod and one of another, in two families"
    for _ in range(2):
        again = node.look()
        assert (again.writes, again.repaired, again.warnings) == (0, (), ())


# ---------------------------------------------------------------------------------------------------------------- hold


def lost(before: str, after: str) -> list[str]:
    """Lines that are gone; what follows the name of a chain may differ."""
    return [line for line in before.splitlines() if line not in after.splitlines()]


def test_on_hold_nothing_goes_and_afterwards_everything_is_caught_up(node: Node) -> None:
    node.start()
    before = node.everything()
    fewer = (WEB, OTHER, policy("b/new", labels(app="other"), ingress=[rule(pods(app="other"))]))
    held = node.become(*fewer, hold=True)
    assert (held.failures, held.failed, held.repaired) == ((), {}, ())
    assert held.writes > 0
    assert lost(before, node.everything()) == []
    assert ruleset_of(cluster(fewer, FRAME)).members
    assert all(
        f"create {ipset_of(key, family)} " in node.sets()
        for key in node.ruleset.members
        for family in key_families(key)
    )
    assert node.become(*fewer, hold=True).writes == 0
    assert node.become(*fewer).failures == ()
    assert node.everything() == fresh(node)


def key_families(key: SetKey) -> tuple[Family, ...]:
    return setsync.families_of(key, BOTH)


def test_a_process_that_starts_on_hold_keeps_what_it_does_not_know_and_mends_what_is_empty(node: Node) -> None:
    node.start()
    before = node.everything()
    node.iptables(Family.IPV4, "-F KUBE-ROUTER-FORWARD")
    node.iptables(Family.IPV6, f"-F {pod_chain(WEB.key, Direction.INGRESS)}")
    node.iptables(Family.IPV4, "-D OUTPUT 1")
    node.iptables(Family.IPV6, "-I INPUT -s 7::7 -j ACCEPT")
    stale = ruleset_of(cluster((WEB, DATABASE, policy("a/allow", labels(app="web"), ingress=[rule()])), FRAME))
    node.ruleset = stale
    node.close()
    node.backend = node.new()
    synced = node.backend.sync(stale, Changed(everything=True), FRAME, observe=True, hold=True)
    assert synced.failures == ()
    assert lost(before, node.everything()) == []
    assert "7::7" not in node.saved(Family.IPV6).split("-A INPUT")[1], "the jump is first again"
    assert not reaches(node, "10.0.0.2", "10.0.0.1", 81), "the policy that stands is stricter than the stale one"
    node.backend.sync(stale, Changed(), FRAME, observe=False, hold=False)
    assert reaches(node, "10.0.0.2", "10.0.0.1", 81)
    kept = [line for line in node.everything().splitlines() if "7::7" not in line]
    assert "\n".join(kept) + "\n" == fresh(node) + "\n"
