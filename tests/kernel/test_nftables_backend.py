"""The nftables backend on a kernel: what it writes, what it does not, and that packets meet it."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from support.firewall_world import ALLOW, DATABASE, DENY, OTHER, WORLD
from support.namespaces import Namespace, veth
from support.nftnode import FRAME, KIND, Node, canonical, elements, fresh, set_of
from support.policyworld import BOTH, block, namespaces, pod, pods, policy, port, rule
from support.policyworld import select as labels

from kube_router.ipc.messages import NetworkPolicy, Pod, PolicyPeer
from kube_router.workers.firewall import names
from kube_router.workers.firewall.nftsync import BULK
from kube_router.workers.firewall.rules import (
    Changed,
    Direction,
    PodSet,
    PortSet,
)
from kube_router.workers.kernel.nft import Nft
from kube_router.workers.model import Family


@pytest.fixture
def node(netns: Namespace) -> Iterator[Node]:
    with netns.enter():
        made = Node(netns)
        yield made
        made.backend.close()


def test_a_second_sync_and_a_new_process_write_nothing(node: Node) -> None:
    first = node.start()
    assert (first.failures, first.repaired, first.warnings) == ((), (), ())
    assert first.writes > 50
    before = node.tables()
    monitor = node.namespace.start(["nft", "monitor"], stdout=subprocess.PIPE)
    time.sleep(0.3)
    assert node.backend.plan(node.ruleset, node.state.frame) == ()
    for synced in (node.look(), node.become(*WORLD), node.restart(), node.restart(), node.look()):
        assert (synced.writes, synced.failures, synced.repaired) == (0, (), ())
        assert synced.counts == first.counts
    node.nft("add table ip foreign")
    time.sleep(0.1)
    monitor.terminate()
    told, _ = monitor.communicate()
    assert [line for line in told.splitlines() if not line.startswith("#")] == ["add table ip foreign"]
    assert node.tables() == before


def test_both_families_hold_the_same_members(node: Node) -> None:
    node.start()
    assert elements(node, Family.IPV4, names.LOCAL_PODS) == {"10.0.0.1", "10.0.0.2", "10.0.0.3"}
    assert elements(node, Family.IPV6, names.LOCAL_PODS) == {"fd00::1", "fd00::2", "fd00::3"}
    assert elements(node, Family.IPV4, names.NODE_PORTS["sctp"]) == {"30036"}
    assert elements(node, Family.IPV4, set_of(node, Family.IPV4, PortSet)) == {"10.0.0.1 . tcp . 8080"}
    assert elements(node, Family.IPV6, set_of(node, Family.IPV6, PortSet)) == {"fd00::1 . tcp . 8080"}
    for family in BOTH:
        for key, members in node.ruleset.members.items():
            if isinstance(key, PodSet):
                assert elements(node, family, names.set_name(key, family)) == members[family]


def test_a_member_comes_and_goes_in_one_message_and_nothing_is_listed(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.start()

    def never(*_: object) -> None:
        raise AssertionError("a change of members went another way")

    monkeypatch.setattr(Nft, "run", never)
    monkeypatch.setattr(Nft, "list_table", never)
    another = pod("a/another", 17, node="n2", app="db")
    came = node.become(*WORLD, another)
    assert (came.failures, came.writes) == ((), 4)  # sources of ingress, destinations of egress, in both families
    for family, address in zip(BOTH, ("10.0.0.17", "fd00::11"), strict=True):
        holding = [key for key, members in node.ruleset.members.items() if address in members.get(family, ())]
        assert [address in elements(node, family, names.set_name(key, family)) for key in holding] == [True, True]
    assert node.become(*WORLD).writes == 4
    monkeypatch.undo()
    assert node.look().writes == node.restart().writes == 0


WORLDS: dict[str, tuple[Pod | NetworkPolicy, ...]] = {
    "a pod comes": (*WORLD, pod("a/new", 33, app="web", ports={"http": 8081})),
    "a pod goes": tuple(item for item in WORLD if item is not DATABASE),
    "a pod gets another label": (pod("a/web", 1, ports={"http": 8080}, app="db"), *WORLD[1:]),
    "a pod gets another address": (pod("a/web", 44, ports={"http": 8080}, app="web"), *WORLD[1:]),
    "an address becomes another pod's": (pod("a/db2", 1, app="db"), *WORLD[1:]),
    "a policy comes": (*WORLD, policy("b/new", ingress=[rule(pods())], egress=[rule(block("203.0.113.0/24"))])),
    "a policy changes": (*WORLD[:-1], policy("a/allow", labels(app="web"), ingress=[rule(pods(app="web"))])),
    "a policy goes": WORLD[:-1],
    "a policy covers the other direction": (*WORLD[:-2], policy("a/deny", labels(app="db"), egress=[]), ALLOW),
    "everything goes": (OTHER,),
    "nothing is left": (),
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_every_change_leads_to_what_a_new_process_would_make_and_back(
    node: Node, world: tuple[Pod | NetworkPolicy, ...]
) -> None:
    node.start()
    first = node.tables()
    changed = node.become(*world)
    assert (changed.failures, changed.repaired) == ((), ())
    assert changed.writes > 0
    assert node.backend.plan(node.ruleset, node.state.frame) == ()
    assert canonical(node.tables()) == canonical(fresh(node))
    back = node.become(*WORLD)
    assert (back.failures, back.repaired) == ((), ())
    assert canonical(node.tables()) == canonical(first)
    again = node.restart()
    assert (again.writes, again.failures) == (0, ())


def test_a_change_writes_only_what_it_concerns(node: Node) -> None:
    node.start()
    untouched = names.policy_chain(DENY.key, Direction.INGRESS)
    monitor = node.namespace.start(["nft", "monitor"], stdout=subprocess.PIPE)
    time.sleep(0.3)
    node.become(*WORLD[:-1], policy("a/allow", labels(app="web"), ingress=[rule(pods(app="web"))]))
    node.nft("add table ip end")
    time.sleep(0.2)
    monitor.terminate()
    told, _ = monitor.communicate()
    assert names.policy_chain(ALLOW.key, Direction.INGRESS) in told
    assert untouched not in told
    assert names.COMMON_CHAIN not in told


@pytest.mark.parametrize(
    "blocks",
    [
        (block("0.0.0.0/0"), block("::/0")),
        (block("0.0.0.0/0", "10.0.0.0/8"), block("::/0", "fd00::/8")),
        (block("10.0.0.0/8"), block("10.1.0.0/16"), block("10.0.0.0/9"), block("fd00::/8"), block("fd00::/16")),
        (
            block("255.255.255.255/32"),
            block("0.0.0.0/32"),
            block("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"),
            block("::/128"),
        ),
        tuple(block(f"10.{number >> 8}.{number & 255}.0/25") for number in range(5000))
        + tuple(block(f"2001:db8:{number:x}::/49") for number in range(5000)),
    ],
    ids=["all", "all but some", "overlapping", "first and last", "5,000"],
)
def test_blocks_of_every_kind_stand_and_are_read_back(node: Node, blocks: tuple[PolicyPeer, ...]) -> None:
    node.start()
    synced = node.become(*WORLD, policy("b/blocks", ingress=[rule(*blocks)]))
    assert (synced.failures, synced.failed) == ((), {})
    assert node.restart().writes == 0
    assert node.backend.plan(node.ruleset, node.state.frame) == ()


def test_a_large_set_is_filled_before_anything_names_it(node: Node) -> None:
    node.start()
    many = [pod(f"c/p{number}", 0, node="n2", app="many") for number in range(3 * BULK)]
    for number, item in enumerate(many):
        addresses = (f"10.8.{number >> 8}.{number & 255}", f"fd00:8::{number:x}")
        many[number] = msgspec.structs.replace(item, ips=addresses)
    synced = node.become(*WORLD, *many, policy("b/many", ingress=[rule(namespaces(name="c"))]))
    assert synced.failures == ()
    assert synced.writes > 6 * BULK
    assert node.look().writes == 0
    assert node.restart().writes == 0


def test_a_frame_that_changes_is_followed(node: Node) -> None:
    node.start()
    ports = frozenset({("tcp", 31000)})
    frame = dataclasses.replace(FRAME, node_ports=ports, default_deny=False, only_syn_opens=False)
    node.state = dataclasses.replace(node.state, frame=frame)
    changed = node.backend.sync(node.ruleset, Changed(), node.state.frame, observe=False, hold=False)
    assert (changed.failures, changed.writes > 0) == ((), True)
    assert elements(node, Family.IPV6, names.NODE_PORTS["tcp"]) == {"31000"}
    assert "default-deny" not in node.tables()
    assert canonical(node.tables()) == canonical(fresh(node))
    assert node.restart().writes == 0


def test_one_family_alone(node: Node) -> None:
    node.state = dataclasses.replace(node.state, frame=dataclasses.replace(FRAME, families=(Family.IPV6,)))
    assert node.start().failures == ()
    assert "kube-router-filter-ipv4" not in node.nft("list tables")
    assert node.restart().writes == 0


def test_upstreams_table_is_taken_over(node: Node) -> None:
    """Go kube-router's names: its versioned chains and its sets go in the transaction that brings ours."""
    for family in BOTH:
        kind, saddr = KIND[family], f"{KIND[family]} saddr"
        one = "10.0.0.1" if family is Family.IPV4 else "fd00::1"
        table = f"{kind} {names.NFT_TABLES[family]}"
        address = "ipv4_addr" if family is Family.IPV4 else "ipv6_addr"
        node.namespace.run(
            "nft -f -",
            stdin=f"""
            table {table} {{
              comment "rules for {names.NFT_TABLES[family]}"
              set kube-router-local-pods {{
                type {address}; comment "programmed local pod IPs"; elements = {{ {one} }}
              }}
              set KUBE-SRC-AAAAAAAAAAAAAAAA {{ type {address}; comment "netpol set"; elements = {{ {one} }} }}
              chain KUBE-ROUTER-INPUT {{
                type filter hook input priority 0; comment "top level KUBE-ROUTER-INPUT chain for kube-router";
                {saddr} {one} counter jump KUBE-POD-FW-AAAAAAAAAAAAAAAA comment "a/web out"
                counter jump KUBE-NWPLCY-TAIL
              }}
              chain KUBE-NWPLCY-TAIL {{ meta mark and 0x20000 == 0x20000 counter accept
              }}
              chain KUBE-NWPLCY-AAAAAAAAAAAAAAAA {{
                {saddr} @KUBE-SRC-AAAAAAAAAAAAAAAA counter meta mark set meta mark or 0x10000 return
              }}
              chain KUBE-POD-FW-AAAAAAAAAAAAAAAA {{ counter jump KUBE-NWPLCY-AAAAAAAAAAAAAAAA
                meta mark and 0x10000 == 0x0 counter reject
              }}
            }}
            """,
        )
    assert node.start().failures == ()
    assert "AAAAAAAAAAAAAAAA" not in node.tables()
    assert canonical(node.tables()) == canonical(fresh(node))


