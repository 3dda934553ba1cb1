"""The frame around the Services: nodes and settings become a `ProxyFrame`.

Pure. Nodes are followed one by one, so that one that changes costs no look at the others. A Node that has gone from the
cluster says nothing about this host: what was known of the own one stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kube_router.ipc.messages import Key, Node
from kube_router.workers.model import Family
from kube_router.workers.nodefacts import NodeFacts, node_facts, parse_address
from kube_router.workers.proxy.model import ProxyFrame
from kube_router.workers.settings import Settings


@dataclass(frozen=True, slots=True)
class Framed:
    """A frame, and a line for each thing that an operator should know about it."""

    frame: ProxyFrame
    warnings: tuple[str, ...] = ()


class FrameMaker:
    """Makes the frame, anew only when something in it may have changed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._own: Node | None = None
        self._facts: NodeFacts | None = None
        self._addresses_of: dict[Key, frozenset[str]] = {}
        self._addresses: Counter[str] = Counter()
        self._made: Framed | None = None

    def update(self, nodes: Mapping[Key, Node], keys: Iterable[Key] | None) -> None:
        """Follow the nodes ``keys``; None: all of them."""
        for key in dict.fromkeys([*nodes, *self._addresses_of]) if keys is None else keys:
            self._set_addresses(key, _addresses(nodes.get(key)))
        own = nodes.get(self._settings.node_name)
        if own is not self._own and own is not None:
            self._facts, self._made = node_facts(own, self._settings.families), None
        self._own = own

    def make(self) -> Framed:
        """The frame; the same object until something changes."""
        if self._made is None:
            self._made = Framed(self._frame(), tuple(self._warnings()))
        return self._made

    def _set_addresses(self, key: Key, after: frozenset[str]) -> None:
        before = self._addresses_of.pop(key, frozenset())
        if after:
            self._addresses_of[key] = after
        if before == after:
            return
        self._addresses.update(after - before)
        for address in before - after:
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]
        self._made = None

    def _frame(self) -> ProxyFrame:
        settings, facts = self._settings, self._facts
        best = {family: facts.address(family) for family in settings.families} if facts is not None else {}
        source = {family: str(address) for family, address in best.items() if address is not None}
        return ProxyFrame(
            families=settings.families,
            node_ports_on=None if settings.nodeport_bindon_all_ip else tuple(source.values()),
            source=source,
            pod_networks=facts.pod_cidrs if facts is not None else (),
            cluster_addresses=frozenset(self._addresses),
            masquerade_all=settings.masquerade_all,
            hairpin=settings.hairpin_mode,
        )

    def _warnings(self) -> Iterable[str]:
        name, facts = self._settings.node_name, self._facts
        if facts is None:
            yield f"node {name}: is not in the cluster: node ports are closed until it is"
            return
        for family in self._settings.families:
            if facts.address(family) is None:
                yield f"node {name}: status.addresses: no {family} address: no {family} node ports"
            elif not facts.pod_cidrs_of(family):
                yield (
                    f"node {name}: no {family} pod CIDR: who is a pod of this node is not known, so that all {family} "
                    "connections to Services get the node's address"
                )


def _addresses(node: Node | None) -> frozenset[str]:
    """Canonical; what cannot be read is no address, and told by who reads nodes for it."""
    found = set()
    for entry in node.addresses if node is not None else ():
        if entry.type in ("InternalIP", "ExternalIP"):
            try:
                found.add(str(parse_address(entry.address)))
            except ValueError:
                continue
    return frozenset(found)


def family_of(address: str) -> Family:
    """Of an address in text."""
    return Family.IPV6 if ":" in address else Family.IPV4
