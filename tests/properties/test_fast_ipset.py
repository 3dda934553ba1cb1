"""Packed ipset members: equal to the twin's for any members, any two sets and any bytes."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support import twin_ipset as twin

from kube_router._fast import ipset

FAMILIES = st.sampled_from([4, 6])
KINDS = st.sampled_from(["address", "address,port", "port"])
BITS = {4: 32, 6: 128}


@st.composite
def member(draw: st.DrawFn, family: int, kind: str) -> str:
    """An address or a CIDR, with or without host bits; an endpoint; a port."""
    port = draw(st.integers(0, 65535))
    if kind == "port":
        return str(port)
    address = str(draw(st.ip_addresses(v=family)))  # type: ignore[call-overload]
    if kind == "address,port":
        protocol = draw(st.sampled_from(["tcp", "udp", "sctp"]) | st.integers(1, 255).map(str))
        return f"{address},{protocol}:{port}"
    prefix = draw(st.none() | st.integers(0, BITS[family]))
    return address if prefix is None else f"{address}/{prefix}"


@st.composite
def members(draw: st.DrawFn, kinds: st.SearchStrategy[str] = KINDS) -> tuple[int, str, list[str]]:
    """A family, a kind and members of them, some of them twice."""
    family, kind = draw(FAMILIES), draw(kinds)
    chosen = draw(st.lists(member(family, kind), max_size=30))
    return family, kind, chosen + chosen[: draw(st.integers(0, 3))]


@st.composite
def two_sets(draw: st.DrawFn) -> tuple[int, str, bytes, bytes]:
    """Two packed sets of one family and kind that share some members."""
    family, kind = draw(FAMILIES), draw(KINDS)
    shared, left, right = (draw(st.lists(member(family, kind), max_size=12)) for _ in range(3))
    return family, kind, twin.pack_members(shared + left, family, kind), twin.pack_members(shared + right, family, kind)


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result, or the exception's type."""
    try:
        return function(*arguments)
    except (ValueError, TypeError) as error:
        return type(error)


@given(members())
def test_pack_and_unpack_as_the_twin(case: tuple[int, str, list[str]]) -> None:
    family, kind, chosen = case
    packed = ipset.pack_members(iter(chosen), family, kind)
    assert packed == twin.pack_members(chosen, family, kind)
    assert ipset.unpack_members(packed, family, kind) == twin.unpack_members(packed, family, kind)
    assert ipset.pack_members(ipset.unpack_members(packed, family, kind), family, kind) == packed


@given(
    FAMILIES,
    KINDS,
    st.text(max_size=60) | st.from_regex(r"[0-9a-f:./%,tcpuds]{0,50}") | members().map(lambda case: case[2][:1]),
)
def test_any_text_is_taken_or_refused_as_by_the_twin(family: int, kind: str, text: str | list[str]) -> None:
    items = [text] if isinstance(text, str) else text
    assert outcome(ipset.pack_members, items, family, kind) == outcome(twin.pack_members, items, family, kind)


@pytest.mark.parametrize(
    ("family", "bad"),
    [
        (4, ""), (4, "/"), (4, "10.0.0.1/"), (4, "/8"), (4, "10.0.0.1/33"), (4, "10.0.0.1/08"), (4, "10.0.0.1/+8"),
        (4, "10.0.0.1/255.0.0.0"), (4, "10.0.0.01"), (4, "10.0.1"), (4, " 10.0.0.1"), (4, "10.0.0.1\0"), (4, "fd00::1"),
        (4, "10.0.0.1/8/8"), (4, "١٠.0.0.1"), (4, "10.0.0.1/1000"),
        (6, "10.0.0.1"), (6, "fd00::1/129"), (6, "fe80::1%eth0"), (6, "fd00:::1"), (6, "fd00::/64\0"), (6, ":"),
        (6, "0" * 46 + "::"), (6, "fd00::1/0064"),
    ],
)  # fmt: skip
def test_bad_member_is_named(family: int, bad: str) -> None:
    with pytest.raises(ValueError, match=f"is no IPv{family} address or CIDR") as caught:
        ipset.pack_members(["192.0.2.1" if family == 4 else "2001:db8::1", bad], family)
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("address,port", "10.0.0.1"), ("address,port", "10.0.0.1,tcp"), ("address,port", "10.0.0.1,80"),
        ("address,port", "10.0.0.1,tcp:"), ("address,port", "10.0.0.1,tcp:65536"), ("address,port", "10.0.0.1,tcp:080"),
        ("address,port", "10.0.0.1,TCP:80"), ("address,port", "10.0.0.1,0:80"), ("address,port", "10.0.0.1,256:80"),
        ("address,port", "10.0.0.1/32,tcp:80"), ("address,port", "10.0.0.1,tcp:80:80"), ("address,port", ",tcp:80"),
        ("address,port", "10.0.0.1,:80"), ("address,port", "10.0.0.1,tcp:80\0"), ("address,port", "fd00::1,tcp:80"),
        ("port", ""), ("port", "-1"), ("port", "65536"), ("port", "tcp:80"), ("port", " 80"), ("port", "08"),
    ],
)  # fmt: skip
def test_bad_port_is_named(kind: str, bad: str) -> None:
    with pytest.raises(ValueError, match=r"is no (port|IPv4 address,protocol:port)$") as caught:
        ipset.pack_members(["80" if kind == "port" else "192.0.2.1,tcp:80", bad], 4, kind)
    assert repr(bad) in str(caught.value)


