"""Routes of one table, the main one or the overlay's, over rtnetlink.

Touches the kernel. Ours are the routes of protocol 17, whoever wrote them; nothing else is ever replaced or removed.
Devices are told by name here and by number in the kernel. The kernel's own rules make that harder than it looks:

- ``NLM_F_REPLACE`` replaces the first route of the same destination and metric *whatever its protocol*. So a new route
  is created with ``NLM_F_EXCL``, which the kernel refuses when there is one; replace is used only where the route in
  place is known to be ours.
- Without ``NLM_F_EXCL`` and ``NLM_F_REPLACE`` IPv6 appends a second next hop to the route that is there; with
  ``NLM_F_REPLACE`` it replaces all of its next hops (``net/ipv6/ip6_fib.c``, ``fib6_add_rt2node``).
- IPv6 turns "no metric" into 1024.
- IPv4 drops routes without an event when their link goes down or an address goes (``fib_sync_down_dev``): a listener
  must watch links and addresses too.
- Deleting with a protocol in the request removes only a route of that protocol.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kube_router.workers.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    NetlinkError,
    NetlinkSocket,
    Request,
    attribute,
    attributes,
    nested,
)
from kube_router.workers.model import Family
from kube_router.workers.routefacts import ActualRoutes, Prefix, Route, RoutePlan, Stray

PROTOCOL = 17
"""``rtm_protocol`` of every route of ours, as upstream (0x11)."""
MAIN_TABLE = 254
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26

_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 4, 5, 6, 7
_RTA_METRICS, _RTA_MULTIPATH, _RTA_TABLE = 8, 9, 15
_RTAX_MTU, _RTAX_ADVMSS = 2, 8
_NO_DEVICE = 0x7FFFFFFF
"""The index of no device: the kernel answers a route over it with ENODEV."""
_RTM_F_CLONED = 0x200
_RTN_UNICAST = 1
_SCOPE_LINK, _SCOPE_NOWHERE = 253, 255
_RTMSG = struct.Struct("=BBBBBBBBI")
_U32 = struct.Struct("=I")
AF = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_FAMILY = {int(number): family for family, number in AF.items()}
_DEFAULT_METRIC = {Family.IPV4: 0, Family.IPV6: 1024}


@dataclass(frozen=True, slots=True)
class RouteFailure:
    """One refused step of a plan."""

    step: str
    prefix: Prefix
    way: str
    error: NetlinkError


@dataclass(frozen=True, slots=True)
class AppliedRoutes:
    """What a plan came to: routes written and removed, and each step that the kernel refused."""

    added: int = 0
    removed: int = 0
    failures: tuple[RouteFailure, ...] = ()


@dataclass(frozen=True, slots=True)
class KernelRoute:
    """One route as a message tells it. ``gateway`` and ``index`` (of the device) are empty for several next hops."""

    prefix: Prefix
    family: Family
    table: int
    protocol: int
    metric: int
    gateway: str
    cloned: bool
    index: int = 0
    source: str = ""
    mtu: int = 0
    advmss: int = 0


def parse_route(message: Message) -> KernelRoute | None:
    """A route message; None when it is of another family than IPv4 and IPv6 or not understood."""
    payload = message.payload
    if len(payload) < _RTMSG.size:
        return None
    number, length, _, _, table, protocol, _, _, flags = _RTMSG.unpack_from(payload)
    family = _FAMILY.get(number)
    if family is None:
        return None
    destination: bytes | memoryview = bytes(family.bits // 8)
    gateway, source, metric, index, several, metrics = "", "", 0, 0, False, {}
    for kind, value in attributes(payload, _RTMSG.size):
        if kind == _RTA_DST:
            destination = value
        elif kind == _RTA_GATEWAY:
            gateway = address_text(family, value)
        elif kind == _RTA_OIF:
            (index,) = _U32.unpack(value)
        elif kind == _RTA_PRIORITY:
            (metric,) = _U32.unpack(value)
        elif kind == _RTA_PREFSRC:
            source = address_text(family, value)
        elif kind == _RTA_METRICS:
            metrics = {each: _U32.unpack(number)[0] for each, number in attributes(value) if len(number) == _U32.size}
        elif kind == _RTA_TABLE:
            (table,) = _U32.unpack(value)
        elif kind == _RTA_MULTIPATH:
            several = True
    prefix = Prefix(f"{address_text(family, destination)}/{length}")
    return KernelRoute(
        prefix,
        family,
        table,
        protocol,
        metric,
        gateway="" if several else gateway,
        cloned=bool(flags & _RTM_F_CLONED),
        index=0 if several else index,
        source=source,
        mtu=metrics.get(_RTAX_MTU, 0),
        advmss=metrics.get(_RTAX_ADVMSS, 0),
    )


def address_text(family: Family, packed: bytes | memoryview) -> str:
    """Canonical text of a packed address, as `ipaddress` writes it."""
    text = socket.inet_ntop(AF[family], packed)
    # inet_ntop writes some IPv6 addresses with a dotted tail, ipaddress does not.
    return str(ipaddress.IPv6Address(bytes(packed))) if ":" in text and "." in text else text


def _pack(text: str) -> tuple[Family, bytes]:
    family = Family.IPV6 if ":" in text else Family.IPV4
    return family, socket.inet_pton(AF[family], text)


def only_protocol(prefix: Prefix, protocol: int, route: Route) -> bool:
    """The mark of our routes."""
    return protocol == PROTOCOL


class RouteDriver:
    """Observes and applies routes of one table through one socket; `portid` marks the events that its writes cause.

    ``ours`` judges (prefix, protocol, route); what it takes for ours beyond protocol 17 can be replaced, not deleted.
    """

    def __init__(self, table: int = MAIN_TABLE, ours: Callable[[Prefix, int, Route], bool] = only_protocol) -> None:
        self._table, self._ours = table, ours
        self._netlink = NetlinkSocket(NETLINK_ROUTE)
        self.portid = self._netlink.portid

    @property
    def writes(self) -> int:
        """Messages sent to change something."""
        return self._netlink.writes

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def observe(self) -> ActualRoutes:
        """Our routes of both families, and the prefixes where somebody else has one."""
        ours: dict[Prefix, Route] = {}
        strays: list[Stray] = []
        foreign: set[Prefix] = set()
        devices: dict[int, str] = {}
        for route in self._all():
            found = _as_ours(route, devices)
            if not self._ours(route.prefix, route.protocol, found):
                foreign.add(route.prefix)
            elif route.metric == _DEFAULT_METRIC[route.family] and route.prefix not in ours:
                ours[route.prefix] = found
            else:
                strays.append(Stray(route.prefix, route.metric, route.gateway))
        return ActualRoutes(ours, tuple(strays), frozenset(foreign))

    def _all(self) -> Iterator[KernelRoute]:
        for family, number in AF.items():
            header = _RTMSG.pack(number, 0, 0, 0, self._table, 0, 0, 0, 0)
            try:
                messages = self._netlink.dump(RTM_GETROUTE, header + attribute(_RTA_TABLE, _U32.pack(self._table)))
            except NetlinkError as error:
                if error.errno == errno.ENOENT:  # the table does not exist before its first route
                    continue
                raise
            for message in messages:
                route = parse_route(message) if message.type == RTM_NEWROUTE else None
                # A kernel without IPv6 answers the IPv6 dump with IPv4's table.
                if route and route.family == family and route.table == self._table and not route.cloned:
                    yield route

    def apply(self, plan: RoutePlan) -> AppliedRoutes:
        """Execute the steps in their order; one refused step stops no other."""
        steps = list(self._requests(plan))
        errors = self._netlink.batch([request for _, _, _, request in steps])
        failures = []
        gone = 0
        for index, error in errors.items():
            step, prefix, way, _ = steps[index]
            if step == "delete" and error.errno == errno.ESRCH:  # already gone: what was wanted
                gone += 1
                continue
            failures.append(RouteFailure(step, prefix, way, error))
        failed_deletes = sum(failure.step == "delete" for failure in failures)
        deletes = len(plan.delete) + len(plan.strays)
        return AppliedRoutes(
            added=len(plan.add) + len(plan.replace) - (len(failures) - failed_deletes),
            removed=deletes - failed_deletes - gone,
            failures=tuple(failures),
        )

    def _requests(self, plan: RoutePlan) -> Iterator[tuple[str, Prefix, str, Request]]:
        table, devices = self._table, dict[str, int]()
        for prefix, route in plan.add:
            yield "add", prefix, route.way, _new_route(table, prefix, route, NLM_F_CREATE | NLM_F_EXCL, devices)
        for prefix, route in plan.replace:
            yield "replace", prefix, route.way, _new_route(table, prefix, route, NLM_F_CREATE | NLM_F_REPLACE, devices)
        for prefix in plan.delete:
            yield "delete", prefix, "", _delete_route(table, prefix)
        for stray in plan.strays:
            way = f"via {stray.gateway}" if stray.gateway else ""
            yield "delete", stray.prefix, way, _delete_route(table, stray.prefix, stray.metric, stray.gateway)


def _as_ours(route: KernelRoute, devices: dict[int, str]) -> Route:
    """A kernel route in our words; ``devices`` remembers names by index. By a gateway, the kernel picks the device."""
    if route.gateway or not route.index:
        return Route(route.gateway, source=route.source, mtu=route.mtu, advmss=route.advmss)
    if route.index not in devices:
        try:
            devices[route.index] = socket.if_indextoname(route.index)
        except OSError:  # gone since, and the route with it
            devices[route.index] = "?"
    return Route("", devices[route.index], route.source, route.mtu, route.advmss)


def _new_route(table: int, prefix: Prefix, route: Route, flags: int, devices: dict[str, int]) -> Request:
    destination, _, length = prefix.partition("/")
    family, packed = _pack(destination)
    scope = _SCOPE_LINK if route.device and family is Family.IPV4 else 0
    payload = _RTMSG.pack(AF[family], int(length), 0, 0, table, PROTOCOL, scope, _RTN_UNICAST, 0)
    payload += attribute(_RTA_DST, packed)
    if route.device:
        if route.device not in devices:
            devices[route.device] = _index(route.device)
        payload += attribute(_RTA_OIF, _U32.pack(devices[route.device]))
    else:
        payload += attribute(_RTA_GATEWAY, _pack(route.gateway)[1])
    if route.source:
        payload += attribute(_RTA_PREFSRC, _pack(route.source)[1])
    metrics = [
        attribute(kind, _U32.pack(value))
        for kind, value in ((_RTAX_MTU, route.mtu), (_RTAX_ADVMSS, route.advmss))
        if value
    ]
    return Request(RTM_NEWROUTE, flags, payload + (nested(_RTA_METRICS, *metrics) if metrics else b""))


def _index(device: str) -> int:
    try:
        return socket.if_nametoindex(device)
    except OSError:
        return _NO_DEVICE


def _delete_route(table: int, prefix: Prefix, metric: int = 0, gateway: str = "") -> Request:
    destination, _, length = prefix.partition("/")
    family, packed = _pack(destination)
    payload = _RTMSG.pack(AF[family], int(length), 0, 0, table, PROTOCOL, _SCOPE_NOWHERE, 0, 0)
    payload += attribute(_RTA_DST, packed)
    payload += attribute(_RTA_PRIORITY, _U32.pack(metric or _DEFAULT_METRIC[family]))
    if gateway:
        payload += attribute(_RTA_GATEWAY, _pack(gateway)[1])
    return Request(RTM_DELROUTE, 0, payload)


def describe(failures: Iterable[RouteFailure]) -> list[str]:
    """One line for each kind of refusal and way, with a count: a dead link may refuse thousands of routes."""
    groups: dict[tuple[str, str, str], list[Prefix]] = {}
    for failure in failures:
        key = (failure.step, failure.way, str(failure.error.strerror))
        groups.setdefault(key, []).append(failure.prefix)
    lines = []
    for (step, way, reason), prefixes in sorted(groups.items()):
        what = prefixes[0] if len(prefixes) == 1 else f"{len(prefixes)} routes, first {min(prefixes)}"
        lines.append(f"{step} {what}{f' {way}' if way else ''}: {reason}")
    return lines
