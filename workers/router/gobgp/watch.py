"""The watch on gobgpd: a thread that reads its event stream fast and leaves what it read for the worker's loop.

Touches gobgpd's socket and an eventfd. gobgpd buffers for a slow reader without bound, so the thread only converts and
keeps, the last event of each prefix; the loop takes that when it comes to it. Memory is bounded by the table's size.

The stream begins with the peers' states, an end mark, and then the best paths in one message, which comes also if there
are none. Nothing else says that the table is there: a large one takes a second after the mark on a busy machine.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Any

import grpc

from kube_router.workers.router.gobgp import convert, neighbors
from kube_router.workers.router.gobgp.client import Client
from kube_router.workers.router.gobgp.convert import Dialect
from kube_router.workers.router.rib import RouteEvent


@dataclass(slots=True)
class Taken:
    """What came since the last `Watch.take`; of several events of one prefix the last.

    ``events`` counts them all. ``table``: a table message was among it, the first of which is the whole table.
    ``peers``: whose state has changed.
    """

    routes: dict[str, RouteEvent] = field(default_factory=dict)
    events: int = 0
    table: bool = False
    peers: set[str] = field(default_factory=set)
    broken: str | None = None


class Watch:
    """One stream of one daemon; ends with the daemon or with `close`."""

    def __init__(self, client: Client, eventfd: int) -> None:
        """Starts reading. ``eventfd`` becomes readable with the first arrival after a `take`, not with every one."""
        self._dialect: Dialect = client.dialect
        self._eventfd = eventfd
        self._lock = threading.Lock()
        self._taken = Taken()
        self._signalled = self._closed = False
        self._stream = client.watch()
        self._thread = threading.Thread(target=self._read, name="gobgp-watch", daemon=True)
        self._thread.start()

    def take(self) -> Taken:
        """Everything that has arrived; never blocks for long."""
        with self._lock:
            taken, self._taken, self._signalled = self._taken, Taken(), self._closed
        return taken

    def close(self) -> None:
        """End the stream and the thread; the eventfd is not written to any more and may be closed."""
        with self._lock:
            self._signalled = self._closed = True
        self._stream.cancel()
        self._thread.join(timeout=1.0)

    def _read(self) -> None:
        try:
            for event in self._stream:
                if event.WhichOneof("event") == "table":
                    self._on_table(event.table)
                else:
                    self._on_peer(event.peer)
            broken = "the stream ended"
        except grpc.RpcError as error:
            broken = error.details() or str(error.code()) if isinstance(error, grpc.Call) else str(error)
        except Exception as error:  # noqa: BLE001 - whatever it was: the loop must hear of it
            broken = f"{type(error).__name__}: {error}"
        with self._lock:
            self._taken.broken = broken
            self._signal()

    def _on_table(self, table: Any) -> None:
        converted = [convert.route_event(self._dialect, path) for path in table.paths]
        with self._lock:
            self._taken.routes.update((item.prefix, item) for item in converted if item is not None)
            self._taken.events += len(converted)
            self._taken.table = True
            self._signal()

    def _on_peer(self, event: Any) -> None:
        if event.type == self._dialect.messages.PEER_END_OF_INIT:
            return
        with self._lock:
            self._taken.peers.add(neighbors.event_address(event))
            self._signal()

    def _signal(self) -> None:
        if not self._signalled:
            self._signalled = True
            os.eventfd_write(self._eventfd, 1)
