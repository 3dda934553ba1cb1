"""Whose an address is, while the API shows two pods that have it.

Pure. An address that a pod has given back may be another pod's before the API shows the first one gone. It belongs to
the pod that is not terminating, and of several such to the one whose key is the smallest: the answer depends on who
claims it now, not on who came first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

from kube_router.ipc.messages import Key


class Claimant(Protocol):
    """Who has addresses; compared by identity."""

    @property
    def key(self) -> Key: ...

    @property
    def terminating(self) -> bool: ...

    @property
    def addresses(self) -> tuple[str, ...]: ...


C = TypeVar("C", bound=Claimant)


class Owners(Generic[C]):
    """The claimants of each address. An address with one claimant, nearly every one, costs one entry of a table."""

    __slots__ = ("_first", "_others")

    def __init__(self) -> None:
        self._first: dict[str, C] = {}
        self._others: dict[str, list[C]] = {}

    def owner(self, address: str) -> C | None:
        """The pod that the address belongs to."""
        return self._first.get(address)

    def owned(self, claimant: C) -> tuple[str, ...]:
        """Those of the claimant's addresses that belong to it; the same tuple if all do."""
        addresses = claimant.addresses
        first = self._first
        if all(first.get(address) is claimant for address in addresses):
            return addresses
        return tuple(address for address in addresses if first.get(address) is claimant)

    def claim(self, claimant: C) -> Iterable[C]:
        """Let it have its addresses; the others whose ownership may have changed."""
        rivals: list[C] = []
        for address in claimant.addresses:
            holder = self._first.setdefault(address, claimant)
            if holder is not claimant:
                self._set(address, [holder, *self._others.get(address, ()), claimant])
                rivals.append(holder)
        return rivals

    def withdraw(self, claimant: C) -> Iterable[C]:
        """Take its claims back; the others whose ownership may have changed. It must be what it was when it claimed."""
        rivals: list[C] = []
        for address in claimant.addresses:
            others = self._others.get(address)
            if others is None:
                del self._first[address]
            else:
                left = [other for other in (self._first[address], *others) if other is not claimant]
                self._set(address, left)
                rivals.append(self._first[address])
        return rivals

    def _set(self, address: str, claimants: list[C]) -> None:
        first, *others = sorted(claimants, key=lambda claimant: (claimant.terminating, claimant.key))
        self._first[address] = first
        if others:
            self._others[address] = others
        else:
            self._others.pop(address, None)
