"""Network policy in one process: replica, engine, controller, backend and kernel, against kube-router's own algorithm.

Every figure is taken with the real controller in a network namespace of its own. The baseline (`upstream_netpol`) runs
over the same kernel tools in another one. Its goals, ten or a thousand times as fast, are part of ``goal``: it is the
smaller one of the absolute bound and the baseline's fraction.
"""

from __future__ import annotations

import functools
import gc
import ipaddress
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.firewall_shapes import (
    LARGE,
    MIDDLE,
    NODE,
    SMALL,
    Objects,
    apply,
    change,
    member_events,
    objects,
    policy_events,
    wide_policy,
)
from bench.upstream_netpol import Upstream
from run import Baseline, Result
from support.namespaces import Namespace, namespaces

from kube_router.ipc.messages import Delta, Kind, KindSnapshot, Snapshot, SourceState
from kube_router.ipc.replica import Changes, ReplicaState
from kube_router.workers.firewall.controller import FirewallController
from kube_router.workers.firewall.reach import reach
from kube_router.workers.kernel.ipset import SetDriver
from kube_router.workers.model import Family, Outcome
from kube_router.workers.rulefacts import Members, SetName, SetPlan, SetSpec
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings

BACKENDS = ("iptables", "nftables")
SHAPES = {"large": LARGE, "middle": MIDDLE, "small": SMALL}
FASTER = {"large": 1000, "middle": 20, "small": 20}
"""How many times faster than the baseline one event has to be."""
MEMBER_EVENTS, POLICY_EVENTS = 400, 150
MEMBERS = 100_000
UPSTREAM = "kube-router's algorithm in Python over the same tools"
HERE = Path(__file__).resolve().parent


def settings(backend: str) -> Settings:
    """Those of a dual-stack node."""
    return Settings(
        node_name=NODE,
        enable_ipv6=True,
        use_nftables_for_netpol=backend == "nftables",
        service_cluster_ip_range=("10.96.0.0/12", "fd00:10:96::/112"),
    )


def percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def load() -> str:
    """What else the machine does: the figures are for one that does nothing else."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"


class World:
    """The worker's replica and controller in this process, on a node that is the namespace of the calling thread."""

    def __init__(self, found: Objects, backend: str) -> None:
        self.found = found
        asked = settings(backend)
        self.controller = FirewallController(asked, lambda: reach(asked))
        kinds = self.controller.kinds
        self._state = ReplicaState("firewall", kinds)
        parts = tuple(KindSnapshot(kind=kind, seq=0, objects=tuple(found[kind].values())) for kind in kinds)
        state = SourceState(source="bench", in_sync=True)
        self._state.on_snapshot(Snapshot(epoch="bench", state=state, kinds=parts))
        self._state.take_changes()
        self._seqs: dict[Kind, int] = dict.fromkeys(kinds, 0)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.controller.close()

    def turn(self, trigger: Trigger) -> tuple[float, Outcome]:
        """One reconciliation; its seconds."""
        began = time.perf_counter()
        outcome = self.controller.reconcile(self._state.cluster, trigger)
        took = time.perf_counter() - began
        assert not outcome.failures, outcome.failures[:3]
        return took, outcome

    def start(self) -> tuple[float, Outcome]:
        """The first one of a process."""
        return self.turn(Trigger(start=True))

    def happen(self, changes: Changes) -> tuple[float, Outcome]:
        """Changes as deltas into the replica, until the kernel has acknowledged what they come to; seconds."""
        deltas = []
        for kind, by_key in changes.items():
            self._seqs[kind] += 1
            put = tuple(new for _, new in by_key.values() if new is not None)
            gone = tuple(key for key, (_, new) in by_key.items() if new is None)
            deltas.append(Delta(epoch="bench", kind=kind, seq=self._seqs[kind], put=put, gone=gone))
        began = time.perf_counter()
        for delta in deltas:
            self._state.on_delta(delta)
        outcome = self.controller.reconcile(self._state.cluster, Trigger(changes=self._state.take_changes()))
        took = time.perf_counter() - began
        assert not outcome.failures, outcome.failures[:3]
        apply(self.found, changes)
        return took, outcome


