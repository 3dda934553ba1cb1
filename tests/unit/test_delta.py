"""The delta tracker against its definition: pending is the difference, and a failure is never forgotten."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kube_router.workers.delta import DeltaTracker

KEYS = st.sampled_from("abcd")
VALUES = st.integers(0, 2)
TABLES = st.dictionaries(KEYS, VALUES)


def test_what_is_wanted_and_missing_waits_for_an_update() -> None:
    tracker: DeltaTracker[str, int] = DeltaTracker()
    tracker.set_desired("a", 1)
    assert tracker.pending_updates() == {"a": 1}
    assert tracker.pending_deletes() == {}
    tracker.applied("a")
    assert tracker.pending == 0
    assert tracker.actual == {"a": 1}


def test_what_is_there_and_not_wanted_waits_for_a_delete_with_its_value() -> None:
    tracker: DeltaTracker[str, int] = DeltaTracker()
    tracker.replace_actual({"a": 1, "b": 2})
    tracker.set_desired("b", 2)
    assert tracker.pending_deletes() == {"a": 1}
    assert tracker.pending_updates() == {}
    tracker.applied("a")
    assert tracker.pending == 0


def test_back_to_what_is_there_is_nothing_to_do() -> None:
    tracker: DeltaTracker[str, int] = DeltaTracker()
    tracker.set_desired("a", 1)
    tracker.applied("a")
    tracker.set_desired("a", 2)
    tracker.set_desired("a", 1)
    assert tracker.pending == 0


def test_a_failed_update_waits_even_if_what_was_there_before_is_wanted_again() -> None:
    tracker: DeltaTracker[str, int] = DeltaTracker()
    tracker.set_desired("a", 1)
    tracker.applied("a")
    tracker.set_desired("a", 2)
    tracker.failed("a")
    tracker.set_desired("a", 1)
    assert tracker.pending_updates() == {"a": 1}
    tracker.applied("a")
    assert tracker.pending == 0


def test_a_failed_addition_that_is_no_longer_wanted_waits_for_a_delete() -> None:
    tracker: DeltaTracker[str, int] = DeltaTracker()
    tracker.set_desired("a", 1)
    tracker.failed("a")
    tracker.delete_desired("a")
    assert tracker.pending_deletes() == {"a": 1}
    tracker.delete_actual("a")  # it was looked at: nothing there
    assert tracker.pending == 0


def test_a_failed_delete_waits_even_if_it_is_wanted_again_unchanged() -> None:
    tracker: DeltaTracker[str, int] = DeltaTracker()
    tracker.set_actual("a", 1)
    tracker.failed("a")
    assert tracker.pending_deletes() == {"a": 1}
    tracker.set_desired("a", 1)
    assert tracker.pending_updates() == {"a": 1}


def test_a_complete_listing_ends_every_doubt() -> None:
    tracker: DeltaTracker[str, int] = DeltaTracker()
    tracker.replace_desired({"a": 1, "b": 2})
    tracker.failed("a")
    tracker.failed("b")
    tracker.replace_actual({"a": 1})
    assert tracker.pending_updates() == {"b": 2}


def test_a_failure_of_an_unknown_key_is_nothing() -> None:
    tracker: DeltaTracker[str, int] = DeltaTracker()
    tracker.failed("a")
    assert tracker.pending == 0


def test_pending_is_a_copy_so_that_steps_can_be_reported_while_walking_it() -> None:
    tracker: DeltaTracker[int, int] = DeltaTracker()
    tracker.replace_desired(dict.fromkeys(range(10), 0))
    for key in tracker.pending_updates():
        tracker.applied(key)
    assert tracker.pending == 0


class TrackerAgainstDefinition(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tracker: DeltaTracker[str, int] = DeltaTracker()
        self.desired: dict[str, int] = {}
        self.actual: dict[str, int] = {}
        self.doubtful: set[str] = set()

    @rule(key=KEYS, value=VALUES)
    def want(self, key: str, value: int) -> None:
        self.tracker.set_desired(key, value)
        self.desired[key] = value

    @rule(key=KEYS)
    def unwant(self, key: str) -> None:
        self.tracker.delete_desired(key)
        self.desired.pop(key, None)

    @rule(table=TABLES)
    def want_all(self, table: dict[str, int]) -> None:
        self.tracker.replace_desired(table)
        self.desired = dict(table)

    @rule(key=KEYS, value=VALUES)
    def see(self, key: str, value: int) -> None:
        self.tracker.set_actual(key, value)
        self.actual[key] = value
        self.doubtful.discard(key)

    @rule(key=KEYS)
    def see_nothing(self, key: str) -> None:
        self.tracker.delete_actual(key)
        self.actual.pop(key, None)
        self.doubtful.discard(key)

    @rule(table=TABLES)
    def see_all(self, table: dict[str, int]) -> None:
        self.tracker.replace_actual(table)
        self.actual = dict(table)
        self.doubtful.clear()

    @rule(key=KEYS)
    def succeed(self, key: str) -> None:
        self.tracker.applied(key)
        self.doubtful.discard(key)
        self.actual.pop(key, None)
        if key in self.desired:
            self.actual[key] = self.desired[key]

    @rule(key=KEYS)
    def fail(self, key: str) -> None:
        self.tracker.failed(key)
        if key in self.desired or key in self.actual:
            self.doubtful.add(key)

    @invariant()
    def pending_is_the_difference(self) -> None:
        updates = {
            key: value
            for key, value in self.desired.items()
            if key in self.doubtful or key not in self.actual or self.actual[key] != value
        }
        deletes = {key for key in self.actual.keys() | self.doubtful if key not in self.desired}
        assert self.tracker.pending_updates() == updates
        assert set(self.tracker.pending_deletes()) == deletes
        for key, value in self.tracker.pending_deletes().items():
            assert key in self.doubtful or self.actual[key] == value
        assert self.tracker.pending == len(updates) + len(deletes)
        assert self.tracker.desired == self.desired
        assert self.tracker.actual == self.actual


TrackerAgainstDefinition.TestCase.settings = settings(max_examples=100)
TestTrackerAgainstDefinition = TrackerAgainstDefinition.TestCase
