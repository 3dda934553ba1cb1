"""Value types that all workers share: address families, failures and what a reconciliation came to.

Pure: frozen types and functions on them.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field

from kube_router.ipc.messages import Component, Notice, Session

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Family(enum.IntEnum):
    """An address family; the value is the IP version, so ``Family(network.version)`` works."""

    IPV4 = 4
    IPV6 = 6

    @property
    def bits(self) -> int:
        """Length of an address in bits: 32 or 128."""
        return 32 if self is Family.IPV4 else 128

    def __str__(self) -> str:
        return "IPv4" if self is Family.IPV4 else "IPv6"


def parse_network(text: str) -> IPNetwork:
    """A CIDR with host bits cleared; raises ValueError with a readable reason.

    By the rules of Go's ``net.ParseCIDR``: a bare address, a netmask for a prefix length and a zone are refused.
    """
    address, slash, length = text.partition("/")
    if not slash:
        raise ValueError(f"{text!r} is not a CIDR: it has no prefix length")
    if not (length.isascii() and length.isdigit()):
        raise ValueError(f"{text!r} is not a CIDR: its prefix length is not a number")
    if "%" in address:
        raise ValueError(f"{text!r} is not a CIDR: it has a zone")
    return ipaddress.ip_network(text, strict=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """One thing that went wrong in one reconciliation; nothing else was stopped by it.

    ``phase`` is a short metric label (``ipset``, ``cni-file``, ``bgp-peers``); ``text`` one line that names the object,
    the key and the value.
    """

    phase: str
    text: str

    def __str__(self) -> str:
        return f"{self.phase}: {self.text}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one reconciliation came to; the runtime turns it into a heartbeat and a decision when to come back.

    ``writes`` counts steps that really changed something. Any failure makes the runtime retry with back-off.
    ``warnings`` are states worth showing that no retry mends. ``retry_after``: come back in that many seconds although
    nothing failed (for example, a daemon that is still starting).
    """

    writes: int = 0
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()
    notices: tuple[Notice, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    counters: Mapping[str, float] = field(default_factory=dict)
    observations: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    components: tuple[Component, ...] = ()
    sessions: tuple[Session, ...] = ()
    retry_after: float | None = None
