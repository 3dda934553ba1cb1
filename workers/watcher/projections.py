"""Projections: from the API's structs to the objects that go on the wire to the workers.

Pure: `apiobjects` structs in, `ipc.messages` projections out, with the defaults that an API server fills in.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from kube_router.ipc.messages import (
    ContainerPort,
    Endpoint,
    EndpointPort,
    EndpointSlice,
    IngressAddress,
    IpBlock,
    Kind,
    LabelExpression,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    Node,
    NodeAddress,
    Pod,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Projection,
    Service,
    ServicePort,
)
from kube_router.workers.watcher.apiobjects import (
    AnnotatedMeta,
    ConditionsObject,
    EndpointObject,
    EndpointSliceObject,
    IpObject,
    NamespaceObject,
    NetworkPolicyObject,
    NodeObject,
    NodeSpec,
    NodeStatus,
    PeerObject,
    PodObject,
    PodSpec,
    PodStatus,
    PolicySpec,
    RuleObject,
    SelectorObject,
    ServiceObject,
    ServicePortObject,
    ServiceSpec,
    SliceMeta,
)

ANNOTATION_PREFIX = "kube-router.io/"
"""Annotations under this prefix are projected; all others (``last-applied-configuration``!) are not."""
LEADER_ANNOTATION = "control-plane.alpha.kubernetes.io/leader"
LAST_CHANGE_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"
"""On a slice: its presence matters, its value changes every few seconds; projected with an empty value."""
SERVICE_NAME_LABEL = "kubernetes.io/service-name"

NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.:]*[A-Za-z0-9])?")
"""Loose form of an object's name: enough that ``namespace/name`` stays unambiguous."""


class ObjectError(ValueError):
    """An object that decodes but cannot be projected; the text names the field."""


def check_identity(item: Projection, namespaced: bool) -> None:
    """Raise `ObjectError` unless name and namespace can be such; an API server has checked that itself."""
    if not NAME.fullmatch(item.name):
        raise ObjectError(f"$.metadata.name: {item.name!r} is not an object name")
    if namespaced and not NAME.fullmatch(item.namespace):
        raise ObjectError(f"$.metadata.namespace: {item.namespace!r} is not a namespace name")


def own_annotations(meta: AnnotatedMeta) -> dict[str, str]:
    """The annotations under ``kube-router.io/``."""
    if not meta.annotations:
        return {}
    return {key: value for key, value in meta.annotations.items() if key.startswith(ANNOTATION_PREFIX)}


def project_node(item: NodeObject) -> Node:
    """Node, with its own annotations, all labels, addresses in their order and pod CIDRs as written."""
    spec, status = item.spec or NodeSpec(), item.status or NodeStatus()
    return Node(
        name=item.metadata.name or "",
        uid=item.metadata.uid or "",
        annotations=own_annotations(item.metadata),
        labels=item.metadata.labels or {},
        addresses=tuple(NodeAddress(entry.type or "", entry.address or "") for entry in status.addresses or ()),
        pod_cidr=spec.pod_cidr or "",
        pod_cidrs=tuple(spec.pod_cidrs or ()),
        provider_id=spec.provider_id or "",
    )


def project_namespace(item: NamespaceObject) -> Namespace:
    """Namespace: labels only."""
    meta = item.metadata
    return Namespace(name=meta.name or "", uid=meta.uid or "", labels=meta.labels or {})


def named_ports(spec: PodSpec) -> tuple[ContainerPort, ...]:
    """Named ports of the containers, then of sidecars (init containers that restart always, KEP-753)."""
    found: tuple[ContainerPort, ...] = ()
    for containers, sidecars in ((spec.containers, False), (spec.init_containers, True)):
        for container in containers or ():
            if container.ports and (not sidecars or container.restart_policy == "Always"):
                for port in container.ports:
                    if port.name:
                        found += (ContainerPort(port.name, port.container_port or 0, port.protocol or "TCP"),)
    return found


