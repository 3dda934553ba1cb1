"""The addresses that may be given out, and the next free one.

Pure: ranges in, addresses out; who holds what is the caller's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from kube_router.workers.model import Family, IPAddress, IPNetwork


@dataclass(frozen=True, slots=True)
class _Span:
    """The usable addresses of one range, as numbers."""

    version: int
    first: int
    last: int


class Pool:
    """The ranges of one family, in the order given; where they overlap an address counts once, in the first.

    Not usable are a range's network and broadcast address (RFC 919; not in a /31 or /32, RFC 3021), and in IPv6 its
    first address, the anycast address of routers (RFC 4291 section 2.6.1; not in a /127 or /128, RFC 6164).
    """

    def __init__(self, ranges: Iterable[IPNetwork]) -> None:
        self._spans = tuple(map(_usable, ranges))
        self._span, self._offset = 0, 0

    def __bool__(self) -> bool:
        return bool(self._spans)

    @property
    def size(self) -> int:
        """The number of usable addresses, those of overlapping ranges counted as often as they are there."""
        return sum(span.last - span.first + 1 for span in self._spans)

    def __contains__(self, address: IPAddress) -> bool:
        value = int(address)
        return any(span.version == address.version and span.first <= value <= span.last for span in self._spans)

    def next_free(self, taken: Container[IPAddress], held: int) -> IPAddress | None:
        """The next usable address that is not in ``taken``, None if there is none.

        ``held``: not less than the number of addresses in ``taken``; so the search ends after as many, however large
        the ranges are. It goes on behind the last one found, so that a released address rests for a while.
        """
        if not self._spans:
            return None
        most = held + 1 + (len(self._spans) - 1) * held  # overlapping ranges show a taken address once each
        for _ in range(min(most, self.size)):
            address = self._step()
            if address not in taken:
                return address
        return None

    def _step(self) -> IPAddress:
        span = self._spans[self._span]
        address = _address(span.version, span.first + self._offset)
        self._offset += 1
        if span.first + self._offset > span.last:
            self._span, self._offset = (self._span + 1) % len(self._spans), 0
        return address


def pools(ranges: Sequence[IPNetwork], families: Iterable[Family]) -> dict[Family, Pool]:
    """One pool a family; without a range of a family its pool is empty."""
    return {family: Pool(item for item in ranges if item.version == family) for family in families}


def _usable(network: IPNetwork) -> _Span:
    first, last = int(network.network_address), int(network.broadcast_address)
    if network.prefixlen < network.max_prefixlen - 1:
        first += 1
        if network.version == 4:
            last -= 1
    return _Span(network.version, first, last)


def _address(version: int, value: int) -> IPAddress:
    return ipaddress.IPv4Address(value) if version == 4 else ipaddress.IPv6Address(value)
