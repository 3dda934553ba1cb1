"""The router worker's BGP half against real daemons: sessions, what peers learn, and what survives what.

Each test runs with both generations of gobgpd. A session takes up to ten seconds to come up with 3.x (a fixed connect
timer), so tests are few and each goes through a whole story.
"""

from __future__ import annotations

import base64
import json
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.bgp import node
from support.bgplab import (
    FROM,
    OUTSIDE,
    OUTSIDE_ASN,
    UP_SECONDS,
    A,
    B,
    C,
    Lab,
    Witness,
    annotated,
    learned,
    open_lab,
    outsider_state,
    settings_of,
)
from support.bgpspeaker import Speaker as Scripted
from support.gobgpd import BINARIES, PORT, TOOLS, Speaker, attached, wait_for

from kube_router.workers.router import bgp
from kube_router.workers.router.bgpstate import Bfd
from kube_router.workers.settings import Settings


@pytest.fixture(params=BINARIES, ids=lambda generation: f"gobgpd{generation}")
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    with open_lab(request.param, tmp_path) as opened:
        yield opened


def test_nodes_learn_each_others_pod_routes_and_follow_the_cluster(lab: Lab) -> None:
    a, b, c = (lab.speaker(name) for name in "abc")
    for speaker in (a, b):
        outcome = speaker.see(A, B)
        assert (outcome.failures, outcome.warnings) == ((), ())
    wait_for(lambda: learned(a, "b")() and learned(b, "a")(), UP_SECONDS, "a and b learn", a, b)
    assert a.states() == {"10.0.0.2": "established"}
    assert (a.outcome.sessions[0].type, a.outcome.sessions[0].asn) == ("internal", 64512)

    # A third node: the running session is not touched.
    b.bgp.take_changed()
    for speaker in (a, b, c):
        speaker.see(A, B, C)
    wait_for(lambda: learned(a, "b", "c")() and learned(c, "a", "b")(), UP_SECONDS, "c joins", a, b, c)
    assert b.bgp.take_changed() == FROM["c"].keys(), "nothing but c's routes changed"

    # The cluster says the same again, and again: nothing is done.
    written = a.writes
    a.see(A, B, C)
    a.reconcile(compare=True, observe=True)
    assert a.writes == written

    # A pod CIDR changes: the new one comes, the old one goes, the other family's stays.
    moved = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.77.0/24", "fd00:2::/64"])
    for speaker in (a, b, c):
        speaker.see(A, moved, C)
    wait_for(
        lambda: {"10.244.77.0/24", "fd00:2::/64"} <= a.bgp.learned.keys() and "10.244.2.0/24" not in a.bgp.learned,
        5,
        "b's new CIDR",
        a,
        b,
        c,
    )

    # A node leaves the cluster: its session and its routes go.
    for speaker in (a, b):
        speaker.see(A, moved)
    wait_for(lambda: not FROM["c"].keys() & a.bgp.learned.keys(), 5, "c's routes go", a, b)
    assert set(a.states()) == {"10.0.0.2"}


def test_a_worker_that_restarts_writes_nothing_and_no_peer_notices(lab: Lab) -> None:
    a, b = lab.speaker("a"), lab.speaker("b")
    for speaker in (a, b):
        speaker.see(A, B)
    wait_for(lambda: learned(a, "b")() and learned(b, "a")(), UP_SECONDS, "a and b learn", a, b)
    b.bgp.take_changed()
    a.restart()
    a.see(A, B)
    wait_for(learned(a, "b"), 5, "the new worker has the table", a, b)
    assert a.writes == 0
    assert a.daemon.starts == 1
    assert b.bgp.take_changed() == frozenset()
    assert b.states() == {"10.0.0.1": "established"}


