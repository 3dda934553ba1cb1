"""Network policy on this machine's kernel: real packets between pods, nodes and a client, by both backends.

The judge (`verdict.py`) says what must happen to each of some thousand flows; the answers of real sockets must agree.
A backend lives through all tests of this file: each scenario is a change of what stood before it.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator

import pytest
from support.podfirewall import BACKENDS, PodFirewall
from support.podnet import PodNet, podnet
from support.policyworld import block, namespaces, pods, pods_in, policy, port, rule, select
from support.probes import Flow
from support.traffic import Traffic

from kube_router.ipc.messages import ContainerPort, Namespace, NetworkPolicy, Projection
from kube_router.workers.firewall.rules import Frame
from kube_router.workers.model import parse_network

EITHER = [4, 6]


@pytest.fixture(scope="module")
def net() -> Iterator[PodNet]:
    with podnet() as made:
        yield made


@pytest.fixture(scope="module", params=BACKENDS)
def firewall(request: pytest.FixtureRequest, net: PodNet) -> Iterator[PodFirewall]:
    net.flush()
    made = PodFirewall(net, BACKENDS[request.param])
    try:
        yield made
    finally:
        made.close()
        net.flush()


def world(net: PodNet) -> tuple[Projection, ...]:
    """Six pods in two namespaces on two nodes; ``http`` and ``dns`` are different ports on different pods."""
    http, web, dns = ContainerPort("http", 8080), ContainerPort("http", 80), ContainerPort("dns", 8080, "UDP")
    return (
        Namespace(name="dev", labels={"name": "dev", "tier": "low"}),
        Namespace(name="prod", labels={"name": "prod"}),
        net.pod("a", {"app": "front"}, namespace="dev"),
        net.pod("b", {"app": "back"}, namespace="dev", ports=(http, dns)),
        net.pod("c", {"app": "back"}, namespace="prod", ports=(web, ContainerPort("sig", 80, "SCTP"))),
        net.pod("d", {"app": "front"}, namespace="prod"),
        net.pod("x", {"app": "back"}, namespace="dev", ports=(web, dns)),
        net.pod("y", {"app": "front"}, namespace="prod", ports=(http,)),
    )


ALL_V4, ALL_V6 = block("0.0.0.0/0"), block("::/0")
BOTH = ("Ingress", "Egress")
SCENARIOS: dict[str, list[NetworkPolicy]] = {
    "no-policy": [],
    "deny-all-both": [policy("dev/deny", types=BOTH), policy("prod/deny", types=BOTH)],
    "deny-ingress": [policy("dev/deny", ingress=[])],
    "deny-egress": [policy("prod/deny", types=("Egress",))],
    "from-pods-and-ports": [
        policy(
            "dev/back",
            select(app="back"),
            ingress=[
                rule(pods(app="front"), ports=[port(80), port(8080, protocol="SCTP")]),
                rule(namespaces(name="prod"), ports=[port(protocol="UDP")]),
            ],
        )
    ],
    "both-selectors-in-one-entry": [
        policy("dev/in", ingress=[rule(pods_in(select(app="front"), select(name="prod")))]),
        policy(
            "prod/out", egress=[rule(pods_in(select("app In back,none"), select("tier")), ports=[port(8080, 8081)])]
        ),
    ],
    "expressions": [
        policy("prod/in", select("pod NotIn c"), ingress=[rule(pods_in(select("!missing"), select("!tier")))]),
        policy("dev/in", select("pod Exists"), ingress=[rule(namespaces("tier DoesNotExist"))]),
    ],
    "named-ports": [
        policy(
            "dev/http",
            ingress=[rule(ports=[port("http")]), rule(pods(app="back"), ports=[port("dns", protocol="UDP")])],
        ),
        policy("prod/to", egress=[rule(namespaces(), ports=[port("http"), port("sig", protocol="SCTP")])]),
    ],
    "or-of-policies": [
        policy("dev/one", select(app="back"), ingress=[rule(pods(app="front"), ports=[port(80)])]),
        policy("dev/two", select(pod="b"), ingress=[rule(ALL_V6, block("192.0.2.0/24"), ports=[port(8080)])]),
    ],
    "blocks-with-excepts": [
        policy(
            "dev/in", ingress=[rule(block("192.0.2.0/24", "192.0.2.64/26"), block("2001:db8::/32", "2001:db8::64/123"))]
        ),
        policy(
            "prod/out",
            egress=[rule(block("10.244.0.0/16", "10.244.2.0/24"), block("fd00:244::/32", "fd00:244:2::/64"))],
        ),
    ],
    "S1-each-direction-has-its-own-say": [
        policy("dev/both", ingress=[rule(pods(pod="x"))], egress=[rule()]),
        policy("prod/both", ingress=[rule(pods(pod="d"))], egress=[rule(pods(pod="nobody"))]),
    ],
    "S2-a-name-that-no-pod-has-opens-nothing": [
        policy("dev/in", ingress=[rule(pods(), ports=[port("missing")])]),
        policy("prod/out", egress=[rule(namespaces(), ports=[port("missing")])]),
    ],
    "S3-names-of-one-pod-do-not-spread": [
        policy("dev/in", ingress=[rule(ports=[port("dns", protocol="UDP")])]),
        policy("prod/in", ingress=[rule(ports=[port("http")])]),
    ],
    "S4-an-except-is-of-its-own-block": [
        policy("dev/in", ingress=[rule(block("192.0.2.0/24", "192.0.2.64/26"), block("192.0.2.66/32"))]),
        policy("prod/in", ingress=[rule(block("2001:db8::/32", "2001:db8::60/123"), block("2001:db8::66/128"))]),
    ],
    "S5-any-block-is-every-address": [
        policy("dev/in", ingress=[rule(ALL_V6, block("0.0.0.0/0", "192.0.2.66/32"))]),
        policy("prod/in", ingress=[rule(ALL_V4, block("::/0", "fc00::/8"))]),
    ],
    "S7-a-named-port-of-egress-is-on-pods-alone": [policy("dev/out", egress=[rule(ports=[port("http")])])],
    "ip-blocks-see-pods-too": [
        policy(
            "dev/out",
            egress=[rule(block("10.244.1.12/32"), block("fd00:244:1::c/128"), ports=[port("http"), port(8081)])],
        ),
    ],
}
_expected: dict[str, dict[Flow, bool]] = {}


def assert_all(firewall: PodFirewall, name: str = "", flows: list[Flow] | None = None) -> dict[Flow, bool]:
    """Every flow is what the judge says. His words on a named scenario are remembered for the next backend."""
    if name not in _expected or not name:
        _expected[name] = {flow: firewall.allows(flow) for flow in (flows or firewall.flows())}
    expected = _expected[name]
    assert firewall.wrong(expected) == {}
    return expected


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_flow_is_what_the_policies_say(firewall: PodFirewall, net: PodNet, name: str) -> None:
    firewall.apply(*world(net), *SCENARIOS[name])
    expected = assert_all(firewall, name)
    assert any(expected.values())
    assert all(expected.values()) == (name == "no-policy"), "a scenario that blocks nothing proves nothing"


def test_s6_names_that_run_into_each_other_are_two(firewall: PodFirewall, net: PodNet) -> None:
    """Upstream hashes namespace and name without a separator: the second of these policies became the first one's."""
    pods_of_two = (net.pod("a", namespace="dev"), net.pod("b", namespace="dev"), net.pod("d", namespace="dev1"))
    shut = policy("dev/1allow", select(pod="b"), ingress=[])
    opened = policy("dev1/allow", ingress=[rule()])
    firewall.apply(*pods_of_two, shut, opened)
    assert_all(firewall, flows=firewall.flows(("a", "client", "x"), ("b", "d")))
    assert not firewall.allows(Flow(net["a"].of(4), net["b"].of(4), "tcp", 80))
    assert firewall.allows(Flow(net["a"].of(4), net["d"].of(4), "tcp", 80))


