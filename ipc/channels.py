"""The ZeroMQ sockets between the workers, one class an end, and the poll over them.

Touches sockets: all are ``ipc://`` sockets in one directory, by default the working directory. Nothing here ever blocks
but `Poller.wait` and `request_status`: a message that cannot go out at once is dropped and counted, every queue is
bounded, and what comes in and is no message of ours is counted and dropped.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Protocol, Self, TypeVar

import msgspec
import zmq

from kube_router.ipc import codec
from kube_router.ipc.codec import BadMessage
from kube_router.ipc.messages import (
    KINDS,
    Beacon,
    Delta,
    Heartbeat,
    Key,
    Kind,
    Message,
    Notice,
    Projection,
    Snapshot,
    SnapshotRequest,
    SourceState,
    StatusReply,
    StatusRequest,
)

log = logging.getLogger(__name__)

SNAPSHOTS = "snapshots.sock"
DELTAS = "deltas.sock"
NOTICES = "notices.sock"
HEARTBEATS = "heartbeats.sock"
STATUS = "status.sock"

SOCKET_GROUP = 65532
"""Group of the workers: the sockets are made accessible to it, the directory keeps everyone else out."""
SOCKET_MODE = 0o660

BEACON_TOPIC = b"beacon"

SMALL_BYTES = 64 << 10
"""Bound of an incoming request, notice or subscription."""
DELTA_BYTES = 64 << 10
"""A delta is split into several when it would be longer: with `DELTA_QUEUE` this bounds what a stopped worker costs."""
DELTA_QUEUE = 500
"""Deltas that wait for a slow worker on either side before they are dropped (and the worker asks for a snapshot)."""
QUEUE = 100
"""Messages that wait on any other socket."""
DRAIN, DRAIN_SECONDS = 2000, 0.1
"""Messages taken from a socket in one go, and for how long: a flood must not keep a loop from its other work."""
REQUESTS = 64
"""Snapshot requests answered in one go."""
NOTICE_LENGTH = 1024
"""Characters of a notice's text: the bound of an Event's message (k8s.io/api events/v1)."""
HEARTBEAT_BYTES = 1 << 20
STATUS_BYTES = 16 << 20

_RECONNECT_FIRST_MS, _RECONNECT_MOST_MS = 50, 250
_HANDSHAKE_MS = 2000

T = TypeVar("T", bound=Message)


class Channel:
    """One end of a socket. An item for `Poller.wait`: ready when there is something to receive.

    ``dropped`` counts what was lost here: what came in and is no message of ours, and what could not go out at once.
    ``views``: what is kept of the objects that come in.
    """

    name: ClassVar[str]
    pattern: ClassVar[int]
    binds: ClassVar[bool] = False
    receive_bytes: ClassVar[int] = SMALL_BYTES
    receive_queue: ClassVar[int] = QUEUE
    send_queue: ClassVar[int] = QUEUE
    linger_ms: ClassVar[int] = 0

    def __init__(self, directory: Path | str | None = None) -> None:
        """Bind or connect in ``directory``, or in the working directory, which must then stay where it is."""
        self.dropped = 0
        self.views: Mapping[Kind, codec.View] = codec.NO_VIEWS
        self._complained: set[str] = set()
        self._directory: int | None = None
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(self.pattern)
        try:
            self._set_options()
            path = self._path(directory)
            if self.binds:
                self.socket.bind(f"ipc://{path}")
                _admit_group(path)
            else:
                self.socket.connect(f"ipc://{path}")
        except BaseException:
            self.close()
            raise

    def _set_options(self) -> None:
        options = {
            zmq.LINGER: self.linger_ms,
            zmq.SNDHWM: self.send_queue,
            zmq.RCVHWM: self.receive_queue,
            zmq.MAXMSGSIZE: self.receive_bytes,
            zmq.RECONNECT_IVL: _RECONNECT_FIRST_MS,
            zmq.RECONNECT_IVL_MAX: _RECONNECT_MOST_MS,
            zmq.HANDSHAKE_IVL: _HANDSHAKE_MS,
        }
        for option, value in options.items():
            self.socket.setsockopt(option, value)

    def _path(self, directory: Path | str | None) -> str:
        """A name for the socket that fits into ``sun_path`` (107 bytes): through a descriptor when it must."""
        if directory is None:
            return self.name
        path = os.path.join(directory, self.name)
        if len(os.fsencode(path)) <= zmq.IPC_PATH_MAX_LEN:
            return path
        self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._directory}/{self.name}"

    def close(self) -> None:
        """Close the socket. The file of a bound one stays; the next one to bind replaces it."""
        if not self.socket.closed:
            self.socket.close()
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def drop(self, text: str, *, about: str = "") -> None:
        """Count something lost and say so: once for each ``about``, so that a flood cannot fill the log."""
        self.dropped += 1
        about = about or text
        if about not in self._complained and len(self._complained) < 100:
            self._complained.add(about)
            log.error("%s: dropped: %s (told once; counted from here on)", self.name, text)

    def _send(self, *frames: bytes) -> bool:
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self.dropped += 1
            return False
        return True

    def _frames(self, most: int = DRAIN) -> Iterator[list[bytes]]:
        """What is there to receive, at most ``most`` messages or for `DRAIN_SECONDS`."""
        end = time.monotonic() + DRAIN_SECONDS
        for _ in range(most):
            if time.monotonic() > end:
                return
            try:
                yield self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return

    def _decode(self, payload: bytes, wanted: type[T]) -> T | None:
        """The message in a frame, or None after counting what is wrong with it."""
        try:
            message = codec.decode(payload, self.views)
        except BadMessage as error:
            about = str(error) if error.reason == "version" else error.reason
            self.drop(str(error), about=about)
            return None
        if not isinstance(message, wanted):
            self.drop(f"{type(message).__name__} does not belong on this socket", about="type")
            return None
        return message


def _admit_group(path: str) -> None:
    """Give the workers' group access; best effort, as a test or a worker of that very group may not change it."""
    try:
        os.chmod(path, SOCKET_MODE)
        os.chown(path, -1, SOCKET_GROUP)
    except OSError as error:
        log.debug("%s: %s", path, error)


