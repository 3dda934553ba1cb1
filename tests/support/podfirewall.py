"""Network policy on the nodes of a `podnet`: the same objects given to a firewall and to the judge, then real packets.

Touches the kernel. Each node has an engine and a backend of its own, which live on from one set of objects to the next:
so every change of objects is a change of a standing firewall, not a new one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

from support.namespaces import Namespace as NetNamespace
from support.podnet import PodNet
from support.probes import Answer, Flow, differing

from kube_router.ipc.messages import Key, Kind, Namespace, NetworkPolicy, Pod, Projection, SourceState
from kube_router.ipc.replica import Changes, Cluster
from kube_router.workers.firewall.backend import Backend, Synced
from kube_router.workers.firewall.engine import Engine
from kube_router.workers.firewall.iptables import Iptables
from kube_router.workers.firewall.nftables import Nftables
from kube_router.workers.firewall.rules import Frame
from kube_router.workers.firewall.verdict import ClusterState, Hook, Packet, Verdict, evaluate
from kube_router.workers.kernel.chains import ChainDriver
from kube_router.workers.kernel.iptables import Programs
from kube_router.workers.model import Family

KINDS: tuple[Kind, ...] = ("pods", "namespaces", "networkpolicies")
TYPES: dict[Kind, type[Projection]] = {"pods": Pod, "namespaces": Namespace, "networkpolicies": NetworkPolicy}
Tables = dict[Kind, dict[Key, Projection]]
IN_SYNC = SourceState(source="test", in_sync=True)
PORTS = {"tcp": (80, 8080, 8081), "udp": (80, 8080), "sctp": (80, 8080), "icmp": (0,)}
"""What the matrices try."""


def tables(objects: Iterable[Projection]) -> Tables:
    """Objects by kind and key."""
    found = tuple(objects)
    return {kind: {item.key: item for item in found if isinstance(item, TYPES[kind])} for kind in KINDS}


def difference(before: Tables, after: Tables) -> Changes:
    """What a replica would say has changed."""
    changes: Changes = {}
    for kind in KINDS:
        for key in before[kind].keys() | after[kind].keys():
            old, new = before[kind].get(key), after[kind].get(key)
            if old != new:
                changes.setdefault(kind, {})[key] = (old, new)
    return changes


def _iptables(kind: Literal["nft", "legacy"]) -> Backend:
    return Iptables(chains=ChainDriver(Programs(kind, f"-{kind}", (1, 8, 9))))


BACKENDS: dict[str, Callable[[], Backend]] = {
    "iptables-nft": partial(_iptables, "nft"),
    "iptables-legacy": partial(_iptables, "legacy"),
    "nftables": Nftables,
}


class Standing:
    """An engine and a backend of one node; both live on from one cluster to the next."""

    def __init__(self, node: str, namespace: NetNamespace, make: Callable[[], Backend]) -> None:
        """``node``: the name by which pods are local; ``namespace``: where ``make`` and the backend work."""
        self.node, self.namespace = node, namespace
        self.engine = Engine(node, tuple(Family))
        with namespace.enter():
            self.backend = make()
        self._objects: Tables | None = None

    def apply(
        self, objects: Iterable[Projection], frame: Frame, *, observe: bool = False, hold: bool = False
    ) -> Synced:
        """Bring the node to some objects; the first time like a worker that has just started."""
        before, after = self._objects, tables(objects)
        self.engine.update(Cluster(IN_SYNC, after), None if before is None else difference(before, after))
        self._objects = after
        with self.namespace.enter():
            return self.backend.sync(
                self.engine.ruleset,
                self.engine.take_changed(),
                frame,
                observe=observe or before is None,
                hold=hold,
            )

    def close(self) -> None:
        """Close the backend; the kernel keeps what stands."""
        self.backend.close()


def judged(net: PodNet, node: str, objects: Iterable[Projection], frame: Frame) -> ClusterState:
    """What the judge has to know on a node of the network."""
    found = tuple(objects)
    links = ("192.0.2.1", "2001:db8::1") if node == "n1" else ()
    return ClusterState(
        node_name=node,
        pods={item.key: item for item in found if isinstance(item, Pod)},
        namespaces={item.key: item for item in found if isinstance(item, Namespace)},
        policies={item.key: item for item in found if isinstance(item, NetworkPolicy)},
        frame=frame,
        node_addresses=frozenset((*net[node].addresses, "127.0.0.1", "::1", *links)),
    )


def packet_of(net: PodNet, flow: Flow, node: str) -> Packet | None:
    """A flow's first packet on a node, for the judge; None if it does not pass there."""
    crossing = net.crossing(flow, node)
    if crossing is None:
        return None
    icmp = flow.protocol == "icmp"
    return Packet(
        flow.source,
        flow.destination,
        flow.protocol.upper(),
        None if icmp else flow.port,
        Hook(crossing[0].hook),
        "echo-request" if icmp else "",
    )


