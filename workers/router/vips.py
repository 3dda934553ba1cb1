"""Which Service addresses (VIPs) this node announces by BGP, kept up to date change by change.

Pure: Services, EndpointSlices and the own node's addresses in, `Vips` out. The rules of one Service are in
``viprules.py``; here they meet the endpoints and each other.

An *own endpoint* is one that a slice names as ready and not terminating, on this node: by ``nodeName``, or, where the
slice names no node, by an address that is one of the node's. A condition that is missing means ready and not
terminating, as the API has it. A VIP that needs an own endpoint needs one of its own family. So it is withdrawn when
its last local pod begins to terminate, while that pod still answers.

A Service without slices has no endpoints, and that is all: no other Service is touched. Two Services may have an
address in common: it is announced as long as one of them wants it.

Cost: a changed slice is walked once, a changed Service judged once; what has neither own endpoints nor addresses to
announce is not remembered. The sets are made anew only when a member comes or goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kube_router.ipc.messages import Endpoint, EndpointSlice, Key, Service
from kube_router.workers.model import Family
from kube_router.workers.nodefacts import NodeFacts, Problem, parse_address
from kube_router.workers.router.viprules import NOTHING, ServiceVips, VipRules
from kube_router.workers.settings import Settings

if TYPE_CHECKING:
    from kube_router.ipc.replica import Changes

LEADER_ANNOTATION = "control-plane.alpha.kubernetes.io/leader"
"""On a slice or Endpoints object that is a lock of a leader election, not of a Service."""
ADDRESS_TYPES = {"IPv4": Family.IPV4, "IPv6": Family.IPV6}
SERVICES_TOLD = 50
"""Problems of so many Services are told line by line; of the others, their number."""

NO_FAMILY: frozenset[Family] = frozenset()


@dataclass(frozen=True, slots=True)
class Vips:
    """Service addresses in canonical text, both families together.

    ``advertised``: announced by this node now. ``known``: announced by this node or by another, as the rules have it;
    no peer may teach them to us.
    """

    advertised: frozenset[str] = frozenset()
    known: frozenset[str] = frozenset()


NO_VIPS = Vips()


@dataclass(frozen=True, slots=True)
class ServiceProblem:
    """Something about a Service that an operator should mend."""

    key: Key
    uid: str
    problem: Problem


class _Counted:
    """A set of addresses in which each stands for as many Services as want it."""

    __slots__ = ("_changed", "_counts", "members")

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._changed = False
        self.members: frozenset[str] = frozenset()

    def replace(self, before: frozenset[str], after: frozenset[str]) -> None:
        """One Service wanted ``before`` and wants ``after``."""
        for address in before - after:
            self._counts[address] -= 1
            if not self._counts[address]:
                del self._counts[address]
                self._changed = True
        for address in after - before:
            self._changed = self._changed or address not in self._counts
            self._counts[address] += 1

    def settle(self) -> None:
        """Make ``members`` anew if it is another set now."""
        if self._changed and self.members != self._counts.keys():
            self.members = frozenset(self._counts)
        self._changed = False

    def clear(self) -> None:
        """Nobody wants anything; ``members`` stay until `settle`."""
        self._counts.clear()
        self._changed = True


class VipTable:
    """The VIPs of one node."""

    def __init__(self, settings: Settings) -> None:
        self._rules = VipRules(settings)
        self._node = settings.node_name
        self._own_addresses: frozenset[str] = frozenset()
        self._advertised, self._known = _Counted(), _Counted()
        self._clear()
        self.vips = Vips(self._advertised.members, self._known.members)
        self.problems: tuple[ServiceProblem, ...] = ()
        self.lines: tuple[str, ...] = ()

    def _clear(self) -> None:
        self._services: dict[Key, ServiceVips] = {}
        self._problems: dict[Key, tuple[ServiceProblem, ...]] = {}
        self._services_of_slices: dict[Key, Key] = {}
        self._own_slices: dict[Key, dict[Key, frozenset[Family]]] = {}
        self._announced: dict[Key, frozenset[str]] = {}
        self._advertised.clear()
        self._known.clear()

    def update(
        self,
        own: NodeFacts,
        services: Mapping[Key, Service],
        slices: Mapping[Key, EndpointSlice],
        changes: Changes | None,
    ) -> Vips:
        """The VIPs after ``changes``: what differs from the last call by kind and key; None: look at everything.

        The result is the same object as long as no address comes or goes.
        """
        addresses = frozenset(map(str, own.addresses))
        if changes is None or addresses != self._own_addresses:
            self._own_addresses = addresses
            self._clear()
            self._take(services, slices, services, slices)
            self._tell()
        else:
            changed = changes.get("services", {})
            self._take(services, slices, changed, changes.get("endpointslices", {}))
            if changed:
                self._tell()
        return self.vips

    def _take(
        self,
        services: Mapping[Key, Service],
        slices: Mapping[Key, EndpointSlice],
        changed_services: Iterable[Key],
        changed_slices: Iterable[Key],
    ) -> None:
        touched = {owner for key in changed_slices for owner in self._take_slice(key, slices.get(key))}
        for key in changed_services:
            if self._take_service(key, services.get(key)):
                touched.add(key)
        for key in touched:
            self._count(key)
        self._settle()

    def _take_slice(self, key: Key, item: EndpointSlice | None) -> Iterable[Key]:
        """The Services whose own endpoints may be others now; none when the slice says of this node what it said."""
        before = self._services_of_slices.get(key)
        families = NO_FAMILY if item is None else self._families_served(item)
        after = f"{item.namespace}/{item.service}" if item is not None and families else None
        if before == after and (after is None or self._own_slices[after][key] == families):
            return ()
        if before is not None:
            del self._services_of_slices[key]
            of_service = self._own_slices[before]
            del of_service[key]
            if not of_service:
                del self._own_slices[before]
        if after is not None:
            self._services_of_slices[key] = after
            self._own_slices.setdefault(after, {})[key] = families
        return [owner for owner in (before, after) if owner is not None]

    def _families_served(self, item: EndpointSlice) -> frozenset[Family]:
        """The family of a slice that has an own endpoint, else nothing."""
        family = ADDRESS_TYPES.get(item.address_type)
        if family is None or not item.service or LEADER_ANNOTATION in item.annotations:
            return NO_FAMILY
        node = self._node
        for endpoint in item.endpoints:
            if endpoint.node_name is not None and endpoint.node_name != node:
                continue
            if endpoint.ready is not False and not endpoint.terminating and self._is_own(endpoint, family):
                return frozenset({family})
        return NO_FAMILY

    def _is_own(self, endpoint: Endpoint, family: Family) -> bool:
        """Whether it has an address of the family, which is the node's if no node is named."""
        for text in endpoint.addresses:
            try:
                address = parse_address(text)
            except ValueError:
                continue
            if address.version == family and (endpoint.node_name is not None or str(address) in self._own_addresses):
                return True
        return False

    def _take_service(self, key: Key, item: Service | None) -> bool:
        """Judge a Service anew; False when the rules say of it what they said."""
        before = self._services.get(key, NOTHING)
        after = NOTHING if item is None else self._rules.of(item)
        if before == after:
            return False
        if item is not None and after is not NOTHING:
            self._services[key] = after
        else:
            self._services.pop(key, None)
        self._problems.pop(key, None)
        if item is not None and after.problems:
            self._problems[key] = tuple(ServiceProblem(key, item.uid, problem) for problem in after.problems)
        self._known.replace(before.everywhere | before.local, after.everywhere | after.local)
        return True

    def _count(self, key: Key) -> None:
        """Let a Service's part of what is announced be what its rules and endpoints say now."""
        vips = self._services.get(key, NOTHING)
        after = vips.everywhere
        if vips.local and (own := self._own_slices.get(key)):
            families = NO_FAMILY.union(*own.values())
            after |= {address for address in vips.local if _family(address) in families}
        before = self._announced.pop(key, frozenset())
        if after:
            self._announced[key] = after
        self._advertised.replace(before, after)

    def _settle(self) -> None:
        self._advertised.settle()
        self._known.settle()
        if self._advertised.members is not self.vips.advertised or self._known.members is not self.vips.known:
            self.vips = Vips(self._advertised.members, self._known.members)

    def _tell(self) -> None:
        """Put the problems in order of their Services; the number of lines is bounded."""
        keys = sorted(self._problems)
        self.problems = tuple(item for key in keys[:SERVICES_TOLD] for item in self._problems[key])
        more = len(keys) - SERVICES_TOLD
        lines = [item.problem.text for item in self.problems]
        self.lines = (*lines, *([f"{more} more Services with such faults are not shown"] if more > 0 else []))


def _family(address: str) -> Family:
    """Of an address in canonical text."""
    return Family.IPV6 if ":" in address else Family.IPV4
