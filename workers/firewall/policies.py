"""Compiling a NetworkPolicy: API object in, target and clauses of each direction out, whatever pods there are.

Pure: `compile_policy`. It never raises over what stands in a policy. What cannot be understood becomes a problem, one
line that names object, key and value, and takes the smallest part with it that can be left out without allowing more:
one ``from``/``to`` entry with all its excepts, one port. A rule whose entries are all left out allows nothing; it does
not become a rule without entries, which would allow everything.

Where the policy says that somebody is isolated, but not clearly who or in which direction, it fails closed:

- ``podSelector``: conditions that can be understood still narrow it, the others are dropped. So at least the pods that
  are meant are isolated. The rules are dropped too, as pods that are not meant must not be opened by them.
- ``policyTypes`` with an unknown word: the directions that the default would give are covered as well, without rules.

The API server lets none of this in; a manifest directory does, and so does an API server newer than this program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kube_router.ipc.messages import IpBlock, LabelSelector, NetworkPolicy, PolicyPeer, PolicyPort, PolicyRule
from kube_router.workers.firewall.blocks import disjoint
from kube_router.workers.firewall.rules import (
    BlockSet,
    Clause,
    Direction,
    PodSelection,
    PodSet,
    PolicyRules,
    PortRange,
    PortSet,
)
from kube_router.workers.firewall.selectors import Selector, selector
from kube_router.workers.model import Family, IPNetwork, parse_network

PROTOCOLS = ("TCP", "UDP", "SCTP")
"""As the API writes them, and as `PortRange` and `PortSet` carry them."""
LARGEST_PORT = 65535
MOST_NETWORKS = 1 << 18
"""That the blocks of one rule and family may come to. One address taken out of ::/0 leaves up to 128 networks: a
policy of a few hundred kilobytes could fill the memory of every node. 5,000 of them out of 0.0.0.0/0 leave 100,000."""

EVERY_POD = PodSelection(pods=(), namespaces=())
TYPES = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}
SIDES = {Direction.INGRESS: "from", Direction.EGRESS: "to"}

_PORT_NAME = re.compile(r"(?=.{1,15}\Z)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
"""IANA service name (RFC 6335, section 5.1) in lower case, which is what a container port may be called."""


class _Bad(ValueError):
    """A part of the policy is not usable; ``key`` is where, below the part that is being read."""

    def __init__(self, key: str, text: object) -> None:
        super().__init__(f"{key}: {text}")


@dataclass(slots=True)
class _Peers:
    """The entries of one rule that could be read. ``anybody``: it has none, so it is about every peer."""

    anybody: bool
    pods: set[PodSelection] = field(default_factory=set)
    blocks: dict[int, list[tuple[IPNetwork, tuple[IPNetwork, ...]]]] = field(default_factory=dict)

    @property
    def selections(self) -> tuple[PodSelection, ...]:
        """The pods, in an order that depends on nothing else."""
        return tuple(sorted(self.pods, key=_order))


@dataclass(frozen=True, slots=True)
class _Named:
    """A port that is a container port's name."""

    name: str
    protocol: str


_Port = PortRange | _Named | None


def compile_policy(policy: NetworkPolicy, families: Sequence[Family]) -> PolicyRules:
    """What a policy comes to with these address families. Blocks of other families are left out without a problem.

    Source: ``networking.k8s.io/v1``. Without ``policyTypes``, ingress is covered, and egress if the policy has
    egress rules: an empty list is none, as the API server defaults it.
    """
    problems: list[str] = []
    target, clear = _target(policy, problems)
    covered = _covered(policy, problems)

    def clauses(direction: Direction, rules: tuple[PolicyRule, ...] | None) -> tuple[Clause, ...] | None:
        if direction not in covered:
            return None
        found: dict[Clause, None] = {}  # each once
        for number, rule in enumerate(rules or ()):
            found.update(dict.fromkeys(_clauses(direction, number, rule, target, families, problems)))
        return tuple(found) if clear and covered[direction] else ()

    ingress = clauses(Direction.INGRESS, policy.ingress)
    egress = clauses(Direction.EGRESS, policy.egress)
    named = tuple(f"networkpolicy {policy.key}: {problem}" for problem in problems)
    return PolicyRules(policy.key, policy.uid, target, ingress, egress, named)


