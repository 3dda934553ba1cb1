"""A netlink socket: many requests in one write, their errors one by one, and consistent dumps.

Touches the kernel: AF_NETLINK sockets of the calling thread's network namespace. Knows the framing (RFC 3549,
``include/uapi/linux/netlink.h``) and nothing of any family's meaning. Two habits of the kernel shape it:

- requests are handled inside ``sendmsg``, so every answer is queued when it returns; an acknowledgement costs about a
  kilobyte of receive buffer. Therefore a batch asks for one acknowledgement, of its last message (errors always come),
  and batches are cut to `BATCH_BYTES`.
- a dump may be torn by a change (``NLM_F_DUMP_INTR``): it is read again.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_ROOT, NLM_F_MATCH = 0x100, 0x200
NLM_F_DUMP = NLM_F_ROOT | NLM_F_MATCH
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200
NLA_F_NESTED, NLA_F_NET_BYTEORDER, NLA_TYPE_MASK = 0x8000, 0x4000, 0x3FFF

_NLMSG_ERROR, _NLMSG_DONE, _NLMSG_OVERRUN = 2, 3, 4
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 1, 10, 11, 12
_NLMSGERR_ATTR_MSG = 1
_SO_ATTACH_FILTER, _SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 26, 32, 33
_NFNL_BATCH_BEGIN, _NFNL_BATCH_END = 0x10, 0x11

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")

BATCH_BYTES = 48 * 1024
"""Most bytes in one write; below the default send buffer (``net.core.wmem_default``, 208 KiB)."""
DUMP_TRIES = 8
ANSWER_SECONDS = 10.0
"""An answer that takes longer is an error; the kernel answers within the write, except for dumps."""


class NetlinkError(OSError):
    """The kernel refused a request: ``errno``, and its own words (extended ack) when it gave some."""

    def __init__(self, number: int, words: str = "") -> None:
        super().__init__(number, words or os.strerror(number))


class Overflow(Exception):
    """The receive buffer was too small and messages are lost: what they told must be read again."""


class Request(NamedTuple):
    """One request: message type, flags besides ``NLM_F_REQUEST``, and family header with attributes."""

    type: int
    flags: int
    payload: bytes


class Message(NamedTuple):
    """One message from the kernel; ``portid`` tells who caused an event (0: the kernel itself)."""

    type: int
    flags: int
    portid: int
    payload: memoryview


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute (``struct nlattr``), padded to 4 bytes."""
    length = 4 + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + b"\0" * (-length % 4)


def text_attribute(kind: int, value: str) -> bytes:
    """A NUL-terminated string attribute."""
    return attribute(kind, value.encode() + b"\0")


def nested(kind: int, *children: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(children))


