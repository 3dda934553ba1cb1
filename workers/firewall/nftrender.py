"""The firewall's nftables table as text: sets, maps and chains, from policies and the frame.

Pure. Every rule is written as nftables itself lists it (1.0.6; `nftplan.normal` knows how other versions spell the
same), so that what stands in the kernel can be compared with what should. The way of a packet:

| chain                  | rules                                                                                      |
|------------------------|--------------------------------------------------------------------------------------------|
| KUBE-ROUTER-INPUT      | out: service ranges, real node ports; clear marks; no local pod: to TAIL; COMMON; egress   |
| KUBE-ROUTER-FORWARD    | clear marks; no local pod: to TAIL; COMMON; a pod to itself passes; egress; ingress; passed |
| KUBE-ROUTER-OUTPUT     | the same, and what the node itself sends to its pods is accepted                           |
| KUBE-NWPLCY-COMMON     | drop invalid, accept established, accept the ICMP that nobody may lose                     |
| KUBE-POD-FW-…          | one a direction and *list of policies*: ask each until one allows; else log and reject     |
| KUBE-NWPLCY-…          | one a policy and direction: a rule a clause, to DEFAULT                                    |
| KUBE-NWPLCY-DEFAULT    | mark as allowed in this direction                                                          |
| KUBE-NWPLCY-TAIL       | default deny's rejects; accept what passed                                                 |

Two verdict maps lead from a pod's address to its chain: a packet finds it in one look-up however many pods there are,
and pods with the same policies share a chain. The map's comments tell which pod an address is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kube_router.ipc.messages import Key
from kube_router.workers.firewall import names
from kube_router.workers.firewall.rules import (
    BlockSet,
    Clause,
    Direction,
    Frame,
    PolicyRules,
    PortRange,
    PortSet,
    SetKey,
)
from kube_router.workers.model import Family, IPNetwork

KIND = {Family.IPV4: "ip", Family.IPV6: "ip6"}
ADDRESS_TYPE = {Family.IPV4: "ipv4_addr", Family.IPV6: "ipv6_addr"}

CLEAR_MARKS = f"meta mark set meta mark & {0xFFFFFFFF ^ names.ALLOWED ^ names.PASSED:#010x}"
CLEAR_ALLOWED = f"meta mark set meta mark & {0xFFFFFFFF ^ names.ALLOWED:#010x}"
NOT_ALLOWED = f"meta mark & {names.ALLOWED:#010x} == 0x00000000"
SET_ALLOWED = f"meta mark set meta mark | {names.ALLOWED:#010x}"
SET_PASSED = f"meta mark set meta mark | {names.PASSED:#010x}"
HAS_PASSED = f"meta mark & {names.PASSED:#010x} == {names.PASSED:#010x}"

_PEER_SIDE = {Direction.INGRESS: "saddr", Direction.EGRESS: "daddr"}
_POD_SIDE = {Direction.INGRESS: "daddr", Direction.EGRESS: "saddr"}
_ICMP = {
    Family.IPV4: ("icmp", ("echo-request", "destination-unreachable", "time-exceeded")),
    Family.IPV6: (
        "icmpv6",
        (
            "echo-request",
            "destination-unreachable",
            "time-exceeded",
            "nd-neighbor-solicit",
            "nd-neighbor-advert",
            "echo-reply",
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a set is: ``type`` in nftables' words (``ipv4_addr : verdict`` for a map). ``comment`` is no part of it."""

    name: str
    type: str
    interval: bool = False
    comment: str = ""

    @property
    def word(self) -> str:
        """``set`` or ``map``."""
        return "map" if ":" in self.type else "set"

    def same(self, other: Shape) -> bool:
        """Whether the other can be taken for it."""
        return (self.type, self.interval) == (other.type, other.interval)

    def __str__(self) -> str:
        """What follows the name when it is created."""
        flags = "flags interval; " if self.interval else ""
        comment = f'comment "{self.comment}"; ' if self.comment else ""
        return f"{{ type {self.type}; {flags}{comment}}}"


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain; ``hook`` is ``input``, ``forward``, ``output`` or empty. ``comment`` is no part of what it is."""

    name: str
    rules: tuple[str, ...]
    hook: str = ""
    comment: str = ""

    @property
    def header(self) -> str:
        """Type, hook and policy as nftables lists them; empty for a chain that packets only jump to."""
        return f"type filter hook {self.hook} priority filter; policy accept;" if self.hook else ""

    def __str__(self) -> str:
        """What follows the name when it is created."""
        comment = f'comment "{self.comment}"; ' if self.comment else ""
        header = f"{self.header} " if self.hook else ""
        return f" {{ {header}{comment}}}" if header or comment else ""


def commented(rule: str, comment: str) -> str:
    """A rule with a comment, as listed."""
    return f'{rule} comment "{comment}"'


def set_shape(key: SetKey, name: str, family: Family) -> Shape:
    """The set of a clause; a port belongs to an address, or it would open that port of others (S7)."""
    if isinstance(key, BlockSet):
        return Shape(name, ADDRESS_TYPE[family], interval=True, comment="netpol ipblock set")
    if isinstance(key, PortSet):
        return Shape(name, f"{ADDRESS_TYPE[family]} . inet_proto . inet_service", comment="netpol named port set")
    return Shape(name, ADDRESS_TYPE[family], comment="netpol set")


def frame_shapes(family: Family) -> tuple[Shape, ...]:
    """The sets and maps that are always there."""
    address = ADDRESS_TYPE[family]
    return (
        Shape(names.LOCAL_PODS, address, comment="programmed local pod IPs"),
        Shape(names.THEMSELVES, f"{address} . {address}", comment="a pod and itself"),
        *(
            Shape(name, "inet_service", comment=f"{protocol} node ports of Services")
            for protocol, name in names.NODE_PORTS.items()
        ),
        *(
            Shape(name, f"{address} : verdict", comment=f"{direction} of isolated pods")
            for direction, name in names.POD_MAPS.items()
        ),
    )


def element_text(member: str) -> str:
    """``10.0.0.1,tcp:80`` as ``10.0.0.1 . tcp . 80``; other members are written alike everywhere."""
    address, comma, endpoint = member.partition(",")
    return f"{address} . {endpoint.replace(':', ' . ')}" if comma else member


def map_element(address: str, chain: str, pod: Key) -> str:
    """The element of a verdict map that leads a pod's packets to its chain."""
    comment = names.comment(pod, "").strip().replace(",", "")  # which parts elements
    return f'{address} comment "{comment}" : jump {chain}'


