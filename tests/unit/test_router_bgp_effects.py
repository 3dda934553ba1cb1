"""What a changed policy makes necessary beside itself: to forget, to send again, to judge again, and for whom."""

from __future__ import annotations

from typing import Any

import pytest
from support.bgp import asking, node

from kube_router.ipc.messages import Node
from kube_router.workers.router.bgpstate import BgpState, Statement
from kube_router.workers.router.effects import Effects, effects
from kube_router.workers.router.plan import (
    AddPath,
    ChangeSet,
    Plan,
    RemovePath,
    Retract,
    SendAgain,
    SetPolicies,
    diff,
)
from kube_router.workers.router.verdicts import decision
from kube_router.workers.router.vips import NO_VIPS, Vips

A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
B = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"])
FLAGS: dict[str, Any] = {"peer_router_ips": ("10.0.1.1", "10.0.1.2"), "peer_router_asns": (65000, 65000)}
NODE, OUTSIDE = "10.0.0.2", ("10.0.1.1", "10.0.1.2")


def state(annotations: dict[str, str] | None = None, *others: Node, vips: Vips = NO_VIPS, **flags: Any) -> BgpState:
    own = node("a", ["10.0.0.1", "2001:db8::1"], A.pod_cidrs, annotations or {})
    return asking(own, *(others or (B,)), vips=vips, **{**FLAGS, **flags}).state


def vips(*advertised: str, known: tuple[str, ...] = ()) -> Vips:
    return Vips(frozenset(advertised), frozenset({*advertised, *known}))


def test_nothing_changed_asks_for_nothing() -> None:
    assert effects(state(), state(), None) == Effects()


def test_other_attributes_are_sent_to_external_peers_only() -> None:
    assert effects(state(), state({"node.bgp.communities": "no-export"}), ()) == Effects(send=OUTSIDE)
    assert effects(state({"node.bgp.communities": "no-export"}), state(), ()) == Effects(send=OUTSIDE)
    prepended = state({"path-prepend.as": "65100", "path-prepend.repeat-n": "1"})
    assert effects(state(), prepended, ()) == Effects(send=OUTSIDE)
    assert effects(state(), state(override_nexthop=True), ()) == Effects(send=OUTSIDE)


def test_the_same_communities_in_another_order_and_spelling_are_no_change() -> None:
    first, second = (
        state({"node.bgp.communities": "no-export,1:2"}),
        state({"node.bgp.communities": "65538, 65535:65281"}),
    )
    assert diff(first, second) == Plan()


def test_a_tighter_export_is_forgotten_and_a_wider_one_sent() -> None:
    own = ("10.244.1.0/24", "fd00:1::/64")
    assert effects(state(), state(advertise_pod_cidr=False), ()) == Effects(forget=OUTSIDE, withdraw=own)
    assert effects(state(advertise_pod_cidr=False), state(), ()) == Effects(send=OUTSIDE)


def test_a_stricter_or_laxer_import_is_judged_again_for_all() -> None:
    everyone = (NODE, *OUTSIDE)
    listed = state({"node.bgp.customimportreject": "172.16.0.0/12"})
    assert effects(state(), listed, ()) == effects(listed, state(), ()) == Effects(judge=everyone)
    lenient = state(bgp_accept_covering_prefixes=True)
    assert effects(state(), lenient, ()) == effects(lenient, state(), ()) == Effects(judge=everyone)


def test_service_addresses_that_come_are_judged_only_where_such_a_route_is_held() -> None:
    before, after = state(vips=vips("203.0.113.7")), state(vips=vips("203.0.113.7", "203.0.113.8"))
    assert effects(before, after, {"198.51.100.0/24": ""}) == Effects()
    assert effects(before, after, {"203.0.113.8/32": ""}).judge == (NODE, *OUTSIDE)
    assert effects(before, after, None).judge == (NODE, *OUTSIDE), "not known what is held"
    announced_here = state(vips=vips("203.0.113.7", known=("203.0.113.8",)))
    assert effects(announced_here, after, {"203.0.113.8/32": ""}) == Effects(), "it was refused before as well"


def test_service_addresses_that_go_are_judged_for_peers_outside() -> None:
    before, after = state(vips=vips("203.0.113.7", "203.0.113.8")), state(vips=vips("203.0.113.7"))
    assert effects(before, after, ()) == Effects(judge=OUTSIDE)


