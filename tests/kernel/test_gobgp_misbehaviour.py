"""Peers that send too much or nonsense: what is told, and that nobody else notices.

All peers are scripted and dial at once.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bgplab import FROM, A, Lab, annotated, open_lab
from support.bgpspeaker import MARKER
from support.bgpspeaker import Speaker as Scripted
from support.gobgpd import BINARIES, PORT, Speaker, wait_for

from kube_router.workers.router import sessions
from kube_router.workers.router.graceful import FILE

BAD, OTHER = "10.0.0.3", "10.0.0.2"
ASN = {BAD: 65003, OTHER: 65002}
PLACES = {BAD: "c", OTHER: "b"}
PEERS = {"peers": "\n".join(f"- {{remoteip: {item}, remoteasn: {asn}, port: {PORT}}}" for item, asn in ASN.items())}
FLOOD = [str(network) for network in ipaddress.ip_network("20.0.0.0/7").subnets(new_prefix=24)][:100_000]
SENT = {"198.51.100.0/24": OTHER}


@pytest.fixture(params=BINARIES, ids=lambda generation: f"gobgpd{generation}")
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    with open_lab(request.param, tmp_path) as opened:
        yield opened


def dial(lab: Lab, address: str) -> Scripted:
    with lab.places[PLACES[address]].enter():
        peer = Scripted(ASN[address], address).connect("10.0.0.1", PORT, local=address, seconds=15)
    lab.stack.callback(peer.close)
    return peer


def test_a_peer_that_floods_or_talks_nonsense_is_kept_away_and_nobody_else_notices(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "LIMIT_FIRST_SECONDS", 1.0)
    # gobgpd 3 takes many times as long for it: it gets a small flood over a small limit.
    limit, flood = (50_000, FLOOD) if lab.generation == 4 else (5_000, FLOOD[:10_000])
    a = lab.speaker("a", bgp_max_prefixes=limit)
    a.see(annotated(A, PEERS))
    other, bad = dial(lab, OTHER), dial(lab, BAD)
    other.announce(SENT, OTHER)
    other.wait(lambda: other.routes.keys() == FROM["a"].keys(), 5, "the other one has a's routes")
    wait_for(lambda: dict(a.bgp.learned) == SENT, 5, "and a has its", a)

    with contextlib.suppress(OSError):  # the session may be ended before all of it is sent
        bad.announce(flood, BAD)
    wait_for(lambda: bool(over_limit(a)), 25, "the flood is told", a)
    assert f"peer {BAD}: sent more than {limit} prefixes" in over_limit(a)[0]
    wait_for(lambda: dict(a.bgp.learned) == SENT, 25, "nothing of it stays", a)
    bad.wait(lambda: bad.closed, 5, "the session is ended")
    assert bad.notification is not None and (bad.notification.code, bad.notification.subcode) == (6, 1)
    bad.close()

    # After the wait it may try again, and stays when it keeps its limit.
    wait_for(lambda: not over_limit(a), 25, "it is tried again", a)
    good = dial(lab, BAD)
    good.announce(FLOOD[:3], BAD)
    wait_for(lambda: FLOOD[2] in a.bgp.learned, 25, "it is back", a)

    if lab.generation == 4:
        # gobgpd 3.10 dies of some malformed messages; what that costs is shown where it is killed.
        send_nonsense(lab, good)
        wait_for(lambda: dict(a.bgp.learned) == SENT, 25, "nothing of it stays", a)
    wait_for(lambda: a.outcome.failures == (), 15, "gobgpd has time for us again", a)
    assert a.daemon.starts == 1
    assert not other.closed and not lost(other)
    assert SENT.items() <= a.bgp.learned.items()


def send_nonsense(lab: Lab, session: Scripted) -> None:
    """In the middle of a session, and from the first byte on."""
    session.send_raw(os.urandom(5000))
    session.wait(lambda: session.closed, 5, "the session is ended")
    unknown_type, short_open = MARKER + b"\0\x14\x4d\0", MARKER + b"\0\x14\x01\0"
    with lab.places["c"].enter():
        for nonsense in (os.urandom(5000), unknown_type, short_open, b"GET / HTTP/1.0\r\n\r\n", b""):
            with socket.create_connection(("10.0.0.1", PORT), 2, (BAD, 0)) as raw:
                raw.sendall(nonsense)


def lost(peer: Scripted) -> set[str]:
    """What was withdrawn of a's; gobgpd tells a peer also of other withdrawals, of what it was never given."""
    return {prefix for update in peer.updates for prefix in update.withdrawn} & FROM["a"].keys()


def over_limit(speaker: Speaker) -> list[str]:
    return [line for line in speaker.outcome.warnings if "--bgp-max-prefixes" in line]


@pytest.mark.parametrize("secret", ["tr0ub4dor"])
def test_a_password_changes_under_a_running_session_and_bounces_that_one_only(lab: Lab, secret: str) -> None:
    a = lab.speaker("a", bgp_graceful_restart=True)
    keys = f"remoteip: {BAD}, remoteasn: {ASN[BAD]}, port: {PORT}"
    a.see(annotated(A, PEERS))
    other, bad = dial(lab, OTHER), dial(lab, BAD)
    for text in (secret, "x" * 80):
        encoded = base64.b64encode(text.encode()).decode()
        entries = PEERS["peers"].replace(f"{{{keys}}}", f"{{{keys}, password: {encoded}}}")
        outcome = a.see(annotated(A, {"peers": entries}))
        assert outcome.failures == ()
        ended(bad)
        with lab.places["c"].enter():
            bad = Scripted(ASN[BAD], BAD).connect("10.0.0.1", PORT, local=BAD, password=text)
        lab.stack.callback(bad.close)
        assert text not in str(outcome) + a.daemon.log.read_text() + (a.daemon.run_dir / FILE).read_text()
    assert not other.closed
    a.see(annotated(A, PEERS))
    ended(bad)
    dial(lab, BAD)
    assert not other.closed and not lost(other)


def ended(peer: Scripted) -> None:
    peer.wait(lambda: peer.closed, 5, "the session is ended")
    peer.close()
