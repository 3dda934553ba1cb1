"""Tracked connections (conntrack), over nfnetlink: those of some addresses, and away with them.

Touches the kernel. The kernel looks through its whole table for each question and since Linux 5.8 sends only what fits
a filter; older ones send everything, so the answer is sifted here as well, entry by entry: memory is bounded by what
fits, and by `MOST_FLOWS`. For many addresses one look at everything is cheaper than many, and for IPv6 it is the only
one: kernels compare IPv6 addresses of a filter the wrong way round and send all but what was asked for (seen on 6.18).

A deleted entry is known by its tuple and its id, so a new connection that took its place meanwhile stays. Messages
after ``include/uapi/linux/netfilter/nfnetlink_conntrack.h``.
"""

from __future__ import annotations

import errno
import ipaddress
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping

from kube_router.workers.flowfacts import PROTOCOLS, Flow
from kube_router.workers.kernel.netlink import (
    NETLINK_NETFILTER,
    NetlinkSocket,
    Request,
    attribute,
    attribute_map,
    nested,
)
from kube_router.workers.kernel.routes import AF
from kube_router.workers.model import Family

_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2
_TUPLE_ORIGINAL, _TUPLE_REPLY, _ID, _ZONE, _FILTER = 1, 2, 12, 18, 25
_TUPLE_IP, _TUPLE_PROTOCOL = 1, 2
_PROTOCOL_NUMBER, _SOURCE_PORT = 1, 2
_FILTER_ORIGINAL, _FILTER_REPLY = 1, 2
_FILTER_IP_SOURCE = 1
_IP_SOURCE = {Family.IPV4: 1, Family.IPV6: 3}
_PORT = struct.Struct(">H")

ASKED_SINGLY = 16
"""Up to so many IPv4 addresses the kernel is asked for each of them."""
MOST_FLOWS = 100_000
"""Bound of one answer; the kernel's own default of its whole table is 262,144."""


class ConntrackDriver:
    """Lists and deletes through one socket, in the network namespace of the thread that makes it; raises OSError."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_NETFILTER)

    @property
    def writes(self) -> int:
        """Entries that the kernel was asked to delete."""
        return self._netlink.writes

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def flows_of(self, family: Family, addresses: Collection[str]) -> list[Flow]:
        """Flows of one family that an address of ``addresses`` opened, or that reach it. Raises OSError.

        At most `MOST_FLOWS`; the rest is found by the next call, once these are gone.
        """
        wanted = {ipaddress.ip_address(address).packed for address in addresses}
        found: dict[bytes, Flow] = {}
        for flow in self._listed(family, wanted):
            if len(found) < MOST_FLOWS:
                found[flow.original + flow.identity] = flow
        return list(found.values())

    def _listed(self, family: Family, wanted: set[bytes]) -> Iterator[Flow]:
        questions = [b""] if wanted else []
        if family is Family.IPV4 and len(wanted) <= ASKED_SINGLY:
            questions = [part for packed in sorted(wanted) for part in _questions(packed)]
        for question in questions:
            for message in self._netlink.stream(_GET, struct.pack("=BBH", AF[family], 0, 0) + question):
                flow = _flow(family, message.payload, wanted)
                if flow is not None:
                    yield flow

    def delete(self, flows: Iterable[Flow]) -> int:
        """Delete entries; how many there were. One that has gone by itself is no error. Raises OSError."""
        requests = [
            Request(_DELETE, 0, struct.pack("=BBH", AF[flow.family], 0, 0) + flow.original + flow.identity)
            for flow in flows
        ]
        errors = self._netlink.batch(requests)
        bad = next((error for error in errors.values() if error.errno != errno.ENOENT), None)
        if bad is not None:
            raise bad
        return len(requests) - len(errors)


def _questions(packed: bytes) -> Iterator[bytes]:
    """Filters for flows that an IPv4 address opened, and for those whose replies it sends."""
    ip = nested(_TUPLE_IP, attribute(_IP_SOURCE[Family.IPV4], packed))
    flag = struct.pack("=I", _FILTER_IP_SOURCE)
    none = struct.pack("=I", 0)
    for kind, original, reply in ((_TUPLE_ORIGINAL, flag, none), (_TUPLE_REPLY, none, flag)):
        flags = nested(_FILTER, attribute(_FILTER_ORIGINAL, original), attribute(_FILTER_REPLY, reply))
        yield nested(kind, ip) + flags


def _flow(family: Family, payload: memoryview, wanted: set[bytes]) -> Flow | None:
    """The flow in a message, if it is one of the wanted addresses."""
    found = attribute_map(payload, 4)
    if _TUPLE_ORIGINAL not in found or _TUPLE_REPLY not in found:
        return None
    original, reply = attribute_map(found[_TUPLE_ORIGINAL]), attribute_map(found[_TUPLE_REPLY])
    source, destination = _source(family, original), _source(family, reply)
    if source not in wanted and destination not in wanted:
        return None
    protocol = attribute_map(reply.get(_TUPLE_PROTOCOL, b""))
    number = bytes(protocol.get(_PROTOCOL_NUMBER, b"\0"))[0]
    port = protocol.get(_SOURCE_PORT)
    zone = attribute(_ZONE, bytes(found[_ZONE])) if _ZONE in found else b""
    identity = attribute(_ID, bytes(found[_ID])) if _ID in found else b""
    return Flow(
        family=family,
        protocol=PROTOCOLS.get(number, str(number)),
        source=_text(family, source),
        destination=_text(family, destination),
        port=None if port is None else _PORT.unpack(port)[0],
        original=attribute(_TUPLE_ORIGINAL | 0x8000, bytes(found[_TUPLE_ORIGINAL])) + zone,
        identity=identity,
    )


def _source(family: Family, attributes: Mapping[int, memoryview]) -> bytes:
    ip = attribute_map(attributes.get(_TUPLE_IP, b""))
    return bytes(ip.get(_IP_SOURCE[family], b""))


def _text(family: Family, packed: bytes) -> str:
    return str(ipaddress.ip_address(packed)) if packed else ""
