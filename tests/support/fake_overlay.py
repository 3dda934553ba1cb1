"""The overlay's part of the kernel in memory: tunnel devices, FoU ports and the pods' rules, and drivers on them.

It refuses what the kernel refuses. `support.tunnel_contract` holds it against the real one.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from support.fake_kernel import FakeKernel, FakeRoutes

from kube_router.workers.kernel.netlink import NetlinkError
from kube_router.workers.kernel.tunnels import TunnelFailure
from kube_router.workers.model import Family
from kube_router.workers.router.overlay import Drivers
from kube_router.workers.router.tunnels import is_our_host
from kube_router.workers.tunnelfacts import OVERLAY_TABLE, FouPort, PodRule, PodRulePlan, Tunnel, TunnelPlan

UNDERLAY_MTU = 1500
OVERHEAD = {Family.IPV4: 20, Family.IPV6: 40}


@dataclass
class FakeOverlay:
    """What a `FakeKernel` has of the overlay. ``modules``: what can be loaded or is."""

    kernel: FakeKernel
    tunnels: dict[str, Tunnel] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    """Kinds of links that are no tunnels, by name."""
    ports: set[FouPort] = field(default_factory=set)
    busy_ports: set[FouPort] = field(default_factory=set)
    """Ports that some program listens at."""
    rules: list[PodRule] = field(default_factory=list)
    modules: set[str] = field(default_factory=lambda: {"ipip", "ip6tnl", "fou"})

    def put(self, name: str, tunnel: Tunnel) -> None:
        """There is this device; routes over it stay, but for those of IPv4 when it is down."""
        self.tunnels[name] = tunnel
        self.kernel.devices[name] = tunnel.up
        if not tunnel.up:
            self.kernel.drop(name, only_ipv4=True)

    def remove(self, name: str) -> None:
        """The device goes, and the routes over it."""
        del self.tunnels[name], self.kernel.devices[name]
        self.kernel.drop(name)

    def add_rule(self, rule: PodRule) -> None:
        """A rule with a priority of the kernel's choice, before all others."""
        priority = min((each.priority for each in self.rules), default=32766) - 1
        self.rules.insert(0, rule._replace(priority=priority))

    def drivers(self, before: Callable[[], None] = lambda: None) -> Drivers:
        """Drivers on it; ``before`` is called before each single step."""
        return Drivers(
            FakeTunnels(self, before),
            FakeRoutes(self.kernel, OVERLAY_TABLE, is_our_host, before),
            FakePodRules(self, before),
            FakeFou(self, before),
            self.load,
        )

    def load(self, families: Iterable[Family]) -> str | None:
        """`load_fou`."""
        return None if "fou" in self.modules else "kernel module fou: not found"


class FakeTunnels:
    """`TunnelDriver` on a `FakeOverlay`."""

    def __init__(self, overlay: FakeOverlay, before: Callable[[], None] = lambda: None) -> None:
        self._overlay, self._before = overlay, before
        self.writes = 0

    def close(self) -> None:
        """As the driver's."""

    def observe(self) -> Mapping[str, Tunnel]:
        return dict(self._overlay.tunnels)

    def apply(self, plan: TunnelPlan) -> tuple[TunnelFailure, ...]:
        steps: list[tuple[str, str, Tunnel | None]] = [
            *(("receive", name, tunnel) for name, tunnel in plan.receivers),
            *(("change", name, tunnel) for name, tunnel in plan.change),
            *(("receive", name, None) for name, _ in plan.receivers),
            *(("add", name, tunnel) for name, tunnel in plan.add),
            *(("delete", name, None) for name in plan.delete),
        ]
        failures = []
        for verb, name, tunnel in steps:
            self._before()
            self.writes += 1
            number = self._delete(name) if tunnel is None else self._write(verb != "change", name, tunnel)
            if number and verb != "receive" and (verb, number) != ("delete", errno.ENODEV):
                failures.append(TunnelFailure(verb, name, tunnel, NetlinkError(number)))
        return tuple(failures)

    def _delete(self, name: str) -> int:
        if name not in self._overlay.tunnels:
            return errno.ENODEV
        self._overlay.remove(name)
        return 0

    def _write(self, new: bool, name: str, tunnel: Tunnel) -> int:
        there = self._overlay.tunnels.get(name)
        taken = there is not None or name in self._overlay.others
        if new and taken:
            return errno.EEXIST
        if not new and not taken:
            return errno.ENODEV
        if tunnel.kind not in self._overlay.modules or (not new and (there is None or there.kind != tunnel.kind)):
            return errno.EOPNOTSUPP
        if tunnel.port > 0 and "fou" not in self._overlay.modules:
            return errno.EINVAL
        ends = (tunnel.kind, tunnel.local, tunnel.remote, tunnel.link)
        if any((one.kind, *one[:2], one.link) == ends for each, one in self._overlay.tunnels.items() if each != name):
            return errno.EEXIST
        stays = there is not None and tunnel.family is Family.IPV4
        mtu = tunnel.mtu or (there.mtu if there is not None and stays else self._own_mtu(tunnel))
        # A TTL of its own sets "don't fragment".
        pmtudisc = tunnel.family is Family.IPV4 and (tunnel.pmtudisc or bool(tunnel.ttl))
        self._overlay.put(name, tunnel._replace(mtu=mtu, pmtudisc=pmtudisc))
        return 0

    def _own_mtu(self, tunnel: Tunnel) -> int:
        """What the kernel takes when no MTU is said."""
        return UNDERLAY_MTU - OVERHEAD[tunnel.family] - (12 if tunnel.port else 0) - (8 if tunnel.limit else 0)


class FakeFou:
    """`FouDriver` on a `FakeOverlay`."""

    def __init__(self, overlay: FakeOverlay, before: Callable[[], None] = lambda: None) -> None:
        self._overlay, self._before = overlay, before
        self.writes = 0

    def close(self) -> None:
        """As the driver's."""

    def available(self) -> bool:
        return "fou" in self._overlay.modules

    def observe(self) -> frozenset[FouPort]:
        return frozenset(self._overlay.ports)

    def open(self, ports: Iterable[FouPort]) -> dict[FouPort, NetlinkError]:
        failed = {}
        for port in ports:
            self._before()
            self.writes += 1
            if not self.available():
                failed[port] = NetlinkError(errno.ENOENT)
            elif port in self._overlay.busy_ports or port._replace(gue=False) in self._overlay.ports:
                failed[port] = NetlinkError(errno.EADDRINUSE)
            else:
                self._overlay.ports.add(port)
        return failed

    def shut(self, ports: Iterable[FouPort]) -> dict[FouPort, NetlinkError]:
        for port in ports:
            self._before()
            self.writes += 1
            self._overlay.ports.discard(port)
        return {}


class FakePodRules:
    """`PodRuleDriver` on a `FakeOverlay`."""

    def __init__(self, overlay: FakeOverlay, before: Callable[[], None] = lambda: None) -> None:
        self._overlay, self._before = overlay, before
        self.writes = 0

    def close(self) -> None:
        """As the driver's."""

    def observe(self) -> tuple[PodRule, ...]:
        return tuple(self._overlay.rules)

    def apply(self, plan: PodRulePlan) -> Mapping[PodRule, OSError]:
        for rule in plan.add:
            self._before()
            self.writes += 1
            self._overlay.add_rule(rule)
        for rule in plan.delete:
            self._before()
            self.writes += 1
            if rule in self._overlay.rules:
                self._overlay.rules.remove(rule)
        return {}
