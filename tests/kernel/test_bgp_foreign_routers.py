"""What routers of other makes really hold of us, and what we take from them: FRR, BIRD, ExaBGP and a GoBGP of its own.

Node ``three`` runs gobgpd 3.x and node ``four`` gobgpd 4.x; every peer has a session with both, FRR, ExaBGP and GoBGP
over IPv4 and BIRD over IPv6, each with both families. The nodes' addresses (10.1.0.x) are not those of the sessions
(10.0.0.x), so that it shows whose address a next hop is. The lab is one for all tests; each brings it to the state that
it is about and waits for that, and after each it is seen to that no peer was ever sent anything else than own routes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.bgp import node
from support.foreignbgp import Bird, ExaBgp, Foreign, Frr, Held, Place, is_v6
from support.gobgpd import PORT, Daemon, Outsider, Speaker, daemons, segment, wait_for
from support.namespaces import Namespace, namespaces

from kube_router.ipc.messages import Node
from kube_router.workers.model import Family
from kube_router.workers.router.attributes import MOST_COMMUNITIES, MOST_LARGE_COMMUNITIES
from kube_router.workers.router.bgpstate import OPEN, BgpState, Neighbor
from kube_router.workers.router.bgpstate import Speaker as BgpSpeaker
from kube_router.workers.router.vips import NO_VIPS, Vips
from kube_router.workers.settings import Settings

SECONDS = 40.0
GENERATIONS = {"three": 3, "four": 4, "five": 4}
NUMBERS = {"three": 3, "four": 4, "five": 5}
V4_ENDS = {name: f"10.0.0.{NUMBERS[name]}" for name in ("three", "four")}
V6_ENDS = {name: f"2001:db8::{NUMBERS[name]}" for name in ("three", "four")}
POD_CIDRS = {name: (f"10.244.{number}.0/24", f"fd00:{number}::/64") for name, number in NUMBERS.items()}
HOPS = {name: (f"10.1.0.{number}", f"2001:db8:1::{number}") for name, number in NUMBERS.items()}
EXABGP, FRR, BIRD, GOBGP = "10.0.0.11", "10.0.0.12", "2001:db8::13", "10.0.0.14"
PEERS = {EXABGP: 65011, FRR: 65012, BIRD: 65013, GOBGP: 65014}
VIP4, VIP6, OTHER_VIP = "203.0.113.7", "2001:db8:99::7", "203.0.113.8"

GOOD = {"198.51.100.0/24": EXABGP, "2001:db8:5::/48": "2001:db8::11"}
LISTED = {
    "192.0.2.0/24": EXABGP,
    "192.0.2.128/25": EXABGP,
    "2001:db8:9::/48": "2001:db8::11",
    "2001:db8:9:1::/64": "2001:db8::11",
}
ELSEWHERE = {"10.244.77.0/24": EXABGP, "10.2.0.0/24": EXABGP, "fd00:77::/64": "2001:db8::11"}
"""Another node's pod CIDRs and a subnet of other nodes."""
COVERING = {
    "10.244.0.0/16": EXABGP,
    "10.0.0.0/8": EXABGP,
    "fd00::/16": "2001:db8::11",
    "2001:db8:1::/48": "2001:db8::11",
}
OWN = {
    "three": {"10.244.3.128/25": EXABGP, "10.1.0.3/32": EXABGP, "fd00:3::/80": "2001:db8::11"},
    "four": {"10.244.4.128/25": EXABGP, "10.1.0.4/32": EXABGP, "fd00:4::/80": "2001:db8::11"},
}
"""Parts of a node's pod CIDRs, and its address: no business of the other node's."""
NEVER = {"0.0.0.0/0": EXABGP, "::/0": "2001:db8::11", "10.96.0.10/32": EXABGP, "10.100.0.0/16": EXABGP}
POD_ROUTES = {cidr: "2001:db8::11" if is_v6(cidr) else EXABGP for name in OWN for cidr in POD_CIDRS[name]}
FOREIGN_VIP = {f"{OTHER_VIP}/32": EXABGP}


