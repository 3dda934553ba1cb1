"""The nftables backend and others: what a foreign hand does is heard, told and mended; stale states keep all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.firewall_world import ALLOW, DATABASE, DENY, OTHER, WEB, WORLD
from support.namespaces import Namespace
from support.nftnode import FRAME, KIND, Node, canonical, elements, fresh, peers_of, set_of
from support.policyworld import BOTH, cluster, pod, pods, policy, rule
from support.rulesets import ruleset_of

from kube_router.ipc.messages import Key
from kube_router.workers.firewall import names
from kube_router.workers.firewall.nftables import Nftables
from kube_router.workers.firewall.rules import (
    BlockSet,
    Changed,
    Direction,
    PortSet,
)
from kube_router.workers.kernel.nft import Nft
from kube_router.workers.kernel.nfttables import delete_table
from kube_router.workers.model import Family


@pytest.fixture
def node(netns: Namespace) -> Iterator[Node]:
    with netns.enter():
        made = Node(netns)
        yield made
        made.backend.close()


Damage = Callable[[Node, Family], str]


def _command(template: str) -> Damage:
    def damage(node: Node, family: Family) -> str:
        return template.format(
            table=f"{KIND[family]} {names.NFT_TABLES[family]}",
            policy=names.policy_chain(ALLOW.key, Direction.INGRESS),
            deny=names.policy_chain(DENY.key, Direction.INGRESS),
            group=names.group_chain((DENY.key,), Direction.INGRESS),
            peers=names.set_name(peers_of(node), family),
            ports=set_of(node, family, PortSet),
            blocks=next(
                names.set_name(key, family)
                for key in node.ruleset.members
                if isinstance(key, BlockSet) and key.family is family and len(key.prefixes) > 1
            ),
            address="10.0.0.2" if family is Family.IPV4 else "fd00::2",
            stranger="10.9.9.9" if family is Family.IPV4 else "fd00::99",
            prefix="99.64.0.0/10" if family is Family.IPV4 else "fc80::/9",
            pods=names.POD_MAPS[Direction.INGRESS],
        )

    return damage


DAMAGES = {
    "the table is deleted": ("delete table {table}", "was deleted"),
    "a chain is flushed": ("flush chain {table} KUBE-ROUTER-FORWARD", "chain KUBE-ROUTER-FORWARD was flushed"),
    "a policy's chain is flushed": ("flush chain {table} {policy}", "was flushed"),
    "a rule is put in front": ("insert rule {table} KUBE-ROUTER-FORWARD accept", "was changed"),
    "a chain that denies all gets a rule": ("add rule {table} {deny} accept", "was changed"),
    "a chain is deleted": (
        "flush chain {table} KUBE-ROUTER-INPUT; delete chain {table} KUBE-ROUTER-INPUT",
        "was deleted",
    ),
    "a foreign chain is made": (
        "add chain {table} foreign; add rule {table} foreign counter drop",
        "foreign was added",
    ),
    "a member is deleted": ("delete element {table} {peers} {{ {address} }}", "1 of its elements were missing"),
    "a member is added": ("add element {table} {peers} {{ {stranger} }}", "1 foreign elements were in it"),
    "a port is added": ("add element {table} {ports} {{ {stranger} . udp . 53 }}", "1 foreign elements were in it"),
    "a set is flushed": ("flush set {table} kube-router-local-pods", "3 of its elements were missing"),
    "a pod leaves the map": ("delete element {table} {pods} {{ {address} }}", "1 of its elements were missing"),
    "a pod is led elsewhere": (
        "delete element {table} {pods} {{ {address} }}; "
        "add element {table} {pods} {{ {address} : jump KUBE-NWPLCY-DEFAULT }}",
        "was led to KUBE-NWPLCY-DEFAULT",
    ),
    "a stranger is put into the map": (
        "add element {table} {pods} {{ {stranger} : jump {group} }}",
        "1 foreign elements",
    ),
    "all blocks are deleted": ("flush set {table} {blocks}", "its blocks were changed"),
    "a block is added": ("add element {table} {blocks} {{ {prefix} }}", "its blocks were changed"),
    "a set is made": ("add set {table} foreign {{ type inet_service; }}", "foreign was added"),
    "a map is made": ("add map {table} foreign {{ type inet_service : verdict; }}", "foreign was added"),
    "a set is deleted": ("flush chain {table} {policy}; delete set {table} {ports}", "was deleted"),
}


@pytest.mark.parametrize("family", BOTH, ids=str)
@pytest.mark.parametrize(("template", "told"), DAMAGES.values(), ids=DAMAGES.keys())
def test_what_a_foreign_hand_does_wakes_is_told_and_is_mended(
    node: Node, family: Family, template: str, told: str
) -> None:
    node.start()
    before = node.tables()
    assert not node.woken()
    node.nft(_command(template)(node, family))
    assert node.woken()
    mended = node.look()
    assert mended.failures == ()
    assert mended.writes > 0
    assert any(told in line for line in mended.repaired), mended.repaired
    assert canonical(node.tables()) == canonical(before)
    assert not node.woken()
    assert (node.look().writes, node.restart().writes) == (0, 0)


@pytest.mark.parametrize("family", BOTH, ids=str)
@pytest.mark.parametrize(("template", "told"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_new_process_mends_what_was_damaged_before_it(node: Node, family: Family, template: str, told: str) -> None:
    node.start()
    before = node.tables()
    node.nft(_command(template)(node, family))
    plan = node.backend.plan(node.ruleset, node.state.frame)
    assert plan
    synced = node.restart()
    assert (synced.failures, synced.repaired) == ((), ())  # it has no memory of who did that
    assert synced.writes > 0
    assert canonical(node.tables()) == canonical(before)


MISFITS = {
    "a set of another type": "add set {table} kube-router-local-pods {{ type inet_service; }}",
    "a set that is a map": "add map {table} kube-router-local-pods {{ type inet_service : verdict; }}",
    "a set with a timeout": "add set {table} kube-router-local-pods {{ type {address_type}; timeout 1h; }}",
    "a chain without its hook": "add chain {table} KUBE-ROUTER-FORWARD",
    "a chain hooked elsewhere": "add chain {table} KUBE-ROUTER-INPUT {{ type filter hook input priority 10; }}",
    "a chain that drops": "add chain {table} KUBE-ROUTER-INPUT {{ type filter hook input priority 0; policy drop; }}",
}


@pytest.mark.parametrize("family", BOTH, ids=str)
@pytest.mark.parametrize("template", MISFITS.values(), ids=MISFITS.keys())
def test_what_has_our_name_and_is_not_ours_is_made_anew_in_one_transaction(
    node: Node, family: Family, template: str
) -> None:
    table = f"{KIND[family]} {names.NFT_TABLES[family]}"
    kind = "ipv4_addr" if family is Family.IPV4 else "ipv6_addr"
    node.nft(f"add table {table}; " + template.format(table=table, address_type=kind))
    held = node.start(hold=True)
    assert [failure.text for failure in held.failures if "made anew" in failure.text]
    synced = node.restart()
    assert synced.failures == ()
    assert canonical(node.tables()) == canonical(fresh(node))


def test_foreign_tables_are_never_touched(node: Node) -> None:
    foreign = "add table ip filter; add chain ip filter KUBE-ROUTER-INPUT; add rule ip filter KUBE-ROUTER-INPUT counter"
    node.nft(
        f"{foreign}; add table inet kube-router-filter-ipv4; add set inet kube-router-filter-ipv4 x {{ type mark; }}"
    )
    listing = "nft -s list table ip filter; nft -s list table inet kube-router-filter-ipv4"
    before = node.namespace.run(listing)
    node.start()
    node.become(OTHER)
    node.look()
    assert not node.woken()
    assert node.namespace.run(listing) == before
    for family in BOTH:
        assert delete_table(family, names.NFT_TABLES[family])
    assert node.namespace.run("nft -s list ruleset") == before.replace("}\ntable", "}\ntable")


def test_the_churn_of_foreign_tables_wakes_nobody(node: Node) -> None:
    node.start()
    node.nft(
        "add table ip t; add set ip t s { type ipv4_addr; }; add element ip t s { 10.0.0.1, 10.0.0.2 }; "
        "delete table ip t"
    )
    assert not node.woken()
    assert node.look().writes == 0


def test_an_unchanged_rule_set_number_spares_the_look(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.start()
    looks: list[str] = []
    listing = Nft.list_table
    monkeypatch.setattr(Nft, "list_table", lambda self, family, name: looks.append(name) or listing(self, family, name))
    node.become(*WORLD[:-1])
    node.become(*WORLD)
    node.look()
    assert looks == []
    node.nft("add table ip t")
    node.look()
    assert looks == [*names.NFT_TABLES.values()]
    node.look()
    assert len(looks) == 2


def test_a_change_that_meets_foreign_damage_still_succeeds(node: Node) -> None:
    """Nobody has looked yet when the next change comes: the kernel refuses it, and then it is looked at."""
    node.start()
    for family in BOTH:
        node.nft(f"delete table {KIND[family]} {names.NFT_TABLES[family]}")
    synced = node.become(*WORLD, pod("a/another", 17, node="n2", app="db"))
    assert (synced.failures, len(synced.repaired)) == ((), 2)
    assert canonical(node.tables()) == canonical(fresh(node))
    node.nft(f"flush set ip {names.NFT_TABLES[Family.IPV4]} {names.set_name(peers_of(node), Family.IPV4)}")
    synced = node.become(*WORLD)  # a member that is gone already goes
    assert synced.failures == ()
    assert canonical(node.tables()) == canonical(fresh(node))


def test_a_stale_state_adds_and_keeps(node: Node) -> None:
    node.start()
    before = set(canonical(node.tables()))
    peers = {family: names.set_name(peers_of(node), family) for family in BOTH}
    fewer = (WEB, OTHER, DENY, policy("b/new", ingress=[rule(pods())]), pod("a/another", 17, node="n2", app="db"))
    held = node.become(*fewer, hold=True)
    assert held.failures == ()
    lost = {text for text in before - set(canonical(node.tables())) if "elements" not in text}
    assert lost == set()
    for family, gone in zip(BOTH, ("10.0.0.2", "fd00::2"), strict=True):
        assert names.policy_chain(Key("b/new"), Direction.INGRESS) in node.table(family)
        assert gone in elements(node, family, names.LOCAL_PODS)
        assert gone in elements(node, family, peers[family])
    confirmed = node.give(node.ruleset, observe=True)
    assert (confirmed.failures, confirmed.repaired) == ((), ())
    assert canonical(node.tables()) == canonical(fresh(node))


def test_a_stale_state_after_a_restart_keeps_what_it_does_not_know(node: Node) -> None:
    node.start()
    before = canonical(node.tables())
    node.backend.close()
    node.backend = Nftables()
    node.ruleset = ruleset_of(cluster((WEB, DATABASE, OTHER), FRAME))
    synced = node.backend.sync(node.ruleset, Changed(everything=True), node.state.frame, observe=True, hold=True)
    assert (synced.failures, synced.writes) == ((), 0)
    assert canonical(node.tables()) == before
    node.nft(f"flush chain ip {names.NFT_TABLES[Family.IPV4]} {names.COMMON_CHAIN}")
    assert node.backend.sync(node.ruleset, Changed(), node.state.frame, observe=True, hold=True).repaired
    assert canonical(node.tables()) == before
    assert node.look().writes > 0
    assert canonical(node.tables()) == canonical(fresh(node))
