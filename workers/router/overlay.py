"""The overlay of one node: tunnel devices, the routes of table 77, the pods' rules and the UDP ports, kept together.

Touches the kernel, through the drivers only. `look` reads what may have changed, `make` puts in place what routes need,
before they are written, and `sweep` removes what none needs any more, after they are gone. Each part fails alone, and
direct routes depend on none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kube_router.workers.kernel.fou import FouDriver, load_fou
from kube_router.workers.kernel.iprules import PodRuleDriver
from kube_router.workers.kernel.monitor import RuleEvent
from kube_router.workers.kernel.netlink import Overflow
from kube_router.workers.kernel.routes import KernelRoute, RouteDriver, describe
from kube_router.workers.kernel.tunnels import TunnelDriver, TunnelEvent, TunnelFailure, describe_tunnels
from kube_router.workers.linkfacts import Links
from kube_router.workers.model import Failure, Family, IPNetwork
from kube_router.workers.routefacts import Route
from kube_router.workers.router import portsync, routetable, tunnelsync
from kube_router.workers.router.collected import Collected
from kube_router.workers.router.portsync import PortSync, keep_record
from kube_router.workers.router.repairs import Repairs
from kube_router.workers.router.routetable import RouteTable
from kube_router.workers.router.tunnels import Overlay, is_our_host, overlay_host, plan_rules, wanted_ports
from kube_router.workers.router.tunnelsync import TunnelSync
from kube_router.workers.settings import Settings
from kube_router.workers.tunnelfacts import OVERLAY_TABLE, PLAIN, PodRule, PodRulePlan


class Driver(Protocol):
    """What this module asks of every driver."""

    @property
    def writes(self) -> int: ...

    def close(self) -> None: ...


class Devices(Driver, tunnelsync.Devices, Protocol):
    """A tunnel driver."""


class Hosts(Driver, routetable.Routes, Protocol):
    """A driver of table 77."""


class Fou(Driver, portsync.Fou, Protocol):
    """A FoU driver."""


class Rules(Driver, Protocol):
    """A driver of the pods' rules."""

    def observe(self) -> tuple[PodRule, ...]: ...

    def apply(self, plan: PodRulePlan) -> Mapping[PodRule, OSError]: ...


@dataclass(frozen=True, slots=True)
class Drivers:
    """The four drivers, what loads modules and keeps the record of ports, and the port ids of their own writes."""

    tunnels: Devices
    hosts: Hosts
    rules: Rules
    fou: Fou
    load_fou: Callable[[Iterable[Family]], str | None]
    portids: frozenset[int] = frozenset()
    keep_record: Callable[[Path, bytes], None] = keep_record


def kernel_drivers() -> Drivers:
    """Drivers of the network namespace of the calling thread."""
    hosts, rules = RouteDriver(OVERLAY_TABLE, is_our_host), PodRuleDriver()
    portids = frozenset((hosts.portid, rules.portid))
    return Drivers(TunnelDriver(), hosts, rules, FouDriver(), load_fou, portids)


