"""Open connections and changing policies on the real kernel, with both backends: what is now forbidden is cut."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import msgspec
import pytest
from support.firewallnode import FirewallNode, firewall
from support.namespaces import Namespace
from support.podnet import PodNet, podnet
from support.policyworld import pods, policy, port, rule, select

from kube_router.ipc.messages import Namespace as ApiNamespace
from kube_router.ipc.messages import NetworkPolicy, Node
from kube_router.workers.model import Family
from kube_router.workers.settings import Settings

CUTS = Settings(node_name="n1", enable_ipv6=True, netpol_recheck_established=True)
BACKENDS = {"iptables": CUTS, "nftables": msgspec.structs.replace(CUTS, use_nftables_for_netpol=True)}
FAMILIES = (Family.IPV4, Family.IPV6)


@pytest.fixture(scope="module")
def net() -> Iterator[PodNet]:
    with podnet("abc", "x") as made:
        yield made


@pytest.fixture(params=list(BACKENDS))
def settings(net: PodNet, request: pytest.FixtureRequest) -> Iterator[Settings]:
    yield BACKENDS[request.param]
    net.flush()


def world(net: PodNet, *policies: NetworkPolicy) -> list[object]:
    objects = [Node(name="n1", pod_cidrs=("10.244.1.0/24", "fd00:244:1::/64")), ApiNamespace(name="default")]
    return [*objects, *(net.pod(name) for name in net.pods), *policies]


@contextlib.contextmanager
def worker(net: PodNet, settings: Settings, *policies: NetworkPolicy) -> Iterator[FirewallNode]:
    with net["n1"].namespace.enter(), firewall(settings, *world(net, *policies)) as node:  # type: ignore[arg-type]
        assert node.beat.errors == {}, node.beat.warnings
        yield node


class Talk:
    """One open TCP connection; either end can speak."""

    def __init__(self, net: PodNet, source: str, destination: str, family: Family, number: int) -> None:
        kind = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
        self._stack = contextlib.ExitStack()
        listener = self._stack.enter_context(self._socket(net[destination].namespace, kind))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((net[destination].of(family), number))
        listener.listen()
        self.client = self._stack.enter_context(self._socket(net[source].namespace, kind))
        self.client.connect((net[destination].of(family), number))
        self.server = self._stack.enter_context(listener.accept()[0])
        self.server.settimeout(3)
        assert self.works()

    @staticmethod
    def _socket(namespace: Namespace, kind: int) -> socket.socket:
        with namespace.enter():
            made = socket.socket(kind, socket.SOCK_STREAM)
        made.settimeout(3)
        return made

    def passes(self, sender: socket.socket, receiver: socket.socket, seconds: float = 3.0) -> bool:
        """Whether a byte that one end sends reaches the other."""
        receiver.settimeout(seconds)
        try:
            sender.sendall(b"x")
            return receiver.recv(1) == b"x"
        except OSError:
            return False

    def works(self) -> bool:
        """In both directions."""
        return self.passes(self.client, self.server) and self.passes(self.server, self.client)

    def close(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def talks(net: PodNet, *pairs: tuple[str, str]) -> Iterator[dict[tuple[str, str, Family], Talk]]:
    """A connection in each family for each pair (source, destination)."""
    with contextlib.ExitStack() as stack:
        made = {}
        for index, (source, destination) in enumerate(pairs):
            for family in FAMILIES:
                talk = made[source, destination, family] = Talk(net, source, destination, family, 9000 + index)
                stack.callback(talk.close)
        yield made


PAIRS = (("a", "b"), ("c", "b"), ("x", "b"), ("a", "c"), ("client", "c"))


def test_a_policy_that_forbids_open_connections_cuts_those_and_leaves_the_others(
    net: PodNet, settings: Settings
) -> None:
    only_c = policy("default/only-c", select(pod="b"), ingress=[rule(pods(pod="c"))])
    with worker(net, settings) as node, talks(net, *PAIRS) as open_ones:
        node.put(only_c)
        assert node.beat.errors == {}, node.beat.warnings
        assert node.beat.counters["policy_connections_cut"] == 4
        doomed = {("a", "b"), ("x", "b")}
        for (source, destination, _), talk in open_ones.items():
            if (source, destination) in doomed:
                # The end that policy lets talk speaks first: it must not bring the connection back.
                assert not talk.passes(talk.server, talk.client, 0.5)
                assert not talk.passes(talk.client, talk.server, 0.5)
                with pytest.raises(OSError, match=r"reset|Broken pipe"):
                    talk.client.sendall(b"x")
            else:
                assert talk.works(), (source, destination)


def test_a_peer_that_leaves_a_set_loses_its_connections(net: PodNet, settings: Settings) -> None:
    friends = policy("default/friends", select(pod="b"), ingress=[rule(pods(friend="yes"), ports=[port(9000, 9010)])])
    with worker(net, settings, friends) as node:
        node.put(net.pod("a", {"friend": "yes"}), net.pod("x", {"friend": "yes"}))
        with talks(net, ("a", "b"), ("x", "b"), ("a", "c")) as open_ones:
            node.put(net.pod("x"))
            assert node.beat.counters["policy_connections_cut"] == 2
            for (source, destination, _), talk in open_ones.items():
                assert talk.works() is ((source, destination) != ("x", "b")), (source, destination)


def test_egress_that_becomes_forbidden_is_cut(net: PodNet, settings: Settings) -> None:
    with worker(net, settings) as node, talks(net, ("a", "x"), ("a", "b"), ("b", "x")) as open_ones:
        node.put(policy("default/stay", select(pod="a"), egress=[rule(pods(pod="b"))]))
        for (source, destination, _), talk in open_ones.items():
            assert talk.works() is ((source, destination) != ("a", "x")), (source, destination)


def test_without_the_flag_open_connections_go_on(net: PodNet, settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, netpol_recheck_established=False)
    with worker(net, settings) as node, talks(net, ("a", "b"), ("x", "b")) as open_ones:
        node.put(policy("default/none", select(pod="b"), ingress=[]))
        assert "policy_connections_cut" not in node.beat.counters
        assert all(talk.works() for talk in open_ones.values())


def test_what_happened_while_no_worker_ran_is_made_up_for_at_its_start(net: PodNet, settings: Settings) -> None:
    with worker(net, settings):
        pass
    with talks(net, ("a", "b"), ("a", "c")) as open_ones:
        with worker(net, settings, policy("default/none", select(pod="b"), ingress=[])) as node:
            assert node.beat.counters["policy_connections_cut"] == 2
        for (source, destination, _), talk in open_ones.items():
            assert talk.works() is (destination == "c"), (source, destination)
