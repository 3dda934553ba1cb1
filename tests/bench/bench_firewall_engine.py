"""The firewall's engine alone, without kernel: the first ruleset, one event of each kind, and the memory for it."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator

import msgspec
from bench import firewall_shapes as shapes
from run import Result, median_of

from kube_router.ipc.messages import Namespace
from kube_router.ipc.replica import Changes
from kube_router.workers.firewall.engine import Engine
from kube_router.workers.firewall.rules import Changed
from kube_router.workers.model import Family

SHAPE = shapes.LARGE
FAMILIES = (Family.IPV4, Family.IPV6)
EVENTS = 400


def started(objects: shapes.Objects) -> Engine:
    """An engine that knows the cluster, and whose first changes were taken."""
    engine = Engine(shapes.NODE, FAMILIES)
    engine.update(shapes.cluster(objects), None)
    engine.take_changed()
    return engine


def run() -> Iterator[Result]:
    """Times are processor time; the objects of the API are the replica's and do not count as memory."""
    objects = shapes.objects(SHAPE)

    def cold() -> float:
        began = time.process_time()
        started(objects)
        return time.process_time() - began

    took = median_of(cold)
    yield Result("firewall.engine.cold", "the first ruleset", took, "s", 0.5, None, f"{SHAPE}; median of 5")
    yield Result("firewall.engine.memory", "memory of the engine", held(objects), "MiB", 10.0, None, str(SHAPE))
    engine = started(objects)

    def measured(
        name: str, what: str, goal: float, changes: Iterable[Changes], fits: Callable[[Changed], bool] = anything
    ) -> Result:
        times = sorted(event(engine, objects, change, fits) for change in changes)
        shape = f"{SHAPE}; 99th percentile of {len(times)}, median {statistics.median(times):.0f} µs"
        return Result(f"firewall.engine.{name}", what, times[len(times) * 99 // 100], "µs", goal, None, shape)

    members = shapes.member_events(objects, SHAPE, EVENTS)
    yield measured("member", "a remote pod becomes a peer, or is one no more", 200.0, members, moves_members)
    churn = itertools.islice(shapes.churn_events(objects, SHAPE), EVENTS)
    yield measured("churn", "pods of the whole cluster come, go and change", 2_000.0, churn)
    yield measured("namespace", "a namespace's labels change", 5_000.0, moved_teams(objects))
    policies = (changes for _, changes in shapes.policy_events(objects, EVENTS))
    yield measured("policy", "a new policy for a pod of this node", 5_000.0, policies, new_sets)


def anything(changed: Changed) -> bool:
    """Also nothing."""
    return True


def new_sets(changed: Changed) -> bool:
    """Whether there are new sets."""
    return bool(changed.new_sets)


def moves_members(changed: Changed) -> bool:
    """Whether sets have other members, and nothing else is different."""
    return bool(changed) and changed.only_members


def event(engine: Engine, objects: shapes.Objects, changes: Changes, fits: Callable[[Changed], bool]) -> float:
    """Let it happen; processor time in µs until it is known what it comes to."""
    shapes.apply(objects, changes)
    cluster = shapes.cluster(objects)
    began = time.process_time()
    engine.update(cluster, changes)
    changed = engine.take_changed()
    took = time.process_time() - began
    assert fits(changed), changed
    return took * 1e6


def moved_teams(objects: shapes.Objects) -> Iterator[Changes]:
    """Each namespace goes over to the next team."""
    for number, key in enumerate(list(objects["namespaces"])):
        namespace = objects["namespaces"][key]
        assert isinstance(namespace, Namespace)
        labels = {**namespace.labels, "team": f"team-{(number + 1) % shapes.TEAMS}"}
        yield shapes.change(objects, "namespaces", key, msgspec.structs.replace(namespace, labels=labels))


def held(objects: shapes.Objects) -> float:
    """MiB that an engine holds once it knows the cluster."""
    gc.collect()
    tracemalloc.start()
    engine = started(objects)
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert engine.ruleset.members
    return size / 2**20
