"""Tunnel facts: overlay devices, the ports they are reached at and the rules that lead to them, as frozen values.

Pure: types only. `kernel/tunnels.py`, `kernel/fou.py` and `kernel/iprules.py` observe and apply them; the router's pure
core (`router/tunnels.py`) decides them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kube_router.workers.model import Family

OVERLAY_TABLE = 77
"""The routing table of the overlay; ``rt_tables`` calls it ``kube-router``."""
OVERLAY_TABLE_NAME = "kube-router"

KINDS = {Family.IPV4: "ipip", Family.IPV6: "ip6tnl"}
"""The kernel's kind of device for each family of the outer header."""

PLAIN = 0
"""`Tunnel.port` of a tunnel without UDP header."""
OTHER_ENCAPSULATION = -1
"""`Tunnel.port` of a device that encapsulates in a way that we never ask for."""


class Tunnel(NamedTuple):
    """One point-to-point tunnel device of kind ``ipip`` or ``ip6tnl``; its name stands beside it.

    ``local`` and ``remote`` are canonical addresses, empty for "any". ``port`` is the UDP port of GUE, `PLAIN` for
    none. ``ttl`` 0: that of the inner packet. ``pmtudisc``: always "don't fragment" outside (IPv4 only). ``mtu`` in
    bytes; 0 in a desired value leaves it to the kernel. ``link``: index of the device it is bound to, 0 for none.
    ``limit``: IPv6's encapsulation limit option, 8 bytes a packet, is on. ``up``: the administrative state.
    """

    local: str
    remote: str
    port: int = PLAIN
    ttl: int = 0
    pmtudisc: bool = False
    mtu: int = 0
    link: int = 0
    limit: bool = False
    up: bool = True

    @property
    def family(self) -> Family:
        """The family of the outer header."""
        return Family.IPV6 if ":" in self.remote + self.local else Family.IPV4

    @property
    def kind(self) -> str:
        """The kernel's kind of device."""
        return KINDS[self.family]

    def __str__(self) -> str:
        words = [f"{self.kind} local {self.local or 'any'} remote {self.remote or 'any'} ttl {self.ttl or 'inherit'}"]
        if self.port:
            words.append("encap ?" if self.port == OTHER_ENCAPSULATION else f"encap gue dport {self.port}")
        if self.mtu:
            words.append(f"mtu {self.mtu}")
        words += [word for word, said in (("pmtudisc", self.pmtudisc), ("encaplimit", self.limit)) if said]
        words += [f"dev {self.link}"] if self.link else []
        return " ".join([*words, *([] if self.up else ["down"])])


@dataclass(frozen=True, slots=True)
class TunnelPlan:
    """Steps in their order: ``change`` before ``add``, because two devices may not have the same ends.

    ``receivers`` are there only while the changes are made: they take what comes in from any remote meanwhile.
    ``loosen``: IPv4 devices that go on receiving although routes will lead elsewhere, until they are deleted; a strict
    reverse-path filter would drop what comes in through them.
    """

    receivers: tuple[tuple[str, Tunnel], ...] = ()
    change: tuple[tuple[str, Tunnel], ...] = ()
    add: tuple[tuple[str, Tunnel], ...] = ()
    delete: tuple[str, ...] = ()
    loosen: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.change) + len(self.add) + len(self.delete)

    def __str__(self) -> str:
        lines = [f"tunnel add {name} {tunnel}" for name, tunnel in self.receivers]
        lines += [f"tunnel change {name} {tunnel}" for name, tunnel in self.change]
        lines += [f"tunnel delete {name}" for name, _ in self.receivers]
        lines += [f"tunnel change {name} rp_filter 2" for name in self.loosen]
        lines += [f"tunnel add {name} {tunnel}" for name, tunnel in self.add]
        lines += [f"tunnel delete {name}" for name in self.delete]
        return "\n".join(lines)


class FouPort(NamedTuple):
    """A UDP port at which the kernel takes tunnel packets. ``gue``: with GUE header, the only kind that is ours."""

    family: Family
    port: int
    gue: bool = True

    def __str__(self) -> str:
        return f"{self.family} port {self.port}{'' if self.gue else ' (not GUE)'}"


class PodRule(NamedTuple):
    """The policy rule ``from <source> lookup 77``; ``protocol`` tells who made it; the kernel chose ``priority``."""

    source: str
    protocol: int = 17
    priority: int = 0

    @property
    def family(self) -> Family:
        """The family of the source."""
        return Family.IPV6 if ":" in self.source else Family.IPV4

    def __str__(self) -> str:
        return f"from {self.source} lookup {OVERLAY_TABLE}"


@dataclass(frozen=True, slots=True)
class PodRulePlan:
    """Steps in their order: what is wanted is there before what is not goes."""

    add: tuple[PodRule, ...] = ()
    delete: tuple[PodRule, ...] = ()

    def __len__(self) -> int:
        return len(self.add) + len(self.delete)

    def __str__(self) -> str:
        return "\n".join([*(f"rule add {rule}" for rule in self.add), *(f"rule delete {rule}" for rule in self.delete)])
