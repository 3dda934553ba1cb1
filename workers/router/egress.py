"""Pod egress and forwarding: the ipsets, the masquerade rule and the FORWARD accepts that a node should have.

Pure: node facts and settings in, desired values and plans out. Names, texts and orders are upstream's; all four
historic forms of the masquerade rule are recognised as ours and the wrong ones removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kube_router.workers.model import Family, IPNetwork
from kube_router.workers.nodefacts import NodeFacts
from kube_router.workers.rulefacts import RulePlan, RuleStep, RuleText, SetName, SetSpec

POD_BRIDGE = "kube-bridge"
FORWARD = ("filter", "FORWARD")
POSTROUTING = ("nat", "POSTROUTING")
NETPOL_CHAIN = "KUBE-ROUTER-FORWARD"
"""The firewall's chain: what is below its jump cannot bypass network policy, so the accepts go there."""

OUTBOUND = RuleText(f'-i {POD_BRIDGE} -m comment --comment "allow outbound traffic from pods" -j ACCEPT')
INBOUND = RuleText(f'-o {POD_BRIDGE} -m comment --comment "allow inbound traffic to pods" -j ACCEPT')
_NODE_PORT_COMMENT = "allow outbound node port traffic on node interface with which node ip is associated"
_NODE_PORT = re.compile(rf'-o \S+ -m comment --comment "{_NODE_PORT_COMMENT}" -j ACCEPT')


def set_specs(family: Family) -> tuple[SetSpec, SetSpec]:
    """(node addresses, pod subnets), in the order in which they are filled.

    Node addresses come first: pod subnets make the rule match, so traffic to nodes is exempt before anything matches.
    """
    prefix = "inet6:" if family is Family.IPV6 else ""
    return (
        SetSpec(SetName(f"{prefix}kube-router-node-ips"), "hash:ip", family),
        SetSpec(SetName(f"{prefix}kube-router-pod-subnets"), "hash:net", family),
    )


def desired_sets(family: Family, nodes: Iterable[NodeFacts]) -> dict[SetSpec, frozenset[str]]:
    """Members of the two sets as text: all addresses of nodes that have a pod CIDR, and all pod CIDRs.

    As upstream, a node without any pod CIDR (a control plane that runs no pods) does not count.
    """
    node_ips, pod_subnets = set_specs(family)
    addresses: set[str] = set()
    subnets: set[str] = set()
    for node in nodes:
        if node.pod_cidrs:
            addresses.update(map(str, node.addresses_of(family)))
            subnets.update(text for cidr in node.pod_cidrs_of(family) for text in _as_members(cidr))
    return {node_ips: frozenset(addresses), pod_subnets: frozenset(subnets)}


def _as_members(cidr: IPNetwork) -> Iterable[str]:
    """The CIDR, or its two halves for the whole family: hash:net has no prefix length 0."""
    return map(str, cidr.subnets() if cidr.prefixlen == 0 else (cidr,))


def egress_rule(family: Family, *, random_fully: bool, node_ips: bool = True) -> RuleText:
    """Masquerade what leaves the pods for anywhere but pods and nodes."""
    nodes, pods = (spec.name for spec in set_specs(family))
    parts = [f"-m set --match-set {pods} src -m set ! --match-set {pods} dst"]
    if node_ips:
        parts.append(f"-m set ! --match-set {nodes} dst")
    parts.append("-j MASQUERADE")
    if random_fully:
        parts.append("--random-fully")
    return RuleText(" ".join(parts))


def egress_forms(family: Family) -> frozenset[RuleText]:
    """Every form that this rule ever had, all of them ours."""
    return frozenset(
        egress_rule(family, random_fully=random, node_ips=nodes) for random in (False, True) for nodes in (False, True)
    )


def plan_egress(family: Family, actual: Sequence[RuleText], wanted: RuleText | None) -> RulePlan:
    """Steps that leave ``wanted`` exactly once in nat POSTROUTING, and no other form of it; None: none at all."""
    table, chain = POSTROUTING
    steps = []
    if wanted is not None and wanted not in actual:
        steps.append(RuleStep("append", chain, wanted))
    steps += _deletions(chain, actual, {wanted}, egress_forms(family))
    return RulePlan(family, table, tuple(steps))


def forward_rules(node_interface: str) -> tuple[RuleText, ...]:
    """The accepts in the order in which they are inserted; read from the top the chain has them reversed.

    Without a known node interface (empty name) the third is left out.
    """
    node_port = RuleText(f'-o {node_interface} -m comment --comment "{_NODE_PORT_COMMENT}" -j ACCEPT')
    return (OUTBOUND, INBOUND, node_port) if node_interface else (OUTBOUND, INBOUND)


def plan_forward(
    family: Family, actual: Sequence[RuleText], wanted: Sequence[RuleText], *, hold_deletions: bool = False
) -> RulePlan:
    """Steps that leave each of ``wanted`` once in filter FORWARD, below the network policy jump, and no other of ours.

    New rules are inserted at the top, or right below the firewall's jump when that is there: a repair must not open a
    way around network policy. Rules that are there already stay where they are.
    """
    table, chain = FORWARD
    jumps = [index for index, rule in enumerate(actual, 1) if rule.endswith(f"-j {NETPOL_CHAIN}")]
    position = max(jumps, default=0) + 1
    steps = [RuleStep("insert", chain, rule, position) for rule in wanted if rule not in actual]
    if not hold_deletions:
        ours = {rule for rule in actual if is_forward_accept(rule)}
        steps += _deletions(chain, actual, set(wanted), ours)
    return RulePlan(family, table, tuple(steps))


def is_forward_accept(rule: RuleText) -> bool:
    """Whether a rule of FORWARD is one of ours, for whatever node interface."""
    return rule in (OUTBOUND, INBOUND) or _NODE_PORT.fullmatch(rule) is not None


def _deletions(
    chain: str, actual: Sequence[RuleText], wanted: set[RuleText] | set[RuleText | None], ours: Iterable[RuleText]
) -> list[RuleStep]:
    """One deletion for each rule of ours that is not wanted, or is there more often than once."""
    steps = []
    for rule in sorted(ours):
        surplus = actual.count(rule) - (rule in wanted)
        steps += [RuleStep("delete", chain, rule)] * max(0, surplus)
    return steps
