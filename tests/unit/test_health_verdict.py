"""When the agent is healthy: upstream's rule for components, the bound for silence, and what only degrades."""

from __future__ import annotations

from typing import Any

import pytest

from kube_router.ipc.messages import Component, Heartbeat, SourceState
from kube_router.workers.health.processes import ProcessState, ProcessTable
from kube_router.workers.health.verdict import GRACE, SILENCE, Board, healthz_body

UNIX = 1_000_000.0
"""The workers' clock stands this much above the monotonic one."""


def beat(worker: str, now: float, *, success: float | None = None, period: float = 60.0, **fields: Any) -> Heartbeat:
    """A heartbeat sent at monotonic ``now``, with one component whose last success was at monotonic ``success``."""
    last = None if success is None else UNIX + success
    component = Component(name=f"{worker}-sync", period=period, last_success=last)
    fields.setdefault("in_sync", True)
    fields.setdefault("components", (component,))
    return Heartbeat(worker=worker, pid=1, started=UNIX, sent=UNIX + now, **fields)


def table(**states: str) -> ProcessTable:
    return ProcessTable(programs={name: ProcessState(state=state) for name, state in states.items()})


def reasons(board: Board, now: float, processes: ProcessTable | None = None) -> tuple[str, ...]:
    return board.judge(processes or ProcessTable(), now).reasons


def test_healthy_before_anything_has_come() -> None:
    board = Board(0.0)
    assert board.judge(table(watcher="RUNNING", router="RUNNING"), SILENCE - 1).healthy
    assert healthz_body(board.judge(ProcessTable(), 1.0)) == (200, "OK\n")


def test_nothing_is_expected_before_the_cluster_is_known() -> None:
    """An unreachable API from the start: the probe must not kill an agent that waits."""
    board = Board(0.0)
    for now in range(0, 1000, 10):
        board.take(beat("router", now, in_sync=False), now)
        verdict = board.judge(ProcessTable(), now)
        assert verdict.healthy
    assert verdict.degraded == ("router: waits for the first complete state of the cluster",)


def test_a_component_is_overdue_after_period_first_time_and_grace() -> None:
    board = Board(0.0)
    board.take(beat("router", 10.0), 10.0)
    board.take(beat("router", 14.0, success=14.0), 14.0)
    board.take(beat("router", 16.0, success=14.0), 16.0)  # the first took 4 s from the first synced state
    limit = 14.0 + 60.0 + 4.0 + GRACE
    board.take(beat("router", limit, success=14.0), limit)
    assert reasons(board, limit) == ()
    assert reasons(board, limit + 0.5) == ("router: router-sync: last successful sync 66 s ago, due every 60 s",)
    board.take(beat("router", limit + 1, success=limit + 1), limit + 1)
    assert reasons(board, limit + 1) == ()


def test_a_component_that_never_succeeds_is_overdue_without_allowance() -> None:
    board = Board(0.0)
    board.take(beat("router", 5.0), 5.0)
    later = 5.0 + 60.0 + GRACE
    board.take(beat("router", later), later)
    assert reasons(board, later) == ()
    assert reasons(board, later + 0.1) == ("router: router-sync: no success for 62 s, due every 60 s",)


def test_the_last_snapshot_on_disk_counts_as_a_state_to_act_on() -> None:
    board = Board(0.0)
    board.take(beat("router", 5.0, in_sync=False, stale=True), 5.0)
    board.take(beat("router", 80.0, in_sync=False, stale=True), 80.0)
    assert len(reasons(board, 80.0)) == 1


def test_a_restart_does_not_turn_the_clock_back() -> None:
    """A worker that dies before each sync would else be healthy for ever."""
    board = Board(0.0)
    board.take(beat("router", 0.0, success=0.0), 0.0)
    for now in range(10, 70, 10):
        board.take(beat("router", now), now)  # a new process: nothing has succeeded yet
    assert len(reasons(board, 62.0)) == 1