def test_known_bytes() -> None:
    assert ipset.pack_members(["10.1.2.3/16", "10.0.0.1"], 4) == bytes.fromhex("0a00000120 0a01000010")
    assert ipset.pack_members(["fd00::1/64"], 6) == bytes.fromhex("fd00") + bytes(14) + b"\x40"
    assert ipset.adt_payloads(ipset.pack_members(["10.1.0.0/16"], 4), 4, True) == [
        struct.pack("=HH", 28, 0x8008)
        + struct.pack("=HH", 24, 0x8007)
        + struct.pack("=HH", 12, 0x8001)
        + struct.pack("=HH", 8, 0x4001)
        + bytes([10, 1, 0, 0])
        + struct.pack("=HH", 5, 3)
        + b"\x10\0\0\0"
    ]
    endpoint = ipset.pack_members(["10.1.0.0,udp:8080"], 4, "address,port")
    assert endpoint == bytes([10, 1, 0, 0, 17, 0x1F, 0x90])
    assert ipset.adt_payloads(endpoint, 4, False, kind="address,port") == [
        struct.pack("=HH", 36, 0x8008)
        + struct.pack("=HH", 32, 0x8007)
        + struct.pack("=HH", 12, 0x8001)
        + struct.pack("=HH", 8, 0x4001)
        + bytes([10, 1, 0, 0])
        + struct.pack("=HH", 6, 0x4004)
        + b"\x1f\x90\0\0"
        + struct.pack("=HH", 5, 7)
        + b"\x11\0\0\0"
    ]
    assert ipset.adt_payloads(ipset.pack_members(["8080"], 6, "port"), 6, False, kind="port") == [
        struct.pack("=HH", 16, 0x8008)
        + struct.pack("=HH", 12, 0x8007)
        + struct.pack("=HH", 6, 0x4004)
        + b"\x1f\x90\0\0"
    ]


@given(two_sets())
def test_diff_as_the_twin_and_as_set_algebra(case: tuple[int, str, bytes, bytes]) -> None:
    family, kind, actual, desired = case
    to_add, to_delete = ipset.diff_members(actual, desired, family, kind)
    assert (to_add, to_delete) == twin.diff_members(actual, desired, family, kind)
    have, want = (set(ipset.unpack_members(packed, family, kind)) for packed in (actual, desired))
    assert set(ipset.unpack_members(to_add, family, kind)) == want - have
    assert set(ipset.unpack_members(to_delete, family, kind)) == have - want
    assert ipset.diff_members(desired, desired, family, kind) == (b"", b"")


@given(FAMILIES, KINDS, st.binary(max_size=60), st.binary(max_size=60))
def test_unordered_or_cut_sets_are_refused_as_by_the_twin(family: int, kind: str, left: bytes, right: bytes) -> None:
    assume(left != right)
    assert outcome(ipset.diff_members, left, right, family, kind) == outcome(
        twin.diff_members, left, right, family, kind
    )
    assert outcome(ipset.unpack_members, left, family, kind) == outcome(twin.unpack_members, left, family, kind)


@given(members(), st.booleans(), st.integers(0, 400))
def test_payloads_as_the_twin(case: tuple[int, str, list[str]], with_cidr: bool, max_bytes: int) -> None:
    family, kind, chosen = case
    packed = twin.pack_members(chosen, family, kind)
    mine = outcome(ipset.adt_payloads, packed, family, with_cidr, max_bytes, kind)
    assert mine == outcome(twin.adt_payloads, packed, family, with_cidr, max_bytes, kind)
    if mine is not ValueError:
        assert all(len(payload) <= max_bytes and len(payload) % 4 == 0 for payload in mine)
        assert ipset.parse_adt(mine, family, kind) == packed


def test_many_members_are_split_below_the_longest_attribute() -> None:
    packed = ipset.pack_members((str(ipaddress.ip_address(0x0A000000 + i)) for i in range(6000)), 4)
    payloads = ipset.adt_payloads(packed, 4, with_cidr=True)
    assert [len(payload) for payload in payloads] == [4 + 2499 * 24, 4 + 2499 * 24, 4 + 1002 * 24]
    assert ipset.parse_adt(payloads, 4) == packed
    with pytest.raises(ValueError, match="max_bytes must be 28 to 65535, not 65536"):
        ipset.adt_payloads(packed, 4, True, 65536)


