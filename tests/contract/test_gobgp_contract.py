"""One suite for gobgpd 3, gobgpd 4 and the fake of each: what our code relies on, and what is refused.

Every test says what the daemons do; the fakes must do the same, or the tests that build on them prove nothing.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.bgp import asking, node
from support.fake_gobgpd import FakeGobgpd, Fault
from support.gobgpd import attached, daemons
from support.namespaces import namespaces

from kube_router.workers.router.bgpstate import CLOSED, FRESH, OPEN, BgpState, Policies, PrefixRange
from kube_router.workers.router.gobgp.client import Client, GobgpError, connect
from kube_router.workers.router.gobgp.watch import Watch
from kube_router.workers.router.plan import (
    AddNeighbor,
    AddPath,
    Assign,
    ChangeSet,
    Plan,
    RemoveNeighbor,
    RemovePath,
    SetPolicies,
    StartSpeaker,
    diff,
)
from kube_router.workers.router.rib import Rib

A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
B = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"])
WANTED = asking(A, B, bgp_port=1790).state
SPEAKER = WANTED.speaker
KINDS = ("fake3", "fake4", "gobgpd3", "gobgpd4")


@pytest.fixture(params=KINDS)
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Client]:
    generation = int(request.param[-1])
    if request.param.startswith("fake"):
        with FakeGobgpd(tmp_path / "gobgpd.sock", generation):
            connected = connect(tmp_path / "gobgpd.sock")
            yield connected
            connected.close()
        return
    with namespaces() as (namespace,):
        namespace.run("ip address add 10.0.0.1/24 dev lo; ip address add 2001:db8::1/64 dev lo nodad")
        with daemons((namespace, generation, tmp_path)) as (daemon,):
            connected = attached(daemon)
            yield connected
            connected.close()


@pytest.fixture
def started(client: Client) -> Client:
    assert SPEAKER is not None
    client.apply_step(StartSpeaker(SPEAKER))
    return client


def refused(work: Callable[[], object]) -> str:
    """The daemon's words; it is there and did answer."""
    with pytest.raises(GobgpError) as caught:
        work()
    assert not (caught.value.gone or caught.value.stuck or caught.value.unknown_service)
    return str(caught.value)


def test_a_fresh_daemon_has_no_speaker_and_takes_no_peer(client: Client) -> None:
    assert client.speaker() is None and client.observe() == FRESH
    assert "started" in refused(lambda: client.apply_step(AddNeighbor(WANTED.neighbors["10.0.0.2"])))


def test_a_started_daemon_is_closed_by_us_and_nothing_else(started: Client) -> None:
    assert started.observe() == BgpState(SPEAKER, Policies(), CLOSED, OPEN)


def test_it_cannot_be_started_twice(started: Client) -> None:
    assert SPEAKER is not None
    refused(lambda: started.apply_step(StartSpeaker(SPEAKER)))


def test_what_is_asked_for_is_what_is_read_back(client: Client) -> None:
    plan = diff(FRESH, WANTED)
    assert client.apply(plan) == (len(plan.steps), ())
    assert client.observe() == WANTED
    assert diff(client.observe(), WANTED) == Plan()


def test_paths_come_are_moved_and_go_in_streams(started: Client) -> None:
    steps = tuple(AddPath(f"198.51.100.{number}/32", "10.0.0.1") for number in range(5))
    assert started.apply(Plan((*steps, AddPath("2001:db8:9::1/128", "2001:db8::1")))) == (6, ())
    started.apply_step(AddPath("198.51.100.0/32", "10.0.0.7"))
    paths = started.observe().paths
    assert paths == {
        **dict.fromkeys((step.prefix for step in steps), "10.0.0.1"),
        "198.51.100.0/32": "10.0.0.7",
        "2001:db8:9::1/128": "2001:db8::1",
    }
    gone = tuple(RemovePath(step.prefix, paths[step.prefix]) for step in steps)
    assert started.apply(Plan(gone)) == (5, ())
    assert started.observe().paths == {"2001:db8:9::1/128": "2001:db8::1"}
    started.apply_step(RemovePath("203.0.113.0/24", "10.0.0.1"))  # what is not there goes without a word


