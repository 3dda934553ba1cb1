"""One family's nftables table: what it should hold, what it holds, and the difference.

Touches the kernel, through the driver that it is given. Of what was programmed only frontends and their endpoints are
kept, the same objects as in the table of Services; elements are made of them again when they are compared. So a change
costs the elements of its own frontends, before and after, and what differs is written.

A look compares the kernel with what this process programmed, or, in a process without memory, with what it would: the
difference is written, and then changes are taken as ever. After an error nothing is believed, and the next sync looks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from kube_router.ipc.messages import Key
from kube_router.workers.kernel.nftbatch import Batch, Standing
from kube_router.workers.kernel.nftsocket import NftError
from kube_router.workers.model import Family
from kube_router.workers.nfttypes import Element, ElementData, SetShape
from kube_router.workers.proxy import nftelements as made
from kube_router.workers.proxy import nftlayout as layout
from kube_router.workers.proxy.model import Changed, Frontend, ProxyFrame, ServiceTable
from kube_router.workers.proxy.names import NFT_TABLES
from kube_router.workers.proxy.nftdiff import Difference, Left, departed, differences
from kube_router.workers.proxy.nftelements import Pack, Programmed
from kube_router.workers.proxy.nftlayout import Layout, Made, WordedChain

PORTION = 1000
"""Frontends of one transaction while a table is filled: the kernel holds a lock for the time of one."""


class Driver(Protocol):
    """What is asked of `kernel.nftbatch.TableDriver`."""

    def commit(self, batch: Batch) -> None: ...

    def look(self, family: Family, table: str) -> Standing | None: ...

    def elements(self, family: Family, table: str, shape: SetShape) -> Iterable[Element]: ...


@dataclass(slots=True)
class TableResult:
    """What a sync of one table came to. ``commits``: transactions; ``looked``: whether the kernel was read.

    ``left``: who no longer gets packets of a frontend; connections that are tracked may still lead there.
    """

    writes: int = 0
    commits: int = 0
    looked: bool = False
    repaired: list[str] = field(default_factory=list)
    left: set[Left] = field(default_factory=set)


class TableSync:
    """The table of one family and what is believed of it."""

    def __init__(self, family: Family, driver: Driver, pack: Pack) -> None:
        self.family, self._driver, self._pack = family, driver, pack
        self._name = NFT_TABLES[family]
        self._layout, self._shapes = Layout(family), layout.shapes(family)
        self._known = False
        self._forget()

    @property
    def frontends(self) -> int:
        """How many are programmed."""
        return len(self._programmed)

    @property
    def unable(self) -> Iterable[tuple[Key, str]]:
        """Services that ask for what cannot be said here, and what they get; a line each."""
        return self._unable.keys()

    def sync(
        self, table: ServiceTable, changed: Changed, frame: ProxyFrame, *, observe: bool, unchanged: bool, hold: bool
    ) -> TableResult:
        """Bring the kernel's table to ``table`` and ``frame``. Raises `NftError` when nothing could be done.

        ``unchanged``: nobody changed any table since this process last knew that all was right; nothing is read then.
        """
        result = TableResult()
        known, self._known = self._known, False
        if known:
            try:
                if observe and not unchanged:
                    self._compare(result, hold=hold, tell=True)
                self._change(table, changed, frame, result, hold=hold)
            except NftError:
                known = False  # the kernel does not hold what is believed: it must be looked at
        if not known:
            self._adopt(table, frame)
            self._compare(result, hold=hold, tell=False)
        # What a stale state kept may be of nobody: the next one that counts is compared with the kernel.
        self._known = not hold
        return result

    def plan(self, table: ServiceTable, frame: ProxyFrame) -> tuple[str, ...]:
        """What a process without memory would do, a line each. Raises `NftError`."""
        self._adopt(table, frame)
        return tuple(self._difference([], hold=False).lines(f"{self.family} table {self._name}"))

    # What is believed

    def _forget(self) -> None:
        self._programmed: dict[Frontend, Programmed] = {}
        self._shared: Counter[tuple[str, bytes]] = Counter()
        self._made: Counter[Made] = Counter()
        self._unable: Counter[tuple[Key, str]] = Counter()
        self._frame: ProxyFrame | None = None
        self._fixed: dict[str, WordedChain] = {}

    def _adopt(self, table: ServiceTable, frame: ProxyFrame) -> None:
        """Believe that all of it is programmed; to be compared with the kernel before it is true."""
        self._forget()
        self._take_frame(frame)
        for frontend in table.frontends:
            if frontend.family is self.family:
                self._programmed[frontend] = self._wanted(table, frontend)
        for frontend, what in self._programmed.items():
            self._made.update(made.chains(frontend, what))
            self._shared.update(self._shared_by(frontend, what))
            self._unable.update(_unable(what))

    def _take_frame(self, frame: ProxyFrame) -> None:
        self._frame = frame
        source = frame.source.get(self.family)
        self._fixed = self._layout.fixed(frame, None if source is None else self._pack(source))

    def _wanted(self, table: ServiceTable, frontend: Frontend) -> Programmed:
        return Programmed(
            table.frontends[frontend],
            table.endpoints(frontend, inside=True),
            table.endpoints(frontend, inside=False),
        )

    def _shared_by(self, frontend: Frontend, what: Programmed) -> Iterator[tuple[str, bytes]]:
        nodes = self._frame.cluster_addresses if self._frame is not None else frozenset()
        return ((name, key) for name, key, _ in made.shared(frontend, what, self._pack, nodes))

    def _frame_elements(self) -> Iterator[made.Placed]:
        """Of the sets that hang on the frame alone."""
        frame = self._frame
        if frame is None:
            return
        for first, last in made.networks(self.family, frame.pod_networks):
            yield layout.POD_NETWORKS, first, last
        for address in frame.node_ports_on or ():
            if (":" in address) == (self.family is Family.IPV6):
                yield layout.NODE_ADDRESSES, self._pack(address), b""

    def _chains(self) -> dict[str, WordedChain]:
        """All that should stand."""
        return self._fixed | {each.chain: self._layout.made(each) for each in self._made}

    # Changes

    def _change(
        self, table: ServiceTable, changed: Changed, frame: ProxyFrame, result: TableResult, *, hold: bool
    ) -> None:
        """Program what differs from what is believed."""
        touched: Iterable[Frontend] = changed.touched
        if changed.everything:
            touched = dict.fromkeys([*self._programmed, *table.frontends])
        touched = [frontend for frontend in touched if frontend.family is self.family]
        difference, lost = Difference(), list[Frontend]()
        if frame != self._frame and not hold:
            self._change_frame(frame, difference)
        for frontend in touched:
            if (not hold or frontend not in self._programmed) and self._change_frontend(table, frontend, difference):
                lost.append(frontend)
        if difference:
            self._commit(difference, result)
        self._forget_clients(lost, result)

    def _change_frame(self, frame: ProxyFrame, difference: Difference) -> None:
        before, fixed = {item[:2]: item for item in self._frame_elements()}, self._fixed
        nodes = self._frame.cluster_addresses if self._frame is not None else frozenset()
        moved = nodes ^ frame.cluster_addresses
        concerned = [frontend for frontend in self._programmed if frontend.address in moved] if moved else []
        for frontend in concerned:
            self._count_shared(frontend, self._programmed[frontend], None, difference)
        self._take_frame(frame)
        for frontend in concerned:
            self._count_shared(frontend, None, self._programmed[frontend], difference)
        after = {item[:2]: item for item in self._frame_elements()}
        for name, key in before.keys() | after.keys():
            old, new = before.get((name, key)), after.get((name, key))
            difference.put(name, key, old and old[2], new and new[2])
        difference.refill += [chain for name, chain in self._fixed.items() if chain != fixed.get(name)]

    def _change_frontend(self, table: ServiceTable, frontend: Frontend, difference: Difference) -> bool:
        """Note what one frontend comes to; whether remembered clients may have lost their endpoint by it."""
        before = self._programmed.get(frontend)
        after = self._wanted(table, frontend) if frontend in table.frontends else None
        if before == after:
            return False
        if after is None:
            del self._programmed[frontend]
        else:
            self._programmed[frontend] = after
        old, new = self._elements(frontend, before), self._elements(frontend, after)
        for name, key in old.keys() | new.keys():
            difference.put(name, key, old.get((name, key)), new.get((name, key)))
        self._count_shared(frontend, before, after, difference)
        self._count_chains(frontend, before, after, difference)
        self._unable = self._unable + Counter(_unable(after)) - Counter(_unable(before))
        return before is not None and before.forwarding.balancing.affinity > 0

    def _elements(self, frontend: Frontend, what: Programmed | None) -> dict[tuple[str, bytes], ElementData]:
        if what is None:
            return {}
        return {(name, key): data for name, key, data in made.elements(frontend, what, self._pack)}

    def _count_shared(
        self, frontend: Frontend, before: Programmed | None, after: Programmed | None, difference: Difference
    ) -> None:
        old = {*self._shared_by(frontend, before)} if before is not None else set()
        new = {*self._shared_by(frontend, after)} if after is not None else set()
        for name, key in new - old:
            self._shared[name, key] += 1
            if self._shared[name, key] == 1:
                difference.put(name, key, None, b"")
        for name, key in old - new:
            self._shared[name, key] -= 1
            if not self._shared[name, key]:
                del self._shared[name, key]
                difference.put(name, key, b"", None)

    def _count_chains(
        self, frontend: Frontend, before: Programmed | None, after: Programmed | None, difference: Difference
    ) -> None:
        old = {*made.chains(frontend, before)} if before is not None else set()
        new = {*made.chains(frontend, after)} if after is not None else set()
        for each in new - old:
            self._made[each] += 1
            if self._made[each] == 1:
                difference.need(self._layout.made(each))
        for each in old - new:
            self._made[each] -= 1
            if not self._made[each]:
                del self._made[each]
                difference.spare(each.chain)

    # Comparing with the kernel

    def _compare(self, result: TableResult, *, hold: bool, tell: bool) -> None:
        """Read what stands and write what differs from what is believed; ``tell``: somebody else made it differ."""
        result.looked = True
        told: list[str] = []
        difference = self._difference(told, hold=hold)
        if difference.new_table and not difference.rebuild:
            self._fill(difference, result)
        elif difference:
            self._commit(difference, result)
        if tell:
            result.repaired += told
        sticky = [frontend for frontend, what in self._programmed.items() if what.forwarding.balancing.affinity]
        if sticky and not hold and not difference.new_table:
            self._forget_clients(sticky, result)

    def _difference(self, told: list[str], *, hold: bool) -> Difference:
        standing = self._driver.look(self.family, self._name)
        if standing is None:
            told.append(f"table {self._name} was deleted")
            return Difference.whole(self._shapes.values(), self._chains().values())
        misfits = [name for name, shape in self._shapes.items() if name in standing.sets and not standing.fits(shape)]
        chains = self._chains()
        misfits += [
            name for name, chain in standing.chains.items() if name in chains and chain.hook != chains[name].hook
        ]
        if misfits:
            if hold:
                text = "can be made anew only by a state that is current"
                raise NftError(f"table {self._name}: {', '.join(misfits)}: of another kind; {text}")
            told.append(f"table {self._name}: {', '.join(misfits)} was of another kind")
            found = Difference.whole(self._shapes.values(), chains.values())
            found.rebuild, found.add = True, self._all_elements()
            return found
        stand = {
            name: self._driver.elements(self.family, self._name, shape)
            for name, shape in self._shapes.items()
            if name in standing.sets and not shape.remembers
        }
        return differences(standing, self._shapes, chains, stand, self._all_elements(), told, hold=hold)

    def _all_elements(self) -> dict[str, dict[bytes, ElementData]]:
        found: dict[str, dict[bytes, ElementData]] = {name: {} for name in self._shapes}
        for name, key, data in self._frame_elements():
            found[name][key] = data
        for name, key in self._shared:
            found[name][key] = b""
        for frontend, what in self._programmed.items():
            for name, key, data in made.elements(frontend, what, self._pack):
                found[name][key] = data
        return found

    # Writing

    def _fill(self, difference: Difference, result: TableResult) -> None:
        """Make a table that is not there, so many frontends a transaction: each is whole as soon as it is there."""
        for name, key, data in self._frame_elements():
            difference.put(name, key, None, data)
        last = Difference()
        for name, key in self._shared:
            # That an address is refused as a whole comes when all that is served of it is there.
            (last if name == layout.OWN_VIPS else difference).put(name, key, None, b"")
        self._commit(difference, result)
        frontends = iter(self._programmed.items())
        while portion := [*islice(frontends, PORTION)]:
            part = Difference()
            for frontend, what in portion:
                for name, key, data in made.elements(frontend, what, self._pack):
                    part.put(name, key, None, data)
            self._commit(part, result)
        if last:
            self._commit(last, result)

    def _commit(self, difference: Difference, result: TableResult) -> None:
        batch = Batch(self.family, self._name)
        difference.write(batch, self._shapes, f"Services, {self.family}")
        self._driver.commit(batch)
        result.commits += 1
        result.writes += batch.writes
        result.left.update(departed(difference, self.family))

    def _forget_clients(self, frontends: Iterable[Frontend], result: TableResult) -> None:
        """Let clients that are remembered with an endpoint that has gone choose anew."""
        allowed: dict[bytes, set[bytes]] = {}
        for frontend in frontends:
            what = self._programmed.get(frontend)
            found = {*what.inside, *what.outside} if what is not None else set()
            key = made.service_key(frontend, self._pack)
            allowed[key] = {made.target(endpoint, self._pack) for endpoint in found}
        if not allowed:
            return
        shape, size = self._shapes[layout.AFFINITY], self.family.bits // 8
        for key, target in [*self._driver.elements(self.family, self._name, shape)]:
            targets = allowed.get(key[size:])
            if targets is None and (layout.VIPS, key[size : 2 * size]) not in self._shared:
                targets = allowed.get(key[2 * size :])
            if targets is not None and target not in targets:
                self._forget_client(shape, (key, b""), result)

    def _forget_client(self, shape: SetShape, element: Element, result: TableResult) -> None:
        """One by one: an entry that has passed away meanwhile is no error, and must not hold up the others."""
        batch = Batch(self.family, self._name)
        batch.delete_elements(shape, [element])
        try:
            self._driver.commit(batch)
        except NftError:
            return
        result.commits += 1
        result.writes += 1


def _unable(what: Programmed | None) -> Iterator[tuple[Key, str]]:
    forwarding = None if what is None else what.forwarding
    return ((forwarding.owner.service, line) for line in made.unable(forwarding)) if forwarding else iter(())
