"""The state of a BGP speaker as plain values: what gobgpd is to hold, and in the same shape what it holds.

Pure: frozen types. Read-back from gobgpd is normalised into these types by ``gobgp/convert.py``, so that two states
that mean the same are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from kube_router.workers.model import Family
from kube_router.workers.router import names

NODE_HOLD_SECONDS = 90
"""Hold time of sessions between nodes: gobgpd's default, which ``--bgp-holdtime`` does not change."""


@dataclass(frozen=True, slots=True)
class Speaker:
    """What gobgpd cannot change while it runs. ``listen_addresses`` in canonical text, in no order."""

    asn: int
    router_id: str
    listen_port: int
    listen_addresses: frozenset[str]

    def __str__(self) -> str:
        addresses = ",".join(sorted(self.listen_addresses)) or "all addresses"
        return f"AS {self.asn}, router-id {self.router_id}, port {self.listen_port} on {addresses}"


@dataclass(frozen=True, slots=True)
class GracefulRestart:
    """What is offered for a restart of the speaker (RFC 4724; ``long_lived_seconds``: RFC 9494, 0: not offered).

    ``deferral_seconds``: how long a restarted speaker waits for its peers' End-of-RIB before it announces. It matters
    once, to a peer that is added to a fresh daemon, so another value is no reason to touch a session.
    """

    restart_seconds: int
    deferral_seconds: int = field(compare=False)
    long_lived_seconds: int = 0

    def __str__(self) -> str:
        long_lived = f", long-lived {self.long_lived_seconds}s" if self.long_lived_seconds else ""
        return f"graceful restart {self.restart_seconds}s{long_lived}"


@dataclass(frozen=True, slots=True)
class Bfd:
    """Liveness detection beside a session (RFC 5880). Intervals in milliseconds."""

    port: int = 3784
    multiplier: int = 3
    send_milliseconds: int = 1000
    receive_milliseconds: int = 1000

    def __str__(self) -> str:
        intervals = f"{self.send_milliseconds}/{self.receive_milliseconds} ms"
        return f"BFD port {self.port}, {intervals}, x{self.multiplier}"


@dataclass(frozen=True, slots=True)
class Neighbor:
    """One BGP session to hold.

    ``asn`` 0: whatever the peer says; ``hold_seconds`` as offered; ``multihop_ttl`` 0: none. ``password`` is the
    TCP-MD5 key (RFC 2385); it never shows in text. ``cluster_id``: we reflect routes to and from this peer (RFC
    4456); empty: we do not. ``most_prefixes``: of one family, 0: any number.
    """

    address: str
    asn: int
    local_address: str
    remote_port: int
    families: tuple[Family, ...]
    hold_seconds: int = NODE_HOLD_SECONDS
    multihop_ttl: int = 0
    password: str = field(default="", repr=False)
    cluster_id: str = ""
    graceful_restart: GracefulRestart | None = None
    bfd: Bfd | None = None
    most_prefixes: int = 0

    def __str__(self) -> str:
        families = "+".join(map(str, self.families)) or "no family"
        parts = [f"{self.address} port {self.remote_port} AS {self.asn or 'any'} from {self.local_address} {families}"]
        parts.append(f"hold {self.hold_seconds}s")
        if self.multihop_ttl:
            parts.append(f"ttl {self.multihop_ttl}")
        if self.password:
            parts.append("with password")
        if self.cluster_id:
            parts.append(f"reflected, cluster {self.cluster_id}")
        parts += [str(item) for item in (self.graceful_restart, self.bfd) if item is not None]
        if self.most_prefixes:
            parts.append(f"at most {self.most_prefixes} prefixes")
        return ", ".join(parts)


LIVE = ("hold_seconds", "most_prefixes", "bfd")
"""Fields of a neighbour that gobgpd changes without ending the session. All others are part of its OPEN or its socket,
or (route reflection) are not looked at again."""


def same_session(actual: Neighbor, desired: Neighbor) -> bool:
    """Whether a session goes on while its settings change: only the `LIVE` ones differ."""
    return actual == replace(desired, **{name: getattr(actual, name) for name in LIVE})


