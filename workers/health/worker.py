"""The health worker's loop: take heartbeats, answer the status socket, serve the HTTP pages.

Touches sockets, ``processes.json`` and the clock. One thread; every part does what it can do at once, so no client of
one delays another.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

from kube_router.ipc.channels import HeartbeatReceiver, Pollable, Poller, StatusServer
from kube_router.ipc.messages import Heartbeat, StatusReply
from kube_router.workers.health.exposition import CONTENT_TYPE, Histograms, render_metrics
from kube_router.workers.health.http import Listening, Page, Server
from kube_router.workers.health.processes import ProcessTable, read_processes
from kube_router.workers.health.verdict import MYSELF, Board, Verdict, healthz_body
from kube_router.workers.runtime import privileges, resident_bytes
from kube_router.workers.settings import Settings

log = logging.getLogger(__name__)

JUDGE_SECONDS = 1.0


class HealthWorker:
    """Everything the process does; `step` is one turn."""

    def __init__(self, settings: Settings) -> None:
        now = time.monotonic()
        self._heartbeats, self._status = HeartbeatReceiver(), StatusServer()
        self._board, self._histograms = Board(now), Histograms()
        self._started = time.time()
        self._privileges = privileges()
        self._version = version()
        listenings = []
        if settings.health_port:
            pages = {"/healthz": self.healthz}
            listenings.append(Listening("health", settings.health_addr, settings.health_port, pages))
        if settings.metrics_port:
            pages = {settings.metrics_path: self.metrics}
            listenings.append(Listening("metrics", settings.metrics_addr, settings.metrics_port, pages))
        self._server = Server(listenings)
        self._server.turn(set(), now)
        self._was_healthy = True
        self._judge_at = now
        self.stopping = False
        self.wake, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def stop(self, signum: int = 0, frame: object = None) -> None:
        """End the loop, also from a signal handler."""
        self.stopping = True
        os.write(self._waker, b"\0")

    def close(self) -> None:
        """Release sockets."""
        self._server.close()
        self._heartbeats.close()
        self._status.close()

    def step(self) -> None:
        """Wait for something to come, for at most a second, and deal with it."""
        now = time.monotonic()
        timeout = max(0.0, min(self._server.wait(now), self._judge_at - now))
        items: list[Pollable] = [self._heartbeats, self._status, self.wake, *self._server.descriptors()]
        ready = Poller.wait(items, timeout)
        now = time.monotonic()
        for beat in self._heartbeats.receive():
            self._board.take(beat, now)
            self._histograms.take(beat)
        self._status.serve(self.reply)
        self._server.turn({item for item in ready if isinstance(item, int)}, now)
        if now >= self._judge_at:
            self._judge_at = now + JUDGE_SECONDS
            self.judge()

    def judge(self) -> tuple[Verdict, ProcessTable]:
        """How the agent stands now. A change is logged here, so that no probe sees one that the log does not tell."""
        table = read_processes()
        verdict = self._board.judge(table, time.monotonic())
        self._tell(verdict)
        return Verdict(verdict.reasons, verdict.degraded + self._server.troubles), table

    def _tell(self, verdict: Verdict) -> None:
        if verdict.healthy != self._was_healthy:
            self._was_healthy = verdict.healthy
            if verdict.healthy:
                log.info("healthy again")
            else:
                log.error("unhealthy: %s", "; ".join(verdict.reasons))

    def own_beat(self) -> Heartbeat:
        """How this worker itself stands."""
        now = time.time()
        return Heartbeat(
            worker=MYSELF,
            pid=os.getpid(),
            started=self._started,
            sent=now,
            last_sync=now,
            in_sync=True,
            dropped=self._heartbeats.dropped + self._status.dropped,
            rss=resident_bytes(),
            privileges=self._privileges,
            warnings=self._server.troubles,
        )

    def reply(self) -> StatusReply:
        """The answer to ``kube-routerctl status``."""
        verdict, _ = self.judge()
        beats = (*self._board.heartbeats, self.own_beat())
        return StatusReply(healthy=verdict.healthy, reasons=verdict.lines, heartbeats=beats)

    def healthz(self) -> Page:
        """``/healthz``."""
        return Page(*healthz_body(self.judge()[0]))

    def metrics(self) -> Page:
        """``--metrics-path``."""
        verdict, table = self.judge()
        text = render_metrics(
            (*self._board.heartbeats, self.own_beat()),
            table,
            self._histograms,
            healthy=verdict.healthy,
            version=self._version,
            runtime=f"python{sys.version.split()[0]}",
        )
        return Page(200, text, CONTENT_TYPE)


def version() -> str:
    """The version of the installed distribution, by its folder's name: ``importlib.metadata`` would cost 3 MB."""
    for folder in map(Path, sys.path):
        for found in sorted(folder.glob("kube_router-*.dist-info")):
            return found.name.removeprefix("kube_router-").removesuffix(".dist-info")
    return "unknown"


def run_health(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; returns the exit status."""
    worker = HealthWorker(settings)
    signal.signal(signal.SIGTERM, worker.stop)
    signal.signal(signal.SIGINT, worker.stop)
    log.info("started: %s", worker.own_beat().privileges)
    for what, port in (("health", settings.health_port), ("metrics", settings.metrics_port)):
        if not port:
            log.info("--%s-port is 0: nothing is served", what)
    try:
        while not worker.stopping:
            worker.step()
    finally:
        worker.close()
    log.info("stopped")
    return 0
