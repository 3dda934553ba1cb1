"""The worker loop with a clock that the test turns: when it reconciles, with what, and what it says about it."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from kube_router.ipc.channels import HeartbeatSender, NoticeSender, Pollable
from kube_router.ipc.messages import (
    Beacon,
    Component,
    Delta,
    Heartbeat,
    Kind,
    KindSnapshot,
    Node,
    Notice,
    Session,
    Snapshot,
    SourceState,
)
from kube_router.ipc.replica import Changes, Cluster, Replica, ReplicaState
from kube_router.workers.model import Failure, Outcome
from kube_router.workers.runtime import (
    NOTICES_REMEMBERED,
    WARNING_LENGTH,
    WARNINGS_SHOWN,
    Loop,
    Pace,
    Schedule,
    Trigger,
)

INFINITY = float("inf")
PACE = Pace(min_interval=0.01, retry_first=1.0, retry_most=60.0, beat=1.0)
IN_SYNC = SourceState(source="test", in_sync=True)
STALE = SourceState(source="test", stale=True)


# the schedule alone


def schedule(period: float = 300.0, jitter: float = 0.5) -> Schedule:
    """A jitter of 0.5 multiplies by one."""
    return Schedule(PACE, period, lambda: jitter)


def test_nothing_is_planned_at_first() -> None:
    assert schedule().wait(0.0) == INFINITY


def test_a_burst_is_due_one_interval_after_its_first_change() -> None:
    plan = schedule()
    for step in range(10):
        plan.dirty(100.0 + step / 1000)
    assert plan.wait(100.0) == pytest.approx(0.01)
    assert plan.due(100.009) == (False, False, False)
    assert plan.due(100.0101) == (True, False, False)


def test_the_first_change_after_a_quiet_time_need_not_wait() -> None:
    plan = Schedule(Pace(min_interval=0.01, at_once=True), 300.0, lambda: 0.5)
    plan.dirty(100.0)
    assert plan.due(100.0) == (True, False, False)
    plan.done(100.002, failed=False, again_after=None)
    plan.dirty(100.003)
    plan.dirty(100.009)
    assert plan.due(100.0119) == (False, False, False)
    assert plan.due(100.0121) == (True, False, False), "what followed closely is gathered"
    plan.done(100.02, failed=False, again_after=None)
    plan.dirty(101.0)
    assert plan.wait(101.0) == 0.0


def test_a_burst_is_over_when_it_was_reconciled() -> None:
    plan = schedule()
    plan.dirty(100.0)
    plan.done(100.02, failed=False, again_after=None)
    assert plan.due(100.5) == (False, False, False)
    plan.dirty(101.0)
    assert plan.wait(101.0) == pytest.approx(0.01)


def test_failures_are_retried_after_one_two_four_seconds_up_to_the_most() -> None:
    plan = schedule(period=INFINITY)
    now, delays = 0.0, []
    for _ in range(9):
        plan.done(now, failed=True, again_after=None)
        delays.append(plan.wait(now))
        now += delays[-1]
        assert plan.due(now) == (False, True, False)
    assert delays == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60, 60])


@pytest.mark.parametrize(("jitter", "delay"), [(0.0, 0.75), (0.999999, 1.25)])
def test_retries_are_spread(jitter: float, delay: float) -> None:
    plan = schedule(jitter=jitter)
    plan.done(0.0, failed=True, again_after=None)
    assert plan.wait(0.0) == pytest.approx(delay, abs=1e-5)


def test_a_success_forgets_the_failures() -> None:
    plan = schedule()
    for now in (0.0, 5.0, 10.0):
        plan.done(now, failed=True, again_after=None)
    plan.done(11.0, failed=False, again_after=None)
    assert plan.wait(11.0) == 300.0
    plan.done(12.0, failed=True, again_after=None)
    assert plan.wait(12.0) == pytest.approx(1.0)


def test_a_stream_of_failing_changes_neither_delays_nor_slows_the_retry() -> None:
    plan = schedule()
    for step in range(50):
        plan.done(step / 100, failed=True, again_after=None)
    assert plan.wait(0.5) == pytest.approx(0.5)
    plan.done(1.0, failed=True, again_after=None)
    assert plan.wait(1.0) == pytest.approx(2.0)


def test_retries_go_on_at_the_most_for_ever() -> None:
    plan = schedule(period=INFINITY)
    now = 0.0
    for _ in range(2000):
        plan.done(now, failed=True, again_after=None)
        now += plan.wait(now)
    assert plan.wait(now - 60.0) == pytest.approx(60.0)


def test_a_success_may_ask_to_come_back() -> None:
    plan = schedule()
    plan.done(0.0, failed=False, again_after=0.2)
    assert plan.due(0.2) == (False, True, False)


def test_the_period_counts_from_the_last_reconciliation() -> None:
    plan = schedule(period=300.0)
    plan.done(0.0, failed=False, again_after=None)
    plan.done(200.0, failed=False, again_after=None)
    assert plan.due(300.0) == (False, False, False)
    assert plan.due(500.0) == (False, False, True)


def test_what_is_overdue_is_not_waited_for() -> None:
    plan = schedule()
    plan.dirty(0.0)
    assert plan.wait(10.0) == 0.0


# the loop


@dataclass
class Clock:
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_700_000_000.0 + self.now


class FedReplica:
    """The real replica logic; the test is its wire. Asks for nothing."""

    sockets = ()

    def __init__(self) -> None:
        self.core = ReplicaState("w", ("nodes",))
        self.wire: deque[Snapshot | Delta | Beacon] = deque()
        self.dropped = 0

    @property
    def cluster(self) -> Cluster:
        return self.core.cluster

    @property
    def usable(self) -> bool:
        return self.core.usable

    def wait(self, now: float) -> float:
        return INFINITY

    def receive(self, now: float) -> Changes:
        while self.wire:
            message = self.wire.popleft()
            if isinstance(message, Snapshot):
                self.core.on_snapshot(message)
            elif isinstance(message, Delta):
                self.core.on_delta(message)
            else:
                self.core.on_beacon(message)
        return self.core.take_changes()


class Outbox:
    """Stands for a sender: keeps what is sent, or refuses it."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.full = False

    def send(self, message: object) -> bool:
        if not self.full:
            self.sent.append(message)
        return not self.full


