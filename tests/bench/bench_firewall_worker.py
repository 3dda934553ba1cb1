"""The firewall worker as a process of its own: over the wire, under churn, and the memory that it takes.

This process is the watcher: it publishes the cluster and its changes, and receives the heartbeats. The worker is the
real program in a network namespace of its own. Each change is known to be enforced when the worker's heartbeat after
the sync has arrived; so the figures hold both sockets and the worker's own wait for more changes.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.firewall_shapes import LARGE, Shape, churn_events, member_events, objects
from bench.workerprocess import MIB, WorkerProcess
from bench_agent import pss_kib
from bench_firewall import BACKENDS, load, percentile, settings
from run import Result
from support.namespaces import namespaces

CHURN_A_SECOND = 200
MANY_EVENTS = 10_000
WIRE_EVENTS = 200


@contextlib.contextmanager
def worker(shape: Shape, backend: str) -> Iterator[WorkerProcess]:
    """A worker at a cluster of this shape, not started yet; the calling thread is in its namespace."""
    with namespaces() as (namespace,), namespace.enter(), tempfile.TemporaryDirectory() as folder:
        made = WorkerProcess("firewall", settings(backend), objects(shape), Path(folder))
        try:
            yield made
        finally:
            made.close()


def run(churn_seconds: float) -> Iterator[Result]:
    """One worker a backend: start, single events, churn, then many events for its memory."""
    for backend in BACKENDS:
        with worker(LARGE, backend) as process:
            started = process.start()
            process.settle()
            first = pss_kib(process.pid) / MIB
            shape = f"{LARGE}; {backend}; RSS {process.rss_mib():.0f} MiB, start to first sync {started:.2f} s"
            what = "memory of the worker after its first sync"
            yield Result(f"firewall.memory.{backend}", what, first, "MiB PSS", 80.0, None, shape)
            yield from wire(process, backend)
            yield from churn(process, backend, churn_seconds)
            yield from growth(process, backend)


def wire(process: WorkerProcess, backend: str) -> Iterator[Result]:
    """One change at a time, some time apart, from the watcher's socket to the heartbeat behind the sync."""
    times = []
    for changes in member_events(process.found, LARGE, WIRE_EVENTS):
        process.quiet(0.02)
        before, began = len(process.syncs), time.monotonic()
        process.publish(changes)
        process.until(lambda before=before: len(process.syncs) > before, 10)  # type: ignore[misc]
        times.append((process.syncs[-1] - began) * 1000)
    inside = percentile(process.latencies[-len(times) :], 0.5) * 1000
    shape = f"{LARGE}; {len(times)} events, 20 ms apart; of the p50 {inside:.1f} ms from seen to enforced; {load()}"
    what = "a peer's label changes or a peer is new, watcher's socket to the worker's heartbeat, "
    yield Result(f"firewall.wire.{backend}.p50", f"{what}p50", percentile(times, 0.5), "ms", 5.0, None, shape)
    yield Result(f"firewall.wire.{backend}.p99", f"{what}p99", percentile(times, 0.99), "ms", 20.0, None, shape)


def churn(process: WorkerProcess, backend: str, seconds: float) -> Iterator[Result]:
    """Changes at a steady pace, all over the cluster."""
    assert process.beat is not None
    events = churn_events(process.found, LARGE)
    process.settle()
    process.latencies.clear()
    syncs, cpu, began = process.beat.syncs, process.cpu_seconds(), time.monotonic()
    sent = 0
    while (passed := time.monotonic() - began) < seconds:
        while sent < passed * CHURN_A_SECOND:
            process.publish(next(events))
            sent += 1
        process.serve(1 / CHURN_A_SECOND)
    used = (process.cpu_seconds() - cpu) / (time.monotonic() - began) * 100
    ended = time.monotonic()
    process.settle()
    shape = (
        f"{LARGE}; {sent} pod changes in {seconds:g} s, {process.beat.syncs - syncs} syncs, "
        f"{process.beat.dropped} messages dropped; {load()}"
    )
    what = f"CPU of the worker and its programs at {CHURN_A_SECOND} pod changes a second"
    yield Result(f"firewall.churn.{backend}", what, used, "% of a core", 30.0, None, shape)
    longest = max([*process.latencies, process.syncs[-1] - ended]) * 1000
    what = "longest wait of a change in the worker under that churn: the queue is bounded"
    shape = f"{LARGE}; p50 {percentile(process.latencies, 0.5) * 1000:.1f} ms of {len(process.latencies)} syncs"
    yield Result(f"firewall.churn.lag.{backend}", what, longest, "ms", 250.0, None, shape)


def growth(process: WorkerProcess, backend: str) -> Iterator[Result]:
    """Twice the same number of events: what the second half adds is a leak."""
    sizes = []
    events = churn_events(process.found, LARGE, seed=2)
    for _ in range(2):
        for _ in range(MANY_EVENTS // 2 // 25):
            for _ in range(25):
                process.publish(next(events))
            process.serve(0.01)
        process.settle()
        sizes.append(pss_kib(process.pid) / MIB)
    what = f"memory of the worker after {MANY_EVENTS:,} events more"
    yield Result(f"firewall.memory.later.{backend}", what, sizes[1], "MiB PSS", 80.0, None, f"{LARGE}; {backend}")
    what = "growth of the worker's memory over the second half of them"
    shape = f"{LARGE}; {backend}; {MANY_EVENTS // 2:,} events"
    yield Result(f"firewall.memory.growth.{backend}", what, sizes[1] - sizes[0], "MiB PSS", 2.0, None, shape)
