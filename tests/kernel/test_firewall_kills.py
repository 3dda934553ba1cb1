"""The firewall worker is killed again and again while policies change under traffic: nothing is lost, nothing leaks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.firewallnode import firewall
from support.killable import Life, kill_again_and_again
from support.podfirewall import judged, packet_of
from support.podnet import PodNet, podnet
from support.policyworld import block, namespaces, pods, policy, port, rule, select
from support.probes import Flow, differing
from support.traffic import Traffic

from kube_router.ipc.messages import Namespace, Node, Projection
from kube_router.workers.firewall.rules import Frame
from kube_router.workers.firewall.verdict import evaluate
from kube_router.workers.model import Family
from kube_router.workers.settings import Settings

DUAL = Settings(node_name="n1", enable_ipv6=True, service_cluster_ip_range=("10.96.0.0/12", "fd00:96::/112"))
BACKENDS = {"iptables": DUAL, "nftables": msgspec.structs.replace(DUAL, use_nftables_for_netpol=True)}
KILLS = 100


@pytest.fixture(scope="module")
def net() -> Iterator[PodNet]:
    with podnet("abcd", "x") as made:
        yield made


def steps(net: PodNet) -> tuple[tuple[Projection, ...], ...]:
    """Clusters that differ in all that can change: peers, ports, isolation, labels, pods that come and go.

    In every one of them a reaches b at port 80 and x at any, the client and c do not reach b, and nobody reaches c.
    """
    spaces = [Namespace(name=name, labels={"name": name}) for name in ("dev", "prod")]
    node = Node(name="n1", pod_cidrs=("10.244.1.0/24", "fd00:244:1::/64"))
    here = [net.pod(name, namespace="dev" if name in "ab" else "prod") for name in "abc"]
    d, x = net.pod("d", namespace="prod"), net.pod("x", namespace="dev")
    shut = policy("prod/shut", select(pod="c"), types=("Ingress", "Egress"))
    narrow = policy("dev/b", select(pod="b"), ingress=[rule(pods(pod="a"), ports=[port(80), port(80, protocol="UDP")])])
    wide = policy(
        "dev/b",
        select(pod="b"),
        ingress=[
            rule(namespaces(name="nowhere")),
            rule(pods("pod In a,x"), ports=[port(80, 8080), port(protocol="UDP"), port(80, protocol="SCTP")]),
            rule(block("192.0.2.0/24", "192.0.2.0/25"), ports=[port(8081)]),
        ],
        egress=[rule(pods())],
    )
    out = policy("dev/a", select(pod="a"), egress=[rule(pods("pod In b,x"))])
    other = policy("prod/d", select(pod="d"), ingress=[rule(block("0.0.0.0/0", "192.0.2.66/32"), block("::/0"))])
    common = (node, *spaces, *here, shut)
    return (
        (*common, d, x, narrow),
        (*common, d, x, wide, other),
        (*common, net.pod("d", {"moved": "yes"}, namespace="prod"), x, wide, out),
        (*common, x, narrow, out, other),
        (*common, d, x, wide, policy("dev/b2", select(pod="b"), ingress=[rule(pods(pod="a"))])),
    )


def constant(net: PodNet) -> dict[Flow, bool]:
    """The flows on which all steps agree, and what they say of them."""
    found = {}
    states = [judged(net, "n1", objects, Frame(families=tuple(Family))) for objects in steps(net)]
    for version in Family:
        for one in ("a", "b", "c", "d", "x", "client"):
            for other in {"a", "b", "c", "x"} - {one}:
                for kind, number in (("tcp", 80), ("udp", 80), ("udp", 8080), ("sctp", 80), ("icmp", 0)):
                    flow = Flow(net[one].of(version), net[other].of(version), kind, number)
                    packet = packet_of(net, flow, "n1")
                    verdicts = {packet is None or evaluate(state, packet).allowed for state in states}
                    if len(verdicts) == 1:
                        found[flow] = verdicts.pop()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_kills_in_policy_churn_lose_nothing_and_leak_nothing(
    net: PodNet, backend: str, tmp_path: Path
) -> None:
    """Every datagram counts: those that must pass are sent once, those that must not pass are looked for."""
    net.flush()
    settings, node = BACKENDS[backend], net["n1"].namespace
    life = Life(settings, steps(net))
    expected = constant(net)
    assert {True, False} == set(expected.values())
    with node.enter(), firewall(settings, *life.steps[0]) as worker:
        assert worker.beat.errors == {}
    assert differing(net.probes, expected) == {}
    a, b = (net[name] for name in "ab")
    links = {str(version): net.probes.connect(Flow(a.of(version), b.of(version), "tcp", 80)) for version in Family}
    try:
        with Traffic(net.probes, expected, links) as traffic:
            killed = kill_again_and_again(node, life, tmp_path, KILLS, seed=len(backend))
    finally:
        for link in links.values():
            link.close()
    assert traffic.wrong == []
    assert traffic.rounds > 10
    assert killed.workers == KILLS
    assert killed.steps > KILLS, "they were killed before they had done anything"
    with node.enter():
        with firewall(settings, *life.steps[1]) as worker:
            assert worker.beat.errors == {}
        with firewall(settings, *life.steps[1]) as worker:
            assert worker.beat.writes == 0
    assert differing(net.probes, expected) == {}
    net.flush()


def test_a_change_of_the_backend_under_traffic_loses_nothing_and_leaks_nothing(net: PodNet) -> None:
    """There and back, twice: for a while both stand, and a packet has to pass both."""
    net.flush()
    node, expected = net["n1"].namespace, constant(net)
    with node.enter():
        with firewall(BACKENDS["nftables"], *steps(net)[0]) as worker:
            assert worker.beat.errors == {}
        links = {
            str(version): net.probes.connect(Flow(net["a"].of(version), net["b"].of(version), "tcp", 80))
            for version in Family
        }
        with Traffic(net.probes, expected, links) as traffic:
            for settings in [*BACKENDS.values()] * 2:
                with firewall(settings, *steps(net)[0]) as worker:
                    assert worker.beat.errors == {}
                rules = [node.run(command) for command in ("iptables-save", "nft list tables")]
                stands = ["KUBE-POD-FW-" in rules[0], "kube-router-filter-ipv4" in rules[1]]
                assert stands == [not settings.use_nftables_for_netpol, settings.use_nftables_for_netpol]
    for link in links.values():
        link.close()
    assert traffic.wrong == []
    net.flush()


def test_the_traffic_sees_a_short_opening_and_a_short_closing(net: PodNet) -> None:
    net.flush()
    node, a, b, c = (net[name] for name in ("n1", "a", "b", "c"))
    shut = f"-I FORWARD -s {a.of(4)} -d {b.of(4)} -j"
    expected = {
        Flow(a.of(4), b.of(4), "udp", 80): False,
        Flow(a.of(4), c.of(4), "udp", 80): True,
        Flow(a.of(6), b.of(6), "tcp", 80): True,
    }
    node.namespace.run(f"iptables-nft {shut} DROP")
    link = net.probes.connect(Flow(a.of(6), c.of(6), "tcp", 80))
    with Traffic(net.probes, expected, {"link": link}) as traffic:
        time.sleep(0.3)
        assert traffic.wrong == []
        node.namespace.run(f"iptables-nft {shut} ACCEPT; sleep 0.3; iptables-nft -D FORWARD 1")
        node.namespace.run(f"iptables-nft -I FORWARD -d {c.of(4)} -j REJECT; sleep 0.3; iptables-nft -D FORWARD 1")
        node.namespace.run("ip6tables-nft -I FORWARD -j DROP; sleep 4; ip6tables-nft -D FORWARD 1")
    assert {flow for flow, _ in traffic.leaked} == {Flow(a.of(4), b.of(4), "udp", 80)}
    assert {flow for flow, _ in traffic.lost} == {flow for flow, opened in expected.items() if opened}
    assert traffic.broken == ["link"]
    link.close()
    net.flush()
