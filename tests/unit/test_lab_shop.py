"""The lab's example of network policy: its expectations are the specification's, and its probes tell what happens."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from collections.abc import Iterator

import pytest
import yaml
from lab import connections, probe, shop
from lab.topology import NODES, LabPod, namespace_manifest, pod_manifest

from kube_router.ipc.messages import Kind, Projection
from kube_router.workers.firewall.rules import Frame
from kube_router.workers.firewall.verdict import ClusterState, Hook, Packet, evaluate
from kube_router.workers.model import Family
from kube_router.workers.watcher.manifestfile import parse_manifest

ADDRESSES = {pod.short: (f"10.244.9.{number}", f"fd00:244:9::{number}") for number, pod in enumerate(shop.PODS, 2)}
NODE1 = tuple(str(address.ip) for address in NODES[0].addresses)


def objects(stage: shop.Stage) -> dict[Kind, dict[str, Projection]]:
    """The cluster of a stage, as the watcher reads it from the files that a user can copy."""
    manifests = [
        *(namespace_manifest(name) for name in ("shop", "other")),
        *(pod_manifest(pod, ADDRESSES[pod.short]) for pod in shop.PODS),
        *(shop.MANIFESTS[name] for name in stage.manifests),
    ]
    found: dict[Kind, dict[str, Projection]] = {"pods": {}, "namespaces": {}, "networkpolicies": {}}
    for manifest in manifests:
        content = parse_manifest(yaml.safe_dump(manifest).encode())
        assert content.broken == ()
        for kind, item in content.objects:
            found[kind][item.key] = item
    return found


def passes(stage: shop.Stage, question: shop.Question, family: int) -> bool:
    """Whether every node on the way lets the packet pass, by the specification alone."""
    source = NODE1[family] if question.source == "node1" else ADDRESSES[question.source][family]
    packet = Packet(source, ADDRESSES[shop.SERVER.short][family], port=question.port)
    nodes = {pod.node for pod in shop.PODS if pod.short in (question.source, shop.SERVER.short)}
    found = objects(stage)
    for node in nodes:
        state = ClusterState(
            node,
            found["pods"],  # type: ignore[arg-type]
            found["namespaces"],  # type: ignore[arg-type]
            found["networkpolicies"],  # type: ignore[arg-type]
            Frame(families=(Family.IPV4, Family.IPV6)),
            frozenset(NODE1 if node == "node1" else ()),
        )
        hook = Hook.OUTPUT if question.source == node else Hook.FORWARD
        seen = Packet(packet.source, packet.destination, port=packet.port, hook=hook)
        if not evaluate(state, seen).allowed:
            return False
    return True


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("stage", shop.STAGES, ids=lambda stage: stage.title)
def test_what_the_lab_expects_is_what_the_specification_says(stage: shop.Stage, family: int) -> None:
    assert {question for question in shop.QUESTIONS if passes(stage, question, family)} == set(stage.allowed)


def test_a_policy_file_to_try_can_be_read_by_the_agent() -> None:
    for manifest in shop.MANIFESTS.values():
        content = parse_manifest(yaml.safe_dump(manifest, sort_keys=False).encode())
        assert content.broken == () and content.objects


def test_an_answer_that_the_stage_does_not_expect_is_told() -> None:
    question, *others = shop.QUESTIONS
    found = {item: {"IPv4": True, "IPv6": True} for item in others} | {question: {"IPv4": True, "IPv6": False}}
    assert connections.wrong(found, shop.STAGES[0]) == [f"{question.text}, IPv6: blocked"]
    assert connections.verdict_rows([("now", found)])[1][1] == "only IPv4"
    closed = {item: {"IPv4": False, "IPv6": False} for item in shop.QUESTIONS}
    assert len(connections.wrong(closed, shop.STAGES[0])) == 2 * len(shop.QUESTIONS)
    assert connections.wrong({**closed, shop.FROM_NODE: {"IPv4": True, "IPv6": True}}, shop.STAGES[1]) == []


def test_pods_of_one_name_in_two_namespaces_stay_apart() -> None:
    assert LabPod("a", "x", "node1").short != LabPod("b", "x", "node1").short


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """Port of a probe's server on this host's loopback."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port: int = held.getsockname()[1]
    process = subprocess.Popen([*connections.PROBE, "serve", str(port)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    yield port
    process.kill()
    process.communicate()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_probe_tells_an_answer_from_a_refusal_and_from_silence(server: int, address: str) -> None:
    with (
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as mute,
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as closed,
    ):
        mute_port, closed_port = mute.getsockname()[1], closed.getsockname()[1]
        closed.close()
        targets = [(address, server), (address, mute_port), (address, closed_port)]
        assert asyncio.run(probe.ask(targets, None)) == [{probe.ANSWERED: 1}, {probe.OPENED: 1}, {"ECONNREFUSED": 1}]


def test_a_steady_probe_goes_on_until_its_input_ends(server: int) -> None:
    command = [*connections.PROBE, "ask", "--every", "0.01", f"127.0.0.1,{server}", f"::1,{server}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    output, _ = process.communicate(timeout=10)
    seen = json.loads(output)
    assert [list(counts) for counts in seen] == [[probe.ANSWERED]] * 2
    assert all(counts[probe.ANSWERED] > 10 for counts in seen)
