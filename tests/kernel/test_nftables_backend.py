"""The nftables backend on a kernel: what it writes, what it leaves, and how it gets back what others took."""

from __future__ import annotations

import dataclasses
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from support.namespaces import Namespace
from support.namespaces import namespaces as namespaces_of_tests
from support.policyworld import BOTH, block, cluster, namespaces, pod, pods, policy, port, rule
from support.policyworld import select as labels
from support.rulesets import changed_between, ruleset_of

from kube_router.ipc.messages import Key, NetworkPolicy, Pod, PolicyPeer
from kube_router.workers.firewall import names
from kube_router.workers.firewall.backend import Synced
from kube_router.workers.firewall.nftables import Nftables
from kube_router.workers.firewall.nftsync import BULK
from kube_router.workers.firewall.policies import compile_policy
from kube_router.workers.firewall.rules import (
    BlockSet,
    Changed,
    Clause,
    Direction,
    Frame,
    PodSelection,
    PodSet,
    PolicyRules,
    PortRange,
    PortSet,
    Ruleset,
)
from kube_router.workers.kernel.nft import Nft
from kube_router.workers.kernel.nfttables import delete_table
from kube_router.workers.model import Family, parse_network

KIND = {Family.IPV4: "ip", Family.IPV6: "ip6"}
FRAME = Frame(
    families=BOTH,
    cluster_ranges=(parse_network("10.96.0.0/12"), parse_network("fd00:96::/108")),
    external_ranges=(parse_network("192.0.2.7/32"), parse_network("2001:db8::7/128")),
    load_balancer_ranges=(parse_network("198.51.100.0/24"), parse_network("2001:db8:5::/64")),
    node_ports=frozenset({("tcp", 30080), ("udp", 30053), ("sctp", 30036)}),
    pod_cidrs=(parse_network("10.0.0.0/24"), parse_network("fd00::/64")),
    default_deny=True,
    only_syn_opens=True,
)
WEB = pod("a/web", 1, ports={"http": 8080}, app="web")
DATABASE = pod("a/db", 2, app="db")
OTHER = pod("b/other", 3, app="other")
REMOTE = pod("a/remote", 9, node="n2", app="db")
DENY = policy("a/deny", labels(app="db"), ingress=[])
ALLOW = policy(
    "a/allow",
    labels(app="web"),
    ingress=[
        rule(
            pods(app="db"),
            block("10.0.0.0/8", "10.1.0.0/16"),
            block("fd00::/8", "fd00:1::/32"),
            ports=[port("http"), port(80), port(90, 99), port(53, protocol="UDP"), port(protocol="SCTP")],
        ),
        rule(block("0.0.0.0/0"), block("::/0"), ports=[port(443)]),
    ],
    egress=[rule(pods(app="db")), rule(ports=[port(53, protocol="UDP")])],
)
WORLD: tuple[Pod | NetworkPolicy, ...] = (WEB, DATABASE, OTHER, REMOTE, DENY, ALLOW)


class Node:
    """The backend with the rule set that it was last given; use it inside the namespace."""

    def __init__(self, namespace: Namespace, world: tuple[Pod | NetworkPolicy, ...] = WORLD) -> None:
        self.namespace = namespace
        self.backend = Nftables()
        self.state = cluster(world, FRAME)
        self.ruleset = Ruleset()

    def start(self, *, hold: bool = False) -> Synced:
        """The first sync of a process."""
        self.ruleset = ruleset_of(self.state)
        return self.backend.sync(self.ruleset, Changed(everything=True), self.state.frame, observe=True, hold=hold)

    def become(self, *world: Pod | NetworkPolicy, hold: bool = False, observe: bool = False) -> Synced:
        """A sync after the cluster has become this one."""
        return self.give(ruleset_of(cluster(world, FRAME)), hold=hold, observe=observe)

    def give(self, ruleset: Ruleset, *, hold: bool = False, observe: bool = False) -> Synced:
        changed = changed_between(self.ruleset, ruleset)
        self.ruleset = ruleset
        return self.backend.sync(ruleset, changed, self.state.frame, observe=observe, hold=hold)

    def look(self) -> Synced:
        """A sync that observes, of an unchanged cluster."""
        return self.backend.sync(self.ruleset, Changed(), self.state.frame, observe=True, hold=False)

    def restart(self) -> Synced:
        """A new process without memory."""
        self.backend.close()
        self.backend = Nftables()
        return self.backend.sync(self.ruleset, Changed(everything=True), self.state.frame, observe=True, hold=False)

    def nft(self, command: str) -> str:
        """What the program says."""
        return self.namespace.run(f"nft '{command}'")

    def table(self, family: Family) -> str:
        """The text of a table, elements and all."""
        return self.namespace.run(f"nft -s list table {KIND[family]} {names.NFT_TABLES[family]}")

    def tables(self) -> str:
        return "".join(map(self.table, BOTH))

    def woken(self) -> bool:
        """Whether a waker asks for a sync."""
        wakers = self.backend.wakers()
        ready, _, _ = select.select(list(wakers), [], [], 0)
        return any([wakers[descriptor]() for descriptor in ready])  # noqa: C419 - each must be drained


