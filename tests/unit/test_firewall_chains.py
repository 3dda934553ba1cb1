"""The firewall's iptables chains as whole texts, and what is to be written to get from one state to another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.firewall_world import ALLOW, FRAME, WORLD
from support.iptables_walk import tokens
from support.policyworld import BOTH, cluster
from support.rulesets import ruleset_of

from kube_router.workers.firewall.chains import ipset_of, policy_rules, render
from kube_router.workers.firewall.familychains import insertions
from kube_router.workers.firewall.iptablesplan import (
    describe,
    digest_of,
    is_our_jump,
    jump_steps,
    plan_lines,
    to_remove,
    to_write,
)
from kube_router.workers.firewall.names import policy_chain, upstream_digest
from kube_router.workers.firewall.policies import compile_policy
from kube_router.workers.firewall.rules import Clause, Direction, Frame, PodSet, PolicyRules, PortRange, Ruleset
from kube_router.workers.firewall.ruletext import commented, quoted
from kube_router.workers.firewall.topchains import frame_chains, jump_rule
from kube_router.workers.kernel.chains import parse_saved
from kube_router.workers.model import Family, parse_network
from kube_router.workers.rulefacts import ChainPlan, RuleStep, RuleText

GOLDEN = Path(__file__).parent.parent / "golden" / "firewall"


def text_of(chains: dict[str, tuple[RuleText, ...]]) -> str:
    return "".join(f":{chain} -\n" for chain in chains) + "".join(
        f"-A {chain} {rule}\n" for chain, rules in chains.items() for rule in rules
    )


@pytest.mark.parametrize("family", BOTH, ids=str)
def test_a_small_node_as_a_whole(family: Family) -> None:
    """Two isolated pods, one that is not, default-deny; the text is reviewed, not only recorded."""
    state = cluster(WORLD, FRAME)
    assert text_of(render(ruleset_of(state), FRAME, family)) == (GOLDEN / f"small-node.{family}").read_text()


def test_without_default_deny_the_tail_refuses_nobody() -> None:
    tail = frame_chains(dataclasses.replace(FRAME, default_deny=False), Family.IPV4)["KUBE-NWPLCY-TAIL"]
    assert tail == ('-m comment --comment "accept netpol-ok" -m mark --mark 0x20000/0x20000 -j ACCEPT',)
    none = frame_chains(dataclasses.replace(FRAME, pod_cidrs=()), Family.IPV4)["KUBE-NWPLCY-TAIL"]
    assert none == tail


def test_the_identities_of_positioned_rules_are_upstream_s() -> None:
    """Values seen on clusters that Go kube-router runs on."""
    assert jump_rule("INPUT").split(" - ")[1].startswith('4IA2OSFRMVNDXBVV" -j KUBE-ROUTER-INPUT')
    assert jump_rule("FORWARD").split(" - ")[1].startswith('TEMCG2JMHZYE7H7T" -j KUBE-ROUTER-FORWARD')
    assert jump_rule("OUTPUT").split(" - ")[1].startswith('VEAAIY32XVBHCSCY" -j KUBE-ROUTER-OUTPUT')
    frame = Frame(
        cluster_ranges=(parse_network("10.96.0.0/12"),),
        external_ranges=(parse_network("203.0.113.0/24"),),
        load_balancer_ranges=(parse_network("198.51.100.0/24"),),
    )
    head = frame_chains(frame, Family.IPV4)["KUBE-ROUTER-INPUT"]
    assert "BVHX2PIHDXXEO43X" in head[0]
    assert "LHOQU5ELQQ6P3LF6" in head[3]
    assert "RN7LLX6BWVWUCXDB" in head[4]
    assert upstream_digest("") == "4OYMIQUY7QOBJGX3"


def test_many_sctp_node_ports_take_several_rules_of_the_ports_themselves() -> None:
    frame = Frame(node_ports=frozenset(("sctp", 30000 + number) for number in range(17)))
    rules = [rule for rule in frame_chains(frame, Family.IPV4)["KUBE-ROUTER-INPUT"] if rule.startswith("-p sctp")]
    assert len(rules) == 2
    assert "--dports 30000,30001," in rules[0] and "--dports 30015,30016 -j RETURN" in rules[1]


def test_a_range_of_the_whole_family_is_no_condition() -> None:
    frame = Frame(cluster_ranges=(parse_network("0.0.0.0/0"),))
    assert frame_chains(frame, Family.IPV4)["KUBE-ROUTER-INPUT"][0].startswith("-m comment")


def test_a_clause_whose_set_is_missing_is_left_out_in_that_family_only() -> None:
    rules = compile_policy(ALLOW, BOTH)
    key = next(part for clause in rules.ingress or () for part in clause.sets if isinstance(part, PodSet))
    whole = {family: policy_rules(rules, Direction.INGRESS, family) for family in BOTH}
    without = {(key, Family.IPV6)}
    assert policy_rules(rules, Direction.INGRESS, Family.IPV4, without=without) == whole[Family.IPV4]
    fewer = policy_rules(rules, Direction.INGRESS, Family.IPV6, without=without)
    name = ipset_of(key, Family.IPV6)
    assert fewer == tuple(rule for rule in whole[Family.IPV6] if name not in rule)
    assert len(fewer) < len(whole[Family.IPV6])


def test_equal_clauses_are_one_rule_and_ports_are_written_as_they_are_read_back() -> None:
    clauses = (
        Clause(0, "ingress any", None, PortRange("TCP", 80, 80)),
        Clause(1, "ingress any", None, PortRange("TCP", 80)),
        Clause(2, "ingress any", None, PortRange("UDP", 1, 65535)),
        Clause(3, "ingress any", None, PortRange("SCTP")),
        Clause(4, "ingress any", None, None),
    )
    compiled = compile_policy(ALLOW, BOTH)
    made = PolicyRules(compiled.key, "", compiled.target, clauses, None)
    assert policy_rules(made, Direction.INGRESS, Family.IPV4) == (
        '-p tcp -m comment --comment "a/allow ingress any" -m tcp --dport 80 -g KUBE-NWPLCY-DEFAULT',
        '-p udp -m comment --comment "a/allow ingress any" -m udp --dport 1:65535 -g KUBE-NWPLCY-DEFAULT',
        '-p sctp -m comment --comment "a/allow ingress any" -g KUBE-NWPLCY-DEFAULT',
        '-m comment --comment "a/allow ingress any" -g KUBE-NWPLCY-DEFAULT',
    )
    assert policy_rules(made, Direction.EGRESS, Family.IPV4) == ()


def test_a_pod_whose_policy_is_not_programmed_is_closed() -> None:
    whole = ruleset_of(cluster(WORLD, FRAME))
    chains = render(Ruleset({}, whole.pods, {}), FRAME, Family.IPV4)
    assert not any(policy_chain(ALLOW.key, direction) in rule for rules in chains.values() for rule in rules
                   for direction in Direction)  # fmt: skip
    assert sum("-j REJECT" in rule for rules in chains.values() for rule in rules) == 3 + 2


@given(st.text(min_size=1, max_size=60).filter(lambda text: text.isprintable()))
def test_a_comment_is_read_back_as_it_was_meant(text: str) -> None:
    words = tokens(f"-A X {commented(text)} -j RETURN")
    assert words[words.index("--comment") + 1] == text
    assert quoted("plain_text-1") == "plain_text-1"


# --------------------------------------------------------------------------------------------------------------- plans

MINE, OTHER = RuleText("-j RETURN"), RuleText("-j ACCEPT")
POD, POLICY, TREE = (f"KUBE-{kind}-AAAAAAAAAAAAAAAA" for kind in ("POD-FW", "NWPLCY", "POD-BY"))


def digests(**chains: tuple[RuleText, ...]) -> dict[str, bytes]:
    names = {"pod": POD, "policy": POLICY, "tree": TREE, "top": "KUBE-ROUTER-INPUT"}
    return {names[name]: digest_of(rules) for name, rules in chains.items()}


def test_only_what_differs_is_written_and_what_nothing_needs_goes() -> None:
    actual = digests(pod=(MINE,), policy=(MINE,))
    desired = digests(pod=(MINE,), policy=(OTHER,), tree=())
    assert to_write(actual, desired, hold=False) == [POLICY, TREE]
    assert to_remove([POD, TREE, "KUBE-SERVICES", "KUBE-POD-FW-SHORT", "FOREIGN"], {TREE}, hold=False) == [POD]
    assert to_remove([POD], (), hold=True) == []


def test_on_hold_only_what_is_missing_or_wrongly_empty_is_written() -> None:
    desired = digests(pod=(MINE,), policy=(MINE,), tree=(MINE,), top=(MINE,))
    empty = digests(pod=(), policy=(), tree=(), top=())
    assert to_write({}, desired, hold=True) == list(desired)
    assert to_write(empty, desired, hold=True) == [POD, "KUBE-ROUTER-INPUT"]
    assert to_write(digests(pod=(OTHER,), policy=(OTHER,), tree=(OTHER,), top=(OTHER,)), desired, hold=True) == []


def hooks(*forward: RuleText) -> dict[str, tuple[RuleText, ...]]:
    return {"INPUT": (jump_rule("INPUT"),), "OUTPUT": (jump_rule("OUTPUT"),), "FORWARD": forward}


JUMP = jump_rule("FORWARD")
OLD_JUMP = RuleText('-m comment --comment "kube-router netpol - AAAAAAAAAAAAAAAA" -j KUBE-ROUTER-FORWARD')
THEIR_JUMP = RuleText("-i eth0 -j KUBE-ROUTER-FORWARD")


@pytest.mark.parametrize(
    ("forward", "steps", "on_hold"),
    [
        ((JUMP,), [], []),
        ((JUMP, MINE), [], []),
        ((), ["insert"], ["insert"]),
        ((MINE, JUMP), ["delete", "insert"], ["insert"]),
        ((JUMP, MINE, JUMP), ["delete", "delete", "insert"], []),
        ((OLD_JUMP, MINE), ["delete", "insert"], ["insert"]),
        ((JUMP, OLD_JUMP), ["delete", "delete", "insert"], []),
        ((JUMP, THEIR_JUMP), [], []),
        ((THEIR_JUMP,), ["insert"], ["insert"]),
    ],
)
def test_our_jump_is_first_and_alone(forward: tuple[RuleText, ...], steps: list[str], on_hold: list[str]) -> None:
    planned = jump_steps(hooks(*forward), hold=False)
    assert [step.verb for step in planned] == steps
    assert [step.verb for step in jump_steps(hooks(*forward), hold=True)] == on_hold
    rules = list(forward)
    for step in planned:
        rules.remove(step.rule) if step.verb == "delete" else rules.insert(step.position - 1, step.rule)
    assert rules == [JUMP, *(rule for rule in forward if rule not in (JUMP, OLD_JUMP))]


def test_our_jumps_are_told_from_everybody_else_s() -> None:
    standing = hooks(THEIR_JUMP, JUMP, MINE)
    assert [(hook, text) for hook, rules in standing.items() for text in rules if is_our_jump(text)] == [
        ("INPUT", jump_rule("INPUT")),
        ("OUTPUT", jump_rule("OUTPUT")),
        ("FORWARD", JUMP),
    ]


def test_a_plan_is_one_restore_and_lines_for_people() -> None:
    plan = ChainPlan(Family.IPV6, {POLICY: (MINE, OTHER), TREE: ()}, (RuleStep("insert", "INPUT", MINE),), (POD,))
    assert str(plan) == (
        f"*filter\n:{POLICY} - [0:0]\n:{TREE} - [0:0]\n:{POD} - [0:0]\n-A {POLICY} -j RETURN\n-A {POLICY} -j ACCEPT\n"
        f"-I INPUT 1 -j RETURN\n-X {POD}\nCOMMIT\n"
    )
    assert list(plan_lines(plan)) == [
        f"IPv6: write chain {POLICY} (2 rules)",
        f"IPv6: -A {POLICY} -j RETURN",
        f"IPv6: -A {POLICY} -j ACCEPT",
        f"IPv6: write chain {TREE} (0 rules)",
        "IPv6: -I INPUT 1 -j RETURN",
        f"IPv6: remove chain {POD}",
    ]
    assert (len(plan), bool(ChainPlan(Family.IPV4))) == (4, False)


def test_a_chain_that_only_lacks_rules_is_not_emptied() -> None:
    plan = ChainPlan(Family.IPV4, {POLICY: (OTHER,), POD: (MINE, OTHER)}, grow={POD: ((1, MINE),)})
    lines = (f":{POLICY} - [0:0]", f"-A {POLICY} -j ACCEPT", f"-I {POD} 1 -j RETURN")
    assert str(plan).splitlines() == ["*filter", *lines, "COMMIT"]
    assert len(plan) == 2


@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abcd")))
def test_rules_are_put_in_where_they_belong_or_the_chain_is_written_anew(before: list[str], after: list[str]) -> None:
    actual, desired = tuple(map(RuleText, before)), tuple(map(RuleText, after))
    grown = list(actual)
    for position, rule in insertions(actual, desired):
        grown.insert(position - 1, rule)
    assert tuple(grown) in (desired, actual)
    letters = iter(after)
    contained = all(letter in letters for letter in before)
    assert (tuple(grown) == desired) == contained


@pytest.mark.parametrize(
    ("actual", "words"),
    [
        (None, f"chain {POD} was gone"),
        ((), f"chain {POD}: 2 rules missing, first: -j RETURN"),
        ((OTHER, MINE), f"chain {POD}: its rules were in another order, or there more than once"),
        ((MINE,), f"chain {POD}: 1 rules missing, first: -j ACCEPT"),
        ((MINE, OTHER, RuleText("-j DROP")), f"chain {POD}: 1 rules too many, first: -j DROP"),
    ],
)
def test_what_differs_is_said_in_a_line(actual: tuple[RuleText, ...] | None, words: str) -> None:
    assert describe(POD, actual, (MINE, OTHER)) == words


def test_a_saved_table_is_read_for_our_chains_and_the_built_in_ones() -> None:
    saved = (
        "# Generated\n*filter\n:INPUT ACCEPT [1:2]\n:FORWARD DROP [0:0]\n:MINE-1 - [0:0]\n:THEIRS - [0:0]\n"
        "-A INPUT -j MINE-1\n-A MINE-1 -m comment --comment \"-A THEIRS\" -j RETURN\n-A THEIRS -j DROP\nCOMMIT\n"
    )  # fmt: skip
    table = parse_saved(saved.splitlines(), lambda name: name.startswith("MINE"))
    assert table.chains == {"MINE-1": ('-m comment --comment "-A THEIRS" -j RETURN',)}
    assert table.hooks == {"INPUT": ("-j MINE-1",), "FORWARD": ()}
