"""What is wanted, what is believed to be there, and what therefore waits to be written, key by key.

Pure: no I/O. The driver applies `pending_updates` and `pending_deletes` and says how each went; the kernel is not
listed again to find that out. Every call costs O(1) a key, so that one change is O(change) however much stands.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class DeltaTracker(Generic[K, V]):
    """Desired, believed actual and pending values by key. Values are compared with ``==`` and must not be mutated.

    A key is *pending* while its desired and its believed actual value differ, and after `failed` until `applied` or an
    observation: a step that failed may have done its work, half of it or none.
    """

    __slots__ = ("_actual", "_deletes", "_desired", "_uncertain", "_updates")

    def __init__(self) -> None:
        self._desired: dict[K, V] = {}
        self._actual: dict[K, V] = {}
        self._uncertain: dict[K, V] = {}
        self._updates: dict[K, V] = {}
        self._deletes: dict[K, V] = {}

    @property
    def desired(self) -> Mapping[K, V]:
        """What is wanted: a live, read-only view."""
        return MappingProxyType(self._desired)

    @property
    def actual(self) -> Mapping[K, V]:
        """What is believed to be there: a live, read-only view."""
        return MappingProxyType(self._actual)

    @property
    def pending(self) -> int:
        """The number of keys that wait."""
        return len(self._updates) + len(self._deletes)

    def set_desired(self, key: K, value: V) -> None:
        """Want ``value`` at ``key``."""
        self._desired[key] = value
        self._settle(key)

    def delete_desired(self, key: K) -> None:
        """Want nothing at ``key``; no error when nothing was wanted."""
        self._desired.pop(key, None)
        self._settle(key)

    def replace_desired(self, desired: Mapping[K, V]) -> None:
        """Want exactly ``desired``. O(all)."""
        before, self._desired = self._desired, dict(desired)
        for key in before.keys() | desired.keys():
            self._settle(key)

    def set_actual(self, key: K, value: V) -> None:
        """``value`` was seen at ``key``."""
        self._actual[key] = value
        self._uncertain.pop(key, None)
        self._settle(key)

    def delete_actual(self, key: K) -> None:
        """Nothing was seen at ``key``."""
        self._actual.pop(key, None)
        self._uncertain.pop(key, None)
        self._settle(key)

    def replace_actual(self, actual: Mapping[K, V]) -> None:
        """Exactly ``actual`` was seen: a complete listing. O(all)."""
        before, self._actual = self._actual, dict(actual)
        uncertain, self._uncertain = self._uncertain, {}
        for key in before.keys() | actual.keys() | uncertain.keys():
            self._settle(key)

    def pending_updates(self) -> dict[K, V]:
        """Key and desired value of what must be written; a copy, in the order in which it came to wait."""
        return dict(self._updates)

    def pending_deletes(self) -> dict[K, V]:
        """Key and believed value of what must go; a copy, in the order in which it came to wait.

        After a failure the value is the last one attempted, and the key may turn out not to be there.
        """
        return dict(self._deletes)

    def applied(self, key: K) -> None:
        """The step for ``key`` succeeded: what was wanted is there now, or what was not is gone.

        Call it before the desired state changes again.
        """
        self._uncertain.pop(key, None)
        if key in self._desired:
            self._actual[key] = self._desired[key]
        else:
            self._actual.pop(key, None)
        self._settle(key)

    def failed(self, key: K) -> None:
        """The step for ``key`` failed: it is pending, whatever becomes desired, until `applied` or an observation."""
        if key in self._desired:
            self._uncertain[key] = self._desired[key]
        elif key in self._actual:
            self._uncertain[key] = self._actual[key]
        self._settle(key)

    def _settle(self, key: K) -> None:
        uncertain = key in self._uncertain
        if key in self._desired:
            self._deletes.pop(key, None)
            value = self._desired[key]
            if uncertain or key not in self._actual or self._actual[key] != value:
                self._updates[key] = value
            else:
                self._updates.pop(key, None)
            return
        self._updates.pop(key, None)
        if uncertain:
            self._deletes[key] = self._uncertain[key]
        elif key in self._actual:
            self._deletes[key] = self._actual[key]
        else:
            self._deletes.pop(key, None)
