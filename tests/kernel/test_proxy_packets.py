"""Real connections through Services on the nftables backend: who answers whom, from where, and what the server sees.

The node under test is n1 of a `podnet`: pods a to d are its own, x and y are on n2, the client is outside.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from support.podfirewall import Standing
from support.podnet import PodNet, podnet
from support.policyworld import pods, policy, rule, select
from support.probes import Flow
from support.proxynode import ProxyNode
from support.proxyworld import SETTINGS, slices
from support.whoami import PORT, Answer, Whoami, call, calls, connected, heard

from kube_router.ipc.messages import (
    Endpoint,
    EndpointPort,
    IngressAddress,
    Node,
    NodeAddress,
    Projection,
    Service,
    ServicePort,
)
from kube_router.ipc.messages import Namespace as ApiNamespace
from kube_router.workers.firewall.nftables import Nftables as Firewall
from kube_router.workers.firewall.rules import Frame
from kube_router.workers.model import Family

V4, V6 = Family.IPV4, Family.IPV6
NODE = {V4: "10.0.0.1", V6: "fd00::1"}
NODES = {V4: ("10.0.0.1", "192.0.2.1"), V6: ("fd00::1", "2001:db8::1")}
"""All addresses of the node: which one it sends from is a matter of its routes."""
CLUSTER_IP = {V4: "10.96.0.1", V6: "fd00:96::1"}
BALANCER_IP = {V4: "203.0.113.1", V6: "2001:db8:b::1"}
NODE_PORT = 30001
every_family = pytest.mark.parametrize("family", list(Family), ids=str)
every_protocol = pytest.mark.parametrize("protocol", ["tcp", "udp"])
PORTS = (
    ServicePort(name="t", port=80, node_port=NODE_PORT),
    ServicePort(name="u", port=80, protocol="UDP", node_port=NODE_PORT),
    ServicePort(name="s", port=80, protocol="SCTP", node_port=NODE_PORT),
)


@pytest.fixture(scope="module")
def net() -> Iterator[PodNet]:
    with podnet() as made:
        one = made["n1"].namespace
        one.run("ip route add default via 192.0.2.2; ip -6 route add default via 2001:db8::2")
        # As the CNI configuration asks for: br_netfilter sends a pod's packet to itself back through its own port.
        one.run("for pod in vetha vethb vethc vethd; do bridge link set dev $pod hairpin on; done")
        servers = Whoami(made.hosts.values())
        yield made
        servers.close()


def own_node(**fields: Any) -> Node:
    addresses = tuple(NodeAddress("InternalIP", address) for address in NODE.values())
    values: dict[str, Any] = {"addresses": addresses, "pod_cidrs": ("10.244.1.0/24", "fd00:244:1::/64")}
    return Node(name=SETTINGS.node_name, uid="n1", **{**values, **fields})


def web(**fields: Any) -> Service:
    """A Service of every kind of address."""
    values: dict[str, Any] = {
        "cluster_ips": tuple(CLUSTER_IP.values()),
        "ip_families": ("IPv4", "IPv6"),
        "type": "LoadBalancer",
        "ingress": tuple(IngressAddress(ip=address) for address in BALANCER_IP.values()),
        "ports": PORTS,
    }
    return Service(name="web", namespace="shop", uid="web", **{**values, **fields})


def backed(net: PodNet, names: str, port: int = PORT, **fields: Any) -> tuple[Projection, ...]:
    """Slices with pods by their letters."""
    items = [
        Endpoint(
            addresses=(net[name].of(4 if family is V4 else 6),),
            node_name=SETTINGS.node_name if net.node_of(name) == "n1" else "n2",
            **{"ready": True, **fields},
        )
        for name in names
        for family in Family
    ]
    kinds = (("t", "TCP", port), ("u", "UDP", port), ("s", "SCTP", 8080))
    return slices("web", items, *(EndpointPort(name=name, protocol=kind, port=number) for name, kind, number in kinds))


class Serving:
    """The node with one Service."""

    def __init__(self, net: PodNet, **flags: Any) -> None:
        self.net, self.space = net, net["n1"].namespace
        ranges = {"loadbalancer_ip_range": ("203.0.113.0/24", "2001:db8:b::/64")}
        self.node = ProxyNode(self.space, own_node(), **{**ranges, **flags})

    def serve(self, names: str, **fields: Any) -> None:
        self.put(web(**fields), *backed(self.net, names))

    def put(self, *objects: Projection) -> None:
        with self.space.enter():
            done = self.node.sync(*objects)
        assert not done.failures

    def call(self, who: str, address: str, port: int = 80, protocol: str = "tcp", **options: Any) -> Answer:
        return call(self.net[who].namespace, address, port, protocol, **options)

    def who(self, caller: str, address: str, port: int = 80, count: int = 8, protocol: str = "tcp") -> set[str]:
        return set(calls(self.net[caller].namespace, address, port, count, protocol))


@pytest.fixture
def serving(net: PodNet) -> Iterator[Serving]:
    with net["n1"].namespace.enter():
        made = Serving(net)
    yield made
    made.node.backend.close()
    net.flush()


@every_family
@every_protocol
@pytest.mark.parametrize("caller", ["a", "n1", "x", "client"])
def test_every_address_is_served_to_everybody_by_every_endpoint(
    serving: Serving, family: Family, protocol: str, caller: str
) -> None:
    serving.serve("bcx" if caller != "x" else "bcy")
    for address, port in ((CLUSTER_IP[family], 80), (BALANCER_IP[family], 80), (NODE[family], NODE_PORT)):
        found = serving.who(caller, address, port, 6, protocol)
        assert found == (set("bcx") if caller != "x" else set("bcy")), address


@every_family
def test_sctp_is_served(serving: Serving, family: Family) -> None:
    serving.serve("b")
    source, target = (serving.net[name].of(int(family)) for name in ("a", "b"))
    for address, port in ((CLUSTER_IP[family], 80), (BALANCER_IP[family], 80), (NODE[family], NODE_PORT)):
        flow = Flow(source, target, "sctp", 8080, via=(address, port))
        assert serving.net.probes.try_all([flow], 1.0) == {flow: "open"}


@every_family
def test_connections_go_by_turns(serving: Serving, family: Family) -> None:
    serving.serve("bcdx")
    found = calls(serving.net["a"].namespace, CLUSTER_IP[family], 80, 40)
    assert set(found.values()) == {10} and set(found) == set("bcdx")


@every_family
@pytest.mark.parametrize(
    ("caller", "endpoint", "seen"),
    [
        ("a", "b", "a"),  # pods see pods
        ("a", "x", "a"),
        ("client", "b", "client"),  # a client from outside is seen where no other node is on the way
        ("client", "x", "n1"),
        ("n1", "b", "n1"),
        ("n1", "x", "n1"),
    ],
)
def test_whom_an_endpoint_sees(serving: Serving, family: Family, caller: str, endpoint: str, seen: str) -> None:
    serving.serve(endpoint)
    for address, port in ((CLUSTER_IP[family], 80), (NODE[family], NODE_PORT)):
        answer = serving.call(caller, address, port)
        assert answer.who == endpoint
        own = NODES[family] if seen == "n1" else serving.net[seen].addresses
        own = (NODE[family],) if endpoint == "x" and seen == "n1" else own
        assert answer.seen in own, f"{address}: {answer}"


@every_family
def test_masquerade_all_hides_pods_too(net: PodNet, family: Family) -> None:
    with net["n1"].namespace.enter():
        serving = Serving(net, masquerade_all=True)
    serving.serve("x")
    for address, port in ((CLUSTER_IP[family], 80), (NODE[family], NODE_PORT)):
        answer = serving.call("a", address, port)
        assert (answer.who, answer.seen) == ("x", NODE[family])
    serving.node.backend.close()
    net.flush()


@every_family
@every_protocol
def test_a_pod_reaches_itself_and_sees_the_service(serving: Serving, family: Family, protocol: str) -> None:
    serving.serve("b")
    for address, port in ((CLUSTER_IP[family], 80), (BALANCER_IP[family], 80), (NODE[family], NODE_PORT)):
        answer = serving.call("b", address, port, protocol)
        assert (answer.who, answer.seen) == ("b", address)


@every_family
@every_protocol
@pytest.mark.parametrize("caller", ["a", "n1", "client"])
def test_without_an_endpoint_a_connection_is_refused_at_once(
    serving: Serving, family: Family, protocol: str, caller: str
) -> None:
    serving.serve("")
    began = time.monotonic()
    for address, port in ((CLUSTER_IP[family], 80), (BALANCER_IP[family], 80), (NODE[family], NODE_PORT)):
        assert serving.call(caller, address, port, protocol).who == "refused", address
    assert time.monotonic() - began < 0.5
    serving.serve("b")
    assert serving.call(caller, CLUSTER_IP[family], 80, protocol).who == "b"


@every_family
@pytest.mark.parametrize("caller", ["a", "n1", "client"])
def test_other_ports_of_a_virtual_address_are_refused_and_pings_answered(
    serving: Serving, family: Family, caller: str
) -> None:
    serving.serve("b")
    assert serving.call(caller, CLUSTER_IP[family], 81).who == "refused"
    assert serving.call(caller, BALANCER_IP[family], 22, "udp").who == "refused"
    serving.net[caller].namespace.run(f"ping -c 1 -W 1 {CLUSTER_IP[family]}")


@every_family
def test_an_unserved_node_port_and_the_nodes_own_ports_are_the_nodes(serving: Serving, family: Family) -> None:
    serving.serve("b")
    assert serving.call("client", NODE[family], PORT).who == "n1"
    assert serving.call("client", NODE[family], NODE_PORT + 1).who == "refused"


@every_family
def test_policy_local_outside_gets_local_endpoints_and_inside_gets_all(serving: Serving, family: Family) -> None:
    serving.serve("bx", external_traffic_policy="Local")
    for address, port in ((BALANCER_IP[family], 80), (NODE[family], NODE_PORT)):
        assert serving.who("client", address, port) == {"b"}
        assert serving.call("client", address, port).seen in serving.net["client"].addresses
        assert serving.who("a", address, port) == {"b", "x"}
        assert serving.who("n1", address, port) == {"b", "x"}
    assert serving.who("client", CLUSTER_IP[family]) == {"b", "x"}
    serving.serve("x", external_traffic_policy="Local")
    for address, port in ((BALANCER_IP[family], 80), (NODE[family], NODE_PORT)):
        assert serving.who("client", address, port, 2) == {"refused"}
        assert serving.who("a", address, port, 2) == {"x"}


@every_family
def test_internal_policy_local(serving: Serving, family: Family) -> None:
    serving.serve("bx", internal_traffic_policy="Local")
    assert serving.who("a", CLUSTER_IP[family]) == serving.who("client", CLUSTER_IP[family]) == {"b"}
    assert serving.who("client", BALANCER_IP[family]) == {"b", "x"}
    serving.serve("x", internal_traffic_policy="Local")
    assert serving.who("a", CLUSTER_IP[family], count=2) == {"refused"}


@every_family
def test_source_ranges_are_of_the_load_balancers_address(serving: Serving, family: Family) -> None:
    allowed = ("192.0.2.0/28", "2001:db8::/124")
    serving.serve("b", load_balancer_source_ranges=allowed)
    near, far = (("192.0.2.2", "192.0.2.66"), ("2001:db8::2", "2001:db8::66"))[family is V6]
    assert serving.call("client", BALANCER_IP[family], 80, source=(near, 0)).who == "b"
    assert serving.call("client", BALANCER_IP[family], 80, source=(far, 0)).who == "silent"
    assert serving.call("client", NODE[family], NODE_PORT, source=(far, 0)).who == "b"
    assert serving.call("client", CLUSTER_IP[family], 80, source=(far, 0)).who == "b"
    assert serving.call("a", BALANCER_IP[family], 80).who == "silent"


@every_family
@every_protocol
def test_affinity_is_kept_lost_with_its_endpoint_and_passes_away(
    serving: Serving, family: Family, protocol: str
) -> None:
    sticky = {"session_affinity": "ClientIP", "affinity_timeout": 1}
    serving.serve("bcd", **sticky)
    for caller, address, port in (("a", CLUSTER_IP[family], 80), ("client", NODE[family], NODE_PORT)):
        first = serving.who(caller, address, port, 6, protocol)
        assert len(first) == 1, "one client, one endpoint"
        left = "bcd".replace(next(iter(first)), "")
        serving.serve(left, **sticky)
        second = serving.who(caller, address, port, 6, protocol)
        assert len(second) == 1 and second < set(left)
        serving.serve("bcd", **sticky)
        assert serving.who(caller, address, port, 3, protocol) == second, "who returns does not take clients back"
    assert serving.node.remembered(family)
    began = time.monotonic()
    while serving.node.remembered(family) and time.monotonic() - began < 5:
        time.sleep(0.05)
    assert not serving.node.remembered(family), "what has passed away is forgotten"


@every_family
def test_affinity_is_a_clients_own(serving: Serving, family: Family) -> None:
    serving.serve("bcd", session_affinity="ClientIP")
    mine = {who: serving.who(who, CLUSTER_IP[family], count=4) for who in ("a", "n1", "client")}
    assert all(len(found) == 1 for found in mine.values())
    assert len(set().union(*mine.values())) == 3, "the first three clients go by turns"


@every_family
def test_a_source_hash_is_constant_for_a_client_and_spreads_clients(serving: Serving, family: Family) -> None:
    serving.serve("bcd", annotations={"kube-router.io/service.scheduler": "sh"})
    clients = [address for address in serving.net["client"].addresses if (":" in address) == (family is V6)]
    found = {}
    for source in clients:
        answers = {serving.call("client", CLUSTER_IP[family], source=(source, 0)).who for _ in range(4)}
        assert len(answers) == 1
        found[source] = answers.pop()
    serving.serve("bcd", annotations={"kube-router.io/service.scheduler": "mh"})
    for source, who in found.items():
        assert serving.call("client", CLUSTER_IP[family], source=(source, 0)).who == who


@every_family
def test_by_port_a_clients_connections_are_spread(serving: Serving, family: Family) -> None:
    names = {"kube-router.io/service.scheduler": "mh", "kube-router.io/service.schedflags": "flag-2"}
    serving.serve("bcd", annotations=names)
    assert serving.who("a", CLUSTER_IP[family], count=40) == set("bcd")


@every_family
def test_established_connections_outlive_everything_that_is_done_to_their_service(
    serving: Serving, family: Family
) -> None:
    serving.serve("b")
    with connected(serving.net["a"].namespace, CLUSTER_IP[family], 80) as end:
        assert heard(end).who == "b"
        for change in (lambda: serving.serve("c"), lambda: serving.serve(""), serving.node.restart):
            with serving.space.enter():
                change()
            end.send(b"?")
            assert heard(end).who == "b"
        with serving.space.enter():
            serving.node.drop(("services", "shop/web"))
        end.send(b"?")
        assert heard(end).who == "b"


@every_family
def test_an_endpoint_drains_without_a_failed_call(serving: Serving, family: Family) -> None:
    answers: set[str] = set()
    for round_ in range(30):
        serving.serve("bc" if round_ % 2 else "bcdx")
        answers |= serving.who("a", CLUSTER_IP[family], count=6)
    assert answers == set("bcdx")


@every_family
def test_terminating_endpoints_serve_while_there_is_nobody_else(serving: Serving, family: Family) -> None:
    leaving = backed(serving.net, "b", ready=False, serving=True, terminating=True)
    serving.put(web(), *leaving)
    assert serving.who("a", CLUSTER_IP[family], count=3) == {"b"}
    both = [msgspec.structs.replace(item, name=f"{item.name}-2") for item in backed(serving.net, "c")]
    serving.put(*both)  # type: ignore[arg-type]
    assert serving.who("a", CLUSTER_IP[family], count=6) == {"c"}


@every_family
def test_node_ports_on_every_address(net: PodNet, family: Family) -> None:
    others = {V4: ("192.0.2.1", "10.244.1.1"), V6: ("2001:db8::1", "fd00:244:1::1")}[family]
    with net["n1"].namespace.enter():
        first = Serving(net)
    first.serve("b")
    assert first.call("client", others[0], NODE_PORT).who == "refused"
    first.node.backend.close()
    with net["n1"].namespace.enter():
        every = Serving(net, nodeport_bindon_all_ip=True)
    every.serve("b")
    for address in (*others, NODE[family]):
        assert every.call("client", address, NODE_PORT).who == "b"
        assert every.call("n1", address, NODE_PORT).who == "b"
    every.node.backend.close()
    net.flush()


def test_an_external_ip_that_is_the_nodes_own_takes_its_port_alone(net: PodNet) -> None:
    with net["n1"].namespace.enter():
        serving = Serving(net, strict_external_ip_validation=False)
    serving.serve("b", external_ips=(NODE[V4],))
    assert serving.call("client", NODE[V4], 80).who == "b"
    assert serving.call("client", NODE[V4], PORT).who == "n1"
    serving.serve("", external_ips=(NODE[V4],))
    assert serving.call("client", NODE[V4], 80).who == "refused"
    serving.node.backend.close()
    net.flush()


@every_family
@pytest.mark.parametrize("where", ["cluster IP", "node port"])
def test_a_udp_client_of_one_port_is_led_on_when_its_endpoint_goes_and_only_it(
    serving: Serving, family: Family, where: str
) -> None:
    address, port = (CLUSTER_IP[family], 80) if where == "cluster IP" else (NODE[family], NODE_PORT)
    client = serving.net["client"].of(int(family))
    serving.serve("b")
    target = serving.net["b"].of(int(family))
    assert serving.call("client", address, port, "udp", source=(client, 5000)).who == "b"
    assert serving.call("client", target, PORT, "udp", source=(client, 5001)).who == "b"
    assert serving.call("client", BALANCER_IP[family], 80, "udp", source=(client, 5002)).who == "b"
    with connected(serving.net["client"].namespace, address, port) as end:
        assert heard(end).who == "b"
        serving.serve("c")
        assert serving.call("client", address, port, "udp", source=(client, 5000)).who == "c"
        end.send(b"?")
        assert heard(end).who == "b", "TCP drains"
    tracked = serving.space.run(f"conntrack -L -f ipv{int(family)} -p udp 2>/dev/null")
    assert "sport=5001" in tracked, "what was never translated is not cut"
    assert len([line for line in tracked.splitlines() if "sport=5000" in line]) == 1


@every_family
def test_network_policy_sees_the_pod_and_not_the_service(serving: Serving, family: Family) -> None:
    names = ("a", "b", "c", "d")
    objects = [
        ApiNamespace(name="default", labels={}),
        *(serving.net.pod(name) for name in names),
        policy("default/only-a", select(pod="b"), ingress=[rule(pods(pod="a"))]),
    ]
    wall = Standing("n1", serving.space, Firewall)
    assert not wall.apply(objects, Frame(families=tuple(Family))).failures
    try:
        serving.serve("b")
        for address, port in ((CLUSTER_IP[family], 80), (NODE[family], NODE_PORT), (BALANCER_IP[family], 80)):
            assert serving.call("a", address, port).who == "b"
            assert serving.call("d", address, port).who in ("refused", "silent")
            assert serving.call("client", address, port).who in ("refused", "silent")
        serving.serve("c")
        assert serving.call("d", CLUSTER_IP[family]).who == "c"
        assert serving.call("client", BALANCER_IP[family]).who == "c"
    finally:
        wall.backend.close()
