"""Follows a watcher source in a test: takes its news into a real store, and waits for outcomes."""

from __future__ import annotations

import select
import time
from collections.abc import Callable

from kube_router.ipc.messages import Kind, Projection, SourceState
from kube_router.workers.watcher.source import Alive, Changed, Feed, Listed, News, Source, Trouble
from kube_router.workers.watcher.store import Step, Store

SECONDS = 30.0
"""How long an outcome may take on a busy machine; nothing is asserted about how fast it was."""


class Follower:
    """A source, running; what it has told is in ``store``, ``troubles``, ``steps`` and ``news``."""

    def __init__(self, source: Source, kinds: tuple[Kind, ...]) -> None:
        self.source, self.feed = source, Feed()
        self.store = Store(kinds, SourceState(source=source.name))
        self.troubles: dict[str, str] = {}
        self.seen: list[str] = []
        self.steps: list[Step] = []
        self.news: list[News] = []

    def __enter__(self) -> Follower:
        self.source.start(self.feed)
        return self

    def __exit__(self, *_: object) -> None:
        self.feed.stopping.set()
        self.source.stop()

    def objects(self, kind: Kind) -> dict[str, Projection]:
        """The objects of a kind, as last told."""
        return dict(self.store.objects(kind))

    @property
    def gone(self) -> list[str]:
        """Every key that was ever deleted."""
        return [key for step in self.steps for key in step.gone]

    def count(self, news: type[News], kind: Kind) -> int:
        """How many messages of a type came for a kind."""
        return sum(isinstance(item, news) and getattr(item, "kind", None) == kind for item in self.news)

    def until(self, outcome: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Take news until ``outcome`` holds; AssertionError, with what there is, if it does not come."""
        deadline = time.monotonic() + seconds
        self.take()
        while not outcome():
            left = deadline - time.monotonic()
            if left <= 0:
                held = {kind: sorted(self.store.objects(kind))[:10] for kind in self.store.kinds}
                raise AssertionError(f"did not come about: objects {held}, troubles {self.troubles}, seen {self.seen}")
            select.select([self.feed], [], [], min(left, 0.1))
            self.take()

    def until_listed(self) -> None:
        """Wait for all kinds."""
        self.until(lambda: self.store.complete)

    def watch_quietly(self, seconds: float) -> None:
        """Take news for a while, to see that something does not happen."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            select.select([self.feed], [], [], left)
            self.take()

    def take(self) -> None:
        """Take the news that are there."""
        for item in self.feed.take():
            self.news.append(item)
            step = None
            match item:
                case Listed(kind, objects):
                    step = self.store.replace(kind, objects)
                case Changed(kind, put, gone):
                    step = self.store.apply(kind, put, gone)
                case Trouble(about, None):
                    self.troubles.pop(about, None)
                case Trouble(about, str(text)):
                    self.troubles[about] = text
                    self.seen.append(text)
                case Alive():
                    pass
            if step is not None:
                self.steps.append(step)
