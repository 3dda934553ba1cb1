"""Random nodes, routes, flags, foreign hands, restarts and kills: the node ends in exactly the state that is wanted."""

from __future__ import annotations

import ipaddress
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from support.overlaynode import OWN_CIDRS, FakeNode, new_kernel
from support.stepped import Killed

from kube_router.workers.model import Family
from kube_router.workers.router.tunnels import is_ours, names_of
from kube_router.workers.tunnelfacts import FouPort, PodRule, Tunnel

NEAR = [("10.0.0.2", "fd00::2"), ("10.0.0.3", "fd00::3")]
FAR = [("21.3.0.4", "fd04::4"), ("2.13.0.4", "fd05::4"), ("10.4.0.6", "f:d041::")]
"""Of the first two, the IPv4 addresses come to one name."""
NODES = [*NEAR, *FAR]
PREFIXES = {4: ["10.91.0.0/16", "10.92.0.0/16", "10.93.0.0/16"], 6: ["fd91::/64", "fd92::/64"]}
HOPS = [address for pair in NODES for address in pair]
FOREIGN = {
    "theirs": Tunnel("10.0.0.1", "10.4.0.9"),
    "tun-theirs": Tunnel("fd00::1", "fd09::9"),
    names_of("10.0.0.77")[0]: Tunnel("10.0.0.1", "10.0.0.78"),
}
FOREIGN_PORTS = {FouPort(Family.IPV4, 4444), FouPort(Family.IPV6, 6000)}

flags = st.fixed_dictionaries(
    {
        "enable_overlay": st.sampled_from([True, True, True, False]),
        "overlay_type": st.sampled_from(["subnet", "full"]),
        "overlay_encap": st.sampled_from(["ipip", "fou"]),
        "overlay_encap_port": st.sampled_from([5555, 6000]),
        "overlay_encap_accept_ports": st.sampled_from([(), (5555,), (6000, 7000)]),
    }
)
nodes = st.tuples(st.just("nodes"), st.sets(st.integers(0, len(NODES) - 1)))
learn = st.one_of(
    *(
        st.tuples(
            st.just("learn"),
            st.sampled_from(PREFIXES[version]),
            st.none() | st.sampled_from([hop for hop in HOPS if ipaddress.ip_address(hop).version == version]),
        )
        for version in PREFIXES
    )
)
start = st.tuples(st.just("start"), flags)
foreign = st.tuples(
    st.just("foreign"),
    st.sampled_from(["remove", "down", "remote", "ttl", "port", "bind", "old", "rules", "ports", "hosts", "routes"]),
    st.integers(0, 99),
)
kill = st.tuples(st.just("kill"), st.integers(0, 12))
events = st.lists(st.one_of(nodes, learn, learn, learn, start, foreign, kill), max_size=12)


@dataclass
class World:
    """A node, and what somebody else has on it."""

    n1: FakeNode
    left: int = -1
    altered: set[str] = field(default_factory=set)
    """Devices whose remote address was altered: what nobody needs of these, no restarted worker knows for ours."""

    def step(self) -> None:
        """Before each step: what is there makes sense, and here the process may end."""
        self.check_routes()
        if self.left == 0:
            raise Killed
        self.left -= 1

    def check_routes(self) -> None:
        """No route leads through a device that is not there."""
        for entry in (*self.n1.ours().values(), *self.n1.ours(77).values()):
            assert not entry.device or entry.device in self.n1.devices

    def happen(self, event: tuple[object, ...]) -> None:
        """One event; the worker hears of it later."""
        match event:
            case ("nodes", set() as numbers):
                self.n1.others = {f"m{number}": NODES[number] for number in sorted(numbers)}
            case ("learn", str() as prefix, None):
                self.n1.learned.pop(prefix, None)
            case ("learn", str() as prefix, str() as hop):
                self.n1.learned[prefix] = hop
            case ("start", dict() as changed):
                self.n1.start(**changed)
            case ("foreign", str() as what, int() as number):
                self.meddle(what, number)
            case ("kill", int() as steps):
                self.left = steps
                try:
                    self.n1.reconcile(observe=True)
                except Killed:
                    self.n1.start()
                self.left = -1

    def meddle(self, what: str, number: int) -> None:
        """A foreign hand does something to what is ours."""
        overlay, mine = self.n1.overlay, sorted(name for name in self.n1.devices if name not in FOREIGN)
        if what == "rules":
            overlay.rules[:] = [rule for rule in overlay.rules if rule.protocol != 17]
        elif what == "ports":
            overlay.ports.intersection_update(FOREIGN_PORTS)
        elif what in ("hosts", "routes"):
            table = overlay.kernel.overlay_table if what == "hosts" else overlay.kernel.table
            table[:] = [entry for entry in table if entry.protocol != 17]
        elif mine:
            name = mine[number % len(mine)]
            self.alter(name, overlay.tunnels[name], what, number)

    def alter(self, name: str, tunnel: Tunnel, what: str, number: int) -> None:
        """As `meddle`, to one device."""
        overlay = self.n1.overlay
        if what == "remove":
            overlay.remove(name)
        elif what == "old" and ":" not in tunnel.remote:
            overlay.remove(name)
            overlay.put("tun-" + tunnel.remote.replace(".", ""), tunnel._replace(link=number % 2 * 2))
        elif what == "remote":
            self.altered.add(name)
            overlay.put(name, tunnel._replace(remote="fd0e::e" if ":" in tunnel.remote else "10.14.0.14"))
        else:
            changed = {"down": {"up": False}, "ttl": {"ttl": 9}, "port": {"port": -1}, "bind": {"link": 2}}
            overlay.put(name, tunnel._replace(**changed.get(what, {})))  # type: ignore[arg-type]


