"""Messages to bytes and back: msgpack on the wire, every field checked against the contract in ``messages.py``.

Pure: bytes in, messages out. `decode` takes bytes from anywhere: whatever is not a message of this protocol raises
`BadMessage`, and nothing else; a message is taken whole or not at all.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import msgpack  # type: ignore[import-untyped]
import msgspec

from kube_router.ipc.messages import (
    OBJECT_TYPES,
    PROTOCOL,
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

MAX_BYTES = 256 << 20
"""No message is longer; a snapshot of 100,000 pods has about 35 MB."""
MAX_OBJECT_BYTES = 2 << 20
"""No projected object is longer; the API server's own bound for a whole object is 1.5 MiB."""
MAX_STRING_BYTES = MAX_OBJECT_BYTES
MAX_ITEMS = 1_000_000
"""No list or map is longer."""

Reason = Literal["garbage", "version", "type"]

_TYPES: dict[str, type[Message]] = {
    cls.__name__: cls
    for cls in (SnapshotRequest, Snapshot, Delta, Beacon, Notice, Heartbeat, StatusRequest, StatusReply)
}


class BadMessage(ValueError):
    """Bytes that are no message of this protocol, or a message that cannot be put on the wire.

    ``reason``: ``garbage`` (no msgpack within the bounds), ``version`` (another protocol number) or ``type`` (a field
    that breaks the contract).
    """

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason: Reason = reason


def encode(message: Message) -> bytes:
    """The wire form of a message; raises `BadMessage` for what msgpack cannot carry (an integer beyond 64 bits)."""
    if isinstance(message, Snapshot):
        packer = object_packer()
        parts = [
            encode_kind(part.kind, part.seq, [encode_object(item, packer) for item in part.objects])
            for part in message.kinds
        ]
        return encode_snapshot(message.epoch, message.state, parts)
    # Text that is not Unicode (a file name with odd bytes in a warning) must not silence a worker.
    return _pack(message, msgpack.Packer(unicode_errors=None if isinstance(message, Delta) else "replace"))


def object_packer() -> msgpack.Packer:
    """What `encode_object` needs; to be kept, as making one costs more than an object. Not thread-safe."""
    return msgpack.Packer()


def encode_object(item: Projection, packer: msgpack.Packer) -> bytes:
    """The wire form of one object; raises `BadMessage` when it cannot be sent or is longer than `MAX_OBJECT_BYTES`."""
    data = _pack(item, packer)
    if len(data) > MAX_OBJECT_BYTES:
        name = f"{type(item).__name__} {item.key[:200]}"
        raise BadMessage("type", f"{name}: {len(data)} bytes on the wire, the bound is {MAX_OBJECT_BYTES}")
    return data


def encode_kind(kind: Kind, seq: int, objects: Sequence[bytes]) -> bytes:
    """The wire form of one kind of a snapshot, from objects that `encode_object` made."""
    return _assemble({"kind": kind, "seq": seq}, "objects", objects)


def encode_snapshot(epoch: str, state: SourceState, kinds: Sequence[bytes]) -> bytes:
    """A `Snapshot` put together from the parts that `encode_kind` made."""
    head = {"message": "Snapshot", "protocol": PROTOCOL, "epoch": epoch, "state": msgspec.to_builtins(state)}
    return _assemble(head, "kinds", kinds)


def encode_delta(epoch: str, kind: Kind, seq: int, put: Sequence[bytes], gone: Sequence[Key]) -> bytes:
    """A `Delta` put together from objects that `encode_object` made."""
    head = {"message": "Delta", "protocol": PROTOCOL, "epoch": epoch, "kind": kind, "seq": seq, "gone": list(gone)}
    return _assemble(head, "put", put)


def _assemble(head: dict[str, object], name: str, items: Sequence[bytes]) -> bytes:
    """A map of ``head`` and, under ``name``, the list of already encoded ``items``."""
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(len(head) + 1)
    for key, value in head.items():
        packer.pack(key)
        packer.pack(value)
    packer.pack(name)
    packer.pack_array_header(len(items))
    return b"".join((packer.bytes(), *items))


View = Callable[[Projection], Projection]
"""What a receiver keeps of an object: name and namespace, and whatever it reads."""
NO_VIEWS: Mapping[Kind, View] = {}


def decode(data: bytes | memoryview, views: Mapping[Kind, View] = NO_VIEWS) -> Message:
    """The message in ``data``, its objects as ``views`` show them; raises `BadMessage`."""
    if len(data) > MAX_BYTES:
        raise BadMessage("garbage", f"a message of {len(data)} bytes, the bound is {MAX_BYTES}")
    with _no_collection(len(data)):
        snapshot = bytes(data[1 : 1 + len(_SNAPSHOT)]) == _SNAPSHOT
        fields = _unpack_snapshot(data, views) if snapshot else _unpack(data)
        cls = _type_of(fields)
        try:
            if cls is Delta:
                return _delta(fields, views)
            if cls is Snapshot:
                return _snapshot(fields)
            return msgspec.convert(fields, cls)
        except (msgspec.MsgspecError, RecursionError, MemoryError) as error:
            raise BadMessage("type", f"{cls.__name__}: {error}") from None


def _unpack(data: bytes | memoryview) -> dict[str, Any]:
    try:
        fields = msgpack.unpackb(data, **_limits(len(data)))
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise BadMessage("garbage", f"not msgpack: {str(error)[:200] or type(error).__name__}") from None
    if not isinstance(fields, dict):
        raise BadMessage("garbage", f"not a message: a {type(fields).__name__}")
    return fields


