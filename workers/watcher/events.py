"""What workers have to say about API objects, as Kubernetes Events.

`Correlator` is pure: it decides whether a notice is said, said again as a count, or left out; `event_body` makes the
JSON. `LogSink` writes to the log (manifests mode); `ApiSink` posts, in a thread of its own with a bounded queue, so
that neither a worker nor the watcher's loop ever waits for the API.

The rules are those of client-go's event correlator in spirit: the same notice again within `QUIET_SECONDS` is counted
and told later; more than `SIMILAR` texts about one object and reason are told as one; each object has a budget.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from kube_router.ipc.messages import Notice
from kube_router.workers.kubeapi.times import rfc3339
from kube_router.workers.watcher.kinds import RESOURCES
from kube_router.workers.watcher.source import Backoff, Feed, Stopped, Trouble

log = logging.getLogger(__name__)

QUIET_SECONDS = 300.0
"""The same notice is told at most once in this time; what came meanwhile is added to its count."""
SIMILAR = 10
"""So many different texts about one object and reason stay apart; later ones are combined."""
BURST = 25
REFILL_SECONDS = 60.0
"""Budget of one object: `BURST` tellings, one more each `REFILL_SECONDS`."""
REMEMBERED = 2000
"""Bound of what is remembered, for notices and for objects each; the oldest is forgotten."""
MAX_TEXT = 1024
"""The API's own bound for an Event's message, in characters."""
COMBINED = "(combined from similar events): "

Subject = tuple[str, str, str, str]
"""kind, namespace, name, uid of the object."""


@dataclass(slots=True)
class _Said:
    first: float
    last: float
    count: int = 1
    untold: int = 0


@dataclass(slots=True)
class _Budget:
    tokens: float
    at: float
    texts: dict[str, set[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Telling:
    """One Event to post or to count up. ``name`` is stable for the same notice; times are Unix seconds."""

    notice: Notice
    name: str
    count: int
    first: float
    last: float


class Correlator:
    """Decides what is told. Pure: time is an argument."""

    def __init__(self) -> None:
        self._said: OrderedDict[tuple[str, ...], _Said] = OrderedDict()
        self._budgets: OrderedDict[Subject, _Budget] = OrderedDict()
        self.dropped = 0

    def hear(self, notice: Notice, now: float) -> Telling | None:
        """What to tell about ``notice``, or None when it is left out for now."""
        subject = (notice.kind, notice.namespace, notice.name, notice.uid)
        budget = self._budget(subject, now)
        combined = self._combined(budget, notice)
        if combined:
            notice = msgspec.structs.replace(notice, text=(COMBINED + notice.text)[:MAX_TEXT])
        # Combined texts share one Event, whose text is the newest.
        identity = (*subject, notice.worker, notice.type, notice.reason, COMBINED if combined else notice.text)
        said = self._said.get(identity)
        if said is not None and now - said.last < QUIET_SECONDS:
            said.untold += 1
            return None
        if budget.tokens < 1:
            self.dropped += 1
            return None
        budget.tokens -= 1
        if said is None:
            said = _Said(now, now)
            _remember(self._said, identity, said)
        else:
            said.count += said.untold + 1
            said.last, said.untold = now, 0
        return Telling(notice, event_name(notice, identity), said.count, said.first, now)

    def _budget(self, subject: Subject, now: float) -> _Budget:
        budget = self._budgets.get(subject)
        if budget is None:
            budget = _Budget(BURST, now)
            _remember(self._budgets, subject, budget)
        budget.tokens = min(BURST, budget.tokens + max(0.0, now - budget.at) / REFILL_SECONDS)
        budget.at = now
        return budget

    @staticmethod
    def _combined(budget: _Budget, notice: Notice) -> bool:
        texts = budget.texts.setdefault(notice.reason, set())
        if notice.text not in texts and len(texts) < SIMILAR:
            texts.add(notice.text)
        return notice.text not in texts


def _remember(memory: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    memory[key] = value
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)


def event_name(notice: Notice, identity: tuple[str, ...]) -> str:
    """Name of the Event: the object's name and a hash of all that makes the notice, so a restart finds it again."""
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    stem = re.sub(r"[^a-z0-9.-]", "-", notice.name.lower()).strip("-.")[:230].strip("-.") or "object"
    return f"{stem}.{digest}"


