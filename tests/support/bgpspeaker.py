"""A scripted BGP speaker on a plain socket (RFC 4271, 4760, 6793): says exactly what a test tells it to, and remembers
every message that it was sent.

Touches one TCP socket, in the network namespace of the thread that calls `Speaker.connect` or `accept`. It knows
no policies and no routing: whatever is announced is sent, also nonsense. A thread reads, and answers keepalives.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

OPEN, UPDATE, NOTIFICATION, KEEPALIVE, REFRESH = 1, 2, 3, 4, 5
MARKER = b"\xff" * 16
MOST_MESSAGE = 4096
ORIGIN, AS_PATH, NEXT_HOP, MED, LOCAL_PREF, COMMUNITIES = 1, 2, 3, 4, 5, 8
ORIGINATOR, CLUSTER_LIST, MP_REACH, MP_UNREACH, LARGE_COMMUNITIES = 9, 10, 14, 15, 32
TRANS_ASN = 23456
TCP_MD5SIG = 14
FAMILIES = {4: 1, 6: 2}
"""IP version -> address family identifier."""


@dataclass(frozen=True)
class Route:
    """What a peer said of one prefix. Communities as ``a:b`` and ``a:b:c``."""

    next_hop: str
    as_path: tuple[int, ...] = ()
    communities: tuple[str, ...] = ()
    large_communities: tuple[str, ...] = ()
    med: int | None = None
    local_pref: int | None = None
    originator: str = ""
    cluster_list: tuple[str, ...] = ()


@dataclass(frozen=True)
class Update:
    """One UPDATE message: when it came (monotonic seconds), what it withdrew and what it announced.

    ``end_of_rib``: the IP version whose table it ended (RFC 4724), 0 for an ordinary one.
    """

    at: float
    withdrawn: tuple[str, ...] = ()
    announced: tuple[str, ...] = ()
    route: Route | None = None
    end_of_rib: int = 0


@dataclass(frozen=True)
class Notification:
    """Why a session was ended, by error code and subcode (RFC 4271 4.5)."""

    code: int
    subcode: int
    data: bytes = b""


@dataclass(frozen=True)
class Opened:
    """The peer's OPEN. ``capabilities``: (code, value) in order."""

    asn: int
    hold: int
    router_id: str
    capabilities: tuple[tuple[int, bytes], ...] = ()

    def capability(self, code: int) -> list[bytes]:
        """The values of one capability."""
        return [value for found, value in self.capabilities if found == code]


