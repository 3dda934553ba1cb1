"""A node with the nftables backend for tests: a small cluster, its rule set turned by hand, readers of the kernel.

Touches the kernel; use it inside a network namespace. The readers call the ``nft`` program, never the code under test.
"""

from __future__ import annotations

import dataclasses
import re
import select

from support import firewall_world
from support.firewall_world import WORLD
from support.namespaces import Namespace
from support.namespaces import namespaces as namespaces_of_tests
from support.policyworld import BOTH, cluster
from support.rulesets import changed_between, ruleset_of

from kube_router.ipc.messages import NetworkPolicy, Pod
from kube_router.workers.firewall import names
from kube_router.workers.firewall.backend import Synced
from kube_router.workers.firewall.nftables import Nftables
from kube_router.workers.firewall.rules import (
    Changed,
    Direction,
    PodSet,
    Ruleset,
)
from kube_router.workers.model import Family

KIND = {Family.IPV4: "ip", Family.IPV6: "ip6"}
FRAME = dataclasses.replace(firewall_world.FRAME, only_syn_opens=True)


class Node:
    """The backend with the rule set that it was last given; use it inside the namespace."""

    def __init__(self, namespace: Namespace, world: tuple[Pod | NetworkPolicy, ...] = WORLD) -> None:
        self.namespace = namespace
        self.backend = Nftables()
        self.state = cluster(world, FRAME)
        self.ruleset = Ruleset()

    def start(self, *, hold: bool = False) -> Synced:
        """The first sync of a process."""
        self.ruleset = ruleset_of(self.state)
        return self.backend.sync(self.ruleset, Changed(everything=True), self.state.frame, observe=True, hold=hold)

    def become(self, *world: Pod | NetworkPolicy, hold: bool = False, observe: bool = False) -> Synced:
        """A sync after the cluster has become this one."""
        return self.give(ruleset_of(cluster(world, FRAME)), hold=hold, observe=observe)

    def give(self, ruleset: Ruleset, *, hold: bool = False, observe: bool = False) -> Synced:
        changed = changed_between(self.ruleset, ruleset)
        self.ruleset = ruleset
        return self.backend.sync(ruleset, changed, self.state.frame, observe=observe, hold=hold)

    def look(self) -> Synced:
        """A sync that observes, of an unchanged cluster."""
        return self.backend.sync(self.ruleset, Changed(), self.state.frame, observe=True, hold=False)

    def restart(self) -> Synced:
        """A new process without memory."""
        self.backend.close()
        self.backend = Nftables()
        return self.backend.sync(self.ruleset, Changed(everything=True), self.state.frame, observe=True, hold=False)

    def nft(self, command: str) -> str:
        """What the program says."""
        return self.namespace.run(f"nft '{command}'")

    def table(self, family: Family) -> str:
        """The text of a table, elements and all."""
        return self.namespace.run(f"nft -s list table {KIND[family]} {names.NFT_TABLES[family]}")

    def tables(self) -> str:
        return "".join(map(self.table, BOTH))

    def woken(self) -> bool:
        """Whether a waker asks for a sync."""
        wakers = self.backend.wakers()
        ready, _, _ = select.select(list(wakers), [], [], 0)
        return any([wakers[descriptor]() for descriptor in ready])  # noqa: C419 - each must be drained


def fresh(node: Node) -> str:
    """The tables that a backend makes of the same rule set in an empty kernel."""
    with namespaces_of_tests() as (other,), other.enter():
        twin = Node(other, ())
        twin.backend.sync(node.ruleset, Changed(everything=True), node.state.frame, observe=True, hold=False)
        text = twin.tables()
        twin.backend.close()
        return text


def canonical(tables: str) -> list[str]:
    """What listings say, without the order that sets, chains and elements have by accident."""
    whole = re.sub(r"elements = \{(.*?)\}", _sorted_elements, tables, flags=re.DOTALL)
    return sorted(re.split(r"\n\n|(?<=\{)\n(?=\t(?:set|map|chain) )|\n(?=\})", whole))


def _sorted_elements(found: re.Match[str]) -> str:
    return f"elements: {sorted(' '.join(item.split()) for item in found[1].split(','))}"


def elements(node: Node, family: Family, name: str) -> set[str]:
    """The elements of a set, as the program lists them, without comments."""
    text = node.namespace.run(f"nft -s list set {KIND[family]} {names.NFT_TABLES[family]} {name}")
    found = re.search(r"elements = \{(.*?)\}", text, re.DOTALL)
    return {" ".join(item.split()) for item in found[1].split(",")} if found else set()


def set_of(node: Node, family: Family, kind: type) -> str:
    """The name of the only set of a kind."""
    (key,) = (key for key in node.ruleset.members if isinstance(key, kind) and len(node.ruleset.members[key]) == 2)
    return names.set_name(key, family)


def peers_of(node: Node) -> PodSet:
    """The pods that may talk to the web pod."""
    return next(key for key in node.ruleset.members if isinstance(key, PodSet) and key.direction is Direction.INGRESS)


def chains(node: Node, family: Family) -> dict[str, list[str]]:
    """The rules of every chain of a table, in the program's words."""
    found: dict[str, list[str]] = {}
    lines = iter(node.namespace.run(f"nft -s -t list table {KIND[family]} {names.NFT_TABLES[family]}").splitlines())
    for line in lines:
        if line.startswith("\tchain "):
            rules = found.setdefault(line.split()[1], [])
            while (rule := next(lines)) != "\t}":
                if not rule.startswith(("\t\ttype ", "\t\tcomment ")):
                    rules.append(rule.strip())
    return found


def planned(node: Node, family: Family) -> dict[str, list[str]]:
    """The chains that a new process would make."""
    with namespaces_of_tests() as (other,), other.enter():
        twin = Node(other, ())
        twin.backend.sync(node.ruleset, Changed(everything=True), node.state.frame, observe=True, hold=False)
        found = chains(twin, family)
        twin.backend.close()
        return found
