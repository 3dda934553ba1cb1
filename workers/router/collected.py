"""What the parts of one reconciliation of the dataplane report, gathered.

Pure: a value that is filled and then frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kube_router.workers.model import Failure, Outcome


@dataclass(slots=True)
class Collected:
    """What the parts of one reconciliation report, until it becomes an `Outcome`."""

    writes: int = 0
    failures: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    observations: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def outcome(self) -> Outcome:
        """The frozen result."""
        return Outcome(
            writes=self.writes,
            failures=tuple(self.failures),
            warnings=tuple(self.warnings),
            counts=self.counts,
            counters=self.counters,
            observations=self.observations,
        )