def wanted_ways(n1: FakeNode) -> Mapping[str, tuple[str, str]]:
    """Prefix to how and where its route leads, decided in the simplest words."""
    known = {address for pair in n1.others.values() for address in pair}
    near = {address for pair in NEAR for address in pair}
    ways = {}
    for prefix, hop in n1.learned.items():
        overlay = n1.settings.enable_overlay and hop in known
        if overlay and (n1.settings.overlay_type == "full" or hop not in near):
            ways[prefix] = ("tunnel", hop)
        elif hop in near:
            ways[prefix] = ("via", hop)
    return ways


def check_end(n1: FakeNode, altered: set[str]) -> None:
    """Exactly what is wanted, and everything foreign as it was. ``altered``: devices that may be left over."""
    ways = wanted_ways(n1)
    found = {
        prefix: ("tunnel", n1.devices[entry.device].remote) if entry.device else ("via", entry.gateway)
        for prefix, entry in n1.ours().items()
    }
    assert found == ways
    remotes = sorted({hop for how, hop in ways.values() if how == "tunnel"})
    left = {name for name in altered & n1.devices.keys() if not is_ours(name, n1.devices[name])}
    devices = {name: tunnel for name, tunnel in n1.devices.items() if name not in FOREIGN.keys() | left}
    assert sorted(tunnel.remote for tunnel in devices.values()) == remotes
    port = n1.settings.overlay_encap_port if n1.settings.overlay_encap == "fou" else 0
    for name, tunnel in devices.items():
        assert name in names_of(tunnel.remote)
        v6 = ":" in tunnel.remote
        mtu = (1460 if v6 else 1480) - (12 if port else 0)
        local = "fd00::1" if v6 else "10.0.0.1"
        assert tunnel == Tunnel(local, tunnel.remote, port, 225 if port else 0, bool(port) and not v6, mtu)
    hosts = {prefix.split("/")[0]: n1.devices[entry.device].remote for prefix, entry in n1.ours(77).items()}
    assert hosts == {remote: remote for remote in remotes}
    on = n1.settings.enable_overlay
    assert sorted(rule.source for rule in n1.overlay.rules if rule.protocol == 17) == (list(OWN_CIDRS) if on else [])
    numbers = {n1.settings.overlay_encap_port, *n1.settings.overlay_encap_accept_ports} if on else set()
    assert n1.overlay.ports == FOREIGN_PORTS | {FouPort(family, number) for family in Family for number in numbers}
    assert {name: n1.devices[name] for name in FOREIGN} == FOREIGN
    assert [rule.source for rule in n1.overlay.rules if rule.protocol == 0] == ["10.77.0.0/16"]


@settings(max_examples=200)
@given(events)
def test_every_history_ends_in_the_wanted_state(history: list[tuple[object, ...]]) -> None:
    with tempfile.TemporaryDirectory() as state_dir:
        n1 = FakeNode(new_kernel(), state_dir)
        for name, tunnel in FOREIGN.items():
            n1.overlay.put(name, tunnel)
        n1.overlay.ports |= FOREIGN_PORTS
        n1.overlay.add_rule(PodRule("10.77.0.0/16", 0))
        world = World(n1)
        n1.before = world.step
        for number, event in enumerate(history):
            world.happen(event)
            world.check_routes()
            if number % 2:
                n1.reconcile()
        assert n1.settle() == []
        check_end(n1, world.altered)
        writes = n1.writes
        n1.start()
        assert n1.reconcile().writes == 0
        assert n1.writes == 0, writes
