"""What is said of sessions, when a peer over its limit is tried again, and what is remembered of graceful restarts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kube_router.workers.model import Family
from kube_router.workers.router import graceful
from kube_router.workers.router.bgpstate import GracefulRestart, Neighbor
from kube_router.workers.router.graceful import FILE, GracefulMemory
from kube_router.workers.router.sessions import Limits, PeerStatus, complaints

V4, V6 = Family.IPV4, Family.IPV6
PEER = "10.0.0.2"
NEIGHBOR = Neighbor(PEER, 0, "10.0.0.1", 179, (V4, V6), graceful_restart=GracefulRestart(90, 1), most_prefixes=7)


def up(*families: Family, graceful: bool = True) -> PeerStatus:
    return PeerStatus(PEER, established=True, families=families, graceful=graceful)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (up(V4, V6), []),
        (up(V4), [f"peer {PEER}: does not speak IPv6"]),
        (up(), [f"peer {PEER}: does not speak IPv4 or IPv6"]),
        (up(V4, V6, graceful=False), [f"peer {PEER}: does not offer graceful restart"]),
        (PeerStatus(PEER, established=False), []),
        (PeerStatus("10.0.0.9", established=True), []),
    ],
)
def test_a_session_that_carries_less_than_offered_is_told_in_a_line(status: PeerStatus, words: list[str]) -> None:
    lines = list(complaints([status], {PEER: NEIGHBOR}))
    assert len(lines) == len(words)
    assert all(line.startswith(word) for line, word in zip(lines, words, strict=True))


def over(*addresses: str) -> list[PeerStatus]:
    return [PeerStatus(address, established=False, limited=True) for address in addresses]


def test_a_peer_over_its_limit_waits_twice_as_long_each_time_and_at_most_a_quarter_of_an_hour() -> None:
    limits, now, waits = Limits(), 1000.0, []
    for _ in range(6):
        limits.see(over(PEER), now)
        again = limits.next_at()
        assert again is not None
        assert limits.due(again - 0.1) == ()
        waits.append((again - now) / 60)
        assert limits.due(again) == (PEER,)
        assert limits.due(again) == ()
        limits.see([up(V4)], again)
        now = again + 5
    assert waits == [1, 2, 4, 8, 15, 15]
    # It has kept to its limit for long: as on the first day.
    limits.see(over(PEER), now + 3600)
    assert limits.next_at() == now + 3660


def test_peers_over_their_limit_do_not_wait_for_each_other_and_are_told_with_the_limit() -> None:
    limits = Limits()
    limits.see(over(PEER), 0)
    limits.see(over(PEER, "10.0.0.3"), 30)
    (line,) = limits.lines({PEER: NEIGHBOR})
    assert line.startswith(f"peer {PEER}: sent more than 7 prefixes of a family (--bgp-max-prefixes)")
    assert limits.due(60) == (PEER,)
    assert list(limits.lines({PEER: NEIGHBOR})) == []
    assert limits.due(90) == ("10.0.0.3",)


def memory(folder: Path, *, enabled: bool = True) -> GracefulMemory:
    return GracefulMemory(folder, enabled=enabled, rewrite_seconds=30)


def test_the_memory_outlives_its_process_and_counts_until_peers_have_forgotten(tmp_path: Path) -> None:
    peers = frozenset({PEER, "2001:db8::2"})
    first = memory(tmp_path)
    first.see(peers, 1000)
    second = memory(tmp_path)
    assert second.returning(1050, 90) == peers
    assert second.returning(1121, 90) == frozenset()
    assert second.returning(999, 90) == frozenset(), "time has gone backwards: another machine"
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE]


def test_the_file_is_written_when_something_changes_and_now_and_then(tmp_path: Path) -> None:
    kept = memory(tmp_path)
    kept.see(frozenset({PEER}), 1000)
    before = (tmp_path / FILE).stat().st_mtime_ns, (tmp_path / FILE).stat().st_ino
    kept.see(frozenset({PEER}), 1029)
    assert ((tmp_path / FILE).stat().st_mtime_ns, (tmp_path / FILE).stat().st_ino) == before
    kept.see(frozenset({PEER}), 1030)
    assert json.loads((tmp_path / FILE).read_text())["seen"] == 1030
    kept.see(frozenset(), 1031)
    assert json.loads((tmp_path / FILE).read_text())["peers"] == []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"boot": "another", "seen": 1000, "peers": ["10.0.0.2"]}', '{"boot": 1}']
)
def test_a_file_that_does_not_hold_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    assert memory(tmp_path).returning(1001, 90) == frozenset()


def test_a_reboot_makes_the_memory_worthless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(tmp_path).see(frozenset({PEER}), 1000)
    (tmp_path / "boot").write_text("another boot\n")
    monkeypatch.setattr(graceful, "BOOT_ID", tmp_path / "boot")
    assert memory(tmp_path).returning(1001, 90) == frozenset()


def test_without_graceful_restart_nothing_is_read_or_written(tmp_path: Path) -> None:
    memory(tmp_path).see(frozenset({PEER}), 1000)
    off = memory(tmp_path, enabled=False)
    assert off.returning(1001, 90) == frozenset()
    off.see(frozenset(), 1002)
    assert json.loads((tmp_path / FILE).read_text())["peers"] == [PEER]


def test_a_folder_that_cannot_be_written_is_told_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    kept = memory(tmp_path / "file")
    kept.see(frozenset({PEER}), 1000)
    kept.see(frozenset(), 1001)
    assert len(caplog.records) == 1
    assert kept.returning(1002, 90) == frozenset()
