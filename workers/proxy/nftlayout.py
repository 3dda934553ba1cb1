"""The proxy's nftables table: its sets and maps, and the chains, of which there are few however many Services.

Pure. A Service is elements of maps, never a rule. The way of a packet:

| chain                             | hook, priority          | rules                                                  |
| --------------------------------- | ----------------------- | ------------------------------------------------------ |
| guard-prerouting, guard-output    | before the translation  | new: what may not use a load balancer's address, drop  |
| nat-prerouting                    | prerouting, dstnat      | from pods of this node: inside; outside                |
| nat-output                        | output, dstnat          | inside; outside                                        |
| inside                            |                         | maps of what is other for who is in the cluster        |
| outside                           |                         | address and port, or node port, to a chain that picks  |
| pick-…                            |                         | the endpoint that the client had; the next one         |
| after-prerouting, after-output    | after the translation   | new connections: to ``new``                            |
| new                               |                         | remember the endpoint; reject what was not translated  |
| remember-…                        |                         | for so many seconds                                    |
| nat-postrouting                   | postrouting, srcnat     | hairpin; masquerade                                    |

A chain that picks knows by how many endpoints it counts, not whose: the key of the endpoint's element is that of the
packet and the count. Both look-ups of a map stand twice: a packet that is between them when the worker commits finds
nothing the first time, and all of the new the second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kube_router.workers.model import Family
from kube_router.workers.nfttypes import VERDICT, CodedChain, Hook, SetShape
from kube_router.workers.proxy import nftexpr as nft
from kube_router.workers.proxy.model import ProxyFrame

SERVICES, SERVICES_INSIDE, ENDPOINTS = "services", "services-inside", "endpoints"
NODE_PORTS, NODE_PORTS_INSIDE, NODE_PORT_ENDPOINTS = "node-ports", "node-ports-inside", "node-port-endpoints"
STICKY, STICKY_NODE_PORTS, AFFINITY = "sticky", "sticky-node-ports", "affinity"
CLOSED, CLOSED_NODE_PORTS = "closed", "closed-node-ports"
VIPS, OWN_VIPS, SERVICE_PORTS = "vips", "own-vips", "service-ports"
RESTRICTED, SOURCES = "restricted", "sources"
HAIRPIN, POD_NETWORKS, NODE_ADDRESSES = "hairpin", "pod-networks", "node-addresses"

AFFINITY_MOST = 1 << 18
"""Clients that are remembered at most; more are sent to any endpoint. As many connections Linux tracks by default."""
INSIDE_OFFSET = 1 << 16
"""What is added to the numbers of endpoints for packets from inside, where those are others."""
SEED = 0x6B756265
"""Of the hash of a client's address: the same on every node."""
LANES = 8
"""Chains among which Services of equally many endpoints are spread, so that they seldom take turns with each other."""
_BEFORE, _DSTNAT, _AFTER, _SRCNAT = -110, -100, -90, 100
_ADDRESS = {Family.IPV4: "ipv4_addr", Family.IPV6: "ipv6_addr"}


class Pick(NamedTuple):
    """A chain that picks an endpoint. ``by``: ``turn``, ``source`` or ``source-port``; ``numbers``: how many it counts.

    ``sticky``: a client that is remembered gets what it had. ``inside``: for who is in the cluster.
    """

    by: str
    numbers: int
    lane: int = 0
    sticky: bool = False
    inside: bool = False
    node_port: bool = False

    @property
    def chain(self) -> str:
        """Its name."""
        words = [f"pick-{self.by}-{self.numbers}"]
        words += [f"lane-{self.lane}"] if self.lane else []
        marks = (("sticky", self.sticky), ("inside", self.inside), ("node-port", self.node_port))
        return "-".join([*words, *(word for word, on in marks if on)])


class Remember(NamedTuple):
    """A chain that remembers a client's endpoint."""

    seconds: int

    @property
    def chain(self) -> str:
        """Its name."""
        return f"remember-{self.seconds}"