def test_packets_that_cross_the_bridge_meet_the_rules(new_netns: Callable[[], Namespace]) -> None:
    """Two pods on a bridge: br_netfilter shows their frames to the forward hook, by a sysctl of this namespace."""
    host, client, server = new_netns(), new_netns(), new_netns()
    host.run("ip link add kube-bridge type bridge; ip link set kube-bridge up")
    host.run("ip address add 10.0.0.254/24 dev kube-bridge; ip address add fd00::fe/64 dev kube-bridge nodad")
    host.run("sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1")
    for space, name, number in ((server, "server", 1), (client, "client", 2)):
        veth(host, name, space, "eth0", right_addresses=(f"10.0.0.{number}/24", f"fd00::{number}/64"))
        host.run(f"ip link set {name} master kube-bridge")
    listener = server.start([sys.executable, "-c", LISTEN], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert listener.stdout is not None
    assert listener.stdout.readline() == "ready\n"

    def reach(family: Family, number: int) -> str:
        target = "10.0.0.1" if family is Family.IPV4 else "fd00::1"
        return client.run(f"{sys.executable} -c '{CONNECT}' {target} {number}").strip()

    web, other = pod("a/web", 1, app="web"), pod("b/other", 2)
    try:
        with host.enter():
            node = Node(host, (web, other))
            node.start()
            assert {reach(family, number) for family in BOTH for number in (80, 81)} == {"ok"}
            node.become(web, other, policy("a/p", labels(app="web"), ingress=[rule(ports=[port(80)])]))
            assert [reach(family, number) for family in BOTH for number in (80, 81)] == ["ok", "refused"] * 2
            node.become(web, other, policy("b/p", egress=[rule(ports=[port(81)])]))
            assert [reach(family, number) for family in BOTH for number in (80, 81)] == ["refused", "ok"] * 2
            node.become(web, other)
            assert {reach(family, number) for family in BOTH for number in (80, 81)} == {"ok"}
            node.backend.close()
    finally:
        listener.terminate()
        listener.wait()
        listener.stdout.close()


LISTEN = """
import socket, select
held = [socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True) for port in (80, 81)]
print("ready", flush=True)
while True:
    for one in select.select(held, [], [])[0]:
        one.accept()[0].close()
"""
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3).close()
    print("ok")
