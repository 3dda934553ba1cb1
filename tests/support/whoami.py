"""Servers that say who they are and who asks them; clients that note what became of a call.

Touches the kernel. One thread serves all hosts; a socket belongs to the namespace in which it was made.
"""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

from support.namespaces import Namespace
from support.probes import Host

PORT = 7777
_REFUSED = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPERM}
"""EPERM: a datagram of this host that its own rules reject."""


class Answer(NamedTuple):
    """Who answered, and whom it saw as the client; ``refused`` or ``silent`` instead of a name."""

    who: str
    seen: str = ""
    port: int = 0


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Whoami:
    """A TCP and a UDP server on `PORT` of every address of the hosts."""

    def __init__(self, hosts: Iterable[Host], port: int = PORT) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop = threading.Event()
        for host in hosts:
            with host.namespace.enter():
                for address in host.addresses:
                    listener = socket.create_server((address, port), family=_family(address), backlog=256)
                    self._watch(listener, partial(self._accept, listener, host.name))
                    datagrams = socket.socket(_family(address), socket.SOCK_DGRAM)
                    datagrams.bind((address, port))
                    self._watch(datagrams, partial(self._reply, datagrams, host.name))
        self._thread = threading.Thread(target=self._run, name="whoami")
        self._thread.start()

    def _watch(self, end: socket.socket, act: object) -> None:
        end.setblocking(False)
        self._selector.register(end, selectors.EVENT_READ, act)

    def _accept(self, listener: socket.socket, name: str) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            end, peer = listener.accept()
            self._watch(end, partial(self._talk, end, f"{name} {peer[0]} {peer[1]}"))
            end.sendall(f"{name} {peer[0]} {peer[1]}\n".encode())

    def _talk(self, end: socket.socket, words: str) -> None:
        """Says the same again to each question, until the client ends."""
        try:
            asked = end.recv(64)
            if asked:
                end.sendall(f"{words}\n".encode())
                return
        except OSError:
            pass
        self._selector.unregister(end)
        end.close()

    def _reply(self, end: socket.socket, name: str) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            _, peer = end.recvfrom(64)
            end.sendto(f"{name} {peer[0]} {peer[1]}\n".encode(), peer)

    def _run(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(0.05):
                key.data()

    def close(self) -> None:
        """Stop serving."""
        self._stop.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()


@contextlib.contextmanager
def connected(
    namespace: Namespace, address: str, port: int, source: tuple[str, int] | None = None
) -> Iterator[socket.socket]:
    """A TCP connection; raises OSError."""
    with namespace.enter():
        end = socket.socket(_family(address), socket.SOCK_STREAM)
    with contextlib.closing(end):
        end.settimeout(1.0)
        if source is not None:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            end.bind(source)
        end.connect((address, port))
        yield end


def heard(end: socket.socket) -> Answer:
    """What a server says next."""
    words = end.recv(256).decode().split()
    return Answer(words[0], words[1], int(words[2])) if len(words) == 3 else Answer("ended")


def call(
    namespace: Namespace, address: str, port: int, protocol: str = "tcp", *, source: tuple[str, int] | None = None
) -> Answer:
    """One call, from first packet to answer."""
    try:
        if protocol == "tcp":
            with connected(namespace, address, port, source) as end:
                return heard(end)
        with namespace.enter():
            datagram = socket.socket(_family(address), socket.SOCK_DGRAM)
        with contextlib.closing(datagram):
            datagram.settimeout(0.5)
            if source is not None:
                datagram.bind(source)
            datagram.connect((address, port))
            datagram.send(b"who")
            return heard(datagram)
    except TimeoutError:
        return Answer("silent")
    except OSError as error:
        if error.errno in _REFUSED:
            return Answer("refused")
        raise


def calls(namespace: Namespace, address: str, port: int, count: int, protocol: str = "tcp") -> Counter[str]:
    """How often each server answered."""
    return Counter(call(namespace, address, port, protocol).who for _ in range(count))
