"""Which selectors take a set of labels, without asking each of them.

Pure. A selector that asks for a value of a label (operator In) stands under that value; the others stand aside and are
asked one by one. So a look-up costs one table access a label and a check of what came up.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from kube_router.workers.firewall.selectors import IN, Requirement, Selector, matches

T = TypeVar("T", bound=Hashable)


class SelectorIndex(Generic[T]):
    """Items by the selector that each was added with."""

    __slots__ = ("_by_label", "_others")

    def __init__(self) -> None:
        self._by_label: dict[tuple[str, str], dict[T, Selector]] = {}
        """Under (label, value): the items, each with the conditions that are left to check."""
        self._others: dict[T, Selector] = {}

    def __bool__(self) -> bool:
        return bool(self._by_label or self._others)

    def add(self, conditions: Selector, item: T) -> None:
        """Let ``item`` be found by labels that meet ``conditions``; one item has one selector."""
        asked = _narrowest(conditions)
        if asked is None:
            self._others[item] = conditions
            return
        left = tuple(condition for condition in conditions if condition is not asked)
        for value in asked.values:
            self._by_label.setdefault((asked.key, value), {})[item] = left

    def remove(self, conditions: Selector, item: T) -> None:
        """Take ``item`` out; ``conditions`` are those that it was added with."""
        asked = _narrowest(conditions)
        if asked is None:
            del self._others[item]
            return
        for value in asked.values:
            under = self._by_label[asked.key, value]
            del under[item]
            if not under:
                del self._by_label[asked.key, value]

    def matching(self, labels: Mapping[str, str]) -> list[T]:
        """The items whose selector takes ``labels``, each once."""
        found = []
        for label in labels.items():
            under = self._by_label.get(label)
            if under:
                found += [item for item, left in under.items() if not left or matches(left, labels)]
        found += [item for item, conditions in self._others.items() if not conditions or matches(conditions, labels)]
        return found


def _narrowest(conditions: Selector) -> Requirement | None:
    """The condition that fewest pods are likely to meet: the In with the fewest values, the first of equals."""
    asked = [condition for condition in conditions if condition.operator == IN]
    return min(asked, key=lambda condition: len(condition.values)) if asked else None
