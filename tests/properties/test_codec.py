"""The codec: every message survives the wire, and whatever else comes from it is one kind of error."""

from __future__ import annotations

import gc
import math
from typing import Any

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.message_strategies import structs

from kube_router.ipc import codec
from kube_router.ipc.codec import BadMessage, decode, encode
from kube_router.ipc.messages import (
    KINDS,
    OBJECT_TYPES,
    PROTOCOL,
    Beacon,
    Delta,
    Heartbeat,
    KindSnapshot,
    Message,
    Namespace,
    Node,
    Notice,
    Pod,
    Projection,
    Service,
    ServicePort,
    Snapshot,
    SnapshotRequest,
    SourceState,
    StatusReply,
    StatusRequest,
)

MESSAGES: list[type[Message]] = [
    SnapshotRequest,
    Snapshot,
    Delta,
    Beacon,
    Notice,
    Heartbeat,
    StatusRequest,
    StatusReply,
]
SLOW_STRATEGIES = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def test_every_message_class_is_tested() -> None:
    assert set(Message.__subclasses__()) == set(MESSAGES)


@pytest.mark.parametrize("cls", MESSAGES)
@given(data=st.data())
@SLOW_STRATEGIES
def test_a_message_survives_the_wire(cls: type[Message], data: st.DataObject) -> None:
    message = data.draw(structs(cls))
    assert decode(encode(message)) == message


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@SLOW_STRATEGIES
def test_a_projection_survives_the_wire(kind: Any, data: st.DataObject) -> None:
    item = data.draw(structs(OBJECT_TYPES[kind]))
    part = KindSnapshot(kind=kind, seq=1, objects=(item,))
    received = decode(encode(Snapshot(epoch="e", state=SourceState(source="s"), kinds=(part,))))
    assert isinstance(received, Snapshot)
    assert received.kinds[0].objects == (item,)
    assert type(received.kinds[0].objects[0]) is OBJECT_TYPES[kind]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@SLOW_STRATEGIES
def test_a_view_is_applied_to_every_object_of_its_kind_and_to_no_other(kind: Any, data: st.DataObject) -> None:
    items = tuple(data.draw(st.lists(structs(OBJECT_TYPES[kind]), max_size=3)))
    other = Namespace(name="other", labels={"a": "b"}) if kind != "namespaces" else Node(name="other", pod_cidr="x")
    parts = (
        KindSnapshot(kind="nodes" if kind == "namespaces" else "namespaces", seq=1, objects=(other,)),
        KindSnapshot(kind=kind, seq=2, objects=items),
    )

    def bare(item: Projection) -> Projection:
        return OBJECT_TYPES[kind](name=item.name, namespace=item.namespace)

    views = {kind: bare}
    received = decode(encode(Snapshot(epoch="e", state=SourceState(source="s"), kinds=parts)), views)
    assert isinstance(received, Snapshot)
    assert [part.objects for part in received.kinds] == [(other,), tuple(map(bare, items))]
    delta = decode(encode(Delta(epoch="e", kind=kind, seq=3, put=items)), views)
    assert isinstance(delta, Delta) and delta.put == tuple(map(bare, items))
    assert decode(encode(Delta(epoch="e", kind="pods", seq=3)), {"nodes": bare}) == Delta(epoch="e", kind="pods", seq=3)


SEEDS = [
    encode(message)
    for message in (
        SnapshotRequest(worker="router", kinds=("nodes",)),
        Delta(epoch="e", kind="pods", seq=3, put=(Pod(name="a", namespace="b", ips=("10.0.0.1",)),), gone=("b/c",)),
        Beacon(epoch="e", seqs={"nodes": 3}, state=SourceState(source="api", confirmed=1.5)),
        Snapshot(
            epoch="e",
            state=SourceState(source="s"),
            kinds=(
                KindSnapshot(kind="nodes", seq=1, objects=(Node(name="n", pod_cidrs=("10.0.0.0/24",)),)),
                KindSnapshot(
                    kind="services",
                    seq=9,
                    objects=(Service(name="s", namespace="x", ports=(ServicePort(port=80, target_port="http"),)),),
                ),
            ),
        ),
        Notice(worker="cni", kind="Node", name="n", reason="R", text="t"),
        Heartbeat(worker="cni", pid=1, started=1.0, sent=2.0, counts={"a": 1.0}),
        StatusRequest(),
    )
]


