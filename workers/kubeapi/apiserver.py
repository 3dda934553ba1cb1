"""Requests to the API server: connections, credentials, and one clear line for everything that can go wrong.

Touches the network. Threads share one `ApiServer`. Redirects are not followed. Retried are, once and
at once, a 401 with credentials loaded again and a GET whose connection broke off: the callers know what else to repeat.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlencode, urlsplit
from urllib.request import proxy_bypass

import msgspec
import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)

from kube_router.workers.kubeapi.credentials import Access, BadAccess, Credentials, load_access
from kube_router.workers.kubeapi.status import Status

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0
"""The API server's own limit for a request that is no watch."""
MAX_ERROR_BYTES = 64 << 10
MAX_RETRY_AFTER = 120.0

SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]
"""A peer that vanished without a word is noticed within 50 s, also on a quiet watch."""

STATUS = msgspec.json.Decoder(Status)


class Response(Protocol):
    """What is used of ``urllib3.BaseHTTPResponse``."""

    status: int
    headers: Mapping[str, str]

    def read(self, amt: int | None = None) -> bytes: ...
    def read1(self, amt: int | None = None) -> bytes: ...
    def close(self) -> None: ...
    def shutdown(self) -> None: ...


class ApiError(Exception):
    """A request failed; ``str()`` is one line without secrets.

    ``status``: HTTP status, None when there was no answer. ``expired``: the resourceVersion is too old or unknown to
    the server, only a new list helps. ``retry_after``: seconds that the server asks for. ``silent``: a timeout.
    """

    def __init__(
        self,
        text: str,
        *,
        status: int | None = None,
        expired: bool = False,
        retry_after: float = 0.0,
        silent: bool = False,
    ) -> None:
        super().__init__(text)
        self.status, self.expired, self.retry_after, self.silent = status, expired, retry_after, silent


class ApiServer:
    """The way to one API server; made from `Credentials`, which may change under way."""

    def __init__(self, credentials: Credentials, worker: str = "watcher") -> None:
        """``worker`` stands in the User-Agent header."""
        self._credentials, self._agent = credentials, f"kube-router/{worker}"
        self._lock = threading.Lock()
        self._pool: urllib3.PoolManager | None = None
        self._pool_access: Access | None = None

    @property
    def name(self) -> str:
        """``Kubernetes API`` and its address, as far as known."""
        return f"Kubernetes API {self._pool_access.server}" if self._pool_access else "Kubernetes API"

    def open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        content_type: str = "application/json",
        silence: float = ANSWER_SECONDS,
    ) -> Response:
        """Send a request and return the response with its body still to read; raises `ApiError` for all but 2xx.

        ``silence``: seconds without a byte, before the answer or within it, after which the server counts as gone.
        """
        headers = {"Accept": "application/json", "User-Agent": self._agent, "Accept-Encoding": "identity"}
        if body is not None:
            headers["Content-Type"] = content_type
        target = path + ("?" + urlencode(query) if query else "")
        response = self._try(method, target, headers, body, silence)
        if response.status == 401:  # the credentials are loaded anew for the second attempt
            self._drain(response)
            response = self._try(method, target, headers, body, silence)
        if not 200 <= response.status < 300:
            raise self._refusal(response)
        return response

    def _try(self, method: str, target: str, headers: dict[str, str], body: bytes | None, silence: float) -> Response:
        pool, access = self._connect()
        if access.authorization:
            headers = {**headers, "Authorization": access.authorization}
        response = self._send(pool, method, access.server + target, headers, body, silence)
        if response.status == 401:
            with self._lock:
                self._credentials.refused(access)
        return response

    def _connect(self) -> tuple[urllib3.PoolManager, Access]:
        with self._lock:
            try:
                access = self._credentials.current()
            except BadAccess as error:
                raise ApiError(str(error)) from None
            if self._pool is None or access is not self._pool_access:
                self._pool, self._pool_access = make_pool(access), access
            return self._pool, access

    def _send(
        self,
        pool: urllib3.PoolManager,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | None,
        silence: float,
    ) -> Response:
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=silence)
        # A server may close a kept connection at the very moment it is used again: that says nothing about it.
        for last in (method != "GET", True):
            try:
                response: Any = pool.request(
                    method, url, headers=headers, body=body, timeout=timeout, retries=False, preload_content=False
                )
                return response  # type: ignore[no-any-return]
            except (HTTPError, OSError, ValueError) as error:
                if last or not isinstance(error, ProtocolError):
                    raise self.failure(error, silence) from None
        raise AssertionError("the last attempt returns or raises")

    def _drain(self, response: Response) -> bytes:
        try:
            data = response.read(MAX_ERROR_BYTES)
        except (HTTPError, OSError):
            data = b""
        response.close()
        return data

    def _refusal(self, response: Response) -> ApiError:
        data = self._drain(response)
        try:
            status = STATUS.decode(data)
        except msgspec.MsgspecError:
            status = Status(kind="")
        if status.kind != "Status":
            status = Status(kind="Status", message="")
        status.code = response.status
        return status_error(status, _seconds(response.headers.get("Retry-After")))

    def failure(self, error: Exception, silence: float) -> ApiError:
        """The `ApiError` for an exception out of a connection."""
        reason, silent = explain(error, silence)
        return ApiError(f"{self.name}: {reason}", silent=silent)


