"""Peers that send too much or nonsense, and a gobgpd that hangs: what is told, and who does not notice.

The bad peer is scripted and dials at once. Node b is the one that must not notice anything.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bgplab import FROM, UP_SECONDS, A, B, Lab, Witness, annotated, learned, open_lab
from support.bgpspeaker import MARKER
from support.bgpspeaker import Speaker as Scripted
from support.gobgpd import BINARIES, PORT, Speaker, wait_for

from kube_router.workers.router import sessions

BAD, BAD_ASN = "10.0.0.3", 65003
FLOOD = [str(network) for network in ipaddress.ip_network("20.0.0.0/7").subnets(new_prefix=24)][:100_000]
PEER = {"peers": f"- {{remoteip: {BAD}, remoteasn: {BAD_ASN}, port: {PORT}}}"}


@pytest.fixture(params=BINARIES, ids=lambda generation: f"gobgpd{generation}")
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    with open_lab(request.param, tmp_path) as opened:
        yield opened


def dial(lab: Lab) -> Scripted:
    with lab.places["c"].enter():
        return Scripted(BAD_ASN, BAD).connect("10.0.0.1", PORT, local=BAD, seconds=15)


def test_a_peer_that_floods_or_talks_nonsense_is_kept_away_and_nobody_else_notices(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "LIMIT_FIRST_SECONDS", 2.0)
    a, b = lab.speaker("a"), lab.speaker("b")
    witness = Witness(b.daemon)
    lab.stack.callback(witness.close)
    for speaker in (a, b):
        speaker.see(annotated(A, PEER) if speaker is a else A, B)
    wait_for(lambda: FROM["b"].items() <= a.bgp.learned.items(), UP_SECONDS, "b's routes", a, b)
    bad = dial(lab)
    lab.stack.callback(bad.close)
    with contextlib.suppress(OSError):  # the session may be ended before all of it is sent
        bad.announce(FLOOD, BAD)
    wait_for(lambda: bool(over_limit(a)), 20, "the flood is told", a, b)
    assert f"peer {BAD}: sent more than 50000 prefixes" in over_limit(a)[0]
    wait_for(lambda: a.bgp.learned.keys() == FROM["b"].keys(), 10, "nothing of it stays", a, b)
    bad.wait(lambda: bad.closed, 5, "the session is ended")
    assert bad.notification is not None and (bad.notification.code, bad.notification.subcode) == (6, 1)
    bad.close()

    # After the wait it may try again, and stays when it keeps its limit.
    wait_for(lambda: not over_limit(a), 10, "it is tried again", a, b)
    good = dial(lab)
    lab.stack.callback(good.close)
    good.announce(FLOOD[:3], BAD)
    wait_for(lambda: FLOOD[2] in a.bgp.learned, UP_SECONDS, "it is back", a, b)

    if lab.generation == 4:
        # gobgpd 3.10 dies of some malformed messages; what that costs is shown where it is killed.
        send_nonsense(lab, good)
        wait_for(lambda: a.bgp.learned.keys() == FROM["b"].keys(), 10, "nothing of it stays", a, b)
    assert (a.outcome.failures, a.daemon.starts) == ((), 1)
    assert witness.withdrawn == []
    assert a.states()["10.0.0.2"] == "established"


def send_nonsense(lab: Lab, session: Scripted) -> None:
    """In the middle of a session, and from the first byte on."""
    session.send_raw(os.urandom(5000))
    session.wait(lambda: session.closed, 5, "the session is ended")
    unknown_type, short_open = MARKER + b"\0\x14\x4d\0", MARKER + b"\0\x14\x01\0"
    with lab.places["c"].enter():
        for nonsense in (os.urandom(5000), unknown_type, short_open, b"GET / HTTP/1.0\r\n\r\n", b""):
            with socket.create_connection(("10.0.0.1", PORT), 2, (BAD, 0)) as raw:
                raw.sendall(nonsense)


def over_limit(speaker: Speaker) -> list[str]:
    return [line for line in speaker.outcome.warnings if "--bgp-max-prefixes" in line]


@pytest.mark.parametrize("lab", [4], indirect=True, ids=["gobgpd4"])
def test_a_gobgpd_that_hangs_is_told_in_one_line_and_costs_little_time(lab: Lab) -> None:
    a, b = lab.speaker("a"), lab.speaker("b")
    for speaker in (a, b):
        speaker.see(A, B)
    wait_for(lambda: learned(a, "b")() and learned(b, "a")(), UP_SECONDS, "a and b learn", a, b)
    a.writes = 0
    os.kill(a.daemon.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        a.reconcile(compare=True, observe=True)
        assert time.monotonic() - began < 6
        (failure,) = a.outcome.failures
        assert failure.phase == "bgp-daemon" and "does not answer: stopped or overloaded" in failure.text
        assert dict(a.bgp.learned) == FROM["b"] and a.bgp.hold_deletions
        began = time.monotonic()
        for _ in range(20):
            a.reconcile(compare=True)
        assert time.monotonic() - began < 2, "the rest of the worker hardly waits"
        assert len(a.outcome.failures) == 1
    finally:
        os.kill(a.daemon.pid, signal.SIGCONT)
    wait_for(lambda: learned(a, "b")() and a.outcome.failures == (), 15, "it goes on", a, b)
    assert a.writes == 0
    assert b.states() == {"10.0.0.1": "established"}
