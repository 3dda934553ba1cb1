"""Tunnel devices (kinds ``ipip`` and ``ip6tnl``) over rtnetlink: read them, make, change and delete them, hear of them.

Touches the kernel. Which devices are ours is not decided here: only those that a plan names are changed. Codec after
``include/uapi/linux/if_tunnel.h``; what shapes the callers' plans:

- A device is changed in place (``changelink``), up or down, without losing the routes over it. An attribute that is
  left out is set to zero then, so every request carries all of them. The MTU of ``ipip`` does not follow the
  encapsulation: it is set.
- Two devices may not have the same local address, remote address and link (``EEXIST``). With different links they may,
  and a packet is then taken by the one that is bound to the link it came over, else by the other one. That is how a
  device under an old name and its successor can both be there.
- While an ``ip6tnl`` is changed it receives nothing for the time of an RCU grace period (``ip6_tnl_update``); one with
  the same local address and any remote does. ``ipip`` has no such gap.
- A tunnel receives plain packets and those that a GUE port unpacked alike; its encapsulation says only how it sends.
- An ``ipip`` device with a TTL of its own always says "don't fragment".
- ``ip6tnl`` adds 8 bytes of destination options for its encapsulation limit unless told not to.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from kube_router.workers.kernel.links import RTM_DELLINK, RTM_GETLINK, RTM_NEWLINK
from kube_router.workers.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    NetlinkError,
    NetlinkSocket,
    Request,
    attribute,
    attribute_map,
    nested,
    text_attribute,
    text_of,
)
from kube_router.workers.model import Family
from kube_router.workers.tunnelfacts import KINDS, OTHER_ENCAPSULATION, PLAIN, Tunnel, TunnelPlan

_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_AF_SPEC, _IFLA_EXT_MASK = 3, 4, 18, 26, 29
_IFLA_INET_CONF, _RP_FILTER, _LOOSE = 1, 8, 2
"""``IFLA_INET_CONF`` holds attributes numbered as in ``include/uapi/linux/ip.h``: IPV4_DEVCONF_RP_FILTER."""
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_RTEXT_FILTER_SKIP_STATS = 1 << 3
_LINK, _LOCAL, _REMOTE, _TTL, _ENCAP_LIMIT, _FLAGS, _PROTO, _PMTUDISC = 1, 2, 3, 4, 6, 8, 9, 10
_ENCAP_TYPE, _ENCAP_FLAGS, _ENCAP_SPORT, _ENCAP_DPORT = 15, 16, 17, 18
"""IFLA_IPTUN_…"""
_ENCAP_NONE, _ENCAP_GUE = 0, 2
_IGNORE_ENCAP_LIMIT = 0x1
_IFF_UP = 0x1
_NEW = NLM_F_CREATE | NLM_F_EXCL
_RECEIVE = "receive"
_IPPROTO = {Family.IPV4: socket.IPPROTO_IPIP, Family.IPV6: socket.IPPROTO_IPV6}
"""Inner protocol: ``mode ipip`` and ``mode ip6ip6``."""

_HEADER = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, index, flags, change mask."""
_AF = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_FAMILY_OF = {kind: family for family, kind in KINDS.items()}


@dataclass(frozen=True, slots=True)
class TunnelEvent:
    """A tunnel device appeared, changed or went (``gone``); of whoever."""

    name: str
    tunnel: Tunnel
    gone: bool


@dataclass(frozen=True, slots=True)
class TunnelFailure:
    """One refused step of a plan."""

    step: str
    name: str
    tunnel: Tunnel | None
    error: NetlinkError


