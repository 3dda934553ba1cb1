"""The chains of iptables that depend on no pod and no policy, and the jumps that lead to them.

Pure. Positions, comments and marks are upstream's; what each chain is for stands in `chains.py`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from kube_router.workers.firewall.names import (
    ALLOWED,
    COMMON_CHAIN,
    DEFAULT_CHAIN,
    IPSET_NODE_PORTS,
    LOCAL_PODS,
    PASSED,
    TAIL_CHAIN,
    TOP_CHAINS,
    dispatch_chain,
    ipset_name,
    upstream_digest,
)
from kube_router.workers.firewall.rules import Direction, Frame
from kube_router.workers.firewall.ruletext import REJECT, Rules, clear, commented, network, rule, set_mark
from kube_router.workers.model import Family, IPNetwork
from kube_router.workers.rulefacts import RuleText

_ICMP = {
    Family.IPV4: (
        ("echo requests", 8),
        ("destination unreachable messages", 3),
        ("time exceeded messages", 11),
    ),
    Family.IPV6: (
        ("echo requests", 128),
        ("destination unreachable messages", 1),
        ("time exceeded messages", 3),
        ("neighbor solicitation messages", 135),
        ("neighbor advertisement messages", 136),
        ("echo reply messages", 129),
    ),
}


_MULTIPORT = 15
"""Ports that one match of ``multiport`` takes."""


def jump_rule(hook: str) -> RuleText:
    """The rule at position 1 of a built-in chain; upstream's text."""
    target = TOP_CHAINS[hook]
    return rule(_upstream_comment(hook, "kube-router netpol", "-j", target), f"-j {target}")


def frame_chains(frame: Frame, family: Family, without: Container[str] = ()) -> dict[str, Rules]:
    """The chains that do not depend on pods or policies. ``without``: sets of node ports that no rule may name."""
    return {
        TOP_CHAINS["INPUT"]: tuple(_input(frame, family, without)),
        TOP_CHAINS["FORWARD"]: tuple(_forward(family)),
        TOP_CHAINS["OUTPUT"]: tuple(_output(family)),
        DEFAULT_CHAIN: (rule(commented("rule to mark traffic matching a network policy"), set_mark(ALLOWED, ALLOWED)),),
        COMMON_CHAIN: tuple(_common(frame, family)),
        TAIL_CHAIN: tuple(_tail(frame, family)),
    }


def _input(frame: Frame, family: Family, without: Container[str]) -> Iterator[RuleText]:
    """Traffic to the node itself. What the proxy has yet to translate is asked about after that, in OUTPUT."""
    chain = TOP_CHAINS["INPUT"]

    def exempt(text: str, networks: Sequence[IPNetwork]) -> Iterator[RuleText]:
        for cidr in networks:
            if cidr.version == family:
                words = text.format(cidr)
                yield rule(
                    network("-d", cidr),
                    _upstream_comment(chain, words, "-d", str(cidr), "-j", "RETURN"),
                    "-j RETURN",
                )

    yield from exempt("allow traffic to primary/secondary cluster IP range", frame.cluster_ranges)
    for protocol, match in _node_ports(frame, without):
        words = f"allow LOCAL {protocol.upper()} traffic to node ports"
        rest = ("-m", "addrtype", "--dst-type", "LOCAL", *match, "-j", "RETURN")
        yield rule(f"-p {protocol}", _upstream_comment(chain, words, *rest, before=("-p", protocol)), *rest)
    yield from exempt("allow traffic to external IP range: {}", frame.external_ranges)
    yield from exempt("allow traffic to load balancer IP range: {}", frame.load_balancer_ranges)
    yield clear(ALLOWED | PASSED)
    yield rule(_local(family, "src", negated=True), f"-g {TAIL_CHAIN}")
    yield _common_jump()
    yield _dispatch_jump(family, Direction.EGRESS, conditional=False)
    yield from _verdict()