def test_a_restarted_worker_with_a_stale_snapshot_takes_nothing_away(lab: Lab) -> None:
    a, b = lab.speaker("a"), lab.speaker("b")
    for speaker in (a, b):
        speaker.see(A, B)
    wait_for(lambda: learned(a, "b")() and learned(b, "a")(), UP_SECONDS, "a and b learn", a, b)
    a.restart()
    a.keep = True
    a.see(node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.8.0/24", "fd00:1::/64"]), C)
    wait_for(lambda: "10.244.8.0/24" in b.bgp.learned, 5, "what is new is added", a, b)
    assert b.bgp.learned.keys() == {"10.244.8.0/24", *FROM["a"]}
    assert a.states()["10.0.0.2"] == "established"
    a.keep = False
    a.see(A, B)
    wait_for(lambda: b.bgp.learned.keys() == FROM["a"].keys(), 5, "in sync again, it goes", a, b)
    assert set(a.states()) == {"10.0.0.2"}


def test_a_daemon_that_dies_leaves_the_routes_and_is_set_up_again(lab: Lab) -> None:
    a, b = lab.speaker("a"), lab.speaker("b")
    for speaker in (a, b):
        speaker.see(A, B)
    wait_for(lambda: learned(a, "b")() and learned(b, "a")(), UP_SECONDS, "a and b learn", a, b)
    before = dict(a.bgp.learned)
    a.bgp.take_changed()
    a.daemon.kill(pause=True)
    wait_for(lambda: not a.settled, 5, "a notices", a, b)
    assert (dict(a.bgp.learned), a.bgp.take_changed()) == (before, frozenset())
    assert a.outcome.failures == ()
    a.daemon.resume()
    wait_for(lambda: a.daemon.starts == 2 and a.outcome.sessions != (), 10, "a attaches again", a, b)
    assert dict(a.bgp.learned) == before, "held until the peers are back"
    wait_for(lambda: learned(a, "b")() and learned(b, "a")(), UP_SECONDS, "both learn again", a, b)
    assert a.bgp.take_changed() == frozenset(), "nothing was lost, nothing is new"


def test_an_outside_peer_gets_own_pod_cidrs_only_and_cannot_teach_a_default_route(lab: Lab) -> None:
    theirs = {"0.0.0.0/0": OUTSIDE, "::/0": "2001:db8::9", "198.51.100.0/24": OUTSIDE, "2001:db8:5::/48": "2001:db8::9"}
    outside = lab.outsider(outsider_state(paths=theirs))
    peers: dict[str, Any] = {
        "peer_router_ips": (OUTSIDE,),
        "peer_router_asns": (OUTSIDE_ASN,),
        "peer_router_ports": (PORT,),
    }
    a, b = lab.speaker("a", **peers), lab.speaker("b")
    for speaker in (a, b):
        assert speaker.see(A, B).failures == ()
    accepted = {"198.51.100.0/24": OUTSIDE, "2001:db8:5::/48": "2001:db8::9"}
    wait_for(lambda: dict(a.bgp.learned) == {**FROM["b"], **accepted}, UP_SECONDS, "a learns", a, b, outside)
    wait_for(lambda: outside.routes() == FROM["a"], UP_SECONDS, "the outsider learns", a, b, outside)
    assert outside.ever == FROM["a"].keys(), "nothing else at any time, from the first moment on"
    assert dict(b.bgp.learned) == FROM["a"], "what a learned outside is not passed on"
    assert {item.type: item.asn for item in a.outcome.sessions} == {"internal": 64512, "external": OUTSIDE_ASN}


def test_pod_cidrs_are_hidden_shown_and_hidden_again_without_touching_the_session(lab: Lab) -> None:
    outside = lab.outsider(outsider_state())
    peers: dict[str, Any] = {
        "peer_router_ips": (OUTSIDE,),
        "peer_router_asns": (OUTSIDE_ASN,),
        "peer_router_ports": (PORT,),
    }
    a = lab.speaker("a", advertise_pod_cidr=False, **peers)
    a.see(A)
    wait_for(lambda: outside.established("10.0.0.1"), UP_SECONDS, "session", a, outside)
    shown, hidden = Settings(**{**settings_of(a), "advertise_pod_cidr": True}), a.settings
    assert outside.routes() == {} and outside.ever == set()
    for settings, routes in ((shown, FROM["a"]), (hidden, {}), (shown, FROM["a"])):
        a.settings = settings
        a.restart()
        a.see(A)
        wait_for(lambda: outside.routes() == routes, 5, f"the outsider has {routes}", a, outside)  # noqa: B023
        assert outside.established("10.0.0.1")
    assert a.daemon.starts == 1


def test_a_password_holds_and_leaves_nothing_behind(lab: Lab) -> None:
    secret = "tr0ub4dor"
    outside = lab.outsider(outsider_state(password=secret))
    a = lab.speaker("a")
    entry = f"remoteip: {OUTSIDE}, remoteasn: {OUTSIDE_ASN}, port: {PORT}"
    encoded = base64.b64encode(secret.encode()).decode()
    a.see(annotated(A, {"peers": f"- {{{entry}, password: {encoded}}}"}))
    wait_for(lambda: outside.routes() == FROM["a"], UP_SECONDS, "the session with password", a, outside)
    assert secret not in str(a.outcome) and encoded not in str(a.outcome)

    # The peer goes and comes back without password: also as a session that the peer opens.
    a.see(A)
    outside.plan(outsider_state())
    assert a.states() == {} or a.see(A).sessions == ()
    a.see(annotated(A, {"peers": f"- {{{entry}}}"}))
    wait_for(lambda: outside.routes() == FROM["a"], UP_SECONDS, "the session without password", a, outside)
    assert secret not in a.daemon.log.read_text()


def test_a_password_that_goes_lets_the_peer_open_the_session(lab: Lab) -> None:
    """Only the peer dials here: a key left on our listening socket would make every attempt of it time out."""
    secret = "tr0ub4dor"
    outside = lab.outsider(outsider_state(password=secret))
    a = lab.speaker("a")
    wrong_port = f"remoteip: {OUTSIDE}, remoteasn: {OUTSIDE_ASN}, port: 9"
    encoded = base64.b64encode(secret.encode()).decode()
    a.see(annotated(A, {"peers": f"- {{{wrong_port}, password: {encoded}}}"}))
    wait_for(lambda: outside.established("10.0.0.1"), UP_SECONDS, "the peer opens with password", a, outside)
    outside.plan(outsider_state())
    a.see(annotated(A, {"peers": f"- {{{wrong_port}}}"}))
    wait_for(lambda: outside.established("10.0.0.1"), UP_SECONDS, "the peer opens without password", a, outside)


def test_garbage_in_annotations_leaves_sessions_up_and_is_told(lab: Lab) -> None:
    outside = lab.outsider(outsider_state())
    a = lab.speaker("a")
    lists = {"peer.ips": OUTSIDE, "peer.asns": str(OUTSIDE_ASN), "peer.ports": str(PORT)}
    a.see(annotated(A, lists))
    wait_for(lambda: outside.routes() == FROM["a"], UP_SECONDS, "session", a, outside)
    written = a.writes
    for garbage in (
        {**lists, "peer.asns": "1,2,3"},
        {**lists, "peer.ports": "one"},
        {**lists, "peer.asns": "23456"},
        {"peers": "- {remoteip: "},
        {"peers": f"- {{remoteip: {OUTSIDE}, remoteasn: none}}"},
        {**lists, "bgp-local-addresses": "here,there"},
    ):
        outcome = a.see(annotated(A, garbage))
        assert outcome.failures == ()
        assert any("node a" in line and "kube-router.io/" in line for line in outcome.warnings), outcome.warnings
        assert [notice.name for notice in outcome.notices] != []
        assert a.writes == written, garbage
    outside.turn()
    assert outside.established("10.0.0.1")
    a.see(annotated(A, lists))
    assert (a.writes, a.outcome.warnings) == (written, ())


def test_another_asn_restarts_the_daemon_once_and_peers_follow(lab: Lab) -> None:
    a, b = lab.speaker("a"), lab.speaker("b")
    for speaker in (a, b):
        speaker.see(A, B)
    wait_for(lambda: learned(a, "b")() and learned(b, "a")(), UP_SECONDS, "a and b learn", a, b)
    a.settings = Settings(**{**settings_of(a), "cluster_asn": 65010})
    a.restart()
    a.see(A, B)
    # b still has the old AS number: a rolling change keeps the two connected.
    wait_for(lambda: a.daemon.starts == 2 and learned(a, "b")() and learned(b, "a")(), 2 * UP_SECONDS, "again", a, b)
    assert b.outcome.sessions[0].asn == 65010


def test_a_missing_daemon_is_waited_for_and_told_after_a_while(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    a = lab.speaker("a")
    a.daemon.kill(pause=True)
    a.restart()
    outcome = a.see(A, B)
    assert (outcome.failures, outcome.warnings) == ((), ())
    assert outcome.retry_after is not None and outcome.retry_after <= 1.0
    wait_for(lambda: a.outcome.warnings != (), 10, "a warning", a)
    assert "gobgpd does not answer on" in a.outcome.warnings[0]
    assert a.bgp.hold_deletions
    a.daemon.resume()
    wait_for(lambda: a.writes > 0 and a.outcome.warnings == (), 10, "gobgpd is set up", a)


def test_both_generations_in_one_cluster(lab: Lab) -> None:
    other = {3: 4, 4: 3}[lab.generation]
    a, b = lab.speaker("a"), lab.speaker("b", other)
    for speaker in (a, b):
        speaker.see(A, B)
    wait_for(lambda: learned(a, "b")() and learned(b, "a")(), UP_SECONDS, "a and b learn", a, b)


def dial(lab: Lab, place: str, address: str, asn: int, port: int = PORT) -> Scripted:
    """A scripted peer's session with a, which it opens at once."""
    with lab.places[place].enter():
        peer = Scripted(asn, address).connect("10.0.0.1", port, local=address, seconds=15)
    lab.stack.callback(peer.close)
    return peer


def test_a_reflector_marks_what_it_passes_on_to_clients(lab: Lab) -> None:
    a = lab.speaker("a")
    server, one, two = (
        annotated(item, {key: "42"}) for item, key in ((A, "rr.server"), (B, "rr.client"), (C, "rr.client"))
    )
    a.see(server, one, two)
    first, second = dial(lab, "b", "10.0.0.2", 64512), dial(lab, "c", "10.0.0.3", 64512)
    for family in FROM["b"].items():
        first.announce([family[0]], family[1], as_path=(), local_pref=100)
    second.wait(lambda: FROM["b"].keys() <= second.routes.keys(), 10, "the other client has them")
    for prefix, hop in FROM["b"].items():
        route = second.routes[prefix]
        assert (route.next_hop, route.cluster_list, route.originator) == (hop, ("0.0.0.42",), "10.0.0.2")


@pytest.mark.parametrize("lab", [4], indirect=True, ids=["gobgpd4"])
def test_nodes_that_become_clients_of_a_reflector_lose_no_route_meanwhile(lab: Lab) -> None:
    server = annotated(A, {"rr.server": "42"})
    a, b, c = speakers = tuple(lab.speaker(name) for name in "abc")
    for speaker in speakers:
        assert speaker.see(server, B, C).warnings == ()
    wait_for(
        lambda: learned(a, "b", "c")() and learned(b, "a", "c")() and learned(c, "a", "b")(),
        UP_SECONDS,
        "everybody has all routes",
        *speakers,
    )
    looking = attached(b.daemon)
    lab.stack.callback(looking.close)
    both = (["10.0.0.1", 4], ["10.0.0.3", 2])
    wait_for(
        lambda: sorted([item.status.address, item.received] for item in looking.peers()) == [*both],
        UP_SECONDS,
        "b has c's routes from c and from the server",
        *speakers,
    )
    witness = Witness(b.daemon)
    lab.stack.callback(witness.close)
    kept = {peer: session(a, peer) for peer in ("10.0.0.2", "10.0.0.3")}
    one, two = annotated(B, {"rr.client": "42"}), annotated(C, {"rr.client": "42"})
    for nodes, wanted in (((one, C), 1), ((B, C), 2), ((one, two), 1)):
        for speaker in speakers:
            speaker.see(server, *nodes)
        wait_for(lambda: len(b.states()) == wanted, UP_SECONDS, "b's sessions", *speakers)  # noqa: B023
        assert b.bgp.learned.keys() == {*FROM["a"], *FROM["c"]}
    wait_for(lambda: learned(b, "a", "c")() and learned(c, "a", "b")(), 5, "all routes", *speakers)
    assert {peer: session(a, peer) for peer in kept} == kept
    assert witness.withdrawn == []


def test_limit_hold_time_and_bfd_change_without_a_new_session(lab: Lab) -> None:
    entry = f"remoteip: {OUTSIDE}, remoteasn: {OUTSIDE_ASN}, port: {PORT}"
    a = lab.speaker("a", bgp_graceful_restart=True)
    a.see(annotated(A, {"peers": f"- {{{entry}}}"}))
    outside = dial(lab, "outside", OUTSIDE, OUTSIDE_ASN)
    wait_for(lambda: a.states() == {OUTSIDE: "established"}, 5, "session", a)
    assert any("does not offer graceful restart" in line for line in a.outcome.warnings)
    wanted = annotated(A, {"peers": f"- {{{entry}, holdtime: 30, bfd: {{enabled: true}}}}"})
    a.settings = Settings(**{**settings_of(a), "bgp_max_prefixes": 7})
    a.restart()
    outcome = a.see(wanted)
    assert (a.writes, outcome.failures) == (1, ())
    told = [line for line in outcome.warnings if "BFD" in line]
    refused = f"peer {OUTSIDE}: gobgpd 3 has no BFD (4.5 has); the session runs without it"
    assert told == ([refused] if lab.generation == 3 else [])
    a.reconcile(compare=True, observe=True)
    assert a.writes == 1, "what is read back is what was asked for"
    outside.announce([f"198.51.{number}.0/24" for number in range(7)], OUTSIDE)
    wait_for(lambda: len(a.bgp.learned) == 7, 5, "within the limit", a)
    assert not outside.closed
    outside.announce(["198.51.100.0/24"], OUTSIDE)
    outside.wait(lambda: outside.closed, 5, "and beyond it")
    assert outside.notification is not None and (outside.notification.code, outside.notification.subcode) == (6, 1)


def session(speaker: Speaker, address: str) -> str:
    """The TCP connection of a session, by its two ends: another one is another session."""
    found = speaker.daemon.namespace.run(f"ss -Htn state established dst {address}")
    assert len(found.splitlines()) == 1, found
    return " ".join(found.split()[2:])


@pytest.mark.parametrize("lab", [4], indirect=True, ids=["gobgpd4"])
def test_bfd_notices_a_dead_path_long_before_the_hold_time(lab: Lab) -> None:
    bfd = Bfd(send_milliseconds=100, receive_milliseconds=100)
    state = outsider_state()
    neighbor = replace(state.neighbors["10.0.0.1"], bfd=bfd)
    outside = lab.outsider(replace(state, neighbors={"10.0.0.1": neighbor}))
    keys = "enabled: true, desired_min_tx_interval: 100, required_min_rx_interval: 100"
    entry = f"remoteip: {OUTSIDE}, remoteasn: {OUTSIDE_ASN}, port: {PORT}, bfd: {{{keys}}}"
    a = lab.speaker("a")
    assert a.see(annotated(A, {"peers": f"- {{{entry}}}"})).warnings == ()
    wait_for(lambda: outside.routes() == FROM["a"] and a.settled, UP_SECONDS, "session", a, outside)
    wait_for(lambda: bfd_is_up(a), 5, "BFD is up: without it only the hold time of 90 s would tell", a)
    lab.places["outside"].run("ip link set eth0 down")
    wait_for(lambda: a.states()[OUTSIDE] != "established", 5, "a dead path is noticed", a)


def bfd_is_up(speaker: Speaker) -> bool:
    question = [str(TOOLS / "gobgp"), "--target", f"unix://{speaker.daemon.socket}", "neighbor", OUTSIDE, "-j"]
    reply = json.loads(subprocess.run(question, capture_output=True, check=True).stdout)
    return bool(reply["state"]["bfd_state"].get("session_state") == 1)  # UP in gobgp 4's api.BfdSessionState


def test_an_address_that_is_nowhere_does_not_keep_bgp_from_starting(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bgp, "PATIENCE_SECONDS", 1.0)
    own = annotated(A, {"bgp-local-addresses": "10.0.0.1,192.0.2.9,2001:db8::1,2001:db8:9::9"})
    a = lab.speaker("a")
    place = lab.places["a"]
    with place.enter():  # where the worker looks which addresses there are
        a.see(own)
        assert a.writes == 0, "it may be there in a moment"
        with socket.create_server(("2001:db8::1", PORT), family=socket.AF_INET6):
            wait_for(lambda: a.outcome.failures != (), 5, "somebody is in the way", a)
            assert "2001:db8::1 port 1790: address already in use" in a.outcome.failures[0].text
        wait_for(lambda: a.writes > 0 and a.outcome.failures == (), 5, "BGP is started", a)
        left_out = [line for line in a.outcome.warnings if "cannot be listened on" in line]
        assert ["192.0.2.9" in left_out[0], "2001:db8:9::9" in left_out[1]] == [True, True]
        listening = place.run("ss -Hltn")
        assert f"10.0.0.1:{PORT}" in listening and f"[2001:db8::1]:{PORT}" in listening
        a.restart()
        a.see(own)
        assert (a.writes, a.daemon.starts) == (0, 1), "as it was left"

        # It comes up: now it is what the annotation says, and gobgpd is replaced for it.
        place.run("ip address add 192.0.2.9/32 dev lo")
        a.see(own)
        wait_for(lambda: a.daemon.starts == 2 and f"192.0.2.9:{PORT}" in place.run("ss -Hltn"), 10, "both", a)
