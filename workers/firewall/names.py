"""The firewall's names in the kernel: chains, sets, marks, comments. kube-router's names are a contract with operators.

Pure. ``KUBE-POD-FW-``, ``KUBE-NWPLCY-``, ``KUBE-SRC-`` and ``KUBE-DST-`` are upstream's prefixes, 16 characters of
base32(SHA-256) follow; upstream's hashed text has no separators and a time stamp in it, ours has separators (names of
two namespaces cannot meet, S6) and no time: a name is the same at every sync and after every restart.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Iterable

from kube_router.ipc.messages import Key
from kube_router.workers.firewall.rules import BlockSet, Direction, PodSet, PortSet, SetKey
from kube_router.workers.model import Family

TOP_CHAINS = {"INPUT": "KUBE-ROUTER-INPUT", "FORWARD": "KUBE-ROUTER-FORWARD", "OUTPUT": "KUBE-ROUTER-OUTPUT"}
DEFAULT_CHAIN = "KUBE-NWPLCY-DEFAULT"
COMMON_CHAIN = "KUBE-NWPLCY-COMMON"
TAIL_CHAIN = "KUBE-NWPLCY-TAIL"
POLICY_PREFIX = "KUBE-NWPLCY-"
POD_PREFIX = "KUBE-POD-FW-"
DISPATCH_PREFIX = "KUBE-POD-BY-"
"""Of the chains that lead from a packet's address to the pod's chain; ours, upstream has a list of jumps instead."""
SOURCE_PREFIX, DESTINATION_PREFIX = "KUBE-SRC-", "KUBE-DST-"
NFT_TABLES = {Family.IPV4: "kube-router-filter-ipv4", Family.IPV6: "kube-router-filter-ipv6"}
"""nftables tables of the families ``ip`` and ``ip6``."""
WORDS_CHAIN = "KUBE-POD-BY-WORDS22222222222"
"""A chain to which nothing leads, for a moment: what is written there is read back, to see in which words."""
LOCAL_PODS = "kube-router-local-pods"
THEMSELVES = "kube-router-pods-themselves"
"""nftables: pairs of addresses of one isolated pod. A pod reaches itself whatever its policies say."""
POD_MAPS = {direction: f"kube-router-pods-{direction}" for direction in Direction}
"""nftables: verdict maps from the address of an isolated pod to its chain."""
NODE_PORTS = {protocol: f"kube-router-node-ports-{protocol}" for protocol in ("tcp", "udp", "sctp")}
IPSET_NODE_PORTS = {protocol: name for protocol, name in NODE_PORTS.items() if protocol != "sctp"}
"""Those that ipset can hold: in a bitmap:port set the kernel looks up TCP and UDP, never SCTP."""

ALLOWED = 0x10000
"""Mark bit: a policy allowed the packet in the direction that is being looked at."""
PASSED = 0x20000
"""Mark bit: the packet has passed the chains of all pods that it concerns."""
LOG_GROUP = 100
"""NFLOG group of refused packets: ``tcpdump -i nflog:100``."""

LONGEST_COMMENT = 120
"""Bytes; nftables takes 128, iptables 256."""


def digest(*parts: str) -> str:
    """16 characters of base32(SHA-256) over the parts, each closed by a NUL byte, which no part can hold."""
    text = "".join(f"{part}\0" for part in parts)
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:16]


def upstream_digest(text: str) -> str:
    """The same over plain text, as upstream hashes: for the UUIDs of its positioned rules."""
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:16]


@functools.lru_cache(16384)  # asked for at every look, of every policy and of every list of policies
def policy_chain(key: Key, direction: Direction) -> str:
    """The chain that holds a policy's clauses of one direction (S1: never both in one)."""
    return POLICY_PREFIX + digest(key, direction)


@functools.lru_cache(4096)  # asked for at every change, of every pod of this node
def pod_chain(key: Key, direction: Direction) -> str:
    """The chain that an isolated pod's packets of one direction go through."""
    return POD_PREFIX + digest(key, direction)


def dispatch_chain(direction: Direction, prefix: str = "") -> str:
    """The chain that leads from the addresses of a prefix to their pods' chains; without a prefix: from any address."""
    return DISPATCH_PREFIX + digest(direction, prefix)


def group_chain(policies: Iterable[Key], direction: Direction) -> str:
    """nftables: the chain that all pods with these policies of a direction go through."""
    return POD_PREFIX + digest("policies", direction, *policies)


def set_name(key: SetKey, family: Family) -> str:
    """Name of a set without the family prefix that ipset needs (`ipset_name`): nftables has a table a family."""
    prefix = SOURCE_PREFIX if key.direction is Direction.INGRESS else DESTINATION_PREFIX
    if isinstance(key, PortSet):
        prefix = DESTINATION_PREFIX  # a port belongs to the destination, whose ever packet it is
    return prefix + digest(*_identity(key), str(family))


def ipset_name(name: str, family: Family) -> str:
    """All ipsets share one space of names; upstream marks those of IPv6."""
    return f"inet6:{name}" if family is Family.IPV6 else name


def _identity(key: SetKey) -> Iterable[str]:
    yield type(key).__name__
    yield key.direction
    if isinstance(key, BlockSet):
        yield from key.prefixes
        return
    if isinstance(key, PortSet):
        yield from (key.port_name, key.protocol, str(key.local_only))
    if isinstance(key, PodSet | PortSet):
        yield from map(repr, key.selections)


def comment(key: Key, words: str) -> str:
    """``<namespace>/<name> <words>``: without control characters, quotes, backslashes; cut to fit both backends."""
    text = f"{key} {words}"
    if len(text.encode()) <= LONGEST_COMMENT and text.isprintable() and '"' not in text and "\\" not in text:
        return text  # nearly always
    clean = "".join(char for char in text if char.isprintable() and char not in '"\\')
    while len(clean.encode()) > LONGEST_COMMENT:
        clean = clean[:-1]
    return clean
