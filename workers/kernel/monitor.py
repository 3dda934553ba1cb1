"""Listeners for changes that somebody else makes in the kernel, and a tick for what has no events.

Touches the kernel: netlink listeners and a timerfd in the calling thread's network namespace.

==================== ======================================== ===============================================
state                how a foreign change is noticed          after
==================== ======================================== ===============================================
links, addresses     rtnetlink groups                         at once
routes, pods' rules  rtnetlink groups                         at once
tunnel devices       rtnetlink groups                         at once
FoU ports            no events: `Tick`, `FouDriver.observe`   at most 1 s
iptables (nft)       nfnetlink group of nftables              at once
nftables tables      the same group                           at once
iptables (legacy)    no events: `Tick`, `legacy_table_marks`  at most 1 s
ipsets               no events: `Tick`, `SetDriver.marks`     at most 1 s
==================== ======================================== ===============================================

A listener tells *what* changed, so that its owner can tell what concerns it without reading the kernel again. When the
kernel drops messages (``ENOBUFS``), the listener says `LOST`: everything may have changed. Own writes are recognised by
the port id of the socket that made them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from kube_router.workers.kernel.iprules import RTM_DELRULE, decode_rule
from kube_router.workers.kernel.links import (
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_LINK,
    AddressEvent,
    LinkEvent,
    decode_address,
    decode_link,
)
from kube_router.workers.kernel.netlink import (
    NETLINK_NETFILTER,
    NETLINK_ROUTE,
    Message,
    NetlinkSocket,
    Overflow,
    attribute_map,
    text_of,
)
from kube_router.workers.kernel.routes import RTM_DELROUTE, RTM_NEWROUTE, KernelRoute, parse_route
from kube_router.workers.kernel.tunnels import TunnelEvent, decode_tunnel
from kube_router.workers.model import Family
from kube_router.workers.tunnelfacts import PodRule

RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV4_RULE, RTNLGRP_IPV6_ROUTE, RTNLGRP_IPV6_RULE = 7, 8, 11, 19
ROUTE_GROUPS = (
    RTNLGRP_LINK,
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV4_RULE,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV6_ROUTE,
    RTNLGRP_IPV6_RULE,
)
NFNLGRP_NFTABLES = 7

_NFNL_SUBSYS_NFTABLES = 10
_NFT_MSG_DELTABLE, _NFT_MSG_DELCHAIN, _NFT_MSG_NEWRULE, _NFT_MSG_DELRULE, _NFT_MSG_NEWGEN = 2, 5, 6, 8, 15
_NFT_MSG_GETGEN, _NFTA_GEN_ID = 16, 1
_NFTA_TABLE_NAME, _NFTA_CHAIN_TABLE, _NFTA_CHAIN_NAME, _NFTA_RULE_TABLE, _NFTA_RULE_CHAIN = 1, 1, 3, 1, 2
_NFPROTO = {2: Family.IPV4, 10: Family.IPV6}

LISTEN_BYTES = 4 << 20
"""Receive buffer of a listener: room for the events of some ten thousand foreign routes or rules."""


class Lost(NamedTuple):
    """Messages were dropped: anything may have changed."""


LOST: Final = Lost()


@dataclass(frozen=True, slots=True)
class RouteEvent:
    """A route appeared (or took the place of another) or went; ``portid`` of the socket whose request did it."""

    route: KernelRoute
    gone: bool
    portid: int


@dataclass(frozen=True, slots=True)
class RuleEvent:
    """A policy rule of the pods' form appeared or went."""

    rule: PodRule
    gone: bool


RouteListenerEvent = LinkEvent | TunnelEvent | AddressEvent | RouteEvent | RuleEvent | Lost


class RouteListener:
    """Events of links, addresses, routes and pods' rules; not of what the sockets ``own`` (port ids) did.

    A change of a tunnel device is told twice, as one of a link and as one of a tunnel; the kernel does not say whose.
    """

    def __init__(self, own: Container[int] = ()) -> None:
        self._own = own
        self._netlink = NetlinkSocket(NETLINK_ROUTE, ROUTE_GROUPS, LISTEN_BYTES)

    def fileno(self) -> int:
        """For poll."""
        return self._netlink.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._netlink.close()

    def events(self) -> Iterator[RouteListenerEvent]:
        """Everything since the last call, in order; `LOST` in the place of what was dropped."""
        while True:
            try:
                for message in self._netlink.events():
                    if message.portid not in self._own:
                        yield from _route_events(message)
                return
            except Overflow:
                yield LOST


