"""What the watcher's two sources have in common: the feed into the main loop, and the rhythm of retries.

Touches a file descriptor (the feed's wake-up) and threads. A source runs in threads of its own and says everything
through the feed; it never touches the store, the sockets or the disk. The feed is bounded: while the main loop is busy
a source waits, stops reading from its connection, and so slows the server down instead of growing.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from kube_router.ipc.messages import Key, Kind, Notice, Projection

FEED_SIZE = 64
"""Messages between source and main loop; one holds at most one read of a watch, or one whole list."""


@dataclass(frozen=True, slots=True)
class Listed:
    """All objects of a kind; what is not among them is gone."""

    kind: Kind
    objects: tuple[Projection, ...]


@dataclass(frozen=True, slots=True)
class Changed:
    """Some objects of a kind are new, changed or gone."""

    kind: Kind
    put: tuple[Projection, ...]
    gone: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Alive:
    """The source has confirmed that what it told about ``kind`` still holds."""

    kind: Kind


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something is wrong (one line) or, with ``text`` None, no longer wrong. ``about``: a kind, a file, a part.

    A text that several troubles share is shown once.
    """

    about: str
    text: str | None


News = Listed | Changed | Alive | Trouble


class Stopped(Exception):
    """The source has been told to stop."""


class Feed:
    """A bounded queue with a descriptor that is readable while something is in it."""

    def __init__(self, size: int = FEED_SIZE) -> None:
        self._queue: queue.Queue[News] = queue.Queue(size)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.stopping = threading.Event()

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._wake

    def put(self, news: News) -> None:
        """Hand ``news`` over, waiting for room; raises `Stopped` when the loop is no longer there to take it."""
        while not self.stopping.is_set():
            try:
                self._queue.put(news, timeout=0.2)
            except queue.Full:
                continue
            self.wake()
            return
        raise Stopped

    def wake(self) -> None:
        """Make the descriptor readable; safe in a signal handler."""
        os.eventfd_write(self._wake, 1)

    def take(self) -> list[News]:
        """What is there, in order, without waiting."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        taken = []
        for _ in range(self._queue.qsize()):
            try:
                taken.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return taken

    def pause(self, seconds: float) -> None:
        """Sleep in a source's thread; raises `Stopped` as soon as it is told to stop."""
        if self.stopping.wait(seconds):
            raise Stopped


class Source(Protocol):
    """Where the cluster's state comes from."""

    name: str
    """For people: ``Kubernetes API https://…`` or ``manifests /dir``."""

    def start(self, feed: Feed) -> None:
        """Start the threads. ``feed`` soon gets a `Listed` for every kind, later what changed."""
        ...

    def stop(self) -> None:
        """Let the threads end; returns within half a second whatever they wait for."""
        ...

    def seed(self, objects: Mapping[Kind, Iterable[Projection]]) -> None:
        """Called before `start` with what an earlier run knew, if anything."""
        ...


class Sink(Protocol):
    """Where Notices go."""

    def post(self, notice: Notice) -> None:
        """Take a notice; never blocks."""
        ...

    def stop(self) -> None:
        """Let go of threads and connections."""
        ...


class Backoff:
    """Seconds to wait after consecutive failures: doubling, with jitter. Pure."""

    def __init__(self, jitter: Callable[[], float], first: float = 0.5, most: float = 30.0) -> None:
        """``jitter`` returns numbers in [0, 1); a wait is between three quarters and five quarters of its step."""
        self._jitter, self._first, self._most = jitter, first, most
        self._failures = 0

    def failed(self, at_least: float = 0.0) -> float:
        """The wait after one more failure; ``at_least`` is what the server asked for."""
        step = min(self._first * 2.0**self._failures, self._most)
        self._failures = min(self._failures + 1, 32)
        return max(at_least, step * (0.75 + 0.5 * self._jitter()))

    def succeeded(self) -> None:
        """Start again from the first step."""
        self._failures = 0