class OverlaySync:
    """The overlay of one node."""

    def __init__(self, settings: Settings, drivers: Drivers, repairs: Repairs | None = None) -> None:
        self._settings, self._drivers, self._repairs = settings, drivers, repairs or Repairs()
        self._tunnels = TunnelSync(drivers.tunnels, self._repairs)
        self._hosts = RouteTable(drivers.hosts, self._repairs)
        self._ports = PortSync(drivers.fou, settings.state_dir, drivers.load_fou, drivers.keep_record)
        self._around: Overlay | None = None
        self._rules: tuple[PodRule, ...] | None = None
        self._known_rules: tuple[PodRule, ...] = ()
        """The rules as they were read last, also after they have become doubtful."""
        self._pod_cidrs: tuple[IPNetwork, ...] = ()
        self._fresh = True

    @property
    def writes(self) -> int:
        """Requests by which this process asked the kernel for a change, so far."""
        return sum(driver.writes for driver in self._each())

    @property
    def missing(self) -> frozenset[str]:
        """Devices that routes need and that are not there: such routes must wait."""
        return self._tunnels.missing

    def close(self) -> None:
        """Release the sockets; the kernel keeps everything."""
        for driver in self._each():
            driver.close()

    def _each(self) -> tuple[Driver, ...]:
        return self._drivers.tunnels, self._drivers.hosts, self._drivers.rules, self._drivers.fou

    def look(
        self,
        around: Overlay | None,
        pod_cidrs: tuple[IPNetwork, ...],
        links: Links,
        observe: bool,
        result: Collected,
    ) -> bool:
        """Take the surroundings and read what may have changed; whether a device vanished, and its routes with it."""
        self._around, self._pod_cidrs = around, pod_cidrs
        self._tunnels.follow(around)
        self._fresh = observe
        if observe:
            self._rules = None
        if not observe and self._tunnels.observed:
            return False
        try:
            return self._tunnels.observe({link.name: link.kind for link in links.links})
        except (OSError, Overflow) as error:
            result.failures.append(Failure("tunnels", f"devices cannot be read: {_words(error)}"))
            return True

    def claim(self, remote: str) -> str:
        """The name of the device to ``remote``, which a route needs from here on."""
        name = self._tunnels.claim(remote)
        self._hosts.want(overlay_host(remote), Route("", name))
        return name

    def release(self, remote: str) -> None:
        """No route needs the device to ``remote`` any more."""
        self._tunnels.release(remote)
        self._hosts.want(overlay_host(remote), None)

    def make(self, hold_rules: bool, result: Collected) -> None:
        """Ports before the tunnels that send to such, tunnels before the routes over them; and the pods' rules.

        ``hold_rules``: no rule is removed.
        """
        self._guarded(PORTS, result, lambda: self._sync_ports(result))
        self._guarded(TUNNELS, result, lambda: _report(self._tunnels.make(), result))
        self._guarded(HOSTS, result, lambda: self._sync_hosts(True, self._fresh, result))
        self._guarded(RULES, result, lambda: self._sync_rules(hold_rules, result))

    def sweep(self, in_use: Callable[[], frozenset[str]], hold: bool, result: Collected) -> None:
        """Remove the routes of table 77 and the devices that nothing needs; ``hold``: not now."""
        if not hold:
            self._guarded(HOSTS, result, lambda: self._sync_hosts(False, False, result))
            self._guarded(TUNNELS, result, lambda: _report(self._tunnels.sweep(in_use), result))
        result.counts["host_tunnels_synced"] = self._tunnels.synced
        done = self._tunnels.take_counts()
        result.writes += sum(done)
        names = ("host_tunnels_added", "host_tunnels_changed", "host_tunnels_removed")
        result.counters |= dict(zip(names, map(float, done), strict=True))

    def _guarded(self, part: str, result: Collected, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, Overflow) as error:
            result.failures.append(Failure(part, _words(error)))

    def _sync_ports(self, result: Collected) -> None:
        wanted = wanted_ports(self._settings)
        needed = self._around is not None and self._around.port != PLAIN
        writes, failures, warnings = self._ports.sync(wanted, needed=needed, observe=self._fresh)
        result.writes += writes
        result.failures += failures
        result.warnings += warnings

    def _sync_hosts(self, hold: bool, observe: bool, result: Collected) -> None:
        applied = self._hosts.sync(observe=observe, hold_deletions=hold, without=self._tunnels.missing)
        result.writes += applied.added + applied.removed
        result.failures += [Failure(HOSTS, f"table {OVERLAY_TABLE}: {line}") for line in describe(applied.failures)]
        if not hold and (yielded := self._hosts.yielded):
            result.warnings.append(f"table {OVERLAY_TABLE} has another route for {', '.join(yielded[:3])}; it stays")

    def _sync_rules(self, hold: bool, result: Collected) -> None:
        if self._rules is None:
            self._rules = self._drivers.rules.observe()
        wanted = self._pod_cidrs if self._around is not None else ()
        plan = plan_rules(self._rules, wanted, self._pod_cidrs, hold=hold)
        if not plan:
            self._known_rules = self._rules
            return
        self._rules = None
        refused = self._drivers.rules.apply(plan)
        result.writes += len(plan) - len(refused)
        result.failures += [Failure(RULES, f"rule {rule}: {error.strerror}") for rule, error in refused.items()]
        back = [rule for rule in plan.add if rule in self._known_rules and rule not in refused]
        self._repairs.add("pod-rule", *map(str, back))
        if not refused:
            self._rules = self._known_rules = self._drivers.rules.observe()

    def tunnel_matters(self, event: TunnelEvent) -> bool:
        """Whether a change of a tunnel device asks for a new look."""
        return self._tunnels.concerns(event)

    def host_matters(self, route: KernelRoute, gone: bool) -> bool:
        """Whether a foreign change of table 77 asks for a new look."""
        return self._hosts.concerns(route, gone)

    def rule_matters(self, event: RuleEvent) -> bool:
        """Whether a foreign change of a pods' rule asks for a new look."""
        ours = event.rule.protocol == 17 or event.rule.source in map(str, self._pod_cidrs)
        return ours and (self._rules is None or event.gone == (event.rule in self._rules))

    def ports_differ(self) -> bool:
        """Whether a port is closed that should be open."""
        return self._ports.differs()


TUNNELS, HOSTS, RULES, PORTS = "tunnels", "overlay-routes", "overlay-rules", "overlay-ports"
"""Phases of failures."""


def _report(failures: tuple[TunnelFailure, ...], result: Collected) -> None:
    result.failures += [Failure(TUNNELS, line) for line in describe_tunnels(failures)]


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
