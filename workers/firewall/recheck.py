"""Which open connections a change has forbidden: by the ruleset that now stands, for the addresses that it concerns.

Pure. A change forbids something in two ways: a pod's policies are others than before, or a peer has left a set. So the
flows to look at are those of the pods and of the members that went; a change that only adds concerns none. What is
judged is what a first packet would meet: egress of the pod that opened the connection, ingress of the pod that it
reaches behind all translation, each only on the pod's own node.
"""

from __future__ import annotations

import bisect
import functools
import ipaddress
from collections.abc import Collection, Iterable

from kube_router.workers.firewall.rules import (
    BlockSet,
    Changed,
    Clause,
    Direction,
    Frame,
    LocalPod,
    Member,
    PodSet,
    PortRange,
    PortSet,
    Ruleset,
)
from kube_router.workers.flowfacts import Flow

ALWAYS_ALLOWED = frozenset({"ICMP"})
"""Requests and errors of ICMP pass whatever a policy says, and others have no connection to be cut."""


def concerned(ruleset: Ruleset, changed: Changed) -> frozenset[str]:
    """Addresses whose flows may now be forbidden."""
    if changed.everything:
        return frozenset(address for pod in ruleset.pods.values() if _isolated(pod) for address in pod.addresses)
    found: set[str] = set()
    for by_family in changed.removed.values():
        found.update(member.partition(",")[0] for left in by_family.values() for member in left)
    for key, pod in ruleset.pods.items():
        policies = {*(pod.ingress or ()), *(pod.egress or ())}
        if _isolated(pod) and (key in changed.pods or policies & changed.policies):
            found.update(pod.addresses)
    return frozenset(found)


def _isolated(pod: LocalPod) -> bool:
    return pod.ingress is not None or pod.egress is not None


class Judge:
    """Judges flows by a ruleset. ``node_addresses``: all that are local on the node, in canonical text."""

    def __init__(self, ruleset: Ruleset, frame: Frame, node_addresses: Collection[str]) -> None:
        self._ruleset, self._frame, self._node = ruleset, frame, frozenset(node_addresses)
        self._pods = {address: pod for pod in ruleset.pods.values() for address in pod.addresses}

    def forbidden(self, flows: Iterable[Flow]) -> list[tuple[Flow, str]]:
        """Those that would not be let in now, with the direction and the pod that refuses each."""
        judged = ((flow, self._refusal(flow)) for flow in flows)
        return [(flow, refusal) for flow, refusal in judged if refusal is not None]

    def _refusal(self, flow: Flow) -> str | None:
        if flow.protocol in ALWAYS_ALLOWED or flow.family not in self._frame.families:
            return None
        source, destination = self._pods.get(flow.source), self._pods.get(flow.destination)
        if source is not None and source is destination:
            return None
        if source is not None and not self._waits_for_translation(flow) and not self._lets(source, flow, out=True):
            return f"egress of pod {source.facts.key}"
        if destination is not None and flow.source not in self._node and not self._lets(destination, flow, out=False):
            return f"ingress of pod {destination.facts.key}"
        return None

    def _lets(self, pod: LocalPod, flow: Flow, *, out: bool) -> bool:
        """Whether a pod of this node lets a flow out, or in."""
        direction, peer = (Direction.EGRESS, flow.destination) if out else (Direction.INGRESS, flow.source)
        policies = pod.policies(direction)
        if policies is None:
            return True
        every = (self._ruleset.policies[key] for key in policies if key in self._ruleset.policies)
        clauses = (clause for rules in every for clause in rules.clauses(direction) or ())
        return any(self._fits_peer(clause, flow, peer) and self._fits_port(clause, flow) for clause in clauses)

    def _waits_for_translation(self, flow: Flow) -> bool:
        """Whether it reaches a service's address or a node port, which are judged behind a translation."""
        frame = self._frame
        if flow.destination in self._node and (flow.protocol.lower(), flow.port) in frame.node_ports:
            return True
        address = ipaddress.ip_address(flow.destination)
        ranges = (*frame.cluster_ranges, *frame.external_ranges, *frame.load_balancer_ranges)
        return any(address in network for network in ranges)

    def _fits_peer(self, clause: Clause, flow: Flow, peer: str) -> bool:
        match clause.peer:
            case None:
                return True
            case BlockSet(family=family, prefixes=prefixes):
                return family is flow.family and _within(prefixes, peer)
            case PodSet() as pods:
                return Member(peer) in self._ruleset.members.get(pods, {}).get(flow.family, ())

    def _fits_port(self, clause: Clause, flow: Flow) -> bool:
        match clause.port:
            case None:
                return True
            case PortRange(protocol=protocol, first=first, last=last):
                fits = first is None or (flow.port is not None and first <= flow.port <= (last or first))
                return protocol == flow.protocol and fits
            case PortSet() as ports:
                member = Member(f"{flow.destination},{flow.protocol.lower()}:{flow.port}")
                return member in self._ruleset.members.get(ports, {}).get(flow.family, ())


@functools.lru_cache(maxsize=64)
def _bounds(prefixes: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """First and last addresses of disjoint networks, by rising order."""
    networks = sorted(map(ipaddress.ip_network, prefixes))
    return [int(network[0]) for network in networks], [int(network[-1]) for network in networks]


def _within(prefixes: tuple[str, ...], address: str) -> bool:
    firsts, lasts = _bounds(prefixes)
    number = int(ipaddress.ip_address(address))
    place = bisect.bisect_right(firsts, number) - 1
    return place >= 0 and number <= lasts[place]
