"""One virtual address, protocol and port belongs to one Service: the oldest that asks for it, by age and then by name.

Pure. Who owns something depends on the Services that there are, not on the order in which they came.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

from kube_router.ipc.messages import Key

Thing = TypeVar("Thing")


class Claim(NamedTuple):
    """A Service that asks for something; the smallest claim owns it. ``created``: the API's time stamp.

    A Service without a time stamp (from a manifest) is older than any other.
    """

    created: str
    service: Key


class Owners(Generic[Thing]):
    """Who claims which frontend (or port). Nearly always it is one Service: only more than one cost a set."""

    def __init__(self) -> None:
        self._owner: dict[Thing, Claim] = {}
        self._rivals: dict[Thing, set[Claim]] = {}
        """Of things that more than one asks for: all claims."""

    def owner(self, thing: Thing) -> Key | None:
        """The Service that has it."""
        claim = self._owner.get(thing)
        return None if claim is None else claim.service

    def rivals(self, thing: Thing) -> set[Key]:
        """The Services that ask for it, if more than one does."""
        return {claim.service for claim in self._rivals.get(thing, ())}

    def claim(self, claim: Claim, things: Iterable[Thing]) -> None:
        """Ask for things; asking twice does no harm."""
        for thing in things:
            owner = self._owner.setdefault(thing, claim)
            if owner == claim:
                continue
            self._rivals.setdefault(thing, {owner}).add(claim)
            if claim < owner:
                self._owner[thing] = claim

    def release(self, claim: Claim, things: Iterable[Thing]) -> None:
        """Ask no longer for things."""
        for thing in things:
            rivals = self._rivals.get(thing)
            if rivals is None:
                if self._owner.get(thing) == claim:
                    del self._owner[thing]
                continue
            rivals.discard(claim)
            self._owner[thing] = min(rivals)
            if len(rivals) == 1:
                del self._rivals[thing]
