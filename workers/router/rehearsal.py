"""Drivers that read the kernel and only write down what they are asked to change in it.

Touches the kernel, for reading. With them the dataplane goes through a whole sync, in its own order and with its own
decisions, and the kernel stays as it is: what a sync would do, and not what somebody says that it would do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kube_router.workers.kernel.fou import FouDriver
from kube_router.workers.kernel.iprules import PodRuleDriver
from kube_router.workers.kernel.ipset import SetDriver
from kube_router.workers.kernel.iptables import Programs, RuleDriver
from kube_router.workers.kernel.netlink import NetlinkError
from kube_router.workers.kernel.routes import AppliedRoutes, RouteDriver
from kube_router.workers.kernel.tunnels import TunnelDriver, TunnelFailure
from kube_router.workers.routefacts import RoutePlan
from kube_router.workers.router.dataplane import Drivers
from kube_router.workers.router.overlay import Drivers as OverlayDrivers
from kube_router.workers.router.tunnels import is_our_host
from kube_router.workers.rulefacts import RulePlan, SetPlan, SetSpec
from kube_router.workers.tunnelfacts import OVERLAY_TABLE, FouPort, PodRule, PodRulePlan, TunnelPlan


@dataclass
class Script:
    """The steps that drivers were asked for, a printable line each."""

    lines: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Take the steps of a plan."""
        self.lines += text.splitlines()

    def drivers(self) -> Drivers:
        """Drivers of the calling thread's network namespace that write into this script."""
        return Drivers(
            lambda: _Routes(self), lambda: _Sets(self), lambda programs: _Rules(self, programs), self._overlay_drivers
        )

    def _overlay_drivers(self) -> OverlayDrivers:
        return OverlayDrivers(
            tunnels=_Tunnels(self),
            hosts=_Routes(self, f" table {OVERLAY_TABLE}", OVERLAY_TABLE, is_our_host),
            rules=_PodRules(self),
            fou=_Fou(self),
            load_fou=lambda families: None,
            keep_record=lambda path, data: None,
        )


class _Routes(RouteDriver):
    def __init__(self, script: Script, where: str = "", *which: Any) -> None:
        super().__init__(*which)
        self._script, self._where = script, where

    def apply(self, plan: RoutePlan) -> AppliedRoutes:
        self._script.add("\n".join(f"{line}{self._where}" for line in str(plan).splitlines()))
        return AppliedRoutes(len(plan.add) + len(plan.replace), len(plan.delete) + len(plan.strays))


class _Tunnels(TunnelDriver):
    def __init__(self, script: Script) -> None:
        super().__init__()
        self._script = script

    def apply(self, plan: TunnelPlan) -> tuple[TunnelFailure, ...]:
        self._script.add(str(plan))
        return ()


class _PodRules(PodRuleDriver):
    def __init__(self, script: Script) -> None:
        super().__init__()
        self._script = script

    def apply(self, plan: PodRulePlan) -> dict[PodRule, NetlinkError]:
        self._script.add(str(plan))
        return {}


class _Fou(FouDriver):
    def __init__(self, script: Script) -> None:
        super().__init__()
        self._script = script

    def open(self, ports: Iterable[FouPort]) -> dict[FouPort, NetlinkError]:
        self._script.add("\n".join(f"open UDP {port}" for port in ports))
        return {}

    def shut(self, ports: Iterable[FouPort]) -> dict[FouPort, NetlinkError]:
        self._script.add("\n".join(f"close UDP {port}" for port in ports))
        return {}


class _Sets(SetDriver):
    def __init__(self, script: Script) -> None:
        super().__init__()
        self._script = script

    def apply(self, plan: SetPlan) -> None:
        self._script.add("\n".join(f"ipset {line}" for line in str(plan).splitlines()))

    def destroy(self, spec: SetSpec) -> bool:
        exists = self.count(spec) is not None
        if exists:
            self._script.add(f"ipset destroy {spec.name}")
        return exists


class _Rules(RuleDriver):
    __slots__ = ("_script",)

    def __init__(self, script: Script, programs: Programs) -> None:
        super().__init__(programs)
        self._script = script

    def apply(self, plan: RulePlan) -> None:
        program = self.programs.name(plan.family)
        self._script.add("\n".join(f"{program} -t {plan.table} {step}" for step in plan.steps))
