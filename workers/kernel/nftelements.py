"""Elements of nftables sets, over nfnetlink: added and deleted in one transaction, read as packed keys.

Touches the kernel. What it costs depends on the elements that it is given alone: one takes 40 µs, 5,000 take 5 ms. Sets
are made by `nft`, never here. Messages after ``include/uapi/linux/netfilter/nf_tables.h``.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kube_router.workers.kernel.netlink import (
    NLM_F_CREATE,
    Message,
    NetlinkError,
    Overflow,
    Request,
    attribute,
    attribute_map,
    attributes,
    text_attribute,
    text_of,
)
from kube_router.workers.kernel.nftsocket import NftError, NftSocket, words
from kube_router.workers.model import Family

SUBSYSTEM = 10
_NEWSETELEM, _GETSETELEM, _DELSETELEM = 12, 13, 14
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_LIST_ELEM = 1
_ELEM_KEY, _ELEM_DATA, _ELEM_FLAGS = 1, 2, 3
_DATA_VALUE, _DATA_VERDICT, _VERDICT_CHAIN = 1, 2, 2
_INTERVAL_END = 1
_NFPROTO = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_LAST_PORT = 65535
_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
MESSAGE_BYTES = 48 * 1024
"""Elements of one message; an attribute's length has 16 bits."""

Key = bytes
"""A key as the kernel holds it: in network order; the fields of a concatenation are each padded to four bytes."""


def pack_member(member: str, family: Family) -> Key:
    """The key of ``10.0.0.1``, ``10.0.0.1,tcp:8080`` or a port, ``8080``; ValueError for anything else."""
    address, comma, endpoint = member.partition(",")
    try:
        packed = socket.inet_pton(_NFPROTO[family], address)
    except OSError:
        if member.isdecimal() and int(member) <= _LAST_PORT:
            return struct.pack("!H", int(member))
        raise ValueError(f"{member!r} is no member of a set of {family} addresses") from None
    if not comma:
        return packed
    protocol, _, port = endpoint.partition(":")
    if protocol not in _PROTOCOLS or not port.isdecimal() or int(port) > _LAST_PORT:
        raise ValueError(f"{member!r} names no protocol and port")
    return packed + struct.pack("!BxxxHxx", _PROTOCOLS[protocol], int(port))


def unpack_member(key: Key, family: Family) -> str:
    """The words of a key: as `pack_member` takes them; ``a . b`` for a pair of addresses."""
    size = family.bits // 8
    if len(key) == 2:
        return str(int.from_bytes(key, "big"))
    address, rest = _address(key[:size], family), key[size:]
    if not rest:
        return address
    if len(rest) == size:
        return f"{address} . {_address(rest, family)}"
    protocol, port = rest[0], int.from_bytes(rest[4:6], "big")
    names = [name for name, number in _PROTOCOLS.items() if number == protocol]
    return f"{address},{names[0] if names else protocol}:{port}"


def _address(packed: bytes, family: Family) -> str:
    """As the standard library writes it, which all address texts come from; inet_ntop differs in some of IPv6."""
    text = socket.inet_ntop(_NFPROTO[family], packed)
    return str(ipaddress.ip_address(packed)) if family is Family.IPV6 and "." in text else text


