"""One node with a router controller, a real gobgpd and a real kernel in one namespace, and scripted peers beside it.

Touches the kernel and starts gobgpd; everything started here is ended here. The peers' addresses are local too, so that
one namespace is enough; what they announce leads to neighbours that nobody has (`HOP`), on the node's own subnet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from select import select
from typing import Any

from support import bgpspeaker
from support.bgp import node
from support.gobgpd import PORT, Daemon, daemons, wait_for
from support.namespaces import Namespace

from kube_router.ipc.messages import EndpointSlice, Kind, Node, Service, SourceState
from kube_router.ipc.replica import Changes, Cluster
from kube_router.workers.model import Outcome
from kube_router.workers.router.controller import RouterController
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Secrets, Settings

SELF = node("a", ["10.0.0.1", "fd00::1"], ["10.244.1.0/24", "fd00:1::/64"])
PEER, PEER_ASN = "10.0.0.9", 65000
HOP = {4: "10.0.0.7", 6: "fd00::7"}


class RouterNode:
    """Node a; ``peer`` is its external peer, which speaks when `join` is called."""

    def __init__(self, namespace: Namespace, daemon: Daemon, **flags: Any) -> None:
        self.namespace, self.daemon = namespace, daemon
        values = {"run_dir": str(daemon.run_dir), "state_dir": str(daemon.run_dir), "enable_ipv6": True}
        values |= {"bgp_port": PORT, "node_name": "a", "peer_router_ips": (PEER,), "peer_router_asns": (PEER_ASN,)}
        self.settings = Settings(**{**values, **flags})
        self.secrets = Secrets()
        self.nodes: Mapping[str, Node] = {"a": SELF}
        self.services: Mapping[str, Service] = {}
        self.slices: Mapping[str, EndpointSlice] = {}
        self.outcome = Outcome()
        self.writes = 0
        self.start()

    def start(self) -> None:
        """A new worker process."""
        with self.namespace.enter():
            self.controller = RouterController(self.settings, self.secrets)
        self._started, self.writes = False, 0

    def restart(self) -> None:
        """The worker process ends and a new one begins."""
        self.controller.close()
        self.start()

    def cluster(self, *, stale: bool = False) -> Cluster:
        """What the watcher would say."""
        objects: dict[Kind, Mapping[str, Any]] = {
            "nodes": self.nodes,
            "services": self.services,
            "endpointslices": self.slices,
        }
        return Cluster(SourceState(source="test", in_sync=not stale, stale=stale), objects)

    def reconcile(self, changes: Changes | None = None, *, retry: bool = False) -> Outcome:
        """One call of the controller."""
        trigger = Trigger(start=not self._started, retry=retry, changes=changes or {})
        with self.namespace.enter():
            self.outcome = self.controller.reconcile(self.cluster(), trigger)
        self._started = True
        self.writes += self.outcome.writes
        return self.outcome

    def turn(self) -> None:
        """One turn of the worker's loop."""
        with self.namespace.enter():
            wakers = self.controller.wakers()
            for descriptor in select(list(wakers), [], [], 0.05)[0]:
                wakers[descriptor]()
        self.reconcile(retry=True)

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
        """Turn until ``condition`` holds."""
        wait_for(condition, seconds, what, self)  # type: ignore[arg-type]

    def up(self) -> None:
        """Turn until BGP runs, and a young gobgpd is old enough for routes to go."""
        self.until(lambda: bool(self.outcome.sessions) and not self.outcome.failures, "BGP runs")

    def join(self, **more: Any) -> bgpspeaker.Speaker:
        """The peer's session, established."""
        with self.namespace.enter():
            return bgpspeaker.Speaker(PEER_ASN, "9.9.9.9", **more).connect("10.0.0.1", PORT, local=PEER, seconds=20)

    def routes(self) -> dict[str, str]:
        """Gateway by prefix of the routes of protocol 17, by ``ip``."""
        found = {}
        for family in ("-4", "-6"):
            for line in self.namespace.run(f"ip {family} route show table main proto 17").splitlines():
                words = line.split()
                found[words[0]] = words[words.index("via") + 1]
        return found

    def everything(self) -> str:
        """All that the kernel holds of what the router writes, read by other programs."""
        commands = ["ip -4 route show table all", "ip -6 route show table all", "ip rule", "ip -6 rule", "ip -d link"]
        commands += ["ipset save", "iptables-nft-save", "ip6tables-nft-save"]
        texts = [self.namespace.run(command) for command in commands]
        kept = [line for text in texts for line in text.splitlines() if not line.startswith(("#", ":"))]
        return "\n".join(kept)

    def __str__(self) -> str:
        return f"{self.outcome}\nlearned {len(self.controller._bgp.learned)}"


@contextlib.contextmanager
def router_node(namespace: Namespace, generation: int, run_dir: Path, **flags: Any) -> Iterator[RouterNode]:
    """A node in ``namespace``; its worker and gobgpd end with the block."""
    namespace.run("ip link add eth0 type veth peer name far")
    # Without link-local addresses: their routes would come in the middle of a test.
    namespace.run("ip link set eth0 up addrgenmode none; ip link set far up addrgenmode none")
    namespace.run("ip address add 10.0.0.1/24 dev eth0; ip address add fd00::1/64 dev eth0 nodad")
    namespace.run(f"ip address add {PEER}/32 dev lo")
    with daemons((namespace, generation, run_dir)) as (daemon,):
        lone = RouterNode(namespace, daemon, **flags)
        try:
            yield lone
        finally:
            lone.controller.close()
