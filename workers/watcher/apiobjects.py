"""The API's JSON as typed structs with just the fields that some worker reads.

Pure: types for msgspec's decoder, which skips unknown fields without building anything. Every field may be null or
missing, as Go's encoder and hand-written manifests leave it; only a field of a wrong type is an error
(`msgspec.ValidationError`, which carries the path within the object). Projections are made of them in `projections`.

Field names and meanings: Kubernetes API reference v1.34, which also documents each type here by its name.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from kube_router.ipc.messages import Kind
from kube_router.workers.kubeapi.status import ApiStruct, Int32, Int64, Status

INITIAL_EVENTS_END = "k8s.io/initial-events-end"
"""Annotation on the bookmark that ends the first part of a streaming list (KEP-3157)."""


class OwnerReference(ApiStruct):
    kind: str | None = None
    name: str | None = None


class ObjectMeta(ApiStruct):
    """Metadata of every kind. Annotations can be long and are decoded only where they are read."""

    name: str | None = None
    namespace: str | None = None
    uid: str | None = None
    resource_version: str | None = None
    labels: dict[str, str] | None = None
    deletion_timestamp: str | None = None
    deletion_grace_period_seconds: Int64 | None = None


class AnnotatedMeta(ObjectMeta):
    annotations: dict[str, str] | None = None
    creation_timestamp: str | None = None


class SliceMeta(AnnotatedMeta):
    generate_name: str | None = None
    owner_references: list[OwnerReference] | None = None


class ApiObject(ApiStruct):
    """What every object of the API has."""

    metadata: ObjectMeta


# --- nodes, namespaces


class AddressObject(ApiStruct):
    type: str | None = None
    address: str | None = None


class NodeSpec(ApiStruct):
    pod_cidr: str | None = msgspec.field(name="podCIDR", default=None)
    pod_cidrs: list[str] | None = msgspec.field(name="podCIDRs", default=None)
    provider_id: str | None = msgspec.field(name="providerID", default=None)


class NodeStatus(ApiStruct):
    addresses: list[AddressObject] | None = None


class NodeObject(ApiObject):
    metadata: AnnotatedMeta
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


class NamespaceObject(ApiObject):
    pass


# --- pods


class PortObject(ApiStruct):
    name: str | None = None
    container_port: Int32 | None = None
    protocol: str | None = None


class ContainerObject(ApiStruct):
    ports: list[PortObject] | None = None
    restart_policy: str | None = None


class PodSpec(ApiStruct):
    node_name: str | None = None
    host_network: bool | None = None
    containers: list[ContainerObject] | None = None
    init_containers: list[ContainerObject] | None = None


class IpObject(ApiStruct):
    ip: str | None = None


class ContainerStatus(ApiStruct):
    container_id: str | None = msgspec.field(name="containerID", default=None)


class PodStatus(ApiStruct):
    phase: str | None = None
    pod_ip: str | None = msgspec.field(name="podIP", default=None)
    pod_ips: list[IpObject] | None = msgspec.field(name="podIPs", default=None)
    host_ip: str | None = msgspec.field(name="hostIP", default=None)
    host_ips: list[IpObject] | None = msgspec.field(name="hostIPs", default=None)
    container_statuses: list[ContainerStatus] | None = None


class PodObject(ApiObject):
    spec: PodSpec | None = None
    status: PodStatus | None = None


# --- services


class ServicePortObject(ApiStruct):
    name: str | None = None
    protocol: str | None = None
    port: Int32 | None = None
    target_port: Int32 | str | None = None
    node_port: Int32 | None = None


class ClientIpConfig(ApiStruct):
    timeout_seconds: Int32 | None = None


class AffinityConfig(ApiStruct):
    client_ip: ClientIpConfig | None = msgspec.field(name="clientIP", default=None)


class ServiceSpec(ApiStruct):
    type: str | None = None
    selector: dict[str, str] | None = None
    cluster_ip: str | None = msgspec.field(name="clusterIP", default=None)
    cluster_ips: list[str] | None = msgspec.field(name="clusterIPs", default=None)
    external_ips: list[str] | None = msgspec.field(name="externalIPs", default=None)
    ip_families: list[str] | None = None
    ip_family_policy: str | None = None
    ports: list[ServicePortObject] | None = None
    session_affinity: str | None = None
    session_affinity_config: AffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    health_check_node_port: Int32 | None = None
    load_balancer_class: str | None = None
    load_balancer_ip: str | None = msgspec.field(name="loadBalancerIP", default=None)
    load_balancer_source_ranges: list[str] | None = None
    publish_not_ready_addresses: bool | None = None
    traffic_distribution: str | None = None


class IngressObject(ApiStruct):
    ip: str | None = None
    hostname: str | None = None
    ip_mode: str | None = None


class LoadBalancerStatus(ApiStruct):
    ingress: list[IngressObject] | None = None


class ServiceStatus(ApiStruct):
    load_balancer: LoadBalancerStatus | None = None


class ServiceObject(ApiObject):
    metadata: AnnotatedMeta
    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None


# --- endpointslices


class ConditionsObject(ApiStruct):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class HintZone(ApiStruct):
    name: str | None = None


class HintsObject(ApiStruct):
    for_zones: list[HintZone] | None = None


class EndpointObject(ApiStruct):
    addresses: list[str] | None = None
    conditions: ConditionsObject | None = None
    node_name: str | None = None
    zone: str | None = None
    hints: HintsObject | None = None


class EndpointPortObject(ApiStruct):
    name: str | None = None
    protocol: str | None = None
    port: Int32 | None = None


class EndpointSliceObject(ApiObject):
    metadata: SliceMeta
    address_type: str | None = None
    endpoints: list[EndpointObject] | None = None
    ports: list[EndpointPortObject] | None = None


# --- networkpolicies


class ExpressionObject(ApiStruct):
    key: str | None = None
    operator: str | None = None
    values: list[str] | None = None


class SelectorObject(ApiStruct):
    match_labels: dict[str, str] | None = None
    match_expressions: list[ExpressionObject] | None = None


class IpBlockObject(ApiStruct):
    cidr: str | None = None
    excepted: list[str] | None = msgspec.field(name="except", default=None)


class PeerObject(ApiStruct):
    pod_selector: SelectorObject | None = None
    namespace_selector: SelectorObject | None = None
    ip_block: IpBlockObject | None = None


class PolicyPortObject(ApiStruct):
    protocol: str | None = None
    port: Int32 | str | None = None
    end_port: Int32 | None = None


class RuleObject(ApiStruct):
    sources: list[PeerObject] | None = msgspec.field(name="from", default=None)
    targets: list[PeerObject] | None = msgspec.field(name="to", default=None)
    ports: list[PolicyPortObject] | None = None


class PolicySpec(ApiStruct):
    pod_selector: SelectorObject | None = None
    policy_types: list[str] | None = None
    ingress: list[RuleObject] | None = None
    egress: list[RuleObject] | None = None


class NetworkPolicyObject(ApiObject):
    spec: PolicySpec | None = None


# --- lists, watch events, statuses

ObjectT = TypeVar("ObjectT", bound=ApiObject)


class ListMeta(ApiStruct):
    resource_version: str
    continue_: str | None = msgspec.field(name="continue", default=None)


class Page(ApiStruct, Generic[ObjectT]):
    """One page of a list. ``items`` must be there: an unrelated JSON document is not an empty cluster."""

    kind: str
    metadata: ListMeta
    items: list[ObjectT] | None


class WatchEvent(ApiStruct, Generic[ObjectT]):
    """One line of a watch. A bookmark's object has nothing but a resourceVersion and maybe an annotation."""

    type: str
    object: ObjectT


class ErrorEvent(ApiStruct):
    """A watch line of type ERROR."""

    type: str
    object: Status


class Bookmark(ApiObject):
    """The object of a BOOKMARK line."""

    metadata: AnnotatedMeta


OBJECTS: dict[Kind, type[ApiObject]] = {
    "nodes": NodeObject,
    "pods": PodObject,
    "services": ServiceObject,
    "endpointslices": EndpointSliceObject,
    "networkpolicies": NetworkPolicyObject,
    "namespaces": NamespaceObject,
}


def page_decoder(kind: Kind) -> msgspec.json.Decoder[Page[Any]]:
    """Decoder for one page of a list of ``kind``."""
    page: Any = Page
    return msgspec.json.Decoder(page[OBJECTS[kind]])


def event_decoder(kind: Kind) -> msgspec.json.Decoder[WatchEvent[Any]]:
    """Decoder for one line of a watch of ``kind``."""
    event: Any = WatchEvent
    return msgspec.json.Decoder(event[OBJECTS[kind]])
