"""Every socket over a real ipc socket in one process: what passes, what is dropped, what is bounded, who may enter."""

from __future__ import annotations

import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgpack  # type: ignore[import-untyped]
import pytest
import zmq

from kube_router.ipc import channels, codec
from kube_router.ipc.channels import (
    DELTAS,
    NOTICES,
    SNAPSHOTS,
    SOCKET_GROUP,
    STATUS,
    Channel,
    HeartbeatReceiver,
    HeartbeatSender,
    NoticeReceiver,
    NoticeSender,
    Poller,
    Publisher,
    StatusServer,
    request_status,
)
from kube_router.ipc.codec import BadMessage, encode
from kube_router.ipc.messages import (
    PROTOCOL,
    Heartbeat,
    Key,
    Kind,
    Namespace,
    Node,
    Notice,
    Pod,
    Projection,
    Service,
    ServicePort,
    SnapshotRequest,
    SourceState,
    StatusReply,
    StatusRequest,
)
from kube_router.ipc.replica import Changes, Replica

IN_SYNC = SourceState(source="test", in_sync=True)
HEARTBEAT = Heartbeat(worker="router", pid=7, started=1.0, sent=2.0)
NOTICE = Notice(worker="router", kind="Node", name="a", reason="R", text="t")
REPLY = StatusReply(healthy=True, reasons=(), heartbeats=(HEARTBEAT,))
GARBAGE = [b"", b"\xc1", b"\x91" * 10_000, b"\xdd\xff\xff\xff\xff", b"x" * 1000]


T = TypeVar("T")