@dataclass
class Worker:
    """A controller that does what the test tells it to."""

    clock: Clock
    name: str = "worker"
    kinds: tuple[Kind, ...] = ("nodes",)
    period: float = 300.0
    outcomes: deque[Outcome | Exception] = field(default_factory=deque)
    takes_seconds: float = 0.0
    seen: list[tuple[float, Trigger, dict[str, Node]]] = field(default_factory=list)
    waking: dict[int, Callable[[], bool]] = field(default_factory=dict)

    def reconcile(self, cluster: Cluster, trigger: Trigger) -> Outcome:
        self.seen.append((self.clock.now, trigger, dict(cluster.nodes)))
        self.clock.now += self.takes_seconds
        outcome = self.outcomes.popleft() if self.outcomes else Outcome()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        return self.waking

    def close(self) -> None:
        pass


class Bench:
    """A loop whose waits pass at once; ``ready`` is what the next wait finds readable."""

    def __init__(self, pace: Pace = PACE) -> None:
        self.clock = Clock()
        self.worker = Worker(self.clock)
        self.replica = FedReplica()
        self.heartbeats, self.notices = Outbox(), Outbox()
        self.ready: set[Pollable] = set()
        self.waits: list[float] = []
        self.horizon = INFINITY
        self.seq = 0
        self.loop = Loop(
            self.worker,
            cast(Replica, self.replica),
            cast(HeartbeatSender, self.heartbeats),
            cast(NoticeSender, self.notices),
            clock=self.clock,
            pace=pace,
            jitter=lambda: 0.5,
            wait=self.wait,
        )

    def wait(self, items: Iterable[Pollable], timeout: float) -> set[Pollable]:
        ready = set(items) & self.ready
        self.ready -= ready
        self.waits.append(timeout)
        if not ready and not self.replica.wire:
            self.clock.now = min(self.clock.now + timeout, self.horizon)
        return ready

    def snapshot(self, *nodes: Node, state: SourceState = IN_SYNC) -> None:
        part = KindSnapshot(kind="nodes", seq=0, objects=nodes)
        self.replica.wire.append(Snapshot(epoch="1", state=state, kinds=(part,)))

    def put(self, *nodes: Node) -> None:
        self.seq += 1
        self.replica.wire.append(Delta(epoch="1", kind="nodes", seq=self.seq, put=nodes))

    def beacon(self, state: SourceState) -> None:
        self.replica.wire.append(Beacon(epoch="1", seqs={"nodes": self.seq}, state=state))

    def turn(self, seconds: float) -> None:
        """Turn until that much time has passed."""
        self.horizon = self.clock.now + seconds
        while self.clock.now < self.horizon:
            self.loop.step()
        self.horizon = INFINITY

    def started(self, *nodes: Node) -> Bench:
        self.snapshot(*nodes)
        self.loop.step()
        assert len(self.worker.seen) == 1
        return self

    @property
    def beat(self) -> Heartbeat:
        beat = self.heartbeats.sent[-1]
        assert isinstance(beat, Heartbeat)
        return beat


