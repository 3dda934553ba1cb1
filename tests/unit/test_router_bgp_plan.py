"""Plans: order, smallness, what they say, and what a changed policy makes necessary."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.bgp import asking, node

from kube_router.workers.router.bgpstate import CLOSED, FRESH, OPEN, BgpState
from kube_router.workers.router.plan import (
    AddNeighbor,
    AddPath,
    Assign,
    ChangeSet,
    JudgeAgain,
    Plan,
    RemoveNeighbor,
    RemovePath,
    ReplaceDaemon,
    ReplaceNeighbor,
    Retract,
    SendAgain,
    SetPolicies,
    StartSpeaker,
    diff,
)
from kube_router.workers.router.verdicts import accepts, decision
from kube_router.workers.router.vips import Vips

GOLDEN = Path(__file__).parents[1] / "golden" / "router"
A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
B = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"])
C = node("c", ["10.0.0.3"], ["10.244.3.0/24"])
EXTERNAL: dict[str, Any] = {"peer_router_ips": ("10.0.1.1",), "peer_router_asns": (65000,), "passwords": ("geheim",)}
ONE, TWO = frozenset({"203.0.113.7", "2001:db8:99::7"}), frozenset({"203.0.113.8", "2001:db8:99::7"})
SERVER = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"], {"rr.server": "1"})
CLIENT = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"], {"rr.client": "1"})


def kinds(plan: Plan) -> list[str]:
    return [type(step).__name__ for step in plan.steps]


def run(state: BgpState, plan: Plan) -> BgpState:
    """What a daemon holds after a plan."""
    for step in plan.steps:
        match step:
            case StartSpeaker(speaker):
                state = replace(FRESH, speaker=speaker, export=CLOSED)
            case ReplaceDaemon():
                state = FRESH
            case SetPolicies(policies):
                state = replace(state, policies=policies)
            case ChangeSet(name, add, remove):
                sets = {**state.policies.prefix_sets, name: state.policies.prefix_sets[name] - remove | add}
                state = replace(state, policies=replace(state.policies, prefix_sets=sets))
            case Assign("export", assignment):
                state = replace(state, export=assignment)
            case Assign(_, assignment):
                state = replace(state, import_=assignment)
            case AddPath(prefix, next_hop):
                state = replace(state, paths={**state.paths, prefix: next_hop})
            case RemovePath(prefix, _):
                state = replace(state, paths={key: hop for key, hop in state.paths.items() if key != prefix})
            case RemoveNeighbor(neighbor):
                others = {key: item for key, item in state.neighbors.items() if key != neighbor.address}
                state = replace(state, neighbors=others)
            case AddNeighbor(neighbor) | ReplaceNeighbor(_, neighbor):
                state = replace(state, neighbors={**state.neighbors, neighbor.address: neighbor})
    return state


STATES = {
    "alone": asking(A).state,
    "two": asking(A, B).state,
    "three": asking(A, B, C).state,
    "external": asking(A, B, **EXTERNAL).state,
    "hidden": asking(A, B, advertise_pod_cidr=False, **EXTERNAL).state,
    "no ibgp": asking(A, B, enable_ibgp=False, **EXTERNAL).state,
    "other cidr": asking(node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.9.0/24", "fd00:9::/64"]), B).state,
    "one family": asking(node("a", ["10.0.0.1"], ["10.244.1.0/24"]), B, enable_ipv6=False).state,
    "services": asking(A, B, vips=Vips(ONE, ONE), **EXTERNAL).state,
    "other services": asking(A, B, vips=Vips(TWO, ONE | TWO), **EXTERNAL).state,
    "reflector": asking(SERVER, CLIENT, vips=Vips(TWO, TWO), **EXTERNAL).state,
    "other asn": asking(A, B, cluster_asn=65001).state,
}


@pytest.mark.parametrize("name", STATES)
def test_the_same_state_twice_is_an_empty_plan(name: str) -> None:
    assert diff(STATES[name], STATES[name]) == Plan()
    assert diff(STATES[name], STATES[name], keep=True) == Plan()
    assert str(Plan()).strip() == "0 nothing to do"


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(["fresh", *STATES], 2)))
def test_a_plan_ends_at_what_was_wanted(before: str, after: str) -> None:
    if after == "fresh":
        return
    state = FRESH if before == "fresh" else STATES[before]
    for _ in range(2):  # a replaced daemon begins anew
        state = run(state, diff(state, STATES[after]))
    assert state == STATES[after]


PROBES = ("0.0.0.0/0", "::/0", "203.0.113.7/32", "203.0.113.8/32", "10.244.1.0/24", "10.0.0.0/8", "198.51.100.0/24")


def passing(state: BgpState) -> set[tuple[str, str, str]]:
    """What may pass in a state, to a peer and from it."""
    taken = {
        ("from", address, prefix)
        for prefix in PROBES
        for address in state.neighbors
        if accepts(decision(state.policies, state.import_, state.policies.import_, prefix, address))
    }
    return taken | {("to", address, prefix) for prefix, address in exported(state)}


def exported(state: BgpState) -> set[tuple[str, str]]:
    """(path, peer) of what peers may get in a state."""
    return {
        (prefix, address)
        for prefix in state.paths
        for address in state.neighbors
        if accepts(decision(state.policies, state.export, state.policies.export, prefix, address))
    }


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(["fresh", *STATES], 2)))
def test_between_two_steps_nothing_passes_that_neither_passes_before_nor_after(
    before: str, after: str, keep: bool
) -> None:
    if after == "fresh":
        return
    state = FRESH if before == "fresh" else STATES[before]
    steps = diff(state, STATES[after], keep=keep).steps
    ended = run(state, Plan(steps))
    may = passing(ended) | passing(state)
    for number in range(1, len(steps)):
        assert passing(run(state, Plan(steps[:number]))) <= may, steps[number - 1]


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(STATES, 2)))
def test_keeping_takes_nothing_away(before: str, after: str) -> None:
    plan = diff(STATES[before], STATES[after], keep=True)
    assert not {"RemovePath", "RemoveNeighbor", "ReplaceDaemon", "Retract"} & set(kinds(plan))
    ended = run(STATES[before], plan)
    assert ended.speaker == STATES[before].speaker
    assert ended.paths.items() >= {**STATES[before].paths, **STATES[after].paths}.items()
    assert ended.neighbors.keys() == STATES[before].neighbors.keys() | STATES[after].neighbors.keys()


def test_a_fresh_start_is_closed_before_it_has_peers() -> None:
    steps = kinds(diff(FRESH, STATES["external"]))
    expected = ["StartSpeaker", "SetPolicies", "Assign", "Assign", "AddPath", "AddPath", "AddNeighbor", "AddNeighbor"]
    assert steps == expected


def test_a_new_node_touches_no_running_session() -> None:
    plan = diff(STATES["two"], STATES["three"])
    assert kinds(plan) == ["SetPolicies", "AddNeighbor"]


def test_a_node_that_goes_loses_its_session_only() -> None:
    assert kinds(diff(STATES["three"], STATES["two"])) == ["RemoveNeighbor", "SetPolicies"]


def test_a_changed_cidr_is_allowed_before_it_is_announced() -> None:
    steps = kinds(diff(STATES["two"], STATES["other cidr"]))
    assert steps == ["SetPolicies", "AddPath", "AddPath", "RemovePath", "RemovePath", "JudgeAgain"]


def test_a_changed_speaker_is_one_step() -> None:
    (step,) = diff(STATES["two"], STATES["other asn"]).steps
    assert isinstance(step, ReplaceDaemon)
    assert "AS 64512" in str(step) and "AS 65001" in str(step)


def test_without_a_known_speaker_nothing_is_started() -> None:
    assert diff(FRESH, replace(STATES["two"], speaker=None)) == Plan()


def test_a_tighter_export_policy_withdraws_and_a_wider_one_sends() -> None:
    tighter = diff(STATES["external"], STATES["hidden"])
    (retract,) = (step for step in tighter.steps if isinstance(step, Retract))
    assert retract == Retract(("10.0.1.1",), (("10.244.1.0/24", "10.0.0.1"), ("fd00:1::/64", "2001:db8::1")))
    wider = diff(STATES["hidden"], STATES["external"])
    assert [step.address for step in wider.steps if isinstance(step, SendAgain)] == ["10.0.1.1"]
    assert not any(isinstance(step, Retract) for step in wider.steps)


def test_imports_are_judged_again_when_they_were_open() -> None:
    opened = replace(STATES["two"], import_=OPEN)
    assert [step for step in diff(opened, STATES["two"]).steps if isinstance(step, JudgeAgain)] == [
        JudgeAgain("10.0.0.2")
    ]


def test_only_a_peer_that_differs_is_replaced_and_the_plan_says_why() -> None:
    changed = asking(A, B, **{**EXTERNAL, "bgp_holdtime": 30.0, "passwords": ("anders",)}).state
    (step,) = diff(STATES["external"], changed).steps
    assert isinstance(step, ReplaceNeighbor)
    assert str(step) == "replace peer 10.0.1.1: hold_seconds 90 -> 30; password changed"


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("fresh-start", "fresh", "external"),
        ("node-added", "two", "three"),
        ("cidr-changed", "two", "other cidr"),
        ("export-tightened", "external", "hidden"),
        ("cleared", "external", "alone"),
    ],
)
def test_plans_read_as_recorded(name: str, before: str, after: str) -> None:
    text = str(diff(FRESH if before == "fresh" else STATES[before], STATES[after])) + "\n"
    assert text == (GOLDEN / f"{name}.txt").read_text()
    assert "geheim" not in text
