"""What traffic meets while the iptables backend works: between any two of its steps, and when it dies there.

The kernel's own words are read after every step and packets led through them (`iptables_walk`), so that a rule that
names what is not there, or a packet that is let through for a moment, is found.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.firewall_world import ALLOW, DATABASE, DENY, FRAME, OTHER, REMOTE, WEB, WORLD
from support.iptables_node import Node, fresh
from support.iptables_walk import IptablesWalk
from support.namespaces import Namespace
from support.policyworld import BOTH, OUTSIDE, cluster, pod, pods, policy, port, rule
from support.policyworld import select as labels
from support.rulesets import changed_between, ruleset_of
from support.stepped import Killed, SteppedChains, SteppedSets
from support.walk import WirePacket

from kube_router.ipc.messages import NetworkPolicy, Pod
from kube_router.workers.firewall.rules import Changed, Ruleset
from kube_router.workers.model import Family

GOLDEN = Path(__file__).parent.parent / "golden" / "firewall"
World = tuple[Pod | NetworkPolicy, ...]
ADDRESSES = {
    Family.IPV4: ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.9", "10.0.0.77", OUTSIDE[Family.IPV4]],
    Family.IPV6: ["fd00::1", "fd00::2", "fd00::3", "fd00::9", "fd00::4d", OUTSIDE[Family.IPV6]],
}
"""Of three local pods, a remote one, one that no pod has, and one outside."""


def packets(family: Family) -> Iterator[WirePacket]:
    """New connections between all of these, through the node and from it."""
    for source, destination in itertools.permutations(ADDRESSES[family], 2):
        for protocol, number in (("tcp", 80), ("tcp", 81), ("tcp", 8080), ("tcp", 443), ("udp", 53), ("sctp", 7)):
            yield WirePacket("FORWARD", source, destination, protocol, number)
        yield WirePacket("OUTPUT", source, destination, "tcp", 80)
        yield WirePacket("FORWARD", source, destination, "tcp", 80, state="ESTABLISHED")


Verdicts = dict[WirePacket, bool]


def verdicts(node: Node) -> Verdicts:
    """What the kernel's rules say of every packet; WalkError when they are none that the kernel could have."""
    found: Verdicts = {}
    # The walker knows no exceptions and no interfaces; the only ones, of upstream's, concern none of these packets.
    saved = node.namespace.run("ipset save").splitlines()
    sets = "\n".join(line for line in saved if not line.endswith(" nomatch"))
    for family in BOTH:
        rules = node.namespace.run(f"{node.program(family)}-save -t filter").splitlines()
        walk = IptablesWalk(family, "\n".join(line for line in rules if "kube-bridge" not in line), sets)
        found |= {packet: walk.walk(packet).allowed for packet in packets(family)}
    return found


@pytest.fixture(params=["nft", "legacy"])
def node(request: pytest.FixtureRequest, netns: Namespace) -> Iterator[Node]:
    with netns.enter():
        made = Node(netns, request.param)
        yield made
        made.close()


CHANGES: dict[str, tuple[World, World]] = {
    "first sync": ((), WORLD),
    "a pod is isolated": ((WEB, DATABASE, OTHER, REMOTE), (WEB, DATABASE, OTHER, REMOTE, DENY)),
    "a policy is replaced": (
        WORLD,
        (WEB, DATABASE, OTHER, REMOTE, DENY, policy("a/allow", labels(app="web"), ingress=[rule(ports=[port(81)])])),
    ),
    "peers and ports change places": (
        (
            WEB,
            DATABASE,
            OTHER,
            policy(
                "a/web",
                labels(app="web"),
                ingress=[rule(pods(app="db"), ports=[port(80)]), rule(pods(app="none"), ports=[port(81)])],
            ),
        ),
        (
            WEB,
            DATABASE,
            OTHER,
            policy(
                "a/web",
                labels(app="web"),
                ingress=[rule(pods(app="none"), ports=[port(80)]), rule(pods(app="db"), ports=[port(81)])],
            ),
        ),
    ),
    "an address moves to another pod": (WORLD, (pod("b/new", 1, app="other"), DATABASE, OTHER, REMOTE, DENY, ALLOW)),
    "all pods are new": (WORLD, (pod("a/x", 1, app="db"), pod("a/y", 2, app="web"), pod("b/z", 3), DENY, ALLOW)),
    "nothing is left": (WORLD, ()),
}


