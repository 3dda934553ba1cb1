"""The nftables backend when things fail: refusals, missing modules, and the end of the process at any write."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec
import pytest
from support.firewall_world import ALLOW, DENY, WEB, WORLD
from support.namespaces import Namespace
from support.nftnode import KIND, Node, canonical, chains, elements, fresh, peers_of, planned
from support.policyworld import BOTH, namespaces, pod, pods, policy, port, rule
from support.policyworld import select as labels
from support.rulesets import ruleset_of

from kube_router.ipc.messages import Key
from kube_router.workers.firewall import names
from kube_router.workers.firewall.backend import BackendError
from kube_router.workers.firewall.nftables import Nftables
from kube_router.workers.firewall.nftrender import element_text
from kube_router.workers.firewall.nftsync import BULK
from kube_router.workers.firewall.policies import compile_policy
from kube_router.workers.firewall.rules import (
    BlockSet,
    Clause,
    Direction,
    PodSelection,
    PodSet,
    PolicyRules,
    PortRange,
)
from kube_router.workers.kernel.netlink import NetlinkSocket
from kube_router.workers.kernel.nft import Nft
from kube_router.workers.kernel.nftelements import ElementChange, ElementDriver
from kube_router.workers.kernel.nftsocket import NftError
from kube_router.workers.model import Family


@pytest.fixture
def node(netns: Namespace) -> Iterator[Node]:
    with netns.enter():
        made = Node(netns)
        yield made
        made.backend.close()


BAD = {
    "blocks of another family": Clause(
        0, "ingress cidr", BlockSet(Direction.INGRESS, Family.IPV4, ("fd00::/8",)), None
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
    node.start()
    clause = Clause(0, "ingress any", None, PortRange("NONSENSE", 80, 80))
    bad = [PolicyRules(Key(f"b/bad{number}"), "uid", PodSelection((), "b"), (clause,), None) for number in range(35)]
    other = compile_policy(policy("b/good", egress=[]), BOTH)
    synced = node.give(ruleset_of(node.state, [*node.ruleset.policies.values(), *bad, other]))
    assert synced.failed.keys() == {rules.key for rules in bad}
    assert names.policy_chain(other.key, Direction.EGRESS) in node.table(Family.IPV6)


class Killed(BaseException):
    """The process ends here."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, *, after: bool) -> list[str]:
    """End the process before or after its ``step``-th write; what it wrote."""
    written: list[str] = []

    def armed(real: Callable[..., None], what: str) -> Callable[..., None]:
        def act(*arguments: object) -> None:
            if len(written) == step and not after:
                raise Killed
            real(*arguments)
            written.append(what)
            if len(written) == step + 1 and after:
                raise Killed

        return act

    monkeypatch.setattr(Nft, "run", armed(Nft.run, "structure"))
    monkeypatch.setattr(ElementDriver, "apply", armed(ElementDriver.apply, "members"))
    return written