@pytest.fixture
def node(netns: Namespace) -> Iterator[Node]:
    with netns.enter():
        made = Node(netns)
        yield made
        made.backend.close()


def fresh(node: Node) -> str:
    """The tables that a backend makes of the same rule set in an empty kernel."""
    with namespaces_of_tests() as (other,), other.enter():
        twin = Node(other, ())
        twin.backend.sync(node.ruleset, Changed(everything=True), node.state.frame, observe=True, hold=False)
        text = twin.tables()
        twin.backend.close()
        return text


def canonical(tables: str) -> list[str]:
    """What listings say, without the order that sets, chains and elements have by accident."""
    whole = re.sub(r"elements = \{(.*?)\}", _sorted_elements, tables, flags=re.DOTALL)
    return sorted(re.split(r"\n\n|(?<=\{)\n(?=\t(?:set|map|chain) )|\n(?=\})", whole))


def _sorted_elements(found: re.Match[str]) -> str:
    return f"elements: {sorted(' '.join(item.split()) for item in found[1].split(','))}"


def test_a_second_sync_and_a_new_process_write_nothing(node: Node) -> None:
    first = node.start()
    assert (first.failures, first.repaired, first.warnings) == ((), (), ())
    assert first.writes > 50
    before = node.tables()
    monitor = node.namespace.start(["nft", "monitor"], stdout=subprocess.PIPE)
    time.sleep(0.3)
    assert node.backend.plan(node.ruleset, node.state.frame) == ()
    for synced in (node.look(), node.become(*WORLD), node.restart(), node.restart(), node.look()):
        assert (synced.writes, synced.failures, synced.repaired) == (0, (), ())
        assert synced.counts == first.counts
    node.nft("add table ip foreign")
    time.sleep(0.1)
    monitor.terminate()
    told, _ = monitor.communicate()
    assert [line for line in told.splitlines() if not line.startswith("#")] == ["add table ip foreign"]
    assert node.tables() == before


def elements(node: Node, family: Family, name: str) -> set[str]:
    """The elements of a set, as the program lists them, without comments."""
    text = node.namespace.run(f"nft -s list set {KIND[family]} {names.NFT_TABLES[family]} {name}")
    found = re.search(r"elements = \{(.*?)\}", text, re.DOTALL)
    return {" ".join(item.split()) for item in found[1].split(",")} if found else set()


def set_of(node: Node, family: Family, kind: type) -> str:
    """The name of the only set of a kind."""
    (key,) = (key for key in node.ruleset.members if isinstance(key, kind) and len(node.ruleset.members[key]) == 2)
    return names.set_name(key, family)


def test_both_families_hold_the_same_members(node: Node) -> None:
    node.start()
    assert elements(node, Family.IPV4, names.LOCAL_PODS) == {"10.0.0.1", "10.0.0.2", "10.0.0.3"}
    assert elements(node, Family.IPV6, names.LOCAL_PODS) == {"fd00::1", "fd00::2", "fd00::3"}
    assert elements(node, Family.IPV4, names.NODE_PORTS["sctp"]) == {"30036"}
    assert elements(node, Family.IPV4, set_of(node, Family.IPV4, PortSet)) == {"10.0.0.1 . tcp . 8080"}
    assert elements(node, Family.IPV6, set_of(node, Family.IPV6, PortSet)) == {"fd00::1 . tcp . 8080"}
    for family in BOTH:
        for key, members in node.ruleset.members.items():
            if isinstance(key, PodSet):
                assert elements(node, family, names.set_name(key, family)) == members[family]