def _node_ports(frame: Frame, without: Container[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Protocol and match. Ports of SCTP stand in the rules: in a set of ports the kernel finds TCP and UDP only."""
    for protocol, name in IPSET_NODE_PORTS.items():
        if name not in without:
            yield protocol, ("-m", "set", "--match-set", name, "dst")
    ports = sorted(port for protocol, port in frame.node_ports if protocol == "sctp")
    for start in range(0, len(ports), _MULTIPORT):
        listed = ",".join(map(str, ports[start : start + _MULTIPORT]))
        yield "sctp", ("-m", "multiport", "--dports", listed)


def _forward(family: Family) -> Iterator[RuleText]:
    yield clear(ALLOWED | PASSED)
    yield _others(family)
    yield _common_jump()
    yield _dispatch_jump(family, Direction.EGRESS)
    yield _dispatch_jump(family, Direction.INGRESS)
    yield from _verdict()


def _output(family: Family) -> Iterator[RuleText]:
    """The node's own traffic may reach any pod; what IPVS has translated comes through here too."""
    yield clear(ALLOWED | PASSED)
    yield _others(family)
    yield _common_jump()
    yield rule(commented("from local node"), "-m addrtype --src-type LOCAL -j ACCEPT")
    yield _dispatch_jump(family, Direction.EGRESS)
    yield _dispatch_jump(family, Direction.INGRESS)
    yield from _verdict()


def _local(family: Family, side: str, *, negated: bool = False) -> str:
    return f"-m set {'! ' if negated else ''}--match-set {ipset_name(LOCAL_PODS, family)} {side}"


def _others(family: Family) -> RuleText:
    """Two look-ups are all that a packet costs that no pod of this node sends or gets."""
    return rule(_local(family, "src", negated=True), _local(family, "dst", negated=True), f"-g {TAIL_CHAIN}")


def _common_jump() -> RuleText:
    return rule(commented("common netpol rules"), f"-j {COMMON_CHAIN}")


def _dispatch_jump(family: Family, direction: Direction, *, conditional: bool = True) -> RuleText:
    side = "dst" if direction is Direction.INGRESS else "src"
    return rule(_local(family, side) if conditional else "", f"-j {dispatch_chain(direction)}")


def _verdict() -> Iterator[RuleText]:
    yield rule(commented("set netpol-ok mark"), set_mark(PASSED, PASSED))
    words = "rule to explicitly handle traffic for network policies ACCEPT/REJECT decision"
    yield rule(commented(words), f"-j {TAIL_CHAIN}")


def _common(frame: Frame, family: Family) -> Iterator[RuleText]:
    """As upstream, whose comments have quotes of their own."""
    yield rule(commented('"rule to drop invalid state for pod"'), "-m conntrack --ctstate INVALID -j DROP")
    yield rule(
        commented('"rule for stateful firewall for pod"'), "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
    )
    if frame.only_syn_opens:
        stray = "-m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j REJECT --reject-with tcp-reset"
        yield rule("-p tcp", commented("reset what is of no connection and opens none"), stray)
    protocol, match, option = (
        ("icmp", "icmp", "--icmp-type") if family is Family.IPV4 else ("ipv6-icmp", "icmp6", "--icmpv6-type")
    )
    for words, number in _ICMP[family]:
        yield rule(f"-p {protocol}", commented(f"allow icmp {words}"), f"-m {match} {option} {number} -j ACCEPT")


def _tail(frame: Frame, family: Family) -> Iterator[RuleText]:
    """With default-deny a pod that has no place in the rules yet is refused; the bridge, of the same range, is not."""
    cidrs = [cidr for cidr in frame.pod_cidrs if cidr.version == family] if frame.default_deny else []
    for cidr in cidrs:
        for option, side in (("-s", "src"), ("-d", "dst")):
            yield rule(
                network(option, cidr),
                commented("reject unprogrammed local pod (default-deny)"),
                f"-m addrtype ! --{side}-type LOCAL",
                _local(family, side, negated=True),
                REJECT[family],
            )
    yield rule(commented("accept netpol-ok"), f"-m mark --mark {PASSED:#x}/{PASSED:#x} -j ACCEPT")


def _upstream_comment(chain: str, text: str, *after: str, before: tuple[str, ...] = ()) -> str:
    """The comment with upstream's identity of a positioned rule behind it: a digest of the chain and its arguments."""
    arguments = (*before, "-m", "comment", "--comment", text, *after)
    return commented(f"{text} - {upstream_digest(chain + ''.join(arguments))}")
