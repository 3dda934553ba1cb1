"""The watcher process: reads the settings, puts the parts together, runs the loop until SIGTERM or SIGINT.

Touches signals. The working directory is the run directory's ``ipc`` folder.
"""

from __future__ import annotations

import logging
import signal
import sys
import uuid
from pathlib import Path

from kube_router.ipc.channels import HeartbeatSender, Publisher
from kube_router.ipc.messages import Kind
from kube_router.workers import logs
from kube_router.workers.runtime import privileges
from kube_router.workers.settings import Settings, load_settings
from kube_router.workers.watcher.diskcache import DiskCache
from kube_router.workers.watcher.events import ApiSink, LogSink
from kube_router.workers.watcher.kinds import wanted_kinds
from kube_router.workers.watcher.loop import NAME, Watcher
from kube_router.workers.watcher.source import Feed, Sink, Source

log = logging.getLogger("kube_router.workers.watcher")

SNAPSHOT = Path("watcher", "snapshot")
"""In the state directory."""


def make_source(settings: Settings, kinds: tuple[Kind, ...], feed: Feed) -> tuple[Source, Sink]:
    """The source that the settings name, and where notices go; imports only what that one needs."""
    if settings.manifests:
        from kube_router.workers.watcher.manifests import ManifestSource

        return ManifestSource(Path(settings.manifests), kinds), LogSink()
    from kube_router.workers.kubeapi.apiserver import make_server
    from kube_router.workers.watcher.kubernetesapi import EventPoster, KubernetesSource, source_name

    server = make_server(settings.kubeconfig, settings.master, NAME)
    name = source_name(settings.kubeconfig, settings.master)
    return KubernetesSource(server, name, kinds), ApiSink(EventPoster(server, settings.node_name), feed)


def make_watcher(settings: Settings, directory: Path | str | None = None) -> tuple[Watcher, Feed]:
    """The watcher with all its parts; sockets in ``directory``, by default the working directory."""
    kinds = wanted_kinds(settings)
    feed = Feed()
    publisher = Publisher(uuid.uuid4().hex, directory)  # first: workers may be waiting for its sockets
    heartbeats = HeartbeatSender(directory)
    source, sink = make_source(settings, kinds, feed)
    cache = DiskCache(Path(settings.state_dir) / SNAPSHOT)
    timeout = settings.cache_sync_timeout
    return Watcher(source, kinds, publisher, heartbeats, sink, feed, cache, sync_timeout=timeout), feed


def main() -> int:
    """Run the worker; returns the exit status of the process."""
    settings = load_settings()
    logs.configure(NAME, settings)
    watcher, feed = make_watcher(settings)

    def stop(signum: int, frame: object) -> None:
        watcher.stopping = True
        feed.wake()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    log.info("started: %s", privileges())
    watcher.run()
    log.info("stopped")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