def test_a_clock_that_is_set_back_or_forth_changes_nothing() -> None:
    board = Board(0.0)
    board.take(beat("router", 1.0, success=1.0), 1.0)
    for jump in (-5000.0, 5000.0):
        component = Component(name="router-sync", period=60.0, last_success=UNIX + jump + 2.0)
        message = Heartbeat(
            worker="router", pid=1, started=UNIX, sent=UNIX + jump + 3.0, in_sync=True, components=(component,)
        )
        board.take(message, 3.0)
        assert reasons(board, 3.0) == ()
        assert reasons(board, 22.0) == ()


@pytest.mark.parametrize("state", ["RUNNING", "FATAL", "STOPPED", "EXITED"])
def test_a_worker_that_says_nothing_is_unhealthy_after_a_bound(state: str) -> None:
    board = Board(0.0)
    board.take(beat("router", 50.0, success=50.0), 50.0)
    processes = table(router=state)
    assert reasons(board, 50.0 + SILENCE, processes) == ()
    assert reasons(board, 51.0 + SILENCE, processes) == (f"router: no heartbeat for 21 s ({state})",)
    board.take(beat("router", 80.0, success=80.0), 80.0)
    assert reasons(board, 80.0, processes) == ()


def test_a_worker_that_never_came_up_is_named_with_its_reason() -> None:
    board = Board(100.0)
    processes = ProcessTable(programs={"cni": ProcessState(state="FATAL", reason="exit status 1: no zmq")})
    assert reasons(board, 100.0 + SILENCE, processes) == ()
    assert reasons(board, 125.0, processes) == ("cni: no heartbeat for 25 s (FATAL: exit status 1: no zmq)",)


def test_silence_is_seen_without_the_table_of_processes() -> None:
    board = Board(0.0)
    board.take(beat("router", 1.0, success=1.0), 1.0)
    assert len(reasons(board, 30.0)) == 1


def test_gobgpd_has_no_heartbeat_and_must_run() -> None:
    board = Board(0.0)
    assert reasons(board, 5.0, table(gobgpd="RUNNING")) == ()
    down = ProcessTable(programs={"gobgpd": ProcessState(state="FATAL", reason="exit status 127")})
    assert reasons(board, 24.0, down) == ()
    assert reasons(board, 30.0, down) == ("gobgpd: not running for 25 s (FATAL: exit status 127)",)
    assert reasons(board, 31.0, table(gobgpd="STARTING")) == ()


def test_health_itself_is_not_waited_for() -> None:
    assert reasons(Board(0.0), 100.0, table(health="RUNNING")) == ()


def test_a_lost_api_server_degrades_and_never_fails() -> None:
    board = Board(0.0)
    source = SourceState(source="https://api:6443", stale=True, degraded=("connection refused",))
    for now in range(0, 500, 5):
        board.take(beat("watcher", now, components=(), source=source), now)
        board.take(beat("router", now, success=now, warnings=("egress: rule refused",)), now)
    verdict = board.judge(table(watcher="RUNNING", router="RUNNING"), 499.0)
    assert verdict.healthy
    status, body = healthz_body(verdict)
    assert status == 200
    assert body.splitlines() == [
        "OK",
        "https://api:6443: not confirmed: the state is that of the last snapshot on disk",
        "https://api:6443: connection refused",
        "router: egress: rule refused",
    ]


def test_the_watcher_knows_best_about_the_source() -> None:
    board = Board(0.0)
    board.take(beat("watcher", 1.0, source=SourceState(source="w", in_sync=True)), 1.0)
    board.take(beat("router", 2.0, source=SourceState(source="r", stale=True)), 2.0)
    assert board.source is not None
    assert board.source.source == "w"


def test_the_body_of_a_failure_begins_as_upstream_s() -> None:
    board = Board(0.0)
    board.take(beat("router", 1.0, success=1.0), 1.0)
    status, body = healthz_body(board.judge(ProcessTable(), 100.0))
    assert status == 500
    assert body.splitlines()[0] == "Unhealthy"
    assert "router" in body.splitlines()[1]
