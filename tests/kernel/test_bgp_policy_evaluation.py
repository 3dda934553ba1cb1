"""Our words for gobgpd's evaluation of policies (``verdicts.py``) against the daemons, for generated policies.

One daemon of each generation under test and a peer of it without policies. Two paths that are always let through, one a
family and others in each round, say that everything before them has arrived: families travel in messages of their own.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.gobgpd import BINARIES, PORT, Outsider, daemons, segment, wait_for
from support.namespaces import namespaces

from kube_router.workers.model import Family, IPNetwork
from kube_router.workers.router.bgpstate import (
    EXPORT_ASSIGNMENT,
    IMPORT_ASSIGNMENT,
    LEARNED_EXTERNAL,
    LEARNED_INTERNAL,
    OPEN,
    Assignment,
    BgpState,
    Neighbor,
    Policies,
    PrefixRange,
    Speaker,
    Statement,
)
from kube_router.workers.router.plan import AddPath, Assign, JudgeAgain, Plan, RemovePath, SetPolicies, Step
from kube_router.workers.router.verdicts import accepts, decision

ROUNDS = 25
DUAL = (Family.IPV4, Family.IPV6)
UNDER_TEST, PEER, NOBODY = "10.0.0.1", "10.0.0.2", "10.0.0.77"
PREFIXES = [
    *("0.0.0.0/0", "128.0.0.0/1", "10.0.0.0/8", "10.128.0.0/9", "10.128.0.0/16", "10.128.1.0/24", "10.128.1.0/25"),
    *("10.128.1.7/32", "172.16.0.0/12", "::/0", "8000::/1", "fd00::/8", "fd00:1::/32", "fd00:1::/64", "fd00:1::7/128"),
    "2001:db8::/32",
]


@dataclass
class Pair:
    """The daemon under test and its peer."""

    tested: Outsider
    peer: Outsider

    def do(self, *steps: Step) -> None:
        """Change the daemon under test, without what a plan adds for peers to notice."""
        assert self.tested.client.apply(Plan(steps)) == (len(steps), ())

    def until(self, number: int, seen: Outsider) -> None:
        wait_for(lambda: {*markers(number)} <= seen.routes().keys(), 15, f"round {number}", self.tested, self.peer)


@pytest.fixture(params=BINARIES, ids=lambda generation: f"gobgpd{generation}")
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    with namespaces(3) as (hub, one, two), ExitStack() as stack:
        segment(hub, (one, (f"{UNDER_TEST}/24", "2001:db8:1::1/64")), (two, (f"{PEER}/24", "2001:db8:1::2/64")))
        # The peer is of generation 4: it dials after two seconds.
        first, second = stack.enter_context(daemons((one, request.param, tmp_path / "one"), (two, 4, tmp_path / "two")))
        outsiders = []
        for daemon, own, other, asn in ((first, UNDER_TEST, PEER, 64512), (second, PEER, UNDER_TEST, 65000)):
            neighbor = Neighbor(other, 65000 if asn == 64512 else 64512, own, PORT, DUAL)
            speaker = Speaker(asn, own, PORT, frozenset({own}))
            outsider = Outsider(daemon, BgpState(speaker, export=OPEN, import_=OPEN, neighbors={other: neighbor}))
            stack.callback(outsider.close)
            outsiders.append(outsider)
        pair = Pair(*outsiders)
        wait_for(lambda: pair.peer.established(UNDER_TEST), 25, "session", pair.tested, pair.peer)
        yield pair


def markers(number: int) -> tuple[str, str]:
    return f"192.0.2.{number}/32", f"2001:db8:ffff::{number:x}/128"


def paths_of(prefixes: Iterable[str], host: int) -> dict[str, str]:
    hops = {4: f"10.0.0.{host}", 6: f"2001:db8:1::{host}"}
    return {prefix: hops[6 if ":" in prefix else 4] for prefix in prefixes}


def generated(chance: random.Random, direction: str, number: int) -> Policies:
    """Policies of our kind: sets that are exact or hold parts throughout, some without members, neighbours or not."""
    sets = {
        f"marker{index}": frozenset({_exact(ipaddress.ip_network(item))}) for index, item in enumerate(markers(number))
    }
    for name in ("a", "b", "c", "d"):
        family = chance.choice((4, 6))
        networks = [item for item in map(ipaddress.ip_network, PREFIXES) if item.version == family]
        members = chance.sample(networks, chance.randint(0, 3))
        sets[name] = frozenset(map(_exact if chance.random() < 0.5 else _parts, members)) if members else frozenset()
    neighbors = {"peer": frozenset({f"{PEER}/32"}), "other": frozenset({f"{NOBODY}/32"}), "nobody": frozenset[str]()}
    learned = ("", "", "", LEARNED_INTERNAL, LEARNED_EXTERNAL) if direction == "export" else ("",)
    statements = [Statement("marker0", "peer", True), Statement("marker1", "peer", True)]
    for prefix_set in chance.sample(("a", "b", "c", "d", ""), chance.randint(1, 5)):
        neighbor_set = chance.choice(("peer", "peer", "other", "nobody"))
        statements.append(Statement(prefix_set, neighbor_set, chance.random() < 0.5, learned=chance.choice(learned)))
    return Policies(
        sets,
        neighbors,
        export=tuple(statements) if direction == "export" else (),
        import_=tuple(statements) if direction == "import" else (),
    )


def _exact(network: IPNetwork) -> PrefixRange:
    return PrefixRange(str(network), network.prefixlen, network.prefixlen)


def _parts(network: IPNetwork) -> PrefixRange:
    return PrefixRange(str(network), network.prefixlen, network.max_prefixlen)


def judged(policies: Policies, assignment: Assignment, statements: Sequence[Statement], number: int) -> set[str]:
    """What passes, in our words."""
    prefixes = (*PREFIXES, *markers(number))
    return {prefix for prefix in prefixes if accepts(decision(policies, assignment, statements, prefix, PEER))}


def test_exports_are_what_we_say(pair: Pair) -> None:
    chance = random.Random(1)
    for number in range(1, ROUNDS + 1):
        policies = generated(chance, "export", number)
        assignment = replace(EXPORT_ASSIGNMENT, accept=chance.random() < 0.3)
        gone = paths_of((*PREFIXES, *markers(number - 1)), 1)
        pair.do(*(RemovePath(*item) for item in gone.items()))
        pair.do(SetPolicies(policies), Assign("export", assignment))
        pair.do(*(AddPath(*item) for item in paths_of(PREFIXES, 1).items()))
        for item in paths_of(markers(number), 1).items():
            pair.do(AddPath(*item))
        pair.until(number, pair.peer)
        wanted = judged(policies, assignment, policies.export, number)
        assert set(pair.peer.routes()) == wanted, f"round {number}: {policies}"


def test_imports_are_what_we_say(pair: Pair) -> None:
    chance = random.Random(2)
    for number in range(1, ROUNDS + 1):
        policies = generated(chance, "import", number)
        assignment = replace(IMPORT_ASSIGNMENT, accept=chance.random() < 0.5)
        pair.do(SetPolicies(policies), Assign("import", assignment), JudgeAgain(PEER))
        for prefixes in (PREFIXES, (*PREFIXES, *markers(number))):
            pair.peer.plan(replace(pair.peer.state, paths=paths_of(prefixes, 2)))
        pair.until(number, pair.tested)
        wanted = judged(policies, assignment, policies.import_, number)
        assert set(pair.tested.routes()) == wanted, f"round {number}: {policies}"