def make_server(kubeconfig: str, master: str, worker: str) -> ApiServer:
    """The way to the API server that the flags name, for ``worker``. Nothing is read yet."""
    return ApiServer(Credentials(lambda: load_access(kubeconfig, master)), worker)


def make_pool(access: Access) -> urllib3.PoolManager:
    """A connection pool for one access; connections are made when they are needed."""
    options: dict[str, Any] = {"maxsize": 8, "socket_options": SOCKET_OPTIONS}
    if access.tls is not None:
        options["ssl_context"] = access.tls
        if access.server_name:
            options["server_hostname"] = options["assert_hostname"] = access.server_name
        if access.tls.verify_mode == ssl.CERT_NONE:
            options["cert_reqs"] = "CERT_NONE"
    if access.proxy and not proxy_bypass(urlsplit(access.server).hostname or ""):
        return urllib3.ProxyManager(access.proxy, **options)
    return urllib3.PoolManager(**options)


def status_error(status: Status, retry_after: float = 0.0) -> ApiError:
    """The `ApiError` that a ``metav1.Status`` means, from an answer or from inside a watch."""
    details = status.details
    causes = {cause.reason for cause in (details.causes if details else None) or ()}
    text = " ".join(part for part in (str(status.code or ""), status.reason or "") if part) or "error"
    if status.message:
        text += f": {one_line(status.message)}"
    return ApiError(
        text,
        status=status.code,
        # A server restored from a backup does not know our version yet; waiting for it would mean waiting for ever.
        expired=status.code == 410 or "ResourceVersionTooLarge" in causes,
        retry_after=max(retry_after, min(float((details and details.retry_after_seconds) or 0), MAX_RETRY_AFTER)),
    )


def explain(error: Exception, silence: float) -> tuple[str, bool]:
    """One phrase for an exception of urllib3 or ssl, and whether it was a silence."""
    if isinstance(error, NameResolutionError):
        return f"host name does not resolve: {_cause(error)}", False
    if isinstance(error, ConnectTimeoutError) and not isinstance(error, NewConnectionError):
        return f"no connection within {CONNECT_SECONDS:g} s", True
    if isinstance(error, ReadTimeoutError):
        return f"silent for {silence:g} s", True
    if isinstance(error, NewConnectionError):
        return _cause(error), False
    if isinstance(error, SSLError):
        inner = error.args[0] if error.args else error
        if isinstance(inner, ssl.SSLCertVerificationError):
            return f"TLS certificate refused: {inner.verify_message}", False
        return f"TLS: {getattr(inner, 'reason', None) or one_line(str(inner))}", False
    if isinstance(error, ProtocolError):
        inner = error.args[-1] if error.args else error
        if isinstance(inner, OSError) and inner.strerror:
            return f"connection broken off: {inner.strerror}", False
        return "connection broken off", False
    return one_line(f"{type(error).__name__}: {error}"), False


def _cause(error: Exception) -> str:
    inner = error.__cause__ or error.__context__
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror.lower()
    return one_line(str(error))


def one_line(text: str, most: int = 300) -> str:
    """Text without line breaks, cut to ``most`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _seconds(header: str | None) -> float:
    """A Retry-After header's seconds; its date form is not used by Kubernetes."""
    return min(float(header), MAX_RETRY_AFTER) if header and header.isdecimal() else 0.0
