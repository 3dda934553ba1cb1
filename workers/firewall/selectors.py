"""Label selectors: one canonical form, and what they match.

Pure. Semantics of ``k8s.io/apimachinery/pkg/labels`` (Requirement.Matches) for the four operators that the API has: a
missing key matches NotIn and DoesNotExist. ``matchLabels`` are In with one value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kube_router.ipc.messages import LabelSelector

IN, NOT_IN, EXISTS, DOES_NOT_EXIST = "In", "NotIn", "Exists", "DoesNotExist"


class Requirement(NamedTuple):
    """One condition on one label; ``values`` sorted, each once."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether labels meet it."""
        if self.operator == IN:
            return labels.get(self.key) in self.values
        if self.operator == NOT_IN:
            return self.key not in labels or labels[self.key] not in self.values
        return (self.key in labels) is (self.operator == EXISTS)


Selector = tuple[Requirement, ...]
"""All conditions, sorted, each once; equal selections are equal values. The empty one matches everything."""


def selector(api: LabelSelector) -> Selector:
    """The canonical form. Raises ValueError naming operator or key for what the API server would not have let in."""
    found = {Requirement(key, IN, (value,)) for key, value in api.match_labels.items()}
    for expression in api.match_expressions:
        values = tuple(sorted(set(expression.values)))
        if expression.operator in (IN, NOT_IN):
            if not values:
                raise ValueError(f"operator {expression.operator} on label {expression.key!r} has no values")
        elif expression.operator not in (EXISTS, DOES_NOT_EXIST):
            raise ValueError(f"operator {expression.operator!r} on label {expression.key!r} is not known")
        elif values:
            raise ValueError(f"operator {expression.operator} on label {expression.key!r} takes no values")
        found.add(Requirement(expression.key, expression.operator, values))
    return tuple(sorted(found))


def matches(conditions: Selector, labels: Mapping[str, str]) -> bool:
    """Whether labels meet all conditions."""
    return all(condition.matches(labels) for condition in conditions)
