"""What the proxy asks of a backend, and what a backend says of a sync; every backend keeps this contract.

Pure: a protocol and a frozen value. `sync` is the only way to write. It acts on the network namespace of the thread
that made the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kube_router.ipc.messages import Key
from kube_router.workers.model import Failure
from kube_router.workers.proxy.model import Changed, ProxyFrame, ServiceTable


class BackendError(Exception):
    """A backend cannot be made on this host; one line that says what it lacks."""


@dataclass(frozen=True, slots=True)
class Synced:
    """What one sync came to.

    ``writes``: what was changed in the kernel. ``failures``: what went wrong; the keys concerned stay to be done.
    ``unable``: Services that ask for what this backend cannot do, and what they get instead, now and as long as they
    ask. ``repaired``: a line for each thing that a foreign hand had changed, only from a sync that observed.
    ``counts``: by metric name without ``kube_router_``.
    """

    writes: int = 0
    failures: tuple[Failure, ...] = ()
    unable: Mapping[Key, tuple[str, ...]] = field(default_factory=dict)
    repaired: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)


class Backend(Protocol):
    """Holds the kernel to a `ServiceTable`. What it last applied it trusts until it is told to observe."""

    @property
    def name(self) -> str:
        """``ipvs`` or ``nftables``."""
        ...

    def sync(self, table: ServiceTable, changed: Changed, frame: ProxyFrame, *, observe: bool, hold: bool) -> Synced:
        """Bring the kernel to ``table`` and ``frame``; every error is in the result.

        ``changed``: what differs from the table of the last call; ``changed.everything`` compares all of it.
        ``observe``: read what the kernel holds instead of trusting what was last applied, and say what differed.
        ``hold`` (the cluster's state is stale): only add; nothing that exists is removed or rewritten.
        """
        ...

    def plan(self, table: ServiceTable, frame: ProxyFrame) -> tuple[str, ...]:
        """What a `sync` would write now, a printable line each; reads the kernel and writes nothing."""
        ...

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """Descriptors that tell of foreign changes; see `runtime.Controller.wakers`."""
        ...

    def close(self) -> None:
        """Release sockets; the kernel keeps everything."""
        ...
