"""The firewall's chains of iptables, as text: what pods and policies come to, and all chains together.

Pure. The texts are those that ``iptables-save`` prints (`ruletext.py`).

========================= ============================================================== ====================
chain                     does                                                           leads to
========================= ============================================================== ====================
KUBE-ROUTER-INPUT,        first in the built-in chains: lets pass what does not concern  COMMON, dispatch,
-FORWARD, -OUTPUT         the pods of this node, asks for both directions, marks PASSED  TAIL
KUBE-POD-BY-*             by the pod's address (`dispatch.py`)                           pod chains
KUBE-POD-FW-*             one isolated pod, one direction: refuses what no policy allows policy chains
KUBE-NWPLCY-*             one policy, one direction: a rule a clause                     DEFAULT
KUBE-NWPLCY-DEFAULT       marks ALLOWED
KUBE-NWPLCY-COMMON        what no policy is asked about: replies, some ICMP; INVALID out
KUBE-NWPLCY-TAIL          accepts what PASSED; with default-deny refuses unknown pods
========================= ============================================================== ====================
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Container, Iterable, Iterator, Mapping

from kube_router.ipc.messages import Key
from kube_router.workers.firewall.dispatch import dispatch_chains, prefix_text
from kube_router.workers.firewall.names import (
    ALLOWED,
    DEFAULT_CHAIN,
    LOG_GROUP,
    comment,
    ipset_name,
    pod_chain,
    policy_chain,
    set_name,
)
from kube_router.workers.firewall.rules import (
    BlockSet,
    Clause,
    Direction,
    Frame,
    LocalPod,
    PolicyRules,
    PortRange,
    PortSet,
    Ruleset,
    SetKey,
)
from kube_router.workers.firewall.ruletext import NOT_ALLOWED, REJECT, Rules, clear, commented, rule
from kube_router.workers.firewall.topchains import frame_chains
from kube_router.workers.model import Family
from kube_router.workers.rulefacts import RuleText

SetNamer = Callable[[SetKey, Family], str]
"""Name of a set for ``--match-set``."""


def ipset_of(key: SetKey, family: Family) -> str:
    """The name of a set in ipset."""
    return ipset_name(set_name(key, family), family)


def pod_rules(pod: LocalPod, direction: Direction, family: Family, programmed: Container[Key]) -> Rules:
    """The chain of an isolated pod: what none of its policies allows is logged, within a limit, and refused.

    A policy is asked only while none before it has allowed the packet. One that is not ``programmed`` has no chain and
    allows nothing. The pod reaches itself whatever they say, as by a Service of its own.
    """
    key = pod.facts.key
    other_end = "-s" if direction is Direction.INGRESS else "-d"
    own = sorted(int(ipaddress.ip_address(address)) for address in pod.addresses_of(family))
    policies = [name for name in pod.policies(direction) or () if name in programmed]
    return (
        clear(ALLOWED),
        *(rule(f"{other_end} {prefix_text(family, value, family.bits)}/{family.bits} -j RETURN") for value in own),
        *(_policy_jump(name, direction) for name in policies),
        rule(
            commented(comment(key, "log-drop")),
            NOT_ALLOWED,
            f"-m limit --limit 10/min --limit-burst 10 -j NFLOG --nflog-group {LOG_GROUP}",
        ),
        rule(commented(comment(key, "reject")), NOT_ALLOWED, REJECT[family]),
    )


def _policy_jump(name: Key, direction: Direction) -> RuleText:
    return rule(commented(comment(name, "policy")), NOT_ALLOWED, f"-j {policy_chain(name, direction)}")


def policy_rules(
    policy: PolicyRules,
    direction: Direction,
    family: Family,
    *,
    named: SetNamer = ipset_of,
    without: Container[tuple[SetKey, Family]] = (),
) -> Rules:
    """The chain of a policy: a rule for each clause of that family. Empty allows nothing.

    A clause that names a set which could not be made (``without``) is left out, so that it allows nothing.
    """
    rules: dict[RuleText, None] = {}
    for clause in policy.clauses(direction) or ():
        if any(isinstance(key, BlockSet) and key.family is not family for key in clause.sets):
            continue
        if any((key, family) in without for key in clause.sets):
            continue
        rules[_clause(policy.key, clause, direction, family, named)] = None
    return tuple(rules)


def _clause(name: Key, clause: Clause, direction: Direction, family: Family, named: SetNamer) -> RuleText:
    port, side = clause.port, "src" if direction is Direction.INGRESS else "dst"
    protocol = port.protocol.lower() if isinstance(port, PortRange) else ""
    return rule(
        f"-p {protocol}" if protocol else "",
        commented(comment(name, clause.kind)),
        f"-m set --match-set {named(clause.peer, family)} {side}" if clause.peer is not None else "",
        f"-m set --match-set {named(port, family)} dst,dst" if isinstance(port, PortSet) else "",
        _ports(port) if isinstance(port, PortRange) and port.first is not None else "",
        f"-g {DEFAULT_CHAIN}",
    )


def _ports(port: PortRange) -> str:
    last = port.first if port.last is None else port.last
    span = f"{port.first}" if last == port.first else f"{port.first}:{last}"
    return f"-m {port.protocol.lower()} --dport {span}"


def pod_chains(pod: LocalPod, family: Family, programmed: Container[Key]) -> Iterator[tuple[str, Rules]]:
    """The chains of a pod, by name: one for each direction in which it is isolated, if it has addresses."""
    if pod.addresses_of(family):
        for direction in Direction:
            if pod.policies(direction) is not None:
                yield pod_chain(pod.facts.key, direction), pod_rules(pod, direction, family, programmed)


def policy_chains(
    policy: PolicyRules,
    family: Family,
    *,
    named: SetNamer = ipset_of,
    without: Container[tuple[SetKey, Family]] = (),
) -> Iterator[tuple[str, Rules]]:
    """The chains of a policy, by name: one for each direction that it covers."""
    for direction in Direction:
        if policy.clauses(direction) is not None:
            rules = policy_rules(policy, direction, family, named=named, without=without)
            yield policy_chain(policy.key, direction), rules


Isolated = Mapping[Direction, Mapping[str, str]]
"""By direction, the pod chain of each address whose pod is isolated in it."""


def isolated(pods: Iterable[LocalPod], family: Family) -> Isolated:
    """Who is isolated."""
    found: dict[Direction, dict[str, str]] = {direction: {} for direction in Direction}
    for pod in pods:
        for direction, by_address in found.items():
            if pod.policies(direction) is not None:
                chain = pod_chain(pod.facts.key, direction)
                by_address.update((address, chain) for address in pod.addresses_of(family))
    return found


def dispatched(found: Isolated, family: Family) -> dict[str, Rules]:
    """The chains that lead to the pods' chains, of both directions."""
    chains: dict[str, Rules] = {}
    for direction, by_address in found.items():
        chains |= dispatch_chains(family, direction, by_address)
    return chains


def render(
    ruleset: Ruleset,
    frame: Frame,
    family: Family,
    *,
    named: SetNamer = ipset_of,
    without: Container[tuple[SetKey, Family]] = (),
    without_fixed: Container[str] = (),
) -> dict[str, Rules]:
    """All chains of a family, by name. ``without_fixed``: sets of node ports that could not be made."""
    chains = frame_chains(frame, family, without_fixed)
    chains |= dispatched(isolated(ruleset.pods.values(), family), family)
    for pod in ruleset.pods.values():
        chains |= pod_chains(pod, family, ruleset.policies)
    for policy in ruleset.policies.values():
        chains |= policy_chains(policy, family, named=named, without=without)
    return chains