def test_a_peer_is_there_once(started: Client) -> None:
    neighbor = WANTED.neighbors["10.0.0.2"]
    started.apply_step(AddNeighbor(neighbor))
    assert "10.0.0.2" in refused(lambda: started.apply_step(AddNeighbor(neighbor)))
    (report,) = started.peers()
    assert (report.address, report.status.established, report.configured_asn) == ("10.0.0.2", False, 0)
    assert started.peers("10.0.0.2") == (report,) and started.peers("10.0.0.3") == ()
    started.apply_step(RemoveNeighbor(neighbor))
    assert started.observe().neighbors == {}
    refused(lambda: started.apply_step(RemoveNeighbor(neighbor)))


def test_policies_that_lose_their_name_fall_open_and_under_the_same_name_they_stay(client: Client) -> None:
    plan = diff(FRESH, WANTED)
    client.apply(plan)
    client.apply_step(SetPolicies(replace(WANTED.policies, export=WANTED.policies.export[:1])))
    assert client.observe().export == WANTED.export
    client._call("SetPolicies", client.dialect.messages.SetPoliciesRequest())
    assert client.observe().export == OPEN


def test_an_assignment_names_policies_that_exist(started: Client) -> None:
    refused(lambda: started.apply_step(Assign("export", WANTED.export)))
    assert started.observe().export == CLOSED


def test_members_of_a_set_come_and_go_by_themselves(client: Client) -> None:
    client.apply(diff(FRESH, WANTED))
    name = "podcidrdefinedset"
    before = client.observe().policies.prefix_sets[name]
    more = PrefixRange("192.0.2.0/24", 24, 24)
    client.apply_step(ChangeSet(name, frozenset({more}), frozenset()))
    assert client.observe().policies.prefix_sets[name] == before | {more}
    client.apply_step(ChangeSet(name, frozenset(), frozenset({more})))
    assert client.observe().policies.prefix_sets[name] == before


def test_a_set_with_a_member_that_is_none_is_refused(started: Client) -> None:
    refused(lambda: started.apply_step(SetPolicies(Policies(neighbor_sets={"x": frozenset({"nobody"})}))))
    assert started.observe().policies == Policies()


def test_the_stream_begins_with_peers_and_the_table_and_goes_on_with_changes(started: Client) -> None:
    started.apply_step(AddNeighbor(WANTED.neighbors["10.0.0.2"]))
    started.apply_step(AddPath("198.51.100.0/24", "10.0.0.1"))
    with watching(started) as (watch, eventfd):
        rib, peers = Rib(), set[str]()
        deadline = time.monotonic() + 10
        while not rib.local and time.monotonic() < deadline:
            select.select([eventfd], [], [], 0.1)
            taken = watch.take()
            peers |= taken.peers
            rib.apply(taken.routes.values())
        assert dict(rib.local) == {"198.51.100.0/24": "10.0.0.1"} and rib.routes == {}
        assert "10.0.0.2" in peers
        started.apply_step(RemovePath("198.51.100.0/24", "10.0.0.1"))
        while rib.local and time.monotonic() < deadline:
            select.select([eventfd], [], [], 0.1)
            rib.apply(watch.take().routes.values())
        assert rib.local == {}


def test_a_table_without_paths_is_a_message_too(started: Client) -> None:
    """So the table is complete when a message says so, and never because none came for a while."""
    with watching(started) as (watch, eventfd):
        deadline = time.monotonic() + 5
        taken = watch.take()
        while not taken.table and time.monotonic() < deadline:
            select.select([eventfd], [], [], 0.1)
            taken = watch.take()
        assert taken.table and taken.events == 0