def addresses(items: list[IpObject] | None, first: str | None) -> tuple[str, ...]:
    """A plural IP field, or its singular when the plural is missing."""
    if items:
        return tuple([item.ip for item in items if item.ip])
    return (first,) if first else ()


NO_POD_SPEC, NO_POD_STATUS = PodSpec(), PodStatus()


def project_pod(item: PodObject) -> Pod:
    """Pod; this one runs ten thousand times at a start, so it avoids what costs."""
    meta, spec, status = item.metadata, item.spec or NO_POD_SPEC, item.status or NO_POD_STATUS
    statuses = status.container_statuses
    return Pod(
        name=meta.name or "",
        namespace=sys.intern(meta.namespace or ""),
        uid=meta.uid or "",
        labels=meta.labels or {},
        node_name=sys.intern(spec.node_name or ""),
        host_network=spec.host_network or False,
        phase=sys.intern(status.phase or ""),
        ips=addresses(status.pod_ips, status.pod_ip),
        host_ips=addresses(status.host_ips, status.host_ip),
        ports=named_ports(spec),
        deletion_seconds=(meta.deletion_grace_period_seconds or 0) if meta.deletion_timestamp else None,
        container_id=(statuses[0].container_id or "") if statuses else "",
    )


def project_service(item: ServiceObject) -> Service:
    """Service, with the defaults that an API server would have filled in."""
    meta, spec = item.metadata, item.spec or ServiceSpec()
    affinity = spec.session_affinity_config and spec.session_affinity_config.client_ip
    balancer = item.status and item.status.load_balancer
    return Service(
        name=meta.name or "",
        namespace=sys.intern(meta.namespace or ""),
        uid=meta.uid or "",
        annotations=own_annotations(meta),
        labels=meta.labels or {},
        created=meta.creation_timestamp or "",
        type=spec.type or "ClusterIP",
        selector=spec.selector or {},
        cluster_ips=tuple(spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else ())),
        external_ips=tuple(spec.external_ips or ()),
        ip_families=tuple(spec.ip_families or ()),
        ip_family_policy=spec.ip_family_policy or "",
        ports=tuple(map(project_service_port, spec.ports or ())),
        session_affinity=spec.session_affinity or "None",
        affinity_timeout=affinity.timeout_seconds if affinity else None,
        internal_traffic_policy=spec.internal_traffic_policy or "Cluster",
        external_traffic_policy=spec.external_traffic_policy or "",
        health_check_node_port=spec.health_check_node_port or 0,
        load_balancer_class=spec.load_balancer_class,
        load_balancer_ip=spec.load_balancer_ip or "",
        load_balancer_source_ranges=tuple(spec.load_balancer_source_ranges or ()),
        publish_not_ready_addresses=spec.publish_not_ready_addresses or False,
        traffic_distribution=spec.traffic_distribution or "",
        ingress=tuple(
            IngressAddress(ip=entry.ip or "", hostname=entry.hostname or "", ip_mode=entry.ip_mode or "")
            for entry in (balancer and balancer.ingress) or ()
        ),
    )


def project_service_port(port: ServicePortObject) -> ServicePort:
    """A port; without ``targetPort`` the target is the port itself."""
    return ServicePort(
        name=port.name or "",
        protocol=port.protocol or "TCP",
        port=port.port or 0,
        target_port=port.target_port or port.port or 0,
        node_port=port.node_port or 0,
    )


def owning_service(meta: SliceMeta) -> str:
    """Name of the Service a slice belongs to: label, else the one owner, else the generated name without its dash."""
    if label := (meta.labels or {}).get(SERVICE_NAME_LABEL):
        return label
    owners = meta.owner_references or ()
    if len(owners) == 1 and owners[0].name:
        return owners[0].name
    return (meta.generate_name or "").removesuffix("-")


