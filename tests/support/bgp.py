"""Nodes, settings and states for tests of the pure BGP core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kube_router.ipc.messages import Node, NodeAddress
from kube_router.workers.nodefacts import node_facts
from kube_router.workers.router.bgpstate import FRESH, BgpState, Speaker
from kube_router.workers.router.desired import DesiredBgp, desired_bgp
from kube_router.workers.router.vips import NO_VIPS, Vips
from kube_router.workers.settings import Secrets, Settings


def node(
    name: str, addresses: Sequence[str], pod_cidrs: Sequence[str] = (), annotations: Mapping[str, str] | None = None
) -> Node:
    """A Node object; annotation names without ``kube-router.io/``."""
    return Node(
        name=name,
        uid=f"uid-{name}",
        addresses=tuple(NodeAddress("InternalIP", address) for address in addresses),
        pod_cidrs=tuple(pod_cidrs),
        annotations={f"kube-router.io/{key}": value for key, value in (annotations or {}).items()},
    )


def asking(
    own: Node,
    *others: Node,
    actual: BgpState = FRESH,
    passwords: Sequence[str] = (),
    vips: Vips = NO_VIPS,
    unbindable: Sequence[str] = (),
    **flags: Any,
) -> DesiredBgp:
    """What node ``own`` of a dual-stack cluster is to do; ``flags`` are fields of `Settings`."""
    settings = Settings(**{"enable_ipv6": True, "node_name": own.name, **flags})
    facts = [node_facts(item, settings.families) for item in (own, *others)]
    secrets = Secrets(peer_router_passwords=tuple(passwords))
    return desired_bgp(own, facts[0], facts, settings, secrets, actual, vips, unbindable=unbindable)


def own_state(speaker_asn: int = 64512) -> BgpState:
    """A running speaker and nothing else."""
    speaker = Speaker(speaker_asn, "10.0.0.1", 179, frozenset({"10.0.0.1", "2001:db8::1"}))
    return BgpState(speaker=speaker)