def _route_events(message: Message) -> Iterator[RouteListenerEvent]:
    if message.type in (RTM_NEWROUTE, RTM_DELROUTE):
        route = parse_route(message)
        if route is not None:
            yield RouteEvent(route, message.type == RTM_DELROUTE, message.portid)
        return
    rule = decode_rule(message)
    if rule is not None:
        yield RuleEvent(rule, message.type == RTM_DELRULE)
        return
    for event in (decode_link(message), decode_tunnel(message), decode_address(message)):
        if event is not None:
            yield event


@dataclass(frozen=True, slots=True)
class NftRemoval:
    """Something was removed from an nftables table: a rule, a chain (then all of its rules) or the table.

    ``chain`` is empty for the table. ``family`` is None for families other than ip and ip6.
    """

    family: Family | None
    table: str
    chain: str


@dataclass(frozen=True, slots=True)
class NftAddition:
    """A rule was added to, or replaced in, a chain of an nftables table."""

    family: Family | None
    table: str
    chain: str


class NftListener:
    """Removals in nftables tables; iptables-nft keeps its tables there, under their iptables names.

    ``additions``: rules that appear as well. ``own``: port ids whose changes are passed by; the first nfnetlink socket
    of a process has its process id for one, and that is the socket by which the iptables programs write.
    """

    def __init__(self, own: Container[int] = (), *, additions: bool = False) -> None:
        self._own, self._additions = own, additions
        self._netlink = NetlinkSocket(NETLINK_NETFILTER, (NFNLGRP_NFTABLES,), LISTEN_BYTES)

    def fileno(self) -> int:
        """For poll."""
        return self._netlink.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._netlink.close()

    def events(self) -> Iterator[NftRemoval | NftAddition | Lost]:
        """Every change since the last call; `LOST` in the place of what was dropped."""
        while True:
            try:
                for message in self._netlink.events():
                    change = None if message.portid in self._own else _nft_change(message)
                    if isinstance(change, NftRemoval) or (change is not None and self._additions):
                        yield change
                return
            except Overflow:
                yield LOST


def nft_generation(netlink: NetlinkSocket) -> int:
    """The number of the namespace's nftables rules: every transaction of anybody makes it another. Raises OSError.

    ``netlink``: a socket of NETLINK_NETFILTER that listens to nothing.
    """
    answer = netlink.query(_NFNL_SUBSYS_NFTABLES << 8 | _NFT_MSG_GETGEN, struct.pack("=BBH", 0, 0, 0))
    return int.from_bytes(attribute_map(answer.payload, 4)[_NFTA_GEN_ID], "big")


_CHANGE_KEYS = {
    _NFT_MSG_DELTABLE: (_NFTA_TABLE_NAME, 0),
    _NFT_MSG_DELCHAIN: (_NFTA_CHAIN_TABLE, _NFTA_CHAIN_NAME),
    _NFT_MSG_NEWRULE: (_NFTA_RULE_TABLE, _NFTA_RULE_CHAIN),
    _NFT_MSG_DELRULE: (_NFTA_RULE_TABLE, _NFTA_RULE_CHAIN),
}


def _nft_change(message: Message) -> NftRemoval | NftAddition | None:
    kind = message.type & 0xFF
    if message.type >> 8 != _NFNL_SUBSYS_NFTABLES or len(message.payload) < 4 or kind not in _CHANGE_KEYS:
        return None
    table_key, chain_key = _CHANGE_KEYS[kind]
    found = attribute_map(message.payload, 4)
    made = NftAddition if kind == _NFT_MSG_NEWRULE else NftRemoval
    return made(
        _NFPROTO.get(message.payload[0]), text_of(found.get(table_key, b"")), text_of(found.get(chain_key, b""))
    )


@dataclass(frozen=True, slots=True)
class TableChange:
    """Somebody changed something in an nftables table."""

    family: Family
    table: str


