"""What of ours stands in a filter table, from the words of ``iptables-save``, and how it goes.

Pure. Ours are the chains of our names (`names.py`, and the same prefixes as Go kube-router wrote them, with any 16
characters), and in the built-in chains the jumps to our top chains. A rule that somebody else pointed at a chain of
ours stays, and so does that chain, empty: it is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from kube_router.workers.firewall.names import (
    COMMON_CHAIN,
    DEFAULT_CHAIN,
    DESTINATION_PREFIX,
    DISPATCH_PREFIX,
    LOCAL_PODS,
    NODE_PORTS,
    POD_PREFIX,
    POLICY_PREFIX,
    SOURCE_PREFIX,
    TAIL_CHAIN,
    TOP_CHAINS,
)

_DIGEST = "[A-Z2-7]{16}"
_FIXED_CHAINS = frozenset((*TOP_CHAINS.values(), DEFAULT_CHAIN, COMMON_CHAIN, TAIL_CHAIN))
_CHAIN = re.compile(f"(?:{POD_PREFIX}|{POLICY_PREFIX}|{DISPATCH_PREFIX}){_DIGEST}")
_FIXED_SETS = frozenset((LOCAL_PODS, *NODE_PORTS.values()))
_SET = re.compile(f"(?:{SOURCE_PREFIX}|{DESTINATION_PREFIX}){_DIGEST}")
_RULE = re.compile(r"-A (\S+) (.*)")
_TARGET = re.compile(r"(?:^| )-[jg] (\S+)")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


def is_our_chain(name: str) -> bool:
    """Whether a chain of the filter table is ours by its name."""
    return name in _FIXED_CHAINS or _CHAIN.fullmatch(name) is not None


def is_our_set(name: str) -> bool:
    """Whether an ipset, of either family, is ours by its name."""
    plain = name.removeprefix("inet6:")
    return plain in _FIXED_SETS or _SET.fullmatch(plain) is not None


@dataclass(frozen=True, slots=True)
class Removal:
    """Lines for ``iptables-restore --noflush``, without the frame of the table; ``kept``: a line for what must stay."""

    lines: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(["*filter", *self.lines, "COMMIT", ""])


def plan_removal(saved: Iterable[str]) -> Removal:
    """How what is ours in a saved filter table goes, all at once: jumps, contents, chains."""
    chains: list[str] = []
    jumps: list[str] = []
    referrers: dict[str, str] = {}
    for line in saved:
        if line.startswith(":"):
            name = line[1:].split(" ", 1)[0]
            if is_our_chain(name):
                chains.append(name)
        elif (rule := _RULE.fullmatch(line)) is not None and not is_our_chain(rule[1]):
            target = _target(rule[2])
            if target in TOP_CHAINS.values() and rule[1] in TOP_CHAINS:
                jumps.append(f"-D {rule[1]} {rule[2]}")
            elif is_our_chain(target):
                referrers.setdefault(target, rule[1])
    contents = [f":{chain} - [0:0]" for chain in chains]
    ends = [f"-X {chain}" for chain in chains if chain not in referrers]
    kept = tuple(
        f"chain {chain}: a rule of chain {referrers[chain]} that is not ours jumps to it; it stays, empty"
        for chain in chains
        if chain in referrers
    )
    return Removal((*jumps, *contents, *ends), kept)


def _target(rule: str) -> str:
    """The chain that a rule jumps or goes to; comments may hold anything."""
    found = _TARGET.search(_QUOTED.sub('""', rule))
    return found[1] if found else ""