def eventually(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Wait for something that another thread of ZeroMQ is about to do."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def collect(receive: Callable[[], list[T]], count: int = 1) -> list[T]:
    """The first ``count`` messages, or a few more."""
    got: list[T] = []

    def enough() -> bool:
        got.extend(receive())
        return len(got) >= count

    eventually(enough)
    return got


@dataclass
class Table:
    """A store for a `Publisher`."""

    tables: dict[Kind, dict[Key, Projection]] = field(default_factory=dict)
    state: SourceState = IN_SYNC

    def objects(self, kind: Kind) -> Mapping[Key, Projection]:
        return self.tables[kind]

    def put(self, kind: Kind, *items: Projection) -> None:
        self.tables.setdefault(kind, {}).update({item.key: item for item in items})


class Pair:
    """A publisher with its store, and replicas that are turned together with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = Table({"nodes": {"a": Node(name="a")}, "pods": {}, "services": {}})
        self.publisher = Publisher("1", directory)
        self.replicas: list[Replica] = []

    def replica(self, *kinds: Kind) -> Replica:
        self.replicas.append(Replica("worker", kinds or ("nodes",), self.directory))
        return self.replicas[-1]

    def turn(self, until: Callable[[], object], timeout: float = 20.0) -> list[Changes]:
        """Let both ends work until something holds; the changes of all replicas."""
        end, heard = time.monotonic() + timeout, []
        while True:
            self.publisher.serve(self.store)
            for replica in self.replicas:
                changes = replica.receive(time.monotonic())
                if changes:
                    heard.append(changes)
            if until():
                return heard
            assert time.monotonic() < end, "it never came to that"
            items = [*self.publisher.sockets, *(item for replica in self.replicas for item in replica.sockets)]
            Poller.wait(items, 0.02)

    def close(self) -> None:
        self.publisher.close()
        for replica in self.replicas:
            replica.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[Callable[[int, str], zmq.Socket[bytes]]]:
    """A hostile peer: a plain ZeroMQ socket connected to one of ours."""
    context = zmq.Context()

    def connect(pattern: int, name: str) -> zmq.Socket[bytes]:
        peer = context.socket(pattern)
        peer.linger = 0
        peer.connect(f"ipc://{tmp_path}/{name}")
        return peer

    yield connect
    context.destroy(linger=0)


# waiting


def test_poller_tells_which_of_sockets_and_descriptors_are_ready(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with NoticeReceiver(tmp_path) as receiver, NoticeSender(tmp_path) as sender:
        assert Poller.wait([receiver, reader], 0.0) == set()
        os.write(writer, b"x")
        assert Poller.wait([receiver, reader], float("inf")) == {reader}
        os.read(reader, 1)
        sender.send(NOTICE)
        assert Poller.wait([receiver, reader], float("inf")) == {receiver}
        os.close(writer)
        assert Poller.wait([reader], float("inf")) == {reader}, "a closed pipe is ready: reading it tells"
    os.close(reader)


def test_poller_does_not_end_before_its_time() -> None:
    reader, writer = os.pipe()
    began = time.monotonic()
    assert Poller.wait([reader], 0.0301) == set()
    assert time.monotonic() - began >= 0.0301
    os.close(reader)
    os.close(writer)


# heartbeats, notices, status


def test_heartbeats_come_in_order(tmp_path: Path) -> None:
    with HeartbeatReceiver(tmp_path) as receiver, HeartbeatSender(tmp_path) as sender:
        for pid in range(5):
            assert sender.send(Heartbeat(worker="cni", pid=pid, started=0.0, sent=0.0))
        got = collect(receiver.receive, 5)
        assert [heartbeat.pid for heartbeat in got] == list(range(5))


def test_text_that_is_not_unicode_does_not_silence_a_worker(tmp_path: Path) -> None:
    with HeartbeatReceiver(tmp_path) as receiver, HeartbeatSender(tmp_path) as sender:
        warning = os.fsdecode(b"cannot read bad\xff.conf")
        assert sender.send(Heartbeat(worker="cni", pid=1, started=0.0, sent=0.0, warnings=(warning,)))
        got = collect(receiver.receive)
        assert got[0].warnings == ("cannot read bad?.conf",)


@pytest.mark.parametrize(
    ("sender", "message"), [(HeartbeatSender, HEARTBEAT), (NoticeSender, NOTICE)], ids=["heartbeat", "notice"]
)
def test_with_nobody_there_a_sender_drops_and_counts(
    tmp_path: Path, sender: type[HeartbeatSender] | type[NoticeSender], message: Heartbeat | Notice
) -> None:
    channel = sender(tmp_path)
    sent = [channel.send(message) for _ in range(500)]  # type: ignore[arg-type]
    assert not sent[-1]
    assert channel.dropped == sent.count(False) == 500 - sender.send_queue
    channel.socket.close(linger=0)


def test_a_notice_is_cut_to_the_length_of_an_event(tmp_path: Path) -> None:
    with NoticeReceiver(tmp_path) as receiver, NoticeSender(tmp_path) as sender:
        sender.send(Notice(worker="w", kind="Node", name="a", reason="R", text="x" * 1_000_000))
        got = collect(receiver.receive)
        assert got[0].text == "x" * 1024


class StatusThread:
    """Serves a status socket from a thread, as `request_status` waits."""

    def __init__(self, directory: Path, answer: Callable[[], StatusReply]) -> None:
        import threading

        self.server = StatusServer(directory)
        self._reader, self._writer = os.pipe()
        self._answer = answer
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while self._reader not in Poller.wait([self.server, self._reader], float("inf")):
            self.server.serve(self._answer)

    def close(self) -> None:
        os.write(self._writer, b"x")
        self._thread.join()
        self.server.close()
        os.close(self._reader)
        os.close(self._writer)


@pytest.fixture
def status(tmp_path: Path) -> Iterator[StatusThread]:
    thread = StatusThread(tmp_path, lambda: REPLY)
    yield thread
    thread.close()


def test_status_is_asked_and_answered(tmp_path: Path, status: StatusThread) -> None:
    assert request_status(tmp_path) == REPLY


def test_status_without_an_agent_is_a_timeout(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="health worker is not running"):
        request_status(tmp_path, timeout=0.05)


def test_status_without_a_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        request_status(tmp_path / "none")


def test_status_of_another_protocol_is_told_to_both_ends(
    tmp_path: Path, status: StatusThread, raw: Callable[[int, str], zmq.Socket[bytes]]
) -> None:
    client = raw(zmq.REQ, STATUS)
    client.send(msgpack.packb({"message": "StatusRequest", "protocol": PROTOCOL + 1}))
    assert client.poll(10_000)
    assert msgpack.unpackb(client.recv())["protocol"] == PROTOCOL
    assert status.server.dropped == 1


def test_status_reply_of_another_protocol_is_a_clear_error(
    tmp_path: Path, status: StatusThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = msgpack.packb({"message": "StatusReply", "protocol": PROTOCOL + 1})
    original = codec.encode
    monkeypatch.setattr(codec, "encode", lambda message: future if message is REPLY else original(message))
    with pytest.raises(BadMessage, match=f"protocol {PROTOCOL + 1}"):
        request_status(tmp_path)


def test_garbage_on_the_status_socket_is_counted_and_status_goes_on(
    tmp_path: Path, status: StatusThread, raw: Callable[[int, str], zmq.Socket[bytes]]
) -> None:
    client = raw(zmq.DEALER, STATUS)
    for garbage in GARBAGE:
        client.send_multipart([b"", garbage])
    client.send(b"no empty frame")
    client.send_multipart([b"", b"", b""])
    client.send_multipart([b"", encode(HEARTBEAT)])
    eventually(lambda: status.server.dropped == len(GARBAGE) + 3)
    assert request_status(tmp_path) == REPLY


# files


def test_sockets_are_for_the_group_only(pair: Pair) -> None:
    for name in (SNAPSHOTS, DELTAS, NOTICES):
        state = (pair.directory / name).stat()
        assert stat.S_IMODE(state.st_mode) == 0o660
        assert state.st_gid == (SOCKET_GROUP if os.geteuid() == 0 else os.getegid())


def test_names_are_short_and_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 200)
    deep.mkdir()
    monkeypatch.chdir(deep)
    with NoticeReceiver() as receiver, NoticeSender() as sender:
        assert (deep / NOTICES).is_socket()
        sender.send(NOTICE)
        assert collect(receiver.receive) == [NOTICE]


def test_a_directory_with_a_name_too_long_for_a_socket_works(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 200)
    deep.mkdir()
    pair = Pair(deep)
    replica = pair.replica()
    pair.turn(lambda: replica.usable)
    assert stat.S_IMODE((deep / SNAPSHOTS).stat().st_mode) == 0o660
    ends = (*pair.publisher.sockets, *replica.sockets)
    assert None not in [channel._directory for channel in ends]
    pair.close()
    assert {channel._directory for channel in ends} == {None}


def test_a_directory_that_is_not_there_is_an_error_for_who_binds(tmp_path: Path) -> None:
    with pytest.raises(zmq.ZMQError, match="No such file"):
        Publisher("1", tmp_path / "none")


def test_the_socket_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    for name in (SNAPSHOTS, DELTAS, NOTICES):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / name))
    pair = Pair(tmp_path)
    replica = pair.replica()
    pair.turn(lambda: replica.usable)
    pair.close()


def test_a_watcher_that_ended_in_order_is_replaced_too(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    replica = pair.replica()
    pair.turn(lambda: replica.usable)
    pair.publisher.close()
    pair.publisher = Publisher("2", tmp_path)
    pair.store.put("nodes", Node(name="b"))
    pair.turn(lambda: "b" in replica.cluster.nodes)
    pair.close()


# hostile peers


Feed = tuple[type[Channel], int, Callable[[Channel], list[object]], bytes]
RECEIVERS: list[Feed] = [
    (HeartbeatReceiver, zmq.PUSH, lambda channel: channel.receive(), encode(HEARTBEAT)),  # type: ignore[attr-defined]
    (NoticeReceiver, zmq.PUSH, lambda channel: channel.receive(), encode(NOTICE)),  # type: ignore[attr-defined]
    (
        channels.SnapshotServer,
        zmq.DEALER,
        lambda channel: list(channel.requests()),  # type: ignore[attr-defined]
        encode(SnapshotRequest(worker="w", kinds=("nodes",))),
    ),
]


@pytest.mark.parametrize(("cls", "pattern", "receive", "good"), RECEIVERS, ids=[feed[0].__name__ for feed in RECEIVERS])
def test_what_is_no_message_is_counted_and_dropped_and_the_next_one_passes(
    tmp_path: Path,
    raw: Callable[[int, str], zmq.Socket[bytes]],
    cls: type[Channel],
    pattern: int,
    receive: Callable[[Channel], list[object]],
    good: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with cls(tmp_path) as channel:
        peer = raw(pattern, cls.name)
        future = msgpack.packb({"message": "Heartbeat", "protocol": PROTOCOL + 1})
        bad = [*GARBAGE, good[:-1], good + b"\x00", encode(StatusRequest()), future, future]
        for data in bad:
            peer.send(data)
        peer.send_multipart([good] * 5)
        peer.send(good)
        got = collect(lambda: receive(channel))
        assert len(got) == 1
        assert channel.dropped == len(bad) + 1
    told = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len([line for line in told if f"protocol {PROTOCOL + 1}" in line]) == 1, "loud, and once"
    assert len(told) == 4, "one line for each sort of trouble"


def test_other_things_than_zeromq_on_a_socket_do_not_disturb_it(pair: Pair) -> None:
    strangers = []
    for name in (SNAPSHOTS, DELTAS, NOTICES):
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03", b""):
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(str(pair.directory / name))
            stranger.send(data)
            strangers.append(stranger)
    replica = pair.replica()
    pair.turn(lambda: replica.usable)
    for stranger in strangers:
        stranger.close()


def test_a_frame_longer_than_the_bound_cuts_off_its_sender_only(
    pair: Pair, raw: Callable[[int, str], zmq.Socket[bytes]]
) -> None:
    for pattern, name in ((zmq.DEALER, SNAPSHOTS), (zmq.PUSH, NOTICES), (zmq.SUB, DELTAS)):
        peer = raw(pattern, name)
        if pattern == zmq.SUB:
            peer.setsockopt(zmq.SUBSCRIBE, b"x" * 10_000)
        else:
            peer.send(b"x" * (1 << 20))
    replica = pair.replica()
    pair.turn(lambda: replica.usable)
    assert pair.publisher.notices() == []
    assert pair.publisher.dropped == 0


def test_a_peer_that_asks_and_never_reads_delays_no_one(
    pair: Pair, raw: Callable[[int, str], zmq.Socket[bytes]]
) -> None:
    pair.store.put("pods", *(Pod(name=f"p{n}", namespace="x", labels={"l": "x" * 500}) for n in range(1000)))
    deaf = raw(zmq.DEALER, SNAPSHOTS)
    deaf.rcvhwm = 1
    request = encode(SnapshotRequest(worker="deaf", kinds=("pods",)))
    for _ in range(100):
        deaf.send(request)
        pair.publisher.serve(pair.store)
        time.sleep(0.001)
    pair.turn(lambda: pair.publisher.dropped > 0)
    replica = pair.replica("pods")
    pair.turn(lambda: replica.usable)
    assert len(replica.cluster.pods) == 1000


def test_a_hostile_subscriber_does_not_disturb(pair: Pair, raw: Callable[[int, str], zmq.Socket[bytes]]) -> None:
    peer = raw(zmq.XSUB, DELTAS)
    for number in range(200):
        peer.send(b"\x01topic%d" % number)
        peer.send(b"garbage")
        peer.send_multipart([b"\x01beacon", b"more"])
    replica = pair.replica()
    pair.turn(lambda: replica.usable)


class HostileWatcher:
    """Binds what a watcher binds and sends what it likes."""

    def __init__(self, directory: Path) -> None:
        self.context = zmq.Context()
        self.snapshots = self.context.socket(zmq.ROUTER)
        self.deltas = self.context.socket(zmq.XPUB)
        self.snapshots.bind(f"ipc://{directory}/{SNAPSHOTS}")
        self.deltas.bind(f"ipc://{directory}/{DELTAS}")

    def close(self) -> None:
        self.context.destroy(linger=0)


def test_a_replica_survives_a_watcher_that_talks_nonsense(tmp_path: Path) -> None:
    watcher = HostileWatcher(tmp_path)
    replica = Replica("worker", ("nodes",), tmp_path)
    replica.receive(time.monotonic())
    for _ in range(2):
        assert watcher.deltas.poll(10_000)
        watcher.deltas.recv()
    peer, _ = watcher.snapshots.recv_multipart()
    pods = encode(SnapshotRequest(worker="w", kinds=("pods",)))
    bad = [*GARBAGE, pods, msgpack.packb({"message": "Delta", "protocol": PROTOCOL + 1})]
    for data in bad:
        watcher.deltas.send_multipart([b"nodes", data])
        watcher.snapshots.send_multipart([peer, data])
    watcher.deltas.send_multipart([b"nodes"])
    watcher.deltas.send_multipart([b"nodes", codec.encode_delta("1", "pods", 1, [], [])])
    watcher.snapshots.send_multipart([peer, b"", b""])

    def dropped() -> bool:
        assert replica.receive(time.monotonic()) == {}
        return replica.dropped == 2 * len(bad) + 3

    eventually(dropped)
    assert not replica.usable
    watcher.close()
    pair = Pair(tmp_path)
    pair.replicas.append(replica)
    pair.turn(lambda: replica.usable)
    pair.close()


# the publisher


def test_a_new_subscriber_hears_at_once_what_it_missed(pair: Pair) -> None:
    """What is published after the snapshot and before the subscription has arrived is lost: the beacon tells."""
    replica = pair.replica()
    pair.turn(lambda: replica.usable)
    pair.publisher.seqs["nodes"] += 1  # a delta that nobody heard
    pair.store.put("nodes", Node(name="b"))
    pair.replica()
    pair.turn(lambda: "b" in replica.cluster.nodes)


def test_a_delta_reaches_only_those_who_read_the_kind(pair: Pair) -> None:
    nodes, pods = pair.replica("nodes"), pair.replica("pods")
    pair.turn(lambda: nodes.usable and pods.usable)
    pair.store.put("pods", Pod(name="p", namespace="x"))
    pair.publisher.publish("pods", [Pod(name="p", namespace="x")])
    heard = pair.turn(lambda: "x/p" in pods.cluster.pods)
    assert [list(changes) for changes in heard] == [["pods"]]
    assert dict(nodes.cluster.nodes) == {"a": Node(name="a")}


def test_a_long_change_goes_out_in_pieces_and_arrives_whole(pair: Pair) -> None:
    replica = pair.replica("pods")
    pair.turn(lambda: replica.usable)
    pods = [Pod(name=f"p{n}", namespace="x", labels={"l": "x" * 1000}) for n in range(2000)]
    pair.store.put("pods", *pods)
    before = pair.publisher.seqs["pods"]
    pair.publisher.publish("pods", pods)
    pieces = pair.publisher.seqs["pods"] - before
    assert pieces >= 2000 * 1000 // channels.DELTA_BYTES
    pair.turn(lambda: len(replica.cluster.pods) == 2000)
    pair.store.tables["pods"].clear()
    pair.publisher.publish("pods", gone=[pod.key for pod in pods])
    pair.turn(lambda: len(replica.cluster.pods) == 0)


def test_what_cannot_be_sent_is_named_and_the_rest_is_sent(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    good = Service(name="good", namespace="x")
    bad = Service(name="bad", namespace="x", ports=(ServicePort(port=2**70),))
    huge = Service(name="huge", namespace="x", labels={"l": "x" * codec.MAX_OBJECT_BYTES})
    pair.store.put("services", bad, huge, good)
    replica = pair.replica("services")
    pair.turn(lambda: replica.usable)
    assert list(replica.cluster.services) == ["x/good"]
    news = Service(name="news", namespace="x")
    pair.store.put("services", news)
    pair.publisher.publish("services", [bad, huge, news])
    pair.turn(lambda: "x/news" in replica.cluster.services)
    assert "x/bad" not in replica.cluster.services
    text = caplog.text
    assert "Service x/bad: cannot be sent" in text
    assert "Service x/huge:" in text


def test_a_kind_that_is_not_watched_leaves_a_replica_waiting_and_says_so(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    replica = pair.replica("nodes", "namespaces")
    pair.turn(lambda: replica.dropped > 0)
    assert not replica.usable
    assert "the watcher does not watch namespaces" in caplog.text
    pair.store.put("namespaces", Namespace(name="n"))
    pair.turn(lambda: replica.usable)


def test_a_snapshot_beyond_the_bound_is_refused_by_the_watcher(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(codec, "MAX_BYTES", 100)
    replica = pair.replica()
    pair.turn(lambda: pair.publisher.dropped > 0)
    assert not replica.usable
    assert "snapshot for 'worker'" in caplog.text


def test_a_snapshot_tells_the_newest_version_of_an_object(pair: Pair) -> None:
    """The kept wire forms must not outlive their objects, published or not."""
    first = pair.replica()
    pair.turn(lambda: first.usable)
    pair.store.put("nodes", Node(name="a", provider_id="2"), Node(name="b"))
    second = pair.replica()
    pair.turn(lambda: second.usable)
    assert second.cluster.nodes["a"].provider_id == "2"
    del pair.store.tables["nodes"]["b"]
    pair.publisher.publish("nodes", gone=["b"])
    third = pair.replica()
    pair.turn(lambda: third.usable)
    assert list(third.cluster.nodes) == ["a"]


def test_notices_reach_the_publisher(pair: Pair) -> None:
    with NoticeSender(pair.directory) as sender:
        sender.send(NOTICE)
        got = collect(pair.publisher.notices)
        assert got == [NOTICE]


def test_a_view_keeps_what_a_worker_reads_and_lets_it_hear_of_nothing_else(pair: Pair) -> None:
    def short(item: Projection) -> Projection:
        assert isinstance(item, Node)
        return Node(name=item.name, pod_cidr=item.pod_cidr)

    replica = Replica("worker", ("nodes", "pods"), pair.directory, {"nodes": short})
    pair.replicas.append(replica)
    pair.store.put("nodes", Node(name="b", pod_cidr="1", provider_id="x"))
    pair.turn(lambda: "b" in replica.cluster.nodes)
    assert replica.cluster.nodes["b"] == Node(name="b", pod_cidr="1")
    changed = [Node(name="b", pod_cidr="1", provider_id="y"), Node(name="c", pod_cidr="2")]
    pair.store.put("nodes", *changed)
    pair.publisher.publish("nodes", changed, ())
    assert pair.turn(lambda: "c" in replica.cluster.nodes) == [{"nodes": {"c": (None, Node(name="c", pod_cidr="2"))}}]