@pytest.mark.parametrize("ports", [frozenset(), frozenset({("tcp", 8081), ("udp", 8080), ("sctp", 8080)})])
def test_s8_only_real_node_ports_are_ahead_of_policy(
    firewall: PodFirewall, net: PodNet, ports: frozenset[tuple[str, int]]
) -> None:
    """A port of the node port range that no Service has is a host's port like any other."""
    firewall.apply(*world(net), policy("prod/deny", types=("Egress",)), frame=lambda node: Frame(node_ports=ports))
    flows = firewall.flows(("c", "d", "a", "y"), ("n1", "n2"))
    expected = assert_all(firewall, flows=flows)
    to_node = {
        (flow.protocol, flow.port) for flow, opened in expected.items() if opened and flow.source == net["d"].of(4)
    }
    own = {(flow.protocol, flow.port) for flow in flows if flow.destination == "10.0.0.1"} & to_node
    assert own - {("icmp", 0)} == ports


@pytest.mark.parametrize("version", EITHER)
def test_s9_a_node_s_address_in_a_pod_s_frame_is_not_the_node(firewall: PodFirewall, net: PodNet, version: int) -> None:
    a, b, node = net["a"], net["b"], net["n1"]
    addresses = [item for item in node.addresses if (":" in item) == (version == 6)]
    flows = [Flow(source, b.of(version), "udp", 80) for source in addresses]
    firewall.apply(*world(net))
    forged = {net.probes.forge(a, flow) for flow in flows}
    assert net.probes.turn(lambda: forged <= net.probes.arrived, 2.0), "the forgery itself must work"
    firewall.apply(*world(net), policy("dev/deny", select(pod="b"), types=("Ingress",)))
    forged = {net.probes.forge(a, flow) for flow in flows}
    net.probes.drain(0.3)
    assert not forged & net.probes.arrived
    assert firewall.wrong(dict.fromkeys(flows, True)) == {}, "the node itself is always let in"