def attributes(data: memoryview | bytes, offset: int = 0) -> Iterator[tuple[int, memoryview]]:
    """(kind without flags, value) of every attribute from ``offset`` on; stops at garbage."""
    view = memoryview(data)
    end = len(view)
    while end - offset >= 4:
        length, kind = _ATTRIBUTE.unpack_from(view, offset)
        if length < 4 or length > end - offset:
            return
        yield kind & NLA_TYPE_MASK, view[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def text_of(value: memoryview | bytes) -> str:
    """The text of a NUL-terminated string attribute."""
    return bytes(value).split(b"\0", 1)[0].decode("utf-8", "replace")


def split_messages(data: bytes) -> Iterator[tuple[int, Message]]:
    """(sequence number, message) of everything in one datagram; stops at garbage."""
    view, offset = memoryview(data), 0
    while len(data) - offset >= _HEADER.size:
        length, kind, flags, sequence, portid = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or length > len(data) - offset:
            return
        yield sequence, Message(kind, flags, portid, view[offset + _HEADER.size : offset + length])
        offset += (length + 3) & ~3


def error_of(message: Message) -> NetlinkError | None:
    """The error in an NLMSG_ERROR or NLMSG_DONE message; None for an acknowledgement."""
    if len(message.payload) < 4:
        return None
    (number,) = _ERROR.unpack_from(message.payload)
    if number >= 0:
        return None
    words = ""
    if message.flags & NLM_F_ACK_TLVS:
        offset = 4
        if message.type == _NLMSG_ERROR:
            (echoed,) = struct.unpack_from("=I", message.payload, 4)
            offset += _HEADER.size if message.flags & NLM_F_CAPPED else (echoed + 3) & ~3
        found = dict(attributes(message.payload, offset))
        words = text_of(found.get(_NLMSGERR_ATTR_MSG, b""))
    return NetlinkError(-number, words)


class NetlinkSocket:
    """A socket of one netlink protocol, or with ``groups``, a listener.

    ``writes`` counts requests sent by `batch`, the only way to change something. Creating it binds it to the network
    namespace that the calling thread is in at that moment.
    """

    def __init__(self, protocol: int, groups: Iterable[int] = (), receive_bytes: int = 1 << 20) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._sequence = 0
        self.writes = 0
        try:
            self._set_buffer(receive_bytes)
            for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK):
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            if protocol == NETLINK_ROUTE:
                self._socket.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
            self._socket.bind((0, 0))
            self.portid: int = self._socket.getsockname()[0]
            for group in groups:
                self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
            self._socket.settimeout(ANSWER_SECONDS)
        except BaseException:
            self._socket.close()
            raise

    def _set_buffer(self, size: int) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
        except PermissionError:  # without CAP_NET_ADMIN only up to net.core.rmem_max
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

    def fileno(self) -> int:
        """For poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def batch(self, requests: Sequence[Request]) -> dict[int, NetlinkError]:
        """Send all requests, in order; the index of each that the kernel refused, with its error.

        A refused request stops none after it. Raises `Overflow` when answers were lost: then nothing is known of the
        batch, and the state must be read again.
        """
        errors: dict[int, NetlinkError] = {}
        start = 0
        while start < len(requests):
            end, size = start, 0
            while end < len(requests) and (end == start or size + len(requests[end].payload) + 20 <= BATCH_BYTES):
                size += len(requests[end].payload) + 20
                end += 1
            self._send(requests[start:end], start, errors)
            start = end
        return errors

    def _send(self, requests: Sequence[Request], index: int, errors: dict[int, NetlinkError]) -> None:
        first = self._sequence + 1
        self._sequence += len(requests)
        parts = []
        for number, request in enumerate(requests):
            ack = NLM_F_ACK if number == len(requests) - 1 else 0
            length = _HEADER.size + len(request.payload)
            flags = request.flags | NLM_F_REQUEST | ack
            parts.append(_HEADER.pack(length, request.type, flags, first + number, self.portid))
            parts.append(request.payload + b"\0" * (-length % 4))
        self.writes += len(requests)
        self._socket.sendto(b"".join(parts), (0, 0))
        while True:
            for sequence, message in split_messages(self._receive()):
                if message.type != _NLMSG_ERROR or not first <= sequence <= self._sequence:
                    continue
                error = error_of(message)
                if error is not None:
                    errors[index + sequence - first] = error
                if sequence == self._sequence:
                    return

    def transaction(self, subsystem: int, requests: Sequence[Request]) -> dict[int, NetlinkError]:
        """Send all requests as one batch of nfnetlink: all happen, or none. The index of each refused one, its error.

        Raises `NetlinkError` when the batch as a whole is refused (no right to do it), `Overflow` like `batch`.
        """
        if not requests:
            return {}
        header = struct.pack("=BBH", 0, 0, socket.htons(subsystem))
        begin = self._sequence + 1
        first, last = begin + 1, begin + len(requests)
        self._sequence = last + 1
        parts = [_HEADER.pack(_HEADER.size + len(header), _NFNL_BATCH_BEGIN, NLM_F_REQUEST, begin, self.portid), header]
        for sequence, request in enumerate(requests, first):
            flags = request.flags | NLM_F_REQUEST | (NLM_F_ACK if sequence == last else 0)
            length = _HEADER.size + len(request.payload)
            parts.append(_HEADER.pack(length, request.type, flags, sequence, self.portid))
            parts.append(request.payload + b"\0" * (-length % 4))
        parts.append(_HEADER.pack(_HEADER.size + len(header), _NFNL_BATCH_END, NLM_F_REQUEST, last + 1, self.portid))
        parts.append(header)
        self._send_whole(b"".join(parts), header)
        self.writes += len(requests)
        return self._verdicts(begin, last)

    def _send_whole(self, data: bytes, header: bytes) -> None:
        """One write, whatever its size: the kernel takes a batch only in one piece."""
        needed = len(data) + len(header) + 4096
        if needed > self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF):
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, needed)
            except PermissionError:  # without CAP_NET_ADMIN it will be refused anyway
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, needed)
        self._socket.sendto(data, (0, 0))

    def _verdicts(self, begin: int, last: int) -> dict[int, NetlinkError]:
        errors: dict[int, NetlinkError] = {}
        while True:
            for sequence, message in split_messages(self._receive()):
                if message.type != _NLMSG_ERROR or not begin <= sequence <= last + 1:
                    continue
                error = error_of(message)
                if error is not None and sequence in (begin, last + 1):
                    raise error
                if error is not None:
                    errors[sequence - begin - 1] = error
                if sequence == last:
                    return errors

    def dump(self, kind: int, payload: bytes, flags: int = NLM_F_DUMP) -> list[Message]:
        """All messages of a dump, read again when the kernel says that it was torn by a change."""
        for _ in range(DUMP_TRIES):
            messages, torn = self._dump_once(kind, payload, flags)
            if not torn:
                return messages
        raise NetlinkError(errno.EINTR, f"the table changed during each of {DUMP_TRIES} dumps")

    def _dump_once(self, kind: int, payload: bytes, flags: int) -> tuple[list[Message], bool]:
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(payload), kind, flags | NLM_F_REQUEST, self._sequence, self.portid)
        self._socket.sendto(header + payload, (0, 0))
        messages: list[Message] = []
        torn = False
        while True:
            for sequence, message in split_messages(self._receive()):
                if sequence != self._sequence:
                    continue
                torn = torn or bool(message.flags & NLM_F_DUMP_INTR)
                if message.type in (_NLMSG_DONE, _NLMSG_ERROR):
                    error = error_of(message)
                    if error is not None:
                        raise error
                    return messages, torn
                messages.append(message)

    def stream(self, kind: int, payload: bytes) -> Iterator[Message]:
        """The messages of a dump as they come, so that memory holds few of a large table; to be taken to the end.

        For tables that change all the time and whose entries stand alone: whether it was torn is not told.
        """
        self._sequence += 1
        flags = NLM_F_DUMP | NLM_F_REQUEST
        header = _HEADER.pack(_HEADER.size + len(payload), kind, flags, self._sequence, self.portid)
        self._socket.sendto(header + payload, (0, 0))
        while True:
            for sequence, message in split_messages(self._receive()):
                if sequence != self._sequence:
                    continue
                if message.type in (_NLMSG_DONE, _NLMSG_ERROR):
                    error = error_of(message)
                    if error is not None:
                        raise error
                    return
                yield message

    def query(self, kind: int, payload: bytes) -> Message:
        """The single answer to a request; raises `NetlinkError`."""
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(payload), kind, NLM_F_REQUEST, self._sequence, self.portid)
        self._socket.sendto(header + payload, (0, 0))
        while True:
            for sequence, message in split_messages(self._receive()):
                if sequence != self._sequence:
                    continue
                if message.type == _NLMSG_ERROR:
                    raise error_of(message) or NetlinkError(errno.EPROTO, "acknowledged instead of answered")
                return message

    def ignore(self, portids: Iterable[int]) -> None:
        """Let the kernel drop what the sockets ``portids`` cause, before it takes room in this listener's buffer."""
        # One datagram holds messages of one cause. A classic BPF program over it: load the word at 12 (nlmsg_pid).
        numbers = [int.from_bytes(struct.pack("=I", portid), "big") for portid in portids]
        program = [(0x20, 0, 0, 12)]
        program += [(0x15, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
        program += [(0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
        filter_program = struct.pack("@HP", len(program), ctypes.addressof(code))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_program)

    def events(self) -> Iterator[Message]:
        """Everything that a listener has received and not yet read, without waiting; raises `Overflow`."""
        self._socket.setblocking(False)
        while True:
            try:
                data = self._receive()
            except BlockingIOError:
                return
            for _, message in split_messages(data):
                if message.type == _NLMSG_OVERRUN:
                    raise Overflow
                if message.type > _NLMSG_OVERRUN:
                    yield message

    def _receive(self) -> bytes:
        while True:
            try:
                data, (sender, _) = self._socket.recvfrom(1 << 17)
            except TimeoutError:
                raise NetlinkError(errno.ETIMEDOUT, f"the kernel gave no answer in {ANSWER_SECONDS:g} s") from None
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    raise Overflow from None
                raise
            if sender == 0:  # anybody may send to a netlink socket; only the kernel's word counts
                return data


def attribute_map(data: memoryview | bytes, offset: int = 0) -> Mapping[int, memoryview]:
    """The attributes as a mapping; the last of a kind wins."""
    return dict(attributes(data, offset))
