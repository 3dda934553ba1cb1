"""The overlay's contract on a real kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from support.namespaces import Namespace, namespaces
from support.tunnel_contract import TunnelContract, family
from support.vm import modprobe

from kube_router.workers.kernel.links import LinkDriver
from kube_router.workers.kernel.routes import RouteDriver
from kube_router.workers.routefacts import RoutePlan
from kube_router.workers.router.overlay import Drivers, kernel_drivers
from kube_router.workers.tunnelfacts import FouPort, PodRulePlan, TunnelPlan

__all__ = ["family"]


@dataclass
class KernelHost:
    """A network namespace with one link."""

    namespace: Namespace
    drivers: Drivers
    routes: RouteDriver
    link: int

    def set_down(self, device: str) -> None:
        self.namespace.run(f"ip link set {device} down")

    def remove(self, device: str) -> None:
        self.namespace.run(f"ip link delete {device}")

    def dummy(self, name: str) -> None:
        self.namespace.run(f"ip link add {name} type veth peer name {name}p")

    def boot_route(self, prefix: str, device: str) -> None:
        self.namespace.run(f"ip route add {prefix} dev {device} table 77")

    def foreign_rule(self, source: str) -> None:
        self.namespace.run(f"ip {'-6' if ':' in source else '-4'} rule add from {source} lookup 77")

    def direct_port(self, port: FouPort) -> None:
        self.namespace.run(f"ip {'-6' if port.family == 6 else '-4'} fou add port {port.port} ipproto 4")

    def empty(self) -> None:
        """As at the beginning, without starting a process, which takes long here."""
        drivers, devices = self.drivers, self.drivers.tunnels.observe()
        drivers.tunnels.apply(TunnelPlan(delete=tuple(name for name, tunnel in devices.items() if tunnel.local)))
        LinkDriver().delete("tun-d")
        drivers.fou.shut(drivers.fou.observe())
        drivers.rules.apply(PodRulePlan(delete=drivers.rules.observe()))
        self.routes.apply(RoutePlan(delete=tuple(self.routes.observe().ours)))


class TestKernel(TunnelContract):
    """In a namespace of the virtual machine."""

    @pytest.fixture(scope="class")
    def machine(self) -> Iterator[KernelHost]:
        modprobe("ipip", "ip6_tunnel", "fou", "fou6")
        with namespaces() as (namespace,), namespace.enter():
            namespace.run(
                "ip link add eth0 type veth peer name far; ip link set far up;"
                "ip link set eth0 addrgenmode none; ip address add 10.0.0.1/24 dev eth0;"
                "ip address add fd00::1/64 dev eth0 nodad; ip link set eth0 up; ip route add default dev eth0;"
                "ip -6 route add default dev eth0"
            )
            link = int(namespace.run("cat /sys/class/net/eth0/ifindex"))
            made = KernelHost(namespace, kernel_drivers(), RouteDriver(), link)
            yield made
            made.routes.close()
            for driver in (made.drivers.tunnels, made.drivers.hosts, made.drivers.rules, made.drivers.fou):
                driver.close()

    @pytest.fixture
    def host(self, machine: KernelHost) -> Iterator[KernelHost]:
        yield machine
        machine.empty()
