"""The watch on gobgpd: a thread that reads its event stream fast and leaves what it read for the worker's loop.

Touches gobgpd's socket and an eventfd. gobgpd buffers for a slow reader without bound, so the thread only converts and
queues; the loop takes the queue when the eventfd wakes it.

The stream begins with the peers' states, an end mark, and then the best paths in one message. With no path at all
that message does not come: the end mark is passed on, for the loop to give up waiting.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import grpc

from kube_router.workers.router.gobgp import convert
from kube_router.workers.router.gobgp.client import Client
from kube_router.workers.router.gobgp.convert import Dialect
from kube_router.workers.router.rib import RouteEvent


@dataclass(slots=True)
class Taken:
    """What came since the last `Watch.take`, in order. ``table``: a table message was among it."""

    routes: list[RouteEvent] = field(default_factory=list)
    table: bool = False
    end_of_init: bool = False
    peers: bool = False
    broken: str | None = None


class Watch:
    """One stream of one daemon; ends with the daemon or with `close`."""

    def __init__(self, client: Client, eventfd: int) -> None:
        """Starts reading; each arrival makes ``eventfd`` readable."""
        self._dialect: Dialect = client.dialect
        self._eventfd = eventfd
        self._queue: deque[Any] = deque()
        self._stream = client.watch()
        self._thread = threading.Thread(target=self._read, name="gobgp-watch", daemon=True)
        self._thread.start()

    def take(self) -> Taken:
        """Everything that has arrived; never blocks."""
        taken = Taken()
        while self._queue:
            match self._queue.popleft():
                case list() as routes:
                    taken.table = True
                    taken.routes += routes
                case "peer":
                    taken.peers = True
                case "end":
                    taken.end_of_init = True
                case Exception() as error:
                    taken.broken = error.details() if isinstance(error, grpc.Call) else repr(error)
        return taken

    def close(self) -> None:
        """End the stream and the thread."""
        self._stream.cancel()
        self._thread.join(timeout=1.0)

    def _read(self) -> None:
        end_of_init = self._dialect.messages.PEER_END_OF_INIT
        try:
            for event in self._stream:
                kind = event.WhichOneof("event")
                if kind == "table":
                    converted = (convert.route_event(self._dialect, path) for path in event.table.paths)
                    self._put([item for item in converted if item is not None])
                elif kind == "peer":
                    self._put("end" if event.peer.type == end_of_init else "peer")
            self._put(EOFError("the stream ended"))
        except Exception as error:  # whatever it was: the loop must hear of it
            self._put(error)

    def _put(self, item: Any) -> None:
        self._queue.append(item)
        os.eventfd_write(self._eventfd, 1)