CROWD = tuple(
    msgspec.structs.replace(
        pod(f"c/p{number}", 0, node="n2"), ips=(f"10.8.{number >> 8}.{number & 255}", f"fd00:8::{number:x}")
    )
    for number in range(BULK + 1)
)
AFTER = (
    WEB,
    pod("a/db", 22, app="db"),
    pod("a/remote", 9, node="n2", app="web"),
    pod("a/late", 10, node="n2", app="db"),
    *CROWD,
    DENY,
    policy("a/allow", labels(app="web"), ingress=[rule(pods(app="db"), namespaces(name="c"), ports=[port(80)])]),
    policy("a/more", labels(app="db"), ingress=[rule(namespaces(name="c"))]),
)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_process_killed_at_any_write_leaves_traffic_as_it_was_or_closed(
    node: Node, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    node.start()
    steps = 0
    while True:
        node.become(*WORLD, observe=True)
        old = node.ruleset
        before = {family: chains(node, family) for family in BOTH}
        with monkeypatch.context() as patched:
            written = kill_at(patched, steps, after=after)
            try:
                node.become(*AFTER)
                killed = False
            except Killed:
                killed = True
        reached = {family: chains(node, family) for family in BOTH}
        for key in old.members.keys() & node.ruleset.members.keys():  # who may keep talking, may
            for family, members in old.members[key].items():
                if not isinstance(key, BlockSet):
                    kept = {element_text(member) for member in members & node.ruleset.members[key][family]}
                    assert kept <= elements(node, family, names.set_name(key, family))
        for family in BOTH:  # every chain is wholly the old one or wholly the new one
            if reached[family] != before[family]:
                assert reached[family] == planned(node, family)
        node.backend.close()
        node.backend = Nftables()
        assert node.restart().failures == ()
        assert node.backend.plan(node.ruleset, node.state.frame) == ()
        if not killed:
            break
        steps += 1
    assert steps == len(written) >= 8  # members, a large set and its filling, structure, members; in both families


MISSING = {
    "no log": (" log group ", "log group", ""),
    "no reject": ("reject", "reject", "drop"),
    "no fib": ("fib ", "fib", ""),
}


@pytest.mark.parametrize(("words", "gone", "instead"), MISSING.values(), ids=MISSING.keys())
def test_a_kernel_without_a_module_gets_what_is_as_closed(
    node: Node, monkeypatch: pytest.MonkeyPatch, words: str, gone: str, instead: str
) -> None:
    real = Nft.run

    def run(self: Nft, commands: Sequence[str]) -> None:
        refused = [
            (at, "No such file or directory") for at, text in enumerate(commands) if words in text.split("comment")[0]
        ]
        if refused:
            raise NftError("nftables: No such file or directory", refused)
        real(self, commands)

    monkeypatch.setattr(Nft, "run", run)
    synced = node.start()
    assert (synced.failures, synced.failed) == ((), {})
    assert synced.warnings
    assert all("\n" not in line for line in synced.warnings)
    rules = [
        text.split(" comment ")[0] for family in BOTH for rules_ in chains(node, family).values() for text in rules_
    ]
    assert not [text for text in rules if gone in text]
    if instead:
        assert sum(instead in text for text in rules) > len(node.ruleset.pods)
    denial = chains(node, Family.IPV4)[names.group_chain((DENY.key,), Direction.INGRESS)]
    assert [text for text in denial if "counter reject" in text or "counter drop" in text]
    monkeypatch.undo()
    healed = node.look()
    assert (healed.failures, healed.warnings) == ((), ())
    assert canonical(node.tables()) == canonical(fresh(node))


def test_a_set_that_cannot_be_filled_closes_its_clauses_alone(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.start()
    real, full = ElementDriver.apply, names.set_name(peers_of(node), Family.IPV4)

    def apply(self: ElementDriver, family: Family, table: str, changes: Iterable[ElementChange]) -> None:
        asked = [*changes]
        if any(change.name == full and change.add for change in asked):
            raise NftError(f"set {full}: Cannot allocate memory")
        real(self, family, table, asked)

    monkeypatch.setattr(ElementDriver, "apply", apply)
    synced = node.become(*WORLD, pod("a/another", 17, node="n2", app="db"))
    assert [*synced.failed] == [ALLOW.key]
    assert "Cannot allocate memory" in synced.failed[ALLOW.key]
    assert full not in node.table(Family.IPV4)
    for key, members in node.ruleset.members.items():
        if isinstance(key, PodSet) and names.set_name(key, Family.IPV4) != full:
            assert elements(node, Family.IPV4, names.set_name(key, Family.IPV4)) == members[Family.IPV4]
    monkeypatch.undo()
    healed = node.look()
    assert (healed.failures, healed.failed) == ((), {})
    assert canonical(node.tables()) == canonical(fresh(node))


def test_one_family_fails_alone(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Nft.run

    def run(self: Nft, commands: Sequence[str]) -> None:
        if "ip6 " in commands[0]:
            raise NftError("nftables: Operation not supported")
        real(self, commands)

    monkeypatch.setattr(Nft, "run", run)
    synced = node.start()
    assert [failure.text for failure in synced.failures] == ["IPv6: nftables: Operation not supported"]
    assert names.LOCAL_PODS in node.table(Family.IPV4)
    monkeypatch.undo()
    assert node.look().failures == ()
    assert canonical(node.tables()) == canonical(fresh(node))


def test_a_kernel_without_nfnetlink_is_told(netns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")

    monkeypatch.setattr(NetlinkSocket, "__init__", refuse)
    with netns.enter(), pytest.raises(BackendError, match="nftables: Protocol not supported"):
        Nftables()