def _limits(length: int) -> dict[str, Any]:
    # A list header makes msgpack reserve room at once: an element has at least one byte, so no honest list is longer
    # than its message. Depth is bounded by msgpack itself.
    longest = min(MAX_ITEMS, length)
    return {
        "strict_map_key": True,
        "max_str_len": MAX_STRING_BYTES,
        "max_bin_len": 0,
        "max_ext_len": 0,
        "max_array_len": longest,
        "max_map_len": longest,
        "ext_hook": _refuse_extension,
    }


_SNAPSHOT = msgpack.packb("message") + msgpack.packb("Snapshot")
"""How a snapshot begins, behind the number of its fields."""


def _unpack_snapshot(data: bytes | memoryview, views: Mapping[Kind, View]) -> dict[str, Any]:
    """As `_unpack`, with each object made, and cut down to its view, before the next one is looked at.

    A whole cluster in the form of dictionaries takes several times the room of what is kept of it, and a process does
    not get rid of it again: pieces of what is kept lie all over it.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=len(data), **_limits(len(data)))
    unpacker.feed(data)
    fields: dict[str, Any] = {}
    try:
        for _ in range(unpacker.read_map_header()):
            name = _field(unpacker)
            fields[name] = _unpack_parts(unpacker, views) if name == "kinds" else unpacker.unpack()
        if unpacker.tell() != len(data):
            raise ValueError("bytes behind the message")
    except msgspec.MsgspecError as error:
        raise BadMessage("type", f"Snapshot: {error}") from None
    except (ValueError, TypeError, RecursionError, MemoryError, msgpack.OutOfData) as error:
        raise BadMessage("garbage", f"not msgpack: {str(error)[:200] or type(error).__name__}") from None
    return fields


def _unpack_parts(unpacker: msgpack.Unpacker, views: Mapping[Kind, View]) -> list[dict[str, Any]]:
    parts = []
    for _ in range(unpacker.read_array_header()):
        part: dict[str, Any] = {}
        for _ in range(unpacker.read_map_header()):
            name = _field(unpacker)
            cls = OBJECT_TYPES.get(part.get("kind")) if name == "objects" else None  # type: ignore[arg-type]
            if cls is None:
                part[name] = unpacker.unpack()
                continue
            view = views.get(part["kind"], _whole)
            length = range(unpacker.read_array_header())
            part[name] = tuple([view(msgspec.convert(unpacker.unpack(), cls)) for _ in length])
        parts.append(part)
    return parts


def _field(unpacker: msgpack.Unpacker) -> str:
    name = unpacker.unpack()
    if not isinstance(name, str):
        raise ValueError(f"{type(name).__name__} is not allowed for map key")
    return name


def _whole(item: Projection) -> Projection:
    return item


def _type_of(fields: dict[str, Any]) -> type[Message]:
    protocol = fields.get("protocol")
    if type(protocol) is not int:
        raise BadMessage("garbage", "not a message: no protocol number")
    name = fields.get("message")
    shown = f"{name[:40]!r}" if isinstance(name, str) else "a message"
    if protocol != PROTOCOL:
        raise BadMessage("version", f"{shown} of protocol {protocol}: this program speaks protocol {PROTOCOL} only")
    if not isinstance(name, str) or name not in _TYPES:
        raise BadMessage("type", f"{shown}: no such message in protocol {PROTOCOL}")
    return _TYPES[name]


def _delta(fields: dict[str, Any], views: Mapping[Kind, View]) -> Delta:
    put = fields.pop("put", [])
    delta = msgspec.convert(fields, Delta)
    objects = _objects(delta.kind, put)
    view = views.get(delta.kind)
    return msgspec.structs.replace(delta, put=objects if view is None else tuple(map(view, objects)))


def _snapshot(fields: dict[str, Any]) -> Snapshot:
    parts = fields.get("kinds")
    lists = []
    if isinstance(parts, list):
        for part in parts:
            if isinstance(part, dict) and "objects" in part:
                lists.append(part["objects"])
                part["objects"] = []
    snapshot = msgspec.convert(fields, Snapshot)
    kinds = tuple(
        msgspec.structs.replace(part, objects=_objects(part.kind, objects))
        for part, objects in zip(snapshot.kinds, lists, strict=True)
    )
    return msgspec.structs.replace(snapshot, kinds=kinds)


def _objects(kind: Kind, items: Any) -> tuple[Projection, ...]:
    if isinstance(items, tuple):  # msgpack gives lists: these are objects already
        return items
    objects: tuple[Projection, ...] = msgspec.convert(items, _OBJECT_LISTS[kind])
    return objects


_OBJECT_LISTS: Mapping[Kind, Any] = {kind: tuple[cls, ...] for kind, cls in OBJECT_TYPES.items()}  # type: ignore[valid-type]


def _pack(value: Message | Projection, packer: msgpack.Packer) -> bytes:
    try:
        data: bytes = packer.pack(msgspec.to_builtins(value))
    except (ValueError, TypeError, OverflowError) as error:
        _refuse(value, error)
    return data


def _refuse(value: Message | Projection, error: Exception) -> NoReturn:
    name = f"{type(value).__name__} {value.key[:200]}" if isinstance(value, Projection) else type(value).__name__
    raise BadMessage("type", f"{name}: cannot be sent: {error}") from None


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code}")


@contextmanager
def _no_collection(size: int) -> Iterator[None]:
    """Pause the cyclic collector for a long message: what is decoded holds no cycles, and is walked for nothing.

    It halves the time of a snapshot of 10,000 pods.
    """
    if size < 1 << 16 or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
