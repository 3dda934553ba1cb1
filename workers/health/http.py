"""A small HTTP server for a few fixed pages, in one thread and without ever waiting.

Touches sockets. Made to live in another loop: `descriptors` are to be watched, `turn` does what can be done at once.
What a flood or a slow client may cost is bounded: connections, bytes of a request, seconds for it and for the answer;
the oldest connection gives way to a new one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

REQUEST_SECONDS = 5.0
"""As upstream's header read timeout; the answer must be taken within as long again."""
REQUEST_BYTES = 8192
MOST_CONNECTIONS = 64
ACCEPTED_AT_ONCE = 16
RETRY_SECONDS = 2.0
WRITE_RETRY_SECONDS = 0.05
WILDCARDS = ("", "0.0.0.0", "::")
"""Every address of both families, as in Go's ``net.Listen``."""
STATUS_TEXTS = {200: "OK", 400: "Bad Request", 404: "Not Found", 500: "Internal Server Error"}


@dataclass(frozen=True, slots=True)
class Page:
    """An answer."""

    status: int
    body: str
    content_type: str = "text/plain; charset=utf-8"

    def encode(self, method: str) -> bytes:
        """The whole response; HEAD has no body."""
        body = self.body.encode()
        head = (
            f"HTTP/1.1 {self.status} {STATUS_TEXTS[self.status]}\r\nContent-Type: {self.content_type}\r\n"
            f"Content-Length: {len(body)}\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == "HEAD" else body)


Pages = Mapping[str, Callable[[], Page]]


@dataclass(slots=True)
class Connection:
    """``deadline`` is for the request, then for the answer; ``answer`` is empty while the request comes in."""

    socket: socket.socket
    pages: Pages
    deadline: float
    request: bytes = b""
    answer: bytes = field(default=b"")


class Listening:
    """One address to listen on, tried again every `RETRY_SECONDS` while it cannot be had."""

    def __init__(self, flag: str, address: str, port: int, pages: Pages) -> None:
        """``flag`` is the stem of the flags that say so (``health``: --health-addr, --health-port)."""
        self.flag, self.port, self.pages = flag, port, pages
        self.address = address.removeprefix("[").removesuffix("]")
        self.socket: socket.socket | None = None
        self.trouble = ""
        self._retry_at = 0.0

    def open(self, now: float) -> None:
        """Try to listen; says once why it cannot."""
        if self.socket is not None or now < self._retry_at:
            return
        try:
            self.socket = listen(self.address, self.port)
        except OSError as error:
            self._retry_at = now + RETRY_SECONDS
            where = f"--{self.flag}-addr={self.address}, --{self.flag}-port={self.port}"
            trouble = f"{where}: cannot listen: {reason(error, self.port)}"
            if trouble != self.trouble:
                log.error("%s; trying again every %g s", trouble, RETRY_SECONDS)
            self.trouble = trouble
            return
        if self.trouble:
            log.info("--%s-port=%d: listening now", self.flag, self.port)
        self.trouble = ""


def reason(error: OSError, port: int) -> str:
    """Why a port cannot be had, in words."""
    if error.errno == errno.EACCES and port < 1024:
        return "ports below 1024 need root, which the health worker is not"
    return os.strerror(error.errno) if error.errno else str(error)


def listen(address: str, port: int) -> socket.socket:
    """A listening socket that does not block; raises OSError. A wildcard is both families where there are both."""
    host, family = address, socket.AF_INET6 if ":" in address else socket.AF_INET
    if address in WILDCARDS:
        host, family = ("::", socket.AF_INET6) if socket.has_dualstack_ipv6() else ("0.0.0.0", socket.AF_INET)
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address in WILDCARDS else 1)
        # As bytes: for text Python loads its tables for international names, a megabyte.
        place = socket.getaddrinfo(host.encode(), port, family, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)[0][4]
        listener.bind(place)
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


