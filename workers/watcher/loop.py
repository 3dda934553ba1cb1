"""The watcher's main loop: news from the source in, snapshots and deltas out, beacons, heartbeats, the disk.

Touches the sockets (through `ipc.channels`) and the clock. `Standing` is the pure part: what troubles there are, and
the `SourceState` that they make. Losing the source changes words, never objects.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kube_router.ipc.channels import HeartbeatSender, Poller, Publisher
from kube_router.ipc.messages import Heartbeat, Kind, SourceState
from kube_router.workers.runtime import privileges, resident_bytes
from kube_router.workers.watcher.diskcache import DiskCache, SavedCluster, saved_cluster
from kube_router.workers.watcher.source import Alive, Changed, Feed, Listed, News, Sink, Source, Trouble
from kube_router.workers.watcher.store import Step, Store

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
STALE_AFTER_SECONDS = 1.5
"""A source that answers does so within this time; only then is the snapshot on disk handed out."""
EXIT_WRITE_SECONDS = 1.0
NAME = "watcher"


class Monotonic(Protocol):
    """A clock that never goes back, in seconds."""

    def __call__(self) -> float: ...


@dataclass(slots=True)
class _Complaint:
    text: str
    since: float


class Standing:
    """Which troubles there are, since when, and when each kind was last confirmed. Pure: times are arguments."""

    def __init__(self) -> None:
        self._complaints: dict[str, _Complaint] = {}
        self._confirmed: dict[Kind, float] = {}
        self.errors: dict[str, int] = {}

    def trouble(self, about: str, text: str | None, now: float) -> None:
        """A trouble began, changed its text (it is still the same trouble), or is over (``text`` None)."""
        known = self._complaints.get(about)
        if text is None:
            if known is not None:
                del self._complaints[about]
                if not any(other.text == known.text for other in self._complaints.values()):
                    log.info("no longer: %s (for %.0f s)", known.text, max(0.0, now - known.since))
            return
        if known is None or known.text != text:
            if not any(other.text == text for other in self._complaints.values()):
                log.warning("%s", text)
                self.errors["source"] = self.errors.get("source", 0) + 1
            self._complaints[about] = _Complaint(text, known.since if known else now)

    def alive(self, kind: Kind, now: float) -> None:
        """The source has confirmed a kind."""
        self._confirmed[kind] = now

    def confirmed(self, kinds: tuple[Kind, ...]) -> float | None:
        """When the last of ``kinds`` was confirmed: up to then all of them are known to hold."""
        if not all(kind in self._confirmed for kind in kinds):
            return None
        return min((self._confirmed[kind] for kind in kinds), default=None)

    def lines(self) -> tuple[str, ...]:
        """One line a trouble; those with the same text are one, since the first of them."""
        since: dict[str, float] = {}
        for complaint in self._complaints.values():
            since[complaint.text] = min(since.get(complaint.text, complaint.since), complaint.since)
        return tuple(f"{text} (since {utc(at)})" for text, at in sorted(since.items(), key=lambda item: item[0]))


def utc(seconds: float) -> str:
    """Unix seconds as ``2026-01-01T00:00:00Z``."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class Watcher:
    """The loop; `step` is one turn, so that tests can turn it by hand."""

    def __init__(
        self,
        source: Source,
        kinds: tuple[Kind, ...],
        publisher: Publisher,
        heartbeats: HeartbeatSender,
        sink: Sink,
        feed: Feed,
        cache: DiskCache,
        *,
        sync_timeout: float,
        monotonic: Monotonic = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """``sync_timeout``: seconds without a first complete list before that is called a trouble."""
        self._source, self._kinds, self._publisher = source, kinds, publisher
        self._heartbeats, self._sink, self._feed, self._cache = heartbeats, sink, feed, cache
        self._monotonic, self._wall = monotonic, wall
        self._standing = Standing()
        self.store = Store(kinds, SourceState(source=source.name, unlisted=kinds))
        self._saved = cache.load(source.name, kinds)
        self._stale = False
        self._unsaved = False
        self._began = monotonic()
        self._sync_timeout = sync_timeout
        self._beat_at = float("-inf")
        self._syncs = 0
        self._last_sync: float | None = None
        self._started = wall()
        self.stopping = False

    def run(self) -> None:
        """Turn until `stopping` is set, then write what is unsaved and let go."""
        self.start()
        try:
            while not self.stopping:
                self.step()
        finally:
            self.close()

    def start(self) -> None:
        """Start the source."""
        if self._saved is not None:
            self._source.seed({kind: self._saved.objects(kind) or () for kind in self._kinds})
        self._source.start(self._feed)

    def close(self) -> None:
        """End the source and the sink, and write the last snapshot; at most two seconds."""
        self._feed.stopping.set()
        self._source.stop()
        self._sink.stop()
        unsaved = self._unsaved and self.store.complete
        self._cache.save_at_exit(self._to_save() if unsaved else None, EXIT_WRITE_SECONDS)

    def step(self) -> None:
        """Wait for something to do, and do it."""
        timeout = max(0.0, self._next_at() - self._monotonic())
        Poller.wait([*self._publisher.sockets, self._feed.fileno()], timeout)
        for news in self._feed.take():
            self._on_news(news)
        self._serve_stale()
        self._check_sync_timeout()
        self._refresh_state()
        self._publisher.serve(self.store)
        for notice in self._publisher.notices():
            self._sink.post(notice)
        self._save_if_due()
        if self._monotonic() >= self._beat_at:
            self._beat()

    def _next_at(self) -> float:
        planned = [self._beat_at]
        if self._saved is not None and not self._stale:
            planned.append(self._began + STALE_AFTER_SECONDS)
        if self._unsaved and self.store.complete:
            planned.append(self._monotonic() + self._cache.due_in())
        return min(planned)

    # --- news

    def _on_news(self, news: News) -> None:
        now = self._wall()
        match news:
            case Listed(kind, objects):
                self._publish(self.store.replace(kind, objects))
                self._standing.alive(kind, now)
                if self.store.complete:
                    self._on_complete()
            case Changed(kind, put, gone):
                self._publish(self.store.apply(kind, put, gone))
                self._standing.alive(kind, now)
            case Alive(kind):
                self._standing.alive(kind, now)
            case Trouble(about, text):
                self._standing.trouble(about, text, now)

    def _publish(self, step: Step | None) -> None:
        if step is None:
            return
        self._publisher.publish(step.kind, step.put, step.gone)
        self._unsaved = True
        self._syncs += 1
        self._last_sync = self._wall()

    def _on_complete(self) -> None:
        """Every kind is listed: what the disk said no longer counts."""
        if self._stale or not self.store.state.in_sync:
            counts = ", ".join(f"{len(self.store.objects(kind))} {kind}" for kind in self._kinds)
            log.info("in sync with %s: %s", self._source.name, counts or "nothing to watch")
            self._standing.trouble(SYNC_TIMEOUT, None, self._wall())
            self._last_sync = self._wall()
            self._unsaved = True
        self._stale, self._saved = False, None

    # --- what is due

    def _serve_stale(self) -> None:
        """Hand out the snapshot on disk when the source has not answered for a while."""
        if self._saved is None or self._stale or self._monotonic() < self._began + STALE_AFTER_SECONDS:
            return
        age = max(0.0, self._wall() - self._saved.saved)
        log.warning("%s has not answered yet: going on from the snapshot on disk, %.0f s old", self._source.name, age)
        self._stale = True
        for kind in self._kinds:
            if kind not in self.store.listed:
                step = self.store.seed(kind, self._saved.objects(kind) or ())
                if step is not None:
                    self._publisher.publish(step.kind, step.put, step.gone)
        self._saved = None

    def _check_sync_timeout(self) -> None:
        waited = self._monotonic() - self._began
        if not self.store.complete and waited >= self._sync_timeout:
            missing = ", ".join(kind for kind in self._kinds if kind not in self.store.listed)
            text = f"no complete list of {missing} after --cache-sync-timeout {self._sync_timeout:g} s; still trying"
            self._standing.trouble(SYNC_TIMEOUT, text, self._wall())

    def _refresh_state(self) -> None:
        """Bring the state that replicas see up to date; a change of words is told at once, the time with the beat."""
        self._standing.trouble(DISK, self._cache.trouble, self._wall())
        state = SourceState(
            source=self._source.name,
            in_sync=self.store.complete,
            stale=self._stale,
            confirmed=self._standing.confirmed(self._kinds),
            degraded=self._standing.lines(),
            unlisted=tuple(kind for kind in self._kinds if kind not in self.store.listed),
        )
        old = self.store.state
        self.store.state = state
        told = (state.in_sync, state.stale, state.degraded, state.unlisted)
        if told != (old.in_sync, old.stale, old.degraded, old.unlisted):
            self._publisher.beacon(state)

    def _save_if_due(self) -> None:
        if self._unsaved and self.store.complete and self._cache.due_in() <= 0:
            self._unsaved = False
            self._cache.save(self._to_save())
        elif self._cache.trouble is not None and not self._unsaved:
            self._unsaved = True  # the last write failed: again when it is allowed

    def _to_save(self) -> SavedCluster:
        objects = {kind: self.store.objects(kind).values() for kind in self._kinds}
        return saved_cluster(self._source.name, self._wall(), objects)

    def _beat(self) -> None:
        self._beat_at = self._monotonic() + BEAT_SECONDS
        state = self.store.state
        self._publisher.beacon(state)
        self._heartbeats.send(
            Heartbeat(
                worker=NAME,
                pid=os.getpid(),
                started=self._started,
                sent=self._wall(),
                last_sync=state.confirmed or self._last_sync,
                syncs=self._syncs,
                in_sync=state.in_sync,
                stale=state.stale,
                dropped=self._publisher.dropped,
                rss=resident_bytes(),
                privileges=privileges(),
                errors=dict(self._standing.errors),
                warnings=state.degraded,
                counts={f'watcher_objects{{kind="{kind}"}}': len(self.store.objects(kind)) for kind in self._kinds},
                source=state,
            )
        )


SYNC_TIMEOUT, DISK = "cache-sync-timeout", "disk"
"""The parts that the loop's own troubles are about."""
