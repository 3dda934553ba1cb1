"""The overlay's contract on the kernel in memory; `tests/vm` holds it against a real one."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from support.fake_kernel import METRIC, FakeKernel, FakeRoutes, TableEntry
from support.fake_overlay import FakeOverlay
from support.tunnel_contract import TunnelContract, family

from kube_router.workers.routefacts import Prefix
from kube_router.workers.router.overlay import Drivers
from kube_router.workers.tunnelfacts import FouPort, PodRule

__all__ = ["family"]


@dataclass
class FakeHost:
    """The kernel in memory, with what a foreign hand can do to it."""

    overlay: FakeOverlay
    link: int = 2
    drivers: Drivers = field(init=False)
    routes: FakeRoutes = field(init=False)

    def __post_init__(self) -> None:
        self.drivers, self.routes = self.overlay.drivers(), FakeRoutes(self.overlay.kernel)

    def set_down(self, device: str) -> None:
        self.overlay.put(device, self.overlay.tunnels[device]._replace(up=False))

    def remove(self, device: str) -> None:
        self.overlay.remove(device)

    def dummy(self, name: str) -> None:
        self.overlay.others[name] = "veth"

    def boot_route(self, prefix: str, device: str) -> None:
        metric = METRIC[6 if ":" in prefix else 4]
        self.overlay.kernel.overlay_table.append(TableEntry(Prefix(prefix), metric, 3, "", device))

    def foreign_rule(self, source: str) -> None:
        self.overlay.add_rule(PodRule(source, 0))

    def direct_port(self, port: FouPort) -> None:
        self.overlay.ports.add(port._replace(gue=False))


class TestFake(TunnelContract):
    """On the kernel in memory."""

    @pytest.fixture
    def host(self) -> FakeHost:
        kernel = FakeKernel()
        kernel.connect("10.0.0.0/24", "10.0.0.1")
        kernel.connect("fd00::/64", "fd00::1")
        return FakeHost(FakeOverlay(kernel))
