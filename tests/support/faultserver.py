"""An HTTP server in this process that speaks as much of the Kubernetes API as a list and a watch need, and misbehaves.

Left alone it is honest: pages, continue tokens, versions, bookmarks, streaming lists, 410 for what it has forgotten.
`fail` makes the next matching requests go wrong in a way of the caller's choice; the ready-made ways are below.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]
Act = Callable[["Request"], None]

OBJECT_KINDS = {
    "nodes": "Node",
    "pods": "Pod",
    "services": "Service",
    "endpointslices": "EndpointSlice",
    "networkpolicies": "NetworkPolicy",
    "namespaces": "Namespace",
}


@dataclass(frozen=True)
class Seen:
    """A request that came in."""

    method: str
    kind: str
    query: dict[str, str]
    authorization: str
    at: float

    @property
    def watch(self) -> bool:
        """Whether it was a watch."""
        return self.query.get("watch") in ("true", "1")


@dataclass
class _Fault:
    verb: str
    kind: str
    act: Act
    left: int


@dataclass
class _Collection:
    objects: dict[str, Object] = field(default_factory=dict)
    events: list[tuple[int, str, Object]] = field(default_factory=list)


class FaultServer:
    """The server; a context manager. Objects are set with `put` and `delete`; ``url`` is where it listens."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.streaming = True
        self.token: str | None = None
        self.chunk_bytes = 0  # 0: each event is a chunk
        self.requests: list[Seen] = []
        self.version = 100
        self.oldest = 0
        self._changed = threading.Condition()
        self._collections: dict[str, _Collection] = {kind: _Collection() for kind in OBJECT_KINDS}
        self._bookmarks = 0
        self._faults: list[_Fault] = []
        self._sockets: set[socket.socket] = set()
        self._dropped = 0
        self.closing = False
        owner = self

        class Handler(Request):
            server_state = owner

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that hangs up is not worth a traceback."""

        self._http = Server(("127.0.0.1", port), Handler)
        if tls is not None:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self.port = int(self._http.server_address[1])
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and hang up on everyone."""
        with self._changed:
            self.closing = True
            self._changed.notify_all()
        self._http.shutdown()
        self._http.server_close()
        self.drop_connections()

    # --- the cluster

    def put(self, kind: str, *items: Object) -> None:
        """Create or change objects."""
        with self._changed:
            collection = self._collections[kind]
            for given in items:
                key = _key(given)
                item = self._versioned(given)
                collection.events.append((self.version, "MODIFIED" if key in collection.objects else "ADDED", item))
                collection.objects[key] = item
            self._changed.notify_all()

    def delete(self, kind: str, name: str) -> None:
        """Delete an object by its key."""
        with self._changed:
            collection = self._collections[kind]
            item = self._versioned(collection.objects.pop(name))
            collection.events.append((self.version, "DELETED", item))
            self._changed.notify_all()

    def _versioned(self, item: Object) -> Object:
        self.version += 1
        return {**item, "metadata": {**item["metadata"], "resourceVersion": str(self.version)}}

    def compact(self) -> None:
        """Forget all versions but the newest."""
        with self._changed:
            self.version += 1
            self.oldest = self.version

    def bookmark(self) -> None:
        """Send a bookmark on every watch."""
        with self._changed:
            self.version += 1
            self._bookmarks += 1
            self._changed.notify_all()

    def drop_connections(self) -> None:
        """Hang up on everyone, in the middle of whatever it is."""
        with self._changed:
            self._dropped += 1
            self._changed.notify_all()
            for connection in list(self._sockets):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    # --- faults

    def fail(self, verb: str, act: Act, *, kind: str = "", times: int = 1) -> None:
        """Let the next ``times`` requests of ``verb`` (list, watch, get, post, patch) for ``kind`` do ``act``."""
        with self._changed:
            self._faults.append(_Fault(verb, kind, act, times))

    def fault_for(self, verb: str, kind: str) -> Act | None:
        """The act that is due, if any."""
        with self._changed:
            for fault in self._faults:
                if fault.left > 0 and fault.verb == verb and fault.kind in ("", kind):
                    fault.left -= 1
                    return fault.act
            return None

    def asked(self, verb: str, kind: str = "nodes") -> list[Seen]:
        """The list or watch requests for a kind so far."""
        return [seen for seen in list(self.requests) if seen.kind == kind and seen.watch == (verb == "watch")]

    # --- for the handler

    def snapshot(self, kind: str) -> tuple[int, list[Object]]:
        """(version, objects) of a kind."""
        with self._changed:
            return self.version, [item for _, item in sorted(self._collections[kind].objects.items())]

    def wait_for_news(self, kind: str, after: int, state: tuple[int, int], seconds: float) -> Any:
        """(events newer than ``after``, version, (bookmarks, dropped)) as soon as one of them is news."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                events = [event for event in self._collections[kind].events if event[0] > after]
                now = (self._bookmarks, self._dropped)
                left = deadline - time.monotonic()
                if events or now != state or self.closing or left <= 0:
                    return events, self.version, now, self.closing or left <= 0
                self._changed.wait(left)

    @property
    def marks(self) -> tuple[int, int]:
        """Bookmarks and hang-ups so far."""
        with self._changed:
            return self._bookmarks, self._dropped


class Request(BaseHTTPRequestHandler):
    """One request; an `Act` gets it and answers in its own way, `honest` answers rightly."""

    protocol_version = "HTTP/1.1"
    server_state: FaultServer
    kind: str
    query: dict[str, str]

    def setup(self) -> None:
        """Remember the connection, so that it can be dropped."""
        super().setup()
        self.server_state._sockets.add(self.connection)

    def finish(self) -> None:
        """Forget it."""
        self.server_state._sockets.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""

    def do_GET(self) -> None:
        """A list, a watch or one object."""
        self._begin()
        verb = "watch" if self.query.get("watch") in ("true", "1") else "list"
        self._answer(verb, self.honest)

    def do_POST(self) -> None:
        """Take what is created and give it back."""
        self._begin()
        body = self.body()
        self._answer("post", lambda: self.send(201, body))

    def do_PATCH(self) -> None:
        """Take a change and give it back."""
        self._begin()
        body = self.body()
        self._answer("patch", lambda: self.send(200, body))

    def body(self) -> bytes:
        """The request's body."""
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _begin(self) -> None:
        parts = urlsplit(self.path)
        match = re.search(r"/([a-z]+)(?:/[^/]+)?$", parts.path)
        last = parts.path.rsplit("/", 1)[-1]
        self.kind = last if last in OBJECT_KINDS or not match else match[1]
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        authorization = self.headers.get("Authorization", "")
        self.server_state.requests.append(Seen(self.command, self.kind, self.query, authorization, time.monotonic()))

    def _answer(self, verb: str, honest: Callable[[], None]) -> None:
        state = self.server_state
        if act := state.fault_for(verb, self.kind):
            act(self)
        elif state.token is not None and self.headers.get("Authorization") != f"Bearer {state.token}":
            self.send_status(401, "Unauthorized", "Unauthorized")
        else:
            honest()

    # --- honest answers

    def honest(self) -> None:
        """Answer a list or watch as an API server does."""
        if self.query.get("watch") in ("true", "1"):
            self.honest_watch()
        else:
            self.honest_list()

    def honest_list(self) -> None:
        """A list, in pages if asked."""
        version, items = self.server_state.snapshot(self.kind)
        start = 0
        if token := self.query.get("continue"):
            start, version = map(int, token.split("@"))
            if version < self.server_state.oldest:
                self.send_status(410, "Expired", "The provided continue parameter is too old")
                return
        limit = int(self.query.get("limit", 0)) or len(items)
        meta: Object = {"resourceVersion": str(version)}
        if start + limit < len(items):
            meta["continue"] = f"{start + limit}@{version}"
        page = {"kind": f"{OBJECT_KINDS[self.kind]}List", "metadata": meta, "items": items[start : start + limit]}
        self.send(200, json.dumps(page).encode())

    def honest_watch(self) -> None:
        """A watch, from a version or with everything first."""
        state = self.server_state
        initial = self.query.get("sendInitialEvents") == "true"
        if initial and not state.streaming:
            self.send_status(422, "Invalid", "sendInitialEvents: Forbidden: the WatchList feature gate is disabled")
            return
        version = int(self.query.get("resourceVersion") or 0)
        if not initial and version < state.oldest:
            self.start_stream()
            self.send_event("ERROR", status(410, "Expired", "too old resource version"))
            self.end_stream()
            return
        marks = state.marks
        self.start_stream()
        if initial:
            version, items = state.snapshot(self.kind)
            for item in items:
                self.send_event("ADDED", item)
            self.send_bookmark(version, {"k8s.io/initial-events-end": "true"})
        self.follow(version, marks)

    def follow(self, version: int, marks: tuple[int, int]) -> None:
        """Send events as they happen, until the client's timeout."""
        deadline = time.monotonic() + float(self.query.get("timeoutSeconds", 60))
        while True:
            left = deadline - time.monotonic()
            events, now, new, over = self.server_state.wait_for_news(self.kind, version, marks, left)
            for at, kind, item in events:
                version = at
                self.send_event(kind, item)
            if new[0] != marks[0]:
                self.send_bookmark(now, {})
            if new[1] != marks[1]:
                self.close_connection = True
                return
            marks = new
            if over:
                self.end_stream()
                return

    # --- pieces

    def send(self, code: int, data: bytes, content_type: str = "application/json", **headers: str) -> None:
        """A whole answer; header names are given with ``_`` for ``-``."""
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def send_status(self, code: int, reason: str, message: str, **headers: str) -> None:
        """A ``Status`` as an API server sends it."""
        self.send(code, json.dumps(status(code, reason, message)).encode(), **headers)

    def start_stream(self, content_type: str = "application/json") -> None:
        """The head of a watch's answer."""
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()

    def send_event(self, kind: str, item: Object) -> None:
        """One line of a watch."""
        self.send_chunks(json.dumps({"type": kind, "object": item}).encode() + b"\n")

    def send_bookmark(self, version: int, annotations: dict[str, str]) -> None:
        """A bookmark, with the nulls that a real one has."""
        meta = {"resourceVersion": str(version), "creationTimestamp": None, "annotations": annotations or None}
        self.send_event("BOOKMARK", {"kind": OBJECT_KINDS[self.kind], "metadata": meta, "spec": {}, "status": None})

    def send_chunks(self, data: bytes) -> None:
        """Chunks of the server's ``chunk_bytes``; a chunk is no message, it may end anywhere."""
        size = self.server_state.chunk_bytes or len(data)
        for start in range(0, len(data), size):
            part = data[start : start + size]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.flush()

    def end_stream(self) -> None:
        """The proper end."""
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def hang_up(self) -> None:
        """End the connection without one."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


def status(code: int, reason: str, message: str, **details: Any) -> Object:
    """A ``metav1.Status``."""
    body: Object = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return {**body, "code": code, "reason": reason, "message": message, "details": details or None}


def _key(item: Object) -> str:
    meta = item["metadata"]
    return f"{meta['namespace']}/{meta['name']}" if meta.get("namespace") else str(meta["name"])


# --- ready-made faults


def answer_status(code: int, reason: str = "", message: str = "", **headers: str) -> Act:
    """Refuse with a Status."""
    return lambda request: request.send_status(code, reason, message, **headers)


def answer_body(data: bytes, content_type: str = "application/json", code: int = 200) -> Act:
    """Answer something else."""
    return lambda request: request.send(code, data, content_type)


def stream(data: bytes, *, end: bool = False, content_type: str = "application/json") -> Act:
    """Answer a watch with these bytes; then end it properly or hang up."""

    def act(request: Request) -> None:
        request.start_stream(content_type)
        request.send_chunks(data)
        request.end_stream() if end else request.hang_up()

    return act


def hang_up(request: Request) -> None:
    """Close without a word."""
    request.hang_up()


def stay_silent(request: Request) -> None:
    """Take the request and never answer (until the server closes)."""
    request.server_state.wait_for_news(request.kind, 1 << 60, request.server_state.marks, 120)
    request.close_connection = True


def open_and_stay_silent(request: Request) -> None:
    """Begin a watch and never send a line."""
    request.start_stream()
    stay_silent(request)


def cut_body(keep: int) -> Act:
    """Promise a whole list, send ``keep`` bytes of it, hang up."""

    def act(request: Request) -> None:
        version, items = request.server_state.snapshot(request.kind)
        kind = f"{OBJECT_KINDS[request.kind]}List"
        data = json.dumps({"kind": kind, "metadata": {"resourceVersion": str(version)}, "items": items}).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[:keep])
        request.hang_up()

    return act