@dataclass
class Speaker:
    """One session. ``capabilities`` are sent beside multiprotocol and 4-byte AS numbers: (code, value)."""

    asn: int
    router_id: str
    hold: int = 90
    families: Sequence[int] = (4, 6)
    capabilities: Sequence[tuple[int, bytes]] = ()
    updates: list[Update] = field(default_factory=list)
    routes: dict[str, Route] = field(default_factory=dict)
    ever: set[str] = field(default_factory=set)
    notification: Notification | None = None
    opened: Opened | None = None
    refreshes: int = 0
    closed: bool = False
    silent: bool = False
    """Answers no keepalive: the peer's hold timer runs out."""

    def __post_init__(self) -> None:
        self._socket: socket.socket | None = None
        self._condition = threading.Condition()
        self._sending = threading.Lock()
        self._thread: threading.Thread | None = None
        self.established = False

    def connect(
        self, address: str, port: int, *, local: str = "", seconds: float = 10.0, password: str = ""
    ) -> Speaker:
        """Open the session from this side; tries again until the peer takes it. Returns self."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._start(self._dialled(address, port, local, password))
                self.wait(lambda: self.established or self.closed, max(0.1, deadline - time.monotonic()), "established")
                if self.established and not self.closed:
                    return self
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise AssertionError(f"no session with {address} port {port} within {seconds} s: {self.notification}")
            self.close()
            time.sleep(0.05)
            self.closed, self.notification = False, None

    def _dialled(self, address: str, port: int, local: str, password: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        opened = socket.socket(family, socket.SOCK_STREAM)
        try:
            if password:
                sign(opened, address, password)
            if local:
                opened.bind((local, 0))
            opened.settimeout(1.0)
            opened.connect((address, port))
            opened.settimeout(None)
        except OSError:
            opened.close()
            raise
        return opened

    def accept(self, listener: socket.socket, seconds: float = 15.0) -> Speaker:
        """Take the session that the peer opens to ``listener``. Returns self."""
        listener.settimeout(seconds)
        taken, _ = listener.accept()
        taken.settimeout(None)
        self._start(taken)
        self.wait(lambda: self.established or self.closed, seconds, "established")
        return self

    def _start(self, opened: socket.socket) -> None:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = opened
        self.established = False
        self._send(OPEN, self._open())
        self._thread = threading.Thread(target=self._read, args=(opened,), daemon=True)
        self._thread.start()

    def _open(self) -> bytes:
        items = [(1, struct.pack("!HBB", FAMILIES[version], 0, 1)) for version in self.families]
        items += [(65, struct.pack("!I", self.asn)), *self.capabilities]
        packed = b"".join(struct.pack("!BB", code, len(value)) + value for code, value in items)
        options = struct.pack("!BB", 2, len(packed)) + packed
        two_bytes = self.asn if self.asn < 65536 else TRANS_ASN
        identity = ipaddress.IPv4Address(self.router_id).packed
        return struct.pack("!BHH4sB", 4, two_bytes, self.hold, identity, len(options)) + options

    def announce(self, prefixes: Iterable[str], next_hop: str, **attributes: object) -> None:
        """Send UPDATEs with these prefixes (of one family), as many in one as fit. ``attributes``: see `encoded`."""
        for chunk in chunked(prefixes, 6 if ":" in next_hop else 4):
            self._send(UPDATE, encoded(chunk, next_hop, self.asn, **attributes))  # type: ignore[arg-type]

    def withdraw(self, prefixes: Iterable[str]) -> None:
        """Send UPDATEs that take these prefixes (of one family) back."""
        everything = list(prefixes)
        for chunk in chunked(everything, 6 if everything and ":" in everything[0] else 4):
            packed = b"".join(map(packed_prefix, chunk))
            if ":" in chunk[0]:
                value = struct.pack("!HB", 2, 1) + packed
                attribute = packed_attribute(0x80, MP_UNREACH, value)
                self._send(UPDATE, struct.pack("!HH", 0, len(attribute)) + attribute)
            else:
                self._send(UPDATE, struct.pack("!H", len(packed)) + packed + b"\0\0")

    def end_of_rib(self) -> None:
        """End-of-RIB of every family (RFC 4724)."""
        for version in self.families:
            if version == 4:
                self._send(UPDATE, b"\0\0\0\0")
            else:
                attribute = packed_attribute(0x80, MP_UNREACH, struct.pack("!HB", 2, 1))
                self._send(UPDATE, struct.pack("!HH", 0, len(attribute)) + attribute)

    def notify(self, code: int, subcode: int = 0, data: bytes = b"") -> None:
        """End the session with a NOTIFICATION."""
        self._send(NOTIFICATION, struct.pack("!BB", code, subcode) + data)

    def send_raw(self, data: bytes) -> None:
        """Bytes as they are, also garbage."""
        assert self._socket is not None
        with self._sending:
            self._socket.sendall(data)

    def close(self) -> None:
        """Close the connection without a NOTIFICATION, as a crash does."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=2)
        self.closed = True

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Until ``condition``, which is looked at after every message; raises AssertionError after ``seconds``."""
        with self._condition:
            if not self._condition.wait_for(condition, seconds):
                raise AssertionError(f"not within {seconds} s: {what}; routes {len(self.routes)}, {self.notification}")

    def _send(self, kind: int, body: bytes) -> None:
        self.send_raw(MARKER + struct.pack("!HB", 19 + len(body), kind) + body)

    def _read(self, opened: socket.socket) -> None:
        stream = opened.makefile("rb")
        with contextlib.suppress(OSError, ValueError):
            while len(head := stream.read(19)) == 19:
                length, kind = struct.unpack("!HB", head[16:])
                body = stream.read(length - 19)
                with self._condition:
                    self._take(kind, body)
                    self._condition.notify_all()
        with self._condition:
            self.closed = True
            self._condition.notify_all()

    def _take(self, kind: int, body: bytes) -> None:
        if kind == OPEN:
            self.opened = decoded_open(body)
            self._send(KEEPALIVE, b"")
        elif kind == KEEPALIVE:
            if self.established and not self.silent:
                self._send(KEEPALIVE, b"")
            self.established = True
        elif kind == NOTIFICATION:
            self.notification = Notification(body[0], body[1], body[2:])
        elif kind == REFRESH:
            self.refreshes += 1
        elif kind == UPDATE:
            for update in decoded(body):
                self.updates.append(update)
                for prefix in update.withdrawn:
                    self.routes.pop(prefix, None)
                for prefix in update.announced:
                    assert update.route is not None
                    self.routes[prefix] = update.route
                    self.ever.add(prefix)


def sign(opened: socket.socket, address: str, password: str) -> None:
    """Give a socket the TCP-MD5 key for a peer (RFC 2385; ``struct tcp_md5sig``, linux/tcp.h)."""
    key = password.encode()
    if ":" in address:
        packed = struct.pack("=HHI16sI", socket.AF_INET6, 0, 0, ipaddress.IPv6Address(address).packed, 0)
    else:
        packed = struct.pack("=HH4s", socket.AF_INET, 0, ipaddress.IPv4Address(address).packed)
    value = packed.ljust(128, b"\0") + struct.pack("=BBHI80s", 0, 0, len(key), 0, key)
    opened.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, value)


def listener(address: str, port: int) -> socket.socket:
    """A listening socket for `Speaker.accept`."""
    opened = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.bind((address, port))
    opened.listen(8)
    return opened


def encoded(
    prefixes: Sequence[str],
    next_hop: str,
    asn: int,
    *,
    as_path: Sequence[int] | None = None,
    communities: Sequence[str] = (),
    large_communities: Sequence[str] = (),
    local_pref: int | None = None,
    med: int | None = None,
) -> bytes:
    """The body of an UPDATE. ``as_path`` None: just ``asn``; empty for a session inside of one AS.

    The next hop's family decides the encoding, not the prefixes': a test may send what does not fit together.
    """
    path = [asn] if as_path is None else list(as_path)
    segment = struct.pack("!BB", 2, len(path)) + struct.pack(f"!{len(path)}I", *path) if path else b""
    nlri = b"".join(map(packed_prefix, prefixes))
    attributes = [(0x40, ORIGIN, b"\0"), (0x40, AS_PATH, segment)]
    hop = ipaddress.ip_address(next_hop)
    if hop.version == 4:
        attributes.append((0x40, NEXT_HOP, hop.packed))
    if med is not None:
        attributes.append((0x80, MED, struct.pack("!I", med)))
    if local_pref is not None:
        attributes.append((0x40, LOCAL_PREF, struct.pack("!I", local_pref)))
    if communities:
        attributes.append((0xC0, COMMUNITIES, b"".join(_numbers("!HH", text) for text in communities)))
    if hop.version == 6:
        attributes.append((0x80, MP_REACH, struct.pack("!HBB", 2, 1, 16) + hop.packed + b"\0" + nlri))
    if large_communities:
        attributes.append((0xC0, LARGE_COMMUNITIES, b"".join(_numbers("!III", text) for text in large_communities)))
    packed = b"".join(packed_attribute(*item) for item in attributes)
    return struct.pack("!HH", 0, len(packed)) + packed + (nlri if hop.version == 4 else b"")


def _numbers(layout: str, text: str) -> bytes:
    return struct.pack(layout, *map(int, text.split(":")))


def packed_attribute(flags: int, kind: int, value: bytes) -> bytes:
    """One path attribute, with an extended length where it needs one."""
    if len(value) > 255:
        return struct.pack("!BBH", flags | 0x10, kind, len(value)) + value
    return struct.pack("!BBB", flags, kind, len(value)) + value


def packed_prefix(prefix: str) -> bytes:
    """A prefix as NLRI: length in bits, then as many bytes as that takes."""
    network = ipaddress.ip_network(prefix, strict=False)
    return bytes([network.prefixlen]) + network.network_address.packed[: (network.prefixlen + 7) // 8]


def chunked(prefixes: Iterable[str], version: int) -> Iterator[list[str]]:
    """As many as fit into one message beside 400 bytes of attributes."""
    most = (MOST_MESSAGE - 400) // (17 if version == 6 else 5)
    everything = list(prefixes)
    for first in range(0, len(everything), most):
        yield everything[first : first + most]


def decoded_open(body: bytes) -> Opened:
    """An OPEN message."""
    _, asn, hold, identity, _ = struct.unpack("!BHH4sB", body[:10])
    capabilities = []
    rest = body[10:]
    while rest:
        kind, length = rest[0], rest[1]
        inner, rest = rest[2 : 2 + length], rest[2 + length :]
        while kind == 2 and inner:
            code, size = inner[0], inner[1]
            capabilities.append((code, inner[2 : 2 + size]))
            if code == 65:
                (asn,) = struct.unpack("!I", inner[2:6])
            inner = inner[2 + size :]
    return Opened(asn, hold, str(ipaddress.IPv4Address(identity)), tuple(capabilities))


def decoded(body: bytes) -> list[Update]:
    """An UPDATE message, split by family."""
    at = time.monotonic()
    (size,) = struct.unpack("!H", body[:2])
    withdrawn, rest = body[2 : 2 + size], body[2 + size :]
    (size,) = struct.unpack("!H", rest[:2])
    attributes, nlri = dict(_attributes(rest[2 : 2 + size])), rest[2 + size :]
    found = []
    if withdrawn or nlri:
        hop = str(ipaddress.IPv4Address(attributes[NEXT_HOP])) if NEXT_HOP in attributes else ""
        found.append(Update(at, tuple(_prefixes(withdrawn, 4)), tuple(_prefixes(nlri, 4)), _route(hop, attributes)))
    if MP_REACH in attributes:
        value = attributes[MP_REACH]
        version = 6 if value[:2] == b"\0\2" else 4
        hops = value[4 : 4 + value[3]]
        hop = str(ipaddress.ip_address(hops[:16] if len(hops) >= 16 else hops[:4]))
        prefixes = tuple(_prefixes(value[5 + value[3] :], version))
        found.append(Update(at, (), prefixes, _route(hop, attributes)))
    if MP_UNREACH in attributes:
        value = attributes[MP_UNREACH]
        version = 6 if value[:2] == b"\0\2" else 4
        gone = tuple(_prefixes(value[3:], version))
        found.append(Update(at, gone, end_of_rib=0 if gone else version))
    return found or [Update(at, end_of_rib=4)]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        flags, kind = data[0], data[1]
        if flags & 0x10:
            (size,) = struct.unpack("!H", data[2:4])
            begin = 4
        else:
            size, begin = data[2], 3
        yield kind, data[begin : begin + size]
        data = data[begin + size :]


def _prefixes(data: bytes, version: int) -> Iterator[str]:
    size = 4 if version == 4 else 16
    while data:
        length = data[0]
        taken = (length + 7) // 8
        address = ipaddress.ip_address(data[1 : 1 + taken].ljust(size, b"\0"))
        yield f"{address}/{length}"
        data = data[1 + taken :]


def _route(next_hop: str, attributes: dict[int, bytes]) -> Route:
    path: list[int] = []
    rest = attributes.get(AS_PATH, b"")
    while rest:
        count = rest[1]
        path += struct.unpack(f"!{count}I", rest[2 : 2 + 4 * count])
        rest = rest[2 + 4 * count :]
    numbers = {kind: struct.unpack("!I", attributes[kind])[0] for kind in (MED, LOCAL_PREF) if kind in attributes}
    originator = attributes.get(ORIGINATOR)
    clusters = attributes.get(CLUSTER_LIST, b"")
    return Route(
        next_hop=next_hop,
        as_path=tuple(path),
        communities=tuple(f"{a}:{b}" for a, b in struct.iter_unpack("!HH", attributes.get(COMMUNITIES, b""))),
        large_communities=tuple(
            f"{a}:{b}:{c}" for a, b, c in struct.iter_unpack("!III", attributes.get(LARGE_COMMUNITIES, b""))
        ),
        med=numbers.get(MED),
        local_pref=numbers.get(LOCAL_PREF),
        originator=str(ipaddress.IPv4Address(originator)) if originator else "",
        cluster_list=tuple(str(ipaddress.IPv4Address(clusters[at : at + 4])) for at in range(0, len(clusters), 4)),
    )