def pack_blocks(prefixes: Iterable[str], family: Family) -> list[tuple[int, int]]:
    """What networks cover, as `ElementDriver.intervals` tells it. ValueError for what is no network."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(_block(prefix, family) for prefix in prefixes):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def block_edges(prefixes: Iterable[str], family: Family) -> Iterator[bytes]:
    """The elements of an interval set that cover networks: where each interval begins, and the first key behind it."""
    size = family.bits // 8
    ends = attribute(_ELEM_FLAGS, _INTERVAL_END.to_bytes(4, "big"))
    for start, end in pack_blocks(prefixes, family):
        yield key_element(start.to_bytes(size, "big"))
        if end < 1 << family.bits:  # else it has no end
            yield key_element(end.to_bytes(size, "big"), ends)


def key_element(key: Key, rest: bytes = b"") -> bytes:
    """One element; ``rest``: its other attributes."""
    return attribute(_LIST_ELEM, attribute(_ELEM_KEY, attribute(_DATA_VALUE, key)) + rest)


def _block(prefix: str, family: Family) -> tuple[int, int]:
    address, _, length = prefix.partition("/")
    start = int.from_bytes(pack_member(address, family), "big")
    return start, start + (1 << (family.bits - int(length or family.bits)))


@dataclass(frozen=True, slots=True)
class ElementChange:
    """Keys that enter a set and keys that leave it."""

    name: str
    add: Collection[Key] = ()
    delete: Collection[Key] = ()


class ElementDriver(NftSocket):
    """Reads and changes elements of the sets of one table a call, through one socket."""

    def apply(self, family: Family, table: str, changes: Iterable[ElementChange]) -> None:
        """Make all changes, or none. An added key may be there already; a deleted one must be. Raises `NftError`."""
        requests, owners = [], []
        for change in changes:
            for kind, keys in ((_NEWSETELEM, change.add), (_DELSETELEM, change.delete)):
                flags = NLM_F_CREATE if kind == _NEWSETELEM else 0
                for payload in _payloads(family, table, change.name, [*keys]):
                    requests.append(Request(SUBSYSTEM << 8 | kind, flags, payload))
                    owners.append(change.name)
        try:
            errors = self._netlink.transaction(SUBSYSTEM, requests)
        except (OSError, Overflow) as error:
            raise NftError(f"elements of table {table}: {words(error)}") from error
        if errors:
            texts = {f"set {owners[index]}: {words(error)}": None for index, error in errors.items()}
            raise NftError(f"elements of table {table}: {'; '.join([*texts][:3])}")

    def keys(self, family: Family, table: str, name: str, length: int) -> set[Key] | None:
        """All keys (of ``length`` bytes) of a set that has no intervals; None without such a set. Raises `NftError`."""
        messages = self._list(family, table, name)
        if messages is None:
            return None
        prefix = _key_prefix(length)
        size, keys = len(prefix) + ((length + 3) & ~3), set[Key]()
        for message in messages:
            block = bytes(attribute_map(message.payload, 4).get(_LIST_ELEMENTS, b""))
            found = {block[at : at + size] for at in range(0, len(block), size)}
            if len(block) % size == 0 and all(element.startswith(prefix) for element in found):
                keys.update(element[len(prefix) : len(prefix) + length] for element in found)
            else:  # something else is with the elements: comments, flags
                keys.update(bytes(_key(element)) for element in _elements(message))
        return keys

    def intervals(self, family: Family, table: str, name: str) -> list[tuple[int, int]] | None:
        """What an interval set covers: disjoint (first, last + 1), sorted; None without such a set.

        Neighbours are one interval: how somebody cut them makes no difference to a packet. Raises `NftError`.
        """
        messages = self._list(family, table, name)
        if messages is None:
            return None
        edges: list[tuple[int, bool]] = []
        for message in messages:
            for element in _elements(message):
                ends = int.from_bytes(element.get(_ELEM_FLAGS, b""), "big") & _INTERVAL_END
                edges.append((int.from_bytes(_key(element), "big"), not ends))
        found: list[tuple[int, int]] = []
        start: int | None = None
        # An end and a start at one place: the end comes first, False before True, and both go.
        for place, starts in sorted(edges):
            if starts and start is None:
                start = found.pop()[0] if found and found[-1][1] == place else place
            elif not starts and start is not None:
                found.append((start, place))
                start = None
        if start is not None:
            found.append((start, 1 << family.bits))
        return found

    def verdicts(self, family: Family, table: str, name: str) -> dict[Key, str] | None:
        """Keys of a verdict map and the chains that they lead to; None without such a map. Raises `NftError`."""
        messages = self._list(family, table, name)
        if messages is None:
            return None
        found = {}
        for message in messages:
            for element in _elements(message):
                verdict = attribute_map(attribute_map(element.get(_ELEM_DATA, b"")).get(_DATA_VERDICT, b""))
                found[bytes(_key(element))] = text_of(verdict.get(_VERDICT_CHAIN, b""))
        return found

    def _list(self, family: Family, table: str, name: str) -> list[Message] | None:
        payload = _header(family, table, name)
        try:
            return self._netlink.dump(SUBSYSTEM << 8 | _GETSETELEM, payload)
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return None
            raise NftError(f"set {name} of table {table}: {words(error)}") from error
        except (OSError, Overflow) as error:
            raise NftError(f"set {name} of table {table}: {words(error)}") from error


def _header(family: Family, table: str, name: str) -> bytes:
    head = struct.pack("=BBH", _NFPROTO[family], 0, 0)
    return head + text_attribute(_LIST_TABLE, table) + text_attribute(_LIST_SET, name)


def _key_prefix(length: int) -> bytes:
    """What stands before a key of ``length`` bytes in an element that has nothing but its key."""
    padded = (length + 3) & ~3
    return struct.pack("=HHHHHH", 12 + padded, _LIST_ELEM, 8 + padded, _ELEM_KEY, 4 + length, _DATA_VALUE)


def _payloads(family: Family, table: str, name: str, keys: Sequence[Key]) -> Iterator[bytes]:
    if not keys:
        return
    length = len(keys[0])
    prefix, header, padding = _key_prefix(length), _header(family, table, name), b"\0" * (-length % 4)
    count = MESSAGE_BYTES // (len(prefix) + length)
    for start in range(0, len(keys), count):
        part = keys[start : start + count]
        yield header + attribute(_LIST_ELEMENTS | 0x8000, prefix + (padding + prefix).join(part) + padding)


def _elements(message: Message) -> Iterator[dict[int, memoryview]]:
    block = attribute_map(message.payload, 4).get(_LIST_ELEMENTS, b"")
    for _, element in attributes(block):
        yield dict(attributes(element))


def _key(element: dict[int, memoryview]) -> memoryview:
    return attribute_map(element[_ELEM_KEY])[_DATA_VALUE]