def event_namespace(notice: Notice) -> str:
    """Events about cluster-scoped objects live in ``default``."""
    return notice.namespace or "default"


def event_body(telling: Telling, host: str) -> bytes:
    """The core/v1 Event as JSON."""
    notice = telling.notice
    versions = {resource.object_kind: resource.api_version for resource in RESOURCES.values()}
    about = {
        "kind": notice.kind,
        "apiVersion": versions.get(notice.kind, "v1"),
        "name": notice.name,
        "namespace": notice.namespace,
        "uid": notice.uid,
    }
    return msgspec.json.encode(
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": telling.name, "namespace": event_namespace(notice)},
            "involvedObject": {key: value for key, value in about.items() if value},
            "reason": notice.reason,
            "message": notice.text[:MAX_TEXT],
            "type": notice.type,
            "count": telling.count,
            "firstTimestamp": rfc3339(telling.first),
            "lastTimestamp": rfc3339(telling.last),
            "source": {"component": "kube-router", "host": host},
            "reportingComponent": f"kube-router/{notice.worker}",
            "reportingInstance": host,
        }
    )


class LogSink:
    """Where there is no API server: a notice is a line in the log."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._correlator, self._clock = Correlator(), clock

    def post(self, notice: Notice) -> None:
        """Log the notice, unless it has just been said."""
        if telling := self._correlator.hear(notice, self._clock()):
            notice = telling.notice
            place = f"{notice.namespace}/{notice.name}" if notice.namespace else notice.name
            level = logging.WARNING if notice.type == "Warning" else logging.INFO
            log.log(level, "event %s %s %s: %s (%s)", notice.kind, place, notice.reason, notice.text, notice.worker)

    def stop(self) -> None:
        """Nothing to let go of."""


class PostEvents(Protocol):
    """What posts; raises an exception with a one-line text, and ``transient`` tells whether to try again."""

    def __call__(self, telling: Telling) -> None: ...


class PostError(Exception):
    """An Event could not be posted. ``transient``: the same may work later."""

    def __init__(self, text: str, *, transient: bool, retry_after: float = 0.0) -> None:
        super().__init__(text)
        self.transient, self.retry_after = transient, retry_after


ABOUT = "events"
"""The part that the sink's troubles are about."""
QUEUE = 100
RATE_SECONDS = 0.1
"""Pause between two posts: a node says at most ten things a second."""


class ApiSink:
    """Posts Events in a thread; what does not fit into its queue is dropped and counted."""

    def __init__(self, post: PostEvents, feed: Feed, clock: Callable[[], float] = time.time) -> None:
        self._post, self._feed, self._clock = post, feed, clock
        self._correlator = Correlator()
        self._queue: queue.Queue[Telling] = queue.Queue(QUEUE)
        self._overflowed = 0
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Notices that never became an Event."""
        return self._overflowed + self._correlator.dropped

    def post(self, notice: Notice) -> None:
        """Queue a notice; never blocks."""
        if telling := self._correlator.hear(notice, self._clock()):
            try:
                self._queue.put_nowait(telling)
            except queue.Full:
                self._overflowed += 1

    def stop(self) -> None:
        """The feed stops the thread; it is a daemon and holds nothing."""

    def _run(self) -> None:
        try:
            while True:
                try:
                    telling = self._queue.get(timeout=0.5)
                except queue.Empty:
                    self._feed.pause(0)
                    continue
                self._deliver(telling)
                self._queue.task_done()
                self._feed.pause(RATE_SECONDS)
        except Stopped:
            return

    def _deliver(self, telling: Telling) -> None:
        backoff = Backoff(random.random)
        while True:
            try:
                self._post(telling)
                self._feed.put(Trouble(ABOUT, None))
                return
            except PostError as error:
                self._feed.put(Trouble(ABOUT, str(error)))
                if not error.transient:
                    self._overflowed += 1
                    return
                self._feed.pause(backoff.failed(error.retry_after))
