"""The contract between the worker processes: every message that crosses a socket, and who sends it to whom.

Pure: types only. The wire is msgpack (``codec.py``) over ZeroMQ ipc sockets (``channels.py``).

========== ======================= ==================================================== =====================
socket     pattern                 carries                                              binds / connects
========== ======================= ==================================================== =====================
snapshots  DEALER -> ROUTER        `SnapshotRequest` -> `Snapshot`                      watcher / every worker
deltas     XPUB -> SUB             `Delta` (topic: the kind), `Beacon` (topic: beacon)  watcher / every worker
notices    PUSH -> PULL            `Notice`: becomes a Kubernetes Event                 watcher / every worker
heartbeats PUSH -> PULL            `Heartbeat`                                          health / every worker
status     REQ -> ROUTER           `StatusRequest` -> `StatusReply`                     health / kube-routerctl
========== ======================= ==================================================== =====================

Every message carries ``protocol``. A receiver that finds another number drops the message, counts it and says so in
one line: mixed versions never guess. ``epoch`` is new at each start of the watcher; ``seq`` counts the deltas of one
kind within an epoch, without gaps. A replica that sees a gap or a new epoch asks for a snapshot again.

Objects are projections: only the fields that some worker reads. Optional fields mean "the API object has none".
"""

from __future__ import annotations

import sys
from typing import Literal

import msgspec

PROTOCOL = 1
"""Version of this contract; raised with every change that an older peer would misread."""

Kind = Literal["nodes", "pods", "services", "endpointslices", "networkpolicies", "namespaces"]
"""Resource name of a kind, as it stands in the API's URL."""

KINDS: tuple[Kind, ...] = ("nodes", "pods", "services", "endpointslices", "networkpolicies", "namespaces")

Key = str
"""Identity of an object within its kind: ``name`` or ``namespace/name``."""


