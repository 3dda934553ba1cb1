"""``kube-routerctl status router``: the text for people, and what it says when parts cannot be asked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kube_router.supervisor import ctl, routerstatus

SESSION = {
    "address": "10.0.0.2",
    "asn": 64512,
    "type": "internal",
    "state": "established",
    "received": 4,
    "accepted": 4,
    "advertised": 2,
    "since": 100.0,
    "last_error": "the connection was lost",
    "families": ["IPv4", "IPv6"],
    "flaps": 1,
    "graceful_restart": "ready",
}
DOWN = {**SESSION, "address": "fd00::3", "state": "active", "since": None, "advertised": None, "graceful_restart": ""}
DIRECT = {
    "prefix": "10.244.2.0/24",
    "next_hop": "10.0.0.2",
    "injection": "direct",
    "route": "via 10.0.0.2 proto 17",
    "reason": "",
}
REFUSED = {
    "prefix": "0.0.0.0/0",
    "next_hop": "10.0.0.2",
    "injection": "none",
    "route": None,
    "reason": "a default route",
}
FOUND: dict[str, Any] = {
    "node": "n1",
    "healthy": True,
    "time": 300.0,
    "troubles": ["node n1: something"],
    "sessions": [SESSION, DOWN],
    "daemon": "gobgpd 3",
    "speaker": {"asn": 64512, "router_id": "10.0.0.1", "listen_port": 179, "listen_addresses": ["10.0.0.1"]},
    "announced": [
        {"prefix": "10.244.1.0/24", "next_hop": "10.0.0.1", "kind": "pods"},
        {"prefix": "10.96.0.1/32", "next_hop": "10.0.0.1", "kind": "service"},
    ],
    "learned": [DIRECT, REFUSED],
    "changes": 2,
}
TEXT = """\
n1: router healthy
gobgpd 3: AS 64512, router-id 10.0.0.1, port 179 on 10.0.0.1
  ! node n1: something

PEER      AS     KIND      STATE        SINCE  DROPS  FAMILIES   IN  ACCEPTED  OUT  RESTART
10.0.0.2  64512  internal  established  3m20s  1      IPv4+IPv6  4   4         2    ready
fd00::3   64512  internal  active       -      1      IPv4+IPv6  4   4         -    -

Last errors:
  10.0.0.2: the connection was lost
  fd00::3: the connection was lost

Announced: 10.244.1.0/24 via 10.0.0.1
           1 service addresses
Learned: 2 routes: 1 direct, 1 refused
  0.0.0.0/0: a default route
2 changes are due: kube-routerctl plan router shows them"""


def test_text() -> None:
    assert routerstatus.render(FOUND) == TEXT


def test_text_of_next_to_nothing() -> None:
    empty = {**FOUND, "sessions": [], "daemon": None, "speaker": None, "announced": [], "learned": [], "changes": None}
    text = routerstatus.render({**empty, "healthy": False, "troubles": ["gobgpd: /x does not exist"]})
    assert text == (
        "n1: router NOT HEALTHY\n  ! gobgpd: /x does not exist\n\nAnnounced: no pod CIDR\nLearned: 0 routes"
    )


def test_json_is_all_of_it_and_the_exit_code_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(routerstatus, "collect", lambda run_dir, timeout: FOUND)
    assert ctl.main(["status", "router", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == FOUND
    monkeypatch.setattr(routerstatus, "collect", lambda run_dir, timeout: {**FOUND, "healthy": False})
    assert ctl.main(["status", "router"]) == 1


def test_without_an_agent(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.main(["--run-dir", str(tmp_path), "status", "router"]) == 2
    assert "no agent runs" in capsys.readouterr().err


def test_a_worker_that_has_no_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ctl.main(["status", "cni"])
    assert "invalid choice: 'cni'" in capsys.readouterr().err
