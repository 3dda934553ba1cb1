"""Whether a packet may pass, and who says so: NetworkPolicy read straight from its specification.

Pure: `evaluate` over API objects, with plain loops. It shares the selectors and the notion of a pod with the rest of
the firewall and nothing else: not the compiler, the engine nor the sets. So it is the judge of both backends in tests,
and what ``explain`` answers with.

What it holds true, sources in brackets:

- A pod is isolated for ingress (egress) if any policy with that type selects it; then only what a rule of one of those
  policies allows may pass, and replies [Kubernetes, Network Policies: the two sorts of pod isolation]. Both sides have
  to agree: egress of the source and ingress of the destination [same], each on its pod's own node.
- A pod always reaches itself, and its own node always reaches it [same]. The node is who sends from the node: an
  address of the node in a packet that was not made here proves nothing (S9). What a pod sends to its node is egress
  like any other, as kube-router has it.
- Pods on the host's network are no pods to policy: as peers they are their node, for an ipBlock to name [same].
- ipBlock looks at addresses, whoever has them, pods too. A named port is the container port of that name at the
  packet's destination; a destination that is no pod has none.
- ICMP that networks cannot work without is never refused to a pod that stands (kube-router's rule, all directions).
- The first packet of a connection is judged; what follows is the connection tracker's.
- What cannot be understood fails closed; `policies.py` says how, and this must come to the same. Only the limit that
  protects the memory (`policies.MOST_NETWORKS`) is not of this world.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kube_router.ipc.messages import (
    IpBlock,
    Key,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    Pod,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
)
from kube_router.workers.firewall.podfacts import PodFacts, pod_facts
from kube_router.workers.firewall.rules import Direction, Frame
from kube_router.workers.firewall.selectors import matches, selector
from kube_router.workers.model import Family, parse_network

ICMP = "ICMP"
"""The protocol of a `Packet` in both families."""
ALWAYS_PASSING = {
    Family.IPV4: frozenset({"echo-request", "destination-unreachable", "time-exceeded"}),
    Family.IPV6: frozenset(
        {
            "echo-request",
            "echo-reply",
            "destination-unreachable",
            "time-exceeded",
            "neighbor-solicitation",
            "neighbor-advertisement",
        }
    ),
}


class Hook(enum.StrEnum):
    """Where on the node the packet is seen."""

    INPUT = "INPUT"
    """For the node itself, or for an address that a proxy on it still has to translate."""
    FORWARD = "FORWARD"
    """Routed or bridged through."""
    OUTPUT = "OUTPUT"
    """Made here, or translated here by IPVS."""


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a connection, with its addresses as they are at ``hook``.

    ``protocol``: ``TCP``, ``UDP``, ``SCTP``, `ICMP`, or any other name. ``port``: the destination port, None where the
    protocol has none. ``icmp``: the type, in iptables' words.
    """

    source: str
    destination: str
    protocol: str = "TCP"
    port: int | None = None
    hook: Hook = Hook.FORWARD
    icmp: str = ""

    @property
    def family(self) -> Family:
        """Of its addresses."""
        return Family(ipaddress.ip_address(self.destination).version)


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What there is to know on the node ``node_name``. Objects are keyed by `Projection.key`.

    The namespaces of all pods should be there; one that is not known yet is taken by no namespace selector.
    ``node_addresses``: all addresses that are LOCAL on the node, the bridge's too, in canonical text. ``unprogrammed``:
    pods of this node whose rules do not stand in the kernel yet.
    """

    node_name: str
    pods: Mapping[Key, Pod]
    namespaces: Mapping[Key, Namespace]
    policies: Mapping[Key, NetworkPolicy]
    frame: Frame = field(default_factory=Frame)
    node_addresses: frozenset[str] = frozenset()
    unprogrammed: frozenset[Key] = frozenset()


class Reason(enum.StrEnum):
    """Why a decision fell as it did."""

    ALLOWED = "a rule allows it"
    REFUSED = "no rule allows it"
    NOT_ISOLATED = "not isolated"
    SAME_POD = "same pod"
    NO_LOCAL_POD = "no local pod"
    NODE_ITSELF = "the node itself sends it"
    ICMP = "ICMP that always passes"
    SERVICE_ADDRESS = "the address of a service, judged after its translation"
    NODE_PORT = "a node port, judged after its translation"
    DEFAULT_DENY = "default deny: an address of this node's pods without rules yet"


@dataclass(frozen=True, slots=True)
class Decision:
    """One look at the packet. ``pod`` and ``direction``: whose, if it was about a pod.

    ``policy`` and ``rule`` (its index in the policy's list): the first that allows, by policy key. ``isolated_by``: all
    policies that isolate the pod in that direction.
    """

    reason: Reason
    pod: Key | None = None
    direction: Direction | None = None
    policy: Key | None = None
    rule: int | None = None
    isolated_by: tuple[Key, ...] = ()

    @property
    def allowed(self) -> bool:
        """Whether the packet may go on."""
        return self.reason not in (Reason.REFUSED, Reason.DEFAULT_DENY)

    def __str__(self) -> str:
        about = f"{self.direction} of pod {self.pod}: " if self.direction else f"pod {self.pod}: " if self.pod else ""
        if self.reason is Reason.ALLOWED:
            return f"{about}policy {self.policy} allows it, rule {self.rule}"
        if self.reason is Reason.REFUSED:
            return f"{about}isolated by {', '.join(self.isolated_by)}; {self.reason}"
        return f"{about}{self.reason}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Every decision in order. The first that refuses ends it; a packet that is allowed has passed all of them."""

    decisions: tuple[Decision, ...]

    @property
    def deciding(self) -> Decision:
        """The decision that the verdict hangs on: the refusal, or the last allowance."""
        return self.decisions[-1]

    @property
    def allowed(self) -> bool:
        """Whether the packet passes, as far as network policy is concerned."""
        return self.deciding.allowed

    def __str__(self) -> str:
        return f"{'allowed' if self.allowed else 'refused'}: {'; '.join(map(str, self.decisions))}"


def evaluate(state: ClusterState, packet: Packet) -> Verdict:
    """What happens to a packet at one hook of this node. Raises ValueError for an address that is none."""
    decisions = []
    for decision in _decisions(state, packet):
        decisions.append(decision)
        if not decision.allowed:
            break
    return Verdict(tuple(decisions))


def _decisions(state: ClusterState, packet: Packet) -> Iterator[Decision]:
    if packet.hook is Hook.INPUT:
        ahead = _ahead_of_pods(state, packet)
        if ahead is not None:
            yield ahead
            return
    source, destination = _owner(state, packet.source), _owner(state, packet.destination)
    sender = source if source and _stands(state, source) else None
    receiver = destination if destination and _stands(state, destination) and packet.hook is not Hook.INPUT else None
    if sender or receiver:
        free = _free(state, packet, sender, receiver)
        if free is not None:
            yield free
            return
    if sender:
        yield _judge(state, packet, sender, Direction.EGRESS, source, destination)
    if receiver:
        yield _judge(state, packet, receiver, Direction.INGRESS, source, destination)
    if _waiting(state, packet.source, sender) or _waiting(state, packet.destination, receiver):
        yield Decision(Reason.DEFAULT_DENY)
    elif not sender and not receiver:
        yield Decision(Reason.NO_LOCAL_POD)


def _ahead_of_pods(state: ClusterState, packet: Packet) -> Decision | None:
    """Packets to services arrive at the node first; the proxy gives them their real destination."""
    frame = state.frame
    address = ipaddress.ip_address(packet.destination)
    for network in (*frame.cluster_ranges, *frame.external_ranges, *frame.load_balancer_ranges):
        if address in network:
            return Decision(Reason.SERVICE_ADDRESS)
    if str(address) in state.node_addresses and (packet.protocol.lower(), packet.port) in frame.node_ports:
        return Decision(Reason.NODE_PORT)
    return None


def _free(state: ClusterState, packet: Packet, sender: PodFacts | None, receiver: PodFacts | None) -> Decision | None:
    """What passes whatever the policies of the local pods say."""
    if packet.protocol == ICMP and packet.icmp in ALWAYS_PASSING[packet.family]:
        return Decision(Reason.ICMP)
    if packet.hook is Hook.OUTPUT and _text(packet.source) in state.node_addresses:
        return Decision(Reason.NODE_ITSELF)
    if sender and receiver and sender.key == receiver.key:
        return Decision(Reason.SAME_POD, sender.key)
    return None


def _owner(state: ClusterState, address: str) -> PodFacts | None:
    """The pod that has an address. Of two that claim it while the API lags behind: the one that stays, then by key."""
    text = _text(address)
    claims = []
    for pod in state.pods.values():
        facts = pod_facts(pod, state.node_name, state.frame.families)
        if facts and text in facts.addresses:
            claims.append(facts)
    return min(claims, key=lambda facts: (facts.terminating, facts.key), default=None)


def _text(address: str) -> str:
    return str(ipaddress.ip_address(address))


def _stands(state: ClusterState, pod: PodFacts) -> bool:
    """Whether it is this node's and its rules are in force."""
    return pod.local and pod.key not in state.unprogrammed


def _waiting(state: ClusterState, text: str, standing: PodFacts | None) -> bool:
    """Whether default deny holds an address back: of this node's pod range, but no standing pod's nor the node's."""
    address = ipaddress.ip_address(text)
    return (
        state.frame.default_deny
        and standing is None
        and address.version in state.frame.families
        and str(address) not in state.node_addresses
        and any(address in network for network in state.frame.pod_cidrs)
    )


def _judge(
    state: ClusterState,
    packet: Packet,
    pod: PodFacts,
    direction: Direction,
    source: PodFacts | None,
    destination: PodFacts | None,
) -> Decision:
    """One local pod's policies of one direction."""
    peer, address = (source, packet.source) if direction is Direction.INGRESS else (destination, packet.destination)
    isolating = []
    for key, policy in sorted(state.policies.items()):
        if policy.namespace == pod.namespace and _selects(policy, pod) and _covers(policy, direction):
            isolating.append(key)
    for key in isolating:
        policy = state.policies[key]
        for number, rule in enumerate(_rules(policy, direction)):
            if _peer_fits(state, policy, rule, peer, address) and _port_fits(rule, packet, destination):
                return Decision(Reason.ALLOWED, pod.key, direction, key, number, tuple(isolating))
    reason = Reason.REFUSED if isolating else Reason.NOT_ISOLATED
    return Decision(reason, pod.key, direction, isolated_by=tuple(isolating))


def _selects(policy: NetworkPolicy, pod: PodFacts) -> bool:
    """Whether the pod is the policy's. A condition that says nothing counts as met: rather isolated than open."""
    api = policy.pod_selector
    return all(pod.labels.get(label) == value for label, value in api.match_labels.items()) and all(
        _meets(LabelSelector(match_expressions=(expression,)), pod.labels, unclear=True)
        for expression in api.match_expressions
    )


def _meets(api: LabelSelector, labels: Mapping[str, str], unclear: bool) -> bool:
    """Whether labels meet a selector; ``unclear`` if it cannot be understood."""
    try:
        return matches(selector(api), labels)
    except ValueError:
        return unclear


def _covers(policy: NetworkPolicy, direction: Direction) -> bool:
    types = policy.policy_types or ()
    by_default = direction is Direction.INGRESS or bool(policy.egress)
    return _word(direction) in types or (by_default and (not types or _unknown_type(policy)))


def _word(direction: Direction) -> str:
    return "Ingress" if direction is Direction.INGRESS else "Egress"


def _unknown_type(policy: NetworkPolicy) -> bool:
    return any(word not in ("Ingress", "Egress") for word in policy.policy_types or ())


def _rules(policy: NetworkPolicy, direction: Direction) -> tuple[PolicyRule, ...]:
    """The rules of a direction that it covers; none if it is not clear that they are for this pod and direction."""
    try:
        selector(policy.pod_selector)
    except ValueError:
        return ()
    if _unknown_type(policy) and _word(direction) not in (policy.policy_types or ()):
        return ()
    return (policy.ingress if direction is Direction.INGRESS else policy.egress) or ()


def _peer_fits(
    state: ClusterState, policy: NetworkPolicy, rule: PolicyRule, peer: PodFacts | None, address: str
) -> bool:
    """Whether the other end is one of ``from`` or ``to``; a rule without entries is about everybody."""
    if not rule.peers:
        return True
    for entry in rule.peers:
        if entry.ip_block is not None:
            if entry.pod_selector is None and entry.namespace_selector is None and _in_block(entry.ip_block, address):
                return True
        elif peer is not None and _is_peer(state, policy, entry, peer):
            return True
    return False


def _is_peer(state: ClusterState, policy: NetworkPolicy, entry: PolicyPeer, pod: PodFacts) -> bool:
    """Both selectors of one entry have to hold. The labels of a namespace that is not known are not known either."""
    if entry.pod_selector is None and entry.namespace_selector is None:
        return False
    if entry.pod_selector is not None and not _meets(entry.pod_selector, pod.labels, unclear=False):
        return False
    if entry.namespace_selector is None:
        return pod.namespace == policy.namespace
    namespace = state.namespaces.get(pod.namespace)
    return namespace is not None and _meets(entry.namespace_selector, namespace.labels, unclear=False)


def _in_block(block: IpBlock, address: str) -> bool:
    """In the block and in none of its excepts. A block with an except that is not a part of it counts for nothing."""
    try:
        network = parse_network(block.cidr)
        excepted = [parse_network(text) for text in block.excepted]
    except ValueError:
        return False
    for hole in excepted:
        inside = hole.version == network.version and hole.network_address in network
        if not inside or hole.prefixlen <= network.prefixlen:
            return False
    parsed = ipaddress.ip_address(address)
    return parsed in network and not any(parsed in hole for hole in excepted)


def _port_fits(rule: PolicyRule, packet: Packet, destination: PodFacts | None) -> bool:
    """Whether the packet is for one of ``ports``; a rule without entries is about all ports of all protocols."""
    return not rule.ports or any(_is_port(port, packet, destination) for port in rule.ports)


def _is_port(entry: PolicyPort, packet: Packet, destination: PodFacts | None) -> bool:
    if entry.protocol not in ("TCP", "UDP", "SCTP") or entry.protocol != packet.protocol:
        return False
    if entry.port is None:
        return entry.end_port is None
    if packet.port is None:
        return False
    if isinstance(entry.port, str):
        return entry.end_port is None and any(
            (port.name, port.protocol, port.port) == (entry.port, packet.protocol, packet.port)
            for port in (destination.ports if destination else ())
        )
    return 1 <= entry.port <= packet.port <= (entry.port if entry.end_port is None else entry.end_port) <= 65535
