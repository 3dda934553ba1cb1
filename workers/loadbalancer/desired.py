"""Which addresses a Service is to have: kept, added, dropped, and what is said about it.

Pure: a Service, the pools and who holds which address in, a `Decision` out.

A Service is *ours* when it is of type LoadBalancer and of our class. Its ingress entries that lie in our pools are
ours too; any other entry (a hostname, an address out of the ranges) was put there by somebody else, and then we leave
the Service alone: an address of ours beside another controller's would make the Service's address ambiguous.
An address that a Service holds is never changed, except for another that the Service itself asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kube_router.ipc.messages import Key, Service
from kube_router.workers.loadbalancer import names
from kube_router.workers.loadbalancer.pool import Pool
from kube_router.workers.model import Family, IPAddress
from kube_router.workers.nodefacts import Problem, parse_address

ALLOCATED = "Allocated"
NOT_SERVED = "ServedByAnother"
NO_POOL = "NoAddressRange"
EXHAUSTED = "AddressesExhausted"
BAD_REQUEST = "InvalidLoadBalancerIP"
TAKEN = "LoadBalancerIPInUse"
SHARED = "DuplicateLoadBalancerIP"


@dataclass(frozen=True, slots=True)
class Decision:
    """What one Service is to have.

    ``addresses``: all of ours that it holds afterwards, in the order of its families. ``changed``: they differ from
    what it has. ``reason`` is a condition's reason, ``ok`` its status; ``text`` one line for condition and Event,
    empty when there is nothing to say. ``served`` False: not ours, nothing is written.
    """

    served: bool
    addresses: tuple[IPAddress, ...] = ()
    changed: bool = False
    ok: bool = True
    reason: str = ALLOCATED
    text: str = ""


NOT_OURS = Decision(served=False)


class Ledger:
    """Who holds which address: addresses of Services by owner, reservations among them, and addresses of nodes."""

    def __init__(self) -> None:
        self._holders: dict[IPAddress, set[Key]] = {}
        self._of: dict[Key, tuple[IPAddress, ...]] = {}
        self._closed: frozenset[IPAddress] = frozenset()
        self._freed = False

    def __contains__(self, address: object) -> bool:
        return address in self._holders or address in self._closed

    def __len__(self) -> int:
        return len(self._holders) + len(self._closed)

    def close(self, addresses: Iterable[IPAddress]) -> None:
        """Exactly these addresses are never given out (the nodes')."""
        closed = frozenset(addresses)
        self._freed = self._freed or not self._closed <= closed
        self._closed = closed

    def record(self, key: Key, addresses: Iterable[IPAddress]) -> None:
        """The Service at ``key`` holds exactly ``addresses``; none: forget it."""
        before = self._of.pop(key, ())
        for address in before:
            holders = self._holders[address]
            holders.discard(key)
            if not holders:
                del self._holders[address]
        held = tuple(dict.fromkeys(addresses))
        for address in held:
            self._holders.setdefault(address, set()).add(key)
        if held:
            self._of[key] = held
        self._freed = self._freed or not set(before) <= set(held)

    def take_freed(self) -> bool:
        """Whether somebody lost an address since the last call: who waits for one may have it now."""
        freed, self._freed = self._freed, False
        return freed

    def others(self, address: IPAddress, key: Key) -> frozenset[Key]:
        """The Services that hold ``address``, without the one at ``key``."""
        return frozenset(self._holders.get(address, ())) - {key}

    def is_nodes(self, address: IPAddress) -> bool:
        """Whether it is an address of a node."""
        return address in self._closed


def is_served(service: Service, default_class: bool) -> bool:
    """Whether the Service is ours; ``default_class`` is ``--loadbalancer-default-class``."""
    if service.type != "LoadBalancer":
        return False
    wanted = service.load_balancer_class
    return wanted == names.CLASS or (default_class and wanted in names.DEFAULT_CLASSES)


def held_addresses(service: Service) -> tuple[IPAddress, ...]:
    """All addresses that nobody else may get because of this Service: external ones and those of its ingress."""
    return addresses_of((*service.external_ips, *_ips(service)))


def addresses_of(texts: Iterable[str]) -> tuple[IPAddress, ...]:
    """The addresses among ``texts``, in order; what is none is left out."""
    return tuple(address for address in map(_parsed, texts) if address is not None)


def _parsed(text: str) -> IPAddress | None:
    try:
        return parse_address(text)
    except ValueError:
        return None


def wanted_families(service: Service, enabled: Iterable[Family]) -> tuple[Family, ...]:
    """The families in the Service's own order, as far as they are enabled; without any, the first enabled one."""
    enabled = tuple(enabled)
    by_name = {"IPv4": Family.IPV4, "IPv6": Family.IPV6}
    listed = tuple(by_name[name] for name in service.ip_families if name in by_name)
    if not listed:
        listed = enabled[:1]
    return tuple(family for family in dict.fromkeys(listed) if family in enabled)


def decide(
    service: Service,
    pools: Mapping[Family, Pool],
    ledger: Ledger,
    reserved: Iterable[IPAddress] = (),
    *,
    default_class: bool,
) -> Decision:
    """What ``service`` is to have.

    ``reserved``: addresses that were chosen for it before and are not seen in it yet; they are chosen again. The
    ledger must hold them under its key, and what the Service has.
    """
    if not is_served(service, default_class):
        return NOT_OURS
    ours, foreign = _split(service, pools)
    where = f"service {service.key}"
    if foreign:
        text = f"{where}: status.loadBalancer has {foreign}, which no --loadbalancer-ip-range holds: another serves it"
        return Decision(True, tuple(ours.values()), False, False, NOT_SERVED, text)
    try:
        requested = _requested(service, pools, where)
        chosen = _choose(service, pools, ledger, ours, requested, tuple(reserved), where)
    except _Refused as refusal:
        return Decision(True, tuple(ours.values()), False, False, refusal.reason, str(refusal))
    addresses = tuple(chosen.values())
    shared = _shared(service, ledger, addresses, where)
    return Decision(True, addresses, addresses != tuple(_in_order(service, pools)), not shared, *_said(shared))


def _said(shared: str) -> tuple[str, str]:
    return (SHARED, shared) if shared else (ALLOCATED, "")


class _Refused(Exception):
    """The Service gets nothing (more) now; ``reason`` is the condition's."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def _in_order(service: Service, pools: Mapping[Family, Pool]) -> Iterable[IPAddress]:
    return (address for address in addresses_of(_ips(service)) if _in(pools, address))


def _ips(service: Service) -> Iterable[str]:
    return (entry.ip for entry in service.ingress if entry.ip)


def _in(pools: Mapping[Family, Pool], address: IPAddress) -> bool:
    pool = pools.get(Family(address.version))
    return pool is not None and address in pool


def _split(service: Service, pools: Mapping[Family, Pool]) -> tuple[dict[Family, IPAddress], str]:
    """(the first address of ours a family, the first entry that is not ours or empty)."""
    ours: dict[Family, IPAddress] = {}
    for entry in service.ingress:
        address = _parsed(entry.ip) if entry.ip else None
        if address is None or not _in(pools, address):
            return ours, entry.hostname or entry.ip or "an empty entry"
        ours.setdefault(Family(address.version), address)
    return ours, ""


def _requested(service: Service, pools: Mapping[Family, Pool], where: str) -> dict[Family, IPAddress]:
    text = service.annotations.get(names.REQUESTED, "").strip()
    key = f"annotation {names.REQUESTED}" if text else "spec.loadBalancerIP"
    requested: dict[Family, IPAddress] = {}
    for item in filter(None, map(str.strip, (text or service.load_balancer_ip).split(","))):
        address = _parsed(item)
        if address is None:
            raise _Refused(BAD_REQUEST, f"{where}: {key}: {item!r} is not an IP address")
        family = Family(address.version)
        if family not in wanted_families(service, pools):
            raise _Refused(BAD_REQUEST, f"{where}: {key}: {item!r} is {family}, which the Service does not have")
        if family in requested:
            raise _Refused(BAD_REQUEST, f"{where}: {key}: {item!r} is a second {family} address")
        if not _in(pools, address):
            rule = "is not a usable address of a --loadbalancer-ip-range"
            raise _Refused(BAD_REQUEST, f"{where}: {key}: {item!r} {rule}")
        requested[family] = address
    return requested


def _choose(
    service: Service,
    pools: Mapping[Family, Pool],
    ledger: Ledger,
    ours: Mapping[Family, IPAddress],
    requested: Mapping[Family, IPAddress],
    reserved: tuple[IPAddress, ...],
    where: str,
) -> dict[Family, IPAddress]:
    """An address for each family; raises `_Refused` when the policy's families cannot all be had."""
    wanted = wanted_families(service, pools)
    chosen: dict[Family, IPAddress] = {}
    refused: _Refused | None = None
    for family in wanted:
        try:
            chosen[family] = _address(service.key, family, pools[family], ledger, ours, requested, reserved, where)
        except _Refused as refusal:
            refused = refused or refusal
    if refused is not None and (not chosen or service.ip_family_policy != "PreferDualStack"):
        raise refused
    return chosen


def _address(
    key: Key,
    family: Family,
    pool: Pool,
    ledger: Ledger,
    ours: Mapping[Family, IPAddress],
    requested: Mapping[Family, IPAddress],
    reserved: tuple[IPAddress, ...],
    where: str,
) -> IPAddress:
    wish = requested.get(family)
    if wish is not None and wish != ours.get(family):
        if others := sorted(ledger.others(wish, key)):
            raise _Refused(TAKEN, f"{where}: requested address {wish} is held by service {others[0]}")
        if ledger.is_nodes(wish):
            raise _Refused(TAKEN, f"{where}: requested address {wish} is a node's")
        return wish
    if family in ours:
        return ours[family]
    for address in reserved:
        if address.version == family and address in pool and not ledger.others(address, key):
            return address
    if not pool:
        raise _Refused(NO_POOL, f"{where}: there is no {family} range in --loadbalancer-ip-range")
    free = pool.next_free(ledger, len(ledger))
    if free is None:
        raise _Refused(EXHAUSTED, f"{where}: no {family} address of --loadbalancer-ip-range is free")
    return free


def _shared(service: Service, ledger: Ledger, addresses: Iterable[IPAddress], where: str) -> str:
    for address in addresses:
        if others := sorted(ledger.others(address, service.key)):
            return f"{where}: its address {address} is also held by service {others[0]}"
    return ""


def problem(decision: Decision) -> Problem | None:
    """What an Event should say."""
    return Problem(decision.reason, decision.text) if decision.text else None
