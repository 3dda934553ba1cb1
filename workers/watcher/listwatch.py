"""List and watch one kind: a thread that follows it through everything an API server and a network can do.

Touches the network through `ApiServer`. The rules (Kubernetes API concepts, "Efficient detection of changes"):

- streaming list (KEP-3157) where the server offers it, else a consistent list in pages of 500;
- then a watch from the list's resourceVersion, kept up to date by bookmarks, closed by the server after 5-10 minutes;
- a lost watch goes on from the last version; only 410 (or a version the server does not know) leads to a new list, and
  that is told as a whole: the difference is the main loop's matter, nothing is forgotten in between;
- what is no JSON of the kind that was asked for is an error, never an empty cluster.

Pages are decoded one by one into structs with the few fields that are read, projected, and dropped.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from urllib3.exceptions import HTTPError

from kube_router.ipc.messages import Key, Projection
from kube_router.workers.kubeapi.apiserver import ApiError, ApiServer, Response, one_line, status_error
from kube_router.workers.watcher.apiobjects import (
    INITIAL_EVENTS_END,
    ApiObject,
    Bookmark,
    ErrorEvent,
    Page,
    WatchEvent,
    event_decoder,
    page_decoder,
)
from kube_router.workers.watcher.kinds import Resource
from kube_router.workers.watcher.projections import PROJECT
from kube_router.workers.watcher.source import Alive, Backoff, Changed, Feed, Listed, Stopped, Trouble

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 32 << 20
"""No watch event is longer; etcd bounds an object at 1.5 MiB by default."""
READ_BYTES = 256 << 10
PAGE_LIMITS = (500, 2000, 8000, 0)
"""Objects a page; when a continue token expires before the list is through, the next try takes bigger pages."""
IN_VAIN_SECONDS = 1.0
"""A watch that lasted no longer and said nothing was of no use; a quiet one lasts minutes."""
DOUBTED_SECONDS = 5
"""After a watch in vain the next one is asked to end so soon, as a proof that it works although nothing happens."""
PASSING = (401, 403, 410, 429, 503, 504)
"""Statuses that say nothing about streaming lists; with any other one the server refuses them (422 where the feature is
off, 400 where it is unknown, an error of 500 within the watch where its etcd is older than 3.4.31 or 3.5.13)."""

BOOKMARK = msgspec.json.Decoder(WatchEvent[Bookmark])
ERROR = msgspec.json.Decoder(ErrorEvent)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Seconds. ``idle``: a watch without a byte for so long is taken for dead (bookmarks come every minute)."""

    answer: float = 60.0
    idle: float = 150.0
    shortest_watch: int = 300
    longest_watch: int = 600
    backoff_first: float = 0.5
    backoff_most: float = 30.0
    streaming: bool = True


