"""What the firewall asks of a backend, and what a backend says of a sync; both backends keep this contract.

Pure: a protocol and a frozen value. `sync` is the only way to write. It acts on the network namespace of the thread
that made the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kube_router.ipc.messages import Key
from kube_router.workers.firewall.rules import Changed, Frame, Ruleset
from kube_router.workers.model import Failure


class BackendError(Exception):
    """A backend cannot be made on this host; one line that says what it lacks."""


@dataclass(frozen=True, slots=True)
class Synced:
    """What one sync came to.

    ``writes``: members, chains, rules and sets that were changed. ``failed``: policies of which a part could not be
    programmed, and why; that part allows nothing, so their pods are closed to it. ``failures``: all else, what concerns
    more than single policies; such a failure makes the worker unhealthy in the end, a failed policy never does, as no
    restart would mend it. Both hold what is wrong now, also if an earlier sync found it. ``repaired``: a line for each
    thing that a foreign hand had changed, only from a sync that observed. ``counts`` and ``observations`` (seconds) are
    by metric name without ``kube_router_``.
    """

    writes: int = 0
    failures: tuple[Failure, ...] = ()
    failed: Mapping[Key, str] = field(default_factory=dict)
    repaired: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    observations: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


class Backend(Protocol):
    """Holds the kernel to a `Ruleset`. What it last applied it trusts until it is told to observe."""

    @property
    def name(self) -> str:
        """``iptables`` or ``nftables``."""
        ...

    def sync(self, ruleset: Ruleset, changed: Changed, frame: Frame, *, observe: bool, hold: bool) -> Synced:
        """Bring the kernel to ``ruleset`` and ``frame``; every error is in the result.

        ``changed``: what differs from the ruleset of the last call; ``changed.everything`` compares all of it.
        ``observe``: read what the kernel holds instead of trusting what was last applied, and say what differed.
        ``hold`` (the cluster's state is stale): only add; nothing that exists is removed or rewritten.
        """
        ...

    def plan(self, ruleset: Ruleset, frame: Frame) -> tuple[str, ...]:
        """What a `sync` would write now, a printable line each; reads the kernel and writes nothing."""
        ...

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """Descriptors that tell of foreign changes; see `runtime.Controller.wakers`."""
        ...

    def close(self) -> None:
        """Release sockets and processes; the kernel keeps everything."""
        ...
