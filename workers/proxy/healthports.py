"""The servers of ``healthCheckNodePort``: a load balancer asks each node whether it has endpoints of a Service.

Touches sockets, and a thread of its own: an answer does not wait for the worker's work. A port is open on all addresses
of the node, in both families. The answer is kube-router's (``/healthz``, text), or kube-proxy's (any path, JSON and its
headers) for who accepts ``application/json``. A port that cannot be opened is tried again at each `serve`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from kube_router.workers.model import Failure
from kube_router.workers.proxy.model import HealthCheck

log = logging.getLogger(__name__)

PHASE = "health-port"
REQUEST_SECONDS, REQUEST_BYTES, MOST_CLIENTS = 5.0, 8192, 256
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


@dataclass(slots=True)
class _Client:
    """One connection; ``end``: when it is given up, in monotonic seconds."""

    socket: socket.socket
    port: int
    end: float
    data: bytes = b""
    answer: bytes = b""


@dataclass(slots=True)
class _State:
    """What is told; replaced as a whole by the worker's thread, read by the servers'."""

    checks: Mapping[int, HealthCheck] = field(default_factory=dict)
    healthy: bool = False


class HealthPorts:
    """All ports and the thread that serves them, which begins with the first one."""

    def __init__(self) -> None:
        self._state = _State()
        self._listeners: dict[int, socket.socket] = {}
        self._clients: dict[int, _Client] = {}
        self._selector: selectors.BaseSelector | None = None
        self._thread: threading.Thread | None = None
        self._wake_read = self._wake_write = -1
        self._pending: list[Callable[[], None]] = []
        self._stopping = False

    def serve(self, checks: Mapping[int, HealthCheck], *, healthy: bool) -> tuple[Failure, ...]:
        """Serve just these ports, with these answers. ``healthy``: whether the proxy has done what was asked."""
        self._state = _State(dict(checks), healthy)
        for port in self._listeners.keys() - checks.keys():
            self._tell(partial(self._close_listener, self._listeners.pop(port)))
        failures = []
        for port in sorted(checks.keys() - self._listeners.keys()):
            try:
                self._listeners[port] = listener = _listen(port)
            except OSError as error:
                text = f"service {checks[port].service}: spec.healthCheckNodePort: {port}: {error.strerror or error}"
                failures.append(Failure(PHASE, text))
                continue
            self._start()
            self._tell(partial(self._watch, listener, port))
        return tuple(failures)

    def close(self) -> None:
        """Stop serving."""
        if self._thread is None:
            return
        self._stopping = True
        self._tell(lambda: None)
        self._thread.join()
        for listener in self._listeners.values():
            listener.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._thread = None

    # The worker's thread

    def _start(self) -> None:
        if self._thread is None:
            self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._wake_read, selectors.EVENT_READ)
            self._thread = threading.Thread(target=self._run, name="health-ports", daemon=True)
            self._thread.start()

    def _tell(self, act: Callable[[], None]) -> None:
        """Have the servers' thread do something."""
        self._pending.append(act)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"!")

    # The servers' thread

    def _run(self) -> None:
        assert self._selector is not None
        while not self._stopping:
            for key, _ in self._selector.select(1.0 if self._clients else None):
                if key.fd == self._wake_read:
                    self._take_orders()
                else:
                    key.data()
            now = time.monotonic()
            for client in [client for client in self._clients.values() if client.end <= now]:
                self._drop(client)
        for client in [*self._clients.values()]:
            self._drop(client)
        self._selector.close()

    def _take_orders(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        while self._pending:
            self._pending.pop(0)()

    def _watch(self, listener: socket.socket, port: int) -> None:
        assert self._selector is not None
        self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener, port))

    def _close_listener(self, listener: socket.socket) -> None:
        assert self._selector is not None
        with contextlib.suppress(KeyError):
            self._selector.unregister(listener)
        listener.close()

    def _accept(self, listener: socket.socket, port: int) -> None:
        assert self._selector is not None
        try:
            end, _ = listener.accept()
        except OSError:
            return
        if len(self._clients) >= MOST_CLIENTS:
            end.close()
            return
        end.setblocking(False)
        client = self._clients[end.fileno()] = _Client(end, port, time.monotonic() + REQUEST_SECONDS)
        self._selector.register(end, selectors.EVENT_READ, partial(self._talk, client))

    def _talk(self, client: _Client) -> None:
        assert self._selector is not None
        try:
            if not client.answer:
                data = client.socket.recv(4096)
                client.data += data
                if not data or len(client.data) > REQUEST_BYTES:
                    self._drop(client)
                    return
                if b"\r\n\r\n" not in client.data:
                    return
                client.answer = self._answer(client.port, client.data)
                self._selector.modify(client.socket, selectors.EVENT_WRITE, partial(self._talk, client))
            client.answer = client.answer[client.socket.send(client.answer) :]
        except BlockingIOError:
            return
        except OSError:
            client.answer = b""
        if not client.answer:
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        assert self._selector is not None
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(client.socket)
        self._clients = {number: each for number, each in self._clients.items() if each is not client}
        client.socket.close()

    def _answer(self, port: int, request: bytes) -> bytes:
        state = self._state
        check = state.checks.get(port)
        return answer(request, check, healthy=state.healthy) if check is not None else _response(404, "text/plain", b"")


def answer(request: bytes, check: HealthCheck, *, healthy: bool) -> bytes:
    """The response to an HTTP/1 request."""
    head, *fields = request.decode("latin-1").split("\r\n")
    words = head.split()
    if len(words) != 3:
        return _response(400, "text/plain", b"")
    if words[0] not in ("GET", "HEAD"):
        return _response(405, "text/plain", b"")
    accepts = [value for name, _, value in (line.partition(":") for line in fields) if name.lower() == "accept"]
    count, body = check.local_endpoints, words[0] == "GET"
    if any("application/json" in value for value in accepts):
        namespace, _, name = check.service.partition("/")
        said = {"service": {"namespace": namespace, "name": name}, "localEndpoints": count}
        text = json.dumps({**said, "serviceProxyHealthy": healthy}).encode()
        extra = ("X-Content-Type-Options: nosniff", f"X-Load-Balancing-Endpoint-Weight: {count}")
        return _response(200 if count and healthy else 503, "application/json", text, *extra, body=body)
    if words[1].partition("?")[0] != "/healthz":
        return _response(404, "text/plain; charset=utf-8", b"404 page not found\n", body=body)
    text = f"{count} Service Endpoints found\n".encode() if count else b"No Service Endpoints Found\n"
    return _response(200 if count else 503, "text/plain; charset=utf-8", text, body=body)


def _response(status: int, kind: str, text: bytes, *extra: str, body: bool = True) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", f"Content-Type: {kind}", f"Content-Length: {len(text)}"]
    lines += [*extra, "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + (text if body else b"")


def _listen(port: int) -> socket.socket:
    """On all addresses of both families, or of IPv4 where the host has no IPv6."""
    try:
        made = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError:
        if socket.has_dualstack_ipv6():
            raise
        made = socket.create_server(("0.0.0.0", port))
    made.setblocking(False)
    return made
