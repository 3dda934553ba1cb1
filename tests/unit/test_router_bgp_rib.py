"""The table of learned routes: what is in it after which events, and what it reports as changed."""

from __future__ import annotations

from kube_router.workers.router.rib import Rib, RouteEvent


def learned(prefix: str, next_hop: str) -> RouteEvent:
    return RouteEvent(prefix, next_hop, False)


def gone(prefix: str) -> RouteEvent:
    return RouteEvent(prefix, None, False)


def test_routes_come_change_and_go_and_each_change_is_told_once() -> None:
    rib = Rib()
    assert rib.apply([learned("10.1.0.0/16", "10.0.0.2"), learned("fd00:1::/64", "2001:db8::2")]) == 2
    assert rib.take() == {"10.1.0.0/16", "fd00:1::/64"}
    assert rib.take() == frozenset()
    rib.apply([learned("10.1.0.0/16", "10.0.0.3")])
    assert rib.take() == {"10.1.0.0/16"}
    rib.apply([gone("10.1.0.0/16"), gone("10.9.0.0/16")])
    assert dict(rib.routes) == {"fd00:1::/64": "2001:db8::2"}
    assert rib.take() == {"10.1.0.0/16"}


def test_an_event_that_changes_nothing_marks_nothing() -> None:
    rib = Rib()
    rib.apply([learned("10.1.0.0/16", "10.0.0.2")])
    rib.take()
    assert rib.apply([learned("10.1.0.0/16", "10.0.0.2")]) == 1
    assert rib.take() == frozenset()


def test_an_own_path_that_becomes_best_takes_the_learned_one_out() -> None:
    rib = Rib()
    rib.apply([learned("10.1.0.0/16", "10.0.0.2"), RouteEvent("10.1.0.0/16", None, True)])
    assert dict(rib.routes) == {}
    assert rib.take() == {"10.1.0.0/16"}


def test_own_paths_are_kept_apart_and_belong_to_one_watch() -> None:
    rib = Rib()
    rib.apply([RouteEvent("10.1.0.0/16", "10.0.0.1", True), RouteEvent("10.2.0.0/16", "10.0.0.1", True)])
    assert dict(rib.local) == {"10.1.0.0/16": "10.0.0.1", "10.2.0.0/16": "10.0.0.1"}
    assert (dict(rib.routes), rib.take()) == ({}, frozenset())
    rib.apply([RouteEvent("10.1.0.0/16", None, True), learned("10.2.0.0/16", "10.0.0.2")])
    assert dict(rib.local) == {}
    assert dict(rib.routes) == {"10.2.0.0/16": "10.0.0.2"}
    rib.apply([RouteEvent("10.3.0.0/16", "10.0.0.1", True)])
    rib.restart()
    assert dict(rib.local) == {}


def test_a_new_watch_keeps_all_until_its_table_is_complete() -> None:
    rib = Rib()
    rib.apply([learned("10.1.0.0/16", "10.0.0.2"), learned("10.2.0.0/16", "10.0.0.2")])
    rib.take()
    rib.restart()
    rib.apply([learned("10.1.0.0/16", "10.0.0.2")])
    assert set(rib.routes) == {"10.1.0.0/16", "10.2.0.0/16"}
    rib.confirmed()
    assert set(rib.routes) == {"10.1.0.0/16"}
    assert rib.take() == {"10.2.0.0/16"}
    rib.confirmed()
    assert set(rib.routes) == {"10.1.0.0/16"}


def test_a_second_watch_before_the_first_was_complete_forgets_nothing_early() -> None:
    rib = Rib()
    rib.apply([learned("10.1.0.0/16", "10.0.0.2")])
    rib.restart()
    rib.restart()
    assert set(rib.routes) == {"10.1.0.0/16"}
    rib.confirmed()
    assert dict(rib.routes) == {}


def test_a_withdrawal_during_a_new_watch_counts_at_once() -> None:
    rib = Rib()
    rib.apply([learned("10.1.0.0/16", "10.0.0.2")])
    rib.restart()
    rib.apply([gone("10.1.0.0/16")])
    rib.confirmed()
    assert dict(rib.routes) == {}


def test_the_view_is_read_only() -> None:
    view = Rib().routes
    try:
        view["10.1.0.0/16"] = "10.0.0.2"  # type: ignore[index]
    except TypeError:
        return
    raise AssertionError("the view could be written")
