"""Removal of what the firewall put into the kernel: all of it for ``--cleanup-config``, or what another backend left.

Touches the kernel: iptables of both kinds, ipsets, the two nftables tables, in both families. It needs no memory: what
is ours is told by its name (`removal.py`), also what Go kube-router made and forgets itself, KUBE-NWPLCY-TAIL and
kube-router-local-pods. Each place fails alone. A table goes in one transaction, jumps first, so no packet ever meets
half of it; sets go last, as rules refer to them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from kube_router.workers.firewall.names import NFT_TABLES
from kube_router.workers.firewall.removal import is_our_set, plan_removal
from kube_router.workers.kernel.ipset import SetDriver, SetError, SetReferenced
from kube_router.workers.kernel.iptables import Backend as Kind
from kube_router.workers.kernel.iptables import IptablesError, RuleDriver, all_programs
from kube_router.workers.kernel.netlink import Overflow
from kube_router.workers.kernel.nfttables import delete_table
from kube_router.workers.model import Failure, Family
from kube_router.workers.rulefacts import SetName
from kube_router.workers.settings import Settings

_WAITS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds between attempts to destroy a set: nftables frees the rules that named it some time after their removal."""


@dataclass(frozen=True, slots=True)
class Removed:
    """What went wrong, to be tried again, and what must stay, as others use it; a line each."""

    failures: tuple[Failure, ...] = ()
    kept: tuple[str, ...] = ()

    def __add__(self, other: Removed) -> Removed:
        return Removed(self.failures + other.failures, self.kept + other.kept)


def cleanup(settings: Settings) -> list[Failure]:
    """Remove everything of ours; what went wrong, and what stays because somebody else uses it."""
    removed = remove_iptables(()) + remove_sets(Family) + remove_nftables(Family)
    return [*removed.failures, *(Failure("iptables", line) for line in removed.kept)]


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What is ours on this host, but not of the backend that runs: of the other one, another kind or family.

    ``kind``: of the iptables that is the running backend; None when nftables is.
    """

    families: tuple[Family, ...]
    kind: Kind | None

    def remove(self) -> Removed:
        """Remove it; to be called once all of the backend's own stands."""
        others = tuple(family for family in Family if family not in self.families)
        if self.kind is None:
            return remove_iptables() + remove_sets(Family) + remove_nftables(others)
        own = tuple((self.kind, family) for family in self.families)
        return remove_iptables(own) + remove_sets(others) + remove_nftables(Family)


def remove_iptables(besides: Iterable[tuple[Kind, Family]] = ()) -> Removed:
    """Remove our chains and jumps from every filter table, but those of ``besides``."""
    spared, done = set(besides), Removed()
    try:
        drivers = [RuleDriver(programs) for programs in all_programs()]
    except IptablesError as error:
        return Removed(kept=(f"{error}; rules of an earlier iptables backend, if there are any, stay",))
    for driver in drivers:
        for family in Family:
            if (driver.programs.backend, family) in spared:
                continue
            try:
                removal = plan_removal(driver.save(family, "filter"))
                if removal.lines:
                    driver.restore(family, str(removal))
                done += Removed(kept=tuple(f"{driver.programs.name(family)}: {line}" for line in removal.kept))
            except IptablesError as error:
                done += Removed((Failure("iptables", str(error)),))
    return done


def remove_sets(families: Iterable[Family]) -> Removed:
    """Destroy our ipsets of some families."""
    wanted, failures = tuple(families), []
    try:
        driver = SetDriver()
    except OSError as error:
        return Removed((Failure("ipset", str(error)),))
    try:
        for name in sorted(driver.names(is_our_set)):
            if (Family.IPV6 if name.startswith("inet6:") else Family.IPV4) in wanted:
                failures += _destroy(driver, name)
    except SetError as error:
        failures.append(Failure("ipset", str(error)))
    finally:
        driver.close()
    return Removed(tuple(failures))


def _destroy(driver: SetDriver, name: SetName) -> list[Failure]:
    for wait in (*_WAITS, None):
        try:
            driver.remove(name)
        except SetReferenced as error:
            if wait is None:
                return [Failure("ipset", str(error))]
            time.sleep(wait)
        except SetError as error:
            return [Failure("ipset", str(error))]
        else:
            break
    return []


def remove_nftables(families: Iterable[Family]) -> Removed:
    """Delete our nftables tables of some families."""
    failures = []
    for family in families:
        try:
            delete_table(family, NFT_TABLES[family])
        except (OSError, Overflow, IptablesError) as error:
            failures.append(Failure("nftables", f"table {NFT_TABLES[family]}: {error}"))
    return Removed(tuple(failures))