def policy_chain(
    rules: PolicyRules,
    direction: Direction,
    family: Family,
    set_name: Callable[[SetKey], str],
    left_out: Callable[[Clause], bool] = lambda clause: False,
) -> Chain | None:
    """The clauses of a policy, in their order; None if it does not cover the direction.

    ``left_out`` tells clauses that the kernel has refused: what is not there allows nothing.
    """
    clauses = rules.clauses(direction)
    if clauses is None:
        return None
    return Chain(
        names.policy_chain(rules.key, direction),
        tuple(
            clause_rule(rules.key, clause, direction, family, set_name)
            for clause in clauses
            if of_family(clause, family) and not left_out(clause)
        ),
        comment=names.comment(Key(f"netpol {rules.key}"), direction),
    )


def of_family(clause: Clause, family: Family) -> bool:
    """Whether a clause concerns a family: blocks are of one, everything else is of both."""
    return not isinstance(clause.peer, BlockSet) or clause.peer.family is family


def clause_rule(
    policy: Key, clause: Clause, direction: Direction, family: Family, set_name: Callable[[SetKey], str]
) -> str:
    """One rule: the matches of a clause, and on to DEFAULT, which returns to the pod's chain."""
    ip = KIND[family]
    parts = []
    if clause.peer is not None:
        parts.append(f"{ip} {_PEER_SIDE[direction]} @{set_name(clause.peer)}")
    if isinstance(clause.port, PortSet):
        parts.append(f"{ip} daddr . meta l4proto . th dport @{set_name(clause.port)}")
    elif clause.port is not None:
        parts.append(port_match(clause.port))
    parts.append(f"counter goto {names.DEFAULT_CHAIN}")
    return commented(" ".join(parts), names.comment(policy, clause.kind))


def port_match(port: PortRange) -> str:
    """``tcp dport 80``, ``tcp dport 80-90``, ``meta l4proto tcp``."""
    protocol = port.protocol.lower()
    if port.first is None:
        return f"meta l4proto {protocol}"
    if port.last is None or port.last == port.first:
        return f"{protocol} dport {port.first}"
    return f"{protocol} dport {port.first}-{port.last}"


@functools.lru_cache(maxsize=1024)
def group_chain(keys: tuple[Key, ...], direction: Direction) -> Chain:
    """The chain of the pods that exactly these policies isolate in a direction, the same in both families.

    The rest of the policies is not asked once one of them has allowed. Remembered: a changed pod leaves the chains of
    all other pods as they are.
    """
    asks = (
        commented(f"{NOT_ALLOWED} counter jump {names.policy_chain(key, direction)}", names.comment(key, "policy"))
        for key in keys
    )
    listed = names.comment(Key(", ".join(keys)), "").strip()
    log = f"{NOT_ALLOWED} limit rate 10/minute burst 10 packets log group {names.LOG_GROUP}"
    return Chain(
        names.group_chain(keys, direction),
        (
            CLEAR_ALLOWED,
            *asks,
            commented(log, f"{direction} log-drop"),
            commented(f"{NOT_ALLOWED} counter reject", f"{direction} reject"),
        ),
        comment=names.comment(Key(f"podfw {direction}"), listed),
    )


