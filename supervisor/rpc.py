"""supervisord's XML-RPC interface over its unix socket.

Touches that socket.
"""

from __future__ import annotations

import http.client
import socket
import xmlrpc.client
from typing import Any


def supervisord(path: str, seconds: float) -> xmlrpc.client.ServerProxy:
    """A proxy for the supervisord that listens on ``path``; a call that takes longer raises TimeoutError.

    Calls raise OSError, `http.client.HTTPException` or `xmlrpc.client.Fault`.
    """
    return xmlrpc.client.ServerProxy("http://localhost", transport=_UnixTransport(path, seconds), allow_none=True)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: str, seconds: float) -> None:
        super().__init__()
        self._path, self._seconds = path, seconds

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return _UnixConnection(self._path, self._seconds)
