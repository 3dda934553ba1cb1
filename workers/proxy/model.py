"""What Services come to on this node, before any backend: frontends, pools of endpoints, health checks.

Pure: frozen values, and one table that the engine keeps (`ServiceTable`). Every backend renders from this; the judge
(`selection.py`) deliberately does not, so that each can convict the other.

A `Frontend` is where packets arrive, a pool is the endpoints that they may be sent to. They are kept apart: an endpoint
that comes or goes changes pools, never a frontend, however many addresses a Service has.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from kube_router.ipc.messages import Key
from kube_router.workers.model import Family, IPNetwork

PROTOCOLS = ("tcp", "udp", "sctp")


class PortKey(NamedTuple):
    """One port of a Service. A typed key: joined names of different Services can never meet (D1 of upstream).

    ``service``: ``namespace/name``. ``port``: its name, perhaps empty. ``protocol``: one of `PROTOCOLS`.
    """

    service: Key
    port: str
    protocol: str

    def __str__(self) -> str:
        return f"{self.service}:{self.port}" if self.port else self.service


class AddressKind(enum.StrEnum):
    """Whose address it is."""

    CLUSTER = "cluster"
    LOAD_BALANCER = "load-balancer"
    EXTERNAL = "external"
    NODE_PORT = "node-port"


class Frontend(NamedTuple):
    """Where packets of a Service arrive.

    ``address``: canonical; empty for a node port, which is open on the addresses of `ProxyFrame.node_ports_on`. An
    exact address and port goes before a node port of the same number.
    """

    family: Family
    address: str
    protocol: str
    port: int

    @property
    def is_node_port(self) -> bool:
        """Whether it is open on the node's own addresses."""
        return not self.address

    def __str__(self) -> str:
        address = self.address or f"{self.family} node port"
        address = f"[{address}]" if ":" in address else address
        return f"{address}:{self.port}/{self.protocol}" if self.address else f"{address} {self.port}/{self.protocol}"


class Endpoint(msgspec.Struct, frozen=True, order=True, gc=False):
    """One endpoint of a pool. ``local``: it runs on this node. Of these there are many: half of a tuple's size."""

    address: str
    port: int
    local: bool = False


class Scope(enum.StrEnum):
    """Which endpoints of a Service's port: those of the whole cluster, or those of this node."""

    CLUSTER = "cluster"
    LOCAL = "local"


class PoolKey(NamedTuple):
    """The endpoints of one family and scope of a Service's port."""

    owner: PortKey
    family: Family
    scope: Scope


class Scheduler(enum.StrEnum):
    """How an endpoint is chosen for a new connection; the words of ``kube-router.io/service.scheduler``."""

    ROUND_ROBIN = "rr"
    LEAST_CONNECTIONS = "lc"
    DESTINATION_HASH = "dh"
    SOURCE_HASH = "sh"
    MAGLEV_HASH = "mh"


class Balancing(NamedTuple):
    """How connections are spread.

    ``flags``: numbers of the IPVS scheduler flags (``flag-1`` … ``flag-3``), only with `Scheduler.MAGLEV_HASH`.
    ``affinity``: seconds for which a client is sent to the same endpoint; 0: each connection is for itself.
    """

    scheduler: Scheduler = Scheduler.ROUND_ROBIN
    flags: tuple[int, ...] = ()
    affinity: int = 0


DEFAULT_BALANCING = Balancing()


@dataclass(frozen=True, slots=True)
class Forwarding:
    """What becomes of packets for a frontend.

    ``inside``: the pool for what this node and its own pods send; ``outside``: for all else. They differ only for
    external kinds under policy Local: who is in the cluster gets any endpoint. A backend that cannot tell where a
    packet comes from takes ``outside``. No endpoint in the pool: the packet is refused at once.

    ``sources``: networks of the frontend's family that may use it, sorted; None: everybody. ``dsr``: endpoints answer
    the client themselves. ``hairpin``: asked for by annotation.
    """

    owner: PortKey
    kind: AddressKind
    inside: Scope
    outside: Scope
    balancing: Balancing = DEFAULT_BALANCING
    sources: tuple[str, ...] | None = None
    dsr: bool = False
    hairpin: bool = False

    def pool(self, frontend: Frontend, *, inside: bool) -> PoolKey:
        """The pool for packets from inside, or outside, of this node."""
        return PoolKey(self.owner, frontend.family, self.inside if inside else self.outside)


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """What is said at a ``healthCheckNodePort``: how many endpoints of a Service run on this node, each pod once."""

    service: Key
    local_endpoints: int


@dataclass(frozen=True, slots=True)
class ProxyFrame:
    """What does not come from Services: the own node and the settings.

    ``node_ports_on``: the addresses on which node ports are open; None: every address of this host
    (``--nodeport-bindon-all-ip``). ``source``: by family, the address that masqueraded packets get. ``pod_networks``:
    this node's pod CIDRs. ``cluster_addresses``: of all nodes; an external IP among them is not ours as a whole.
    """

    families: tuple[Family, ...] = (Family.IPV4,)
    node_ports_on: tuple[str, ...] | None = ()
    source: Mapping[Family, str] = field(default_factory=dict)
    pod_networks: tuple[IPNetwork, ...] = ()
    cluster_addresses: frozenset[str] = frozenset()
    masquerade_all: bool = False
    hairpin: bool = False


@dataclass(slots=True)
class ServiceTable:
    """Everything that stands now. Kept by the engine, read by the backends, which must not change it.

    ``pools``: sorted by address and port, each endpoint once; those of every frontend that a Service asks for, also
    empty ones.
    ``health``: by port.
    """

    frontends: Mapping[Frontend, Forwarding] = field(default_factory=dict)
    pools: Mapping[PoolKey, tuple[Endpoint, ...]] = field(default_factory=dict)
    health: Mapping[int, HealthCheck] = field(default_factory=dict)

    def endpoints(self, frontend: Frontend, *, inside: bool) -> tuple[Endpoint, ...]:
        """Where packets for a frontend may go; nothing for one that does not exist."""
        forwarding = self.frontends.get(frontend)
        return () if forwarding is None else self.pools.get(forwarding.pool(frontend, inside=inside), ())


@dataclass(slots=True)
class Changed:
    """What differs between two moments of a `ServiceTable`: keys that are new, gone or different.

    ``everything`` says: look at all of it. ``touched``: ``frontends``, and those whose pools are in ``pools``.
    """

    everything: bool = False
    frontends: set[Frontend] = field(default_factory=set)
    touched: set[Frontend] = field(default_factory=set)
    pools: set[PoolKey] = field(default_factory=set)
    health: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return self.everything or bool(self.frontends or self.pools or self.health)
