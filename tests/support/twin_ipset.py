"""Plain-Python twin of `kube_router._fast.ipset`: the oracle, written with ipaddress, sets and struct."""

from __future__ import annotations

import ipaddress
import re
import socket
import struct
from collections.abc import Iterable, Iterator

NESTED, NETWORK_ORDER, TYPE_MASK = 0x8000, 0x4000, 0x3FFF
ATTR_IP, ATTR_CIDR, ATTR_PORT, ATTR_PROTO, ATTR_CADT_FLAGS, ATTR_DATA, ATTR_ADT = 1, 3, 4, 7, 8, 7, 8
NOMATCH = 4
SIZES = {4: 4, 6: 16}
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
PREFIX = re.compile(r"0|[1-9][0-9]{0,2}", re.ASCII)
NUMBER = re.compile(r"0|[1-9][0-9]{0,4}", re.ASCII)
ENDPOINT = re.compile(r"([^,]*),([^:]*):(.*)", re.DOTALL)
SUFFIX = {"address": 1, "address,port": 3, "port": 2}


def number_of(text: str, most: int) -> int:
    """A plain decimal number; ValueError."""
    if not NUMBER.fullmatch(text) or int(text) > most:
        raise ValueError(f"{text!r} is no number up to {most}")
    return int(text)


def step_of(family: int, kind: str) -> int:
    """Bytes of one record."""
    return SUFFIX[kind] + (0 if kind == "port" else SIZES[family])


def record_of(member: str, family: int, kind: str = "address") -> bytes:
    """Packed record of one member; ValueError unless it is one of that family and kind."""
    if kind == "port":
        return struct.pack(">H", number_of(member, 65535))
    if kind == "address":
        return network_record(member, family)
    found = ENDPOINT.fullmatch(member)
    if not found or "%" in found[1] or "/" in found[1]:
        raise ValueError(f"ipset member {member!r} is no IPv{family} address,protocol:port")
    address = ipaddress.ip_address(found[1])
    protocol = PROTOCOLS.get(found[2]) or number_of(found[2], 255)
    if address.version != family or protocol == 0:
        raise ValueError(f"ipset member {member!r} is no IPv{family} address,protocol:port")
    return address.packed + struct.pack(">BH", protocol, number_of(found[3], 65535))


def network_record(member: str, family: int) -> bytes:
    """Packed record of an address or CIDR."""
    address_text, slash, prefix_text = member.partition("/")
    if (slash and not PREFIX.fullmatch(prefix_text)) or "%" in address_text:
        raise ValueError(f"ipset member {member!r} is no IPv{family} address or CIDR")
    network = ipaddress.ip_network(member, strict=False)
    if network.version != family:
        raise ValueError(f"ipset member {member!r} is no IPv{family} address or CIDR")
    return network.network_address.packed + bytes([network.prefixlen])


def records_of(packed: bytes, family: int, kind: str = "address") -> list[bytes]:
    """The records of a packed set, checked as the extension checks them."""
    step = step_of(family, kind)
    if len(packed) % step:
        raise ValueError("length")
    records = [packed[at : at + step] for at in range(0, len(packed), step)]
    if records != sorted(set(records)):
        raise ValueError("order")
    if kind == "address" and any(record[-1] > (step - 1) * 8 for record in records):
        raise ValueError("prefix")
    return records


def pack_members(members: Iterable[str], family: int, kind: str = "address") -> bytes:
    """As `kube_router._fast.ipset.pack_members`."""
    return b"".join(sorted({record_of(member, family, kind) for member in members}))


def text_of(record: bytes, family: int, kind: str) -> str:
    """One member as text."""
    if kind == "port":
        return str(int.from_bytes(record, "big"))
    size = SIZES[family]
    address = socket.inet_ntop(socket.AF_INET if family == 4 else socket.AF_INET6, record[:size])
    if kind == "address":
        return address if record[-1] == size * 8 else f"{address}/{record[-1]}"
    names = {number: name for name, number in PROTOCOLS.items()}
    protocol, port = struct.unpack_from(">BH", record, size)
    return f"{address},{names.get(protocol, protocol)}:{port}"