class TableListener:
    """Changes of whole nftables tables, of any kind; not those that the sockets ``own`` (port ids) made.

    The kernel throws away our own events: a transaction of ours, however large, neither wakes nor fills this socket.
    """

    def __init__(self, tables: Container[tuple[Family, str]], own: Iterable[int]) -> None:
        self._tables = tables
        self._netlink = NetlinkSocket(NETLINK_NETFILTER, (NFNLGRP_NFTABLES,), LISTEN_BYTES)
        self._netlink.ignore(own)

    def fileno(self) -> int:
        """For poll."""
        return self._netlink.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._netlink.close()

    def events(self) -> Iterator[TableChange | Lost]:
        """Every change of the tables since the last call; `LOST` in the place of what was dropped."""
        while True:
            try:
                for message in self._netlink.events():
                    change = _table_change(message)
                    if change is not None and (change.family, change.table) in self._tables:
                        yield change
                return
            except Overflow:
                yield LOST

    def drain(self) -> bool:
        """Read everything that came; whether anything did."""
        return any([*self.events()])  # a list, so that all are read, whatever the first says


def _table_change(message: Message) -> TableChange | None:
    if message.type >> 8 != _NFNL_SUBSYS_NFTABLES or message.type & 0xFF == _NFT_MSG_NEWGEN or len(message.payload) < 4:
        return None
    family = _NFPROTO.get(message.payload[0])
    # The table's name is the first attribute of every kind of object.
    name = attribute_map(message.payload, 4).get(_NFTA_TABLE_NAME)
    return None if family is None or name is None else TableChange(family, text_of(name))


class Tick:
    """A timerfd that becomes readable every ``seconds``; for state that the kernel sends no events of."""

    _libc = ctypes.CDLL(None, use_errno=True)

    def __init__(self, seconds: float = 1.0) -> None:
        self._descriptor: int = self._libc.timerfd_create(1, os.O_NONBLOCK | os.O_CLOEXEC)  # CLOCK_MONOTONIC
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        whole, part = int(seconds), int(seconds % 1 * 1e9)
        setting = (ctypes.c_long * 4)(whole, part, whole, part)  # struct itimerspec: interval, first
        if self._libc.timerfd_settime(self._descriptor, 0, ctypes.byref(setting), None) != 0:
            os.close(self._descriptor)
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def fileno(self) -> int:
        """For poll."""
        return self._descriptor

    def close(self) -> None:
        """Stop ticking."""
        os.close(self._descriptor)

    def elapsed(self) -> bool:
        """Whether it ticked since the last call."""
        with contextlib.suppress(BlockingIOError):
            return len(os.read(self._descriptor, 8)) == 8
        return False


_GET_INFO = 64
"""``IPT_SO_GET_INFO`` and ``IP6T_SO_GET_INFO``: name, valid hooks, hook entries, underflows, number of rules, bytes."""
_GET_INFO_BYTES = 32 + 4 * (1 + 5 + 5 + 1 + 1)
_LEVEL = {Family.IPV4: (socket.AF_INET, socket.IPPROTO_IP), Family.IPV6: (socket.AF_INET6, socket.IPPROTO_IPV6)}
_TABLE_NAMES = {Family.IPV4: "ip_tables_names", Family.IPV6: "ip6_tables_names"}


def legacy_tables(family: Family) -> frozenset[str]:
    """Names of the legacy iptables tables that exist; reading them creates none."""
    # /proc/net is the namespace of the main thread; this one is of the calling thread.
    try:
        return frozenset(Path("/proc/thread-self/net", _TABLE_NAMES[family]).read_text().split())
    except OSError:
        return frozenset()


def legacy_table_mark(family: Family, table: str) -> bytes:
    """A few words that change when rules of a legacy table are added or removed; empty when it does not exist.

    One getsockopt(2), microseconds whatever the size of the table (`iptables-save` of 10,000 rules takes 0.2 s). It
    holds the number of rules, their bytes and where each built-in chain begins and ends, so a rule replaced by one of
    equal size goes unnoticed until the next full check.
    """
    if table not in legacy_tables(family):  # asking for a table that does not exist would create it
        return b""
    number, level = _LEVEL[family]
    with socket.socket(number, socket.SOCK_DGRAM) as asked:
        return _get_info(asked.fileno(), level, table)


def _get_info(descriptor: int, level: int, table: str) -> bytes:
    """getsockopt(2) whose buffer carries the question; Python's own cannot put something in."""
    buffer = ctypes.create_string_buffer(table.encode(), _GET_INFO_BYTES)
    length = ctypes.c_uint(_GET_INFO_BYTES)
    if Tick._libc.getsockopt(descriptor, level, _GET_INFO, buffer, ctypes.byref(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{table}: {os.strerror(number)}")
    return buffer.raw[32 : length.value]
