"""Link facts: what the kernel says of its links and their addresses, as frozen values.

Pure: types and questions to them. `kernel/links.py` makes them; the pure cores of the workers read them.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from kube_router.workers.model import IPAddress

IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

LOOPBACK = "loopback"
"""`Link.kind` of ``lo``, which has no kind of its own in the kernel's words."""


@dataclass(frozen=True, slots=True)
class Link:
    """One link. ``kind`` is the kernel's (``bridge``, ``veth``…), ``loopback`` for lo, empty for plain devices.

    ``mtu`` in bytes; ``up`` is the administrative state; ``master`` the index of the bridge or bond it is a port of,
    0 for none. ``addresses`` with their prefix lengths, in the kernel's order.
    """

    index: int
    name: str
    kind: str = ""
    mtu: int = 0
    up: bool = False
    master: int = 0
    addresses: tuple[IPInterface, ...] = ()


@dataclass(frozen=True, slots=True)
class Links:
    """All links of a network namespace, by rising index."""

    links: tuple[Link, ...] = ()

    def named(self, name: str) -> Link | None:
        """The link called ``name``."""
        return next((link for link in self.links if link.name == name), None)

    def link_of(self, address: IPAddress) -> Link | None:
        """The link that carries exactly ``address``; a loopback link only when no other one does."""
        carriers = [link for link in self.links if any(each.ip == address for each in link.addresses)]
        return min(carriers, key=lambda link: (link.kind == LOOPBACK, link.index), default=None)

    def ports_of(self, master: Link) -> tuple[Link, ...]:
        """The ports of a bridge."""
        return tuple(link for link in self.links if link.master == master.index)
