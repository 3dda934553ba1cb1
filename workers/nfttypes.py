"""What an nftables table is made of, as values: sets and maps, chains with their rules as code, elements.

Pure. For who makes a table out of many elements and few rules; `kernel.nftbatch` writes and reads them.
"""

from __future__ import annotations

from typing import NamedTuple

TYPES = {"ipv4_addr": (7, 4), "ipv6_addr": (8, 16), "inet_proto": (12, 1), "inet_service": (13, 2), "mark": (19, 4)}
"""Number and length of the types of which keys and data are made. ``mark``: 32 bits in the host's order."""
VERDICT = "verdict"

ElementData = bytes | str
"""Of a map: bytes, or the chain that a verdict map jumps to. Of an interval set: the last key. Else empty."""
Element = tuple[bytes, ElementData]
"""A key as the kernel holds it (network order, each field padded to four bytes), and its data."""


class SetShape(NamedTuple):
    """A set, or with ``data`` a map; types in nftables' words (``ipv4_addr . inet_service``).

    ``interval``: elements are ranges. ``remembers``: rules add elements, which pass away by themselves; ``size`` bounds
    them.
    """

    name: str
    key: str
    data: str = ""
    interval: bool = False
    remembers: bool = False
    size: int = 0


class Hook(NamedTuple):
    """Where packets enter a chain: ``type`` is ``nat`` or ``filter``."""

    type: str
    hook: str
    priority: int


class CodedChain(NamedTuple):
    """A chain; without a ``hook`` packets only jump to it. ``rules``: the expressions of each."""

    name: str
    rules: tuple[bytes, ...]
    hook: Hook | None = None


def key_length(words: str) -> int:
    """Bytes of a key or of data of this type."""
    return sum((TYPES[word][1] + 3) & ~3 for word in words.split(" . "))


def type_number(words: str) -> int:
    """The number by which nft knows the type: of a concatenation, six bits a field."""
    number = 0
    for word in words.split(" . "):
        number = number << 6 | TYPES[word][0]
    return number
