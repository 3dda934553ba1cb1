"""Nodes a, b, c and a place for an outsider on one segment, each with a gobgpd of its own, driven by hand.

Touches the kernel and starts processes, all of which end with the lab.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from support.bgp import node
from support.gobgpd import PORT, Daemon, Outsider, Speaker, attached, daemons, segment
from support.namespaces import Namespace, namespaces

from kube_router.ipc.messages import Node
from kube_router.workers.model import Family
from kube_router.workers.router.bgpstate import OPEN, BgpState, Neighbor
from kube_router.workers.router.bgpstate import Speaker as BgpSpeaker
from kube_router.workers.router.gobgp import convert
from kube_router.workers.settings import Secrets, Settings

UP_SECONDS = 25.0
DUAL = (Family.IPV4, Family.IPV6)
A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"])
B = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"])
C = node("c", ["10.0.0.3", "2001:db8::3"], ["10.244.3.0/24", "fd00:3::/64"])
FROM = {
    item.name: {item.pod_cidrs[0]: item.addresses[0].address, item.pod_cidrs[1]: item.addresses[1].address}
    for item in (A, B, C)
}
OUTSIDE = "10.0.0.9"
OUTSIDE_ASN = 65000


def annotated(item: Node, annotations: dict[str, str]) -> Node:
    return node(item.name, [entry.address for entry in item.addresses], item.pod_cidrs, annotations)


def outsider_state(*, asn: int = OUTSIDE_ASN, password: str = "", paths: dict[str, str] | None = None) -> BgpState:
    return BgpState(
        speaker=BgpSpeaker(asn, OUTSIDE, PORT, frozenset({OUTSIDE, "2001:db8::9"})),
        export=OPEN,
        import_=OPEN,
        neighbors={"10.0.0.1": Neighbor("10.0.0.1", 64512, OUTSIDE, PORT, DUAL, password=password)},
        paths=paths or {},
    )


@dataclass
class Lab:
    """Nodes a, b, c and a place for an outsider on one segment, with a generation of gobgpd."""

    places: dict[str, Namespace]
    generation: int
    folder: Path
    stack: ExitStack

    def daemon(self, name: str, generation: int | None = None) -> Daemon:
        place = (self.places[name], generation or self.generation, self.folder / name)
        return self.stack.enter_context(daemons(place))[0]

    def speaker(
        self, name: str, generation: int | None = None, secrets: Secrets | None = None, **flags: object
    ) -> Speaker:
        daemon = self.daemon(name, generation)
        folders = {"run_dir": str(daemon.run_dir), "state_dir": str(daemon.run_dir)}
        values = {**folders, "enable_ipv6": True, "bgp_port": PORT, "node_name": name, **flags}
        speaker = Speaker(daemon, name, Settings(**values), secrets)  # type: ignore[arg-type]
        self.stack.callback(speaker.close)
        return speaker

    def outsider(self, state: BgpState) -> Outsider:
        outsider = Outsider(self.daemon("outside"), state)
        self.stack.callback(outsider.close)
        return outsider


@contextlib.contextmanager
def open_lab(generation: int, folder: Path) -> Iterator[Lab]:
    """A lab of one generation of gobgpd."""
    with namespaces(5) as (hub, a, b, c, outside), ExitStack() as stack:
        numbers = ((a, 1), (b, 2), (c, 3), (outside, 9))
        segment(hub, *((member, (f"10.0.0.{number}/24", f"2001:db8::{number}/64")) for member, number in numbers))
        yield Lab({"a": a, "b": b, "c": c, "outside": outside}, generation, folder, stack)


def learned(speaker: Speaker, *names: str) -> Callable[[], bool]:
    """Whether a node has exactly the routes of others, and would delete what is not among them."""
    wanted = {prefix: hop for name in names for prefix, hop in FROM[name].items()}
    return lambda: dict(speaker.bgp.learned) == wanted and speaker.settled


def settings_of(speaker: Speaker) -> dict[str, Any]:
    """The flags of a node by name."""
    return {name: getattr(speaker.settings, name) for name in speaker.settings.__struct_fields__}


@dataclass
class Witness:
    """Every event of a gobgpd's best paths, none of them folded into another, until the daemon or the lab ends."""

    daemon: Daemon
    withdrawn: list[str] = field(default_factory=list)
    announced: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._client = attached(self.daemon)
        self._stream = self._client.watch()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            for message in self._stream:
                for path in message.table.paths if message.WhichOneof("event") == "table" else ():
                    event = convert.route_event(self._client.dialect, path)
                    if event is not None and not event.local:
                        (self.withdrawn if event.next_hop is None else self.announced).append(event.prefix)

    def close(self) -> None:
        """Stop listening."""
        self._stream.cancel()
        self._thread.join(timeout=2)
        self._client.close()
