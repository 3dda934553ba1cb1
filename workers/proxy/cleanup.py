"""Removal of what the proxy put into the kernel: all of it for ``--cleanup-config``, or what another family left.

Touches the kernel: the two nftables tables. Each goes in one transaction. Established connections go on: what is
tracked stays translated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kube_router.workers.kernel.netlink import Overflow
from kube_router.workers.kernel.nfttables import delete_table
from kube_router.workers.model import Failure, Family
from kube_router.workers.proxy.names import NFT_TABLES
from kube_router.workers.settings import Settings


def cleanup(settings: Settings) -> list[Failure]:
    """Remove everything of ours; what went wrong."""
    return list(remove_nftables(Family))


def remove_nftables(families: Iterable[Family]) -> tuple[Failure, ...]:
    """Delete our nftables tables of some families."""
    failures = []
    for family in families:
        try:
            delete_table(family, NFT_TABLES[family])
        except (OSError, Overflow) as error:
            failures.append(Failure("nftables", f"table {NFT_TABLES[family]}: {error}"))
    return tuple(failures)


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What is ours on this host, but not of the families that run."""

    families: tuple[Family, ...]

    def remove(self) -> tuple[Failure, ...]:
        """Remove it; to be called once all of the backend's own stands."""
        return remove_nftables(family for family in Family if family not in self.families)
