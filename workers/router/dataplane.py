"""The router's dataplane: injected routes, egress sets and rules, and what keeps them in place.

Touches the kernel, through the drivers only. Each part (links, routes, sets, rules, the last two by family) fails
alone. The kernel is listed at start, at the periodic check, after a failure, and for just the part that a listener
reports as changed by somebody else (`foreign.py`); otherwise one change costs what it changes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kube_router.workers.kernel.ipset import SetDriver, SetError
from kube_router.workers.kernel.iptables import IptablesError, Programs, RuleDriver, find_programs
from kube_router.workers.kernel.links import LinkDriver
from kube_router.workers.kernel.monitor import legacy_table_mark
from kube_router.workers.kernel.netlink import Overflow
from kube_router.workers.kernel.routes import RouteDriver
from kube_router.workers.linkfacts import LOOPBACK, Link, Links
from kube_router.workers.model import Failure, Family, Outcome
from kube_router.workers.nodefacts import NodeFacts
from kube_router.workers.router.cleanup import cleanup
from kube_router.workers.router.collected import Collected
from kube_router.workers.router.egress import FORWARD, POSTROUTING
from kube_router.workers.router.foreign import ForeignChanges, Suspects
from kube_router.workers.router.leaving import Leaving
from kube_router.workers.router.overlay import Drivers as OverlayDrivers
from kube_router.workers.router.overlay import OverlaySync, kernel_drivers
from kube_router.workers.router.repairs import Repairs
from kube_router.workers.router.routes import Decision, Surroundings, surroundings
from kube_router.workers.router.routesync import RouteSync
from kube_router.workers.router.rulesync import RuleSync, SetSync
from kube_router.workers.router.tunnels import other_addresses
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Drivers:
    """What makes the drivers that write; another making is for those who only want to know what would be written."""

    routes: Callable[[], RouteDriver] = RouteDriver
    sets: Callable[[], SetDriver] = SetDriver
    rules: Callable[[Programs], RuleDriver] = RuleDriver
    overlay: Callable[[], OverlayDrivers] = kernel_drivers


KERNEL = Drivers()


class Dataplane:
    """The kernel half of the router worker; acts on the network namespace of the thread that creates it."""

    def __init__(
        self, settings: Settings, clock: Callable[[], float] = time.monotonic, *, drivers: Drivers = KERNEL
    ) -> None:
        self._settings, self._clock, self._drivers = settings, clock, drivers
        self._link_driver, self._route_driver, self._set_driver = LinkDriver(), drivers.routes(), drivers.sets()
        self._rule_driver: RuleDriver | None = None
        self._rule_sync: RuleSync | None = None
        overlay = drivers.overlay()
        self._repairs = Repairs()
        self._overlay = OverlaySync(settings, overlay, self._repairs)
        self._route_sync = RouteSync(self._route_driver, self._overlay, self._repairs)
        self._set_sync = SetSync(self._set_driver, self._repairs)
        self._foreign = ForeignChanges(
            {self._route_driver.portid, *overlay.portids},
            self._route_sync.concerns,
            self._overlay,
            self._sets_differ,
            self._rules_differ,
        )
        self._links = Links()
        self._own: NodeFacts | None = None
        self._around = Surroundings()
        self._others: tuple[tuple[NodeFacts, ...], frozenset[str]] = ((), frozenset())
        self._node_interfaces: dict[Family, str] = {}
        self._sets_done: tuple[tuple[NodeFacts, ...], bool] | None = None
        self._without_sets: frozenset[Family] = frozenset()
        self._legacy_marks: dict[tuple[Family, str], bytes] = {}
        self._leaving = Leaving(settings.families, clock)

    @property
    def writes(self) -> int:
        """Requests and rules by which this process asked the kernel for a change, so far."""
        rules = self._rule_driver.writes if self._rule_driver else 0
        return self._route_driver.writes + self._set_driver.writes + self._overlay.writes + rules

    @property
    def decisions(self) -> Mapping[str, Decision]:
        """What became of each learned prefix; a live view."""
        return self._route_sync.decisions

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """For the worker's loop: see `Controller.wakers`."""
        return self._foreign.wakers()

    def close(self) -> None:
        """Release the sockets; the kernel keeps everything."""
        self._foreign.close()
        for driver in (self._link_driver, self._route_driver, self._set_driver, self._overlay):
            driver.close()

    def reconcile(
        self,
        own: NodeFacts,
        nodes: Sequence[NodeFacts],
        learned: Mapping[str, str],
        changed: frozenset[str] | None,
        trigger: Trigger,
        hold_deletions: bool,
        hold_routes: bool = False,
    ) -> Outcome:
        """Bring the kernel to what nodes and learned routes (prefix → next hop) ask for.

        ``changed``: the prefixes that differ from the last call, None for "compare all". ``hold_deletions``: nothing
        is removed on the word of this state (a stale snapshot). ``hold_routes``: no route is removed (a BGP daemon that
        is still learning knows nothing about the sets, which come from the Nodes).
        """
        if trigger.start or trigger.period or trigger.retry:
            self._foreign.suspect_all()
        suspects = self._foreign.take()
        result = Collected()
        everybody = tuple(nodes)
        self._sync_links(own, suspects, result)
        self._sync_sets(everybody, suspects, hold_deletions, result)
        self._sync_rules(suspects, hold_deletions, result)
        gone = self._overlay.look(self._around.overlay, own.pod_cidrs, self._links, suspects.overlay, result)
        suspects.routes = suspects.routes or gone
        self._route_sync.decide(learned, changed, self._around, self._other_addresses(own, everybody))
        self._overlay.make(hold_deletions, result)
        self._sync_routes(suspects, hold_deletions or hold_routes, result)
        if self._rule_driver is not None and not hold_deletions and not result.failures:
            result.writes += self._leaving.sync(self._rule_driver, self._set_driver)
        result.warnings += self._leaving.warnings
        counters, lines = self._repairs.take()
        result.counters |= counters
        for line in lines:
            log.warning("%s", line)
        return result.outcome()

    def _sync_links(self, own: NodeFacts, suspects: Suspects, result: Collected) -> None:
        """Read the links when they may have changed; a failure keeps the last known ones."""
        if suspects.links or own != self._own:
            try:
                self._links = self._link_driver.observe()
            except (OSError, Overflow) as error:
                result.failures.append(Failure("links", f"links and addresses cannot be read: {words(error)}"))
            self._own = own
            self._around = surroundings(own, self._links, self._settings)
            self._node_interfaces = node_interfaces(own, self._links, self._settings.families)
            carriers = own_links(own, self._links)
            self._foreign.follow({link.index: link for link in carriers}, frozenset(own.addresses))
            # IPv4 routes vanish with their link or its address, without an event of their own.
            suspects.routes = suspects.routes or suspects.links
        for family in self._settings.families:
            address = own.address(family)
            if address is not None and self._links.link_of(address) is None:
                result.warnings.append(f"node {own.name}: its {family} address {address} is on no link of this host")

    def _sync_sets(
        self, nodes: tuple[NodeFacts, ...], suspects: Suspects, hold_deletions: bool, result: Collected
    ) -> None:
        # Node facts stay the same objects while their nodes do not change: this comparison is mostly by identity.
        if not suspects.sets and self._sets_done == (nodes, hold_deletions):
            return
        began = self._clock()
        writes, failures = self._set_sync.sync(
            self._settings.families, nodes, observe=suspects.sets, hold_deletions=hold_deletions
        )
        self._sets_done = None if failures else (nodes, hold_deletions)
        self._without_sets = frozenset(failures)
        result.writes += writes
        result.failures += failures.values()
        result.observations["controller_routes_sync_time"] = (self._clock() - began,)

    def _sync_rules(self, suspects: Suspects, hold_deletions: bool, result: Collected) -> None:
        try:
            if self._rule_driver is None or self._rule_sync is None:
                self._rule_driver = self._drivers.rules(find_programs())
                self._rule_sync = RuleSync(self._rule_driver, self._repairs)
        except IptablesError as error:
            result.failures.append(Failure("iptables", str(error)))
            return
        result.warnings += self._rule_driver.programs.warnings
        if suspects.rules:
            # Taken before reading: what changes meanwhile is seen at the next tick (and so are own writes, once).
            self._legacy_marks = self._marks()
        writes, failures = self._rule_sync.sync(
            self._settings.families,
            self._node_interfaces,
            self._settings.enable_pod_egress,
            without_sets=self._without_sets,
            observe=suspects.rules,
            hold_deletions=hold_deletions,
        )
        result.writes += writes
        result.failures += failures

    def _other_addresses(self, own: NodeFacts, nodes: tuple[NodeFacts, ...]) -> frozenset[str]:
        # Node facts stay the same objects while their nodes do not change: this comparison is mostly by identity.
        if self._others[0] != nodes:
            self._others = (nodes, other_addresses(own, nodes))
        return self._others[1]

    def _sync_routes(self, suspects: Suspects, hold_deletions: bool, result: Collected) -> None:
        began = self._clock()
        try:
            done = self._route_sync.apply(
                observe=suspects.routes, hold_deletions=hold_deletions, without=self._overlay.missing
            )
        except (OSError, Overflow) as error:
            result.failures.append(Failure("routes", f"the main table: {words(error)}"))
            return
        self._overlay.sweep(self._route_sync.devices, hold_deletions, result)
        result.observations["host_routes_sync_time"] = (self._clock() - began,)
        result.writes += done.added + done.removed
        result.failures += done.failures
        result.warnings += done.warnings
        result.counts |= {"host_routes_synced": done.synced, "host_routes_not_injected": done.not_injected}
        result.counters |= {"host_routes_added": done.added, "host_routes_removed": done.removed}

    def _sets_differ(self) -> bool:
        """Whether one of the sets is gone or holds another number of members than it was given."""
        try:
            return any(
                self._set_driver.count(spec) != len(members) for spec, members in self._set_sync.believed.items()
            )
        except SetError:
            return True

    def _rules_differ(self) -> bool:
        """Whether a legacy table is not as it was when it was last read; nft sends events instead."""
        try:
            return self._marks() != self._legacy_marks
        except OSError:
            return True

    def _marks(self) -> dict[tuple[Family, str], bytes]:
        if self._rule_driver is None or self._rule_driver.programs.backend != "legacy":
            return {}
        return {
            (family, table): legacy_table_mark(family, table)
            for family in self._settings.families
            for table, _ in (FORWARD, POSTROUTING)
        }


def own_links(own: NodeFacts, links: Links) -> tuple[Link, ...]:
    """The links that carry the node's own addresses."""
    found = (links.link_of(address) for address in own.addresses)
    return tuple({link.index: link for link in found if link is not None}.values())


def node_interfaces(own: NodeFacts, links: Links, families: tuple[Family, ...]) -> dict[Family, str]:
    """The link with the node's address of each family, else with its primary address; loopback is none."""
    names: dict[Family, str] = {}
    for family in families:
        for address in (own.address(family), own.primary):
            link = links.link_of(address) if address is not None else None
            if link is not None and link.kind != LOOPBACK:
                names.setdefault(family, link.name)
    return names


def words(error: Exception) -> str:
    """What an error says, in one line."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


__all__ = ["Dataplane", "cleanup", "node_interfaces", "own_links"]