class KindWatcher:
    """Follows one kind and feeds the main loop; `run` is the thread's function."""

    def __init__(
        self,
        resource: Resource,
        server: ApiServer,
        feed: Feed,
        tuning: Tuning | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._resource, self._server, self._feed = resource, server, feed
        self._tuning, self._jitter = tuning or Tuning(), jitter
        self._backoff = Backoff(jitter, self._tuning.backoff_first, self._tuning.backoff_most)
        self._relist = Backoff(jitter, self._tuning.backoff_first, self._tuning.backoff_most)
        self._page, self._event = page_decoder(resource.kind), event_decoder(resource.kind)
        self._project: Callable[[ApiObject], Projection] = PROJECT[resource.kind]
        self._version = ""
        self._streaming = self._tuning.streaming
        self._troubled = False
        self._suspect = False  # the last watch came to nothing: that the next one opens is not enough to be glad
        self._response: Response | None = None
        self._response_lock = threading.Lock()

    def run(self) -> None:
        """Follow the kind until the feed is told to stop."""
        while True:
            try:
                self._follow()
            except Stopped:
                return
            except ApiError as error:
                self._failed(str(error), error.retry_after)
            except Exception as error:  # the last barrier: a kind must never stop being followed
                log.exception("watching %s failed with an unexpected error", self._resource.kind)
                self._failed(f"internal error: {type(error).__name__}: {one_line(str(error))}", 0.0)

    def interrupt(self) -> None:
        """From another thread: end a read that waits for the server."""
        with self._response_lock:
            if self._response is not None:
                try:
                    self._response.shutdown()
                except (OSError, ValueError, RuntimeError):
                    log.debug("%s: the connection was already closed", self._resource.kind)

    def _failed(self, text: str, retry_after: float) -> None:
        """Say what is wrong and wait; told to stop meanwhile, return at once."""
        try:
            self._troubled = True
            self._feed.put(Trouble(self._resource.kind, text))
            self._feed.pause(self._backoff.failed(retry_after))
        except Stopped:
            return

    def _progress(self) -> None:
        """The source does what it should: forget failures, take back a trouble."""
        self._backoff.succeeded()
        if self._troubled:
            self._troubled = False
            self._feed.put(Trouble(self._resource.kind, None))

    def _follow(self) -> None:
        """One list, if there is need, and one watch."""
        if self._feed.stopping.is_set():
            raise Stopped
        try:
            if not self._version:
                if self._streaming:
                    self._stream_list()
                    return
                self._list()
            self._watch()
        except ApiError as error:
            if not (error.expired and self._version):
                raise
            log.info("%s: the server no longer knows version %s: listing again", self._resource.kind, self._version)
            self._version = ""
            self._feed.pause(self._relist.failed())

    # --- list

    def _query(self, **more: str) -> dict[str, str]:
        selector = {"fieldSelector": self._resource.selector} if self._resource.selector else {}
        return {**selector, **more}

    def _list(self) -> None:
        objects, version = self._whole_list()
        self._feed.put(Listed(self._resource.kind, tuple(objects)))
        self._version = version
        self._progress()

    def _whole_list(self) -> tuple[list[Projection], str]:
        for limit in PAGE_LIMITS[:-1]:
            try:
                return self._pages(limit)
            except ApiError as error:
                if not error.expired:
                    raise
                log.info("%s: the list expired before its last page: again with bigger pages", self._resource.kind)
        return self._pages(PAGE_LIMITS[-1])

    def _pages(self, limit: int) -> tuple[list[Projection], str]:
        objects: list[Projection] = []
        query = self._query(limit=str(limit)) if limit else self._query()
        while True:
            page = self._read_page(query)
            objects.extend(map(self._projected, page.items or ()))
            if not page.metadata.continue_:
                return objects, page.metadata.resource_version
            query = self._query(limit=str(limit), **{"continue": page.metadata.continue_})
            if self._feed.stopping.is_set():
                raise Stopped

    def _read_page(self, query: dict[str, str]) -> Page[Any]:
        what = f"list {self._resource.kind}"
        with self._opened(what, query, self._tuning.answer) as response:
            try:
                data = response.read()
            except (HTTPError, OSError) as error:
                raise self._server.failure(error, self._tuning.answer) from None
        try:
            page: Page[Any] = self._page.decode(data)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise self._garbage(what, error) from None
        if page.kind != f"{self._resource.object_kind}List" or not page.metadata.resource_version:
            raise self._garbage(what, f"kind {one_line(page.kind, 40)!r} is not {self._resource.object_kind}List")
        return page

    def _garbage(self, what: str, reason: object) -> ApiError:
        return ApiError(f"{self._server.name}: {what}: the answer is not what was asked for: {one_line(str(reason))}")

    def _projected(self, item: ApiObject) -> Projection:
        projection = self._project(item)
        if not projection.name or (self._resource.namespaced and not projection.namespace):
            raise self._garbage(f"list or watch {self._resource.kind}", "an object without a name")
        return projection

    def _opened(self, what: str, query: dict[str, str], silence: float) -> _Open:
        try:
            response = self._server.open("GET", self._resource.path, query, silence=silence)
        except ApiError as error:
            if error.status is None:
                raise
            raise ApiError(
                f"{self._server.name}: {what}: {error}",
                status=error.status,
                expired=error.expired,
                retry_after=error.retry_after,
            ) from None
        opened = _Open(self, response)
        content_type = response.headers.get("Content-Type", "")
        if content_type.split(";")[0].strip().lower() != "application/json":
            response.close()
            raise self._garbage(what, f"Content-Type {one_line(content_type, 60)!r} is not application/json")
        return opened

    # --- watch

    def _stream_list(self) -> None:
        """A watch that begins with all objects; falls back to pages for good when the server does not offer it."""
        query = self._query(sendInitialEvents="true", resourceVersionMatch="NotOlderThan")
        try:
            self._watch(query, initial={})
        except ApiError as error:
            if self._version or not (error.silent or (error.status and error.status not in PASSING)):
                raise
            log.info("%s: no streaming list (%s): listing in pages", self._resource.kind, error)
            self._streaming = False

    def _watch(self, query: dict[str, str] | None = None, initial: dict[Key, Projection] | None = None) -> None:
        """Read one watch to its end; ``initial`` collects the objects of a streaming list until its end is marked."""
        doubted, self._suspect = self._suspect, False
        query = self._query(**(query or {"resourceVersion": self._version}))
        query |= {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(self._watch_seconds(doubted))}
        opened = self._opened(f"watch {self._resource.kind}", query, self._tuning.idle)
        began, lines = time.monotonic(), 0
        trouble: ApiError | None = None
        try:
            with opened as response:
                if initial is None and not doubted:
                    self._progress()
                    self._feed.put(Alive(self._resource.kind))
                for batch in self._batches(response):
                    initial = self._take(batch, initial)
                    lines += len(batch)
                    if initial is None:
                        self._relist.succeeded()
                        self._progress()
        except ApiError as error:
            if error.expired or error.status is not None or initial is not None:
                raise
            trouble = error
        brief = time.monotonic() - began < IN_VAIN_SECONDS and not (trouble and trouble.silent)
        self._after_watch(trouble, in_vain=brief and not lines, doubted=doubted)

    def _watch_seconds(self, doubted: bool) -> int:
        """How long the server shall keep the watch; spread, so that the nodes of a cluster do not come together."""
        if doubted:
            return DOUBTED_SECONDS
        span = self._tuning.longest_watch - self._tuning.shortest_watch
        return self._tuning.shortest_watch + int(self._jitter() * span)

    def _after_watch(self, trouble: ApiError | None, *, in_vain: bool, doubted: bool) -> None:
        """A watch has ended or broken off: go on from its last version, unless it was the second in vain."""
        self._suspect = in_vain
        if trouble is None and not in_vain:
            return
        trouble = trouble or ApiError(f"{self._server.name}: watch {self._resource.kind}: ended at once without a word")
        if in_vain and doubted:
            raise trouble
        log.info("watch %s: %s: going on from version %s", self._resource.kind, trouble, self._version)
        self._feed.pause(self._tuning.backoff_first * self._jitter())

    def _batches(self, response: Response) -> Iterator[list[bytes]]:
        """Whole lines as they come, those of one read together."""
        rest: list[bytes] = []
        size = 0
        while True:
            try:
                data = response.read1(READ_BYTES)
            except (HTTPError, OSError, ValueError) as error:
                if self._feed.stopping.is_set():
                    raise Stopped from None
                raise self._server.failure(error, self._tuning.idle) from None
            if self._feed.stopping.is_set():
                raise Stopped
            if not data:
                if rest:
                    raise ApiError(f"{self._server.name}: watch {self._resource.kind}: cut within an event")
                return
            head, newline, tail = data.rpartition(b"\n")
            if newline:
                yield [line for line in b"".join([*rest, head]).split(b"\n") if line]
                rest, size = [], 0
            if tail:
                rest.append(tail)
                size += len(tail)
            if size > MAX_LINE_BYTES:
                raise self._garbage(f"watch {self._resource.kind}", f"an event longer than {MAX_LINE_BYTES} bytes")

    def _take(self, lines: list[bytes], initial: dict[Key, Projection] | None) -> dict[Key, Projection] | None:
        """Work off lines; returns what a streaming list has collected so far, None once that is over."""
        changes: dict[Key, Projection | None] = {}
        version, marked = self._version, False
        for line in lines:
            try:
                event: WatchEvent[Any] = self._event.decode(line)
                if event.type == "ERROR":  # a Status, which some kinds' structs take for an object
                    raise self._error_event(line)
                if event.type == "BOOKMARK":
                    event = BOOKMARK.decode(line)
                    ended = INITIAL_EVENTS_END in (event.object.metadata.annotations or {})
                    marked = True
                else:
                    ended = False
            except (msgspec.MsgspecError, RecursionError) as error:
                raise self._event_error(line, error) from None
            if event.type != "BOOKMARK":
                self._apply(event, changes)
            version = event.object.metadata.resource_version or version
            if initial is not None and ended:
                initial.update((key, item) for key, item in changes.items() if item is not None)
                self._feed.put(Listed(self._resource.kind, tuple(initial.values())))
                initial, changes = None, {}
        if initial is not None:
            initial.update((key, item) for key, item in changes.items() if item is not None)
            return initial
        if changes:
            put = tuple(item for item in changes.values() if item is not None)
            gone = tuple(key for key, item in changes.items() if item is None)
            self._feed.put(Changed(self._resource.kind, put, gone))
        elif marked:
            self._feed.put(Alive(self._resource.kind))
        self._version = version
        return None

    def _apply(self, event: WatchEvent[Any], changes: dict[Key, Projection | None]) -> None:
        item = self._projected(event.object)
        if event.type in ("ADDED", "MODIFIED"):
            changes[item.key] = item
        elif event.type == "DELETED":
            changes[item.key] = None
        else:
            raise self._garbage(f"watch {self._resource.kind}", f"event type {one_line(event.type, 40)!r}")

    def _event_error(self, line: bytes, error: Exception) -> ApiError:
        """What a line means that does not decode as an event of the kind."""
        try:
            if ERROR.decode(line).type == "ERROR":
                return self._error_event(line)
        except (msgspec.MsgspecError, RecursionError):
            log.debug("watch %s: not an error event either", self._resource.kind)
        return self._garbage(f"watch {self._resource.kind}", error)

    def _error_event(self, line: bytes) -> ApiError:
        """The Status in a line of type ERROR; raises msgspec's error when there is none."""
        failure = status_error(ERROR.decode(line).object)
        failure.args = (f"{self._server.name}: watch {self._resource.kind}: {failure}",)
        return failure


class _Open:
    """A response while it is read: known to `interrupt`, closed at the end."""

    def __init__(self, owner: KindWatcher, response: Response) -> None:
        self._owner, self._response = owner, response

    def __enter__(self) -> Response:
        with self._owner._response_lock:
            self._owner._response = self._response
        if self._owner._feed.stopping.is_set():
            self._response.close()
            raise Stopped
        return self._response

    def __exit__(self, *_: object) -> None:
        with self._owner._response_lock:
            self._owner._response = None
        self._response.close()
