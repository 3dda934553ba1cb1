"""What the cni worker wants: kube-bridge, the bridge sysctls and what shall stand in the CNI configuration file.

Pure: the own Node, the settings and the links in, `DesiredCni` out. The state of the same shape as it is (`ActualCni`)
is defined here too, so that both can be read side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kube_router.ipc.messages import Node
from kube_router.workers.cni.names import (
    BRIDGE,
    CALL_IP6TABLES,
    CALL_IPTABLES,
    DISABLE_IPV6,
    FORWARD_IPV4,
    FORWARD_IPV6,
    PHASE_NODE,
)
from kube_router.workers.linkfacts import LOOPBACK, IPInterface, Links
from kube_router.workers.model import Failure, Family, IPNetwork
from kube_router.workers.nodefacts import INVALID_POD_CIDR, NodeFacts, node_facts
from kube_router.workers.settings import Settings

MOST_BRIDGE_MTU = 65535
"""ETH_MAX_MTU (linux/if_ether.h): a bridge takes no more, though ``lo`` has 65536."""
LEAST_IPV6_MTU = 1280
"""RFC 8200 section 5; the kernel takes IPv6 off a link with less."""


@dataclass(frozen=True, slots=True)
class OwnNode:
    """The node that this agent runs on, as the newest snapshot has it.

    ``facts`` is None when there is no such Node. ``every_pod_cidr`` also has those of families that are not enabled.
    ``confirmed``: the snapshot comes from the source and not from disk, so that things may be removed on its word.
    """

    name: str
    facts: NodeFacts | None
    every_pod_cidr: tuple[IPNetwork, ...]
    confirmed: bool


@dataclass(frozen=True, slots=True)
class DesiredBridge:
    """kube-bridge, up; ``mtu`` None leaves the MTU as it is."""

    mtu: int | None


@dataclass(frozen=True, slots=True)
class DesiredConf:
    """What shall be in the configuration file at ``path``.

    ``ranges`` are the node's pod CIDRs in order. ``removable``: other ranges of ours may go. ``claimable``: what counts
    as put in by us when no record tells. ``mtu`` None leaves the user's.
    """

    path: str
    ranges: tuple[IPNetwork, ...]
    claimable: tuple[IPNetwork, ...]
    removable: bool
    mtu: int | None


@dataclass(frozen=True, slots=True)
class DesiredCni:
    """Everything that the worker wants; the default is what ``--cleanup-config`` wants: nothing.

    ``sysctls`` maps paths below /proc/sys to values; ``forwarding`` are the switches that must be on once a pod is
    there, which the bridge plugin sees to. ``failures`` and ``warnings`` tell why something is not wanted.
    """

    bridge: DesiredBridge | None = None
    sysctls: Mapping[str, str] = field(default_factory=dict)
    forwarding: tuple[str, ...] = ()
    conf: DesiredConf | None = None
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ActualBridge:
    """The link called kube-bridge. ``kind`` is the kernel's; ``ports`` are the names of its ports."""

    index: int
    kind: str
    up: bool
    mtu: int
    ports: tuple[str, ...] = ()
    addresses: tuple[IPInterface, ...] = ()


@dataclass(frozen=True, slots=True)
class ActualConf:
    """The configuration file: its text, or why it has none. ``recorded`` is None when no record tells what is ours."""

    text: str | None
    error: str | None
    recorded: tuple[IPNetwork, ...] | None


@dataclass(frozen=True, slots=True)
class ActualCni:
    """What is there; a sysctl that does not exist is None."""

    bridge: ActualBridge | None = None
    sysctls: Mapping[str, str | None] = field(default_factory=dict)
    conf: ActualConf | None = None


def own_node(name: str, node: Node | None, families: tuple[Family, ...], confirmed: bool) -> OwnNode:
    """The facts of the own node, read once with the enabled families and once with all."""
    if node is None:
        return OwnNode(name, None, (), confirmed)
    return OwnNode(name, node_facts(node, families), node_facts(node, Family).pod_cidrs, confirmed)


def desired_state(own: OwnNode, links: Links, settings: Settings, *, mtu_refused: bool = False) -> DesiredCni:
    """What the worker wants.

    ``mtu_refused``: the kernel did not take the MTU for the bridge a moment ago; then the bridge keeps its own, and
    that one goes into the file.
    """
    mtu, warnings = _wanted_mtu(own, links, settings)
    bridge = links.named(BRIDGE)
    refused = mtu is not None and mtu_refused
    conf, failures = _wanted_conf(own, settings, (bridge.mtu if bridge else None) if refused else mtu, warnings)
    return DesiredCni(
        bridge=DesiredBridge(None if refused else mtu),
        sysctls=_wanted_sysctls(settings),
        forwarding=tuple(
            {Family.IPV4: FORWARD_IPV4, Family.IPV6: FORWARD_IPV6}[family] for family in settings.families
        ),
        conf=conf,
        failures=tuple(failures),
        warnings=tuple(warnings),
    )


def _wanted_mtu(own: OwnNode, links: Links, settings: Settings) -> tuple[int | None, list[str]]:
    """The MTU of the link that carries the node's primary address, within what a bridge can take."""
    if not settings.auto_mtu or own.facts is None:
        return None, []
    left = "the MTU is left alone"
    if own.facts.primary is None:
        return None, [f"node {own.name}: no address of an enabled family, {left}"]
    uplink = links.link_of(own.facts.primary)
    if uplink is None:
        return None, [f"node {own.name}: no link carries its address {own.facts.primary}, {left}"]
    if uplink.kind == LOOPBACK:
        return None, [f"node {own.name}: its address {own.facts.primary} is on loopback link {uplink.name}, {left}"]
    if settings.enable_ipv6 and uplink.mtu < LEAST_IPV6_MTU:
        text = f"link {uplink.name}: MTU {uplink.mtu} is less than IPv6 needs, {BRIDGE} gets {LEAST_IPV6_MTU}"
        return LEAST_IPV6_MTU, [text]
    return min(uplink.mtu, MOST_BRIDGE_MTU), []


def _wanted_sysctls(settings: Settings) -> dict[str, str]:
    wanted = {CALL_IPTABLES: "1"}
    if settings.enable_ipv6:
        wanted |= {CALL_IP6TABLES: "1", DISABLE_IPV6: "0"}
    return wanted


def _wanted_conf(
    own: OwnNode, settings: Settings, mtu: int | None, warnings: list[str]
) -> tuple[DesiredConf | None, list[Failure]]:
    if own.facts is None:
        return None, [Failure(PHASE_NODE, f"node {own.name}: not found in the cluster, the CNI file is left as it is")]
    failures = []
    if not own.facts.pod_cidrs:
        text = f"node {own.name}: no pod CIDR of an enabled family in its annotations, spec.podCIDRs or spec.podCIDR"
        failures.append(Failure(PHASE_NODE, text))
    else:
        warnings += [
            f"node {own.name}: no {family} pod CIDR, pods get no {family} address"
            for family in settings.families
            if not own.facts.pod_cidrs_of(family)
        ]
    readable = not any(problem.reason == INVALID_POD_CIDR for problem in own.facts.problems)
    conf = DesiredConf(
        path=settings.cni_conf_file,
        ranges=own.facts.pod_cidrs,
        claimable=own.every_pod_cidr,
        # A value that cannot be read, or none at all, may be a slip of the pen: the ranges that served stay.
        removable=own.confirmed and readable and bool(own.facts.pod_cidrs),
        mtu=mtu,
    )
    return conf, failures