def test_a_change_among_service_addresses_is_a_few_members_before_and_after_the_paths() -> None:
    before = state(vips=vips("203.0.113.7", "203.0.113.8"))
    after = state(vips=vips("203.0.113.7", "203.0.113.9", known=("203.0.113.8",)))
    plan = diff(before, after, learned=())
    kinds = [(type(step), bool(getattr(step, "add", None))) for step in plan.steps]
    added = {
        step.name: {item.prefix for item in step.add} for step in plan.steps if isinstance(step, ChangeSet) and step.add
    }
    assert kinds == [(ChangeSet, True), (ChangeSet, True), (AddPath, False), (RemovePath, False), (ChangeSet, False)]
    assert added == {"servicevipsdefinedset": {"203.0.113.9/32"}, "knownservicevipsdefinedset": {"203.0.113.9/32"}}
    assert str(plan.steps[-1]) == "remove from set servicevipsdefinedset: 203.0.113.8/32 32..32"


def test_the_first_and_the_last_service_address_change_statements_too() -> None:
    for before, after in ((NO_VIPS, vips("203.0.113.7")), (vips("203.0.113.7"), NO_VIPS)):
        steps = diff(state(vips=before), state(vips=after), learned=()).steps
        assert any(isinstance(step, SetPolicies) for step in steps)
        assert not any(isinstance(step, ChangeSet) for step in steps)


REFLECTOR, CLIENT = {"rr.server": "1"}, node("b", ["10.0.0.2", "2001:db8::2"], B.pod_cidrs, {"rr.client": "1"})
CLIENT_C = node("c", ["10.0.0.3"], ["10.244.3.0/24"], {"rr.client": "1"})


def test_a_reflector_that_hides_pod_cidrs_takes_back_learned_routes_too() -> None:
    shown, hidden = state(REFLECTOR, CLIENT), state(REFLECTOR, CLIENT, advertise_pod_cidr=False)
    found = effects(shown, hidden, ())
    assert (found.forget, found.forget_learned) == (OUTSIDE, OUTSIDE)
    (retract,) = (step for step in diff(shown, hidden).steps if isinstance(step, Retract))
    assert [neighbor.address for neighbor in retract.learned] == [*OUTSIDE]
    assert str(retract) == "make 10.0.1.1 10.0.1.2 forget 10.244.1.0/24, fd00:1::/64, learned routes"
    assert {step.address for step in diff(hidden, shown).steps if isinstance(step, SendAgain)} == {*OUTSIDE}


def test_a_node_that_is_no_reflector_any_more_takes_back_what_it_passed_on() -> None:
    """From other reflectors: their session stays. Those with clients begin anew."""
    other = node("b", ["10.0.0.2", "2001:db8::2"], B.pod_cidrs, {"rr.server": "1"})
    found = effects(state(REFLECTOR, other), state(None, other), ())
    assert NODE in found.forget and NODE in found.forget_learned
    assert found.withdraw == (), "own routes stay with everybody"
    assert NODE in effects(state(None, other), state(REFLECTOR, other), ()).send


def test_a_node_that_comes_or_goes_ends_no_session_of_a_reflector() -> None:
    two, three = state(REFLECTOR, CLIENT), state(REFLECTOR, CLIENT, CLIENT_C)
    for before, after in ((two, three), (three, two)):
        assert not any(isinstance(step, Retract | SendAgain) for step in diff(before, after).steps)


def test_of_thousands_of_routes_and_peers_only_what_changed_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node(f"n{number}", [f"10.1.{number >> 8}.{number & 255}"]) for number in range(300)]
    many = [f"203.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(5000)]
    before, after = state(None, *nodes, vips=vips(*many)), state(None, *nodes, vips=vips(*many[1:]))
    lenient = state({"node.bgp.communities": "1:1"}, *nodes, vips=vips(*many))
    evaluated: list[str] = []

    def counted(*arguments: Any) -> Statement | bool:
        evaluated.append(arguments[3])
        return decision(*arguments)

    monkeypatch.setattr("kube_router.workers.router.effects.decision", counted)
    steps = diff(before, after, learned={}).steps
    assert [type(step).__name__ for step in steps] == [
        "RemovePath",
        "ChangeSet",
        "ChangeSet",
        "JudgeAgain",
        "JudgeAgain",
    ]
    assert evaluated == [], "the path of a member that goes does not stay"
    diff(before, lenient, learned={})
    kinds_of_peers, states = 2, 2
    assert len(evaluated) == kinds_of_peers * states * len(before.paths)
