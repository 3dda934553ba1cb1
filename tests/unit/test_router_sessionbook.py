"""How sessions stand, out of gobgpd's events and listings: states, times, reasons, numbers."""

from __future__ import annotations

from typing import Any

from kube_router.workers.model import Family
from kube_router.workers.router.sessionbook import (
    DAEMON_ENDED,
    LOST,
    NEVER_CONNECTED,
    PEER_NOTIFIED,
    TOO_MANY_PREFIXES,
    WE_NOTIFIED,
    PeerReport,
    SessionBook,
)
from kube_router.workers.router.sessions import PeerStatus

A, B = "10.0.0.2", "fd00::3"
UP, DOWN = "established", "idle"


def report(
    address: str = A, state: str = UP, *, limited: bool = False, graceful: bool = False, **more: Any
) -> PeerReport:
    status = PeerStatus(address, established=state == UP, limited=limited, graceful=graceful)
    return PeerReport(status, state, **{"configured_asn": 0, "asn": 64512, **more})


def running(**more: Any) -> SessionBook:
    """One session, up since second 100."""
    book = SessionBook()
    book.restart()
    book.listed([report(established_at=100.0, messages=9, **more)], 110.0)
    return book


def test_a_session_is_shown_once_it_has_been_listed() -> None:
    book = SessionBook()
    book.touched([A])
    assert book.view(64512) == ()
    families = (Family.IPV4, Family.IPV6)
    book.listed([report(established_at=100.0, families=families, received=5, accepted=4)], 110.0)
    (session,) = book.view(64512)
    assert (session.state, session.since, session.flaps, session.last_error) == (UP, 100.0, 0, "")
    assert (session.received, session.accepted, session.advertised) == (5, 4, None)
    assert session.families == ("IPv4", "IPv6")


def test_whose_number_and_kind() -> None:
    book = SessionBook()
    book.listed([report(A, asn=0), report(B, asn=65001, configured_asn=65001), report("10.0.0.4", asn=64999)], 1.0)
    assert {item.address: (item.type, item.asn) for item in book.view(64512)} == {
        A: ("internal", 64512),
        B: ("external", 65001),
        "10.0.0.4": ("internal", 64999),
    }


def test_events_only_say_whom_to_list() -> None:
    book = running()
    book.touched([A])
    assert book.unlisted == {A} and book.view(64512)[0].state == UP
    book.listed([report(state=DOWN)], 150.0, only=A)
    (session,) = book.view(64512)
    assert (session.state, session.since, session.flaps) == (DOWN, 150.0, 1)
    assert not book.unlisted
    book.listed([report(state="opensent")], 160.0, only=A)
    (session,) = book.view(64512)
    assert (session.state, session.since, session.flaps) == ("opensent", 150.0, 1)


def test_the_counters_say_who_ended_a_session() -> None:
    for counts, words in (
        ({"notifications_received": 3}, PEER_NOTIFIED),
        ({"notifications_sent": 3}, WE_NOTIFIED),
        ({}, LOST),
    ):
        book = running(notifications_received=2, notifications_sent=2)
        now = {"notifications_received": 2, "notifications_sent": 2, "messages": 9, **counts}
        book.listed([report(state=DOWN, **now)], 150.0, only=A)
        assert book.view(64512)[0].last_error == words


def test_an_attempt_that_is_refused_again_and_again_says_so() -> None:
    book = SessionBook()
    book.restart()
    book.listed([report(state="active", asn=0)], 1.0)
    assert book.view(64512)[0].last_error == NEVER_CONNECTED
    book.listed([report(state=DOWN, asn=0, messages=2, notifications_received=1)], 2.0, only=A)
    assert book.view(64512)[0].last_error == PEER_NOTIFIED


def test_the_last_reason_is_kept_when_the_session_is_up_again() -> None:
    book = running()
    book.listed([report(state=DOWN, messages=9, notifications_sent=1)], 150.0, only=A)
    book.listed([report(established_at=160.0, notifications_sent=1)], 160.0, only=A)
    (session,) = book.view(64512)
    assert (session.state, session.since, session.flaps, session.last_error) == (UP, 160.0, 1, WE_NOTIFIED)


def test_a_peer_over_its_limit_is_named_as_such() -> None:
    book = running()
    book.listed([report(state=DOWN, notifications_sent=1, limited=True)], 150.0, only=A)
    assert book.view(64512)[0].last_error == TOO_MANY_PREFIXES


def test_a_flap_between_two_listings_is_seen_by_its_new_time() -> None:
    book = running()
    book.listed([report(established_at=400.0)], 410.0)
    assert (book.view(64512)[0].flaps, book.view(64512)[0].since) == (1, 400.0)


def test_a_daemon_that_ended_took_its_sessions_along() -> None:
    book = running()
    book.restart()
    assert book.view(64512) == ()
    book.listed([report(state=DOWN)], 200.0)
    (session,) = book.view(64512)
    assert (session.flaps, session.last_error, session.since) == (1, DAEMON_ENDED, 200.0)


def test_a_stream_that_broke_ended_no_session() -> None:
    book = running()
    book.restart()
    book.listed([report(established_at=100.0)], 200.0)
    (session,) = book.view(64512)
    assert (session.flaps, session.last_error, session.since) == (0, "", 100.0)


def test_peers_that_are_gone_are_forgotten() -> None:
    book = running()
    book.listed([report(), report(B)], 120.0)
    book.touched([B])
    book.listed([], 121.0, only=B)
    assert [item.address for item in book.view(64512)] == [A] and not book.unlisted
    book.listed([], 122.0)
    assert book.view(64512) == ()


def test_what_is_announced_is_asked_for_once_a_session_and_again_after_a_change() -> None:
    book = running()
    assert book.uncounted and book.take_uncounted() == A
    book.listed([report(established_at=100.0, advertised=7)], 111.0, only=A)
    assert book.view(64512)[0].advertised == 7
    assert book.take_uncounted() is None
    book.listed([report(established_at=100.0)], 112.0)
    assert book.view(64512)[0].advertised == 7  # an ordinary listing does not know, and takes nothing away
    book.count_again()
    assert book.take_uncounted() == A
    book.count_again()
    book.listed([report(state=DOWN)], 120.0, only=A)
    assert book.take_uncounted() is None and book.view(64512)[0].advertised is None


def test_nothing_new_is_the_same_object() -> None:
    book = running()
    assert book.view(64512) is book.view(64512)


def test_graceful_restart_as_it_stands() -> None:
    book = SessionBook()
    for graceful, offered, restarting, words in (
        (False, True, False, ""),
        (True, False, False, "offered"),
        (True, True, False, "ready"),
        (True, True, True, "restarting"),
    ):
        book.listed([report(graceful=offered, graceful_restart=graceful, peer_restarting=restarting)], 1.0)
        assert book.view(64512)[0].graceful_restart == words
