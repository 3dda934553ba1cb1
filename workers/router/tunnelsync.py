"""The tunnel devices: names them, compares and applies, remembering what the kernel was last told.

Drives a tunnel driver (a parameter). A device is claimed by the first route that needs it and released by the last; it
is made before such a route is written (`make`) and removed when none leads through it any more (`sweep`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from kube_router.workers.delta import DeltaTracker
from kube_router.workers.kernel.tunnels import TunnelEvent, TunnelFailure
from kube_router.workers.router.repairs import Repairs
from kube_router.workers.router.tunnels import Overlay, choose_name, is_ours, plan_tunnels
from kube_router.workers.tunnelfacts import Tunnel, TunnelPlan


class Devices(Protocol):
    """What this module asks of a tunnel driver."""

    def observe(self) -> Mapping[str, Tunnel]: ...

    def apply(self, plan: TunnelPlan) -> tuple[TunnelFailure, ...]: ...


class TunnelSync:
    """The tunnels of one node."""

    def __init__(self, driver: Devices, repairs: Repairs | None = None) -> None:
        self._driver, self._repairs = driver, repairs or Repairs()
        self._lost: set[str] = set()
        """Wanted devices that were there and were not any more."""
        self._around: Overlay | None = None
        self._devices: DeltaTracker[str, Tunnel] = DeltaTracker()
        self._foreign: dict[str, Tunnel] = {}
        """Devices of our kinds that are not ours, or not yet."""
        self._kinds: Mapping[str, str] = {}
        self._names: dict[str, str] = {}
        self._holders: dict[str, str] = {}
        self.observed = False
        self._added = self._changed = self._removed = 0

    @property
    def synced(self) -> int:
        """The number of devices that are there and wanted."""
        return len(self._devices.desired.keys() & self._devices.actual.keys())

    @property
    def missing(self) -> frozenset[str]:
        """Devices that are wanted and not there."""
        return frozenset(self._devices.pending_updates().keys() - self._devices.actual.keys())

    def take_counts(self) -> tuple[int, int, int]:
        """Devices really made, changed and removed since the last call."""
        taken = self._added, self._changed, self._removed
        self._added = self._changed = self._removed = 0
        return taken

    def follow(self, around: Overlay | None) -> None:
        """Take another overlay; devices that are claimed get its parameters."""
        if around == self._around:
            return
        self._around = around
        for remote, name in self._names.items():
            self._want(name, remote)

    def observe(self, kinds: Mapping[str, str]) -> bool:
        """Read the devices; whether one that was believed to be there is not. ``kinds``: of all links, by name."""
        before = self._devices.actual.keys() - self._devices.pending_deletes().keys()
        self.observed = False
        found = self._driver.observe()
        seen = {name: self._around.seen(tunnel) if self._around else tunnel for name, tunnel in found.items()}
        ours = {name: tunnel for name, tunnel in seen.items() if name in self._holders or is_ours(name, tunnel)}
        self._devices.replace_actual(ours)
        self._foreign = {name: tunnel for name, tunnel in seen.items() if name not in ours}
        self._kinds = kinds
        self.observed = True
        self._lost |= (before - ours.keys()) & self._devices.desired.keys()
        return not before <= ours.keys()

    def claim(self, remote: str) -> str:
        """The name of the device to ``remote``, which is wanted from here on."""
        name = self._names.get(remote)
        if name is None:
            there = {**self._foreign, **self._devices.actual} if self._foreign else self._devices.actual
            name = self._names[remote] = choose_name(remote, there, self._kinds, self._holders)
            self._holders.setdefault(name, remote)
            if name in self._foreign:  # its name says that it is ours, and only its remote address does not
                self._devices.set_actual(name, self._foreign.pop(name))
            self._want(name, remote)
        return name

    def release(self, remote: str) -> None:
        """The device to ``remote`` is not wanted any more."""
        name = self._names.pop(remote, None)
        if name is not None and self._holders.get(name) == remote:
            del self._holders[name]
            self._devices.delete_desired(name)

    def _want(self, name: str, remote: str) -> None:
        tunnel = self._around.tunnel(remote) if self._around is not None else None
        if tunnel is not None and self._holders.get(name) == remote:
            self._devices.set_desired(name, tunnel)

    def make(self) -> tuple[TunnelFailure, ...]:
        """Add and change devices; what the kernel refused. Raises OSError, `Overflow`."""
        updates = self._devices.pending_updates()
        if not updates or not self.observed:
            return ()
        plan = plan_tunnels(self._devices.actual, updates, (), self._around)
        failures = self._apply(plan)
        refused = {failure.name for failure in failures}
        for name, tunnel in (*plan.change, *plan.add):
            if name in refused:
                self._devices.failed(name)
            elif name in updates:
                self._devices.applied(name)
            else:
                self._devices.set_actual(name, tunnel)
        self._added += sum(name not in refused for name, _ in plan.add)
        back = self._lost.intersection(name for name, _ in plan.add if name not in refused)
        self._lost -= back
        self._repairs.add("tunnel", *sorted(back))
        self._changed += sum(name not in refused for name, _ in plan.change)
        return failures

    def sweep(self, in_use: Callable[[], frozenset[str]]) -> tuple[TunnelFailure, ...]:
        """Remove devices of ours that nothing wants and no route leads through. Raises OSError, `Overflow`."""
        if not self.observed or not self._devices.pending_deletes():
            return ()
        used = in_use()
        unused = [name for name in self._devices.pending_deletes() if name not in used]
        failures = self._apply(TunnelPlan(delete=tuple(unused))) if unused else ()
        refused = {failure.name for failure in failures}
        for name in unused:
            if name in refused:
                self._devices.failed(name)
            else:
                self._devices.applied(name)
        self._removed += len(unused) - len(refused)
        return failures

    def _apply(self, plan: TunnelPlan) -> tuple[TunnelFailure, ...]:
        self.observed = False  # until it is known what got through
        failures = self._driver.apply(plan)
        self.observed = not failures  # a refusal may have its reason in something that is not known
        return failures

    def concerns(self, event: TunnelEvent) -> bool:
        """Whether a change of a device, by whoever, asks for a new look."""
        believed = self._devices.actual.get(event.name)
        if event.gone:
            return believed is not None
        if event.name in self._devices.desired:
            seen = self._around.seen(event.tunnel) if self._around else event.tunnel
            return seen != self._devices.desired[event.name]
        return believed is None and is_ours(event.name, event.tunnel)
