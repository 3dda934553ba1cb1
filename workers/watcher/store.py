"""The objects that the watcher holds, and the steps that lead from one state to the next.

Pure: projections in, `Step`s out. It is the `Store` that `ipc.channels.Publisher` serves snapshots from. What did not
change in its projection makes no step, however often the API object changed (a kubelet's status updates reach no one).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kube_router.ipc.messages import Key, Kind, Projection, SourceState


@dataclass(frozen=True, slots=True)
class Step:
    """One change of one kind, in the order of the calls that made it."""

    kind: Kind
    put: tuple[Projection, ...]
    gone: tuple[Key, ...]


class Store:
    """Current objects by kind and key, and how the source stands.

    ``listed``: kinds that the source has confirmed completely.
    """

    def __init__(self, kinds: Iterable[Kind], state: SourceState) -> None:
        self._objects: dict[Kind, dict[Key, Projection]] = {kind: {} for kind in kinds}
        self.listed: set[Kind] = set()
        self.state = state

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds held, whether listed yet or not."""
        return tuple(self._objects)

    @property
    def complete(self) -> bool:
        """Whether every kind has been listed."""
        return len(self.listed) == len(self._objects)

    def objects(self, kind: Kind) -> Mapping[Key, Projection]:
        """The objects of a kind; a live view. Raises KeyError for a kind that is not watched."""
        return self._objects[kind]

    def seed(self, kind: Kind, objects: Iterable[Projection]) -> Step | None:
        """Put objects of an earlier run, without counting the kind as listed. Nothing is deleted."""
        return self.apply(kind, objects, ())

    def replace(self, kind: Kind, objects: Iterable[Projection]) -> Step | None:
        """Make ``objects`` all there is of a kind, and the kind listed. The step holds the difference only."""
        after = {item.key: item for item in objects}
        gone = [key for key in self._objects[kind] if key not in after]
        step = self.apply(kind, after.values(), gone)
        self.listed.add(kind)
        return step

    def apply(self, kind: Kind, put: Iterable[Projection], gone: Iterable[Key]) -> Step | None:
        """Put and delete single objects; None when that changes nothing. A key in both ends as put."""
        held = self._objects[kind]
        changed = {item.key: item for item in put}
        removed = tuple(key for key in dict.fromkeys(gone) if key in held and key not in changed)
        changed = {key: item for key, item in changed.items() if held.get(key) != item}
        if not changed and not removed:
            return None
        for key in removed:
            del held[key]
        held.update(changed)
        return Step(kind, tuple(changed.values()), removed)
