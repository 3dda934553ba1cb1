"""Law 3 for the replica: whatever is lost, late, repeated or restarted, it ends at what the publisher has.

A model of a watcher with a source, a snapshot on disk and lossy queues runs against the pure `ReplicaState`. All along:
the changes handed out add up to what is shown, views handed out stay as they were, and nothing is taken away on the
word of a watcher that has not listed its source (law 1).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from kube_router.ipc.messages import (
    Beacon,
    Delta,
    Key,
    Kind,
    KindSnapshot,
    Namespace,
    Node,
    Pod,
    Projection,
    Snapshot,
    SnapshotRequest,
    SourceState,
)
from kube_router.ipc.replica import Cluster, ReplicaState

KINDS: tuple[Kind, ...] = ("nodes", "pods")
UNREAD: Kind = "namespaces"
NAMES = st.sampled_from(["a", "b", "c"])
Table = dict[Kind, dict[Key, Projection]]


def make(kind: Kind, name: str, version: int) -> Projection:
    if kind == "nodes":
        return Node(name=name, provider_id=str(version))
    if kind == "pods":
        return Pod(name=name, namespace="x", phase=str(version))
    return Namespace(name=name, labels={"version": str(version)})


def copy(table: Table) -> Table:
    return {kind: dict(objects) for kind, objects in table.items()}


@dataclass
class Watcher:
    """What a watcher knows and has published; ``wire`` is its delta socket."""

    epoch: str
    known: Table
    stale: bool
    listed: set[Kind] = field(default_factory=set)
    seqs: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys((*KINDS, UNREAD), 0))
    source: str = "api"

    @property
    def state(self) -> SourceState:
        unlisted = tuple(kind for kind in (*KINDS, UNREAD) if kind not in self.listed)
        in_sync = not unlisted
        return SourceState(source="api", in_sync=in_sync, stale=self.stale and not in_sync, unlisted=unlisted)

    def change(self, kind: Kind, truth: dict[Key, Projection]) -> Delta | None:
        """Take over ``truth``; the delta for it."""
        known = self.known[kind]
        put = tuple(item for key, item in truth.items() if known.get(key) != item)
        gone = tuple(known.keys() - truth.keys())
        if not put and not gone:
            return None
        self.known[kind] = dict(truth)
        self.seqs[kind] += 1
        return Delta(epoch=self.epoch, kind=kind, seq=self.seqs[kind], put=put, gone=gone)

    def snapshot(self, request: SnapshotRequest) -> Snapshot:
        parts = tuple(
            KindSnapshot(kind=kind, seq=self.seqs[kind], objects=tuple(self.known[kind].values()))
            for kind in request.kinds
        )
        return Snapshot(epoch=self.epoch, state=self.state, kinds=parts)

    def beacon(self) -> Beacon:
        return Beacon(epoch=self.epoch, seqs=dict(self.seqs), state=self.state)


class LossyReplica(RuleBasedStateMachine):
    disks = Bundle("disks")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.version = 0
        self.epochs = 0
        self.truth: Table = {kind: {} for kind in (*KINDS, UNREAD)}
        self.replica = ReplicaState("worker", KINDS)
        self.shown: Table = {kind: {} for kind in KINDS}
        self.wire: deque[Delta | Beacon] = deque()
        self.requests: deque[SnapshotRequest] = deque()
        self.answers: deque[Snapshot] = deque()
        self.views: deque[tuple[Cluster, Table]] = deque(maxlen=5)
        self.watcher = self.start({kind: {} for kind in self.truth}, stale=False)

    def start(self, known: Table, stale: bool) -> Watcher:
        self.epochs += 1
        self.watcher = Watcher(f"epoch {self.epochs}", known, stale)
        self.wire.append(self.watcher.beacon())
        return self.watcher

    @initialize(target=disks, running=st.booleans())
    def begin(self, running: bool) -> Table:
        """Either everything is about to start, or all runs well with two objects of each kind."""
        if running:
            for kind in self.truth:
                self.put(kind, "a")
                self.put(kind, "b")
                self.list_source(kind)
            self.converse()
        return copy(self.watcher.known)

    # the cluster and its watcher

    @rule(kind=st.sampled_from([*KINDS, UNREAD]), name=NAMES)
    def put(self, kind: Kind, name: str) -> None:
        self.version += 1
        item = make(kind, name, self.version)
        self.truth[kind][item.key] = item
        self.publish(kind)

    @rule(kind=st.sampled_from(KINDS), name=NAMES)
    def delete(self, kind: Kind, name: str) -> None:
        self.truth[kind].pop(make(kind, name, 0).key, None)
        self.publish(kind)

    @rule(kind=st.sampled_from(KINDS), name=NAMES, heard=st.booleans())
    def put_delete_put(self, kind: Kind, name: str, heard: bool) -> None:
        """Three deltas, of which the middle one is lost."""
        self.put(kind, name)
        lost = len(self.wire)
        self.delete(kind, name)
        while len(self.wire) > lost:
            self.wire.pop()
        self.put(kind, "c" if name != "c" else "a")
        if heard:
            self.hear(len(self.wire))

    def publish(self, kind: Kind) -> None:
        if kind in self.watcher.listed:
            delta = self.watcher.change(kind, self.truth[kind])
            if delta is not None:
                self.wire.append(delta)

    @rule(kind=st.sampled_from([*KINDS, UNREAD]))
    def list_source(self, kind: Kind) -> None:
        """The source answers a list: what differs is published, then the state."""
        self.watcher.listed.add(kind)
        self.publish(kind)
        self.wire.append(self.watcher.beacon())

    @rule(kind=st.sampled_from([*KINDS, UNREAD]))
    def doubt(self, kind: Kind) -> None:
        """The watcher no longer trusts its list of a kind."""
        self.watcher.listed.discard(kind)
        self.wire.append(self.watcher.beacon())

    @rule()
    def tell(self) -> None:
        self.wire.append(self.watcher.beacon())

    @rule(target=disks)
    def save(self) -> Table:
        return copy(self.watcher.known)

    @rule(disk=disks, lose_wire=st.booleans(), lose_answers=st.booleans())
    def restart_from_disk(self, disk: Table, lose_wire: bool, lose_answers: bool) -> None:
        self.crash(lose_wire, lose_answers)
        self.start(copy(disk), stale=True)

    @rule(lose_wire=st.booleans(), lose_answers=st.booleans())
    def restart_empty(self, lose_wire: bool, lose_answers: bool) -> None:
        self.crash(lose_wire, lose_answers)
        self.start({kind: {} for kind in self.truth}, stale=False)

    def crash(self, lose_wire: bool, lose_answers: bool) -> None:
        if lose_wire:
            self.wire.clear()
        if lose_answers:
            self.answers.clear()

    # the wire

    @precondition(lambda self: self.wire)
    @rule(at=st.integers(0, 3))
    def lose(self, at: int) -> None:
        del self.wire[min(at, len(self.wire) - 1)]

    @precondition(lambda self: self.wire)
    @rule(count=st.integers(1, 5))
    def hear(self, count: int) -> None:
        for _ in range(min(count, len(self.wire))):
            message = self.wire.popleft()
            if isinstance(message, Delta):
                self.replica.on_delta(message)
            else:
                self.replica.on_beacon(message)
            self.take()

    @rule(seconds=st.sampled_from([0.0, 0.3, 5.0]))
    def ask(self, seconds: float) -> None:
        self.now += seconds
        request = self.replica.request_due(self.now)
        if request is not None:
            self.requests.append(request)

    @precondition(lambda self: self.requests)
    @rule(times=st.integers(0, 2))
    def answer(self, times: int) -> None:
        """The watcher gets a request: answers it, twice, or never."""
        request = self.requests.popleft()
        self.answers.extend([self.watcher.snapshot(request)] * times)

    @precondition(lambda self: self.answers)
    @rule()
    def get_answer(self) -> None:
        assert self.replica.on_snapshot(self.answers.popleft()) is None
        self.take()

    @rule()
    def converse(self) -> None:
        """All that is under way arrives; a request that is due is answered."""
        self.hear(len(self.wire))
        self.ask(5.0)
        while self.requests:
            self.answer(1)
        while self.answers:
            self.get_answer()

    def take(self) -> None:
        changes = self.replica.take_changes()
        listed = not set(self.replica.cluster.state.unlisted) & set(KINDS)
        for kind, by_key in changes.items():
            assert by_key
            for key, (old, new) in by_key.items():
                assert old != new
                assert self.shown[kind].get(key) == old
                if new is None:
                    assert listed, "a deletion on the word of a watcher that has not listed its source"
                    del self.shown[kind][key]
                else:
                    self.shown[kind][key] = new

    @rule()
    def keep_a_view(self) -> None:
        view = self.replica.cluster
        self.views.append((view, {kind: dict(view.objects(kind)) for kind in KINDS}))

    @invariant()
    def changes_add_up(self) -> None:
        cluster = self.replica.cluster
        assert {kind: dict(cluster.objects(kind)) for kind in KINDS} == self.shown

    @invariant()
    def kept_views_stay(self) -> None:
        for view, table in self.views:
            assert {kind: dict(view.objects(kind)) for kind in KINDS} == table

    @rule()
    def settle(self) -> None:
        """The wire holds, every kind that this worker reads is listed: the replica must come to the truth."""
        for kind in KINDS:
            self.list_source(kind)
        for _ in range(6):
            self.tell()
            self.converse()
        assert self.shown == {kind: self.truth[kind] for kind in KINDS}
        assert self.replica.cluster.state.in_sync
        assert not self.replica.cluster.state.stale
        assert self.replica.usable

    def teardown(self) -> None:
        self.settle()


LossyReplica.TestCase.settings = settings(max_examples=200, stateful_step_count=50)
TestLossyReplica = LossyReplica.TestCase
