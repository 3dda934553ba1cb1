"""The Kubernetes API as a source: one thread a kind, and the poster of Events.

Touches the network. Imported only when there is an API server to talk to: the ``kubernetes`` package costs more memory
than all the rest of the watcher.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping

import msgspec
from urllib3.exceptions import HTTPError

from kube_router.ipc.messages import Kind, Projection
from kube_router.workers.kubeapi.apiserver import ApiError, ApiServer
from kube_router.workers.kubeapi.times import rfc3339
from kube_router.workers.watcher.events import PostError, Telling, event_body, event_namespace
from kube_router.workers.watcher.kinds import RESOURCES
from kube_router.workers.watcher.listwatch import KindWatcher, Tuning
from kube_router.workers.watcher.source import Feed

log = logging.getLogger(__name__)

STOP_SECONDS = 0.4
EVENT_ANSWER_SECONDS = 10.0


class KubernetesSource:
    """List and watch of several kinds on one API server."""

    def __init__(self, server: ApiServer, name: str, kinds: Iterable[Kind], tuning: Tuning | None = None) -> None:
        self.name = name
        self._server, self._kinds, self._tuning = server, tuple(kinds), tuning
        self._watchers: list[KindWatcher] = []
        self._threads: list[threading.Thread] = []
        self._feed: Feed | None = None

    def seed(self, objects: Mapping[Kind, Iterable[Projection]]) -> None:
        """Nothing of an earlier run is needed: the server tells everything."""

    def start(self, feed: Feed) -> None:
        """Start a thread for each kind."""
        self._feed = feed
        for kind in self._kinds:
            watcher = KindWatcher(RESOURCES[kind], self._server, feed, self._tuning)
            thread = threading.Thread(target=watcher.run, name=kind, daemon=True)
            self._watchers.append(watcher)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Interrupt all reads; a thread that even so waits (for a name server, say) dies with the process."""
        if self._feed is not None:
            self._feed.stopping.set()
        for watcher in self._watchers:
            watcher.interrupt()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def source_name(kubeconfig: str, master: str) -> str:
    """What the snapshot on disk is filed under: the way to the server as the operator named it, not its address.

    An address may change with a load balancer; it must not make the agent forget the cluster.
    """
    if kubeconfig:
        return f"Kubernetes API by kubeconfig {kubeconfig}" + (f", master {master}" if master else "")
    return f"Kubernetes API in-cluster, master {master}" if master else "Kubernetes API in-cluster"


class _Counted(msgspec.Struct):
    count: int | None = None


COUNTED = msgspec.json.Decoder(_Counted)


class EventPoster:
    """Creates Events, and counts them up when they are there already (this agent said the same before)."""

    def __init__(self, server: ApiServer, host: str) -> None:
        self._server, self._host = server, host
        self._posted: set[str] = set()

    def __call__(self, telling: Telling) -> None:
        """Post or count up; raises `PostError`."""
        collection = f"/api/v1/namespaces/{event_namespace(telling.notice)}/events"
        try:
            try:
                if telling.count > 1 and telling.name in self._posted:
                    self._count_up(f"{collection}/{telling.name}", telling, telling.count)
                else:
                    self._request("POST", collection, event_body(telling, self._host))
            except ApiError as error:
                if error.status == 404 and telling.name in self._posted:  # forgotten by the server after an hour
                    self._request("POST", collection, event_body(telling, self._host))
                elif error.status == 409:
                    self._count_up_existing(f"{collection}/{telling.name}", telling)
                else:
                    raise
        except ApiError as error:
            text = f"event about {telling.notice.kind} {telling.notice.name} not posted: {error}"
            transient = error.status is None or error.status == 429 or error.status >= 500
            raise PostError(text, transient=transient, retry_after=error.retry_after) from None
        if len(self._posted) > 5000:
            self._posted.clear()
        self._posted.add(telling.name)

    def _count_up_existing(self, path: str, telling: Telling) -> None:
        count = COUNTED.decode(self._request("GET", path)).count or 1
        self._count_up(path, telling, count + 1)

    def _count_up(self, path: str, telling: Telling, count: int) -> None:
        patch = {"count": count, "lastTimestamp": rfc3339(telling.last), "message": telling.notice.text[:1024]}
        self._request("PATCH", path, msgspec.json.encode(patch), "application/merge-patch+json")

    def _request(
        self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json"
    ) -> bytes:
        response = self._server.open(method, path, body=body, content_type=content_type, silence=EVENT_ANSWER_SECONDS)
        try:
            return response.read()
        except (HTTPError, OSError) as error:
            raise self._server.failure(error, EVENT_ANSWER_SECONDS) from None
        finally:
            response.close()