def unpack_members(packed: bytes, family: int, kind: str = "address") -> list[str]:
    """As `kube_router._fast.ipset.unpack_members`."""
    return [text_of(record, family, kind) for record in records_of(packed, family, kind)]


def diff_members(actual: bytes, desired: bytes, family: int, kind: str = "address") -> tuple[bytes, bytes]:
    """As `kube_router._fast.ipset.diff_members`."""
    have, want = set(records_of(actual, family, kind)), set(records_of(desired, family, kind))
    return b"".join(sorted(want - have)), b"".join(sorted(have - want))


def attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute with its padding."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def entry_of(record: bytes, family: int, with_cidr: bool, kind: str) -> bytes:
    """One IPSET_ATTR_DATA attribute."""
    size = 0 if kind == "port" else SIZES[family]
    parts = b""
    if size:
        address = attribute(NETWORK_ORDER | (1 if family == 4 else 2), record[:size])
        parts += attribute(NESTED | ATTR_IP, address)
    if kind != "address":
        parts += attribute(NETWORK_ORDER | ATTR_PORT, record[-2:])
    if kind == "address,port":
        parts += attribute(ATTR_PROTO, record[size : size + 1])
    if kind == "address" and with_cidr:
        parts += attribute(ATTR_CIDR, record[-1:])
    return attribute(NESTED | ATTR_DATA, parts)


def adt_payloads(
    packed: bytes, family: int, with_cidr: bool, max_bytes: int = 60000, kind: str = "address"
) -> list[bytes]:
    """As `kube_router._fast.ipset.adt_payloads`."""
    records = records_of(packed, family, kind)
    if kind == "address":
        for record in records:
            if (record[-1] == 0) if with_cidr else (record[-1] != SIZES[family] * 8):
                raise ValueError("not storable")
    entries = [entry_of(record, family, with_cidr, kind) for record in records]
    size = len(entry_of(bytes(step_of(family, kind)), family, with_cidr, kind))
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


def entry_record(data: bytes, family: int, kind: str) -> bytes | None:
    """Packed record of one IPSET_ATTR_DATA value; None for ``nomatch``."""
    address, prefix, port, protocol, matches = None, SIZES[family] * 8, None, None, True
    for attribute_kind, value in attributes(data):
        if attribute_kind == ATTR_IP and kind != "port":
            inner_kind, address = next(attributes(value or b"\0"))
            if inner_kind != (1 if family == 4 else 2) or len(address) != SIZES[family]:
                raise ValueError("family")
        elif attribute_kind == ATTR_CIDR and kind == "address":
            if len(value) != 1 or value[0] > SIZES[family] * 8:
                raise ValueError("prefix")
            prefix = value[0]
        elif attribute_kind == ATTR_PORT and len(value) == 2:
            port = value
        elif attribute_kind == ATTR_PROTO and len(value) == 1:
            protocol = value
        elif attribute_kind == ATTR_CADT_FLAGS and len(value) == 4:
            matches = not int.from_bytes(value, "big") & NOMATCH
    record = assembled(family, kind, address, prefix, port, protocol)
    return record if matches else None


def assembled(
    family: int, kind: str, address: bytes | None, prefix: int, port: bytes | None, protocol: bytes | None
) -> bytes:
    """The record of the parts that were found; ValueError when one is missing."""
    needed = {"address": (address,), "address,port": (address, protocol, port), "port": (port,)}[kind]
    parts = [part for part in needed if part is not None]
    if len(parts) < len(needed):
        raise ValueError("part missing")
    if kind != "address":
        return b"".join(parts)
    network = ipaddress.ip_network((parts[0], prefix), strict=False)
    return network.network_address.packed + bytes([prefix])


def parse_adt(messages: Iterable[bytes], family: int, kind: str = "address") -> bytes:
    """As `kube_router._fast.ipset.parse_adt`."""
    records = set()
    for message in messages:
        message_kind, entries = next(attributes(message or b"\0"))
        if message_kind != ATTR_ADT:
            raise ValueError("not an ADT")
        for entry_kind, entry in attributes(entries):
            if entry_kind != ATTR_DATA:
                raise ValueError("not a DATA")
            records.add(entry_record(entry, family, kind))
    return b"".join(sorted(record for record in records if record is not None))
