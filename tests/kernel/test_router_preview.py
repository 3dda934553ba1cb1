"""``plan router`` against a real gobgpd and a real kernel: the truth is told, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.gobgpd import BINARIES, attached, wait_for
from support.namespaces import Namespace
from support.routernode import HOP, RouterNode, router_node

from kube_router.workers.router.plan import AddNeighbor, RemovePath, SetPolicies, StartSpeaker
from kube_router.workers.router.preview import PlanError, View, rehearse
from kube_router.workers.settings import Secrets

LEARNED = {"100.64.1.0/24": HOP[4], "2001:db8:1::/48": HOP[6]}


@pytest.fixture(params=BINARIES, ids=lambda generation: f"gobgpd{generation}")
def lone(request: pytest.FixtureRequest, netns: Namespace, tmp_path: Path) -> Iterator[RouterNode]:
    with router_node(netns, request.param, tmp_path, bgp_graceful_restart_time=1.0) as started:
        yield started


def looked(lone: RouterNode) -> View:
    """A rehearsal, after which kernel and daemon are as they were before."""
    client = attached(lone.daemon)
    before = lone.everything(), client.observe()
    with lone.namespace.enter():
        view = rehearse(lone.settings, lone.secrets, lone.cluster())
    assert (lone.everything(), client.observe()) == before
    client.close()
    assert view.failures == ()
    return view


def test_what_a_worker_without_memory_would_do_and_nothing_of_it_done(lone: RouterNode) -> None:
    fresh = looked(lone)
    assert isinstance(fresh.plan.steps[0], StartSpeaker)
    assert {SetPolicies, AddNeighbor} <= {type(step) for step in fresh.plan.steps}
    for part in ("ipset create inet6:kube-router-pod-subnets", "MASQUERADE", "kube-bridge"):
        assert any(part in line for line in fresh.kernel), part

    lone.up()
    peer = lone.join()
    peer.announce(["100.64.1.0/24"], HOP[4])
    peer.announce(["2001:db8:1::/48"], HOP[6])
    peer.announce(["192.0.2.0/24"], "172.16.0.1", as_path=[65000])
    lone.until(lambda: lone.routes() == LEARNED, "routes in the kernel")
    view = looked(lone)
    assert (view.plan.steps, view.kernel) == ((), ())
    assert view.actual.paths == {"10.244.1.0/24": "10.0.0.1", "fd00:1::/64": "fd00::1"}
    assert view.learned == {**LEARNED, "192.0.2.0/24": "172.16.0.1"}
    assert {prefix: bool(decision.route) for prefix, decision in view.decisions.items()} == {
        "100.64.1.0/24": True,
        "2001:db8:1::/48": True,
        "192.0.2.0/24": False,
    }
    assert "172.16.0.1" in view.decisions["192.0.2.0/24"].reason

    lone.namespace.run("ip route del 100.64.1.0/24; ip -6 route add 2001:db8:9::/48 via fd00::7 proto 17")
    lone.namespace.run("ipset del kube-router-node-ips 10.0.0.1; iptables-nft -D FORWARD 1")
    client = attached(lone.daemon)
    client.apply_step(RemovePath("10.244.1.0/24", "10.0.0.1"))
    client.close()
    view = looked(lone)
    assert [str(step) for step in view.plan.steps] == ["originate 10.244.1.0/24 via 10.0.0.1"]
    assert "route add 100.64.1.0/24 via 10.0.0.7 proto 17" in view.kernel
    assert "route delete 2001:db8:9::/48 proto 17" in view.kernel
    assert "ipset add kube-router-node-ips 10.0.0.1" in view.kernel
    assert any(line.startswith("iptables-nft -t filter -I FORWARD") for line in view.kernel)
    peer.close()


def test_on_the_word_of_a_stale_snapshot_nothing_goes(lone: RouterNode) -> None:
    lone.up()
    lone.namespace.run("ip route add 203.0.113.0/24 via 10.0.0.7 proto 17")
    stray = ("route delete 203.0.113.0/24 proto 17",)
    wait_for(lambda: looked(lone).kernel == stray, 5, "gobgpd is old enough for its word to count")
    with lone.namespace.enter():
        assert rehearse(lone.settings, lone.secrets, lone.cluster(stale=True)).kernel == ()


def test_a_password_is_in_no_text(lone: RouterNode) -> None:
    lone.secrets = Secrets(peer_router_passwords=("geheim",))
    view = looked(lone)
    text = "\n".join(map(str, view.plan.steps))
    assert "with password" in text and "geheim" not in text


def test_without_a_daemon_there_is_no_plan(lone: RouterNode) -> None:
    lone.daemon.kill(pause=True)
    with lone.namespace.enter(), pytest.raises(PlanError, match="gobgpd"):
        rehearse(lone.settings, lone.secrets, lone.cluster())
