"""Maglev hashing: a table of buckets, each an endpoint, that changes little when an endpoint comes or goes.

Pure. Every node makes the same table of the same endpoints, so a client reaches the same one through any of them.
After Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", section 3.4.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

from kube_router.workers.proxy.model import Endpoint

SIZES = (251, 1021, 4093, 16381)
"""Primes: every step reaches every bucket."""
_BUCKETS_EACH = 20
"""Buckets for each endpoint at least; so none has a tenth more than another, nearly."""


def table_size(count: int) -> int:
    """How many buckets a table of so many endpoints has."""
    return next((size for size in SIZES if size >= _BUCKETS_EACH * count), SIZES[-1])


@functools.lru_cache(64)
def table(endpoints: tuple[Endpoint, ...]) -> Sequence[int]:
    """The index of an endpoint for each bucket; one endpoint needs but one."""
    if len(endpoints) <= 1:
        return (0,) * len(endpoints)
    size = table_size(len(endpoints))
    steps = [_walk(endpoint, size) for endpoint in endpoints]
    places = [start for start, _ in steps]
    found = [-1] * size
    filled = 0
    while True:
        for index, (_, skip) in enumerate(steps):
            place = places[index]
            while found[place] >= 0:
                place = (place + skip) % size
            found[place] = index
            places[index] = (place + skip) % size
            filled += 1
            if filled == size:
                return tuple(found)


def choice(endpoints: tuple[Endpoint, ...], what: str) -> Endpoint:
    """The endpoint that ``what`` falls to; there must be one."""
    buckets = table(endpoints)
    return endpoints[buckets[_digest(what) % len(buckets)]]


def _walk(endpoint: Endpoint, size: int) -> tuple[int, int]:
    """Where an endpoint begins in the table, and how far it goes on."""
    number = _digest(f"{endpoint.address} {endpoint.port}")
    return number % size, (number >> 64) % (size - 1) + 1


def _digest(what: str) -> int:
    return int.from_bytes(hashlib.blake2b(what.encode(), digest_size=16).digest(), "big")