def _target(policy: NetworkPolicy, problems: list[str]) -> tuple[PodSelection, bool]:
    """The policy's pods, and whether that is exactly who is meant."""
    api = policy.pod_selector
    parts = [LabelSelector(match_labels=api.match_labels)]
    parts += [LabelSelector(match_expressions=(expression,)) for expression in api.match_expressions]
    conditions: Selector = ()
    clear = True
    for part in parts:
        try:
            conditions += selector(part)
        except ValueError as error:
            problems.append(f"spec.podSelector: {error}; all pods that it may mean are isolated")
            clear = False
    return PodSelection(tuple(sorted(set(conditions))), namespace=policy.namespace), clear


def _covered(policy: NetworkPolicy, problems: list[str]) -> dict[Direction, bool]:
    """The directions that the policy isolates, and whether its rules count there."""
    default = [Direction.INGRESS, Direction.EGRESS] if policy.egress else [Direction.INGRESS]
    types = policy.policy_types or ()
    covered = {TYPES[word]: True for word in types if word in TYPES}
    unknown = [(index, word) for index, word in enumerate(types) if word not in TYPES]
    for index, word in unknown:
        problems.append(f"spec.policyTypes[{index}]: {word!r} is not one of {', '.join(TYPES)}")
    for direction in default if unknown or not types else ():
        covered.setdefault(direction, not unknown)
    return covered


def _clauses(
    direction: Direction,
    number: int,
    rule: PolicyRule,
    target: PodSelection,
    families: Sequence[Family],
    problems: list[str],
) -> Iterator[Clause]:
    """The clauses of one rule, in the order in which upstream has them."""
    where = f"spec.{direction}[{number}]"
    peers = _peers(rule, f"{where}.{SIDES[direction]}", target.namespace or "", problems)
    ports = _ports(rule, f"{where}.ports", problems)
    if peers.anybody:
        for port, words in _destinations(direction, ports, "any", target, (EVERY_POD,)):
            yield Clause(number, words, None, port)
    if peers.pods:
        pods = PodSet(direction, peers.selections)
        for port, words in _destinations(direction, ports, "pods", target, peers.selections):
            # A set of the peers' ports already says who they are.
            named_peer = direction is Direction.EGRESS and isinstance(port, PortSet)
            yield Clause(number, words, None if named_peer else pods, port)
    for family in families:
        blocks = _block_set(direction, family, peers, f"{where}.{SIDES[direction]}", problems)
        if blocks is not None:
            for port, words in _destinations(direction, ports, "cidr", target, (EVERY_POD,)):
                yield Clause(number, words, blocks, port)


def _destinations(
    direction: Direction,
    ports: Sequence[_Port],
    word: str,
    target: PodSelection,
    peers: tuple[PodSelection, ...],
) -> Iterator[tuple[PortRange | PortSet | None, str]]:
    """Port conditions with their comment words, numbers first. A name is looked up where the packet goes to."""
    for port in ports:
        if not isinstance(port, _Named):
            yield port, f"{direction} {word}"
    for port in ports:
        if isinstance(port, _Named):
            local = direction is Direction.INGRESS
            selections = (target,) if local else peers
            yield PortSet(direction, selections, port.name, port.protocol, local), f"{direction} {word} np"


def _peers(rule: PolicyRule, where: str, namespace: str, problems: list[str]) -> _Peers:
    peers = _Peers(anybody=not rule.peers)
    for index, peer in enumerate(rule.peers or ()):
        try:
            if peer.ip_block is None:
                peers.pods.add(_selection(peer, namespace))
            elif peer.pod_selector is not None or peer.namespace_selector is not None:
                raise _Bad("ipBlock", f"{peer.ip_block.cidr!r} stands beside a selector, and only one of them may")
            else:
                block, excepted = _block(peer.ip_block)
                peers.blocks.setdefault(block.version, []).append((block, excepted))
        except _Bad as error:
            problems.append(f"{where}[{index}].{error}")
    return peers