def test_a_member_comes_and_goes_in_one_message_and_nothing_is_listed(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.start()

    def never(*_: object) -> None:
        raise AssertionError("a change of members went through the library")

    monkeypatch.setattr(Nft, "run", never)
    monkeypatch.setattr(Nft, "list_table", never)
    another = pod("a/another", 17, node="n2", app="db")
    came = node.become(*WORLD, another)
    assert (came.failures, came.writes) == ((), 4)  # sources of ingress, destinations of egress, in both families
    for family, address in zip(BOTH, ("10.0.0.17", "fd00::11"), strict=True):
        holding = [key for key, members in node.ruleset.members.items() if address in members.get(family, ())]
        assert [address in elements(node, family, names.set_name(key, family)) for key in holding] == [True, True]
    assert node.become(*WORLD).writes == 4
    monkeypatch.undo()
    assert node.look().writes == node.restart().writes == 0


WORLDS: dict[str, tuple[Pod | NetworkPolicy, ...]] = {
    "a pod comes": (*WORLD, pod("a/new", 33, app="web", ports={"http": 8081})),
    "a pod goes": tuple(item for item in WORLD if item is not DATABASE),
    "a pod gets another label": (pod("a/web", 1, ports={"http": 8080}, app="db"), *WORLD[1:]),
    "a pod gets another address": (pod("a/web", 44, ports={"http": 8080}, app="web"), *WORLD[1:]),
    "an address becomes another pod's": (pod("a/db2", 1, app="db"), *WORLD[1:]),
    "a policy comes": (*WORLD, policy("b/new", ingress=[rule(pods())], egress=[rule(block("203.0.113.0/24"))])),
    "a policy changes": (*WORLD[:-1], policy("a/allow", labels(app="web"), ingress=[rule(pods(app="web"))])),
    "a policy goes": WORLD[:-1],
    "a policy covers the other direction": (*WORLD[:-2], policy("a/deny", labels(app="db"), egress=[]), ALLOW),
    "everything goes": (OTHER,),
    "nothing is left": (),
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_every_change_leads_to_what_a_new_process_would_make_and_back(
    node: Node, world: tuple[Pod | NetworkPolicy, ...]
) -> None:
    node.start()
    first = node.tables()
    changed = node.become(*world)
    assert (changed.failures, changed.repaired) == ((), ())
    assert changed.writes > 0
    assert node.backend.plan(node.ruleset, node.state.frame) == ()
    assert canonical(node.tables()) == canonical(fresh(node))
    back = node.become(*WORLD)
    assert (back.failures, back.repaired) == ((), ())
    assert canonical(node.tables()) == canonical(first)
    again = node.restart()
    assert (again.writes, again.failures) == (0, ())


def test_a_change_writes_only_what_it_concerns(node: Node) -> None:
    node.start()
    untouched = names.policy_chain(DENY.key, Direction.INGRESS)
    monitor = node.namespace.start(["nft", "monitor"], stdout=subprocess.PIPE)
    time.sleep(0.3)
    node.become(*WORLD[:-1], policy("a/allow", labels(app="web"), ingress=[rule(pods(app="web"))]))
    node.nft("add table ip end")
    time.sleep(0.2)
    monitor.terminate()
    told, _ = monitor.communicate()
    assert names.policy_chain(ALLOW.key, Direction.INGRESS) in told
    assert untouched not in told
    assert names.COMMON_CHAIN not in told


Damage = Callable[[Node, Family], str]


def _command(template: str) -> Damage:
    def damage(node: Node, family: Family) -> str:
        return template.format(
            table=f"{KIND[family]} {names.NFT_TABLES[family]}",
            policy=names.policy_chain(ALLOW.key, Direction.INGRESS),
            deny=names.policy_chain(DENY.key, Direction.INGRESS),
            group=names.group_chain((DENY.key,), Direction.INGRESS),
            peers=names.set_name(_peers(node), family),
            ports=set_of(node, family, PortSet),
            blocks=next(
                names.set_name(key, family)
                for key in node.ruleset.members
                if isinstance(key, BlockSet) and key.family is family and len(key.prefixes) > 1
            ),
            address="10.0.0.2" if family is Family.IPV4 else "fd00::2",
            stranger="10.9.9.9" if family is Family.IPV4 else "fd00::99",
            prefix="10.64.0.0/10" if family is Family.IPV4 else "fd80::/9",
            pods=names.POD_MAPS[Direction.INGRESS],
        )

    return damage


def _peers(node: Node) -> PodSet:
    return next(key for key in node.ruleset.members if isinstance(key, PodSet) and key.direction is Direction.INGRESS)


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
    "a block is deleted": ("delete element {table} {blocks} {{ {prefix} }}", "its blocks were changed"),
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
    node.nft(f"flush set ip {names.NFT_TABLES[Family.IPV4]} {names.set_name(_peers(node), Family.IPV4)}")
    synced = node.become(*WORLD)  # a member that is gone already goes
    assert synced.failures == ()
    assert canonical(node.tables()) == canonical(fresh(node))


def test_a_stale_state_adds_and_keeps(node: Node) -> None:
    node.start()
    before = set(canonical(node.tables()))
    peers = {family: names.set_name(_peers(node), family) for family in BOTH}
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


BAD = {
    "overlapping blocks": Clause(
        0, "ingress cidr", BlockSet(Direction.INGRESS, Family.IPV4, ("10.0.0.0/8", "10.1.0.0/16")), None
    ),
    "blocks that are none": Clause(0, "ingress cidr", BlockSet(Direction.INGRESS, Family.IPV4, ("nonsense",)), None),
    "an unknown protocol": Clause(0, "ingress any", None, PortRange("NONSENSE", 80, 80)),
    "a port out of range": Clause(0, "ingress any", None, PortRange("TCP", 80, 99999)),
}


@pytest.mark.parametrize("clause", BAD.values(), ids=BAD.keys())
def test_what_the_kernel_refuses_of_one_policy_is_left_out_and_the_rest_goes_in(node: Node, clause: Clause) -> None:
    node.start()
    good = [*node.ruleset.policies.values()]
    fine = dataclasses.replace(clause, kind="ingress any", peer=None, port=PortRange("TCP", 8443, 8443))
    bad = PolicyRules(Key("b/bad"), "uid", PodSelection((), "b"), (clause, fine), None)
    other = compile_policy(policy("b/good", egress=[rule(ports=[port(22)])]), BOTH)
    synced = node.give(ruleset_of(node.state, [*good, bad, other]))
    assert [*synced.failed] == [bad.key]
    assert synced.failures == ()  # nothing but this policy failed
    assert "\n" not in synced.failed[bad.key]
    chain = f"{KIND[Family.IPV4]} {names.NFT_TABLES[Family.IPV4]} {names.policy_chain(bad.key, Direction.INGRESS)}"
    assert node.nft(f"list chain {chain}").count("goto") == 1
    for family in BOTH:
        assert names.policy_chain(other.key, Direction.EGRESS) in node.table(family)
    again = node.look()  # tried again, refused again, nothing else is touched
    assert ([*again.failed], again.writes) == ([bad.key], 0)
    assert node.restart().failed.keys() == {bad.key}
    healed = node.give(ruleset_of(node.state, [*good, other]))
    assert (healed.failed, healed.failures) == ({}, ())
    assert canonical(node.tables()) == canonical(fresh(node))


def test_many_bad_policies_hide_no_good_one(node: Node) -> None:
    """The library tells ten syntax errors at a time."""
    node.start()
    clause = Clause(0, "ingress any", None, PortRange("NONSENSE", 80, 80))
    bad = [PolicyRules(Key(f"b/bad{number}"), "uid", PodSelection((), "b"), (clause,), None) for number in range(35)]
    other = compile_policy(policy("b/good", egress=[]), BOTH)
    synced = node.give(ruleset_of(node.state, [*node.ruleset.policies.values(), *bad, other]))
    assert synced.failed.keys() == {rules.key for rules in bad}
    assert names.policy_chain(other.key, Direction.EGRESS) in node.table(Family.IPV6)


@pytest.mark.parametrize(
    "blocks",
    [
        (block("0.0.0.0/0"), block("::/0")),
        (block("0.0.0.0/0", "10.0.0.0/8"), block("::/0", "fd00::/8")),
        (block("10.0.0.0/8"), block("10.1.0.0/16"), block("10.0.0.0/9"), block("fd00::/8"), block("fd00::/16")),
        (
            block("255.255.255.255/32"),
            block("0.0.0.0/32"),
            block("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"),
            block("::/128"),
        ),
        tuple(block(f"10.{number >> 8}.{number & 255}.0/25") for number in range(5000))
        + tuple(block(f"2001:db8:{number:x}::/49") for number in range(5000)),
    ],
    ids=["all", "all but some", "overlapping", "first and last", "5,000"],
)
def test_blocks_of_every_kind_stand_and_are_read_back(node: Node, blocks: tuple[PolicyPeer, ...]) -> None:
    node.start()
    synced = node.become(*WORLD, policy("b/blocks", ingress=[rule(*blocks)]))
    assert (synced.failures, synced.failed) == ((), {})
    assert node.restart().writes == 0
    assert node.backend.plan(node.ruleset, node.state.frame) == ()


def test_a_large_set_is_filled_before_anything_names_it(node: Node) -> None:
    node.start()
    many = [pod(f"c/p{number}", 0, node="n2", app="many") for number in range(3 * BULK)]
    for number, item in enumerate(many):
        addresses = (f"10.8.{number >> 8}.{number & 255}", f"fd00:8::{number:x}")
        many[number] = msgspec.structs.replace(item, ips=addresses)
    synced = node.become(*WORLD, *many, policy("b/many", ingress=[rule(namespaces(name="c"))]))
    assert synced.failures == ()
    assert synced.writes > 6 * BULK
    assert node.look().writes == 0
    assert node.restart().writes == 0


def test_a_frame_that_changes_is_followed(node: Node) -> None:
    node.start()
    ports = frozenset({("tcp", 31000)})
    frame = dataclasses.replace(FRAME, node_ports=ports, default_deny=False, only_syn_opens=False)
    node.state = dataclasses.replace(node.state, frame=frame)
    changed = node.backend.sync(node.ruleset, Changed(), node.state.frame, observe=False, hold=False)
    assert (changed.failures, changed.writes > 0) == ((), True)
    assert elements(node, Family.IPV6, names.NODE_PORTS["tcp"]) == {"31000"}
    assert "default-deny" not in node.tables()
    assert canonical(node.tables()) == canonical(fresh(node))
    assert node.restart().writes == 0


def test_one_family_alone(node: Node) -> None:
    node.state = dataclasses.replace(node.state, frame=dataclasses.replace(FRAME, families=(Family.IPV6,)))
    assert node.start().failures == ()
    assert "kube-router-filter-ipv4" not in node.nft("list tables")
    assert node.restart().writes == 0


def test_upstreams_table_is_taken_over(node: Node) -> None:
    """Go kube-router's names: its versioned chains and its sets go in the transaction that brings ours."""
    for family in BOTH:
        kind, saddr = KIND[family], f"{KIND[family]} saddr"
        one = "10.0.0.1" if family is Family.IPV4 else "fd00::1"
        table = f"{kind} {names.NFT_TABLES[family]}"
        address = "ipv4_addr" if family is Family.IPV4 else "ipv6_addr"
        node.namespace.run(
            "nft -f -",
            stdin=f"""
            table {table} {{
              comment "rules for {names.NFT_TABLES[family]}"
              set kube-router-local-pods {{
                type {address}; comment "programmed local pod IPs"; elements = {{ {one} }}
              }}
              set KUBE-SRC-AAAAAAAAAAAAAAAA {{ type {address}; comment "netpol set"; elements = {{ {one} }} }}
              chain KUBE-ROUTER-INPUT {{
                type filter hook input priority 0; comment "top level KUBE-ROUTER-INPUT chain for kube-router";
                {saddr} {one} counter jump KUBE-POD-FW-AAAAAAAAAAAAAAAA comment "a/web out"
                counter jump KUBE-NWPLCY-TAIL
              }}
              chain KUBE-NWPLCY-TAIL {{ meta mark and 0x20000 == 0x20000 counter accept
              }}
              chain KUBE-NWPLCY-AAAAAAAAAAAAAAAA {{
                {saddr} @KUBE-SRC-AAAAAAAAAAAAAAAA counter meta mark set meta mark or 0x10000 return
              }}
              chain KUBE-POD-FW-AAAAAAAAAAAAAAAA {{ counter jump KUBE-NWPLCY-AAAAAAAAAAAAAAAA
                meta mark and 0x10000 == 0x0 counter reject
              }}
            }}
            """,
        )
    assert node.start().failures == ()
    assert "AAAAAAAAAAAAAAAA" not in node.tables()
    assert canonical(node.tables()) == canonical(fresh(node))
