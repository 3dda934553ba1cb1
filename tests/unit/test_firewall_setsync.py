"""The sets of the iptables backend on a kernel in memory: what waits, what is told, what is remembered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.fake_kernel import FakeKernel, FakeSets
from support.policyworld import BOTH, block, cluster, pod, pods, policy, rule
from support.policyworld import select as labels
from support.rulesets import changed_between, ruleset_of

from kube_router.ipc.messages import NetworkPolicy, Pod
from kube_router.workers.firewall import setsync
from kube_router.workers.firewall.rules import Changed, Frame, Member, PodSet, Ruleset
from kube_router.workers.firewall.setsync import SetResult, SetSync, local_pods_spec
from kube_router.workers.kernel.ipset import SetError
from kube_router.workers.model import Family
from kube_router.workers.rulefacts import Members, RuleText, SetName, SetSpec

FRAME = Frame(families=BOTH)
WEB, DATABASE = pod("a/web", 1, app="web"), pod("a/db", 2, app="db")
ALLOW = policy("a/allow", labels(app="web"), ingress=[rule(pods(app="db")), rule(block("0.0.0.0/0"), block("::/0"))])


class Sets:
    """A `SetSync` with its kernel, driven as the backend drives it."""

    def __init__(self) -> None:
        self.kernel = FakeKernel()
        self.driver = FakeSets(self.kernel)
        self.sync = SetSync(self.driver, BOTH)
        self.ruleset = Ruleset()

    def become(self, *world: Pod | NetworkPolicy, observe: bool = False, hold: bool = False) -> SetResult:
        new = ruleset_of(cluster(world, FRAME))
        changed, self.ruleset = changed_between(self.ruleset, new), new
        return self.turn(changed, observe=observe, hold=hold)

    def turn(self, changed: Changed, *, observe: bool = False, hold: bool = False) -> SetResult:
        result = SetResult()
        for family in BOTH:
            self.sync.add(self.ruleset, changed, family, everything=observe, result=result)
        self.sync.remove(changed, hold=hold, result=result)
        if not hold:
            self.sync.destroy(observe=observe, result=result)
        return result

    def members(self) -> dict[str, set[str]]:
        return {name: members for name, (_, members) in self.kernel.sets.items()}


@pytest.fixture
def sets() -> Sets:
    made = Sets()
    made.become(WEB, DATABASE, ALLOW, observe=True)
    return made


def test_sets_hold_what_the_ruleset_says_and_a_whole_family_in_two_halves(sets: Sets) -> None:
    found = list(sets.members().values())
    assert len(found) == sets.sync.standing == 4
    for members in ({"10.0.0.2"}, {"fd00::2"}, {"0.0.0.0/1", "128.0.0.0/1"}, {"::/1", "8000::/1"}):
        assert members in found
    assert sets.become(WEB, DATABASE, ALLOW, observe=True).writes == 0


def test_a_set_that_is_still_referred_to_waits_and_is_told_when_that_lasts(sets: Sets) -> None:
    name = next(iter(sets.kernel.sets))
    sets.kernel.chain(Family.IPV4, "filter", "FORWARD").append(RuleText(f"-m set --match-set {name} src -j ACCEPT"))
    first = sets.become(WEB, DATABASE)
    assert (first.failures, first.warnings) == ([], []), "nftables may need a moment"
    assert list(sets.kernel.sets) == [name]
    again = sets.become(WEB, DATABASE, observe=True)
    assert [f"ipset {name}: destroy: something still refers to it" in line for line in again.warnings] == [True]
    sets.kernel.chain(Family.IPV4, "filter", "FORWARD").clear()
    assert sets.turn(Changed()).warnings == []
    assert sets.kernel.sets == {}


def test_a_set_that_comes_back_before_it_could_go_is_kept(sets: Sets) -> None:
    name = next(name for name, members in sets.members().items() if members == {"10.0.0.2"})
    sets.kernel.chain(Family.IPV4, "filter", "FORWARD").append(RuleText(f"-m set --match-set {name} src -j ACCEPT"))
    sets.become(WEB, DATABASE)
    sets.kernel.chain(Family.IPV4, "filter", "FORWARD").clear()
    sets.become(WEB, pod("a/db", 3, app="db"), ALLOW)
    assert sets.members()[name] == {"10.0.0.3"}
    assert not sets.sync.differs()


def test_on_hold_the_number_of_members_is_not_judged_until_it_is_known_again(sets: Sets) -> None:
    name = next(name for name, members in sets.members().items() if members == {"10.0.0.2"})
    sets.become(WEB, ALLOW, hold=True)
    assert sets.members()[name] == {"10.0.0.2"}
    sets.kernel.sets[name][1].add("10.0.0.77")
    assert not sets.sync.differs()
    sets.become(WEB, ALLOW, observe=True)
    assert sets.members()[name] == set()
    sets.kernel.sets[name][1].add("10.0.0.77")
    assert sets.sync.differs()


class Crowd(frozenset[Member]):
    """Members of a set that is too large to be gone through at every change."""

    def __iter__(self) -> Iterator[Member]:
        raise AssertionError("all members are gone through")

    def __len__(self) -> int:
        raise AssertionError("all members are counted")


def test_a_change_costs_what_changes_however_large_the_set_is(sets: Sets) -> None:
    (key,) = [key for key in sets.ruleset.members if isinstance(key, PodSet)]
    sets.ruleset.members = {key: dict.fromkeys(BOTH, Crowd())}
    added = {Family.IPV4: {Member("10.0.0.8"), Member("10.0.0.9")}, Family.IPV6: {Member("fd00::8")}}
    sets.turn(Changed(added={key: added}))
    sets.turn(Changed(removed={key: {Family.IPV4: {Member("10.0.0.2")}}}))
    assert {"10.0.0.8", "10.0.0.9"} in sets.members().values()
    assert {"fd00::2", "fd00::8"} in sets.members().values()
    assert not sets.sync.differs()
    next(members for members in sets.members().values() if "fd00::8" in members).discard("fd00::8")
    assert sets.sync.differs()


def test_a_change_that_is_told_again_is_not_counted_twice(sets: Sets) -> None:
    (key,) = [key for key in sets.ruleset.members if isinstance(key, PodSet)]
    changed = Changed(added={key: {Family.IPV4: {Member("10.0.0.8")}}})
    sets.turn(changed)
    sets.sync.again = True
    sets.turn(changed)
    assert not sets.sync.differs()


def test_a_count_looks_at_every_set_in_turn(sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setsync, "CHECKED_AT_ONCE", 1)
    assert not any(sets.sync.differs() for _ in range(8))
    list(sets.kernel.sets.values())[2][1].clear()
    assert sum(sets.sync.differs() for _ in range(8)) == 2
    del sets.kernel.sets[next(iter(sets.kernel.sets))]
    assert sum(sets.sync.differs() for _ in range(8)) == 4


def test_a_change_that_fails_is_looked_into_at_once_and_mended(sets: Sets) -> None:
    name = next(name for name, members in sets.members().items() if members == {"10.0.0.2"})
    del sets.kernel.sets[name]
    result = sets.become(WEB, DATABASE, pod("a/db2", 3, app="db"), ALLOW)
    assert (sets.sync.failed, result.failures) == ({}, [])
    assert result.repaired == [f"IPv4: ipset {name} was gone"]
    assert sets.members()[name] == {"10.0.0.2", "10.0.0.3"}


def test_what_cannot_be_read_is_a_set_s_own_failure(sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    observe = sets.driver.observe

    def broken(spec: SetSpec) -> Members | None:
        if spec.type == "hash:ip" and spec.family is Family.IPV6:
            raise SetError(f"ipset {spec.name}: cannot be listed: answers were lost")
        return observe(spec)

    monkeypatch.setattr(sets.driver, "observe", broken)
    result = sets.become(WEB, DATABASE, ALLOW, observe=True)
    assert result.failures == []
    assert [(type(key).__name__, family) for key, family in sets.sync.failed] == [("PodSet", Family.IPV6)]
    assert len(sets.kernel.sets) == 4, "a set that may be there is not taken for garbage"
    monkeypatch.undo()
    sets.become(WEB, DATABASE, ALLOW, observe=True)
    assert sets.sync.failed == {}


def test_a_fixed_set_grows_before_it_shrinks_as_it_is_told(sets: Sets) -> None:
    spec, result = local_pods_spec(Family.IPV4), SetResult()
    old, new = frozenset({"10.0.0.1", "10.0.0.2"}), frozenset({"10.0.0.2", "10.0.0.3"})

    def fix(desired: frozenset[str], *, add: bool, delete: bool, observe: bool = False) -> set[str]:
        assert sets.sync.fix(spec, desired, observe=observe, add=add, delete=delete, result=result)
        return sets.members()[spec.name]

    assert fix(old, add=True, delete=True) == old
    assert fix(new, add=False, delete=True) == {"10.0.0.2"}
    assert fix(new, add=True, delete=True) == new
    assert fix(old, add=True, delete=False) == old | new
    assert fix(old, add=False, delete=False) == old | new
    sets.kernel.sets[spec.name][1].discard("10.0.0.3")
    assert fix(old, add=True, delete=True, observe=True) == old
    assert len(result.repaired) == 1
    sets.kernel.sets[SetName(spec.name)] = (SetSpec(spec.name, "hash:net", Family.IPV4), set())
    assert not sets.sync.fix(spec, new, observe=True, add=True, delete=True, result=result)
    assert "exists as hash:net" in sets.sync.failed_fixed[spec.name]
