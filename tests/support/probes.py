"""Real packets between network namespaces: every host serves, every flow is tried, all in one loop of this process.

Touches the kernel. A socket belongs to the namespace in which it was made, whatever its process does later: so no host
needs a process of its own, and a matrix of a thousand flows takes as long as its slowest answer.

TCP: a listener that echoes what is sent. UDP: an echo. ICMP: the kernel's own echo. SCTP: a kernel may have none, so
INIT and INIT ACK are made here with their checksums (RFC 9260): netfilter and connection tracking see no more of it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from support.namespaces import Namespace

Answer = Literal["open", "refused", "silent"]
PATIENCE = 0.3
"""Seconds after which a flow without an answer is silent."""
SCTP = 132
_REFUSED = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EACCES, errno.ENETUNREACH}
_ICMP = {4: (socket.IPPROTO_ICMP, 8, 0, 20), 6: (socket.IPPROTO_ICMPV6, 128, 129, 0)}
"""By IP version: protocol, types of echo request and reply, bytes of header that a raw socket shows."""


class Flow(NamedTuple):
    """What is tried: ``source`` and ``destination`` are addresses; ``port`` of the destination (0 for icmp).

    ``via``: the address that is really called instead, a Service's for example; the answer must come from there.
    """

    source: str
    destination: str
    protocol: str
    port: int
    via: tuple[str, int] | None = None

    @property
    def called(self) -> tuple[str, int]:
        """Address and port that the source calls."""
        return self.via or (self.destination, self.port)

    def __str__(self) -> str:
        via = f" via {self.via[0]} {self.via[1]}" if self.via else ""
        return f"{self.source} -> {self.destination} {self.protocol} {self.port}{via}"


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace with addresses of its own, as a party of flows."""

    name: str
    namespace: Namespace
    addresses: tuple[str, ...]

    def of(self, version: int) -> str:
        """Its first address of an IP version."""
        return next(item for item in self.addresses if (":" in item) == (version == 6))


