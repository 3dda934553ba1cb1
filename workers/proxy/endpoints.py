"""The endpoints of a Service's ports: slices in, what may be used of them out.

Pure. By KEP-1669, within the scope that the traffic policy gives: endpoints that are ready; if there are none, those
that still serve while they terminate. A condition that a slice leaves out is the one that the API documents for it:
ready unless terminating, serving if ready. By topology hints, when every usable endpoint has one and this zone is among
them: the endpoints of this zone. An endpoint that several slices have counts once, with the best of its conditions.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kube_router.ipc.messages import Endpoint as SliceEndpoint
from kube_router.ipc.messages import EndpointPort, EndpointSlice
from kube_router.workers.model import Family
from kube_router.workers.nodefacts import Problem, parse_address
from kube_router.workers.proxy import names
from kube_router.workers.proxy.model import PROTOCOLS, Endpoint, PoolKey, Scope

INVALID = "InvalidEndpointSlice"
_FAMILIES = {"IPv4": Family.IPV4, "IPv6": Family.IPV6}
_LAST_PORT = 65535
_OCTET, _GROUP = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)", r"[1-9a-f][0-9a-f]{0,3}"
_PLAIN = {
    Family.IPV4: re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}", re.ASCII),
    Family.IPV6: re.compile(rf"{_GROUP}(?::{_GROUP}){{0,4}}::(?:{_GROUP}(?::{_GROUP}){{0,4}})?"),
}
"""Addresses that are canonical as they stand. Of IPv6: one gap, no zero beside it, and not too long (below)."""
_MOST_COLONS = 6
_PECULIAR = ("0.", "127.", "169.254.", "22", "23", "24", "25", "fe8", "fe9", "fea", "feb", "ff")
"""How those begin that need a closer look: loopback, link-local, multicast, reserved (and some that need none)."""


class Usable(enum.IntEnum):
    """How far an endpoint can be used."""

    NOT = 0
    LEAVING = 1
    """It terminates and still serves: better than nobody."""
    READY = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where this node is. ``zone`` may be empty: then hints of zones do not count."""

    node: str
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Selected:
    """The endpoints of a Service. ``local``: how many addresses are ready on this node, for health checks."""

    pools: dict[PoolKey, tuple[Endpoint, ...]]
    local: int
    problems: tuple[Problem, ...] = ()


class _Candidate:
    """An endpoint of one port as far as it was found in slices."""

    __slots__ = ("here", "hints", "usable")

    def __init__(self, usable: Usable, here: bool, hints: tuple[str, ...]) -> None:
        self.usable, self.here, self.hints = usable, here, hints


_ByPort = dict[tuple[Family, str, str], dict[tuple[str, int], _Candidate]]
"""(family, port name, protocol) → (address, port) → what is known."""


def usable(endpoint: SliceEndpoint, *, always: bool) -> Usable:
    """How far ``endpoint`` can be used; ``always``: its Service publishes what is not ready."""
    terminating = endpoint.terminating is True
    ready = endpoint.ready if endpoint.ready is not None else not terminating
    if ready or always:
        return Usable.READY
    serving = endpoint.serving if endpoint.serving is not None else ready
    return Usable.LEAVING if serving and terminating else Usable.NOT


def select(slices: Iterable[EndpointSlice], wanted: Iterable[PoolKey], place: Place, *, always: bool) -> Selected:
    """The pools ``wanted`` of one Service from its slices; each pool sorted. Never raises on bad input."""
    problems: list[Problem] = []
    found: _ByPort = {}
    for item in slices:
        if item.address_type in _FAMILIES and names.HEADLESS_LABEL not in item.labels:
            _read_slice(item, place, found, problems, always=always)
    pools: dict[PoolKey, tuple[Endpoint, ...]] = {}
    for key in wanted:
        candidates = found.get((key.family, key.owner.port, key.owner.protocol))
        pools[key] = _pool(candidates, key.scope, place) if candidates else ()
    return Selected(pools, _local_addresses(found), tuple(problems))


