"""Flow facts: tracked connections as frozen values.

Pure: a type and words. `kernel/conntrack.py` lists and deletes them; the firewall's pure core judges them.
"""

from __future__ import annotations

from dataclasses import dataclass

from kube_router.workers.model import Family

PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMP", 132: "SCTP"}
"""IP protocol numbers by the names that NetworkPolicy has for them; both ICMPs are one."""


@dataclass(frozen=True, slots=True)
class Flow:
    """One connection as the kernel tracks it.

    ``source`` opened it; ``destination`` and ``port`` are whom it reaches, behind all translation (the source of the
    replies). ``port`` is None for a protocol without ports. ``original`` and ``identity`` name the entry to the kernel,
    in its own bytes.
    """

    family: Family
    protocol: str
    source: str
    destination: str
    port: int | None
    original: bytes
    identity: bytes

    def __str__(self) -> str:
        port = "" if self.port is None else f" port {self.port}"
        return f"{self.protocol} from {self.source} to {self.destination}{port}"