def node(name: str, version: int = 0) -> Node:
    return Node(name=name, provider_id=str(version))


FAILED = Outcome(failures=(Failure("route", "route 10.0.0.0/24: refused"),))


def test_law_1_nothing_is_reconciled_before_the_cluster_is_usable() -> None:
    bench = Bench()
    bench.turn(5.0)
    bench.snapshot(node("a"), state=SourceState(source="test"))
    bench.turn(5.0)
    assert bench.worker.seen == []
    assert len(bench.heartbeats.sent) >= 10
    assert not bench.beat.in_sync
    assert bench.beat.last_sync is None


@pytest.mark.parametrize("state", [IN_SYNC, STALE])
def test_the_first_usable_snapshot_is_reconciled_at_once(state: SourceState) -> None:
    bench = Bench()
    bench.turn(5.0)
    at = bench.clock.now
    bench.snapshot(node("a"), state=state)
    bench.loop.step()
    [(now, trigger, nodes)] = bench.worker.seen
    assert now == at
    assert trigger.start
    assert trigger.observe
    assert trigger.changes == {"nodes": {"a": (None, node("a"))}}
    assert nodes == {"a": node("a")}


def test_the_trigger_tells_when_the_first_of_its_changes_came_in() -> None:
    bench = Bench().started(node("a"))
    at = bench.clock.now
    bench.put(node("a", 1))
    bench.loop.step()
    bench.clock.now += 0.004
    bench.put(node("b"))
    bench.turn(0.1)
    assert [trigger.seen for _, trigger, _ in bench.worker.seen[1:]] == [at]
    bench.clock.now = later = at + 5.0
    bench.put(node("b", 1))
    bench.turn(0.1)
    assert bench.worker.seen[-1][1].seen == later


def test_changes_that_wait_for_a_retry_keep_their_time_and_a_period_has_none() -> None:
    bench = Bench().started(node("a"))
    at = bench.clock.now
    bench.worker.outcomes.append(FAILED)
    bench.put(node("a", 1))
    bench.turn(400.0)
    assert [(trigger.retry, trigger.period, trigger.seen) for _, trigger, _ in bench.worker.seen[1:4]] == [
        (False, False, at),
        (True, False, at),
        (False, True, None),
    ]


def test_before_the_cluster_is_usable_the_loop_does_not_spin() -> None:
    bench = Bench()
    bench.snapshot(node("a"), state=SourceState(source="test"))
    bench.turn(10.0)
    assert len(bench.waits) < 25


