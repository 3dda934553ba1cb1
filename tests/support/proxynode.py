"""A node with the nftables backend of the proxy for tests: objects in, tables in the kernel out, turned by hand.

Touches the kernel; use it inside a network namespace. The readers call the ``nft`` program, never the code under test.
"""

from __future__ import annotations

import re
import select

import msgspec
from support.namespaces import Namespace
from support.proxyworld import SETTINGS, Objects, node

from kube_router.ipc.messages import Projection
from kube_router.workers.model import Family
from kube_router.workers.proxy.backend import Synced
from kube_router.workers.proxy.engine import Engine
from kube_router.workers.proxy.frame import FrameMaker
from kube_router.workers.proxy.model import Changed, ProxyFrame
from kube_router.workers.proxy.names import NFT_TABLES
from kube_router.workers.proxy.nftables import Nftables

KIND = {Family.IPV4: "ip", Family.IPV6: "ip6"}


class ProxyNode:
    """The backend with the engine that feeds it."""

    def __init__(self, namespace: Namespace, *objects: Projection, **flags: object) -> None:
        self.namespace = namespace
        self.objects = Objects().put(node(), *objects)
        self.settings = msgspec.structs.replace(SETTINGS, **flags)
        self.engine, self.frames = Engine(self.settings), FrameMaker(self.settings)
        self.backend = Nftables()

    @property
    def frame(self) -> ProxyFrame:
        return self.frames.make().frame

    def follow(self, *, in_sync: bool = True) -> Changed:
        """Bring engine and frame to the objects."""
        cluster, changes = self.objects.cluster(in_sync=in_sync), self.objects.changes()
        self.engine.update(cluster, changes)
        self.frames.update(cluster.nodes, changes.get("nodes"))
        return self.engine.take_changed()

    def sync(self, *objects: Projection, observe: bool = False, hold: bool = False) -> Synced:
        """A sync after these objects have come or changed."""
        self.objects.put(*objects)
        changed = self.follow()
        return self.backend.sync(self.engine.table, changed, self.frame, observe=observe, hold=hold)

    def drop(self, *keys: tuple[str, str]) -> Synced:
        """A sync after objects have gone."""
        for kind, key in keys:
            self.objects.remove(kind, key)
        return self.sync()

    def start(self, *, hold: bool = False) -> Synced:
        """The first sync of a process."""
        return self.sync(observe=True, hold=hold)

    def look(self) -> Synced:
        """A sync that observes, of an unchanged cluster."""
        return self.backend.sync(self.engine.table, Changed(), self.frame, observe=True, hold=False)

    def restart(self, *, hold: bool = False) -> Synced:
        """A new process without memory."""
        self.backend.close()
        self.backend = Nftables()
        everything = Changed(everything=True)
        return self.backend.sync(self.engine.table, everything, self.frame, observe=True, hold=hold)

    def nft(self, command: str) -> str:
        """What the program says."""
        return self.namespace.run(f"nft '{command}'")

    def table(self, family: Family) -> str:
        """The text of a table, without what rules have remembered."""
        text = self.namespace.run(f"nft -s list table {KIND[family]} {NFT_TABLES[family]}")
        return re.sub(r"(map affinity \{[^}]*?)elements = \{[^}]*\}", r"\1", text)

    def remembered(self, family: Family) -> bool:
        """Whether any client has affinity now."""
        text = self.namespace.run(f"nft list map {KIND[family]} {NFT_TABLES[family]} affinity")
        return "elements" in text

    def tables(self) -> list[str]:
        """Both tables, without the order that sets, chains and elements have by accident."""
        text = "".join(map(self.table, Family))
        text = re.sub(r"elements = \{(.*?)\}", _sorted_elements, text, flags=re.DOTALL)
        return sorted(re.split(r"\n\n|(?<=\{)\n(?=\t(?:set|map|chain) )|\n(?=\})", text))

    def elements(self, family: Family, name: str) -> set[str]:
        """The elements of a set, as the program lists them."""
        block = re.search(rf"\t(?:set|map) {name} \{{\n.*?\n\t\}}", self.table(family), re.DOTALL)
        assert block is not None, f"no set {name}"
        found = re.search(r"elements = \{(.*?)\}", block[0], re.DOTALL)
        return {" ".join(item.split()) for item in found[1].split(",")} if found else set()

    def woken(self) -> bool:
        """Whether a waker asks for a sync."""
        wakers = self.backend.wakers()
        ready, _, _ = select.select(list(wakers), [], [], 0)
        return any([wakers[descriptor]() for descriptor in ready])  # noqa: C419 - each must be drained


def _sorted_elements(found: re.Match[str]) -> str:
    return f"elements: {sorted(' '.join(item.split()) for item in found[1].split(','))}"