class TunnelDriver:
    """Observes and applies tunnel devices through one socket."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_ROUTE)

    @property
    def writes(self) -> int:
        """Requests sent so far that change something."""
        return self._netlink.writes

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def observe(self) -> Mapping[str, Tunnel]:
        """Every tunnel device of the two kinds, ours or not, by name."""
        found: dict[str, Tunnel] = {}
        for kind in KINDS.values():
            payload = _HEADER.pack(0, 0, 0, 0, 0) + nested(_IFLA_LINKINFO, text_attribute(_IFLA_INFO_KIND, kind))
            payload += attribute(_IFLA_EXT_MASK, struct.pack("=I", _RTEXT_FILTER_SKIP_STATS))
            # A kernel that has not loaded the kind's module cannot filter by it and lists all links.
            for message in self._netlink.dump(RTM_GETLINK, payload):
                event = decode_tunnel(message)
                if event is not None:
                    found[event.name] = event.tunnel
        return found

    def apply(self, plan: TunnelPlan) -> tuple[TunnelFailure, ...]:
        """Execute the steps in their order; one refused step stops no other. Raises `Overflow`, OSError."""
        steps: list[tuple[str, str, Tunnel | None, Request]] = [
            *(
                (_RECEIVE, name, tunnel, request)
                for name, tunnel in plan.receivers
                for request in _receiver(name, tunnel)
            ),
            *(("change", name, tunnel, _request(name, tunnel, 0)) for name, tunnel in plan.change),
            *((_RECEIVE, name, None, _deletion(name)) for name, _ in plan.receivers),
            *((_RECEIVE, name, None, _loosening(name)) for name in plan.loosen),
            *(("add", name, tunnel, _request(name, tunnel, _NEW)) for name, tunnel in plan.add),
            *(("delete", name, None, _deletion(name)) for name in plan.delete),
        ]
        errors = self._netlink.batch([step[3] for step in steps])
        return tuple(
            TunnelFailure(*steps[index][:3], error)
            for index, error in sorted(errors.items())
            # Without a receiver a few packets may be lost, that is all.
            if steps[index][0] != _RECEIVE and (steps[index][0], error.errno) != ("delete", errno.ENODEV)
        )


def describe_tunnels(failures: Iterable[TunnelFailure]) -> list[str]:
    """One line for each kind of refusal, with a count: a missing module refuses all tunnels."""
    groups: dict[tuple[str, str], list[TunnelFailure]] = {}
    for failure in failures:
        groups.setdefault((failure.step, str(failure.error.strerror)), []).append(failure)
    lines = []
    for (step, reason), group in sorted(groups.items()):
        first = min(group, key=lambda failure: failure.name)
        where = f"{first.name} to {first.tunnel.remote}" if first.tunnel is not None else first.name
        what = f"tunnel {where}" if len(group) == 1 else f"{len(group)} tunnels, first {where}"
        lines.append(f"{step} {what}: {reason}")
    return lines


def _request(name: str, tunnel: Tunnel, flags: int) -> Request:
    family = tunnel.family
    up = _IFF_UP if tunnel.up else 0
    payload = _HEADER.pack(0, 0, 0, up, _IFF_UP) + text_attribute(_IFLA_IFNAME, name)
    if tunnel.mtu:
        payload += attribute(_IFLA_MTU, struct.pack("=I", tunnel.mtu))
    data = [
        attribute(_LINK, struct.pack("=I", tunnel.link)),
        attribute(_LOCAL, _packed(family, tunnel.local)),
        attribute(_REMOTE, _packed(family, tunnel.remote)),
        attribute(_TTL, bytes((tunnel.ttl,))),
        attribute(_PROTO, bytes((_IPPROTO[family],))),
        attribute(_ENCAP_TYPE, struct.pack("=H", _ENCAP_GUE if tunnel.port > 0 else _ENCAP_NONE)),
        attribute(_ENCAP_FLAGS, struct.pack("=H", 0)),
        attribute(_ENCAP_SPORT, struct.pack("!H", 0)),
        attribute(_ENCAP_DPORT, struct.pack("!H", max(tunnel.port, 0))),
    ]
    if family is Family.IPV4:
        data.append(attribute(_PMTUDISC, bytes((tunnel.pmtudisc,))))
    else:
        data.append(attribute(_FLAGS, struct.pack("=I", 0 if tunnel.limit else _IGNORE_ENCAP_LIMIT)))
    info = nested(_IFLA_LINKINFO, text_attribute(_IFLA_INFO_KIND, tunnel.kind), nested(_IFLA_INFO_DATA, *data))
    return Request(RTM_NEWLINK, flags, payload + info)


def _receiver(name: str, tunnel: Tunnel) -> Iterator[Request]:
    """A device that takes packets of any remote; IPv4 would look for them on the devices that lead back there."""
    yield _request(name, tunnel._replace(up=tunnel.family is not Family.IPV4), _NEW)
    if tunnel.family is Family.IPV4:
        yield _loosening(name)


def _loosening(name: str) -> Request:
    """The device up, and its IPv4 reverse-path filter loose, which wins over a strict one for all (ip-sysctl.rst)."""
    loose = nested(_IFLA_INET_CONF, attribute(_RP_FILTER, struct.pack("=I", _LOOSE)))
    payload = _HEADER.pack(0, 0, 0, _IFF_UP, _IFF_UP) + text_attribute(_IFLA_IFNAME, name)
    return Request(RTM_NEWLINK, 0, payload + nested(_IFLA_AF_SPEC, nested(socket.AF_INET, loose)))


def _deletion(name: str) -> Request:
    return Request(RTM_DELLINK, 0, _HEADER.pack(0, 0, 0, 0, 0) + text_attribute(_IFLA_IFNAME, name))


def _packed(family: Family, text: str) -> bytes:
    return socket.inet_pton(_AF[family], text) if text else bytes(family.bits // 8)


def decode_tunnel(message: Message) -> TunnelEvent | None:
    """A tunnel out of an RTM_NEWLINK or RTM_DELLINK; None for other messages and other kinds of device."""
    if message.type not in (RTM_NEWLINK, RTM_DELLINK) or len(message.payload) < _HEADER.size:
        return None
    address_family, _, _, flags, _ = _HEADER.unpack_from(message.payload)
    found = attribute_map(message.payload, _HEADER.size)
    if address_family != 0 or _IFLA_LINKINFO not in found:
        return None
    info = attribute_map(found[_IFLA_LINKINFO])
    family = _FAMILY_OF.get(text_of(info.get(_IFLA_INFO_KIND, b"")))
    if family is None:
        return None
    data = attribute_map(info.get(_IFLA_INFO_DATA, b""))
    ignores = _number(data.get(_FLAGS)) & _IGNORE_ENCAP_LIMIT
    tunnel = Tunnel(
        local=_address(data.get(_LOCAL)),
        remote=_address(data.get(_REMOTE)),
        port=_port(data),
        ttl=_number(data.get(_TTL)),
        pmtudisc=family is Family.IPV4 and bool(_number(data.get(_PMTUDISC))),
        mtu=_number(found.get(_IFLA_MTU)),
        link=_number(data.get(_LINK)),
        limit=family is Family.IPV6 and not ignores,
        up=bool(flags & _IFF_UP),
    )
    return TunnelEvent(text_of(found.get(_IFLA_IFNAME, b"")), tunnel, message.type == RTM_DELLINK)


def _port(data: Mapping[int, memoryview]) -> int:
    """The GUE port as we would write it; another encapsulation, a fixed source port or checksums are not ours."""
    kind = _number(data.get(_ENCAP_TYPE))
    if kind == _ENCAP_NONE:
        return PLAIN
    if kind != _ENCAP_GUE or _number(data.get(_ENCAP_FLAGS)) or _number(data.get(_ENCAP_SPORT)):
        return OTHER_ENCAPSULATION
    return int.from_bytes(data.get(_ENCAP_DPORT, b""), "big")


def _number(value: memoryview | None) -> int:
    return 0 if value is None else int.from_bytes(value, sys.byteorder)


def _address(value: memoryview | None) -> str:
    """Canonical text; empty for none and for the address of zeroes, which means any."""
    packed = b"" if value is None else bytes(value)
    if len(packed) not in (4, 16) or not any(packed):
        return ""
    return str(ipaddress.ip_address(packed))
