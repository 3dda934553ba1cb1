"""Plain-Python twin of `kube_router._fast.ipset`: the oracle, written with ipaddress, sets and struct."""

from __future__ import annotations

import ipaddress
import re
import socket
import struct
from collections.abc import Iterable, Iterator

NESTED, NETWORK_ORDER, TYPE_MASK = 0x8000, 0x4000, 0x3FFF
ATTR_IP, ATTR_CIDR, ATTR_CADT_FLAGS, ATTR_DATA, ATTR_ADT = 1, 3, 8, 7, 8
NOMATCH = 4
SIZES = {4: 4, 6: 16}
PREFIX = re.compile(r"0|[1-9][0-9]{0,2}", re.ASCII)


def record_of(member: str, family: int) -> bytes:
    """Packed record of one member; ValueError unless it is an address or CIDR of the family."""
    address_text, slash, prefix_text = member.partition("/")
    if (slash and not PREFIX.fullmatch(prefix_text)) or "%" in address_text:
        raise ValueError(f"ipset member {member!r} is no IPv{family} address or CIDR")
    network = ipaddress.ip_network(member, strict=False)
    if network.version != family:
        raise ValueError(f"ipset member {member!r} is no IPv{family} address or CIDR")
    return network.network_address.packed + bytes([network.prefixlen])


def records_of(packed: bytes, family: int) -> list[bytes]:
    """The records of a packed set, checked as the extension checks them."""
    step = SIZES[family] + 1
    if len(packed) % step:
        raise ValueError("length")
    records = [packed[at : at + step] for at in range(0, len(packed), step)]
    if records != sorted(set(records)) or any(record[-1] > (step - 1) * 8 for record in records):
        raise ValueError("order or prefix")
    return records


def pack_members(members: Iterable[str], family: int) -> bytes:
    """As `kube_router._fast.ipset.pack_members`."""
    return b"".join(sorted({record_of(member, family) for member in members}))


def unpack_members(packed: bytes, family: int) -> list[str]:
    """As `kube_router._fast.ipset.unpack_members`."""
    members = []
    for record in records_of(packed, family):
        address = socket.inet_ntop(socket.AF_INET if family == 4 else socket.AF_INET6, record[:-1])
        members.append(address if record[-1] == SIZES[family] * 8 else f"{address}/{record[-1]}")
    return members


def diff_members(actual: bytes, desired: bytes, family: int) -> tuple[bytes, bytes]:
    """As `kube_router._fast.ipset.diff_members`."""
    have, want = set(records_of(actual, family)), set(records_of(desired, family))
    return b"".join(sorted(want - have)), b"".join(sorted(have - want))


def attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute with its padding."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def adt_payloads(packed: bytes, family: int, with_cidr: bool, max_bytes: int = 60000) -> list[bytes]:
    """As `kube_router._fast.ipset.adt_payloads`."""
    entries = []
    for record in records_of(packed, family):
        if (record[-1] == 0) if with_cidr else (record[-1] != SIZES[family] * 8):
            raise ValueError("not storable")
        address = attribute(NETWORK_ORDER | (1 if family == 4 else 2), record[:-1])
        prefix = attribute(ATTR_CIDR, record[-1:]) if with_cidr else b""
        entries.append(attribute(NESTED | ATTR_DATA, attribute(NESTED | ATTR_IP, address) + prefix))
    size = 12 + SIZES[family] + (8 if with_cidr else 0)
    if not 4 + size <= max_bytes <= 0xFFFF:
        raise ValueError("max_bytes")
    most = (max_bytes - 4) // size
    return [attribute(NESTED | ATTR_ADT, b"".join(entries[at : at + most])) for at in range(0, len(entries), most)]


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """``(type, value)`` of each attribute in ``data``; ValueError when one does not fit."""
    at = 0
    while at < len(data):
        if len(data) - at < 4:
            raise ValueError("cut off")
        length, kind = struct.unpack_from("=HH", data, at)
        if not 4 <= length <= len(data) - at:
            raise ValueError("length")
        yield kind & TYPE_MASK, data[at + 4 : at + length]
        at += (length + 3) & ~3


def entry_record(data: bytes, family: int) -> bytes | None:
    """Packed record of one IPSET_ATTR_DATA value; None for ``nomatch``."""
    address, prefix, matches = None, SIZES[family] * 8, True
    for kind, value in attributes(data):
        if kind == ATTR_IP:
            inner_kind, address = next(attributes(value or b"\0"))
            if inner_kind != (1 if family == 4 else 2) or len(address) != SIZES[family]:
                raise ValueError("family")
        elif kind == ATTR_CIDR:
            if len(value) != 1 or value[0] > SIZES[family] * 8:
                raise ValueError("prefix")
            prefix = value[0]
        elif kind == ATTR_CADT_FLAGS and len(value) == 4:
            matches = not int.from_bytes(value, "big") & NOMATCH
    if address is None:
        raise ValueError("no address")
    network = ipaddress.ip_network((address, prefix), strict=False)
    return network.network_address.packed + bytes([prefix]) if matches else None


def parse_adt(messages: Iterable[bytes], family: int) -> bytes:
    """As `kube_router._fast.ipset.parse_adt`."""
    records = set()
    for message in messages:
        kind, entries = next(attributes(message or b"\0"))
        if kind != ATTR_ADT:
            raise ValueError("not an ADT")
        for entry_kind, entry in attributes(entries):
            if entry_kind != ATTR_DATA:
                raise ValueError("not a DATA")
            records.add(entry_record(entry, family))
    return b"".join(sorted(record for record in records if record is not None))
