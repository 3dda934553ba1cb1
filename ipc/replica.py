"""A worker's copy of the cluster: a snapshot, the deltas since, and a new snapshot whenever a delta was lost.

`ReplicaState` is pure: messages and time in, `Cluster` and `Changes` out. `Replica` is the thin shell with the sockets.

The state keeps two things apart: the *mirror*, which follows one epoch of the watcher message by message, and what the
worker is *shown*. While the mirror is in sync both are one. While it is not (a watcher that has just started), what is
shown grows but never shrinks (law 1): objects of the snapshot are added if unknown, changed objects that are published
(news from the source) are taken over, and nothing is deleted or set back on the word of a watcher that has not seen
all of its source. When the mirror is in sync again, the worker gets the difference.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import cast

import msgspec

from kube_router.ipc.channels import Channel, DeltaReceiver, SnapshotClient
from kube_router.ipc.codec import NO_VIEWS, View
from kube_router.ipc.messages import (
    Beacon,
    Delta,
    EndpointSlice,
    Key,
    Kind,
    Namespace,
    NetworkPolicy,
    Node,
    Pod,
    Projection,
    Service,
    Snapshot,
    SnapshotRequest,
    SourceState,
)

log = logging.getLogger(__name__)

Objects = dict[Key, Projection]
Change = tuple[Projection | None, Projection | None]
Changes = dict[Kind, dict[Key, Change]]
"""What differs, by kind and key: (old, new), never equal; old is None for a new object, new is None for one gone."""

ASK_FIRST_SECONDS, ASK_MOST_SECONDS = 0.25, 2.0
"""Spacing of snapshot requests: doubles while they are unanswered, and while every answer is followed by a new gap."""
ASK_RESET_SECONDS = 5.0
"""After so long without need of a request the spacing starts from the beginning."""
HELD_DELTAS = 2000
"""Deltas kept while a snapshot is awaited; beyond, the oldest are forgotten and the next gap shows."""
PAST_EPOCHS = 16

NOTHING_YET = SourceState(source="", degraded=("no word from the watcher yet",))


class Cluster:
    """The cluster at one moment: a frozen view.

    May be kept: later messages never change it, the replica copies a kind's table before the first change after a
    view was handed out (100 µs for 10,000 objects, once a batch). Objects are keyed by `Projection.key`.
    """

    __slots__ = ("_objects", "state")

    state: SourceState
    """How the source stands, as far as this worker's kinds are concerned."""

    def __init__(self, state: SourceState, objects: Mapping[Kind, Mapping[Key, Projection]]) -> None:
        self.state = state
        self._objects = {kind: MappingProxyType(of_kind) for kind, of_kind in objects.items()}

    def objects(self, kind: Kind) -> Mapping[Key, Projection]:
        """All objects of ``kind``; raises KeyError for a kind that the worker did not ask for."""
        return self._objects[kind]

    @property
    def nodes(self) -> Mapping[Key, Node]:
        """All nodes by name."""
        return cast("Mapping[Key, Node]", self._objects["nodes"])

    @property
    def pods(self) -> Mapping[Key, Pod]:
        """All pods by ``namespace/name``."""
        return cast("Mapping[Key, Pod]", self._objects["pods"])

    @property
    def services(self) -> Mapping[Key, Service]:
        """All services by ``namespace/name``."""
        return cast("Mapping[Key, Service]", self._objects["services"])

    @property
    def endpointslices(self) -> Mapping[Key, EndpointSlice]:
        """All endpoint slices by ``namespace/name``."""
        return cast("Mapping[Key, EndpointSlice]", self._objects["endpointslices"])

    @property
    def networkpolicies(self) -> Mapping[Key, NetworkPolicy]:
        """All network policies by ``namespace/name``."""
        return cast("Mapping[Key, NetworkPolicy]", self._objects["networkpolicies"])

    @property
    def namespaces(self) -> Mapping[Key, Namespace]:
        """All namespaces by name."""
        return cast("Mapping[Key, Namespace]", self._objects["namespaces"])


class Mirror:
    """What the watcher of one epoch has: its objects and how far its deltas were followed."""

    def __init__(self, snapshot: Snapshot, kinds: tuple[Kind, ...]) -> None:
        by_kind = {part.kind: part for part in snapshot.kinds}
        self.epoch = snapshot.epoch
        self.state = snapshot.state
        self.objects: dict[Kind, Objects] = {k: {item.key: item for item in by_kind[k].objects} for k in kinds}
        self.seqs: dict[Kind, int] = {k: by_kind[k].seq for k in kinds}