@functools.cache
def upstream(name: str) -> tuple[float, float, str]:
    """Seconds of the baseline's first sync and of one after a change of one pod's label, and what the latter is of."""
    found = objects(SHAPES[name])
    event = next(member_events(found, SHAPES[name], 1))
    with namespaces() as (namespace,), namespace.enter():
        sync = Upstream(NODE)
        cold = sync.sync(found)
        apply(found, event)
        later = [sync.sync(found) for _ in range(1 if name == "large" else 3)]
    return cold, statistics.median(later), f"{sync.programs} programs took {sync.in_programs:.2f} s of the last"


def events() -> Iterator[Result]:
    """One change at a time: a peer's label, a new peer, a new policy."""
    for name, shape in SHAPES.items():
        for backend in BACKENDS:
            with namespaces() as (namespace,), namespace.enter(), World(objects(shape), backend) as world:
                world.start()
                yield from members(world, backend, name, "member")
                yield from policies(world, backend, name)
                wide = wide_policy(world.found)
                world.happen(change(world.found, "networkpolicies", wide.key, wide))
                yield from members(world, backend, name, "wide")


def members(world: World, backend: str, name: str, kind: str) -> Iterator[Result]:
    """A remote pod's label or a new remote pod: from the delta to the kernel's acknowledgement.

    ``kind``: ``member``, or ``wide`` when there are sets that hold every pod.
    """
    times = []
    gc.collect()
    for changes in member_events(world.found, SHAPES[name], MEMBER_EVENTS):
        took, outcome = world.happen(changes)
        assert outcome.writes, "the kernel was told nothing"
        times.append(took * 1000)
    _, later, of = upstream(name)
    baseline = Baseline(UPSTREAM, later * 1000)
    shape = (
        f"{SHAPES[name]}; {len(times)} events, {backend}; goal also 1/{FASTER[name]} of the baseline ({of}); {load()}"
    )
    for word, share, goal in (("p50", 0.5, min(5.0, later * 1000 / FASTER[name])), ("p99", 0.99, 20.0)):
        what = f"a peer's label changes or a peer is new, delta to netlink acknowledgement, {word}"
        if kind == "wide":
            what += ", with sets of all pods"
        value = percentile(times, share)
        yield Result(f"firewall.event.{kind}.{backend}.{name}.{word}", what, value, "ms", goal, baseline, shape)


def policies(world: World, backend: str, name: str) -> Iterator[Result]:
    """A new policy of a local pod, with sets and chains of its own, until it is enforced."""
    times = []
    gc.collect()
    for new, changes in policy_events(world.found, POLICY_EVENTS):
        took, outcome = world.happen(changes)
        assert outcome.writes, "the kernel was told nothing"
        times.append(took * 1000)
        world.happen(change(world.found, "networkpolicies", new.key, None))
    baseline = Baseline(UPSTREAM, upstream(name)[1] * 1000)
    value, goal = percentile(times, 0.99), 60.0 if backend == "iptables" else 30.0
    yield Result(
        f"firewall.event.policy.{backend}.{name}",
        "a new policy with three sets until it is enforced, p99",
        value,
        "ms",
        goal,
        baseline,
        f"{SHAPES[name]}; {len(times)} policies, p50 {percentile(times, 0.5):.1f} ms; {load()}",
    )


def cold() -> Iterator[Result]:
    """The first sync into an empty kernel; then a second process that finds everything; then the background check."""
    for name in SHAPES:
        for backend in BACKENDS:
            yield from _cold(backend, name)


def _cold(backend: str, name: str) -> Iterator[Result]:
    firsts, restarts, checks = [], [], []
    for _ in range(3):
        with namespaces() as (namespace,), namespace.enter():
            found = objects(SHAPES[name])
            with World(found, backend) as world:
                gc.collect()
                firsts.append(world.start()[0])
            with World(found, backend) as world:
                gc.collect()
                took, outcome = world.start()
                assert not outcome.writes, f"{outcome.writes} writes after a restart"
                restarts.append(took)
                for _ in range(5):
                    took, outcome = world.turn(Trigger(period=True))
                    assert not outcome.writes, f"{outcome.writes} writes although nothing changed"
                    checks.append(took)
    first, _, _ = upstream(name)
    baseline, shape = Baseline(UPSTREAM, first), f"{SHAPES[name]}; median of {len(firsts)}, {backend}; {load()}"
    value = statistics.median(firsts)
    what = "first sync into an empty kernel"
    goal = min(1.5, first / 10) if name == "large" else 1.5
    yield Result(f"firewall.cold.{backend}.{name}", what, value, "s", goal, baseline, shape)
    what = "first sync of a new process that finds everything as it has to be, 0 writes"
    yield Result(f"firewall.restart.{backend}.{name}", what, statistics.median(restarts), "s", 1.5, baseline, shape)
    baseline = Baseline(UPSTREAM, upstream(name)[1] * 1000)
    value, shape = statistics.median(checks) * 1000, f"{SHAPES[name]}; median of {len(checks)}, {backend}; {load()}"
    what = "nothing changed: all of the kernel's state is read and compared, 0 writes"
    yield Result(f"firewall.idle.{backend}.{name}", what, value, "ms", 50.0, baseline, shape)


