"""What the nftables backend renders and plans, without a kernel: whole texts (golden), order, spellings, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.firewall_world import ALLOW, DENY, WORLD
from support.nftnode import FRAME
from support.policyworld import BOTH, block, cluster, pod, policy, port, rule
from support.rulesets import ruleset_of

from kube_router.ipc.messages import Key
from kube_router.workers.firewall import names
from kube_router.workers.firewall.nftplan import (
    NewSet,
    RuleOwner,
    SetOwner,
    Steps,
    degraded,
)
from kube_router.workers.firewall.nftrender import (
    Chain,
    clause_rule,
    element_text,
    frame_chains,
    frame_shapes,
    group_chain,
    map_element,
    port_match,
)
from kube_router.workers.firewall.nftstate import (
    ALTERED,
    EMPTY,
    Believed,
    PodLayout,
    Refusals,
    SetNames,
    chain_steps,
    element_steps,
    fixed_chains,
    frame_elements,
    new_set,
    pod_layout,
    policy_chains,
    rules_hash,
    wanted_sets,
)
from kube_router.workers.firewall.rules import BlockSet, Clause, Direction, PodSet, PortRange, PortSet, Ruleset
from kube_router.workers.model import Family

GOLDEN = Path(__file__).parents[1] / "golden" / "firewall"


def rendered(ruleset: Ruleset, family: Family) -> list[Chain]:
    """All chains of a family."""
    refused, set_name = Refusals(), SetNames(family)
    return [
        *fixed_chains(family, FRAME, refused).values(),
        *policy_chains(ruleset.policies.values(), family, set_name, refused).values(),
        *pod_layout(ruleset, family).groups.values(),
    ]


def cold_steps(ruleset: Ruleset, family: Family) -> Steps:
    """What fills an empty kernel."""
    steps, believed, pods, set_name = (
        Steps(family, new_table=True),
        Believed(),
        pod_layout(ruleset, family),
        SetNames(family),
    )
    steps.new_sets = [NewSet(shape) for shape in frame_shapes(family)]
    steps.new_sets += [new_set(key, set_name(key), ruleset, family) for key in wanted_sets(ruleset, family, Refusals())]
    chain_steps(steps, rendered(ruleset, family), believed, hold=False)
    element_steps(steps, frame_elements(FRAME, pods), pods, believed, hold=False)
    return steps


@pytest.mark.parametrize("family", BOTH, ids=str)
def test_the_first_transaction_is_written_like_this(family: Family) -> None:
    lines = [line.text for line in cold_steps(ruleset_of(cluster(WORLD, FRAME)), family).lines()]
    assert "\n".join([*lines, ""]) == (GOLDEN / f"nftables-{family}.txt".lower()).read_text()


@pytest.mark.parametrize("family", BOTH, ids=str)
def test_nothing_is_named_before_it_is_made(family: Family) -> None:
    made: set[str] = set()
    for line in cold_steps(ruleset_of(cluster(WORLD, FRAME)), family).lines():
        verb, kind, *rest = line.text.split()
        words = line.text.split(" comment ")[0].split()
        named = {word.removeprefix("@") for word in words if word.startswith("@")}
        named |= {words[at + 1].rstrip(",") for at, word in enumerate(words) if word in ("jump", "goto")}
        assert named <= made, line.text
        if (verb, kind) in (("add", "set"), ("add", "map"), ("add", "chain")):
            made.add(rest[2])


def test_what_goes_goes_in_the_reverse_order() -> None:
    steps = Steps(Family.IPV4, gone_chains=["KUBE-POD-FW-A", "KUBE-NWPLCY-B"], gone_sets={"KUBE-SRC-C": "set"})
    steps.delete = {"m": ["10.0.0.1"]}
    verbs = [" ".join(line.text.split()[:2]) for line in steps.lines()]
    assert verbs == ["delete element", "flush chain", "flush chain", "delete chain", "delete chain", "delete set"]


@pytest.mark.parametrize(
    ("ports", "text"),
    [
        (PortRange("TCP", 80, 80), "tcp dport 80"),
        (PortRange("TCP", 80), "tcp dport 80"),
        (PortRange("UDP", 80, 90), "udp dport 80-90"),
        (PortRange("SCTP"), "meta l4proto sctp"),
    ],
)
def test_ports(ports: PortRange, text: str) -> None:
    assert port_match(ports) == text


@pytest.mark.parametrize("family", BOTH, ids=str)
def test_each_direction_asks_the_other_side(family: Family) -> None:
    """S1: what allows ingress says nothing of egress; S7: a named port belongs to an address."""
    ip = "ip6" if family is Family.IPV6 else "ip"

    def text(direction: Direction) -> str:
        clause = Clause(0, "kind", PodSet(direction, ()), PortSet(direction, (), "http", "TCP"))
        return clause_rule(Key("a/b"), clause, direction, family, lambda key: type(key).__name__)

    after = f'{ip} daddr . meta l4proto . th dport @PortSet counter goto {names.DEFAULT_CHAIN} comment "a/b kind"'
    assert text(Direction.INGRESS) == f"{ip} saddr @PodSet {after}"
    assert text(Direction.EGRESS) == f"{ip} daddr @PodSet {after}"


def test_odd_bytes_and_long_names_in_comments() -> None:
    key = Key("n" * 63 + "/" + "p" * 253)
    chain = group_chain((key, Key('a/"; drop; \\\n')), Direction.INGRESS)
    assert len(chain.comment.encode()) <= names.LONGEST_COMMENT
    for text in (*chain.rules, chain.comment):
        assert "\n" not in text
        assert text.count('"') in (0, 2)
    assert map_element("10.0.0.1", "c", Key('a/b"c')) == '10.0.0.1 comment "a/bc" : jump c'


def test_a_member_is_written_in_the_words_of_nftables() -> None:
    assert element_text("10.0.0.1,tcp:80") == "10.0.0.1 . tcp . 80"
    assert element_text("fd00::1,sctp:80") == "fd00::1 . sctp . 80"
    assert element_text("fd00::/8") == "fd00::/8"


def test_pods_with_the_same_policies_share_a_chain_and_only_isolated_ones_are_led_anywhere() -> None:
    world = (*WORLD, pod("a/web2", 5, app="web"), pod("a/free", 6))
    layout = pod_layout(ruleset_of(cluster(world, FRAME)), Family.IPV4)
    assert layout.local == {"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.5", "10.0.0.6"}
    assert layout.themselves == {f"10.0.0.{number} . 10.0.0.{number}" for number in (1, 2, 5)}
    egress = layout.dispatch[Direction.EGRESS]
    assert {address: pod for address, (_, pod) in egress.items()} == {"10.0.0.1": "a/web", "10.0.0.5": "a/web2"}
    assert len({chain for chain, _ in egress.values()}) == 1
    assert layout.groups.keys() == {
        names.group_chain((ALLOW.key,), Direction.INGRESS),
        names.group_chain((ALLOW.key,), Direction.EGRESS),
        names.group_chain((DENY.key,), Direction.INGRESS),
    }


def test_established_and_foreign_traffic_cost_a_constant_number_of_rules() -> None:
    few, many = (
        {chain.name: chain.rules for chain in rendered(ruleset_of(cluster(world, FRAME)), Family.IPV4)}
        for world in (WORLD, (*WORLD, *(pod(f"a/w{number}", 100 + number, app="web") for number in range(100))))
    )
    assert few == many
    forward = few[names.TOP_CHAINS["FORWARD"]]
    assert "goto KUBE-NWPLCY-TAIL" in forward[1]
    assert "jump KUBE-NWPLCY-COMMON" in forward[2]


def chain(name: str = "c", *rules: str) -> Chain:
    return Chain(name, rules)


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize(
    ("stands", "made", "filled"),
    [
        (None, True, (True, True)),
        (EMPTY, False, (True, True)),
        (ALTERED, False, (True, True)),
        (rules_hash(["other"]), False, (True, False)),
        (rules_hash(["accept"]), False, (False, False)),
    ],
)
def test_which_chains_are_written(hold: bool, stands: int | None, made: bool, filled: tuple[bool, bool]) -> None:
    steps, believed = Steps(Family.IPV4), Believed(chains={} if stands is None else {"c": stands})
    chain_steps(steps, [chain("c", "accept")], believed, hold=hold)
    assert (bool(steps.new_chains), bool(steps.fill)) == (made, filled[hold])


def test_a_denial_that_somebody_opened_is_emptied_again() -> None:
    steps = Steps(Family.IPV4)
    chain_steps(steps, [chain("c")], Believed(chains={"c": ALTERED}), hold=True)
    assert [line.text for line in steps.lines()] == [f"flush chain ip {names.NFT_TABLES[Family.IPV4]} c"]


@pytest.mark.parametrize("hold", [False, True])
def test_a_pod_that_gets_another_chain_is_led_there_in_one_step(hold: bool) -> None:
    steps, believed = Steps(Family.IPV4), Believed()
    believed.dispatch[Direction.INGRESS] = {"10.0.0.1": "old", "10.0.0.2": "old", "10.0.0.3": "", "10.0.0.4": "same"}
    wants = {
        "10.0.0.1": ("new", Key("a/one")),
        "10.0.0.3": ("new", Key("a/three")),
        "10.0.0.4": ("same", Key("a/four")),
    }
    pods = PodLayout(dispatch={Direction.INGRESS: wants, Direction.EGRESS: {}})
    element_steps(steps, {}, pods, believed, hold=hold)
    name = names.POD_MAPS[Direction.INGRESS]
    three = '10.0.0.3 comment "a/three" : jump new'
    if hold:
        assert (steps.delete[name], steps.add[name]) == (["10.0.0.3"], [three])
    else:
        assert steps.delete[name] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
        assert steps.add[name] == ['10.0.0.1 comment "a/one" : jump new', three]


def test_what_is_refused_is_left_out_of_its_chain_alone() -> None:
    ruleset = ruleset_of(
        cluster([*WORLD, policy("b/blocks", ingress=[rule(block("10.0.0.0/8")), rule(ports=[port(22)])])], FRAME)
    )
    (blocks,) = (key for key in ruleset.members if isinstance(key, BlockSet) and key.prefixes == ("10.0.0.0/8",))
    refused, set_name = Refusals(), SetNames(Family.IPV4)
    everything = policy_chains(ruleset.policies.values(), Family.IPV4, set_name, refused)
    assert refused.note(SetOwner(blocks), "too many")
    assert not refused.note(SetOwner(blocks), "too many")
    name = names.policy_chain(Key("b/blocks"), Direction.INGRESS)
    left = policy_chains(ruleset.policies.values(), Family.IPV4, set_name, refused)
    assert {chain for chain in everything if everything[chain] != left[chain]} == {name}
    assert len(left[name].rules) == len(everything[name].rules) - 1
    assert blocks not in [*wanted_sets(ruleset, Family.IPV4, refused)]
    assert refused.note(RuleOwner(name, left[name].rules[0]), "unknown")
    assert policy_chains(ruleset.policies.values(), Family.IPV4, set_name, refused)[name].rules == ()


def all_frame_rules() -> Iterator[str]:
    for family in BOTH:
        for chain in (*frame_chains(family, FRAME), group_chain((DENY.key,), Direction.INGRESS)):
            yield from chain.rules


def test_a_rule_without_its_module_is_replaced_by_what_is_not_more_open() -> None:
    for text in all_frame_rules():
        instead = degraded(text)
        if " log group " in text or text.startswith("fib "):
            assert instead == ""
        elif "counter reject" in text:
            assert instead
            assert "reject" not in instead.split(" comment ")[0] or "fib" not in instead
            while instead and "counter drop" not in instead:
                instead = degraded(instead)
            assert instead
        else:
            assert instead is None
    last = group_chain((DENY.key,), Direction.INGRESS)
    refused = Refusals(rules={RuleOwner(last.name, text): "no module" for text in last.rules if "reject" in text})
    assert "counter drop" in refused.applied_to(last, clauses=False).rules[-1]
    refused.rules[RuleOwner(last.name, last.rules[0])] = "no module"  # nothing fits in the place of that one
    assert refused.applied_to(last, clauses=False) == last


def test_a_set_keeps_its_name_and_forgotten_ones_take_no_memory() -> None:
    ruleset = ruleset_of(cluster(WORLD, FRAME))
    set_name = SetNames(Family.IPV4)
    found = {key: set_name(key) for key in ruleset.members}
    set_name.keep([*ruleset.members][:1])
    set_name.forget(ruleset.members)
    assert {key: set_name(key) for key in ruleset.members} == found


def test_a_family_is_rendered_alike() -> None:
    """Both families get the same rules of one policy, but for the words."""
    world = (*WORLD[:4], DENY, policy("a/allow", ingress=[rule(ports=[port("http"), port(1, 9)])], egress=[rule()]))
    ruleset = ruleset_of(cluster(world, dataclasses.replace(FRAME, cluster_ranges=())))
    texts = []
    for family in BOTH:
        chains = policy_chains(ruleset.policies.values(), family, lambda key: "set", Refusals())
        texts.append({name: [text.replace("ip6 ", "ip ") for text in chain.rules] for name, chain in chains.items()})
    assert texts[0] == texts[1]