def _read_slice(item: EndpointSlice, place: Place, found: _ByPort, problems: list[Problem], *, always: bool) -> None:
    family = _FAMILIES[item.address_type]
    ports = [*_ports(item, problems)]
    tables = [found.setdefault((family, port.name, port.protocol.lower()), {}) for port in ports]
    for endpoint in item.endpoints:
        state = usable(endpoint, always=always)
        if state is Usable.NOT:
            continue
        here = endpoint.node_name == place.node
        for text in endpoint.addresses:
            address = canonical(text, family)
            if address is None:
                rule = f"is no {family} address of a pod; not used"
                problems.append(_problem(item, "endpoints.addresses", text, rule))
                continue
            for port, table in zip(ports, tables, strict=True):
                identity = (address, port.port or 0)
                known = table.get(identity)
                if known is None or state > known.usable:
                    table[identity] = _Candidate(state, here, endpoint.hint_zones)


def _ports(item: EndpointSlice, problems: list[Problem]) -> Iterator[EndpointPort]:
    for port in item.ports:
        if port.protocol.lower() not in PROTOCOLS:
            problems.append(_problem(item, "ports.protocol", port.protocol, "is none of TCP, UDP, SCTP; not used"))
        elif port.port is None:
            problems.append(_problem(item, "ports.port", None, f"of port {port.name!r} stands for all ports; not used"))
        elif not 0 < port.port <= _LAST_PORT:
            problems.append(_problem(item, "ports.port", port.port, "is no port; not used"))
        else:
            yield port


def _pool(candidates: dict[tuple[str, int], _Candidate], scope: Scope, place: Place) -> tuple[Endpoint, ...]:
    local = scope is Scope.LOCAL
    ready = [
        (identity, one)
        for identity, one in candidates.items()
        if one.usable is Usable.READY and (one.here or not local)
    ]
    if not ready:
        chosen = [
            (identity, one)
            for identity, one in candidates.items()
            if one.usable is Usable.LEAVING and (one.here or not local)
        ]
    else:
        chosen = ready if local else _of_zone(ready, place.zone)
    return tuple(sorted(Endpoint(address, port, one.here) for (address, port), one in chosen))


def _of_zone(ready: list[tuple[tuple[str, int], _Candidate]], zone: str) -> list[tuple[tuple[str, int], _Candidate]]:
    """Those that are meant for this zone; all of them where hints are not complete or leave this zone without any."""
    if not zone or not all(one.hints for _, one in ready):
        return ready
    return [item for item in ready if zone in item[1].hints] or ready


def _local_addresses(found: _ByPort) -> int:
    """Ready addresses of this node; a pod has one a family, so families are not added up."""
    by_family: dict[Family, set[str]] = {}
    for (family, _, _), candidates in found.items():
        addresses = by_family.setdefault(family, set())
        addresses.update(address for (address, _), one in candidates.items() if one.here and one.usable is Usable.READY)
    return max(map(len, by_family.values()), default=0)


def canonical(text: str, family: Family) -> str | None:
    """The canonical text of an address that an endpoint of a family can have; None for any other."""
    if _PLAIN[family].fullmatch(text) and text.count(":") <= _MOST_COLONS and not text.startswith(_PECULIAR):
        return text  # nearly always
    found = _canonical(text)
    return found if found is not None and (":" in found) == (family is Family.IPV6) else None


@functools.lru_cache(4096)
def _canonical(text: str) -> str | None:
    try:
        address = parse_address(text)
    except ValueError:
        return None
    if address.is_unspecified or address.is_loopback or address.is_link_local or address.is_multicast:
        return None
    found = str(address)
    return text if found == text else found


def _problem(item: EndpointSlice, key: str, value: object, rule: str) -> Problem:
    return Problem(INVALID, f"endpointslice {item.key}: {key}: {value!r} {rule}")