def test_the_first_table_message_is_the_whole_table(started: Client) -> None:
    steps = tuple(AddPath(f"100.{number // 256}.{number % 256}.0/24", "10.0.0.1") for number in range(3000))
    assert started.apply(Plan(steps)) == (3000, ())
    with watching(started) as (watch, eventfd):
        deadline = time.monotonic() + 10
        taken = watch.take()
        while not taken.table and time.monotonic() < deadline:
            select.select([eventfd], [], [], 0.1)
            taken = watch.take()
        assert len(taken.routes) == 3000


@contextmanager
def watching(client: Client) -> Iterator[tuple[Watch, int]]:
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    watch = Watch(client, eventfd)
    try:
        yield watch, eventfd
    finally:
        watch.close()
        os.close(eventfd)


@pytest.fixture(params=(3, 4))
def fake(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[FakeGobgpd, Client]]:
    with FakeGobgpd(tmp_path / "gobgpd.sock", request.param) as running:
        connected = connect(tmp_path / "gobgpd.sock")
        yield running, connected
        connected.close()


def test_a_step_that_fails_stops_what_depends_on_it_and_nothing_else(fake: tuple[FakeGobgpd, Client]) -> None:
    daemon, client = fake
    daemon.faults["SetPolicies"] = Fault("no", times=1)
    plan = diff(FRESH, WANTED)
    done, failures = client.apply(plan)
    assert [failure.phase for failure in failures] == ["bgp-policies"] and done == 1
    assert client.observe() == BgpState(SPEAKER, Policies(), CLOSED, OPEN)
    again = diff(client.observe(), WANTED)
    assert client.apply(again) == (len(again.steps), ())
    assert client.observe() == WANTED


def test_one_bad_path_spoils_itself_only(fake: tuple[FakeGobgpd, Client]) -> None:
    daemon, client = fake
    client.apply(diff(FRESH, WANTED))
    daemon.faults["AddPathStream"] = Fault("no", times=2)  # the stream of all, and then the first by itself
    steps = tuple(AddPath(f"198.51.100.{number}/32", "10.0.0.1") for number in range(3))
    done, (failure,) = client.apply(Plan(steps))
    assert done == 2 and failure.phase == "bgp-paths" and "198.51.100.0/32" in failure.text
    assert {step.prefix for step in steps[1:]} <= client.observe().paths.keys()


def test_a_call_that_hangs_is_given_up_as_stuck(
    fake: tuple[FakeGobgpd, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, client = fake
    monkeypatch.setattr("kube_router.workers.router.gobgp.client.CALL_SECONDS", 0.2)
    daemon.faults["ListPeer"] = Fault(delay=60)
    with pytest.raises(GobgpError) as caught:
        client.peers()
    assert caught.value.stuck and not caught.value.gone


def test_a_daemon_that_dies_breaks_the_stream(fake: tuple[FakeGobgpd, Client]) -> None:
    daemon, client = fake
    with watching(client) as (watch, eventfd):
        select.select([eventfd], [], [], 5)
        daemon.close()
        deadline = time.monotonic() + 5
        broken = watch.take().broken
        while broken is None and time.monotonic() < deadline:
            select.select([eventfd], [], [], 0.1)
            broken = watch.take().broken
        assert broken


@pytest.mark.parametrize("hop", ["", "nonsense", "10.0.0", "::ffff:1.2.3.4%eth0", "256.1.1.1"])
def test_garbage_for_a_next_hop_passes_as_text_and_breaks_nothing(fake: tuple[FakeGobgpd, Client], hop: str) -> None:
    daemon, client = fake
    daemon.learn("100.64.1.0/24", hop)
    daemon.learn("100.64.2.0/24", "10.0.0.7")
    with watching(client) as (watch, eventfd):
        rib, deadline = Rib(), time.monotonic() + 5
        while "100.64.2.0/24" not in rib.routes and time.monotonic() < deadline:
            select.select([eventfd], [], [], 0.1)
            taken = watch.take()
            assert taken.broken is None
            rib.apply(taken.routes.values())
    assert rib.routes["100.64.2.0/24"] == "10.0.0.7"