class Projection(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What all projected API objects have: their identity.

    Projections hold no cycles, so the cyclic collector is told to leave them alone (``gc=False``): a worker with
    10,000 pods would walk them again and again.
    """

    name: str
    namespace: str = ""
    uid: str = ""

    @property
    def key(self) -> Key:
        """``namespace/name``, or ``name`` for cluster-scoped kinds."""
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class NodeAddress(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One entry of a Node's ``status.addresses``."""

    type: str
    address: str


class Node(Projection, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Node: annotations are only those under ``kube-router.io/``."""

    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}
    addresses: tuple[NodeAddress, ...] = ()
    pod_cidr: str = ""
    pod_cidrs: tuple[str, ...] = ()
    provider_id: str = ""


class ContainerPort(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A named container port; unnamed ports are not projected, nothing can refer to them."""

    name: str
    port: int
    protocol: str = "TCP"


class Pod(Projection, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Pod. ``deletion_seconds`` is the grace period in seconds when the pod is terminating, else None."""

    labels: dict[str, str] = {}
    node_name: str = ""
    host_network: bool = False
    phase: str = ""
    ips: tuple[str, ...] = ()
    host_ips: tuple[str, ...] = ()
    ports: tuple[ContainerPort, ...] = ()
    deletion_seconds: int | None = None
    container_id: str = ""


class ServicePort(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One port of a Service; ``target_port`` is a number or a container port's name."""

    name: str = ""
    protocol: str = "TCP"
    port: int = 0
    target_port: int | str = 0
    node_port: int = 0


class IngressAddress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One entry of a Service's ``status.loadBalancer.ingress``."""

    ip: str = ""
    hostname: str = ""
    ip_mode: str = ""


class Service(Projection, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Service. ``affinity_timeout`` in seconds, None without ClientIP affinity settings."""

    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}
    created: str = ""
    type: str = "ClusterIP"
    selector: dict[str, str] = {}
    cluster_ips: tuple[str, ...] = ()
    external_ips: tuple[str, ...] = ()
    ip_families: tuple[str, ...] = ()
    ip_family_policy: str = ""
    ports: tuple[ServicePort, ...] = ()
    session_affinity: str = "None"
    affinity_timeout: int | None = None
    internal_traffic_policy: str = "Cluster"
    external_traffic_policy: str = ""
    health_check_node_port: int = 0
    load_balancer_class: str | None = None
    load_balancer_ip: str = ""
    load_balancer_source_ranges: tuple[str, ...] = ()
    publish_not_ready_addresses: bool = False
    traffic_distribution: str = ""
    ingress: tuple[IngressAddress, ...] = ()


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One endpoint of a slice; a condition is None when the API leaves it out."""

    addresses: tuple[str, ...] = ()
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None
    node_name: str | None = None
    zone: str = ""
    hint_zones: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Of a node's name there is one text, however many endpoints run there."""
        if self.node_name is not None:
            msgspec.structs.force_setattr(self, "node_name", sys.intern(self.node_name))


class EndpointPort(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One port of a slice; ``port`` is None for "all ports"."""

    name: str = ""
    protocol: str = "TCP"
    port: int | None = None


class EndpointSlice(Projection, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """EndpointSlice; ``service`` is the owning Service's name by label, owner reference or generated name.

    ``last_change``: time stamp of the change of a pod or Service that led to this state of the slice.
    """

    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}
    service: str = ""
    last_change: str = ""
    address_type: str = ""
    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()

    def __post_init__(self) -> None:
        """Of words that thousands of slices have in common there is one text."""
        for name in ("namespace", "address_type"):
            msgspec.structs.force_setattr(self, name, sys.intern(getattr(self, name)))


class LabelExpression(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One ``matchExpressions`` entry."""

    key: str
    operator: str
    values: tuple[str, ...] = ()


class LabelSelector(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """LabelSelector; empty selects everything, None (in its holder) selects nothing."""

    match_labels: dict[str, str] = {}
    match_expressions: tuple[LabelExpression, ...] = ()


class IpBlock(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """``ipBlock`` of a NetworkPolicy peer."""

    cidr: str
    excepted: tuple[str, ...] = ()


class PolicyPeer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One ``from``/``to`` entry; both selectors set means "these pods in these namespaces"."""

    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IpBlock | None = None


class PolicyPort(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One ``ports`` entry; ``port`` None means all ports of the protocol."""

    protocol: str = "TCP"
    port: int | str | None = None
    end_port: int | None = None


class PolicyRule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One ingress or egress rule; None means the field is missing (all), an empty tuple means it is empty (all)."""

    peers: tuple[PolicyPeer, ...] | None = None
    ports: tuple[PolicyPort, ...] | None = None


class NetworkPolicy(Projection, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """NetworkPolicy; a rule list is None when the spec leaves it out, which differs from an empty one."""

    pod_selector: LabelSelector = LabelSelector()
    policy_types: tuple[str, ...] | None = None
    ingress: tuple[PolicyRule, ...] | None = None
    egress: tuple[PolicyRule, ...] | None = None


class Namespace(Projection, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Namespace: its labels, for selectors."""

    labels: dict[str, str] = {}


ClusterObject = Node | Pod | Service | EndpointSlice | NetworkPolicy | Namespace

OBJECT_TYPES: dict[Kind, type[Projection]] = {
    "nodes": Node,
    "pods": Pod,
    "services": Service,
    "endpointslices": EndpointSlice,
    "networkpolicies": NetworkPolicy,
    "namespaces": Namespace,
}
"""The projection that stands on the wire for each kind."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="message", tag=True):
    """What all messages have; ``message`` on the wire is the class name."""

    protocol: int = PROTOCOL


class SourceState(msgspec.Struct, frozen=True, kw_only=True):
    """How the watcher stands towards its source; times are seconds since the Unix epoch.

    ``in_sync``: every kind that was asked for has been listed completely by this watcher.
    ``stale``: the objects come from the snapshot on disk, the source has not confirmed them: keep and add, never
    delete on their word. ``degraded`` holds one line a trouble (no API, a kind forbidden, a file that does not parse).
    ``unlisted``: the kinds that keep ``in_sync`` from being true. A replica that reads none of them is in sync all the
    same: a forbidden kind stops only the workers that need it. Empty means: unknown, only ``in_sync`` counts.

    What a worker sees in ``Cluster.state`` is told from its own kinds: there, ``stale`` also stands for "a new watcher
    has not listed everything yet, this is what the last one said".
    """

    source: str
    in_sync: bool = False
    stale: bool = False
    confirmed: float | None = None
    degraded: tuple[str, ...] = ()
    unlisted: tuple[Kind, ...] = ()


class SnapshotRequest(Message, frozen=True, kw_only=True, tag=True):
    """A replica asks for all objects of some kinds."""

    worker: str
    kinds: tuple[Kind, ...]


class KindSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All objects of one kind as of ``seq``; the codec turns ``objects`` into `OBJECT_TYPES[kind]`."""

    kind: Kind
    seq: int
    objects: tuple[Projection, ...]


class Snapshot(Message, frozen=True, kw_only=True, tag=True):
    """Everything that a replica asked for."""

    epoch: str
    state: SourceState
    kinds: tuple[KindSnapshot, ...]


class Delta(Message, frozen=True, kw_only=True, tag=True):
    """One step of one kind: objects that are new or changed, keys that are gone."""

    epoch: str
    kind: Kind
    seq: int
    put: tuple[Projection, ...] = ()
    gone: tuple[Key, ...] = ()


class Beacon(Message, frozen=True, kw_only=True, tag=True):
    """Sent every second and at each change of the source's state: lets a replica notice a lost last delta."""

    epoch: str
    seqs: dict[Kind, int]
    state: SourceState


class Notice(Message, frozen=True, kw_only=True, tag=True):
    """A worker has something to say about an API object; the watcher posts it as a Kubernetes Event."""

    worker: str
    kind: str
    name: str
    namespace: str = ""
    uid: str = ""
    type: Literal["Normal", "Warning"] = "Warning"
    reason: str
    text: str


class Component(msgspec.Struct, frozen=True, kw_only=True):
    """One line of upstream's health rule: overdue when ``last_success`` is older than ``period`` and the grace."""

    name: str
    period: float
    last_success: float | None = None


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One BGP session, for status and metrics.

    ``received``, ``accepted``, ``advertised``: numbers of prefixes; the last is None until it has been asked for.
    ``since``: when it came up, or if it is down, when it went down; seconds since the Unix epoch, None if it never was
    up. ``last_error``: why it last ended or cannot begin, empty if that is not known. ``flaps``: how often it has ended
    since this worker's start. ``graceful_restart``: ``offered`` by this side, ``ready`` on both, ``restarting`` while
    the peer's routes are kept for it, empty without.
    """

    address: str
    asn: int
    type: str
    state: str
    received: int = 0
    accepted: int = 0
    advertised: int | None = None
    since: float | None = None
    last_error: str = ""
    families: tuple[str, ...] = ()
    flaps: int = 0
    graceful_restart: str = ""


class Heartbeat(Message, frozen=True, kw_only=True, tag=True):
    """How a worker stands. Times are seconds since the Unix epoch, durations seconds, sizes bytes.

    ``last_sync`` is the end of the last *successful* sync. ``errors`` counts failures by phase since the start;
    ``pending`` is the number of steps that wait for a retry. ``counts`` and ``counters`` are gauges and counters by
    metric name without the ``kube_router_`` prefix; a name may end in labels (``advertisements_sent{type="x"}``).
    ``observations`` are new histogram samples since the last heartbeat.
    """

    worker: str
    pid: int
    started: float
    sent: float
    last_sync: float | None = None
    sync_seconds: float | None = None
    syncs: int = 0
    writes: int = 0
    pending: int = 0
    in_sync: bool = False
    stale: bool = False
    dropped: int = 0
    rss: int = 0
    privileges: str = ""
    errors: dict[str, int] = {}
    warnings: tuple[str, ...] = ()
    counts: dict[str, float] = {}
    counters: dict[str, float] = {}
    observations: dict[str, tuple[float, ...]] = {}
    components: tuple[Component, ...] = ()
    sessions: tuple[Session, ...] = ()
    source: SourceState | None = None


class StatusRequest(Message, frozen=True, kw_only=True, tag=True):
    """kube-routerctl asks the health worker how the agent stands."""


class StatusReply(Message, frozen=True, kw_only=True, tag=True):
    """The last heartbeat of every worker, and health's own verdict."""

    healthy: bool
    reasons: tuple[str, ...]
    heartbeats: tuple[Heartbeat, ...]
