"""The frame around the policies: settings, own Node and Services become a `Frame`.

Pure. Node ports are followed Service by Service, so that one changed Service costs no look at the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kube_router.ipc.messages import Key, Node, Projection, Service
from kube_router.workers.firewall.rules import Frame
from kube_router.workers.model import Family, IPNetwork, parse_network
from kube_router.workers.nodefacts import INVALID_POD_CIDR, NodeFacts, node_facts
from kube_router.workers.settings import Settings

NodePort = tuple[str, int]
"""(protocol in lower case, port)."""


class NodePorts:
    """The node ports that Services really have (S8): each as long as some Service has it."""

    def __init__(self) -> None:
        self._of_service: dict[Key, frozenset[NodePort]] = {}
        self._users: Counter[NodePort] = Counter()
        self._all: frozenset[NodePort] | None = None

    @property
    def all(self) -> frozenset[NodePort]:
        """All of them; the same object until something changes."""
        if self._all is None:
            self._all = frozenset(self._users)
        return self._all

    def replace(self, services: Mapping[Key, Service]) -> None:
        """Take these Services for all that there are."""
        for key in self._of_service.keys() - services.keys():
            self._set(key, frozenset())
        for key, service in services.items():
            self._set(key, _node_ports(service))

    def update(self, changes: Mapping[Key, tuple[Projection | None, Projection | None]]) -> None:
        """Take changed Services, (old, new) by key; being told twice does no harm."""
        for key, (_, new) in changes.items():
            self._set(key, _node_ports(new))

    def _set(self, key: Key, ports: frozenset[NodePort]) -> None:
        before = self._of_service.pop(key, frozenset())
        if ports:
            self._of_service[key] = ports
        if ports == before:
            return
        self._users.update(ports - before)
        for port in before - ports:
            self._users[port] -= 1
            if not self._users[port]:
                del self._users[port]
        self._all = None


def _node_ports(service: Projection | None) -> frozenset[NodePort]:
    if not isinstance(service, Service):
        return frozenset()
    return frozenset((port.protocol.lower(), port.node_port) for port in service.ports if port.node_port)


@dataclass(frozen=True, slots=True)
class Framed:
    """A frame, and a line for each thing that an operator should know about it."""

    frame: Frame
    warnings: tuple[str, ...] = ()


class FrameMaker:
    """Makes the frame, anew only when Node or node ports have changed. Remembers the last pod CIDRs that were known.

    A Node that has gone from the cluster says nothing about the pods that run on: its last pod CIDRs stay.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._fixed = _fixed(settings)
        self._node: Node | None = None
        self._facts: NodeFacts | None = None
        self._ports: frozenset[NodePort] = frozenset()
        self._made: Framed | None = None

    def make(self, node: Node | None, ports: frozenset[NodePort]) -> Framed:
        """The frame for the own Node (None: it is not in the cluster) and the node ports of all Services."""
        if self._made is not None and node is self._node and ports is self._ports:
            return self._made
        if node is not None:
            self._facts = node_facts(node, self._settings.families)
        self._node, self._ports = node, ports
        self._made = Framed(self._frame(), tuple(self._warnings()))
        return self._made

    def _frame(self) -> Frame:
        facts, fixed = self._facts, self._fixed
        return Frame(
            families=fixed.families,
            cluster_ranges=fixed.cluster_ranges,
            external_ranges=fixed.external_ranges,
            load_balancer_ranges=fixed.load_balancer_ranges,
            node_port_range=fixed.node_port_range,
            node_ports=self._ports,
            pod_cidrs=facts.pod_cidrs if facts is not None else (),
            default_deny=fixed.default_deny,
            only_syn_opens=fixed.only_syn_opens,
        )

    def _warnings(self) -> Iterable[str]:
        """Only what network policy has to do with: the other workers tell the rest of a Node's problems."""
        if not self._settings.netpol_default_deny:
            return
        name, facts = self._settings.node_name, self._facts
        if self._node is None:
            yield f"node {name}: is not in the cluster; --netpol-default-deny goes on with the pod CIDRs known before"
        if facts is not None:
            yield from (problem.text for problem in facts.problems if problem.reason == INVALID_POD_CIDR)
        bare = [family for family in self._settings.families if facts is None or not facts.pod_cidrs_of(family)]
        if bare:
            families = " and ".join(map(str, bare))
            yield (
                f"node {name}: has no {families} pod CIDR, so --netpol-default-deny refuses no {families} traffic of "
                "pods that are not yet programmed"
            )


def _fixed(settings: Settings) -> Frame:
    return Frame(
        families=settings.families,
        cluster_ranges=_networks(settings.service_cluster_ip_range, settings.families),
        external_ranges=_networks(settings.service_external_ip_range, settings.families),
        load_balancer_ranges=_networks(settings.loadbalancer_ip_range, settings.families),
        node_port_range=_port_range(settings.service_node_port_range),
        default_deny=settings.netpol_default_deny,
        only_syn_opens=settings.netpol_recheck_established,
    )


def _networks(texts: Iterable[str], families: tuple[Family, ...]) -> tuple[IPNetwork, ...]:
    networks = map(parse_network, texts)
    return tuple(network for network in networks if network.version in families)


def _port_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    return int(first), int(last)