@given(seed=st.sampled_from(SEEDS), data=st.data())
@SLOW_STRATEGIES
def test_mutated_bytes_are_a_message_or_a_bad_message(seed: bytes, data: st.DataObject) -> None:
    mutated = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 4))):
        action = data.draw(st.sampled_from(("set", "delete", "insert", "cut", "double")))
        at = data.draw(st.integers(0, max(0, len(mutated) - 1)))
        if action == "set" and mutated:
            mutated[at] = data.draw(st.integers(0, 255))
        elif action == "delete":
            del mutated[at : at + data.draw(st.integers(1, 8))]
        elif action == "insert":
            mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif action == "cut":
            del mutated[at:]
        else:
            mutated[at:at] = mutated[at : at + 16]
    try:
        message = decode(bytes(mutated))
    except BadMessage as error:
        assert error.reason in ("garbage", "version", "type")
        assert str(error)
    else:
        assert_whole(message)


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
def test_random_bytes_are_a_bad_message(data: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(seed=st.sampled_from(SEEDS), data=st.data())
@SLOW_STRATEGIES
def test_a_field_of_any_value_is_taken_whole_or_not_at_all(seed: bytes, data: st.DataObject) -> None:
    fields = msgpack.unpackb(seed)
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(JSON)
    try:
        message = decode(msgpack.packb(fields))
    except BadMessage:
        return
    assert_whole(message)


def assert_whole(message: Message) -> None:
    """The message keeps the contract in every field: what decodes also encodes, and to itself."""
    again = decode(encode(message))
    assert again == message or "nan" in repr(message)
    if isinstance(message, Delta):
        assert all(type(item) is OBJECT_TYPES[message.kind] for item in message.put)
    if isinstance(message, Snapshot):
        assert all(type(item) is OBJECT_TYPES[part.kind] for part in message.kinds for item in part.objects)


BEGUN = b"\x82" + msgpack.packb("message") + msgpack.packb("Snapshot")
KINDS_OF_IT = BEGUN + msgpack.packb("kinds") + b"\x91"
OBJECTS_OF_IT = KINDS_OF_IT + b"\x82" + b"".join(map(msgpack.packb, ("kind", "nodes", "objects")))

HOSTILE = {
    "a snapshot without an end": BEGUN,
    "a snapshot of 4 billion kinds": BEGUN + msgpack.packb("kinds") + b"\xdd\xff\xff\xff\xff",
    "a snapshot's kinds are a map": BEGUN + msgpack.packb("kinds") + b"\x80",
    "a snapshot's kind is a list": KINDS_OF_IT + b"\x90",
    "a snapshot's kind is unhashable": KINDS_OF_IT
    + b"\x82"
    + msgpack.packb("kind")
    + b"\x90"
    + msgpack.packb("objects")
    + b"\x90",
    "a snapshot of 4 billion objects": OBJECTS_OF_IT + b"\xdd\xff\xff\xff\xff",
    "a snapshot of a string of 4 GiB": OBJECTS_OF_IT + b"\x91\xdb\xff\xff\xff\xff",
    "a snapshot with deep lists": OBJECTS_OF_IT + b"\x91" * 100_000 + b"\xc0",
    "a snapshot with a number as a key": BEGUN + b"\x01\x02",
    "a snapshot with a list as a key": BEGUN + b"\x90\x02",
    "a snapshot with a number as a key of a kind": KINDS_OF_IT + b"\x81\x01\x02",
    "a snapshot and more": encode(Snapshot(epoch="e", state=SourceState(source="s"), kinds=())) + b"\x07",
    "deep lists": b"\x91" * 100_000 + b"\xc0",
    "deep maps": b"\x81\xa1a" * 100_000 + b"\xc0",
    "deep in an unknown field": msgpack.packb({"protocol": PROTOCOL, "message": "StatusRequest"})[:-1]
    + b"\xa1t\xa1x"
    + b"\x91" * 100_000,
    "list of 4 billion": b"\xdd\xff\xff\xff\xff",
    "map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "string of 4 GiB": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 GiB": b"\xc6\xff\xff\xff\xff",
    "lists that each reserve room": b"\xdd\x00\x0f\x00\x00" * 100_000,
    "wide and deep lists": b"\xdc\xff\xff" * 100_000,
    "extension": b"\x81\xa1a\xd4\x05\x00",
    "empty extension": b"\x81\xa1a\xc7\x00\x05",
    "timestamp": b"\x81\xa1a\xd6\xff\x00\x00\x00\x00",
    "bytes": b"\x81\xa1a\xc4\x01a",
    "number as a key": b"\x81\x01\x02",
    "list as a key": b"\x81\x90\x02",
    "not UTF-8": b"\x81\xa1\xff\x02",
    "a list": b"\x90",
    "a number": b"\x07",
    "two messages": encode(StatusRequest()) * 2,
    "no protocol": msgpack.packb({"message": "StatusRequest"}),
    "true for a protocol": msgpack.packb({"message": "StatusRequest", "protocol": True}),
    "float for a protocol": msgpack.packb({"message": "StatusRequest", "protocol": 1.0}),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_garbage(data: bytes) -> None:
    with pytest.raises(BadMessage) as caught:
        decode(data)
    assert caught.value.reason == "garbage"


def packed(**fields: object) -> bytes:
    return bytes(msgpack.packb({"protocol": PROTOCOL, **fields}))


WRONG = {
    "unknown message": (packed(message="Nonsense"), "'Nonsense'"),
    "message is no text": (packed(message=7), "no such message"),
    "base class": (packed(message="Message"), "'Message'"),
    "missing field": (packed(message="Delta", kind="pods", seq=1), "epoch"),
    "unknown kind": (packed(message="Delta", epoch="e", kind="secrets", seq=1), r"\$.kind"),
    "unhashable kind": (packed(message="Delta", epoch="e", kind=[], seq=1), r"\$.kind"),
    "objects are no list": (packed(message="Delta", epoch="e", kind="pods", seq=1, put=5), "array"),
    "object of another shape": (packed(message="Delta", epoch="e", kind="pods", seq=1, put=[{"name": 5}]), "name"),
    "object without a name": (packed(message="Delta", epoch="e", kind="pods", seq=1, put=[{}]), "name"),
    "text for a number": (packed(message="Delta", epoch="e", kind="pods", seq="1"), "seq"),
    "snapshot kinds are no list": (packed(message="Snapshot", epoch="e", state={"source": ""}, kinds={}), "kinds"),
    "snapshot part is no map": (packed(message="Snapshot", epoch="e", state={"source": ""}, kinds=[5]), "kinds"),
    "snapshot part without objects": (
        packed(message="Snapshot", epoch="e", state={"source": ""}, kinds=[{"kind": "pods", "seq": 1}]),
        "objects",
    ),
    "second of two objects is wrong": (
        packed(
            message="Snapshot",
            epoch="e",
            state={"source": ""},
            kinds=[{"kind": "pods", "seq": 1, "objects": [{"name": "a"}, {"name": "b", "ips": "10.0.0.1"}]}],
        ),
        "ips",
    ),
}


@pytest.mark.parametrize(("data", "named"), WRONG.values(), ids=WRONG.keys())
def test_a_breach_of_the_contract_names_the_field(data: bytes, named: str) -> None:
    with pytest.raises(BadMessage, match=named) as caught:
        decode(data)
    assert caught.value.reason == "type"


def test_another_protocol_is_told_with_both_numbers() -> None:
    data = msgpack.packb({"message": "Delta", "protocol": PROTOCOL + 1, "future": {"field": [1]}})
    with pytest.raises(BadMessage, match=f"'Delta' of protocol {PROTOCOL + 1}: .* protocol {PROTOCOL} only") as caught:
        decode(data)
    assert caught.value.reason == "version"


def test_an_unknown_field_is_no_error() -> None:
    assert decode(packed(message="StatusRequest", news=[1, 2])) == StatusRequest()


@pytest.mark.parametrize(
    ("item", "named"),
    [
        (Service(name="s", namespace="x", ports=(ServicePort(port=2**64),)), "Service x/s: cannot be sent"),
        (Pod(name="p", namespace="x", phase="\ud800"), "Pod x/p: cannot be sent"),
        (Node(name="n", labels={"l": "x" * codec.MAX_OBJECT_BYTES}), "Node n: .* the bound is"),
    ],
)
def test_what_cannot_be_sent_is_named(item: Any, named: str) -> None:
    with pytest.raises(BadMessage, match=named):
        codec.encode_object(item, codec.object_packer())


def test_the_packer_goes_on_after_a_refusal() -> None:
    packer = codec.object_packer()
    good = Pod(name="p", namespace="x")
    with pytest.raises(BadMessage):
        codec.encode_object(Pod(name="p", namespace="x", labels={"a": "\ud800"}), packer)
    assert codec.encode_object(good, packer) == codec.encode_object(good, codec.object_packer())


def test_a_message_beyond_the_bound_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(StatusRequest())
    monkeypatch.setattr(codec, "MAX_BYTES", len(data) - 1)
    with pytest.raises(BadMessage, match="the bound is"):
        decode(data)


def test_the_collector_runs_again_after_a_long_message() -> None:
    pods = tuple(Pod(name=f"pod-{number}", namespace="x") for number in range(5000))
    data = encode(Delta(epoch="e", kind="pods", seq=1, put=pods))
    assert len(data) > 1 << 16
    for bad in (False, True):
        if bad:
            with pytest.raises(BadMessage):
                decode(data[:-1])
        else:
            decode(data)
        assert gc.isenabled()


def test_put_together_from_parts_is_the_same_message() -> None:
    pods = (Pod(name="a", namespace="x"), Pod(name="b", namespace="x", ips=("fd00::1",)))
    packer = codec.object_packer()
    data = codec.encode_delta("e", "pods", 7, [codec.encode_object(pod, packer) for pod in pods], ["x/c"])
    assert decode(data) == Delta(epoch="e", kind="pods", seq=7, put=pods, gone=("x/c",))
    assert msgspec.msgpack.decode(data)["message"] == "Delta"


def test_infinity_survives_the_wire() -> None:
    state = SourceState(source="s", confirmed=math.inf)
    assert decode(encode(Beacon(epoch="e", seqs={}, state=state))) == Beacon(epoch="e", seqs={}, state=state)
