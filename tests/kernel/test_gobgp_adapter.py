"""The adapters of both gobgpd generations against real daemons: what is asked for is what is read back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.bgp import asking, node
from support.gobgpd import BINARIES, Daemon, attached, daemons
from support.namespaces import Namespace

from kube_router.workers.router.bgpstate import CLOSED, FRESH, OPEN, BgpState, Neighbor
from kube_router.workers.router.gobgp.client import Client, GobgpError, connect
from kube_router.workers.router.plan import (
    AddNeighbor,
    AddPath,
    ChangeSet,
    JudgeAgain,
    Plan,
    RemoveNeighbor,
    RemovePath,
    SetPolicies,
    StartSpeaker,
    diff,
)
from kube_router.workers.router.vips import Vips

A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
B = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"])
C = node("c", ["10.0.0.3"], ["10.244.3.0/24"])
EXTERNAL: dict[str, Any] = {
    "peer_router_ips": ("10.0.1.1", "2001:db8:1::1"),
    "peer_router_asns": (65000, 65001),
    "peer_router_ports": (1179, 179),
    "peer_router_multihop_ttl": 3,
    "bgp_holdtime": 30.0,
    "passwords": ("geheim", ""),
}
SERVER = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"], {"rr.server": "0x2a"})
CLIENT = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"], {"rr.client": "42"})
ADORNED = node(
    "a",
    ["10.0.0.1", "2001:db8::1"],
    ["10.244.1.0/24", "fd00:1::/64"],
    {
        "node.bgp.communities": "no-export, internet,65000:1,4294967295",
        "node.bgp.large-communities": "4294967295:0:1,64512:1:2",
        "node.bgp.customimportreject": "0.0.0.0/0,192.0.2.1/24,192.0.2.0/25,2001:db8:5::/48",
        "path-prepend.as": "4200000001",
        "path-prepend.repeat-n": "255",
    },
)
FEW, MORE = frozenset({"203.0.113.7", "2001:db8:99::7"}), frozenset({"203.0.113.8", "2001:db8:99::7"})
GRACEFUL: dict[str, Any] = {"bgp_graceful_restart": True, "bgp_graceful_restart_time": 40.0}
STATES = {
    "alone": asking(A, bgp_port=1790).state,
    "mesh": asking(A, B, C, bgp_port=1790).state,
    "external": asking(A, B, bgp_port=1790, override_nexthop=True, **EXTERNAL).state,
    "reflecting": asking(SERVER, CLIENT, C, bgp_port=1790).state,
    "graceful": asking(SERVER, CLIENT, C, bgp_port=1790, bgp_max_prefixes=0, **GRACEFUL, **EXTERNAL).state,
    "long-lived": asking(
        A, B, bgp_port=1790, bgp_long_lived_graceful_restart_time=3600.0, **GRACEFUL, **EXTERNAL
    ).state,
    "hidden": asking(A, B, bgp_port=1790, advertise_pod_cidr=False, **EXTERNAL).state,
    "adorned": asking(ADORNED, B, bgp_port=1790, vips=Vips(FEW, FEW), **EXTERNAL).state,
    "one service more": asking(ADORNED, B, bgp_port=1790, vips=Vips(MORE, MORE | FEW), **EXTERNAL).state,
    "reflecting outside": asking(SERVER, CLIENT, bgp_port=1790, vips=Vips(FEW, MORE), **EXTERNAL).state,
}


@pytest.fixture(params=BINARIES, ids=lambda generation: f"gobgpd{generation}")
def daemon(request: pytest.FixtureRequest, netns: Namespace, tmp_path: Path) -> Iterator[Daemon]:
    netns.run("ip address add 10.0.0.1/24 dev lo; ip address add 2001:db8::1/64 dev lo nodad")
    with daemons((netns, request.param, tmp_path)) as (started,):
        yield started


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    connected = attached(daemon)
    yield connected
    connected.close()


def apply(client: Client, wanted: BgpState) -> None:
    plan = diff(client.observe(), wanted)
    assert client.apply(plan) == (len(plan.steps), ())


def test_generation_is_found_and_a_fresh_daemon_reads_as_such(client: Client, daemon: Daemon) -> None:
    assert client.generation == daemon.generation
    assert client.observe() == FRESH
    assert 0 <= client.daemon_age() < 60


def test_a_speaker_that_starts_exports_nothing(client: Client) -> None:
    speaker = STATES["alone"].speaker
    assert speaker is not None
    assert client.apply(Plan((StartSpeaker(speaker),))) == (1, ())
    assert client.observe() == replace(FRESH, speaker=speaker, export=CLOSED)


def test_every_state_reads_back_as_it_was_asked_for_from_every_other(client: Client) -> None:
    """One daemon through all changes: no step may leave something of the state before."""
    order = ["alone", "mesh", "external", "hidden", "mesh", "alone", "external", "alone", "reflecting", "graceful"]
    order += ["long-lived", "reflecting", "long-lived", "mesh", "adorned", "one service more", "adorned", "external"]
    order += ["one service more", "reflecting outside", "adorned", "reflecting outside", "alone"]
    for name in order:
        apply(client, STATES[name])
        observed = client.observe()
        assert observed == STATES[name], name
        assert diff(observed, STATES[name]) == Plan(), name


def test_bfd_reads_back_as_asked_for_where_the_daemon_has_it(client: Client) -> None:
    wanted = asking(A, B, bgp_port=1790, enable_bfd=True, bfd_desired_min_tx_interval=300, **EXTERNAL).state
    apply(client, wanted)
    observed = client.observe()
    without = asking(A, B, bgp_port=1790, **EXTERNAL).state
    assert observed == (wanted if client.generation == 4 else without)
    apply(client, without)
    assert client.observe() == without


def test_members_of_a_set_come_and_go_without_the_rest(client: Client) -> None:
    """Also one that is there already, which gobgpd would then hold twice, and one that is not."""
    apply(client, STATES["adorned"])
    plan = diff(STATES["adorned"], STATES["one service more"])
    kinds = [type(step) for step in plan.steps]
    assert kinds == [ChangeSet, ChangeSet, AddPath, RemovePath, ChangeSet, JudgeAgain, JudgeAgain, JudgeAgain]
    for _ in range(2):
        assert client.apply(plan) == (len(plan.steps), ())
        assert client.observe() == STATES["one service more"]
    back = diff(STATES["one service more"], STATES["adorned"])
    assert client.apply(back) == (len(back.steps), ())
    assert client.observe() == STATES["adorned"]


def test_a_changed_next_hop_replaces_the_path(client: Client) -> None:
    apply(client, STATES["alone"])
    moved = replace(STATES["alone"], paths={"10.244.1.0/24": "10.0.0.77", "fd00:1::/64": "2001:db8::77"})
    apply(client, moved)
    assert client.observe().paths == moved.paths


def test_someone_elses_changes_are_seen_and_taken_back(client: Client) -> None:
    apply(client, STATES["mesh"])
    strange = replace(
        STATES["mesh"],
        policies=replace(STATES["mesh"].policies, export=()),
        import_=OPEN,
        paths={**STATES["mesh"].paths, "192.0.2.0/24": "10.0.0.1"},
        neighbors={**STATES["mesh"].neighbors, "10.0.9.9": Neighbor("10.0.9.9", 65000, "10.0.0.1", 179, ())},
    )
    client.apply(diff(STATES["mesh"], strange))
    assert client.observe() != STATES["mesh"]
    apply(client, STATES["mesh"])
    assert client.observe() == STATES["mesh"]


def test_a_refused_step_fails_alone_and_is_named(client: Client) -> None:
    apply(client, STATES["mesh"])
    taken = STATES["mesh"].neighbors["10.0.0.2"]
    new = replace(taken, address="10.0.0.9")
    done, failures = client.apply(Plan((AddNeighbor(taken), AddNeighbor(new))))
    assert done == 1
    (failure,) = failures
    assert failure.phase == "bgp-peers" and "10.0.0.2" in failure.text
    assert "10.0.0.9" in client.observe().neighbors


def test_many_paths_go_in_one_call_and_by_themselves_when_that_is_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(client, STATES["alone"])
    inner, calls = client._stream_paths, []

    def refusing_many(steps: Sequence[AddPath | RemovePath]) -> None:
        calls.append(len(steps))
        if len(steps) == 50:
            raise GobgpError("one of them is bad")
        inner(steps)

    monkeypatch.setattr(client, "_stream_paths", refusing_many)
    first = tuple(AddPath(f"198.51.100.{number}/32", "10.0.0.1") for number in range(40))
    assert client.apply(Plan(first)) == (40, ())
    second = tuple(AddPath(f"203.0.113.{number}/32", "10.0.0.1") for number in range(50))
    assert client.apply(Plan(second)) == (50, ())
    assert calls == [40, 50, *(1,) * 50]
    assert {step.prefix for step in first + second} <= client.observe().paths.keys()
    gone = tuple(RemovePath(step.prefix, step.next_hop) for step in first)
    assert client.apply(Plan(gone)) == (40, ())
    assert calls[-1] == 40 and not {step.prefix for step in first} & client.observe().paths.keys()


def test_no_peer_comes_in_when_its_policies_could_not_be_set(client: Client) -> None:
    apply(client, STATES["alone"])
    policies = STATES["mesh"].policies
    sets = {**policies.neighbor_sets, "broken": frozenset({"not an address"})}
    bad = SetPolicies(replace(policies, neighbor_sets=sets))
    leaving = RemoveNeighbor(STATES["mesh"].neighbors["10.0.0.2"])
    plan = Plan((leaving, bad, AddNeighbor(STATES["mesh"].neighbors["10.0.0.3"])))
    _, failures = client.apply(plan)
    assert "bgp-policies" in [failure.phase for failure in failures]
    assert client.observe().neighbors == {}


def test_a_port_in_use_is_one_clear_failure(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    apply(client, STATES["alone"])
    with daemons((daemon.namespace, daemon.generation, tmp_path / "second")) as (second,):
        other = attached(second)
        done, failures = other.apply(diff(other.observe(), STATES["alone"]))
        assert done == 0
        (failure,) = failures
        assert failure.phase == "bgp-start"
        assert "port 1790" in failure.text and "in use" in failure.text
        other.close()


def test_a_daemon_that_is_not_there_is_told_from_one_that_refuses(tmp_path: Path) -> None:
    with pytest.raises(GobgpError) as caught:
        connect(tmp_path / "none.sock")
    assert caught.value.gone