class Lab:
    """Two nodes (and a third for reflection), four peers."""

    def __init__(self, places: Mapping[str, Namespace], folder: Path, stack: ExitStack) -> None:
        self.places, self.folder, self._stack = places, folder, stack
        self.speakers = {name: self._speaker(name) for name in GENERATIONS}
        self.reconfigure()
        announced = {
            **GOOD,
            **LISTED,
            **ELSEWHERE,
            **COVERING,
            **NEVER,
            **FOREIGN_VIP,
            **POD_ROUTES,
            **OWN["three"],
            **OWN["four"],
        }
        self.exabgp = ExaBgp(self._place("exabgp", EXABGP, V4_ENDS, announced))
        stack.callback(self.exabgp.close)
        self.frr = Frr(self._place("frr", FRR, V4_ENDS, dict.fromkeys(("198.51.101.0/24", "2001:db8:6::/48"), "")))
        stack.callback(self.frr.close)
        bird = dict.fromkeys(("198.51.102.0/24", "2001:db8:7::/48", "0.0.0.0/0", "::/0"), "")
        self.bird = Bird(self._place("bird", BIRD, V6_ENDS, bird))
        stack.callback(self.bird.close)
        self.gobgp = Outsider(self._daemon("gobgp", 4), _gobgp_state())
        stack.callback(self.gobgp.close)

    def _place(self, name: str, address: str, nodes: Mapping[str, str], announced: Mapping[str, str]) -> Place:
        return Place(self.places[name], self.folder / name, address, PEERS[address], nodes, announced)

    def _daemon(self, name: str, generation: int) -> Daemon:
        return self._stack.enter_context(daemons((self.places[name], generation, self.folder / f"{name}-d")))[0]

    def _speaker(self, name: str) -> Speaker:
        daemon = self._daemon(name, GENERATIONS[name])
        speaker = Speaker(daemon, name, Settings(run_dir=str(daemon.run_dir), node_name=name))
        self._stack.callback(speaker.close)
        return speaker

    def reconfigure(
        self,
        annotations: Mapping[str, str] | None = None,
        vips: Vips = NO_VIPS,
        *,
        roles: Mapping[str, Mapping[str, str]] | None = None,
        **flags: Any,
    ) -> None:
        """The two nodes get these annotations, Service addresses and flags; ``roles``: by node, also for the third."""
        cluster = [_node(name, annotations or {}, (roles or {}).get(name, {})) for name in (roles or V4_ENDS)]
        for name in roles or V4_ENDS:
            speaker = self.speakers[name]
            values = {"enable_ipv6": True, "bgp_port": PORT, "node_name": name, "run_dir": str(speaker.daemon.run_dir)}
            settings = Settings(**values, **flags)  # type: ignore[arg-type]
            if settings != speaker.settings:
                speaker.settings = settings
                speaker.restart()
            speaker.vips = vips
            outcome = speaker.see(*cluster)
            assert outcome.failures == (), outcome
        self.active = [self.speakers[name] for name in roles or V4_ENDS]

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Turn everything until ``condition`` holds."""
        wait_for(condition, SECONDS, what, *self.active, self.gobgp)

    def until_held(
        self, expected: Callable[[str, bool], Mapping[str, Held]], what: str, *, unread: Collection[str] = ()
    ) -> None:
        """Until every peer holds of each node what is ``expected`` (node, whether the session is IPv6).

        ``unread``: peers that are left out.
        """
        readers: dict[str, Foreign] = {EXABGP: self.exabgp, FRR: self.frr, BIRD: self.bird}
        readers = {address: reader for address, reader in readers.items() if address not in unread}
        seen: dict[object, object] = {}

        def done() -> bool:
            for address, reader in readers.items():
                for name in V4_ENDS:
                    held, wanted = reader.held(name), dict(expected(name, is_v6(address)))
                    if held != wanted:
                        seen.update({"peer": address, "node": name, "held": held, "wanted": wanted})
                        return False
            hops: dict[str, set[str]] = {}
            for name in V4_ENDS:
                for prefix, held_there in expected(name, False).items():
                    hops.setdefault(prefix, set()).add(held_there.next_hop)
            routes = self.gobgp.routes()
            seen.update({"peer": GOBGP, "held": routes, "wanted": hops})
            return routes.keys() == hops.keys() and all(hop in hops[prefix] for prefix, hop in routes.items())

        try:
            self.until(done, what)
        except AssertionError as error:
            raise AssertionError(f"{what}: {seen}") from error

    def learned(self, name: str) -> set[str]:
        """What a node has taken from anybody outside."""
        routes = self.speakers[name].bgp.learned
        return set(routes) - {cidr for cidrs in POD_CIDRS.values() for cidr in cidrs}


def _gobgp_state() -> BgpState:
    families = (Family.IPV4, Family.IPV6)
    neighbors = {end: Neighbor(end, 64512, GOBGP, PORT, families) for end in V4_ENDS.values()}
    speaker = BgpSpeaker(PEERS[GOBGP], GOBGP, PORT, frozenset({GOBGP}))
    return BgpState(speaker=speaker, export=OPEN, import_=OPEN, neighbors=neighbors)


def _node(name: str, annotations: Mapping[str, str], role: Mapping[str, str]) -> Node:
    end4, end6 = f"10.0.0.{NUMBERS[name]}", f"2001:db8::{NUMBERS[name]}"
    entries = [
        f"- {{remoteip: '{address}', remoteasn: {asn}, port: {PORT}, localip: '{end6 if is_v6(address) else end4}'}}"
        for address, asn in PEERS.items()
    ]
    peers = {"peers": "\n".join(entries)} if name in V4_ENDS else {}
    listen = {"bgp-local-addresses": ", ".join((*HOPS[name], end4, end6))}
    return node(name, HOPS[name], POD_CIDRS[name], {**peers, **listen, **annotations, **role})


def own(name: str, *vips: str, **attributes: Any) -> dict[str, Held]:
    """The routes of a node with its own addresses as next hops."""
    prefixes = (*POD_CIDRS[name], *(f"{vip}/{128 if is_v6(vip) else 32}" for vip in vips))
    return {prefix: Held(HOPS[name][is_v6(prefix)], **attributes) for prefix in prefixes}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    names = ("three", "four", "five", "exabgp", "frr", "bird", "gobgp")
    hosts = {**NUMBERS, "exabgp": 11, "frr": 12, "bird": 13, "gobgp": 14}
    with namespaces(8) as (hub, *others), ExitStack() as stack:
        places = dict(zip(names, others, strict=True))
        ends = {name: (f"10.0.0.{number}/24", f"2001:db8::{number}/64") for name, number in hosts.items()}
        hops = {name: (f"10.1.0.{number}/24", f"2001:db8:1::{number}/64") for name, number in hosts.items()}
        segment(hub, *((place, (*ends[name], *hops[name])) for name, place in places.items()))
        yield Lab(places, tmp_path_factory.mktemp("foreign"), stack)


@pytest.fixture
def lab(running: Lab) -> Iterator[Lab]:
    yield running
    for name in V4_ENDS:
        may = {*POD_CIDRS[name], f"{VIP4}/32", f"{VIP6}/128"}
        may |= {cidr for other in NUMBERS for cidr in POD_CIDRS[other] if not is_v6(cidr)}  # of a reflector
        assert running.exabgp.ever(name) <= may, "something was sent that must never be"
    assert running.gobgp.ever <= {cidr for cidrs in POD_CIDRS.values() for cidr in cidrs} | {
        f"{VIP4}/32",
        f"{VIP6}/128",
    }


ACCEPTED = {"198.51.101.0/24", "2001:db8:6::/48", "198.51.102.0/24", "2001:db8:7::/48", *GOOD, *ELSEWHERE}


def expect_learned(lab: Lab, *extra: str, without: Collection[str] = ()) -> None:
    wanted = {
        name: {*ACCEPTED, *LISTED, *FOREIGN_VIP, *OWN[other], *extra} - {*without}
        for name, other in (("three", "four"), ("four", "three"))
    }
    lab.until(lambda: all(lab.learned(name) == wanted[name] for name in V4_ENDS), f"learned {wanted}")


def test_peers_hold_own_pod_routes_and_nobody_teaches_us_what_is_ours(lab: Lab) -> None:
    lab.reconfigure()
    lab.until_held(lambda name, _: own(name), "own pod routes, both families over each session")
    expect_learned(lab)
    for name, other in (("three", "four"), ("four", "three")):
        held = lab.speakers[name].bgp.learned
        assert {cidr: held[cidr] for cidr in POD_CIDRS[other]} == dict(zip(POD_CIDRS[other], HOPS[other], strict=True))


def test_covering_prefixes_are_taken_when_that_is_asked_for_and_given_back(lab: Lab) -> None:
    lab.reconfigure(bgp_accept_covering_prefixes=True)
    expect_learned(lab, *COVERING)
    lab.reconfigure()
    expect_learned(lab)


def test_the_operators_list_refuses_both_families_and_longer_prefixes_at_once(lab: Lab) -> None:
    lab.reconfigure({"node.bgp.customimportreject": " 192.0.2.0/24 , 192.0.2.128/26, 2001:db8:9::/48,nonsense"})
    for speaker in lab.active:
        (warning,) = speaker.outcome.warnings
        assert f"node {speaker.name}" in warning and "'nonsense'" in warning and "customimportreject" in warning
    expect_learned(lab, without=LISTED)
    lab.reconfigure()
    expect_learned(lab)


def test_pod_routes_are_withdrawn_and_come_back_while_sessions_stay(lab: Lab) -> None:
    lab.reconfigure()
    lab.until_held(lambda name, _: own(name), "own pod routes")
    ups = [sum(message["type"] == "state" for message in lab.exabgp.messages(name)) for name in V4_ENDS]
    lab.reconfigure(advertise_pod_cidr=False)
    lab.until_held(lambda *_: {}, "nothing")
    assert lab.gobgp.routes() == {}
    lab.reconfigure()
    lab.until_held(lambda name, _: own(name), "own pod routes again")
    assert ups == [sum(message["type"] == "state" for message in lab.exabgp.messages(name)) for name in V4_ENDS]


def test_communities_and_prepending_reach_peers_also_when_they_change(lab: Lab) -> None:
    communities = {
        "node.bgp.communities": "no-export, 65000:7,65000:7,4259840001",
        "node.bgp.large-communities": "64512:1:2",
    }
    prepend = {"path-prepend.as": "65100", "path-prepend.repeat-n": "2"}
    wanted = frozenset({"65535:65281", "65000:7", "65000:1"})
    lab.reconfigure({**communities, **prepend})
    path = (65100, 65100, 64512)
    expected = {"communities": wanted, "large": frozenset({"64512:1:2"}), "as_path": path}
    lab.until_held(lambda name, _: own(name, **expected), "attributes")
    for item in lab.speakers["three"], lab.speakers["four"]:
        written = item.writes
        item.reconcile(compare=True, observe=True)
        assert item.writes == written, "what gobgpd reads back is what was asked for"
    lab.reconfigure({"node.bgp.communities": "65000:8", "path-prepend.as": "x", "path-prepend.repeat-n": "2"})
    lab.until_held(
        lambda name, _: own(name, communities=frozenset({"65000:8"}), as_path=path),
        "other communities; a bad prepend leaves the last good one",
    )
    lab.reconfigure()
    lab.until_held(lambda name, _: own(name), "none")


def test_the_longest_lists_still_fit_into_a_message(lab: Lab) -> None:
    communities = [f"65000:{number}" for number in range(MOST_COMMUNITIES + 20)]
    large = [f"4294967295:4294967295:{number}" for number in range(MOST_LARGE_COMMUNITIES)]
    annotations = {"node.bgp.communities": ",".join(communities), "node.bgp.large-communities": ",".join(large)}
    lab.reconfigure({**annotations, "path-prepend.as": "4200000001", "path-prepend.repeat-n": "254"})
    expected = {
        "communities": frozenset(communities[:MOST_COMMUNITIES]),
        "large": frozenset(large),
        "as_path": (*(4200000001,) * 254, 64512),
    }
    # BIRD shows long lists in part only; that its session is up says that it can read them.
    lab.until_held(lambda name, _: own(name, **expected), "all that fits", unread={BIRD})
    assert all(lab.bird.established(name) for name in V4_ENDS)
    assert all("fit into one message" in line for speaker in lab.active for line in speaker.outcome.warnings)
    lab.reconfigure()
    lab.until_held(lambda name, _: own(name), "none")


def test_the_sessions_address_becomes_the_next_hop_of_its_own_family_only(lab: Lab) -> None:
    def expected(name: str, v6_session: bool) -> dict[str, Held]:
        ends = (HOPS[name][0], V6_ENDS[name]) if v6_session else (V4_ENDS[name], HOPS[name][1])
        return {prefix: replace(held, next_hop=ends[is_v6(prefix)]) for prefix, held in own(name).items()}

    lab.reconfigure(override_nexthop=True)
    lab.until_held(expected, "next hops")
    lab.reconfigure()
    lab.until_held(lambda name, _: own(name), "the nodes' addresses again")


def test_service_addresses_come_go_and_are_taken_from_nobody(lab: Lab) -> None:
    lab.reconfigure()
    expect_learned(lab)
    both = frozenset({VIP4, VIP6})
    lab.reconfigure(vips=Vips(both, both | {OTHER_VIP}))
    lab.until_held(lambda name, _: own(name, VIP4, VIP6), "Service addresses")
    expect_learned(lab, without=FOREIGN_VIP)
    for name in V4_ENDS:
        assert not {f"{VIP4}/32", f"{VIP6}/128"} & lab.speakers[name].bgp.learned.keys(), "nodes get none"
    lab.reconfigure(vips=Vips(frozenset({VIP6}), both))
    lab.until_held(lambda name, _: own(name, VIP6), "one of them goes")
    expect_learned(lab)
    lab.reconfigure(vips=Vips(both, both), advertise_pod_cidr=False)
    only = {f"{VIP4}/32", f"{VIP6}/128"}
    lab.until_held(
        lambda name, _: {prefix: held for prefix, held in own(name, VIP4, VIP6).items() if prefix in only},
        "Service addresses without pod routes",
    )
    lab.reconfigure()
    lab.until_held(lambda name, _: own(name), "pod routes only")


def test_after_a_kill_of_gobgpd_peers_get_the_same_and_never_more(lab: Lab) -> None:
    """Peers dial every second: they are there as soon as gobgpd listens, and pod CIDRs are not theirs to have."""
    vips = Vips(frozenset({VIP4}), frozenset({VIP4, OTHER_VIP}))
    lab.reconfigure({"node.bgp.communities": "65000:7"}, vips, advertise_pod_cidr=False)

    def expected(name: str, _: bool) -> dict[str, Held]:
        return {f"{VIP4}/32": own(name, VIP4, communities=frozenset({"65000:7"}))[f"{VIP4}/32"]}

    lab.until_held(expected, "before")
    before = {name: len(lab.exabgp.messages(name)) for name in V4_ENDS}
    starts = [speaker.daemon.starts for speaker in lab.active]
    for speaker in lab.active:
        speaker.daemon.kill()
    lab.until(lambda: all(item.daemon.starts > old for item, old in zip(lab.active, starts, strict=True)), "fresh")
    lab.until_held(expected, "after")
    expect_learned(lab, without=FOREIGN_VIP)
    for name, count in before.items():
        assert lab.exabgp.ever(name, since=count) == {f"{VIP4}/32"}, "nothing else, from the first moment on"
    lab.reconfigure()


@pytest.mark.parametrize("reflector", ["three", "four"])
def test_a_reflector_passes_on_nodes_routes_and_nothing_else(lab: Lab, reflector: str) -> None:
    other = "four" if reflector == "three" else "three"
    roles = {name: {"rr.client": "1"} for name in (other, "five")} | {reflector: {"rr.server": "1"}}
    vips = Vips(frozenset({VIP4}), frozenset({VIP4, OTHER_VIP}))
    lab.reconfigure(vips=vips, roles=roles)
    five = lab.speakers["five"].bgp
    lab.until(
        lambda: {*POD_CIDRS[other], *POD_CIDRS[reflector]} <= five.learned.keys(), "the client has all pod routes"
    )
    lab.until(lambda: {*GOOD} <= five.learned.keys(), "and what the reflector learned outside")
    assert not {*NEVER, *COVERING, *FOREIGN_VIP, f"{VIP4}/32", *OWN[reflector]} & five.learned.keys()
    passed = {POD_CIDRS["five"][0], POD_CIDRS[other][0]}
    lab.until(lambda: passed <= lab.exabgp.held(reflector).keys(), "peers outside have the nodes' pod routes")
    held = lab.exabgp.held(reflector)
    assert held.keys() == {*own(reflector, VIP4), *passed}
    assert {held[prefix].next_hop for prefix in passed} == {V4_ENDS[reflector]}

    # Tightened: what was learned is taken back as well, in both generations.
    lab.reconfigure(vips=vips, roles=roles, advertise_pod_cidr=False)
    lab.until(lambda: lab.exabgp.held(reflector).keys() == {f"{VIP4}/32"}, "all pod routes are taken back")
    lab.until(lambda: lab.frr.held(reflector).keys() == {f"{VIP4}/32"}, "from FRR too")
    lab.until(lambda: {*POD_CIDRS[other], *GOOD} <= five.learned.keys(), "the client still has them")