def counted(change: Callable[[Callable[[], None]], None]) -> int:
    """How many steps a change takes."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    change(step)
    return steps


class Rehearsal:
    """A node that stands at ``before`` and goes to ``after``, as often as one likes."""

    def __init__(self, node: Node, before: World, after: World) -> None:
        self.node = node
        self.old, self.new = (ruleset_of(cluster(world, FRAME)) for world in (before, after))

    def reset(self) -> None:
        """Stand at the beginning."""
        self._sync(lambda: None, Ruleset(), self.old)

    def go(self, step: Callable[[], None]) -> None:
        """Go to the end, or as far as ``step`` lets it."""
        self._sync(step, self.old, self.new)

    def _sync(self, step: Callable[[], None], old: Ruleset, new: Ruleset) -> None:
        self.node.close()
        armed: list[Callable[[], None]] = []

        def before() -> None:
            for call in armed:
                call()

        self.node.backend = self.node.new(chains=SteppedChains(self.node.programs, before), sets=SteppedSets(before))
        if old.pods or old.policies:
            self.node.backend.sync(old, Changed(everything=True), FRAME, observe=True, hold=False)
        armed.append(step)
        self.node.ruleset = new
        changed = changed_between(old, new) if old.pods else Changed(everything=True)
        self.node.backend.sync(new, changed, FRAME, observe=not old.pods, hold=False)


@pytest.mark.parametrize("change", CHANGES)
def test_no_step_opens_what_neither_state_opens_and_none_closes_what_both_open(node: Node, change: str) -> None:
    way = Rehearsal(node, *CHANGES[change])
    way.reset()
    old = verdicts(node)
    seen: list[Verdicts] = []
    way.go(lambda: seen.append(verdicts(node)))
    new = verdicts(node)
    assert len(seen) >= 2
    for number, between in enumerate(seen):
        opened = [packet for packet, allowed in between.items() if allowed and not (old[packet] or new[packet])]
        closed = [packet for packet, allowed in between.items() if not allowed and old[packet] and new[packet]]
        assert (opened, closed) == ([], []), f"before step {number}"
    assert node.everything() == fresh(node)


@pytest.mark.parametrize("change", CHANGES)
def test_a_process_that_dies_between_two_steps_leaves_nothing_open_and_the_next_one_finishes(
    node: Node, change: str
) -> None:
    way = Rehearsal(node, *CHANGES[change])
    way.reset()
    old = verdicts(node)
    steps = counted(way.go)
    new, end = verdicts(node), node.everything()
    for number in range(1, steps + 1):
        way.reset()
        left = itertools.count(1)

        def die(last: int = number, left: Iterator[int] = left) -> None:
            if next(left) == last:
                raise Killed

        with pytest.raises(Killed):
            way.go(die)
        between = verdicts(node)
        assert [packet for packet, allowed in between.items() if allowed and not (old[packet] or new[packet])] == []
        synced = node.restart()
        assert (synced.failures, synced.failed) == ((), {})
        assert node.everything() == end
    assert steps >= 2


# ------------------------------------------------------------------------------------------------------------- upgrade


def load_upstream(node: Node) -> None:
    """The state that Go kube-router 2.11 left behind, with default-deny and the leftovers of an earlier sync."""
    node.namespace.run("ipset restore", stdin=(GOLDEN / "go-kube-router.ipset").read_text())
    for family, name in ((Family.IPV4, "iptables"), (Family.IPV6, "ip6tables")):
        node.namespace.run(f"{node.program(family)}-restore", stdin=(GOLDEN / f"go-kube-router.{name}").read_text())


def test_an_upgrade_from_go_kube_router_has_no_open_and_no_closed_moment(node: Node) -> None:
    load_upstream(node)
    old = verdicts(node)
    way = Rehearsal(node, (), WORLD)
    seen: list[Verdicts] = []
    way.go(lambda: seen.append(verdicts(node)))
    new = verdicts(node)
    assert len(seen) > 10
    for number, between in enumerate(seen):
        opened = [packet for packet, allowed in between.items() if allowed and not (old[packet] or new[packet])]
        closed = [packet for packet, allowed in between.items() if not allowed and old[packet] and new[packet]]
        assert (opened, closed) == ([], []), f"before step {number}"
    assert any(old.values()) and not all(old.values())


def test_after_an_upgrade_only_the_new_form_and_what_others_have_is_left(node: Node) -> None:
    load_upstream(node)
    synced = node.start()
    assert (synced.failures, synced.failed, synced.repaired, synced.warnings) == ((), {}, (), ())
    ours = "\n".join(
        line
        for line in node.everything().splitlines()
        if "KUBE-ROUTER-SERVICES" not in line and "-i kube-bridge" not in line and "-o kube-bridge" not in line
    )
    assert ours + "\n" == fresh(node) + "\n"
    services = [line for line in node.saved(Family.IPV4).splitlines() if "SERVICES" in line]
    assert services == [
        ":KUBE-ROUTER-SERVICES -",
        '-A INPUT -m comment --comment "handle traffic to IPVS service IPs in custom chain" -j KUBE-ROUTER-SERVICES',
    ]
    assert node.look().writes == 0
    assert node.restart().writes == 0