def frame_chains(family: Family, frame: Frame) -> tuple[Chain, ...]:
    """The chains that do not depend on policies."""
    return (
        Chain(names.DEFAULT_CHAIN, (commented(f"counter {SET_ALLOWED}", "mark netpol match"),)),
        Chain(names.COMMON_CHAIN, _common(family, frame)),
        Chain(names.TAIL_CHAIN, _tail(family, frame)),
        _top("INPUT", (*_exempt(family, frame), CLEAR_MARKS, *_input(family))),
        _top("FORWARD", (CLEAR_MARKS, *_pods(family, from_node=False))),
        _top("OUTPUT", (CLEAR_MARKS, *_pods(family, from_node=True))),
    )


def _top(hook: str, rules: tuple[str, ...]) -> Chain:
    name = names.TOP_CHAINS[hook]
    return Chain(name, rules, hook=hook.lower(), comment=f"top level {name} chain for kube-router")


def _exempt(family: Family, frame: Frame) -> Iterable[str]:
    """What the proxy still has to translate passes: egress policy is asked when its real destination is known."""
    ip = KIND[family]
    for network in _of_family(frame.cluster_ranges, family):
        yield commented(f"{ip} daddr {network} counter return", "allow cluster IP range")
    for protocol, name in names.NODE_PORTS.items():
        rule = f"fib daddr type local {protocol} dport @{name} counter return"
        yield commented(rule, f"allow {protocol} nodeport")
    for network in _of_family(frame.external_ranges, family):
        yield commented(f"{ip} daddr {network} counter return", "allow traffic to External IP range")
    for network in _of_family(frame.load_balancer_ranges, family):
        yield commented(f"{ip} daddr {network} counter return", "allow LB IP range")


def _input(family: Family) -> tuple[str, ...]:
    ip = KIND[family]
    return (
        f"{ip} saddr != @{names.LOCAL_PODS} counter goto {names.TAIL_CHAIN}",
        commented(f"counter jump {names.COMMON_CHAIN}", "common netpol rules"),
        _dispatch(family, Direction.EGRESS),
        *_passed(),
    )


def _pods(family: Family, *, from_node: bool) -> tuple[str, ...]:
    ip, local = KIND[family], names.LOCAL_PODS
    # Only in OUTPUT is a local source the node: elsewhere it is forged (S9).
    node = (commented("fib saddr type local counter accept", "from local node"),) if from_node else ()
    itself = f"{ip} saddr . {ip} daddr @{names.THEMSELVES} counter {SET_PASSED} goto {names.TAIL_CHAIN}"
    return (
        f"{ip} saddr != @{local} {ip} daddr != @{local} counter goto {names.TAIL_CHAIN}",
        commented(f"counter jump {names.COMMON_CHAIN}", "common netpol rules"),
        *node,
        commented(itself, "a pod reaches itself"),
        _dispatch(family, Direction.EGRESS),
        _dispatch(family, Direction.INGRESS),
        *_passed(),
    )


def _dispatch(family: Family, direction: Direction) -> str:
    return f"{KIND[family]} {_POD_SIDE[direction]} vmap @{names.POD_MAPS[direction]}"


def _passed() -> tuple[str, ...]:
    return (
        commented(SET_PASSED, "set netpol-ok mark"),
        commented(f"counter jump {names.TAIL_CHAIN}", "netpol accept/reject"),
    )


def _common(family: Family, frame: Frame) -> tuple[str, ...]:
    word, types = _ICMP[family]
    stray = "tcp flags != syn / fin,syn,rst,ack counter reject with tcp reset"
    return (
        commented("ct state invalid counter drop", "rule to drop invalid state for pod"),
        commented("ct state established,related counter accept", "rule for stateful firewall for pod"),
        *((commented(stray, "reset what is of no connection and opens none"),) if frame.only_syn_opens else ()),
        *(commented(f"{word} type {kind} counter accept", f"allow icmp {kind} messages") for kind in types),
    )


def _tail(family: Family, frame: Frame) -> tuple[str, ...]:
    ip, rules = KIND[family], []
    if frame.default_deny:
        for network in _of_family(frame.pod_cidrs, family):
            for side in ("saddr", "daddr"):
                # The bridge's own address is of the pods' network and no pod's.
                match = f"{ip} {side} {network} {ip} {side} != @{names.LOCAL_PODS} fib {side} type != local"
                rules.append(commented(f"{match} counter reject", "reject unprogrammed local pod (default-deny)"))
    return (*rules, commented(f"{HAS_PASSED} counter accept", "accept netpol-ok"))


def _of_family(networks: Iterable[IPNetwork], family: Family) -> Iterable[str]:
    for network in networks:
        if network.version == family:
            whole = network.prefixlen == network.max_prefixlen
            yield str(network.network_address) if whole else str(network)