@pytest.mark.parametrize(("family", "everything"), [(4, "0.0.0.0/0"), (6, "::/0")])
def test_what_the_set_type_cannot_hold_is_refused(family: int, everything: str) -> None:
    with pytest.raises(ValueError, match=f"{everything}: hash:net has no prefix length 0"):
        ipset.adt_payloads(ipset.pack_members([everything], family), family, True)
    with pytest.raises(ValueError, match="holds single addresses only"):
        ipset.adt_payloads(ipset.pack_members([everything], family), family, False)


@given(FAMILIES, KINDS, st.lists(st.binary(max_size=80), max_size=3))
def test_any_bytes_are_parsed_or_refused_as_by_the_twin(family: int, kind: str, messages: list[bytes]) -> None:
    assert outcome(ipset.parse_adt, messages, family, kind) == outcome(twin.parse_adt, messages, family, kind)


@given(members(), st.data())
def test_damaged_replies_are_parsed_or_refused_as_by_the_twin(
    case: tuple[int, str, list[str]], data: st.DataObject
) -> None:
    family, kind, chosen = case
    with suppress(ValueError):
        payloads = twin.adt_payloads(twin.pack_members(chosen, family, kind), family, True, kind=kind)
        assume(payloads)
        damaged = bytearray(payloads[0])
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
        for message in (bytes(damaged), cut):
            assert outcome(ipset.parse_adt, [message], family, kind) == outcome(twin.parse_adt, [message], family, kind)


@pytest.mark.parametrize("family", [4, 6])
def test_entries_of_a_listing_may_carry_more(family: int) -> None:
    """Timeout, counters and comment of an entry are passed by; an exception (nomatch) is no member."""
    address = ipaddress.ip_address("10.0.0.0" if family == 4 else "fd00::").packed
    where = twin.attribute(0x8001, twin.attribute(0x4000 | (1 if family == 4 else 2), address))
    plain = where + twin.attribute(3, b"\x08") + twin.attribute(6 | 0x4000, bytes(4)) + twin.attribute(26, b"note\0")
    exception = plain + twin.attribute(8 | 0x4000, (4).to_bytes(4, "big"))
    reply = twin.attribute(0x8008, twin.attribute(0x8007, plain) + twin.attribute(0x8007, exception))
    assert ipset.unpack_members(ipset.parse_adt([reply], family), family) == [f"{ipaddress.ip_address(address)}/8"]
    only_exception = twin.attribute(0x8008, twin.attribute(0x8007, exception))
    assert ipset.parse_adt([only_exception], family) == b""


def test_the_other_family_in_a_reply_is_refused() -> None:
    payloads = ipset.adt_payloads(ipset.pack_members(["fd00::1"], 6), 6, False)
    with pytest.raises(ValueError, match="not of family IPv4"):
        ipset.parse_adt(payloads, 4)


@pytest.mark.parametrize(
    ("kind", "of", "lacks"),
    [("address,port", "address", "a port"), ("port", "address", "a port"), ("address", "port", "an address")],
)
def test_an_entry_of_another_kind_is_refused(kind: str, of: str, lacks: str) -> None:
    other = ipset.pack_members(["10.0.0.1" if of == "address" else "80"], 4, of)
    with pytest.raises(ValueError, match=f"without {lacks}"):
        ipset.parse_adt(ipset.adt_payloads(other, 4, False, kind=of), 4, kind)


def test_kinds_are_three() -> None:
    with pytest.raises(ValueError, match="kind must be address, address,port or port, not hash:ip"):
        ipset.pack_members([], 4, "hash:ip")


@pytest.mark.parametrize("family", [0, 2, 10, -4])
def test_families_are_4_and_6(family: int) -> None:
    for call in (
        lambda: ipset.pack_members([], family),
        lambda: ipset.unpack_members(b"", family),
        lambda: ipset.diff_members(b"", b"", family),
        lambda: ipset.adt_payloads(b"", family, True),
        lambda: ipset.parse_adt([], family),
    ):
        with pytest.raises(ValueError, match=f"family must be 4 or 6, not {family}"):
            call()


def test_types_are_checked() -> None:
    """A wrong type is a TypeError, never a crash of the process."""
    for call in (
        lambda: ipset.pack_members("10.0.0.1", 4),
        lambda: ipset.pack_members([b"10.0.0.1"], 4),  # type: ignore[list-item]
        lambda: ipset.pack_members([None], 4),  # type: ignore[list-item]
        lambda: ipset.unpack_members(None, 4),  # type: ignore[arg-type]
        lambda: ipset.diff_members(None, b"", 4),  # type: ignore[arg-type]
        lambda: ipset.adt_payloads("", 4, True),  # type: ignore[arg-type]
        lambda: ipset.parse_adt(b"", 4),  # type: ignore[arg-type]
        lambda: ipset.parse_adt([None], 4),  # type: ignore[list-item]
    ):
        with pytest.raises(TypeError):
            call()