def project_endpoint_slice(item: EndpointSliceObject) -> EndpointSlice:
    """EndpointSlice, with its owning Service's name."""
    annotations = own_annotations(item.metadata)
    if item.metadata.annotations and LEADER_ANNOTATION in item.metadata.annotations:
        annotations[LEADER_ANNOTATION] = ""
    return EndpointSlice(
        name=item.metadata.name or "",
        namespace=sys.intern(item.metadata.namespace or ""),
        uid=item.metadata.uid or "",
        annotations=annotations,
        labels=item.metadata.labels or {},
        service=owning_service(item.metadata),
        last_change=(item.metadata.annotations or {}).get(LAST_CHANGE_ANNOTATION, ""),
        address_type=sys.intern(item.address_type or ""),
        endpoints=tuple(map(project_endpoint, item.endpoints or ())),
        ports=tuple(
            EndpointPort(name=port.name or "", protocol=port.protocol or "TCP", port=port.port)
            for port in item.ports or ()
        ),
    )


def project_endpoint(item: EndpointObject) -> Endpoint:
    """One endpoint."""
    conditions = item.conditions or ConditionsObject()
    return Endpoint(
        addresses=tuple(item.addresses or ()),
        ready=conditions.ready,
        serving=conditions.serving,
        terminating=conditions.terminating,
        node_name=sys.intern(item.node_name) if item.node_name else None,
        zone=sys.intern(item.zone or ""),
        hint_zones=tuple(zone.name for zone in (item.hints and item.hints.for_zones) or () if zone.name),
    )


def project_selector(item: SelectorObject | None) -> LabelSelector | None:
    """A selector; None stays None (its holder gives that a meaning of its own)."""
    if item is None:
        return None
    return LabelSelector(
        match_labels=item.match_labels or {},
        match_expressions=tuple(
            LabelExpression(key=entry.key or "", operator=entry.operator or "", values=tuple(entry.values or ()))
            for entry in item.match_expressions or ()
        ),
    )


def project_peer(item: PeerObject) -> PolicyPeer:
    """One ``from``/``to`` entry."""
    block = item.ip_block
    return PolicyPeer(
        pod_selector=project_selector(item.pod_selector),
        namespace_selector=project_selector(item.namespace_selector),
        ip_block=None if block is None else IpBlock(cidr=block.cidr or "", excepted=tuple(block.excepted or ())),
    )


def project_rules(rules: list[RuleObject] | None, ingress: bool) -> tuple[PolicyRule, ...] | None:
    """Rules of one direction; a missing list differs from an empty one."""
    if rules is None:
        return None
    return tuple(project_rule(rule, rule.sources if ingress else rule.targets) for rule in rules)


def project_rule(rule: RuleObject, peers: list[PeerObject] | None) -> PolicyRule:
    """One rule with the peers of its direction."""
    ports = rule.ports
    return PolicyRule(
        peers=None if peers is None else tuple(map(project_peer, peers)),
        ports=None
        if ports is None
        else tuple(
            PolicyPort(protocol=port.protocol or "TCP", port=port.port, end_port=port.end_port) for port in ports
        ),
    )


def project_network_policy(item: NetworkPolicyObject) -> NetworkPolicy:
    """NetworkPolicy; a missing ``podSelector`` selects all pods of the namespace, as the API has it."""
    spec = item.spec or PolicySpec()
    return NetworkPolicy(
        name=item.metadata.name or "",
        namespace=sys.intern(item.metadata.namespace or ""),
        uid=item.metadata.uid or "",
        pod_selector=project_selector(spec.pod_selector) or LabelSelector(),
        policy_types=None if spec.policy_types is None else tuple(spec.policy_types),
        ingress=project_rules(spec.ingress, ingress=True),
        egress=project_rules(spec.egress, ingress=False),
    )


PROJECT: dict[Kind, Callable[[Any], Projection]] = {
    "nodes": project_node,
    "pods": project_pod,
    "services": project_service,
    "endpointslices": project_endpoint_slice,
    "networkpolicies": project_network_policy,
    "namespaces": project_namespace,
}
"""The projection of each kind; it takes the struct that `OBJECTS` names for the kind."""
