"""Removal of what the router put into the kernel: ``--cleanup-config``, and nothing but ours.

Touches the kernel, through the drivers. Both families, whatever is enabled; both kinds of iptables, because the host
may have changed its kind since. In the reverse order of making: accepts, masquerading, sets; routes, and then the
overlay's devices, rules, ports and the name of its table. Every part fails alone.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from kube_router.workers.kernel.ipset import SetDriver, SetError
from kube_router.workers.kernel.iptables import IptablesError, RuleDriver, all_programs
from kube_router.workers.kernel.netlink import Overflow
from kube_router.workers.kernel.routes import RouteDriver, describe
from kube_router.workers.kernel.rttables import forget_table
from kube_router.workers.linkfacts import Links
from kube_router.workers.model import Failure, Family
from kube_router.workers.router.collected import Collected
from kube_router.workers.router.egress import FORWARD, POSTROUTING, plan_egress, plan_forward, set_specs
from kube_router.workers.router.graceful import FILE
from kube_router.workers.router.overlay import OverlaySync, kernel_drivers
from kube_router.workers.router.routes import plan_routes
from kube_router.workers.rulefacts import SetSpec
from kube_router.workers.settings import Settings

_WAITS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds between attempts to destroy a set that something still refers to."""


def cleanup(settings: Settings) -> list[Failure]:
    """Remove the egress rule in all its forms, the FORWARD accepts, the two sets, our routes, the overlay's objects
    and what is remembered of BGP peers.

    What went wrong is returned.
    """
    return [*_rules(), *_sets(), *_routes(), *_overlay(settings), *_memory(settings)]


def _memory(settings: Settings) -> list[Failure]:
    path = Path(settings.state_dir) / FILE
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return [Failure("state", f"{path}: {os.strerror(error.errno or 0)}")]
    return []


def _rules() -> list[Failure]:
    try:
        drivers = [RuleDriver(programs) for programs in all_programs()]
    except IptablesError as error:
        return [Failure("iptables", str(error))]
    failures = []
    for driver in drivers:
        for family in Family:
            try:
                driver.apply(plan_forward(family, driver.observe(family, *FORWARD), ()))
            except IptablesError as error:
                failures.append(Failure("forward-rules", f"{family}: {error}"))
            try:
                driver.apply(plan_egress(family, driver.observe(family, *POSTROUTING), None))
            except IptablesError as error:
                failures.append(Failure("pod-egress", f"{family}: {error}"))
    return failures


def _sets() -> list[Failure]:
    failures = []
    try:
        driver = SetDriver()
    except OSError as error:
        return [Failure("ipset", str(error))]
    for family in Family:
        for spec in set_specs(family):
            try:
                _destroy(driver, spec)
            except SetError as error:
                failures.append(Failure("ipset", str(error)))
    driver.close()
    return failures


def _destroy(driver: SetDriver, spec: SetSpec) -> None:
    """Destroy a set; nftables frees the rules that named it only some time after their removal."""
    for wait in _WAITS:
        try:
            driver.destroy(spec)
            return
        except SetError:
            time.sleep(wait)
    driver.destroy(spec)


def _routes() -> list[Failure]:
    try:
        driver = RouteDriver()
        actual = driver.observe()
        failed = driver.apply(plan_routes(actual, {}, actual.ours)).failures
    except (OSError, Overflow) as error:
        return [Failure("routes", f"the main table: {error}")]
    driver.close()
    return [Failure("routes", line) for line in describe(failed)]


def _overlay(settings: Settings) -> list[Failure]:
    """The worker's own steps towards an overlay that is off."""
    result = Collected()
    try:
        overlay = OverlaySync(msgspec.structs.replace(settings, enable_overlay=False), kernel_drivers())
    except OSError as error:
        return [Failure("tunnels", str(error))]
    overlay.look(None, (), Links(), True, result)
    overlay.make(False, result)
    overlay.sweep(frozenset, False, result)
    overlay.close()
    problem = forget_table()
    return [*result.failures, *([Failure("rt-tables", problem)] if problem else [])]