except ConnectionRefusedError:
    print("refused")
except TimeoutError:
    print("nothing")
"""


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_in_whatever_order_nothing_is_left_to_do(node: Node, seed: int) -> None:
    """Random clusters, one after the other; some are stale, and somebody else is at work at times."""
    chance = random.Random(seed)
    node.start()
    for _ in range(25):
        world = random_world(chance)
        hold = chance.random() < 0.2
        if chance.random() < 0.2:
            family = chance.choice(BOTH)
            table = f"{KIND[family]} {names.NFT_TABLES[family]}"
            verb = chance.choice(["delete table {}", "flush table {}", "flush set {} kube-router-local-pods"])
            node.namespace.run(f"nft {verb.format(table)}", check=False)
        synced = node.become(*world, hold=hold, observe=chance.random() < 0.3)
        assert (synced.failures, synced.failed) == ((), {})
        if not hold:
            node.look()
            assert node.backend.plan(node.ruleset, node.state.frame) == ()
    node.become(*WORLD)
    node.look()
    assert canonical(node.tables()) == canonical(fresh(node))


def random_world(chance: random.Random) -> tuple[Pod | NetworkPolicy, ...]:
    """A few pods with few addresses and labels, so that they meet; policies of every kind."""
    found: list[Pod | NetworkPolicy] = []
    for number in range(chance.randrange(8)):
        label = chance.choice("xyz")
        made = pod(f"a/p{number}", chance.randrange(1, 9), chance.choice(["n1", "n1", "n2"]), {"http": 80}, app=label)
        found.append(made)
    for number in range(chance.randrange(6)):
        peers = chance.sample([pods(app="x"), pods(app="y"), block("10.0.0.0/30"), block("fd00::/64"), namespaces()], 2)
        ports = chance.choice([None, [port(80)], [port("http"), port(1, 9)]])
        rules = chance.choice([[], [rule(*peers, ports=ports)], [rule(ports=ports), rule(*peers[:1])]])
        directions = chance.choice([{"ingress": rules}, {"egress": rules}, {"ingress": rules, "egress": rules}])
        found.append(policy(f"a/n{number}", labels(app=chance.choice("xyz")), **directions))
    return tuple(found)