Made = Pick | Remember
"""A chain that is there as long as some Service needs it."""


class WordedChain(NamedTuple):
    """A chain with rules whose words are known."""

    name: str
    rules: tuple[nft.Rule, ...]
    hook: Hook | None = None

    @property
    def coded(self) -> CodedChain:
        """As the kernel holds it."""
        return CodedChain(self.name, tuple(rule.code for rule in self.rules), self.hook)


def shapes(family: Family) -> dict[str, SetShape]:
    """The sets and maps of a table, by name, in an order in which they can be filled: what leads to others is last."""
    address = _ADDRESS[family]
    service, port = f"{address} . inet_proto . inet_service", "inet_proto . inet_service"
    target = f"{address} . inet_service"
    made = (
        SetShape(ENDPOINTS, f"{service} . mark", target),
        SetShape(NODE_PORT_ENDPOINTS, f"{port} . mark", target),
        SetShape(AFFINITY, f"{address} . {service}", target, remembers=True, size=AFFINITY_MOST),
        SetShape(NODE_ADDRESSES, address),
        SetShape(POD_NETWORKS, address, interval=True),
        SetShape(HAIRPIN, f"{address} . {address}"),
        SetShape(STICKY, service, VERDICT),
        SetShape(STICKY_NODE_PORTS, port, VERDICT),
        SetShape(SOURCES, f"{service} . {address}", interval=True),
        SetShape(RESTRICTED, service),
        SetShape(VIPS, address),
        SetShape(SERVICE_PORTS, port),
        SetShape(SERVICES_INSIDE, service, VERDICT),
        SetShape(NODE_PORTS_INSIDE, port, VERDICT),
        SetShape(SERVICES, service, VERDICT),
        SetShape(NODE_PORTS, port, VERDICT),
        SetShape(OWN_VIPS, address),
        SetShape(CLOSED, service),
        SetShape(CLOSED_NODE_PORTS, port),
    )
    return {shape.name: shape for shape in made}


