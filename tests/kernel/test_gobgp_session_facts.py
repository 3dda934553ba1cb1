"""What is told of a session, with real daemons of both generations and a peer that does as it is told.

Why it ended, since when it stands, how many prefixes went either way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import bgpspeaker
from support.bgp import node
from support.gobgpd import BINARIES, PORT, Speaker, daemons, wait_for
from support.namespaces import Namespace

from kube_router.ipc.messages import Session
from kube_router.workers.router.sessionbook import LOST, NEVER_CONNECTED, PEER_NOTIFIED, WE_NOTIFIED
from kube_router.workers.settings import Settings

A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
PEER = "10.0.0.9"
HOLD = 3
V4 = [f"100.64.{number}.0/24" for number in range(7)]
V6 = [f"2001:db8:{number:x}::/48" for number in range(1, 4)]


@pytest.fixture(params=BINARIES, ids=lambda generation: f"gobgpd{generation}")
def a(request: pytest.FixtureRequest, netns: Namespace, tmp_path: Path) -> Iterator[Speaker]:
    netns.run("ip link add eth0 type veth peer name far")
    netns.run("ip link set eth0 up; ip link set far up; ip address add 10.0.0.1/24 dev eth0")
    netns.run("ip address add 10.0.0.9/32 dev lo; ip address add 2001:db8::1/64 dev eth0 nodad")
    settings = Settings(
        enable_ipv6=True,
        node_name="a",
        bgp_port=PORT,
        peer_router_ips=(PEER,),
        peer_router_asns=(65000,),
        bgp_holdtime=float(HOLD),
        run_dir=str(tmp_path),
    )
    with netns.enter(), daemons((netns, request.param, tmp_path)) as (daemon,):
        speaker = Speaker(daemon, "a", settings)
        speaker.cluster = {A.name: A}
        wait_for(lambda: speaker.see(A).sessions != (), 10, "a is attached", speaker)
        yield speaker
        speaker.close()


def joined(**more: Any) -> bgpspeaker.Speaker:
    return bgpspeaker.Speaker(65000, "9.9.9.9", hold=HOLD, **more).connect("10.0.0.1", PORT, local=PEER, seconds=20)


def session(a: Speaker) -> Session:
    (found,) = a.outcome.sessions
    return found


def until(a: Speaker, condition: Any, what: str, seconds: float = 15) -> Session:
    wait_for(lambda: bool(a.outcome.sessions) and condition(session(a)), seconds, what, a)
    return session(a)


def test_numbers_and_times_of_a_session(a: Speaker) -> None:
    assert session(a).last_error == NEVER_CONNECTED and session(a).since is None
    peer = joined()
    peer.announce(V4, "10.0.0.9")
    peer.announce(V6, "2001:db8::9")
    peer.announce(["0.0.0.0/0"], "10.0.0.9")
    up = until(a, lambda item: item.advertised == 2 and item.received == 11, "both counts")
    assert (up.state, up.type, up.asn) == ("established", "external", 65000)
    assert up.since is not None and abs(time.time() - up.since) < 30
    assert set(up.families) == {"IPv4", "IPv6"} and up.flaps == 0
    peer.wait(lambda: peer.routes.keys() == {"10.244.1.0/24", "fd00:1::/64"}, 10, "what is counted is what was sent")
    peer.close()


def test_why_a_session_ended(a: Speaker) -> None:
    peer = joined()
    until(a, lambda item: item.state == "established", "up")
    peer.notify(6, 2)
    down = until(a, lambda item: item.flaps == 1 and item.last_error == PEER_NOTIFIED, "down")
    assert down.since is not None and abs(time.time() - down.since) < 30
    peer.close()

    peer = joined()
    until(a, lambda item: item.state == "established", "up again")
    peer.close()
    assert until(a, lambda item: item.flaps == 2 and item.last_error == LOST, "down again").state != "established"

    peer = joined()
    until(a, lambda item: item.state == "established", "up a third time")
    peer.silent = True
    until(a, lambda item: item.flaps == 3 and item.last_error == WE_NOTIFIED, "held no longer")
    peer.wait(lambda: peer.notification is not None and peer.notification.code == 4, 5, "its hold time was over")
    peer.close()


def test_a_peer_of_another_as_is_told_apart_from_one_that_does_not_answer(a: Speaker) -> None:
    with pytest.raises(AssertionError):
        bgpspeaker.Speaker(65099, "9.9.9.9").connect("10.0.0.1", PORT, local=PEER, seconds=3)
    down = until(a, lambda item: item.last_error == WE_NOTIFIED, "refused")
    assert (down.flaps, down.since) == (0, None)
