"""What network policy comes to on this node, before any backend: clauses, address sets, isolated pods.

Pure: frozen values, and one table that the engine keeps (`Ruleset`). Both backends render from this; the evaluator
(`verdict.py`) deliberately does not, so that each can convict the other.

What a clause says never depends on which pods exist: pods only move in and out of the sets that clauses name. So a pod
event changes members, never rules, and a set is named after *what it selects*: a changed policy names new sets, and no
rule ever sees the members that were meant for another one (defects S14 and S15 of upstream).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NewType

from kube_router.ipc.messages import Key
from kube_router.workers.firewall.podfacts import PodFacts
from kube_router.workers.firewall.selectors import Selector
from kube_router.workers.model import Family, IPNetwork


class Direction(enum.StrEnum):
    """Of traffic, as the policy's pod sees it."""

    INGRESS = "ingress"
    EGRESS = "egress"


Member = NewType("Member", str)
"""A member of a set in ipset's words: ``10.0.0.1``, ``10.0.0.0/8``, ``10.0.0.1,tcp:8080``."""


@dataclass(frozen=True, slots=True)
class PodSelection:
    """Pods of one namespace, or of the namespaces that a selector takes; exactly one of the two is set."""

    pods: Selector
    namespace: str | None = None
    namespaces: Selector | None = None


@dataclass(frozen=True, slots=True)
class PodSet:
    """The addresses of all pods that any of ``selections`` takes; on the side of the peer in ``direction``.

    ``selections`` are sorted, each once: equal rules of different policies share a set.
    """

    direction: Direction
    selections: tuple[PodSelection, ...]


@dataclass(frozen=True, slots=True)
class PortSet:
    """(address, protocol, port) of every pod taken by ``selections`` that calls a container port ``port_name``.

    Matches the destination: the policy's own pods for ingress (``local_only``: those of this node are enough), the
    peers for egress. Names that no pod has leave the set empty, and the clause matches nothing (S2).
    """

    direction: Direction
    selections: tuple[PodSelection, ...]
    port_name: str
    protocol: str
    local_only: bool = False


@dataclass(frozen=True, slots=True)
class BlockSet:
    """Networks of one family, disjoint and sorted, excepts already taken out; it never changes its members."""

    direction: Direction
    family: Family
    prefixes: tuple[str, ...]


SetKey = PodSet | PortSet | BlockSet


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports of a protocol; ``first`` None means all of them. ``last`` equals ``first`` for a single port.

    ``protocol``, here and in `PortSet`, is the API's word: ``TCP``, ``UDP``, ``SCTP``.
    """

    protocol: str
    first: int | None = None
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Clause:
    """One reason to allow: the peer is in ``peer`` and the destination port fits ``port``; None is no condition.

    ``number``: the index of the policy's rule, for people. ``kind`` is upstream's comment word (``ingress pods``,
    ``egress cidr np``). A clause with a `BlockSet` is of that family only.
    """

    number: int
    kind: str
    peer: PodSet | BlockSet | None
    port: PortRange | PortSet | None

    @property
    def sets(self) -> tuple[SetKey, ...]:
        """The sets that it names."""
        return tuple(part for part in (self.peer, self.port) if isinstance(part, PodSet | PortSet | BlockSet))


@dataclass(frozen=True, slots=True)
class PolicyRules:
    """A NetworkPolicy, compiled. A direction that it does not cover is None; covered without clauses is a denial.

    ``problems``: one line each, naming object, key and value, for what could not be understood; its clause is left out,
    so that traffic is refused rather than allowed.
    """

    key: Key
    uid: str
    target: PodSelection
    ingress: tuple[Clause, ...] | None
    egress: tuple[Clause, ...] | None
    problems: tuple[str, ...] = ()

    def clauses(self, direction: Direction) -> tuple[Clause, ...] | None:
        """The clauses of a direction; None if it is not covered."""
        return self.ingress if direction is Direction.INGRESS else self.egress


@dataclass(frozen=True, slots=True)
class LocalPod:
    """A pod of this node and the policies that select it, sorted; None: not isolated in that direction.

    ``addresses``: those of the pod that it owns. Two pods can claim one address while the API lags behind; one of them
    is the owner (`engine.py`), and only that one counts.
    """

    facts: PodFacts
    addresses: tuple[str, ...]
    ingress: tuple[Key, ...] | None
    egress: tuple[Key, ...] | None

    def policies(self, direction: Direction) -> tuple[Key, ...] | None:
        """The policies that isolate it in a direction; None if there are none."""
        return self.ingress if direction is Direction.INGRESS else self.egress

    def addresses_of(self, family: Family) -> tuple[str, ...]:
        """Its own addresses of a family."""
        return tuple(item for item in self.addresses if (":" in item) == (family is Family.IPV6))


@dataclass(frozen=True, slots=True)
class Frame:
    """What does not come from policies: ranges and ports that are somebody else's business, and the node's own pods.

    ``node_ports``: (protocol in lower case, port) of Services, for the packets that the proxy still has to translate.
    ``only_syn_opens``: reset TCP packets of pods that belong to no tracked connection and open none. Where forbidden
    connections are cut, the next packet from the end that may talk would bring them back.
    """

    families: tuple[Family, ...] = (Family.IPV4,)
    cluster_ranges: tuple[IPNetwork, ...] = ()
    external_ranges: tuple[IPNetwork, ...] = ()
    load_balancer_ranges: tuple[IPNetwork, ...] = ()
    node_port_range: tuple[int, int] = (30000, 32767)
    node_ports: frozenset[tuple[str, int]] = frozenset()
    pod_cidrs: tuple[IPNetwork, ...] = ()
    default_deny: bool = False
    only_syn_opens: bool = False


@dataclass(slots=True)
class Ruleset:
    """Everything that stands now. Kept by the engine, read by the backends, which must not change it.

    ``policies``: only those that select a local pod. ``members``: by set and family, for the sets that those name; a
    family whose set would be empty is there too, with no members.
    """

    policies: Mapping[Key, PolicyRules] = field(default_factory=dict)
    pods: Mapping[Key, LocalPod] = field(default_factory=dict)
    members: Mapping[SetKey, Mapping[Family, AbstractSet[Member]]] = field(default_factory=dict)


@dataclass(slots=True)
class Changed:
    """What differs between two moments of a `Ruleset`; ``everything`` says: look at all of it.

    ``policies`` and ``pods``: keys that are new, gone or different. ``new_sets``/``gone_sets`` are not in ``added`` nor
    ``removed``, which hold the members of sets that stay.
    """

    everything: bool = False
    policies: set[Key] = field(default_factory=set)
    pods: set[Key] = field(default_factory=set)
    new_sets: set[SetKey] = field(default_factory=set)
    gone_sets: set[SetKey] = field(default_factory=set)
    added: dict[SetKey, dict[Family, set[Member]]] = field(default_factory=dict)
    removed: dict[SetKey, dict[Family, set[Member]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.everything or any(
            (self.policies, self.pods, self.new_sets, self.gone_sets, self.added, self.removed)
        )

    @property
    def only_members(self) -> bool:
        """Whether no chain is concerned: the fast lane."""
        return not (self.everything or self.policies or self.pods or self.new_sets or self.gone_sets)
