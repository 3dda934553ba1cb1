"""What a failed sync leaves to be done, joined with what came since: nothing is lost, and the last word counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kube_router.workers.firewall.owed import joined
from kube_router.workers.firewall.rules import BlockSet, Changed, Direction, Member, SetKey
from kube_router.workers.model import Family

V4, V6 = Family.IPV4, Family.IPV6


def block(name: str) -> SetKey:
    return BlockSet(Direction.INGRESS, V4, (name,))


A, B = block("a"), block("b")


def members(*texts: str) -> set[Member]:
    return set(map(Member, texts))


def test_keys_add_up() -> None:
    both = joined(
        Changed(policies={"a/p"}, pods={"a/x"}, new_sets={A}), Changed(policies={"b/p"}, pods={"a/x"}, gone_sets={B})
    )
    assert both == Changed(policies={"a/p", "b/p"}, pods={"a/x"}, new_sets={A}, gone_sets={B})


def test_the_last_word_on_a_member_counts() -> None:
    first = Changed(added={A: {V4: members("10.0.0.1", "10.0.0.2")}}, removed={A: {V6: members("fd00::1")}})
    then = Changed(added={A: {V6: members("fd00::1")}}, removed={A: {V4: members("10.0.0.1")}})
    both = joined(first, then)
    assert both.added == {A: {V4: members("10.0.0.2"), V6: members("fd00::1")}}
    assert both.removed == {A: {V4: members("10.0.0.1")}}
    assert first.added[A][V4] == members("10.0.0.1", "10.0.0.2"), "the earlier one is left as it was"


def test_a_set_that_is_new_or_gone_as_a_whole_has_no_members_in_the_change() -> None:
    both = joined(Changed(new_sets={A}), Changed(added={A: {V4: members("10.0.0.1")}, B: {V4: members("10.0.0.2")}}))
    assert both == Changed(new_sets={A}, added={B: {V4: members("10.0.0.2")}})


def test_a_set_that_came_and_went_makes_everything_uncertain() -> None:
    assert joined(Changed(new_sets={A}), Changed(gone_sets={A})) == Changed(everything=True)
    assert joined(Changed(gone_sets={A}), Changed(new_sets={A})) == Changed(everything=True)
    assert joined(Changed(everything=True), Changed(pods={"a/x"})) == Changed(everything=True)
    assert joined(Changed(pods={"a/x"}), Changed(everything=True)) == Changed(everything=True)


def test_nothing_joined_with_nothing_is_nothing() -> None:
    assert not joined(Changed(), Changed())
    assert joined(Changed(added={A: {V4: members("10.0.0.1")}}), Changed()).only_members


steps = st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=6)


@given(st.lists(steps, max_size=4))
def test_joined_changes_lead_to_where_all_of_them_lead(history: list[list[tuple[bool, int]]]) -> None:
    """A set that got only part of the changes, or none, is right after the joined ones."""
    want: set[Member] = set()
    owed = Changed()
    for batch in history:
        before = set(want)
        for add, number in batch:
            (want.add if add else want.discard)(Member(f"10.0.0.{number}"))
        change = Changed()
        if want - before:
            change.added = {A: {V4: want - before}}
        if before - want:
            change.removed = {A: {V4: before - want}}
        owed = joined(owed, change)
    added, removed = owed.added.get(A, {}).get(V4, set()), owed.removed.get(A, {}).get(V4, set())
    assert not added & removed
    assert (set() | added) - removed == want
