"""A node's routes and overlay on the kernel in memory: the router's own modules, turned by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_interface

import msgspec
from support.fake_kernel import FakeKernel, FakeRoutes, TableEntry
from support.fake_overlay import FakeOverlay

from kube_router.ipc.messages import Node, NodeAddress
from kube_router.workers.linkfacts import Link, Links
from kube_router.workers.model import Failure, Family
from kube_router.workers.nodefacts import NodeFacts, node_facts
from kube_router.workers.router.collected import Collected
from kube_router.workers.router.overlay import OverlaySync
from kube_router.workers.router.routes import surroundings
from kube_router.workers.router.routesync import RouteSync
from kube_router.workers.router.tunnels import other_addresses
from kube_router.workers.settings import Settings
from kube_router.workers.tunnelfacts import Tunnel

OWN = ("10.0.0.1", "fd00::1")
OWN_CIDRS = ("10.244.1.0/24", "fd00:244:1::/64")


def node(name: str, addresses: tuple[str, ...], pod_cidrs: tuple[str, ...] = ()) -> NodeFacts:
    """Facts of a node."""
    entries = tuple(NodeAddress("InternalIP", address) for address in addresses)
    return node_facts(Node(name=name, addresses=entries, pod_cidrs=pod_cidrs), tuple(Family))


def links(*addresses: str, mtu: int = 1500, kind: str = "") -> Links:
    """One link, number 2, with these addresses (``10.0.0.1/24``)."""
    return Links((Link(2, "eth0", kind=kind, mtu=mtu, up=True, addresses=tuple(map(ip_interface, addresses))),))


def new_kernel() -> FakeOverlay:
    """A node with 10.0.0.1/24 and fd00::1/64 on a link."""
    kernel = FakeKernel()
    kernel.connect("10.0.0.0/24", OWN[0])
    kernel.connect("fd00::/64", OWN[1])
    return FakeOverlay(kernel)


@dataclass
class FakeNode:
    """Node n1. ``others``: addresses of other nodes by name; ``learned``: prefix to next hop.

    ``start`` is a start of the worker: all that it remembers is gone, the kernel stays.
    """

    overlay: FakeOverlay
    state_dir: str
    settings: Settings = field(default_factory=lambda: Settings(enable_ipv6=True))
    others: dict[str, tuple[str, ...]] = field(default_factory=dict)
    learned: dict[str, str] = field(default_factory=dict)
    links: Links = field(default_factory=lambda: links("10.0.0.1/24", "fd00::1/64"))
    before: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.start()

    def start(self, **changed: object) -> None:
        """The worker starts, with these settings changed."""
        self.settings = msgspec.structs.replace(self.settings, state_dir=self.state_dir, **changed)
        drivers = self.overlay.drivers(self._step)
        self.sync = OverlaySync(self.settings, drivers)
        self.driver = FakeRoutes(self.overlay.kernel, before=self._step)
        self.routes = RouteSync(self.driver, self.sync)
        self._fresh = True

    def _step(self) -> None:
        self.before()

    @property
    def writes(self) -> int:
        """Steps since the start of the worker."""
        return self.sync.writes + self.driver.writes

    def reconcile(
        self,
        changed: frozenset[str] | None = None,
        *,
        observe: bool = False,
        look: bool = False,
        hold: bool = False,
    ) -> Collected:
        """What the dataplane does with routes and overlay; ``look``: as `observe`, at the overlay only."""
        result, observe = Collected(), observe or self._fresh
        self._fresh = False
        own = node("n1", OWN, OWN_CIDRS)
        nodes = [own, *(node(name, addresses) for name, addresses in self.others.items())]
        around = surroundings(own, self.links, self.settings)
        gone = self.sync.look(around.overlay, own.pod_cidrs, self.links, observe or look, result)
        self.routes.decide(self.learned, changed, around, other_addresses(own, nodes))
        self.sync.make(hold, result)
        done = self.routes.apply(observe=observe or gone, hold_deletions=hold, without=self.sync.missing)
        result.failures += done.failures
        result.warnings += done.warnings
        self.sync.sweep(self.routes.devices, hold, result)
        return result

    def settle(self) -> list[Failure]:
        """Reconcile as the loop does after failures: again, with a fresh look; the failures that stay."""
        failures = self.reconcile(observe=True).failures
        for _ in range(3):
            failures = self.reconcile(observe=True).failures if failures else []
        return failures

    @property
    def devices(self) -> Mapping[str, Tunnel]:
        """The tunnel devices that are there."""
        return self.overlay.tunnels

    def ours(self, table: int = 254) -> dict[str, TableEntry]:
        """The routes of protocol 17."""
        entries = self.overlay.kernel.table if table == 254 else self.overlay.kernel.overlay_table
        return {entry.prefix: entry for entry in entries if entry.protocol == 17}
