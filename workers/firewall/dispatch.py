"""Dispatch: the chains that lead from a packet's address to the chain of the pod that has it.

Pure. A tree over the addresses by steps of four bits, in which steps that decide nothing are left out: of n pods, a new
connection looks at O(16 · log16 n) rules instead of one rule a pod. Every rule goes (``-g``), so that a ``RETURN`` at
the end leads back to where the tree was entered. A chain is named after its direction and prefix; a pod more or less
changes the few chains on its way.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterator, Mapping

from kube_router.workers.firewall.names import dispatch_chain
from kube_router.workers.firewall.rules import Direction
from kube_router.workers.model import Family
from kube_router.workers.rulefacts import Members, RuleText

STEP = 4
"""Bits that one chain decides."""
SHORT = 1 << STEP
"""A chain may list so many addresses itself: as many as it would have prefixes."""
DEEPEST = 8
"""A chain so far below the root lists what it has: nftables takes 16 nested chains in all, `chains.py` needs five."""
_OPTION = {Direction.INGRESS: "-d", Direction.EGRESS: "-s"}

Entries = list[tuple[int, str]]
"""(address as a number, chain), in order."""


def dispatch_chains(
    family: Family, direction: Direction, pod_chains: Mapping[str, str]
) -> dict[str, tuple[RuleText, ...]]:
    """All chains of a direction, by name, from ``pod_chains`` (address → chain); the first is the root.

    The root is there without pods too, so that what leads to it never changes.
    """
    entries = sorted((_value(address), chain) for address, chain in pod_chains.items())
    return dict(_tree(family, direction, dispatch_chain(direction), entries, 0))


def _tree(
    family: Family, direction: Direction, name: str, entries: Entries, depth: int
) -> Iterator[tuple[str, tuple[RuleText, ...]]]:
    option, bits = _OPTION[direction], family.bits
    if len(entries) <= SHORT or depth == DEEPEST:
        yield name, tuple(_rule(family, option, value, bits, chain) for value, chain in entries)
        return
    differing = (entries[0][0] ^ entries[-1][0]).bit_length()
    length = (bits - differing) // STEP * STEP + STEP
    rules, below = [], []
    for start, group in _groups(entries, bits - length):
        if len(group) == 1:
            rules.append(_rule(family, option, group[0][0], bits, group[0][1]))
            continue
        child = dispatch_chain(direction, f"{prefix_text(family, start, length)}/{length}")
        rules.append(_rule(family, option, start, length, child))
        below.append((child, group))
    yield name, tuple(rules)
    for child, group in below:
        yield from _tree(family, direction, child, group, depth + 1)


@functools.lru_cache(4096)
def _value(address: str) -> int:
    return int(ipaddress.ip_address(address))


def _groups(entries: Entries, host_bits: int) -> Iterator[tuple[int, Entries]]:
    """(prefix, its entries) of each prefix that has some."""
    group: Entries = []
    for entry in entries:
        if group and group[0][0] >> host_bits != entry[0] >> host_bits:
            yield group[0][0] >> host_bits << host_bits, group
            group = []
        group.append(entry)
    yield group[0][0] >> host_bits << host_bits, group


def _rule(family: Family, option: str, value: int, length: int, chain: str) -> RuleText:
    return RuleText(f"{option} {prefix_text(family, value, length)}/{length} -g {chain}")


@functools.lru_cache(4096)
def prefix_text(family: Family, value: int, length: int) -> str:
    """The address of a prefix as the kernel tools print it, not always as Python does (``::ffff:10.0.0.1``)."""
    packed = value.to_bytes(family.bits // 8, "big") + bytes([length])
    return Members(family, packed).texts()[0].partition("/")[0]
