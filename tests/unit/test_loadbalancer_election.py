"""The rules of the Lease: who may take it when, and that two never lead."""

from __future__ import annotations

from dataclasses import replace

from kube_router.workers.loadbalancer.election import (
    LEASE_SECONDS,
    RENEW_SECONDS,
    WRITE_SECONDS,
    Election,
    LeaseRecord,
    Move,
)

HELD = LeaseRecord("other", LEASE_SECONDS, "t0", "t0", 1, "7")


def test_a_write_ends_before_somebody_else_may_begin() -> None:
    assert RENEW_SECONDS + WRITE_SECONDS < LEASE_SECONDS


def test_without_a_lease_it_is_created() -> None:
    candidate = Election("me")
    candidate.observe(None, 100.0)
    assert candidate.move(100.0) is Move.CREATE
    assert not candidate.leads(100.0)


def test_a_held_lease_is_waited_for_until_nobody_renews_it() -> None:
    candidate = Election("me")
    candidate.observe(HELD, 100.0)
    assert candidate.move(100.0) is Move.WAIT
    candidate.observe(replace(HELD, renewed="t1", version="8"), 110.0)
    assert candidate.move(100.0 + LEASE_SECONDS + 0.1) is Move.WAIT, "it was renewed meanwhile"
    candidate.observe(replace(HELD, renewed="t1", version="8"), 120.0)
    assert candidate.move(110.0 + LEASE_SECONDS) is Move.TAKE


def test_the_times_in_the_lease_count_for_nothing() -> None:
    candidate = Election("me")
    candidate.observe(replace(HELD, renewed="1970-01-01T00:00:00Z"), 100.0)
    assert candidate.move(101.0) is Move.WAIT


def test_a_lease_given_back_is_taken_at_once() -> None:
    candidate = Election("me")
    candidate.observe(replace(HELD, holder=""), 100.0)
    assert candidate.move(100.0) is Move.TAKE


def test_the_lead_ends_by_itself_when_renewing_fails() -> None:
    candidate = Election("me")
    candidate.succeeded(replace(HELD, holder="me"), 100.0)
    assert candidate.leads(100.0 + RENEW_SECONDS - 0.1)
    assert candidate.move(101.0) is Move.RENEW
    assert not candidate.leads(100.0 + RENEW_SECONDS)
    assert candidate.move(100.0 + RENEW_SECONDS) is Move.TAKE, "it is still ours by name, but has to be won again"


def test_somebody_else_in_the_lease_ends_the_lead() -> None:
    candidate = Election("me")
    candidate.succeeded(replace(HELD, holder="me"), 100.0)
    candidate.observe(replace(HELD, version="9"), 101.0)
    assert not candidate.leads(101.0)
    assert candidate.move(101.0) is Move.WAIT
    candidate.observe(replace(HELD, version="9"), 120.0)
    assert candidate.move(101.0 + LEASE_SECONDS) is Move.TAKE, "who lost it contends again"


def test_a_restarted_agent_under_the_same_name_does_not_lead_by_the_name() -> None:
    candidate = Election("me")
    candidate.observe(replace(HELD, holder="me"), 100.0)
    assert not candidate.leads(100.0)
    assert candidate.move(100.0) is Move.TAKE