class ReplicaState:
    """The replica's logic. Messages may be lost, late or repeated; what is shown ends at what the publisher has."""

    def __init__(self, worker: str, kinds: Iterable[Kind]) -> None:
        self.worker = worker
        self.kinds: tuple[Kind, ...] = tuple(dict.fromkeys(kinds))
        self._mirror: Mirror | None = None
        self._shown: dict[Kind, Objects] = {kind: {} for kind in self.kinds}
        self._state = NOTHING_YET
        self._lent: set[Kind] = set()
        self._cluster: Cluster | None = None
        self._changes: Changes = {}
        self._waiting = True
        self._ask_at = float("-inf")
        self._ask_delay = ASK_FIRST_SECONDS
        self._past: deque[str] = deque(maxlen=PAST_EPOCHS)
        self._held: deque[Delta] = deque(maxlen=HELD_DELTAS)

    @property
    def usable(self) -> bool:
        """Whether there is something to act on: in sync, or stale (then only for adding and keeping)."""
        return self._state.in_sync or self._state.stale

    @property
    def cluster(self) -> Cluster:
        """The newest view; the same object until something changes."""
        if self._cluster is None:
            self._cluster = Cluster(self._state, self._shown)
            self._lent = set(self.kinds)
        return self._cluster

    def take_changes(self) -> Changes:
        """What differs from what was shown at the last call."""
        changes = {kind: by_key for kind, by_key in self._changes.items() if by_key}
        self._changes = {}
        return changes

    def request_due(self, now: float) -> SnapshotRequest | None:
        """The request to send now, if one is needed and due."""
        if not self._waiting or now < self._ask_at:
            return None
        if now > self._ask_at + ASK_RESET_SECONDS:
            self._ask_delay = ASK_FIRST_SECONDS
        self._ask_at = now + self._ask_delay
        self._ask_delay = min(self._ask_delay * 2, ASK_MOST_SECONDS)
        return SnapshotRequest(worker=self.worker, kinds=self.kinds)

    def wait(self, now: float) -> float:
        """Seconds until `request_due` has something to say; infinity when nothing is awaited."""
        return max(0.0, self._ask_at - now) if self._waiting else float("inf")

    def on_snapshot(self, snapshot: Snapshot) -> str | None:
        """Take a snapshot; returns why not, if it is of no use."""
        mirror = self._mirror
        if mirror is None or snapshot.epoch != mirror.epoch:
            if snapshot.epoch in self._past:
                return None  # a late answer of a watcher that is gone
        elif not self._waiting:
            return None  # a second answer
        missing = set(self.kinds) - {part.kind for part in snapshot.kinds}
        if missing:
            return f"the watcher does not watch {', '.join(sorted(missing))}"
        if mirror is not None and mirror.epoch == snapshot.epoch:
            seqs = {part.kind: part.seq for part in snapshot.kinds}
            if any(seqs[kind] < mirror.seqs[kind] for kind in self.kinds):
                return None  # the answer to an earlier request; the one that counts is still to come
        elif mirror is not None:
            self._past.append(mirror.epoch)
        self._mirror = Mirror(snapshot, self.kinds)
        self._waiting = False
        self._show_mirror(add_unknown=True)
        held, self._held = self._held, deque(maxlen=HELD_DELTAS)
        for delta in held:
            self.on_delta(delta)
        return None

    def on_delta(self, delta: Delta) -> None:
        """Take a delta: apply it, hold it while a snapshot is awaited, or ask for one when it shows a gap."""
        mirror = self._mirror
        if delta.kind not in self._shown or delta.epoch in self._past:
            return
        if self._waiting or mirror is None or delta.epoch != mirror.epoch:
            self._held.append(delta)
            self._waiting = True
            return
        expected = mirror.seqs[delta.kind] + 1
        if delta.seq < expected:
            return  # the snapshot was newer
        if delta.seq > expected:
            self._held.append(delta)
            self._waiting = True
            return
        mirror.seqs[delta.kind] = delta.seq
        self._apply(mirror, delta)

    def on_beacon(self, beacon: Beacon) -> None:
        """Take a beacon: it shows a lost last delta, a new watcher and how the source stands."""
        mirror = self._mirror
        if self._waiting or mirror is None or beacon.epoch in self._past:
            return
        if beacon.epoch != mirror.epoch:
            self._waiting = True
            return
        ahead = [beacon.seqs.get(kind, 0) - mirror.seqs[kind] for kind in self.kinds]
        if max(ahead, default=0) > 0:
            self._waiting = True
        elif min(ahead, default=0) == 0:  # an older one than the snapshot says nothing
            mirror.state = beacon.state
            self._show_mirror(add_unknown=False)

    def _apply(self, mirror: Mirror, delta: Delta) -> None:
        kind = delta.kind
        together = mirror.objects[kind] is self._shown[kind]
        if not together:
            _update(mirror.objects[kind], delta)
        shown = self._writable(kind)
        if together:
            mirror.objects[kind] = shown
        for item in delta.put:
            self._set(kind, shown, item.key, item)
        if together:
            for key in delta.gone:
                self._set(kind, shown, key, None)

    def _show_mirror(self, *, add_unknown: bool) -> None:
        """Let the worker see as much of the mirror as its state allows."""
        mirror = self._mirror
        assert mirror is not None
        in_sync = self._in_sync(mirror.state)
        for kind in self.kinds:
            objects = mirror.objects[kind]
            if in_sync and objects is not self._shown[kind]:
                self._replace(kind, objects)
            elif not in_sync and objects is self._shown[kind]:
                mirror.objects[kind] = dict(objects)  # in sync no more: from here on they may differ
            elif not in_sync and add_unknown:
                shown = self._writable(kind)
                for key, item in objects.items():
                    if key not in shown:
                        self._set(kind, shown, key, item)
        stale = not in_sync and (mirror.state.stale or self.usable)
        self._set_state(msgspec.structs.replace(mirror.state, in_sync=in_sync, stale=stale))

    def _in_sync(self, state: SourceState) -> bool:
        return state.in_sync or (bool(state.unlisted) and not set(state.unlisted) & set(self.kinds))

    def _replace(self, kind: Kind, objects: Objects) -> None:
        """Show ``objects``; an object that has not changed stays the same one."""
        shown = self._shown[kind]
        changes = self._changes.setdefault(kind, {})
        for key, old in shown.items():
            if (new := objects.get(key)) is None or new != old:
                _note(changes, key, old, new)
            else:
                objects[key] = old
        if not shown and not changes:
            changes.update({key: (None, new) for key, new in objects.items()})
        else:
            for key in objects.keys() - shown.keys():
                _note(changes, key, None, objects[key])
        self._shown[kind] = objects
        self._lent.discard(kind)
        self._cluster = None

    def _set(self, kind: Kind, shown: Objects, key: Key, new: Projection | None) -> None:
        old = shown.get(key)
        if old == new:
            return
        if new is None:
            del shown[key]
        else:
            shown[key] = new
        _note(self._changes.setdefault(kind, {}), key, old, new)
        self._cluster = None

    def _writable(self, kind: Kind) -> Objects:
        """The shown table of a kind, copied if a view of it has been handed out."""
        if kind in self._lent:
            self._shown[kind] = dict(self._shown[kind])
            self._lent.discard(kind)
        return self._shown[kind]

    def _set_state(self, state: SourceState) -> None:
        if state != self._state:
            self._state = state
            self._cluster = None