def test_a_steady_stream_of_changes_delays_nothing_beyond_the_bound() -> None:
    bench = Bench().started()
    for version in range(100):
        bench.put(node("a", version))
        bench.loop.step()
        bench.clock.now += 0.001
    times = [now for now, _, _ in bench.worker.seen[1:]]
    assert 8 <= len(times) <= 10
    assert all(later - earlier < 0.0121 for earlier, later in itertools.pairwise(times))


def test_a_change_is_reconciled_with_what_changed_and_no_more() -> None:
    bench = Bench().started(node("a"), node("b"))
    bench.put(node("b", 1))
    bench.put(node("c"))
    bench.turn(0.02)
    _, trigger, nodes = bench.worker.seen[-1]
    changes = {"nodes": {"b": (node("b"), node("b", 1)), "c": (None, node("c"))}}
    assert trigger == Trigger(changes=changes, seen=trigger.seen)
    assert not trigger.observe
    assert sorted(nodes) == ["a", "b", "c"]


def test_an_unchanged_cluster_is_left_alone_until_the_period() -> None:
    bench = Bench().started(node("a"))
    bench.turn(299.0)
    assert len(bench.worker.seen) == 1
    bench.turn(2.0)
    now, trigger, _ = bench.worker.seen[-1]
    assert now == pytest.approx(1300.0)
    assert trigger == Trigger(period=True)
    assert trigger.observe


def test_a_failure_is_retried_with_observation() -> None:
    bench = Bench()
    bench.worker.outcomes.extend([FAILED, FAILED])
    bench.snapshot(node("a"))
    bench.turn(10.0)
    assert [now - 1000.0 for now, _, _ in bench.worker.seen] == pytest.approx([0.0, 1.0, 3.0])
    assert [trigger.retry for _, trigger, _ in bench.worker.seen] == [False, True, True]
    assert bench.worker.seen[1][1].observe


def test_changes_add_up_over_failures() -> None:
    bench = Bench().started(node("a"), node("b"))
    bench.worker.outcomes.extend([FAILED, FAILED])
    bench.put(node("a", 1), node("b", 1))
    bench.turn(0.02)
    bench.put(node("a", 2), node("c"))
    bench.turn(0.02)
    bench.put(node("b"))
    bench.turn(0.02)
    _, trigger, _ = bench.worker.seen[-1]
    assert trigger.changes == {
        "nodes": {"a": (node("a"), node("a", 2)), "b": (node("b"), node("b")), "c": (None, node("c"))}
    }
    bench.put(node("c", 1))
    bench.turn(0.02)
    assert bench.worker.seen[-1][1].changes == {"nodes": {"c": (node("c"), node("c", 1))}}


def test_an_exception_is_a_failure_and_the_loop_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.worker.outcomes.append(RuntimeError("kaput"))
    bench.snapshot(node("a"))
    bench.loop.step()
    assert bench.beat.errors == {"internal": 1}
    assert bench.beat.warnings == ("internal: RuntimeError: kaput",)
    assert bench.beat.last_sync is None
    assert "Traceback" in caplog.text
    bench.turn(2.0)
    assert bench.beat.last_sync is not None
    assert bench.beat.warnings == ()
    assert bench.beat.errors == {"internal": 1}


def test_an_interrupt_is_not_swallowed() -> None:
    bench = Bench()
    bench.worker.outcomes.append(cast(Exception, KeyboardInterrupt()))
    bench.worker.reconcile = lambda cluster, trigger: (_ for _ in ()).throw(KeyboardInterrupt())  # type: ignore[method-assign]
    bench.snapshot()
    with pytest.raises(KeyboardInterrupt):
        bench.loop.step()


def test_coming_in_sync_is_reconciled_although_no_object_changed() -> None:
    bench = Bench()
    bench.snapshot(node("a"), state=STALE)
    bench.loop.step()
    bench.turn(2.0)
    assert len(bench.worker.seen) == 1
    bench.beacon(IN_SYNC)
    bench.turn(0.02)
    _, trigger, _ = bench.worker.seen[-1]
    assert trigger == Trigger(confirmed=True)
    assert trigger.observe
    bench.put(node("b"))
    bench.turn(0.02)
    assert not bench.worker.seen[-1][1].confirmed


