"""Links and addresses over rtnetlink: read them, make and change a bridge, hear of changes.

Touches the kernel: links of the calling thread's network namespace. Recognises its own by name alone: it changes only
the link that the caller names. Codec after ``include/uapi/linux/if_link.h``, ``if_addr.h`` and ``rtnetlink.h``; written
for itself because the usual library costs each importing process more memory than the rest of a small worker.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from kube_router.workers.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    NetlinkSocket,
    Overflow,
    Request,
    attribute,
    attribute_map,
    nested,
    text_attribute,
    text_of,
)
from kube_router.workers.linkfacts import LOOPBACK, IPInterface, Link, Links
from kube_router.workers.model import IPAddress

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR = 1, 5, 9

_IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_EXT_MASK = 3, 4, 10, 18, 29
_IFLA_INFO_KIND = 1
_RTEXT_FILTER_SKIP_STATS = 1 << 3
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8

_LINK = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, index, flags, change mask."""
_ADDRESS = struct.Struct("=BBBBI")
"""struct ifaddrmsg: family, prefix length, flags, scope, link index."""
_NUMBER = struct.Struct("=I")


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """A link appeared, changed or went (``gone``)."""

    link: Link
    gone: bool


@dataclass(frozen=True, slots=True)
class AddressEvent:
    """An address appeared, changed or went (``gone``) on the link with ``index``."""

    index: int
    address: IPInterface
    gone: bool


class LinkDriver:
    """Reads all links; changes the one that it is told to. Errors are OSError (`NetlinkError`) with errno and words."""

    def __init__(self) -> None:
        self._socket = NetlinkSocket(NETLINK_ROUTE)

    @property
    def writes(self) -> int:
        """Requests sent so far that change something."""
        return self._socket.writes

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def observe(self) -> Links:
        """All links with their addresses."""
        mask = attribute(_IFLA_EXT_MASK, _NUMBER.pack(_RTEXT_FILTER_SKIP_STATS))
        links = self._socket.dump(RTM_GETLINK, _LINK.pack(0, 0, 0, 0, 0) + mask)
        by_index: dict[int, list[IPInterface]] = {}
        for message in self._socket.dump(RTM_GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0)):
            event = decode_address(message)
            if event is not None:
                by_index.setdefault(event.index, []).append(event.address)
        found = (decode_link(message) for message in links)
        return Links(
            tuple(
                sorted(
                    (
                        Link(
                            index=event.link.index,
                            name=event.link.name,
                            kind=event.link.kind,
                            mtu=event.link.mtu,
                            up=event.link.up,
                            master=event.link.master,
                            addresses=tuple(by_index.get(event.link.index, ())),
                        )
                        for event in found
                        if event is not None
                    ),
                    key=lambda link: link.index,
                )
            )
        )

    def create_bridge(self, name: str) -> None:
        """Add a plain bridge, down; a link of that name that is already there is no error."""
        info = nested(_IFLA_LINKINFO, text_attribute(_IFLA_INFO_KIND, "bridge"))
        payload = _LINK.pack(0, 0, 0, 0, 0) + text_attribute(_IFLA_IFNAME, name) + info
        self._change(Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, payload), tolerate=errno.EEXIST)

    def set_up(self, name: str) -> None:
        """Set a link administratively up."""
        payload = _LINK.pack(0, 0, 0, _IFF_UP, _IFF_UP) + text_attribute(_IFLA_IFNAME, name)
        self._change(Request(RTM_NEWLINK, 0, payload))

    def set_mtu(self, name: str, mtu: int) -> None:
        """Set a link's MTU in bytes.

        A bridge follows its smallest port until its MTU is set to something else than it has; then it stays.
        """
        mtu_attribute = attribute(_IFLA_MTU, _NUMBER.pack(mtu))
        self._change(
            Request(RTM_NEWLINK, 0, _LINK.pack(0, 0, 0, 0, 0) + text_attribute(_IFLA_IFNAME, name) + mtu_attribute)
        )

    def delete(self, name: str) -> None:
        """Delete a link; one that is not there is no error."""
        payload = _LINK.pack(0, 0, 0, 0, 0) + text_attribute(_IFLA_IFNAME, name)
        self._change(Request(RTM_DELLINK, 0, payload), tolerate=errno.ENODEV)

    def delete_address(self, index: int, address: IPInterface) -> None:
        """Take an address off the link with ``index``; one that is not there is no error."""
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        header = _ADDRESS.pack(family, address.network.prefixlen, 0, 0, index)
        request = Request(RTM_DELADDR, 0, header + attribute(_IFA_LOCAL, address.packed))
        self._change(request, tolerate=errno.EADDRNOTAVAIL)

    def _change(self, request: Request, tolerate: int = 0) -> None:
        error = self._socket.batch([request]).get(0)
        if error is not None and error.errno != tolerate:
            raise error


