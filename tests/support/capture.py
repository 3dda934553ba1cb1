"""What is really on a wire: the IP packets that an interface sends and receives, with what tunnels put around them.

Touches the kernel: an AF_PACKET socket inside a namespace. Understood are IPv4 in IPv4, IPv6 in IPv6, and both in UDP
with the four bytes of GUE.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from support.namespaces import Namespace

_ETH_P_ALL = 3
_SO_RCVBUFFORCE = 33
_ETH_P_IP, _ETH_P_IPV6 = 0x0800, 0x86DD
IPIP, TCP, UDP, IPV6_IN_IP, FRAGMENT, ICMPV6, OPTIONS = 4, 6, 17, 41, 44, 58, 60
_GUE = struct.Struct("!BBH")
"""Version, control bit and header length; inner protocol; flags."""


@dataclass(frozen=True)
class Packet:
    """One IP header and what follows; ``inner`` is the packet in it if it is a tunnel's.

    ``protocol`` is that of the payload, IPv6's extension headers skipped (they are in ``extensions``); ``port`` the
    destination port of UDP or TCP; ``mss`` the TCP option; ``fragment``: a part of a packet. ``size`` in bytes with
    header; of a received UDP tunnel's packet it says nothing: the kernel takes headers off in place. ``sent``: by this
    interface.
    """

    source: str
    destination: str
    protocol: int
    ttl: int
    size: int
    dont_fragment: bool = False
    fragment: bool = False
    extensions: tuple[int, ...] = ()
    port: int = 0
    mss: int | None = None
    syn: bool = False
    sent: bool = False
    inner: Packet | None = None


def decode(data: bytes) -> Packet | None:
    """A packet from its IP header on; None if it is no IP."""
    if len(data) >= 20 and data[0] >> 4 == 4:
        size, place = struct.unpack_from("!H", data, 2)[0], struct.unpack_from("!H", data, 6)[0]
        source, destination = (socket.inet_ntop(socket.AF_INET, data[at : at + 4]) for at in (12, 16))
        packet = Packet(source, destination, data[9], data[8], size, bool(place & 0x4000), bool(place & 0x3FFF))
        return _with_payload(packet, data[(data[0] & 15) * 4 : size])
    if len(data) >= 40 and data[0] >> 4 == 6:
        source, destination = (socket.inet_ntop(socket.AF_INET6, data[at : at + 16]) for at in (8, 24))
        protocol, payload, extensions = data[6], data[40:], []
        while protocol in (0, OPTIONS, FRAGMENT) and len(payload) >= 8:
            extensions.append(protocol)
            length = 8 if protocol == FRAGMENT else 8 * (payload[1] + 1)
            protocol, payload = payload[0], payload[length:]
        size = 40 + struct.unpack_from("!H", data, 4)[0]
        packet = Packet(
            source, destination, protocol, data[7], size, True, FRAGMENT in extensions, extensions=tuple(extensions)
        )
        return _with_payload(packet, payload)
    return None


def _with_payload(packet: Packet, payload: bytes) -> Packet:
    changes: dict[str, object] = {}
    if packet.fragment:
        pass
    elif packet.protocol in (IPIP, IPV6_IN_IP):
        changes["inner"] = decode(payload)
    elif packet.protocol == UDP and len(payload) >= 8:
        changes["port"] = struct.unpack_from("!H", payload, 2)[0]
        if len(payload) > 12 and _GUE.unpack_from(payload, 8) in ((0, IPIP, 0), (0, IPV6_IN_IP, 0)):
            changes["inner"] = decode(payload[12:])
    elif packet.protocol == TCP and len(payload) >= 20:
        changes |= {"port": struct.unpack_from("!H", payload, 2)[0], "syn": payload[13] & 0x12 == 2}
        options = payload[20 : (payload[12] >> 4) * 4]
        if changes["syn"] and options[:2] == b"\x02\x04":  # Linux puts it first
            changes["mss"] = struct.unpack_from("!H", options, 2)[0]
    return dataclasses.replace(packet, **changes)  # type: ignore[arg-type]


class Capture:
    """The packets of one interface since `start`; neighbour discovery is left out."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def packets(self) -> list[Packet]:
        """What came and went since the last call."""
        found: list[Packet] = []
        while True:
            try:
                data, (_, kind, direction, *_) = self._end.recvfrom(65600)
            except BlockingIOError:
                return found
            packet = decode(data[14:]) if kind in (_ETH_P_IP, _ETH_P_IPV6) else None
            if packet is not None and not (packet.protocol == ICMPV6 and packet.ttl == 255):
                found.append(dataclasses.replace(packet, sent=direction == socket.PACKET_OUTGOING))


@contextlib.contextmanager
def capture(namespace: Namespace, interface: str) -> Iterator[Capture]:
    """Look at an Ethernet interface for the duration of the block."""
    with namespace.enter():
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
    with end:
        end.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
        end.bind((interface, _ETH_P_ALL))
        yield Capture(end)
