"""gobgpd killed and replaced with graceful restart: what peers keep, who has to wait, and how it ends.

Peers of node a: node b (a kube-router with graceful restart), BIRD (which helps restarting peers, as most routers do),
and a gobgpd without graceful restart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.bgplab import (
    FROM,
    OUTSIDE,
    OUTSIDE_ASN,
    UP_SECONDS,
    A,
    B,
    Lab,
    Witness,
    learned,
    open_lab,
    outsider_state,
    settings_of,
)
from support.bgpspeaker import Speaker as Scripted
from support.foreignbgp import Bird, Place
from support.gobgpd import BINARIES, PORT, Outsider, Speaker, wait_for

from kube_router.workers.router.graceful import FILE
from kube_router.workers.settings import Settings

RESTART, RESTARTED, FORWARDING, LONG_LIVED = 64, 0x80, 0x80, 71
"""Capability code, and its flags: of the speaker and of a family (RFC 4724, section 3); that of RFC 9494."""
KNOWS = b"\0\x3c" + b"\0\1\1\x80" + b"\0\2\1\x80"
GRACEFUL: dict[str, Any] = {"bgp_graceful_restart": True, "bgp_graceful_restart_time": 60.0}
BIRD, BIRD_ASN = "10.0.0.3", 65003
PEERS: dict[str, Any] = {
    "peer_router_ips": (OUTSIDE, BIRD),
    "peer_router_asns": (OUTSIDE_ASN, BIRD_ASN),
    "peer_router_ports": (PORT, PORT),
}


@pytest.fixture(params=BINARIES, ids=lambda generation: f"gobgpd{generation}")
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    with open_lab(request.param, tmp_path) as opened:
        yield opened


@dataclass
class Cluster:
    a: Speaker
    b: Speaker
    outside: Outsider
    bird: Bird
    witness: Witness

    def up(self) -> bool:
        return (
            learned(self.a, "b")()
            and learned(self.b, "a")()
            and self.outside.routes() == FROM["a"]
            and self.bird.held("a").keys() == FROM["a"].keys()
        )

    def wait(self, condition: Any, seconds: float, what: str) -> float:
        began = time.monotonic()
        wait_for(condition, seconds, what, self.a, self.b, self.outside)
        return time.monotonic() - began


@pytest.fixture
def cluster(lab: Lab) -> Cluster:
    bird = Bird(Place(lab.places["c"], lab.folder / "bird", BIRD, BIRD_ASN, {"a": "10.0.0.1"}, {}))
    lab.stack.callback(bird.close)
    outside = lab.outsider(outsider_state())
    a, b = lab.speaker("a", **GRACEFUL, **PEERS), lab.speaker("b", **GRACEFUL)
    for speaker in (a, b):
        assert speaker.see(A, B).failures == ()
    witness = Witness(b.daemon)
    lab.stack.callback(witness.close)
    made = Cluster(a, b, outside, bird, witness)
    made.wait(made.up, UP_SECONDS, "everybody has a's routes")
    return made


def test_a_gobgpd_that_goes_costs_its_helpers_no_route_and_the_others_seconds(cluster: Cluster) -> None:
    a, heard = cluster.a, Listener(cluster.bird)
    a.bgp.take_changed()

    # gobgpd is killed, and the worker with it.
    a.daemon.kill(pause=True)
    a.restart()
    a.daemon.resume()
    a.see(A, B)
    back = cluster.wait(lambda: BIRD in established(a), UP_SECONDS, "a peer that dials at once")
    assert back < 5, "it has all within five seconds"
    cluster.wait(lambda: cluster.outside.routes() == FROM["a"], 15, "a peer without graceful restart waits for nobody")
    cluster.wait(cluster.up, UP_SECONDS, "everybody has everything")
    assert heard.removed() == set() and heard.announced() == set(FROM["a"])
    assert cluster.witness.withdrawn == []
    assert set(cluster.witness.announced) >= set(FROM["a"]), "the witness sees what there is to see"
    # A new worker has learned the routes anew; what counts is that none was taken out.
    assert a.bgp.learned == FROM["b"]

    # Another router-id takes another gobgpd: it goes without a word.
    starts, heard = a.daemon.starts, Listener(cluster.bird)
    a.settings = Settings(**{**settings_of(a), "router_id": "10.0.0.111"})
    a.restart()
    a.see(A, B)
    cluster.wait(lambda: a.daemon.starts > starts and BIRD in established(a), UP_SECONDS, "gobgpd is replaced")
    cluster.wait(lambda: heard.announced() == set(FROM["a"]), 5, "and announces")
    assert heard.removed() == set()


def test_only_peers_that_know_of_restarts_are_told_and_nobody_waits_long(lab: Lab) -> None:
    """Two peers dial at once, over IPv4 with graceful restart, over IPv6 without; a third one is never there."""
    flags: dict[str, Any] = {
        "peer_router_ips": ("10.0.0.3", "2001:db8::3", "10.0.0.77"),
        "peer_router_asns": (65003, 65004, 65005),
    }
    flags |= {"peer_router_ports": (PORT, PORT, PORT), "bgp_long_lived_graceful_restart_time": 3600.0}
    a = lab.speaker("a", **GRACEFUL, **flags)
    a.see(A)

    def dial() -> tuple[Scripted, Scripted]:
        with lab.places["c"].enter():
            knowing = Scripted(65003, "10.0.0.3", capabilities=((RESTART, KNOWS),)).connect("10.0.0.1", PORT)
            plain = Scripted(65004, "10.0.0.33").connect("2001:db8::1", PORT)
        lab.stack.callback(knowing.close)
        lab.stack.callback(plain.close)
        began = time.monotonic()
        plain.wait(lambda: plain.routes.keys() == FROM["a"].keys(), 3, "routes for one that knows nothing")
        knowing.end_of_rib()
        knowing.wait(lambda: knowing.routes.keys() == FROM["a"].keys(), 3, "routes for one that knows")
        knowing.wait(lambda: {4, 6} <= {item.end_of_rib for item in knowing.updates}, 3, "End-of-RIB for both families")
        assert time.monotonic() - began < 3
        wait_for(lambda: len(established(a)) == 2, 5, "both are up", a)
        return knowing, plain

    for remembered in (False, True, False):
        knowing, plain = dial()
        assert knowing.opened is not None and plain.opened is not None
        (long_lived,) = knowing.opened.capability(LONG_LIVED)
        assert [long_lived[at : at + 7][-3:] for at in (0, 7)] == [(3600).to_bytes(3)] * 2
        (told,), (other,) = knowing.opened.capability(RESTART), plain.opened.capability(RESTART)
        assert bool(told[0] & RESTARTED) is remembered
        assert {told[5], told[9]} == {FORWARDING if remembered else 0}, "of either family"
        assert not other[0] & RESTARTED and {other[5], other[9]} == {0}
        a.daemon.kill(pause=True)
        ended(knowing)
        assert knowing.notification is None, "it goes without a word"
        if remembered:
            (Path(a.settings.state_dir) / FILE).unlink()
        a.restart()
        a.daemon.resume()
        a.see(A)
        wait_for(lambda: a.outcome.sessions != (), 10, "a fresh gobgpd is set up", a)


def ended(peer: Scripted) -> None:
    peer.wait(lambda: peer.closed, 5, "the session is gone")


def established(speaker: Speaker) -> set[str]:
    return {address for address, state in speaker.states().items() if state == "established"}


class Listener:
    """What BIRD says that it does with routes, from now on."""

    def __init__(self, bird: Bird) -> None:
        self._log = bird._program.log
        bird._ask("debug a { routes }")
        self._began = self._log.stat().st_size

    def _prefixes(self, *words: str) -> set[str]:
        lines = [
            line.split(" > ")[1].split() for line in self._log.read_text()[self._began :].splitlines() if " > " in line
        ]
        return {next(item for item in line if "/" in item) for line in lines if line[0] in words}

    def removed(self) -> set[str]:
        return self._prefixes("removed")

    def announced(self) -> set[str]:
        return self._prefixes("ignored", "added", "updated")