@pytest.mark.parametrize("version", EITHER)
def test_packets_that_ipvs_has_translated_are_asked_about_in_output(
    firewall: PodFirewall, net: PodNet, version: int
) -> None:
    """They come out of the node under the pod's own address: egress of the source, then ingress of the destination."""
    a, b, c = (net[name].of(version) for name in "abc")
    flows = [Flow(a, b, "udp", 80), Flow(a, c, "udp", 80), Flow(c, b, "udp", 80)]

    def arriving() -> list[bool]:
        sent = [net.probes.forge(net["n1"], flow) for flow in flows]
        net.probes.turn(lambda: set(sent) <= net.probes.arrived, 0.3)
        return [text in net.probes.arrived for text in sent]

    firewall.apply(*world(net))
    assert arriving() == [True, True, True]
    firewall.apply(*world(net), policy("dev/out", select(pod="a"), egress=[rule(pods(pod="b"))]))
    assert arriving() == [True, False, True]
    firewall.apply(*world(net), policy("dev/in", select(pod="b"), ingress=[rule(pods_in(select(pod="c"), select()))]))
    assert arriving() == [False, True, True]


def test_s12_every_address_of_a_pod_is_isolated(firewall: PodFirewall, net: PodNet) -> None:
    firewall.apply(*world(net), policy("prod/shut", select(pod="c"), types=BOTH))
    expected = assert_all(
        firewall, flows=firewall.flows(("a", "d", "x", "client"), ("c",)) + firewall.flows(("c",), ("b", "x"))
    )
    assert len({flow.destination for flow in expected} & set(net["c"].addresses)) == 4
    assert not any(opened for flow, opened in expected.items() if flow.protocol != "icmp")


def test_s13_marks_from_elsewhere_mean_nothing(firewall: PodFirewall, net: PodNet) -> None:
    marks = "".join(
        f"chain {hook} {{ type {kind} hook {hook} priority mangle; meta mark set meta mark | 0x30001; }}\n"
        for hook, kind in (("prerouting", "filter"), ("output", "route"))
    )
    with net.table(f"table inet marks {{\n{marks}}}\n", "inet marks"):
        for name in ("from-pods-and-ports", "deny-all-both"):
            firewall.apply(*world(net), *SCENARIOS[name])
            assert_all(firewall, name)


@pytest.mark.parametrize("version", EITHER)
def test_a_service_s_address_is_asked_about_after_its_translation(
    firewall: PodFirewall, net: PodNet, version: int
) -> None:
    address = "fd96::10" if version == 6 else "10.96.0.10"
    firewall.apply(
        *world(net),
        policy(
            "dev/in",
            select(pod="b"),
            ingress=[rule(namespaces("name Exists"), ports=[port("http"), port("dns", protocol="UDP")])],
        ),
        policy("prod/out", select(pod="d"), egress=[rule(pods(), ports=[port(8080)])]),
        policy("dev/out", select(pod="a"), egress=[rule(pods(pod="b"), ports=[port(8080)])]),
        frame=lambda node: Frame(cluster_ranges=(parse_network("10.96.0.0/12"), parse_network("fd96::/112"))),
    )
    target = net["b"].of(version)
    with net.service(address, 443, "b", 8080):
        flows = [
            Flow(net[name].of(version), target, kind, 8080, (address, 443))
            for name in ("a", "c", "d", "x", "y", "client")
            for kind in ("tcp", "udp")
        ]
        expected = assert_all(firewall, flows=flows)
    opened = {(flow.source, flow.protocol) for flow, answer in expected.items() if answer}
    assert opened == {
        (net[name].of(version), kind) for name, kind in [("a", "tcp"), *((n, k) for n in "cxy" for k in ("tcp", "udp"))]
    }


def test_with_default_deny_a_pod_that_is_not_known_yet_is_closed(firewall: PodFirewall, net: PodNet) -> None:
    cidrs = {
        node: tuple(map(parse_network, (f"10.244.{node[1]}.0/24", f"fd00:244:{node[1]}::/64"))) for node in ("n1", "n2")
    }
    known = [item for item in world(net) if item.name not in ("d", "x")]

    def apply(*objects: Projection) -> None:
        firewall.apply(*objects, frame=lambda node: Frame(default_deny=True, pod_cidrs=cidrs[node]))

    apply(*known)
    closed = assert_all(firewall, flows=firewall.flows())
    assert not closed[Flow(net["a"].of(4), net["d"].of(4), "tcp", 80)]
    assert not closed[Flow(net["n1"].of(6), net["d"].of(6), "tcp", 80)]
    assert closed[Flow(net["a"].of(4), "10.244.1.1", "tcp", 80)], "the bridge's address is no pod's"
    apply(*world(net))
    assert all(assert_all(firewall, flows=firewall.flows()).values())