def shut_down() -> None:
    """Close every socket of this process; waits for notices that are on their way, up to their linger time."""
    zmq.Context.instance().destroy()


Pollable = Channel | int


class Poller:
    """Waiting for sockets and file descriptors at once."""

    @staticmethod
    def wait(items: Iterable[Pollable], timeout_seconds: float) -> set[Pollable]:
        """Those of ``items`` (channels, or descriptors as numbers) that can be read without blocking.

        Returns as soon as there is one, else the empty set after ``timeout_seconds`` (infinity: never). A descriptor
        in error or hung up counts as ready: reading it tells. Handlers of signals run, but do not end the wait.
        """
        poller = zmq.Poller()
        by_handle: dict[object, Pollable] = {}
        for item in items:
            handle = item.socket if isinstance(item, Channel) else item
            by_handle[handle] = item
            poller.register(handle, zmq.POLLIN)
        # Rounded up: a wait that ends too early would spin until the due time.
        timeout = None if math.isinf(timeout_seconds) else min(math.ceil(max(0.0, timeout_seconds) * 1000), 2**31 - 1)
        return {by_handle[handle] for handle, _ in poller.poll(timeout)}


class HeartbeatSender(Channel):
    """Every worker's end: `Heartbeat` to health."""

    name, pattern, send_queue = HEARTBEATS, zmq.PUSH, 10

    def send(self, heartbeat: Heartbeat) -> bool:
        """Whether it could be queued; a heartbeat that cannot is of no use later."""
        return _send_message(self, heartbeat)


class HeartbeatReceiver(Channel):
    """Health's end."""

    name, pattern, binds, receive_bytes = HEARTBEATS, zmq.PULL, True, HEARTBEAT_BYTES

    def receive(self) -> list[Heartbeat]:
        """The heartbeats that have come since the last call, oldest first."""
        return list(_messages(self, Heartbeat))