def _update(objects: Objects, delta: Delta) -> None:
    for item in delta.put:
        objects[item.key] = item
    for key in delta.gone:
        objects.pop(key, None)


def _note(changes: dict[Key, Change], key: Key, old: Projection | None, new: Projection | None) -> None:
    """Add one change to those not yet taken: the first old and the last new; what came back is no change."""
    first = changes[key][0] if key in changes else old
    if first == new:
        changes.pop(key, None)
    else:
        changes[key] = (first, new)


class Replica:
    """The cluster as one worker sees it, fed by the watcher's sockets. Not thread-safe; never blocks."""

    def __init__(
        self,
        worker: str,
        kinds: Iterable[Kind],
        directory: Path | str | None = None,
        views: Mapping[Kind, View] = NO_VIEWS,
    ) -> None:
        """Connect to the sockets in ``directory`` (default: the working directory), which need not exist yet.

        ``views`` say by kind what this worker keeps of an object. What a view leaves out costs no memory, and a change
        of nothing else is no change.
        """
        self._core = ReplicaState(worker, kinds)
        self._deltas = DeltaReceiver(self._core.kinds, directory)
        self._snapshots = SnapshotClient(directory)
        self._deltas.views = self._snapshots.views = views

    @property
    def sockets(self) -> tuple[Channel, ...]:
        """What to wait on: call `receive` when one is ready, and once before the first wait."""
        return self._deltas, self._snapshots

    @property
    def cluster(self) -> Cluster:
        """The newest view; empty before the first snapshot."""
        return self._core.cluster

    @property
    def usable(self) -> bool:
        """In sync, or stale: see `SourceState`. Never becomes false again."""
        return self._core.usable

    @property
    def dropped(self) -> int:
        """Messages that were none of ours, or of no use, since the start."""
        return self._deltas.dropped + self._snapshots.dropped

    def wait(self, now: float) -> float:
        """Seconds after which `receive` must be called even if no socket is ready; infinity when nothing is due."""
        return self._core.wait(now)

    def receive(self, now: float) -> Changes:
        """Take what has come, ask for a snapshot if one is needed; what differs from the last call.

        ``now`` is monotonic seconds. Empty as long as nothing has changed.
        """
        # Deltas first: those that a snapshot already holds are then known as such.
        for message in self._deltas.receive():
            if isinstance(message, Delta):
                self._core.on_delta(message)
            else:
                self._core.on_beacon(message)
        for snapshot in self._snapshots.receive():
            useless = self._core.on_snapshot(snapshot)
            if useless:
                self._snapshots.drop(useless)
        request = self._core.request_due(now)
        if request is not None:
            self._snapshots.ask(request)
        return self._core.take_changes()

    def close(self) -> None:
        """Close the sockets."""
        self._deltas.close()
        self._snapshots.close()