def test_a_waker_that_saw_a_foreign_change_wakes() -> None:
    bench = Bench().started(node("a"))
    drained: list[bool] = []
    answers = iter([False, True])

    def drain() -> bool:
        drained.append(next(answers))
        return drained[-1]

    bench.worker.waking = {7: drain}
    bench.ready = {7}
    bench.turn(1.0)
    assert drained == [False]
    assert len(bench.worker.seen) == 1
    bench.ready = {7}
    bench.turn(0.02)
    assert drained == [False, True]
    assert bench.worker.seen[-1][1] == Trigger(woken=True)


def test_a_waking_is_remembered_over_a_failure() -> None:
    bench = Bench().started(node("a"))
    bench.worker.waking = {7: lambda: True}
    bench.worker.outcomes.append(FAILED)
    bench.ready = {7}
    bench.turn(0.02)
    bench.put(node("b"))
    bench.turn(0.02)
    assert [trigger.woken for _, trigger, _ in bench.worker.seen] == [False, True, True]


def test_a_controller_may_ask_to_come_back() -> None:
    bench = Bench()
    bench.worker.outcomes.append(Outcome(retry_after=0.3))
    bench.snapshot()
    bench.turn(5.0)
    assert [now - 1000.0 for now, _, _ in bench.worker.seen] == pytest.approx([0.0, 0.3])
    assert bench.beat.errors == {}


# what it says


def test_heartbeats_come_every_second_and_after_each_reconciliation() -> None:
    bench = Bench()
    bench.turn(3.5)
    assert [beat.sent - bench.clock.time() + bench.clock.now - 1000.0 for beat in bench.heartbeats.sent] == (
        pytest.approx([0.0, 1.0, 2.0, 3.0])
    )
    before = len(bench.heartbeats.sent)
    bench.snapshot()
    bench.loop.step()
    assert len(bench.heartbeats.sent) == before + 1


def test_a_heartbeat_tells_how_the_last_reconciliation_went() -> None:
    bench = Bench()
    bench.worker.takes_seconds = 0.25
    session = Session(address="10.0.0.1", asn=64512, type="internal", state="established")
    component = Component(name="NetworkRoutesController", period=300.0)
    bench.worker.outcomes.append(
        Outcome(
            writes=3,
            warnings=("node a: no pod CIDR",),
            counts={"controller_bgp_peers": 2.0},
            counters={"advertisements": 4.0},
            observations={"sync_seconds": (0.1,)},
            components=(component,),
            sessions=(session,),
        )
    )
    bench.snapshot(node("a"))
    bench.loop.step()
    beat = bench.beat
    assert (beat.worker, beat.pid) == ("worker", os.getpid())
    assert beat.started == 1_700_001_000.0
    assert beat.last_sync == beat.sent == 1_700_001_000.25
    assert (beat.sync_seconds, beat.syncs, beat.writes, beat.pending) == (0.25, 1, 3, 0)
    assert (beat.in_sync, beat.stale, beat.source) == (True, False, IN_SYNC)
    assert beat.warnings == ("node a: no pod CIDR",)
    assert (beat.counts, beat.counters) == ({"controller_bgp_peers": 2.0}, {"advertisements": 4.0})
    assert (beat.components, beat.sessions) == ((component,), (session,))
    assert beat.rss > 1 << 20
    assert beat.privileges.startswith(f"uid={os.geteuid()} caps=")


def test_counters_and_errors_add_up_gauges_do_not() -> None:
    bench = Bench()
    for _ in range(2):
        bench.worker.outcomes.append(
            Outcome(
                writes=1,
                failures=(Failure("route", "a"), Failure("route", "b"), Failure("peer", "c")),
                counts={"gauge": 5.0},
                counters={"counter": 2.0},
            )
        )
    bench.snapshot()
    bench.turn(1.5)
    assert bench.beat.errors == {"route": 4, "peer": 2}
    assert bench.beat.counts == {"gauge": 5.0}
    assert bench.beat.counters == {"counter": 4.0}
    assert (bench.beat.writes, bench.beat.syncs, bench.beat.pending) == (2, 2, 3)
    assert bench.beat.last_sync is None


