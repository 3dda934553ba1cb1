"""Foreign changes to what the iptables backend wrote: heard of where the kernel tells, looked for where it does not.

Touches the kernel, by listening and cheap looks. nftables (and with it iptables-nft) tells of every change, with the
port id of its author, so that own writes are passed by. Legacy tables and ipsets tell nothing: once a second a few
words of the former and the number of members of the latter are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from kube_router.workers.firewall.removal import is_our_chain
from kube_router.workers.kernel.chains import BUILT_IN, TABLE, ChainDriver
from kube_router.workers.kernel.monitor import (
    Lost,
    NftAddition,
    NftListener,
    NftRemoval,
    Tick,
    legacy_table_mark,
    nft_generation,
)
from kube_router.workers.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket
from kube_router.workers.model import Family

Marks = dict[Family, bytes]


class IptablesWatch:
    """Descriptors to wait on, and what to do when they are ready."""

    def __init__(self, driver: ChainDriver, sets_differ: Callable[[], bool]) -> None:
        """``driver``: by whose programs we write; ``sets_differ``: the cheap look at the sets. Raises OSError."""
        self._writers, self._sets_differ = driver.writers, sets_differ
        self._legacy = driver.programs.backend == "legacy"
        with ExitStack() as opened:
            self._nft = NftListener(driver.writers, additions=True)
            opened.callback(self._nft.close)
            self._asking = NetlinkSocket(NETLINK_NETFILTER)
            opened.callback(self._asking.close)
            self._tick = Tick()
            opened.pop_all()
        self._marks: Marks | None = None
        self.families: tuple[Family, ...] = ()

    def close(self) -> None:
        """Stop listening."""
        self._nft.close()
        self._asking.close()
        self._tick.close()

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """See `runtime.Controller.wakers`."""
        return {self._nft.fileno(): self._on_nft, self._tick.fileno(): self._on_tick}

    def _on_nft(self) -> bool:
        # All of them are read before the writers are forgotten: a program's events are queued before it ends.
        concerned = [event for event in self._nft.events() if isinstance(event, Lost) or self._concerns(event)]
        self._writers.clear()
        return bool(concerned) and not self._legacy

    def _concerns(self, event: NftRemoval | NftAddition) -> bool:
        if event.family not in self.families or event.table != TABLE:
            return False
        return event.chain == "" or event.chain in BUILT_IN or is_our_chain(event.chain)

    def _on_tick(self) -> bool:
        return self._tick.elapsed() and (self._tables_differ() or self._sets_differ())

    def _tables_differ(self) -> bool:
        try:
            return self._marks is not None and self._read_marks() != self._marks
        except OSError:
            return True

    def _read_marks(self) -> Marks:
        return {family: legacy_table_mark(family, TABLE) for family in self.families} if self._legacy else {}

    def generation(self) -> int | None:
        """A number that is another one after every change of a rule by anybody; None: nobody counts the changes."""
        if self._legacy:
            return None
        try:
            return nft_generation(self._asking)
        except OSError:
            return None

    def reading(self) -> None:
        """The tables are about to be read: what changes from here on is a change. Raises OSError."""
        self._marks = self._read_marks()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What happens inside is our own doing; a change that was not read before it is not passed over."""
        before = self._read_marks()
        yield
        if self._legacy:
            self._writers.clear()  # legacy tables tell of nothing, so there is nothing to pass by
        if before == self._marks:
            self._marks = self._read_marks()