class Server:
    """All addresses and all connections."""

    def __init__(self, listenings: list[Listening]) -> None:
        self._listenings = listenings
        self._connections: dict[int, Connection] = {}

    @property
    def troubles(self) -> tuple[str, ...]:
        """One line for each address that cannot be listened on."""
        return tuple(listening.trouble for listening in self._listenings if listening.trouble)

    def descriptors(self) -> list[int]:
        """What to watch for input."""
        listeners = [listening.socket.fileno() for listening in self._listenings if listening.socket is not None]
        return [*listeners, *(number for number, each in self._connections.items() if not each.answer)]

    def wait(self, now: float) -> float:
        """Seconds after which `turn` is due without any input; at most `RETRY_SECONDS`."""
        if any(connection.answer for connection in self._connections.values()):
            return WRITE_RETRY_SECONDS
        deadlines = [connection.deadline for connection in self._connections.values()]
        return max(0.0, min([now + RETRY_SECONDS, *deadlines]) - now)

    def turn(self, ready: set[int], now: float) -> None:
        """Take what has come on ``ready`` descriptors, write what can be written, drop what has taken too long."""
        for number in list(self._connections):
            connection = self._connections[number]
            if connection.answer:
                self._write(number, connection)
            elif number in ready:
                self._read(number, connection, now)
            if now >= connection.deadline:
                self._close(number)
        for listening in self._listenings:
            listening.open(now)
            if listening.socket is not None and listening.socket.fileno() in ready:
                self._accept(listening, now)

    def close(self) -> None:
        """Close everything."""
        for number in list(self._connections):
            self._close(number)
        for listening in self._listenings:
            if listening.socket is not None:
                listening.socket.close()

    def _accept(self, listening: Listening, now: float) -> None:
        assert listening.socket is not None
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                accepted, _address = listening.socket.accept()
            except OSError:  # none left, gone again, or out of descriptors: then the oldest makes room
                if len(self._connections) > 1 and not _is_empty(listening.socket):
                    self._close(next(iter(self._connections)))
                return
            accepted.setblocking(False)
            if len(self._connections) >= MOST_CONNECTIONS:
                self._close(next(iter(self._connections)))
            self._connections[accepted.fileno()] = Connection(accepted, listening.pages, now + REQUEST_SECONDS)

    def _read(self, number: int, connection: Connection, now: float) -> None:
        try:
            data = connection.socket.recv(REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(number)
            return
        connection.request += data
        head, end, _body = connection.request.partition(b"\r\n\r\n")
        if end or b"\n\n" in connection.request or len(connection.request) > REQUEST_BYTES:
            connection.answer = answer(head, connection.pages)
            connection.deadline = now + REQUEST_SECONDS
            self._write(number, connection)

    def _write(self, number: int, connection: Connection) -> None:
        try:
            sent = connection.socket.send(connection.answer)
        except BlockingIOError:
            return
        except OSError:
            self._close(number)
            return
        connection.answer = connection.answer[sent:]
        if not connection.answer:
            # Unread input at close would make the kernel reset the connection and the client lose the answer.
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)
                connection.socket.recv(REQUEST_BYTES)
            self._close(number)

    def _close(self, number: int) -> None:
        if (connection := self._connections.pop(number, None)) is not None:
            connection.socket.close()


def _is_empty(listener: socket.socket) -> bool:
    """Whether no connection waits to be accepted."""
    import select

    return not select.select([listener], [], [], 0)[0]


def answer(head: bytes, pages: Pages) -> bytes:
    """The response to a request's head; any method is answered alike, as upstream does."""
    words = head.splitlines()[0].split() if head.splitlines() else []
    if len(words) not in (2, 3) or len(head) > REQUEST_BYTES or not words[1].startswith(b"/"):
        return Page(400, "Bad Request\n").encode("GET")
    method, target = words[0].decode("latin-1"), words[1].decode("latin-1")
    page = pages.get(target.partition("?")[0])
    return (page() if page is not None else Page(404, "404 page not found\n")).encode(method)