class NoticeSender(Channel):
    """Every worker's end: `Notice` to the watcher."""

    name, pattern, linger_ms = NOTICES, zmq.PUSH, 200

    def send(self, notice: Notice) -> bool:
        """Whether it could be queued; notices wait for a watcher that is restarting, up to the bound of the queue.

        A text longer than an Event's message may be is cut.
        """
        return _send_message(self, msgspec.structs.replace(notice, text=notice.text[:NOTICE_LENGTH]))


class NoticeReceiver(Channel):
    """The watcher's end."""

    name, pattern, binds = NOTICES, zmq.PULL, True

    def receive(self) -> list[Notice]:
        """The notices that have come since the last call, oldest first."""
        return list(_messages(self, Notice))


def _send_message(channel: Channel, message: Message) -> bool:
    try:
        return channel._send(codec.encode(message))
    except BadMessage as error:
        channel.drop(str(error))
        return False


def _messages(channel: Channel, wanted: type[T]) -> Iterator[T]:
    for frames in channel._frames():
        if len(frames) != 1:
            channel.drop(f"{len(frames)} frames where one is due", about="frames")
        elif (message := channel._decode(frames[0], wanted)) is not None:
            yield message


class StatusServer(Channel):
    """Health's end of the status socket."""

    name, pattern, binds = STATUS, zmq.ROUTER, True

    def _set_options(self) -> None:
        super()._set_options()
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)

    def serve(self, answer: Callable[[], StatusReply]) -> None:
        """Answer what has been asked. A client of another protocol is answered too: it then knows what is wrong."""
        reply: bytes | None = None
        for frames in self._frames(QUEUE):
            if len(frames) != 3 or frames[1] != b"":
                self.drop(f"{len(frames)} frames are no request", about="frames")
                continue
            try:
                request = codec.decode(frames[2])
            except BadMessage as error:
                self.drop(str(error), about=str(error) if error.reason == "version" else error.reason)
                if error.reason != "version":
                    continue
            else:
                if not isinstance(request, StatusRequest):
                    self.drop(f"{type(request).__name__} does not belong on this socket", about="type")
                    continue
            reply = reply or codec.encode(answer())
            self._send(frames[0], b"", reply)


class _StatusClient(Channel):
    name, pattern, receive_bytes = STATUS, zmq.REQ, STATUS_BYTES

    def ask(self, timeout: float) -> StatusReply:
        deadline = time.monotonic() + timeout
        self._send(codec.encode(StatusRequest()))
        if not Poller.wait([self], max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"{self.name}: no answer within {timeout:g} s: the health worker is not running")
        reply = codec.decode(self.socket.recv(zmq.NOBLOCK))
        if not isinstance(reply, StatusReply):
            raise BadMessage("type", f"{self.name}: {type(reply).__name__} is no answer")
        return reply


def request_status(ipc_dir: Path | str, timeout: float = 2.0) -> StatusReply:
    """How the agent whose sockets are in ``ipc_dir`` stands.

    Raises TimeoutError without an answer in ``timeout`` seconds, FileNotFoundError or PermissionError when the
    directory cannot be entered, `BadMessage` when the agent speaks another protocol.
    """
    os.stat(ipc_dir)
    with _StatusClient(ipc_dir) as client:
        return client.ask(timeout)


class SnapshotServer(Channel):
    """The watcher's end of the snapshot socket. A peer that does not read loses answers, it delays no one."""

    name, pattern, binds = SNAPSHOTS, zmq.ROUTER, True
    send_queue = 2

    def _set_options(self) -> None:
        super()._set_options()
        # Without it, an answer that cannot be queued would vanish uncounted.
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)

    def requests(self) -> Iterator[tuple[bytes, SnapshotRequest]]:
        """(peer, request) for what has been asked since the last call, one for each peer: the newest."""
        newest: dict[bytes, SnapshotRequest] = {}
        for frames in self._frames(REQUESTS):
            if len(frames) != 2:
                self.drop(f"{len(frames)} frames are no request", about="frames")
            elif (request := self._decode(frames[1], SnapshotRequest)) is not None:
                newest[frames[0]] = request
        yield from newest.items()

    def answer(self, peer: bytes, snapshot: bytes) -> bool:
        """Queue an encoded snapshot for a peer."""
        return self._send(peer, snapshot)