class Layout:
    """The chains of a family's table."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._source, self._destination = nft.address(family, "saddr"), nft.address(family, "daddr")
        self._opened_to = nft.original_address(family, "daddr")
        self._port = (nft.PROTOCOL, nft.PORT)
        self._service = (self._destination, *self._port)
        self._original_port = (nft.PROTOCOL, nft.ORIGINAL_PORT)
        self._original = (self._opened_to, *self._original_port)

    def fixed(self, frame: ProxyFrame, source: bytes | None) -> dict[str, WordedChain]:
        """The chains that are always there; ``source``: the address that masqueraded connections get, if known."""
        new = nft.rule(nft.STATE_NEW, nft.jump("new"))
        made = [
            WordedChain("inside", tuple(self._inside(frame))),
            WordedChain("outside", tuple(self._outside(frame))),
            WordedChain("new", tuple(self._new(frame))),
            WordedChain(
                "nat-prerouting",
                (
                    nft.rule(nft.is_in((self._source,), POD_NETWORKS), nft.jump("inside")),
                    nft.rule(nft.jump("outside")),
                ),
                Hook("nat", "prerouting", _DSTNAT),
            ),
            WordedChain(
                "nat-output",
                (nft.rule(nft.jump("inside")), nft.rule(nft.jump("outside"))),
                Hook("nat", "output", _DSTNAT),
            ),
            WordedChain(
                "nat-postrouting", tuple(self._postrouting(frame, source)), Hook("nat", "postrouting", _SRCNAT)
            ),
        ]
        for hook in ("prerouting", "output"):
            made.append(WordedChain(f"guard-{hook}", tuple(self._guard()), Hook("filter", hook, _BEFORE)))
            made.append(WordedChain(f"after-{hook}", (new,), Hook("filter", hook, _AFTER)))
        return {chain.name: chain for chain in made}

    def made(self, made: Made) -> WordedChain:
        """A chain that Services need."""
        if isinstance(made, Remember):
            client = nft.original_address(self.family, "saddr")
            target = (self._destination, nft.PORT)
            remember = nft.update((client, *self._original), AFFINITY, made.seconds, target)
            return WordedChain(made.chain, (nft.rule(remember),))
        rules = []
        if made.sticky:
            rules.append(nft.rule(nft.dnat(self.family, (self._source, *self._service), AFFINITY)))
        offset = INSIDE_OFFSET if made.inside else 0
        if made.by == "turn":
            number = nft.counted(made.numbers, offset)
        else:
            port = (nft.SOURCE_PORT,) if made.by == "source-port" else ()
            number = nft.hashed((self._source, *port), made.numbers, SEED, offset)
        key, name = (self._port, NODE_PORT_ENDPOINTS) if made.node_port else (self._service, ENDPOINTS)
        rules.append(nft.rule(nft.dnat(self.family, (*key, number), name)))
        return WordedChain(made.chain, tuple(rules))

    def _on_node(self, frame: ProxyFrame) -> tuple[nft.Part, ...]:
        """Only packets for an address on which node ports are open."""
        if frame.node_ports_on is None:
            return nft.to_this_host(), nft.is_not_loopback(self.family)
        return (nft.is_in((self._destination,), NODE_ADDRESSES),)

    def _inside(self, frame: ProxyFrame) -> Iterator[nft.Rule]:
        for _ in range(2):
            yield nft.rule(nft.by_map(self._service, SERVICES_INSIDE))
        for _ in range(2):
            yield nft.rule(*self._on_node(frame), nft.by_map(self._port, NODE_PORTS_INSIDE))

    def _outside(self, frame: ProxyFrame) -> Iterator[nft.Rule]:
        for _ in range(2):
            yield nft.rule(nft.by_map(self._service, SERVICES))
        for _ in range(2):
            yield nft.rule(*self._on_node(frame), nft.by_map(self._port, NODE_PORTS))
        # This host answers a ping for a virtual address, as if it had it.
        yield nft.rule(nft.echo_request(self.family), nft.is_in((self._destination,), OWN_VIPS), nft.REDIRECT)

    def _guard(self) -> Iterator[nft.Rule]:
        restricted = nft.is_in(self._service, RESTRICTED)
        allowed = nft.is_in((*self._service, self._source), SOURCES, negated=True)
        yield nft.rule(nft.STATE_NEW, restricted, allowed, nft.DROP)

    def _new(self, frame: ProxyFrame) -> Iterator[nft.Rule]:
        yield nft.rule(nft.STATUS_DNAT, nft.by_map(self._original, STICKY))
        yield nft.rule(nft.STATUS_DNAT, nft.by_map(self._original_port, STICKY_NODE_PORTS))
        for where in (
            (nft.is_in(self._service, CLOSED),),
            (*self._on_node(frame), nft.is_in(self._port, CLOSED_NODE_PORTS)),
            (nft.is_in((self._destination,), OWN_VIPS),),
        ):
            yield nft.rule(*where, nft.RESET)
            yield nft.rule(*where, nft.unreachable(self.family))

    def _postrouting(self, frame: ProxyFrame, source: bytes | None) -> Iterator[nft.Rule]:
        masquerade = nft.MASQUERADE if source is None else nft.snat(self.family, source)
        yield nft.rule(
            nft.STATUS_DNAT,
            nft.is_in((self._source, self._destination), HAIRPIN),
            nft.snat_to_original(self.family),
        )
        strangers = (
            nft.is_in((self._source,), POD_NETWORKS, negated=True),
            nft.is_in((self._destination,), POD_NETWORKS, negated=True),
        )
        for service in (nft.is_in((self._opened_to,), VIPS), nft.is_in(self._original_port, SERVICE_PORTS)):
            who = () if frame.masquerade_all else strangers
            yield nft.rule(nft.STATUS_DNAT, service, *who, masquerade)
