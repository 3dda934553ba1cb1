"""The firewall worker on a real kernel without its process: real loop, controller and backend, in one namespace.

The test is the watcher: it puts objects, turns the loop for a while, and reads heartbeats and notices as they come.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, cast

from support.namespaces import Namespace

from kube_router.ipc.channels import HeartbeatSender, NoticeSender
from kube_router.ipc.messages import (
    Beacon,
    Delta,
    EndpointSlice,
    Heartbeat,
    Key,
    Kind,
    KindSnapshot,
    NetworkPolicy,
    Node,
    Notice,
    Pod,
    Projection,
    Service,
    Snapshot,
    SourceState,
)
from kube_router.ipc.messages import Namespace as ApiNamespace
from kube_router.ipc.replica import Changes, Cluster, Replica, ReplicaState
from kube_router.workers.firewall.__main__ import PACE
from kube_router.workers.firewall.controller import FirewallController
from kube_router.workers.firewall.reach import reach
from kube_router.workers.runtime import Controller, Loop
from kube_router.workers.settings import Settings

IN_SYNC = SourceState(source="test", in_sync=True)
STALE = SourceState(source="test", stale=True)
KIND_OF: dict[type[Projection], Kind] = {
    Node: "nodes",
    Pod: "pods",
    ApiNamespace: "namespaces",
    NetworkPolicy: "networkpolicies",
    Service: "services",
    EndpointSlice: "endpointslices",
}


class FedReplica:
    """The real replica logic; the test is its wire."""

    sockets = ()
    dropped = 0

    def __init__(self, controller: Controller) -> None:
        self.core = ReplicaState(controller.name, controller.kinds)
        self.wire: deque[Snapshot | Delta | Beacon] = deque()

    @property
    def cluster(self) -> Cluster:
        """The newest view."""
        return self.core.cluster

    @property
    def usable(self) -> bool:
        """Whether there is one."""
        return self.core.usable

    def wait(self, now: float) -> float:
        """It asks for nothing."""
        return float("inf")

    def receive(self, now: float) -> Changes:
        """Take what the test has put on the wire."""
        while self.wire:
            message = self.wire.popleft()
            if isinstance(message, Snapshot):
                self.core.on_snapshot(message)
            elif isinstance(message, Delta):
                self.core.on_delta(message)
            else:
                self.core.on_beacon(message)
        return self.core.take_changes()


class Outbox:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: object) -> bool:
        """Always takes it."""
        self.sent.append(message)
        return True


class WorkerNode:
    """One worker; must be used by a thread that is inside of the namespace."""

    def __init__(self, controller: Controller, state: SourceState = IN_SYNC) -> None:
        self.controller = controller
        self.objects: dict[Kind, dict[Key, Projection]] = {kind: {} for kind in controller.kinds}
        self.seqs = dict.fromkeys(controller.kinds, 0)
        self.state = state
        self.replica, self.heartbeats, self.notices = FedReplica(controller), Outbox(), Outbox()
        self.loop = Loop(
            self.controller,
            cast(Replica, self.replica),
            cast(HeartbeatSender, self.heartbeats),
            cast(NoticeSender, self.notices),
            pace=PACE,
        )

    # -- the cluster -----------------------------------------------------------------------------------------------

    def begin(self, *objects: Projection) -> None:
        """The first snapshot, and all that it leads to."""
        for item in objects:
            self.objects[KIND_OF[type(item)]][item.key] = item
        parts = [KindSnapshot(kind=kind, seq=0, objects=tuple(table.values())) for kind, table in self.objects.items()]
        self.replica.wire.append(Snapshot(epoch="1", state=self.state, kinds=tuple(parts)))
        self.settle()

    def put(self, *objects: Projection, gone: tuple[Projection, ...] = ()) -> None:
        """New, changed and removed objects, and all that they lead to."""
        for item in objects:
            self._delta(KIND_OF[type(item)], put=(item,))
        for item in gone:
            self._delta(KIND_OF[type(item)], gone=(item.key,))
        self.settle()

    def _delta(self, kind: Kind, put: tuple[Projection, ...] = (), gone: tuple[Key, ...] = ()) -> None:
        table = self.objects[kind]
        table.update({item.key: item for item in put})
        for key in gone:
            table.pop(key, None)
        self.seqs[kind] += 1
        self.replica.wire.append(Delta(epoch="1", kind=kind, seq=self.seqs[kind], put=put, gone=gone))

    def say(self, state: SourceState) -> None:
        """How the source stands has changed."""
        self.replica.wire.append(Beacon(epoch="1", seqs=dict(self.seqs), state=state))
        self.settle()

    # -- the worker ------------------------------------------------------------------------------------------------

    def settle(self, quiet: float = 0.05, most: float = 10.0) -> None:
        """Turn the loop until nothing has been reconciled for ``quiet`` seconds."""
        end = time.monotonic() + most
        syncs, since = -1, time.monotonic()
        while time.monotonic() < end and (time.monotonic() - since < quiet or self.replica.wire):
            self._turn(quiet / 2)
            if self.loop.beat.syncs != syncs:
                syncs, since = self.loop.beat.syncs, time.monotonic()

    def until(self, condition: Callable[[], object], seconds: float) -> bool:
        """Turn the loop until a condition holds; whether it came to hold in time."""
        end = time.monotonic() + seconds
        while not (held := bool(condition())) and time.monotonic() < end:
            self._turn(0.02)
        return held

    def _turn(self, most: float) -> None:
        """One step that waits at most so long: the heartbeat's due time is moved there."""
        self.loop._beat_at = min(self.loop._beat_at, time.monotonic() + most)
        self.loop.step()

    @property
    def beat(self) -> Heartbeat:
        """The newest heartbeat; samples of histograms are in the one that was sent with them."""
        return self.loop.beat

    def samples(self, name: str) -> list[float]:
        """All samples of a histogram so far."""
        return [value for beat in self.heartbeats.sent for value in beat.observations.get(name, ())]

    def told(self) -> list[Notice]:
        """Events so far."""
        return list(self.notices.sent)

    def close(self) -> None:
        """As a worker that ends: sockets go, the kernel keeps everything."""
        self.controller.close()


class FirewallNode(WorkerNode):
    """A firewall worker."""

    def __init__(self, settings: Settings, state: SourceState = IN_SYNC) -> None:
        super().__init__(FirewallController(settings, lambda: reach(settings)), state)
        self.settings = settings


@contextlib.contextmanager
def firewall(settings: Settings, *objects: Projection, state: SourceState = IN_SYNC) -> Iterator[FirewallNode]:
    """A worker that has taken a first snapshot, until the end of the block."""
    node = FirewallNode(settings, state)
    try:
        node.begin(*objects)
        yield node
    finally:
        node.close()


def kernel_state(netns: Namespace) -> dict[str, str]:
    """All that could filter in a namespace, in text that two looks have in common: without counters of packets."""
    commands = {
        "nft": "nft -s list ruleset",
        "ipset": "ipset save | sed 's/ initval .*//' | sort",
        "legacy": "for p in iptables ip6tables; do $p-legacy-save 2>/dev/null | sed '/^#/d; s/\\[[0-9:]*\\]//'; done",
    }
    return {name: netns.run(command) for name, command in commands.items()}
