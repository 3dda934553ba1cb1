"""Who allocates: the rules of a Lease, as Kubernetes' own clients follow them.

Pure: records and times in, what to do out. Clocks of different nodes are never compared: a Lease is free when nobody
has renewed it for its duration *as seen from here*, however its times read (client-go, tools/leaderelection).

The holder counts as one only until `RENEW_SECONDS` after its last renewal *began*; what it sends before that ends
before `LEASE_SECONDS` are over (`WRITE_SECONDS`), which is when somebody else may begin. So two never write.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

LEASE_SECONDS = 15.0
RENEW_SECONDS = 10.0
RETRY_SECONDS = 2.0
WRITE_SECONDS = 4.0
"""A write that has no answer after so long is given up. `RENEW_SECONDS` and this stay below `LEASE_SECONDS`."""


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """The fields of a ``coordination.k8s.io/v1`` Lease that count. ``version`` is its resourceVersion."""

    holder: str
    duration: float
    acquired: str
    renewed: str
    transitions: int
    version: str


class Move(Enum):
    """What to do with the Lease now."""

    CREATE = "create"
    TAKE = "take"
    RENEW = "renew"
    WAIT = "wait"


class Election:
    """One candidate. Times are monotonic seconds."""

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.record: LeaseRecord | None = None
        self._changed_at = float("-inf")
        self._renewed_at = float("-inf")

    def observe(self, record: LeaseRecord | None, now: float) -> None:
        """The Lease was read; None: there is none."""
        if record != self.record:
            self.record, self._changed_at = record, now

    def move(self, now: float) -> Move:
        """What to do, after an `observe`."""
        record = self.record
        if record is None:
            return Move.CREATE
        if record.holder == self.identity:
            return Move.RENEW if self.leads(now) else Move.TAKE
        if not record.holder or now >= self._changed_at + max(record.duration, 1.0):
            return Move.TAKE
        return Move.WAIT

    def succeeded(self, record: LeaseRecord, began: float) -> None:
        """The Lease is ours by a write that began at ``began``."""
        self.record, self._changed_at, self._renewed_at = record, began, began

    def resign(self) -> None:
        """Not the holder any more, whatever the Lease says."""
        self._renewed_at = float("-inf")

    def leads(self, now: float) -> bool:
        """Whether this candidate may write now."""
        record = self.record
        return record is not None and record.holder == self.identity and now < self._renewed_at + RENEW_SECONDS
