"""gobgpd's evaluation of policies in our words, to foresee what a changed policy does to routes that are there already.

Pure: policies, a prefix and a neighbour in, the statement that decides out. As gobgpd: statements in order, the first
that matches decides, else the assignment's default; an empty neighbour set matches every neighbour, an empty prefix set
no prefix. Of overlapping members of a prefix set 4.x asks all, as this does, and 3.x only the longest that contains the
prefix; for sets like ours (``policies.py``) that is the same.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kube_router.workers.model import IPNetwork
from kube_router.workers.router.bgpstate import Assignment, Policies, PrefixRange, Statement, host_prefix


def decision(
    policies: Policies,
    assignment: Assignment,
    statements: Sequence[Statement],
    prefix: str,
    neighbor: str,
    source: str = "",
) -> Statement | bool:
    """What gobgpd does with ``prefix`` towards (export) or from (import) ``neighbor``.

    ``source``: what a statement's ``learned`` asks for; empty for a path that originates here. Returns the first
    statement that matches, or the assignment's default. An assignment without policies never looks at the statements.
    """
    if assignment.policies:
        for statement in statements:
            if statement.learned and statement.learned != source:
                continue
            if statement.prefix_set and not _matches(policies, statement.prefix_set, prefix):
                continue
            if concerns(policies, statement, neighbor):
                return statement
    return assignment.accept


def accepts(verdict: Statement | bool) -> bool:
    """Whether a `decision` lets the path pass."""
    return verdict if isinstance(verdict, bool) else verdict.accept


def concerns(policies: Policies, statement: Statement, neighbor: str) -> bool:
    """Whether a statement looks at routes of ``neighbor``; our neighbour sets hold host prefixes only."""
    members = policies.neighbor_sets.get(statement.neighbor_set, frozenset())
    return not members or host_prefix(neighbor) in members


def _matches(policies: Policies, prefix_set: str, prefix: str) -> bool:
    members = policies.prefix_sets.get(prefix_set, frozenset())
    length = int(prefix.rpartition("/")[2])
    if PrefixRange(prefix, length, length) in members:
        return True
    ranges = _ranges(members)
    if not ranges:
        return False
    network = ipaddress.ip_network(prefix)  # 5 µs: not for each of thousands of Service addresses
    return any(_covers(item, network) for item in ranges)


class _Range(NamedTuple):
    network: IPNetwork
    shortest: int
    longest: int


@functools.lru_cache(maxsize=64)
def _ranges(members: frozenset[PrefixRange]) -> tuple[_Range, ...]:
    """The members of a set that hold more than themselves: few, while exact ones are thousands."""
    return tuple(
        _Range(ipaddress.ip_network(item.prefix), item.shortest, item.longest) for item in members if not exact(item)
    )


def _covers(item: _Range, network: IPNetwork) -> bool:
    return (
        item.network.version == network.version
        and item.shortest <= network.prefixlen <= item.longest
        and network.network_address in item.network
    )


def exact(item: PrefixRange) -> bool:
    """Whether the range holds its own prefix only."""
    return item.shortest == item.longest and item.prefix.endswith(f"/{item.longest}")


def changed_members(
    actual: Mapping[str, frozenset[PrefixRange]], desired: Mapping[str, frozenset[PrefixRange]]
) -> frozenset[PrefixRange]:
    """Members that only one of the two has, over all sets."""
    none: frozenset[PrefixRange] = frozenset()
    sets = (actual.get(name, none) ^ desired.get(name, none) for name in {**actual, **desired})
    return none.union(*sets)