def sets() -> Iterator[Result]:
    """A set of 100,000 members, each way into a new set."""
    texts = [str(ipaddress.IPv4Address(0x0A000000 + 3 * number)) for number in range(MEMBERS)]
    random.Random(1).shuffle(texts)
    with namespaces() as (namespace,), namespace.enter(), tempfile.TemporaryDirectory() as folder:
        ways: dict[str, list[float]] = {"ours": [], "c": [], "restore": []}
        program = compiled("ipset_batches", folder)
        file = Path(folder) / "addresses"
        file.write_text("\n".join([*texts, ""]))
        for _ in range(5):
            ways["ours"].append(_driver(namespace, texts))
            ways["c"].append(_c_program(namespace, program, file))
            ways["restore"].append(_ipset_restore(namespace, texts))
    ours, in_c, restore = (statistics.median(times) * 1000 for times in ways.values())
    shape = f"{MEMBERS:,} IPv4 addresses, text to acknowledgement, hash:ip, median of 5; {load()}"
    baseline = Baseline("C program with the same netlink messages", in_c)
    yield Result("firewall.set.100k.c", "a set filled by the driver", ours, "ms", 1.5 * in_c, baseline, shape)
    baseline = Baseline("ipset restore", restore)
    yield Result("firewall.set.100k.restore", "a set filled by the driver", ours, "ms", restore / 5, baseline, shape)


def compiled(name: str, folder: str) -> Path:
    """A C program of this folder, built; raises CalledProcessError with the compiler's words on the terminal."""
    program = Path(folder) / name
    subprocess.run(["gcc", "-O2", "-o", program, HERE / f"{name}.c"], check=True)
    return program


BIG = SetSpec(SetName("big"), "hash:ip", Family.IPV4, 131072)


def _new_set(namespace: Namespace, options: str = "") -> None:
    """Make the set, which takes no time, in the place of the last one."""
    namespace.run(f"ipset destroy {BIG.name} 2>/dev/null || true")
    namespace.run(f"ipset create {BIG.name} hash:ip timeout 0 maxelem {BIG.max_members} {options}")
    gc.collect()


def _filled(namespace: Namespace) -> None:
    assert f"Number of entries: {MEMBERS}" in namespace.run(f"ipset list -t {BIG.name}")


def _driver(namespace: Namespace, texts: list[str]) -> float:
    """The set is made by the driver."""
    namespace.run(f"ipset destroy {BIG.name} 2>/dev/null || true")
    gc.collect()
    driver = SetDriver()
    began = time.perf_counter()
    wanted = Members.of(Family.IPV4, texts)
    driver.apply(SetPlan(BIG, True, wanted, Members(Family.IPV4), wanted))
    took = time.perf_counter() - began
    driver.close()
    _filled(namespace)
    return took


def _c_program(namespace: Namespace, program: Path, file: Path) -> float:
    """Into a set as large as the driver makes it."""
    _new_set(namespace, f"hashsize {MEMBERS // 2}")
    done = subprocess.run([program, BIG.name, file], capture_output=True, text=True, check=True)
    _filled(namespace)
    return float(done.stdout)


def _ipset_restore(namespace: Namespace, texts: list[str]) -> float:
    """Into a set of the default size, as kube-router makes it."""
    _new_set(namespace)
    lines = "".join(f"add {BIG.name} {text} timeout 0\n" for text in texts)
    began = time.perf_counter()
    subprocess.run(["ipset", "restore", "-exist"], input=lines, text=True, check=True)
    took = time.perf_counter() - began
    _filled(namespace)
    return took