class SnapshotClient(Channel):
    """A worker's end of the snapshot socket. One request waits while there is no watcher."""

    name, pattern, receive_bytes = SNAPSHOTS, zmq.DEALER, codec.MAX_BYTES
    send_queue, receive_queue = 1, 4

    def ask(self, request: SnapshotRequest) -> bool:
        """Whether the request could be queued; if not, an earlier one still waits for a watcher."""
        try:
            self.socket.send(codec.encode(request), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> Iterator[Snapshot]:
        """The answers that have come."""
        yield from _messages(self, Snapshot)


class DeltaSender(Channel):
    """The watcher's end of the delta socket. XPUB, to see when a new subscriber begins to hear."""

    name, pattern, binds, send_queue = DELTAS, zmq.XPUB, True, DELTA_QUEUE
    receive_bytes = 256  # subscriptions; libzmq walks a topic recursively, byte by byte

    def _set_options(self) -> None:
        super()._set_options()
        self.socket.setsockopt(zmq.XPUB_VERBOSE, 1)

    def newcomers(self) -> bool:
        """Whether someone has subscribed to the beacon since the last call."""
        return any(frames == [b"\x01" + BEACON_TOPIC] for frames in list(self._frames()))

    def send(self, topic: bytes, payload: bytes) -> None:
        """Send to all subscribers; for one whose queue is full it is lost, which only that one can notice."""
        self._send(topic, payload)


class DeltaReceiver(Channel):
    """A worker's end of the delta socket."""

    name, pattern, receive_bytes, receive_queue = DELTAS, zmq.SUB, codec.MAX_OBJECT_BYTES * 2, DELTA_QUEUE

    def __init__(self, kinds: Iterable[Kind], directory: Path | str | None = None) -> None:
        self._kinds = tuple(kinds)
        super().__init__(directory)

    def _set_options(self) -> None:
        super()._set_options()
        # The beacon last: who hears it hears the deltas.
        for topic in (*(kind.encode() for kind in self._kinds), BEACON_TOPIC):
            self.socket.setsockopt(zmq.SUBSCRIBE, topic)

    def receive(self) -> Iterator[Delta | Beacon]:
        """What has been published since the last call, in order, at most `DRAIN` messages."""
        for frames in self._frames():
            if len(frames) != 2:
                self.drop(f"{len(frames)} frames where topic and message are due", about="frames")
                continue
            wanted: type[Delta] | type[Beacon] = Beacon if frames[0] == BEACON_TOPIC else Delta
            message = self._decode(frames[1], wanted)
            if isinstance(message, Delta) and message.kind.encode() != frames[0]:
                self.drop(f"a delta of {message.kind} under topic {frames[0][:40]!r}", about="topic")
            elif message is not None:
                yield message


class Store(Protocol):
    """What the watcher knows: all objects of the kinds it watches, up to the last delta it published."""

    @property
    def state(self) -> SourceState: ...

    def objects(self, kind: Kind) -> Mapping[Key, Projection]:
        """All objects of ``kind``; raises KeyError for a kind that is not watched."""
        ...


class Publisher:
    """The watcher's end of everything: binds snapshots, deltas and notices, numbers and sends the deltas.

    Rules for the caller: one thread; change the store first, then `publish`, then `serve`; wait on ``sockets`` and call
    `serve` and `notices` when one is ready; send a `beacon` every second and at each change of the source's state.
    """

    def __init__(self, epoch: str, directory: Path | str | None = None) -> None:
        """``epoch`` must differ from that of any earlier watcher."""
        self.epoch = epoch
        self.seqs: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        # The wire form of each object (325 bytes a pod): a snapshot is then a matter of joining them.
        self._wire: dict[Kind, dict[Key, tuple[Projection, bytes]]] = {kind: {} for kind in KINDS}
        self._packer = codec.object_packer()
        self._deltas = DeltaSender(directory)
        self._snapshots = SnapshotServer(directory)
        self._notices = NoticeReceiver(directory)

    @property
    def sockets(self) -> tuple[Channel, ...]:
        """What to wait on."""
        return self._snapshots, self._deltas, self._notices

    @property
    def dropped(self) -> int:
        """Messages lost or refused on any of the sockets."""
        return sum(channel.dropped for channel in self.sockets)

    def close(self) -> None:
        """Close all sockets."""
        for channel in self.sockets:
            channel.close()

    def publish(self, kind: Kind, put: Iterable[Projection] = (), gone: Iterable[Key] = ()) -> None:
        """Send one change of one kind; a big one goes out as several deltas.

        An object that cannot be sent (too long, a number beyond 64 bits) is dropped with one line that names it.
        """
        wire = self._wire[kind]
        batch: list[bytes] = []
        size = 0
        keys = list(gone)
        for key in keys:
            wire.pop(key, None)
        for item in put:
            data = self._encoded_object(item)
            wire[item.key] = (item, data)
            if batch and size + len(data) > DELTA_BYTES:
                self._send_delta(kind, batch, [])
                batch, size = [], 0
            if data:
                batch.append(data)
                size += len(data)
        while len(keys) > _KEYS_IN_DELTA:
            self._send_delta(kind, [], keys[:_KEYS_IN_DELTA])
            del keys[:_KEYS_IN_DELTA]
        if batch or keys:
            self._send_delta(kind, batch, keys)

    def _encoded_object(self, item: Projection) -> bytes:
        """The object's wire form, empty when it has none."""
        try:
            return codec.encode_object(item, self._packer)
        except BadMessage as error:
            self._deltas.drop(str(error))
            return b""

    def _send_delta(self, kind: Kind, put: list[bytes], gone: list[Key]) -> None:
        self.seqs[kind] += 1
        self._deltas.send(kind.encode(), codec.encode_delta(self.epoch, kind, self.seqs[kind], put, gone))

    def beacon(self, state: SourceState) -> None:
        """Say how the source stands and how far the deltas are."""
        self._deltas.send(BEACON_TOPIC, codec.encode(Beacon(epoch=self.epoch, seqs=dict(self.seqs), state=state)))

    def serve(self, store: Store) -> None:
        """Answer the pending snapshot requests; never blocks."""
        if self._deltas.newcomers():
            self.beacon(store.state)
        for peer, request in self._snapshots.requests():
            parts = [part for kind in dict.fromkeys(request.kinds) if (part := self._encoded_kind(kind, store))]
            snapshot = codec.encode_snapshot(self.epoch, store.state, parts)
            if len(snapshot) > codec.MAX_BYTES:
                text = f"snapshot for {request.worker[:40]!r}: {len(snapshot)} bytes, the bound is {codec.MAX_BYTES}"
                self._snapshots.drop(text, about="size")
            else:
                self._snapshots.answer(peer, snapshot)

    def _encoded_kind(self, kind: Kind, store: Store) -> bytes:
        """A kind's part of a snapshot, from the wire forms of its objects: those not known yet are made."""
        try:
            objects = store.objects(kind)
        except KeyError:
            return b""
        known, wire = self._wire[kind], {}
        for key, item in objects.items():
            entry = known.get(key)
            wire[key] = entry if entry is not None and entry[0] is item else (item, self._encoded_object(item))
        self._wire[kind] = wire
        return codec.encode_kind(kind, self.seqs[kind], [data for _, data in wire.values() if data])

    def notices(self) -> list[Notice]:
        """What the workers have to say since the last call."""
        return self._notices.receive()


_KEYS_IN_DELTA = 200
"""A key has at most 317 bytes (namespace 63, name 253)."""
