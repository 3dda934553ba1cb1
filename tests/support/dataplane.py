"""A node with its dataplane for tests: namespaces, node facts, and readers that are not the code under test."""

from __future__ import annotations

import select
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from support.namespaces import Namespace, veth

from kube_router.ipc.messages import Node, NodeAddress
from kube_router.workers.model import Family, Outcome
from kube_router.workers.nodefacts import NodeFacts, node_facts
from kube_router.workers.router.dataplane import Dataplane
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings

DUAL_STACK = Settings(enable_ipv6=True)


def facts(number: int, families: Sequence[Family] = tuple(Family)) -> NodeFacts:
    """Node n<number>: 10.0.0.<n>, fd00::<n>, pod CIDRs 10.244.<n>.0/24 and fd00:244:<n>::/64."""
    node = Node(
        name=f"n{number}",
        addresses=(NodeAddress("InternalIP", f"10.0.0.{number}"), NodeAddress("InternalIP", f"fd00::{number}")),
        pod_cidrs=(f"10.244.{number}.0/24", f"fd00:244:{number}::/64"),
    )
    return node_facts(node, families)


def pod_routes(*numbers: int) -> dict[str, str]:
    """What a node learns from the nodes ``numbers``."""
    return {
        prefix: hop
        for number in numbers
        for prefix, hop in (
            (f"10.244.{number}.0/24", f"10.0.0.{number}"),
            (f"fd00:244:{number}::/64", f"fd00::{number}"),
        )
    }


def connect(namespace: Namespace, peer: Namespace) -> None:
    """Node 1's link eth0, with node 2 at its other end."""
    veth(
        namespace,
        "eth0",
        peer,
        "eth0",
        left_addresses=("10.0.0.1/24", "fd00::1/64"),
        right_addresses=("10.0.0.2/24", "fd00::2/64"),
    )


@dataclass
class RunningDataplane:
    """Node n1's dataplane with remembered inputs, turned by hand; use it inside its namespace."""

    settings: Settings = DUAL_STACK
    nodes: Sequence[NodeFacts] = field(default_factory=lambda: (facts(1), facts(2), facts(3)))
    learned: Mapping[str, str] = field(default_factory=lambda: pod_routes(2, 3))

    def __post_init__(self) -> None:
        self.dataplane = Dataplane(self.settings)
        self._started = False
        self.repairs: Counter[str] = Counter()
        """What was put back so far, by kind."""

    def reconcile(
        self, trigger: Trigger | None = None, changed: frozenset[str] | None = None, *, hold: bool = False
    ) -> Outcome:
        """One reconciliation; the first one is the start."""
        trigger = trigger or Trigger(start=not self._started)
        self._started = True
        outcome = self.dataplane.reconcile(self.nodes[0], self.nodes, self.learned, changed, trigger, hold)
        for name, count in outcome.counters.items():
            if name.startswith("controller_repairs"):
                self.repairs[name.partition('"')[2].rstrip('"}')] += int(count)
        return outcome

    def drain(self) -> bool:
        """Read every waker that is ready; whether one asks for a reconciliation."""
        wakers = self.dataplane.wakers()
        ready, _, _ = select.select(list(wakers), [], [], 0)
        return any([wakers[descriptor]() for descriptor in ready])  # noqa: C419 - each must be drained

    def woken_within(self, seconds: float) -> bool:
        """Wait for a waker that asks for a reconciliation."""
        wakers = self.dataplane.wakers()
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select(list(wakers), [], [], left)
            if any([wakers[descriptor]() for descriptor in ready]):  # noqa: C419 - each must be drained
                return True
        return False

    def repair_until(self, done: Callable[[], bool], seconds: float) -> bool:
        """Reconcile whenever woken, until ``done`` or the time is over."""
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self.woken_within(min(left, 0.05)):
                self.reconcile(Trigger(woken=True), frozenset())
        return True


def state(namespace: Namespace, backend: str = "nft") -> str:
    """Everything that the dataplane may touch, by the tools: routes, policy rules, rules with counters, sets.

    Counters of chains are left out: neighbour discovery moves them.
    """
    commands = [
        "ip route show table all",
        "ip -6 route show table all",
        "ip -N rule",
        "ip -6 -N rule",
        f"iptables-{backend}-save -c",
        f"ip6tables-{backend}-save -c",
        "ipset list",
    ]
    text = namespace.run("; ".join(commands))
    lines = (line.split(" [")[0] if line.startswith(":") else line for line in text.splitlines())
    return "\n".join(sorted(line for line in lines if line and not line.startswith("#")))
