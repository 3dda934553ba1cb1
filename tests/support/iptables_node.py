"""A node's iptables backend for tests: in a network namespace, with the rule set that it was last given."""

from __future__ import annotations

import select
import time

from support.firewall_world import FRAME, WORLD
from support.namespaces import Namespace, namespaces
from support.policyworld import BOTH, cluster
from support.rulesets import changed_between, ruleset_of

from kube_router.ipc.messages import NetworkPolicy, Pod
from kube_router.workers.firewall.backend import Synced
from kube_router.workers.firewall.iptables import Iptables
from kube_router.workers.firewall.rules import Changed, Ruleset
from kube_router.workers.kernel.chains import ChainDriver
from kube_router.workers.kernel.ipset import SetDriver
from kube_router.workers.kernel.iptables import Backend, Programs
from kube_router.workers.model import Family

PROGRAM = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}
TICK = 0.05
"""Seconds between two looks at what the kernel tells nothing of; a second otherwise."""


class Node:
    """The backend with the rule set that it was last given; use it inside the namespace."""

    def __init__(self, namespace: Namespace, kind: Backend, world: tuple[Pod | NetworkPolicy, ...] = WORLD) -> None:
        self.namespace, self.kind = namespace, kind
        self.backend = self.new()
        self.state = cluster(world, FRAME)
        self.ruleset = Ruleset()

    @property
    def programs(self) -> Programs:
        return Programs(self.kind, f"-{self.kind}", (1, 8, 9))

    def new(self, *, chains: ChainDriver | None = None, sets: SetDriver | None = None) -> Iptables:
        """A process without memory."""
        return Iptables(chains=chains or ChainDriver(self.programs), sets=sets)

    def close(self) -> None:
        """End the process."""
        self.backend.close()

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
        self.close()
        self.backend = self.new()
        return self.backend.sync(self.ruleset, Changed(everything=True), self.state.frame, observe=True, hold=False)

    def program(self, family: Family) -> str:
        """``ip6tables-legacy``."""
        return f"{PROGRAM[family]}-{self.kind}"

    def iptables(self, family: Family, arguments: str) -> str:
        """What the program of this kind says."""
        return self.namespace.run(f"{self.program(family)} {arguments}")

    def saved(self, family: Family) -> str:
        """Table filter, as text."""
        lines = self.namespace.run(f"{self.program(family)}-save -t filter").splitlines()
        return "\n".join(line.split(" [")[0] for line in lines if not line.startswith("#")) + "\n"

    def sets(self) -> str:
        """All ipsets, in an order of their own."""
        lines = self.namespace.run("ipset save").splitlines()
        return "\n".join(sorted(line.split(" initval")[0] for line in lines))

    def everything(self) -> str:
        return "".join(map(self.saved, BOTH)) + self.sets()

    def woken(self) -> bool:
        """Whether a waker asks for a sync, within a tick."""
        time.sleep(2 * TICK)
        wakers = self.backend.wakers()
        ready, _, _ = select.select(list(wakers), [], [], 0)
        return any([wakers[descriptor]() for descriptor in ready])  # noqa: C419 - each must be drained


def fresh(node: Node) -> str:
    """What a backend makes of the node's rule set in an empty kernel."""
    with namespaces() as (other,), other.enter():
        twin = Node(other, node.kind)
        twin.ruleset = node.ruleset
        twin.backend.sync(node.ruleset, Changed(everything=True), node.state.frame, observe=True, hold=False)
        text = twin.everything()
        twin.close()
        return text