def test_observations_are_sent_once_and_kept_until_they_can_be() -> None:
    bench = Bench()
    bench.heartbeats.full = True
    bench.worker.outcomes.append(Outcome(observations={"seconds": (0.1,)}, retry_after=0.5))
    bench.worker.outcomes.append(Outcome(observations={"seconds": (0.2, 0.3)}))
    bench.snapshot()
    bench.turn(0.6)
    bench.heartbeats.full = False
    bench.turn(3.0)
    assert [beat.observations for beat in bench.heartbeats.sent[:2]] == [{"seconds": (0.1, 0.2, 0.3)}, {}]


def test_observations_that_nobody_takes_are_bounded() -> None:
    bench = Bench()
    bench.heartbeats.full = True
    for number in range(3):
        bench.worker.outcomes.append(Outcome(observations={"s": tuple([float(number)] * 600)}, retry_after=0.1))
    bench.snapshot()
    bench.turn(0.5)
    assert len(bench.loop.beat.observations["s"]) == 1000
    assert bench.loop.beat.observations["s"][-1] == 2.0


def test_a_notice_is_sent_once() -> None:
    bench = Bench()
    notice = Notice(worker="worker", kind="Node", name="a", reason="R", text="t")
    other = Notice(worker="worker", kind="Node", name="a", reason="R", text="u")
    for notices in ((notice,), (notice, other), (notice,)):
        bench.worker.outcomes.append(Outcome(notices=notices, retry_after=0.1))
    bench.snapshot()
    bench.turn(2.0)
    assert bench.notices.sent == [notice, other]


def test_a_notice_that_could_not_be_sent_is_sent_later() -> None:
    bench = Bench()
    notice = Notice(worker="worker", kind="Node", name="a", reason="R", text="t")
    bench.worker.outcomes.extend([Outcome(notices=(notice,), retry_after=0.1)] * 2)
    bench.notices.full = True
    bench.snapshot()
    bench.loop.step()
    bench.notices.full = False
    bench.turn(1.0)
    assert bench.notices.sent == [notice]


def test_remembered_notices_are_bounded() -> None:
    bench = Bench()
    many = [Notice(worker="w", kind="Node", name="a", reason="R", text=str(n)) for n in range(NOTICES_REMEMBERED + 5)]
    bench.worker.outcomes.append(Outcome(notices=tuple(many)))
    bench.snapshot()
    bench.loop.step()
    assert len(bench.notices.sent) == len(many)
    assert len(bench.loop._told) == NOTICES_REMEMBERED


def test_a_lasting_trouble_is_logged_once_and_again_when_it_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.worker.outcomes.extend([FAILED, FAILED, Outcome(retry_after=0.1), FAILED])
    bench.snapshot()
    bench.turn(10.0)
    lines = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert lines == ["route: route 10.0.0.0/24: refused"] * 2


def test_a_flood_of_failures_fits_into_a_heartbeat() -> None:
    bench = Bench()
    bench.worker.outcomes.append(Outcome(failures=tuple(Failure("p", f"{n} " + "x" * 5000) for n in range(5000))))
    bench.snapshot()
    bench.loop.step()
    assert len(bench.beat.warnings) == WARNINGS_SHOWN + 1
    assert bench.beat.warnings[-1] == f"and {5000 - WARNINGS_SHOWN} more, see the log"
    assert max(map(len, bench.beat.warnings)) == WARNING_LENGTH
    assert (bench.beat.pending, bench.beat.errors) == (5000, {"p": 5000})


def test_stopping_ends_the_run_without_another_reconciliation() -> None:
    bench = Bench().started(node("a"))
    bench.put(node("b"))

    def stop(items: Iterable[Pollable], timeout: float) -> set[Pollable]:
        bench.loop.stopping = True
        return set()

    bench.loop._wait = stop
    bench.loop.run()
    assert len(bench.worker.seen) == 1