def decode_link(message: Message) -> LinkEvent | None:
    """A link out of an RTM_NEWLINK or RTM_DELLINK; None for other messages and for the bridge's word on its ports."""
    if message.type not in (RTM_NEWLINK, RTM_DELLINK) or len(message.payload) < _LINK.size:
        return None
    family, _, index, flags, _ = _LINK.unpack_from(message.payload)
    if family == socket.AF_BRIDGE:
        return None
    found = attribute_map(message.payload, _LINK.size)
    info = attribute_map(found[_IFLA_LINKINFO]) if _IFLA_LINKINFO in found else {}
    kind = LOOPBACK if flags & _IFF_LOOPBACK else text_of(info.get(_IFLA_INFO_KIND, b""))
    link = Link(
        index=index,
        name=text_of(found.get(_IFLA_IFNAME, b"")),
        kind=kind,
        mtu=_number(found.get(_IFLA_MTU)),
        up=bool(flags & _IFF_UP),
        master=_number(found.get(_IFLA_MASTER)),
    )
    return LinkEvent(link, gone=message.type == RTM_DELLINK)


def decode_address(message: Message) -> AddressEvent | None:
    """An address out of an RTM_NEWADDR or RTM_DELADDR; None for other messages and families."""
    if message.type not in (RTM_NEWADDR, RTM_DELADDR) or len(message.payload) < _ADDRESS.size:
        return None
    family, length, _, _, index = _ADDRESS.unpack_from(message.payload)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    found = attribute_map(message.payload, _ADDRESS.size)
    # On a point-to-point link IFA_ADDRESS is the peer's; IFA_LOCAL, where there is one, is always ours.
    own = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS))
    if own is None or len(own) != (4 if family == socket.AF_INET else 16):
        return None
    address: IPInterface = ipaddress.ip_interface((bytes(own), length))
    return AddressEvent(index, address, gone=message.type == RTM_DELADDR)


def _number(value: memoryview | None) -> int:
    return 0 if value is None or len(value) < 4 else int(_NUMBER.unpack_from(value)[0])


class LinkMonitor:
    """Hears of every change of links and addresses, and says whether it is one that its owner cares about.

    `follow` names what that is; until then, everything is. Creating it binds it to the network namespace that the
    calling thread is in.
    """

    def __init__(self) -> None:
        groups = (RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR)
        self._socket = NetlinkSocket(NETLINK_ROUTE, groups)
        self._links: dict[int, Link] | None = None
        self._names: frozenset[str] = frozenset()
        self._addresses: frozenset[IPAddress] = frozenset()

    def fileno(self) -> int:
        """For poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def follow(self, links: Iterable[Link], names: Iterable[str], addresses: Iterable[IPAddress]) -> None:
        """Care about changes of these links (as last seen), links of these names, and these addresses anywhere."""
        self._links = {link.index: link for link in links}
        self._names = frozenset(names)
        self._addresses = frozenset(addresses)

    def drain(self) -> bool:
        """Read all that came; whether any of it matters. Lost messages matter."""
        matters = False
        try:
            for message in self._socket.events():
                matters = self._matters(message) or matters
        except Overflow:
            return True
        return matters

    def _matters(self, message: Message) -> bool:
        if self._links is None:
            return True
        link_event = decode_link(message)
        if link_event is not None:
            known, link = self._links.get(link_event.link.index), link_event.link
            if known is None:
                return link.name in self._names
            seen = (known.name, known.kind, known.mtu, known.up)
            return link_event.gone or seen != (link.name, link.kind, link.mtu, link.up)
        address_event = decode_address(message)
        return address_event is not None and address_event.address.ip in self._addresses