def _af(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901
        table.append(value)
    return tuple(table)


_CRC = _crc32c_table()


def crc32c(data: bytes) -> int:
    """The checksum of SCTP (RFC 3309)."""
    value = 0xFFFFFFFF
    for byte in data:
        value = (value >> 8) ^ _CRC[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def sctp_packet(source_port: int, port: int, chunk: int, verification: int, tag: int) -> bytes:
    """An SCTP packet with one INIT (1) or INIT ACK (2) chunk; ``tag`` is its initiate tag."""
    body = struct.pack("!BBHIIHHI", chunk, 0, 20, tag, 65535, 1, 1, 1)
    head = struct.pack("!HHI", source_port, port, verification)
    checksum = struct.pack("<I", crc32c(head + b"\0\0\0\0" + body))
    return head + checksum + body


class Link:
    """An open TCP connection between two hosts; `say` proves that it still carries data."""

    def __init__(self, probes: Probes, end: socket.socket) -> None:
        self._probes, self._end = probes, end
        self._numbers = itertools.count()

    def say(self, seconds: float = 1.0) -> bool:
        """Send something and wait for its echo."""
        text = b"%08d" % next(self._numbers)
        got = b""
        try:
            self._end.send(text)
        except OSError:
            return False

        def heard() -> bool:
            nonlocal got
            with contextlib.suppress(BlockingIOError):
                got += self._end.recv(64)
            return got.endswith(text)

        try:
            return self._probes.turn(heard, seconds)
        except OSError:
            return False

    def close(self) -> None:
        """End it by a reset, so that no state stays behind."""
        _reset(self._end)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


class Probes:
    """Servers of all hosts and the flows between them. Use it from one thread at a time."""

    def __init__(self, hosts: Iterable[Host], ports: Iterable[int]) -> None:
        self.hosts = tuple(hosts)
        self.ports = tuple(ports)
        self._by_address = {address: host for host in self.hosts for address in host.addresses}
        self._selector = selectors.DefaultSelector()
        self._raw: dict[tuple[str, int], socket.socket] = {}
        self._source_ports = itertools.cycle(range(10000, 30000))
        self._numbers = itertools.count(1)
        self._waiting: dict[tuple[str, str, int, int], Callable[[Answer], object]] = {}
        self.arrived: set[bytes] = set()
        """Payloads of datagrams that reached a server, whether or not their sender could be answered."""
        for host in self.hosts:
            with host.namespace.enter():
                self._serve(host)

    def close(self) -> None:
        """Close every socket."""
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _serve(self, host: Host) -> None:
        for port in self.ports:
            listener = socket.create_server(("::", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
            self._watch(listener, partial(self._accept, listener))
        for address in host.addresses:
            for port in self.ports:
                echo = self._socket(address, socket.SOCK_DGRAM, 0, port)
                self._watch(echo, partial(self._echo, echo))
            version = 6 if ":" in address else 4
            for protocol, read in ((SCTP, self._read_sctp), (_ICMP[version][0], self._read_icmp)):
                raw = self._socket(address, socket.SOCK_RAW, protocol, 0)
                self._raw[address, protocol] = raw
                self._watch(raw, partial(read, raw, address))

    @staticmethod
    def _socket(address: str, kind: socket.SocketKind, protocol: int, port: int) -> socket.socket:
        made = socket.socket(_af(address), kind, protocol)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        made.bind((address, port))
        return made

    def _watch(self, end: socket.socket, act: Callable[[], None], events: int = selectors.EVENT_READ) -> None:
        end.setblocking(False)
        self._selector.register(end, events, act)

    def _forget(self, end: socket.socket) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(end)
        _reset(end)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                end, _ = listener.accept()
                self._watch(end, partial(self._answer, end))

    def _answer(self, end: socket.socket) -> None:
        try:
            data = end.recv(4096)
            if data:
                end.send(data)
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._forget(end)

    def _echo(self, end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, sender = end.recvfrom(4096)
                self.arrived.add(data)
                end.sendto(data, sender)

    def _read_sctp(self, raw: socket.socket, address: str) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, sender = raw.recvfrom(4096)
                data = data[20:] if "." in address else data
                source_port, port, chunk = struct.unpack("!HH8xB", data[:13])
                if chunk == 1 and port in self.ports:
                    self.arrived.add(data)
                    (tag,) = struct.unpack("!I", data[16:20])
                    with contextlib.suppress(OSError):
                        raw.sendto(sctp_packet(port, source_port, 2, tag, 7), (sender[0], 0))
                elif chunk == 2:
                    self._heard(address, sender[0], source_port, port)

    def _read_icmp(self, raw: socket.socket, address: str) -> None:
        _, _, reply, skip = _ICMP[6 if ":" in address else 4]
        with contextlib.suppress(BlockingIOError):
            while True:
                data, sender = raw.recvfrom(4096)
                kind, identity, number = struct.unpack("!B3xHH", data[skip : skip + 8])
                if kind == reply:
                    self._heard(address, sender[0], identity, number)

    def _heard(self, here: str, there: str, one: int, two: int) -> None:
        answer = self._waiting.pop((here, there, one, two), None)
        if answer:
            answer("open")

    def turn(self, done: Callable[[], bool], seconds: float) -> bool:
        """Serve until ``done`` or the time is over; whether it was done."""
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for key, _ in self._selector.select(min(left, 0.05)):
                key.data()
        return True

    def drain(self, seconds: float = 0.05) -> None:
        """Serve for a while, for packets that nobody waits for."""
        self.turn(lambda: False, seconds)

    def try_all(self, flows: Iterable[Flow], seconds: float = PATIENCE) -> dict[Flow, Answer]:
        """Try all flows at once; the answer of each."""
        answers: dict[Flow, Answer] = {}
        wanted = list(dict.fromkeys(flows))
        ends: list[socket.socket] = []
        by_host: dict[str, list[Flow]] = {}
        for flow in wanted:
            by_host.setdefault(self._by_address[flow.source].name, []).append(flow)
        starts = {"tcp": self._try_tcp, "udp": self._try_udp, "sctp": self._try_raw, "icmp": self._try_raw}
        for of_host in by_host.values():
            with self._by_address[of_host[0].source].namespace.enter():
                for count, flow in enumerate(of_host):
                    end = starts[flow.protocol](flow, partial(answers.setdefault, flow))
                    if end is not None:
                        ends.append(end)
                    if count % 64 == 63:
                        self.drain(0)
            self.drain(0)
        self.turn(lambda: len(answers) == len(wanted), seconds)
        for end in ends:
            self._forget(end)
        self._waiting.clear()
        return {flow: answers.get(flow, "silent") for flow in wanted}

    def _try_tcp(self, flow: Flow, answer: Callable[[Answer], object]) -> socket.socket | None:
        end = self._socket(flow.source, socket.SOCK_STREAM, 0, next(self._source_ports))

        def act() -> None:
            error = end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._selector.unregister(end)
            answer("open" if not error else "refused" if error in _REFUSED else "silent")

        error = end.connect_ex(flow.called)
        if error not in (0, errno.EINPROGRESS):
            answer("refused" if error in _REFUSED else "silent")
            end.close()
            return None
        self._watch(end, act, selectors.EVENT_WRITE)
        return end

    def _try_udp(self, flow: Flow, answer: Callable[[Answer], object]) -> socket.socket | None:
        end = self._socket(flow.source, socket.SOCK_DGRAM, 0, next(self._source_ports))
        text = b"datagram %d" % next(self._numbers)

        def act() -> None:
            try:
                if end.recv(64) == text:
                    answer("open")
            except BlockingIOError:
                return
            except OSError as error:
                answer("refused" if error.errno in _REFUSED else "silent")

        try:
            end.connect(flow.called)
            end.send(text)
        except OSError as error:
            answer("refused" if error.errno in _REFUSED else "silent")
            end.close()
            return None
        self._watch(end, act)
        return end

    def _try_raw(self, flow: Flow, answer: Callable[[Answer], object]) -> None:
        number = next(self._source_ports)
        address, port = flow.called
        if flow.protocol == "sctp":
            protocol, packet = SCTP, sctp_packet(number, port, 1, 0, next(self._numbers))
            key = (flow.source, address, port, number)
        else:
            protocol, request, _, _ = _ICMP[6 if ":" in address else 4]
            sequence = next(self._numbers) & 0xFFFF
            packet = struct.pack("!BBHHH", request, 0, 0, number, sequence)
            packet = packet[:2] + struct.pack("!H", _checksum(packet)) + packet[4:]
            key = (flow.source, address, number, sequence)
        self._waiting[key] = answer
        for _ in range(2):  # an error that an earlier packet met is reported to the next call
            try:
                self._raw[flow.source, protocol].sendto(packet, (address, 0))
            except OSError:
                continue
            break

    def forge(self, sender: Host, flow: Flow) -> bytes:
        """Send a datagram from ``sender`` under the source of ``flow``, whoever has it; what `arrived` will hold."""
        text = b"forged %d" % next(self._numbers)
        datagram = struct.pack("!HHHH", next(self._source_ports), flow.port, 8 + len(text), 0) + text
        packed = [socket.inet_pton(_af(flow.source), item) for item in (flow.source, flow.destination)]
        if ":" in flow.source:
            pseudo = b"".join(packed) + struct.pack("!II", len(datagram), socket.IPPROTO_UDP) + datagram
            checksum = _checksum(pseudo + b"\0" * (len(pseudo) % 2)) or 0xFFFF
            datagram = datagram[:6] + struct.pack("!H", checksum) + datagram[8:]
            header = struct.pack("!IHBB", 6 << 28, len(datagram), socket.IPPROTO_UDP, 64) + b"".join(packed)
        else:
            size = 20 + len(datagram)
            header = struct.pack("!BBHHHBBH", 0x45, 0, size, 0, 0, 64, socket.IPPROTO_UDP, 0) + b"".join(packed)
        with (
            sender.namespace.enter(),
            socket.socket(_af(flow.source), socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
            contextlib.suppress(PermissionError),  # dropped in OUTPUT
        ):
            raw.sendto(header + datagram, (flow.destination, 0))
        return text

    def connect(self, flow: Flow, seconds: float = 1.0) -> Link:
        """Open a TCP connection that stays; raises AssertionError if it does not come about."""
        host = self._by_address[flow.source]
        with host.namespace.enter():
            end = self._socket(flow.source, socket.SOCK_STREAM, 0, next(self._source_ports))
        end.connect_ex(flow.called)
        with selectors.DefaultSelector() as ready:
            ready.register(end, selectors.EVENT_WRITE)
            if not self.turn(lambda: bool(ready.select(0)), seconds):
                end.close()
                raise AssertionError(f"{flow}: no connection")
        link = Link(self, end)
        if not link.say(seconds):
            end.close()
            raise AssertionError(f"{flow}: no echo")
        return link


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def differing(
    probes: Probes, expected: Mapping[Flow, bool], *, seconds: float = PATIENCE, again: float = 1.5
) -> dict[Flow, Answer]:
    """The flows whose answers are not what is expected (True: open).

    A flow that should be open and was silent is tried once more, with more patience: a busy machine is no denial. One
    that should be closed and was open is never excused.
    """
    answers = probes.try_all(expected, seconds)
    wrong = {flow: answer for flow, answer in answers.items() if (answer == "open") != expected[flow]}
    late = [flow for flow, answer in wrong.items() if answer == "silent"]
    if late:
        second = probes.try_all(late, again)
        wrong = {flow: second.get(flow, answer) for flow, answer in wrong.items() if second.get(flow) != "open"}
    return wrong
