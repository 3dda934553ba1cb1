"""The nftables backend: a table a family, in the network namespace of the thread that made it.

Touches the kernel, through `kernel.nft` (structure) and `kernel.nftelements` (members). Each family
fails alone. Whether anybody changed anything since all was right is one number (`ElementDriver.generation`): while it
stands, an observing sync reads nothing else.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping

from kube_router.ipc.messages import Key
from kube_router.workers.firewall import names
from kube_router.workers.firewall.backend import BackendError, Synced
from kube_router.workers.firewall.nftsync import TableResult, TableSync
from kube_router.workers.firewall.rules import Changed, Frame, Ruleset
from kube_router.workers.kernel.monitor import TableListener
from kube_router.workers.kernel.nft import Nft
from kube_router.workers.kernel.nftelements import ElementDriver
from kube_router.workers.kernel.nftsocket import NftError
from kube_router.workers.model import Failure, Family

PHASE = "nftables"


class Nftables:
    """A `Backend`."""

    name = "nftables"

    def __init__(self) -> None:
        """Raises `BackendError` on a kernel without nfnetlink."""
        self._tables: dict[Family, TableSync] = {}
        self._generation: int | None = None
        with contextlib.ExitStack() as opened:
            try:
                self._nft = Nft()
                opened.callback(self._nft.close)
                self._elements = ElementDriver()
                opened.callback(self._elements.close)
                own = (self._nft.portid, self._elements.portid)
                self._listener = TableListener({*names.NFT_TABLES.items()}, own)
            except OSError as error:
                raise BackendError(f"nftables: {error.strerror or error}") from error
            opened.pop_all()

    def close(self) -> None:
        """Release the sockets; the kernel keeps everything."""
        for driver in (self._listener, self._elements, self._nft):
            driver.close()

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """The listener for what others do to our tables; our own changes do not reach it."""
        return {self._listener.fileno(): self._listener.drain}

    def sync(self, ruleset: Ruleset, changed: Changed, frame: Frame, *, observe: bool, hold: bool) -> Synced:
        """See `Backend.sync`."""
        began = time.monotonic()
        failures: list[Failure] = []
        results: dict[Family, TableResult] = {}
        try:
            before = self._elements.generation()
        except NftError as error:
            return Synced(failures=(Failure(PHASE, str(error)),))
        unchanged = before == self._generation
        self._generation = None
        for family in frame.families:
            try:
                results[family] = self._table(family).sync(
                    ruleset, changed, frame, observe=observe, unchanged=unchanged, hold=hold
                )
            except NftError as error:
                failures.append(Failure(PHASE, f"{family}: {error}"))
        if not failures and not hold and (unchanged or all(result.looked for result in results.values())):
            after = before + sum(result.commits for result in results.values())
            self._generation = self._elements.stands_at(after)
        return self._report(ruleset, frame, results, failures, time.monotonic() - began)

    def _table(self, family: Family) -> TableSync:
        if family not in self._tables:
            self._tables[family] = TableSync(family, self._nft, self._elements)
        return self._tables[family]

    def _report(
        self,
        ruleset: Ruleset,
        frame: Frame,
        results: Mapping[Family, TableResult],
        failures: list[Failure],
        seconds: float,
    ) -> Synced:
        tables = [self._table(family) for family in frame.families]
        failed: dict[Key, str] = {}
        for table in tables:
            for key, reason in table.failed(ruleset).items():
                failed[key] = f"{failed[key]}; {reason}" if key in failed else reason
        return Synced(
            writes=sum(result.writes for result in results.values()),
            failures=tuple(failures),
            failed=failed,
            repaired=tuple(line for result in results.values() for line in result.repaired),
            warnings=tuple(line for table in tables for line in table.replaced()),
            counts={
                "controller_policy_chains": sum(table.policy_chains for table in tables),
                "controller_policy_ipsets": sum(len(table.believed.sets) for table in tables),
            },
            observations={
                "controller_iptables_sync_time": (seconds,),
                "controller_policy_chains_sync_time": (seconds,),
            },
        )

    def plan(self, ruleset: Ruleset, frame: Frame) -> tuple[str, ...]:
        """See `Backend.plan`; in nftables' words. Raises `NftError`."""
        lines: list[str] = []
        for family in frame.families:
            # Another table of the same: what this one believes stays as it is.
            twin = TableSync(family, self._nft, self._elements, self._table(family).refused)
            lines += twin.plan(ruleset, frame)
        return tuple(lines)