@pytest.mark.parametrize("version", EITHER)
def test_open_connections_go_on_when_a_policy_comes_and_new_ones_do_not(
    firewall: PodFirewall, net: PodNet, version: int
) -> None:
    pairs = [("a", "c"), ("a", "x"), ("client", "b"), ("y", "d"), ("b", "n1"), ("n1", "b")]
    flows = {f"{one} to {other}": Flow(net[one].of(version), net[other].of(version), "tcp", 80) for one, other in pairs}
    firewall.apply(*world(net))
    links = {name: net.probes.connect(flow) for name, flow in flows.items()}
    try:
        firewall.apply(*world(net), *SCENARIOS["deny-all-both"])
        assert [name for name, link in links.items() if not link.say()] == []
        expected = assert_all(firewall, flows=list(flows.values()))
        assert [flow for flow, opened in expected.items() if opened] == [flows["n1 to b"]]
        firewall.apply(*world(net))
        assert [name for name, link in links.items() if not link.say()] == []
        assert firewall.wrong(dict.fromkeys(flows.values(), True)) == {}
    finally:
        for link in links.values():
            link.close()


def test_what_is_refused_is_told_so(firewall: PodFirewall, net: PodNet) -> None:
    """A client hears at once that it may not, rather than waiting for an answer that does not come."""
    firewall.apply(*world(net), *SCENARIOS["deny-all-both"])
    flows = [flow for flow in firewall.flows(("a", "d", "y", "client"), ("b", "c")) if flow.protocol in ("tcp", "udp")]
    answers = net.probes.try_all(flows, 2.5)
    assert {flow: answer for flow, answer in answers.items() if answer != "refused"} == {}


ORDER = [
    *SCENARIOS["named-ports"],
    *SCENARIOS["or-of-policies"],
    *SCENARIOS["blocks-with-excepts"],
    *SCENARIOS["S1-each-direction-has-its-own-say"],
]


def standing(net: PodNet) -> str:
    """All rules and sets of node n1, in an order that does not tell when they were made."""
    text = net["n1"].namespace.run(
        "for f in iptables ip6tables; do for k in nft legacy; do $f-$k-save -t filter; done; done; ipset save;"
        "nft -s list ruleset"
    )
    lines = [re.split(r" \[| initval", line)[0] for line in text.splitlines() if line and not line.startswith("#")]
    return "\n".join(sorted(lines))


def test_what_stands_in_the_kernel_does_not_depend_on_the_way_there(firewall: PodFirewall, net: PodNet) -> None:
    last = {item.key: item for item in ORDER}
    firewall.apply(*world(net), *last.values())
    expected, before = assert_all(firewall, flows=firewall.flows()), standing(net)
    for chosen in (ORDER[3:5], ORDER[:1], [], ORDER[5:], ORDER[2:]):
        firewall.apply(*world(net)[2 if chosen else 0 :], *{item.key: item for item in chosen}.values())
    firewall.apply(*reversed(world(net)), *reversed(last.values()))
    assert standing(net) == before
    assert firewall.wrong(expected) == {}


def test_traffic_goes_on_undisturbed_while_policies_come_and_go(firewall: PodFirewall, net: PodNet) -> None:
    """Everything around some flows changes, but nothing that is about them."""
    kept = policy(
        "dev/kept", select(pod="b"), ingress=[rule(pods(pod="a"), ports=[port(80)])], egress=[rule(pods(pod="x"))]
    )
    flows = firewall.flows(("a", "c", "x", "client"), ("b",)) + firewall.flows(("b",), ("a", "x", "d"))
    churn = [
        *itertools.chain.from_iterable(SCENARIOS[name] for name in ("S4-an-except-is-of-its-own-block", "named-ports"))
    ]
    churn = [item for item in churn if item.namespace == "prod"]
    firewall.apply(*world(net), kept)
    expected = {flow: firewall.allows(flow) for flow in flows}
    links = {
        f"a to b {version}": net.probes.connect(Flow(net["a"].of(version), net["b"].of(version), "tcp", 80))
        for version in EITHER
    }
    with Traffic(net.probes, expected, links) as traffic:
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            firewall.apply(*world(net), kept, churn[0])
            firewall.apply(*world(net)[:-1], kept, *churn)
            firewall.apply(*world(net), policy("dev/more", select(pod="a"), types=("Ingress",)), kept)
    for link in links.values():
        link.close()
    assert traffic.wrong == []
    assert traffic.rounds > 5