def _selection(peer: PolicyPeer, namespace: str) -> PodSelection:
    if peer.namespace_selector is None and peer.pod_selector is None:
        raise _Bad("podSelector", "None: it says nothing of whom is meant, nor do namespaceSelector and ipBlock")
    pods = _selector("podSelector", peer.pod_selector)
    if peer.namespace_selector is None:
        return PodSelection(pods, namespace=namespace)
    return PodSelection(pods, namespaces=_selector("namespaceSelector", peer.namespace_selector))


def _selector(key: str, api: LabelSelector | None) -> Selector:
    try:
        return () if api is None else selector(api)
    except ValueError as error:
        raise _Bad(key, error) from error


def _block(api: IpBlock) -> tuple[IPNetwork, tuple[IPNetwork, ...]]:
    """A block and its excepts. An except that is not well inside may be a mistyped one: nothing of the block counts."""
    block = _network("ipBlock.cidr", api.cidr)
    excepted = []
    for index, text in enumerate(api.excepted):
        key = f"ipBlock.except[{index}]"
        hole = _network(key, text)
        if hole.version != block.version or hole == block or not hole.subnet_of(block):  # type: ignore[arg-type]
            raise _Bad(key, f"{text!r} is not a part of {api.cidr}")
        excepted.append(hole)
    return block, tuple(excepted)


def _network(key: str, text: str) -> IPNetwork:
    try:
        return parse_network(text)
    except ValueError as error:
        raise _Bad(key, error) from error


def _block_set(direction: Direction, family: Family, peers: _Peers, where: str, problems: list[str]) -> BlockSet | None:
    """The addresses of all blocks of a rule; None if there are none of this family, or too many."""
    try:
        networks = disjoint(peers.blocks.get(family, ()), MOST_NETWORKS)
    except ValueError as error:
        problems.append(f"{where}: ipBlock entries of {family} come to {error}")
        return None
    return BlockSet(direction, family, tuple(map(str, networks))) if networks else None


def _ports(rule: PolicyRule, where: str, problems: list[str]) -> tuple[_Port, ...]:
    """The port conditions that could be read; one that is None if the rule has none at all."""
    if not rule.ports:
        return (None,)
    found: dict[_Port, None] = {}
    for index, port in enumerate(rule.ports):
        try:
            found[_port(port)] = None
        except _Bad as error:
            problems.append(f"{where}[{index}].{error}")
    return tuple(found)


def _port(api: PolicyPort) -> PortRange | _Named:
    if api.protocol not in PROTOCOLS:
        raise _Bad("protocol", f"{api.protocol!r} is not one of {', '.join(PROTOCOLS)}")
    if api.end_port is not None and not isinstance(api.port, int):
        raise _Bad("endPort", f"{api.end_port} needs a port number to start from, which {api.port!r} is not")
    if api.port is None:
        return PortRange(api.protocol)
    if isinstance(api.port, str):
        if not _PORT_NAME.fullmatch(api.port):
            raise _Bad("port", f"{api.port!r} is not the name of a port")
        return _Named(api.port, api.protocol)
    _check_number("port", api.port, range(1, LARGEST_PORT + 1))
    last = api.port if api.end_port is None else api.end_port
    _check_number("endPort", last, range(api.port, LARGEST_PORT + 1))
    return PortRange(api.protocol, api.port, last)


def _check_number(key: str, number: int, allowed: range) -> None:
    if number not in allowed:
        raise _Bad(key, f"{number} is not between {allowed.start} and {allowed.stop - 1}")


def _order(selection: PodSelection) -> tuple[str, Iterable[object], Selector]:
    return selection.namespace or "", selection.namespaces or (), selection.pods
