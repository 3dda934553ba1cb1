"""A family that is switched off: what an earlier run of the router wrote for it goes, once, after a clean sync.

Drives a rule driver and a set driver (parameters). Routes need no care here: those that nothing asks for go in both
families. On a host without that family there is nothing to find, and that it cannot be read is no failure.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from kube_router.workers.kernel.ipset import SetError
from kube_router.workers.kernel.iptables import IptablesError
from kube_router.workers.model import Family
from kube_router.workers.router.egress import FORWARD, POSTROUTING, plan_egress, plan_forward, set_specs
from kube_router.workers.router.rulesync import Rules
from kube_router.workers.rulefacts import SetSpec

log = logging.getLogger(__name__)

AGAIN_SECONDS = 60.0
_WAITS = (0.01, 0.05, 0.1)
"""Seconds between attempts to destroy a set: nftables frees the rules that named it only some time after them."""


class Destroyer(Protocol):
    """What this module asks of a set driver."""

    def destroy(self, spec: SetSpec) -> bool: ...


class Leaving:
    """The families that are off and not known to be clean yet."""

    def __init__(self, enabled: Iterable[Family], clock: Callable[[], float]) -> None:
        self._families = set(Family).difference(enabled)
        self._clock = clock
        self._at = clock()
        self.warnings: tuple[str, ...] = ()
        """What could not be removed."""

    def sync(self, rules: Rules, sets: Destroyer) -> int:
        """Remove what is left of them, unless that was tried lately; rules and sets removed."""
        if not self._families or self._clock() < self._at:
            return 0
        writes, warnings = 0, []
        for family in sorted(self._families):
            try:
                writes += _leave(family, rules, sets)
                self._families.discard(family)
            except IptablesError as error:
                log.debug("%s, which is off: %s", family, error)
            except SetError as error:
                warnings.append(f"{family} is off, and a set of it stays: {error}")
        self.warnings, self._at = tuple(warnings), self._clock() + AGAIN_SECONDS
        return writes


def _leave(family: Family, rules: Rules, sets: Destroyer) -> int:
    """Accepts, masquerading, then the sets that it names; returns the writes. Raises IptablesError and SetError."""
    plans = (
        plan_forward(family, rules.observe(family, *FORWARD), ()),
        plan_egress(family, rules.observe(family, *POSTROUTING), None),
    )
    for plan in plans:
        rules.apply(plan)
    writes = sum(map(len, plans))
    return writes + sum(_destroy(sets, spec) for spec in set_specs(family))


def _destroy(sets: Destroyer, spec: SetSpec) -> bool:
    for wait in _WAITS:
        try:
            return sets.destroy(spec)
        except SetError:
            time.sleep(wait)
    return sets.destroy(spec)
