"""The nftables backend: a table a family, in the network namespace of the thread that made it.

Touches the kernel, through `kernel.nftbatch`. Each family fails alone. Whether anybody changed anything since all was
right is one number (`TableDriver.generation`): while it stands, an observing sync reads nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable, Mapping

from kube_router.ipc.messages import Key
from kube_router.workers.kernel.monitor import TableListener
from kube_router.workers.kernel.nftbatch import TableDriver
from kube_router.workers.kernel.nftsocket import NftError
from kube_router.workers.model import Failure, Family
from kube_router.workers.proxy.backend import BackendError, Synced
from kube_router.workers.proxy.model import Changed, ProxyFrame, ServiceTable
from kube_router.workers.proxy.names import NFT_TABLES
from kube_router.workers.proxy.nftsync import TableResult, TableSync
from kube_router.workers.proxy.stale import forget_connections

PHASE = "nftables"
_PACK = {
    Family.IPV4: functools.partial(socket.inet_pton, socket.AF_INET),
    Family.IPV6: functools.partial(socket.inet_pton, socket.AF_INET6),
}


class Nftables:
    """A `Backend`."""

    name = "nftables"

    def __init__(self) -> None:
        """Raises `BackendError` on a kernel without nfnetlink."""
        self._tables: dict[Family, TableSync] = {}
        self._generation: int | None = None
        with contextlib.ExitStack() as opened:
            try:
                self._driver = TableDriver()
                opened.callback(self._driver.close)
                self._listener = TableListener({*NFT_TABLES.items()}, (self._driver.portid,))
            except OSError as error:
                raise BackendError(f"nftables: {error.strerror or error}") from error
            opened.pop_all()

    def close(self) -> None:
        """Release the sockets; the kernel keeps everything."""
        self._listener.close()
        self._driver.close()

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """The listener for what others do to our tables; our own changes do not reach it."""
        return {self._listener.fileno(): self._listener.drain}

    def sync(self, table: ServiceTable, changed: Changed, frame: ProxyFrame, *, observe: bool, hold: bool) -> Synced:
        """See `Backend.sync`."""
        failures: list[Failure] = []
        results: dict[Family, TableResult] = {}
        try:
            before = self._driver.generation()
        except NftError as error:
            return Synced(failures=(Failure(PHASE, str(error)),))
        unchanged = before == self._generation
        self._generation = None
        for family in frame.families:
            try:
                results[family] = self._table(family).sync(
                    table, changed, frame, observe=observe, unchanged=unchanged, hold=hold
                )
            except NftError as error:
                failures.append(Failure(PHASE, f"{family}: {error}"))
        if not failures and not hold and (unchanged or all(result.looked for result in results.values())):
            after = before + sum(result.commits for result in results.values())
            self._generation = self._driver.stands_at(after)
        left = [way for result in results.values() for way in result.left]
        return Synced(
            writes=sum(result.writes for result in results.values()),
            failures=(*failures, *forget_connections(left)),
            unable=self._unable(),
            repaired=tuple(line for result in results.values() for line in result.repaired),
            counts={"service_frontends": sum(self._table(family).frontends for family in frame.families)},
        )

    def plan(self, table: ServiceTable, frame: ProxyFrame) -> tuple[str, ...]:
        """See `Backend.plan`. Raises `NftError`."""
        lines: list[str] = []
        for family in frame.families:
            lines += TableSync(family, self._driver, _PACK[family]).plan(table, frame)
        return tuple(lines)

    def _table(self, family: Family) -> TableSync:
        if family not in self._tables:
            self._tables[family] = TableSync(family, self._driver, _PACK[family])
        return self._tables[family]

    def _unable(self) -> dict[Key, tuple[str, ...]]:
        found: dict[Key, dict[str, None]] = {}
        for table in self._tables.values():
            for key, line in table.unable:
                found.setdefault(key, {})[line] = None
        return {key: tuple(sorted(lines)) for key, lines in found.items()}
