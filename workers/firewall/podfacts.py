"""Pod facts: what network policy needs of a pod, decided in one place.

Pure: a `Pod` projection in, `PodFacts` out, or None for a pod that policy does not concern.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from kube_router.ipc.messages import ContainerPort, Key, Pod
from kube_router.workers.model import Family

FINISHED_PHASES = frozenset({"Succeeded", "Failed"})
"""Such a pod has no processes left, and its address may already be another pod's."""


@dataclass(frozen=True, slots=True)
class PodFacts:
    """A pod that has traffic of its own. ``addresses``: all of them, of the enabled families, in canonical text.

    ``terminating`` pods are enforced, and are peers, until they are gone. ``local``: scheduled to this node.
    """

    key: Key
    namespace: str
    uid: str
    labels: Mapping[str, str]
    addresses: tuple[str, ...]
    ports: tuple[ContainerPort, ...]
    local: bool
    terminating: bool


def pod_facts(pod: Pod, node_name: str, families: tuple[Family, ...]) -> PodFacts | None:
    """The facts of a pod; None if it is finished, on the host's network or without an address of these families.

    A pod on the host's network has the node's addresses: it is no target, and as a peer it is the node (the API leaves
    this to the implementation, and upstream does the same). An address that does not parse is left out.
    """
    if pod.host_network or pod.phase in FINISHED_PHASES:
        return None
    addresses = _addresses(pod, families)
    if not addresses:
        return None
    return PodFacts(
        key=pod.key,
        namespace=pod.namespace,
        uid=pod.uid,
        labels=pod.labels,
        addresses=addresses,
        ports=pod.ports,
        local=pod.node_name == node_name,
        terminating=pod.deletion_seconds is not None,
    )


def _addresses(pod: Pod, families: tuple[Family, ...]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for text in pod.ips:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            continue
        if address.version in families:
            canonical = str(address)
            found[text if text == canonical else canonical] = None  # the projection's own text costs no memory
    return tuple(found)