class NodeFirewall(Standing):
    """That of a node of a `podnet`; ``state`` is what the judge has to know of it."""

    def __init__(self, net: PodNet, node: str, make: Callable[[], Backend]) -> None:
        super().__init__(node, net[node].namespace, make)
        self.net = net
        self.state = judged(net, node, (), Frame())

    def apply(
        self, objects: Iterable[Projection], frame: Frame, *, observe: bool = False, hold: bool = False
    ) -> Synced:
        """See `Standing.apply`."""
        found = tuple(objects)
        self.state = judged(self.net, self.node, found, frame)
        return super().apply(found, frame, observe=observe, hold=hold)

    def verdict(self, flow: Flow) -> Verdict | None:
        """What the judge says of a flow here; None if it does not pass."""
        packet = packet_of(self.net, flow, self.node)
        return None if packet is None else evaluate(self.state, packet)


class PodFirewall:
    """The firewalls of both nodes, and what they and the judge say of flows."""

    def __init__(self, net: PodNet, make: Callable[[], Backend]) -> None:
        self.net = net
        self.nodes = [NodeFirewall(net, name, make) for name in ("n1", "n2")]

    def apply(self, *objects: Projection, frame: Callable[[str], Frame] = lambda node: Frame()) -> list[Synced]:
        """Bring both nodes to some objects, whose namespaces come by themselves; nothing may fail.

        ``frame``: that of a node, by its name.
        """
        done = []
        for node in self.nodes:
            whole = dataclasses.replace(frame(node.node), families=tuple(Family))
            done.append(node.apply(with_namespaces(objects), whole))
        assert [(synced.failures, synced.failed) for synced in done] == [((), {})] * 2
        return done

    def allows(self, flow: Flow) -> bool:
        """What the judge says: every node that sees the packet has to let it pass."""
        return all(verdict is None or verdict.allowed for verdict in (node.verdict(flow) for node in self.nodes))

    def why(self, flow: Flow) -> str:
        """The judge's words, node by node."""
        return "; ".join(f"{node.node}: {verdict}" for node in self.nodes if (verdict := node.verdict(flow)))

    def flows(self, sources: Sequence[str] = (), destinations: Sequence[str] = ()) -> list[Flow]:
        """Everything between the sources and the destinations (without names: all hosts) that has a pod at an end.

        All addresses, but the client is called at one of each family.
        """
        found = []
        for one, other in itertools.product(sources or self.net.hosts, destinations or self.net.hosts):
            if one == other or not {one, other} & {*self.net.pods}:
                continue
            called = self.net[other].addresses
            called = called if other != "client" else tuple(map(self.net[other].of, Family))
            for source, destination in itertools.product(self.net[one].addresses, called):
                if (":" in source) == (":" in destination):
                    found += [Flow(source, destination, kind, port) for kind, ports in PORTS.items() for port in ports]
        return found

    def wrong(self, expected: Mapping[Flow, bool]) -> dict[str, Answer]:
        """Flows that are not what is expected of them, with the judge's reasons."""
        found = differing(self.net.probes, expected)
        return {f"{flow}: {self.why(flow)}": answer for flow, answer in found.items()}

    def close(self) -> None:
        """Close both backends."""
        for node in self.nodes:
            node.close()


def with_namespaces(objects: Iterable[Projection]) -> tuple[Projection, ...]:
    """The objects, and for each namespace that is only named a Namespace with the label ``name``."""
    found = tuple(objects)
    known = {item.name for item in found if isinstance(item, Namespace)}
    named = {item.namespace for item in found if item.namespace} - known
    return (*found, *(Namespace(name=name, labels={"name": name}) for name in sorted(named)))