class PrefixRange(NamedTuple):
    """Prefixes inside ``prefix`` (canonical CIDR) whose length is from ``shortest`` to ``longest`` bits.

    A tuple, because sets of thousands of them are made and compared.
    """

    prefix: str
    shortest: int
    longest: int

    def __str__(self) -> str:
        return f"{self.prefix} {self.shortest}..{self.longest}"


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a statement does to a path that it lets pass.

    ``next_hop_self``: the session's own address becomes the next hop. ``prepend``: (AS number, how often).
    ``communities`` (RFC 1997) as ``a:b`` and ``large_communities`` (RFC 8092) as ``a:b:c``, canonical, added to the
    path's own.
    """

    next_hop_self: bool = False
    prepend: tuple[int, int] | None = None
    communities: tuple[str, ...] = ()
    large_communities: tuple[str, ...] = ()

    def changes(self) -> Iterator[str]:
        """What it does to a path, in words."""
        if self.next_hop_self:
            yield "next hop self"
        if self.prepend is not None:
            yield f"prepend AS {self.prepend[0]} {self.prepend[1]} times"
        if self.communities:
            yield f"communities {' '.join(self.communities)}"
        if self.large_communities:
            yield f"large communities {' '.join(self.large_communities)}"


LEARNED_INTERNAL = "internal"
LEARNED_EXTERNAL = "external"


@dataclass(frozen=True, slots=True)
class Statement:
    """One policy statement: prefixes of a set, from or to neighbours of a set, accepted or rejected.

    The neighbour set is named and never empty: gobgpd takes an empty one as "every neighbour". ``prefix_set`` empty:
    whatever the prefix. ``learned``: only paths learned from speakers of our own AS (`LEARNED_INTERNAL`) or of another
    one (`LEARNED_EXTERNAL`), none that originates here; empty: any path.
    """

    prefix_set: str
    neighbor_set: str
    accept: bool
    attributes: Attributes = Attributes()
    learned: str = ""

    @property
    def name(self) -> str:
        """kube-router's name: the prefix set's and the neighbour set's in one word; ours for learned paths before."""
        return (f"learned{self.learned}" if self.learned else "") + self.prefix_set + self.neighbor_set

    def __str__(self) -> str:
        what = self.prefix_set or "any prefix"
        source = f" learned from {self.learned} peers" if self.learned else ""
        changes = "".join(f", {change}" for change in self.attributes.changes())
        verdict = ("accept" if self.accept else "reject") + changes
        return f"{self.name}: {what}{source} with {self.neighbor_set}: {verdict}"


@dataclass(frozen=True, slots=True)
class Policies:
    """Everything that one SetPolicies call replaces: sets by name (members in no order), statements in order."""

    prefix_sets: Mapping[str, frozenset[PrefixRange]] = field(default_factory=dict)
    neighbor_sets: Mapping[str, frozenset[str]] = field(default_factory=dict)
    export: tuple[Statement, ...] = ()
    import_: tuple[Statement, ...] = ()


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which policies decide a direction, and what happens to a path on which none of them decides."""

    policies: tuple[str, ...]
    accept: bool

    def __str__(self) -> str:
        return f"[{' '.join(self.policies)}] default {'accept' if self.accept else 'reject'}"


EXPORT_ASSIGNMENT = Assignment((names.EXPORT_POLICY,), accept=False)
IMPORT_ASSIGNMENT = Assignment((names.IMPORT_POLICY,), accept=True)
CLOSED = Assignment((), accept=False)
OPEN = Assignment((), accept=True)


@dataclass(frozen=True, slots=True)
class BgpState:
    """A speaker with all that it is to do or does. ``speaker`` None: the daemon runs, but BGP is not started.

    ``paths``: next hop by prefix, of paths that originate here. ``neighbors`` by address. All text canonical.
    """

    speaker: Speaker | None
    policies: Policies = Policies()
    export: Assignment = EXPORT_ASSIGNMENT
    import_: Assignment = IMPORT_ASSIGNMENT
    paths: Mapping[str, str] = field(default_factory=dict)
    neighbors: Mapping[str, Neighbor] = field(default_factory=dict)


def host_prefix(address: str) -> str:
    """The prefix of one address in canonical text: /32 or /128."""
    return f"{address}/128" if ":" in address else f"{address}/32"


def is_host_prefix(prefix: str) -> bool:
    """Whether a canonical prefix holds one address."""
    return prefix.endswith("/128" if ":" in prefix else "/32")


FRESH = BgpState(speaker=None, export=OPEN, import_=OPEN)
"""gobgpd as it is right after its start."""
