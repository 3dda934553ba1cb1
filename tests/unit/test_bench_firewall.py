"""What the firewall's benchmarks stand on: clusters that are the same each time, and a baseline that makes sense."""

from __future__ import annotations

import itertools
import re
import shlex

import msgspec
import pytest
from bench.firewall_shapes import (
    LARGE,
    MIDDLE,
    NODE,
    SMALL,
    Objects,
    Shape,
    apply,
    churn_events,
    crowded,
    local_pods,
    member_events,
    objects,
    pods_of,
    policy_events,
    wide_policy,
)
from bench.upstream_netpol import COMMON, DEFAULT, TAIL, TOP, hashed, restore_script, tables, temporary_name

from kube_router.ipc.messages import NetworkPolicy
from kube_router.workers.firewall.policies import compile_policy
from kube_router.workers.model import Family

STANDING = {COMMON, DEFAULT, TAIL, *TOP.values()}


def written(found: Objects) -> bytes:
    """All objects as they would go over the wire."""
    return msgspec.msgpack.encode([[*of_kind.values()] for of_kind in found.values()])


@pytest.mark.parametrize("shape", [SMALL, MIDDLE, LARGE])
def test_a_shape_has_its_sizes_and_is_the_same_each_time(shape: Shape) -> None:
    found = objects(shape)
    assert written(found) == written(objects(shape))
    sizes = [len(found[kind]) for kind in ("pods", "namespaces", "networkpolicies")]  # type: ignore[index]
    assert sizes == [shape.pods, shape.namespaces, shape.policies]
    assert len(local_pods(found)) == shape.local
    addresses = [text for pod in pods_of(found).values() for text in pod.ips]
    assert len(set(addresses)) == 2 * shape.pods


def test_every_policy_of_a_shape_is_a_good_one() -> None:
    for item in objects(MIDDLE)["networkpolicies"].values():
        assert isinstance(item, NetworkPolicy)
        assert not compile_policy(item, tuple(Family)).problems
    assert not compile_policy(wide_policy(objects(SMALL)), tuple(Family)).problems


@pytest.mark.parametrize("shape", [SMALL, MIDDLE])
def test_events_are_the_same_each_time_and_fit_the_cluster(shape: Shape) -> None:
    ends = []
    for _ in range(2):
        found = objects(shape)
        for changes in member_events(found, shape, 40):
            ((key, (old, new)),) = changes["pods"].items()
            assert found["pods"].get(key) == old != new
            assert (new or old).node_name != NODE  # type: ignore[union-attr]
            apply(found, changes)
        assert written(found) == written(objects(shape)), "each change is taken back"
        for changes in itertools.islice(churn_events(found, shape), 500):
            apply(found, changes)
        for _new, changes in policy_events(found, 5):
            apply(found, changes)
        assert len(found["networkpolicies"]) == shape.policies + 5
        ends.append(written(found))
    assert ends[0] == ends[1]


def test_a_crowded_node_has_so_many_policies_a_pod() -> None:
    found = crowded(LARGE, 3)
    assert len(local_pods(found)) == len(found["pods"]) == LARGE.local
    assert len(found["networkpolicies"]) == 3 * LARGE.local


def test_the_baseline_names_what_upstream_names() -> None:
    """Vectors of upstream's own tests."""
    assert hashed("default", "debug", Family.IPV4) == "C2EUPKL23CCP4COF"
    assert hashed("default", "debug", Family.IPV6) == "VY6KNKQ4BF6Y4J2K"
    assert hashed("default", "debug", "egressrule", 0, Family.IPV4, "pod") == "P226T6HGLTLDGDLC"
    assert hashed("default", "whoami", "ingressrule", 0, Family.IPV4, "ipblock") == "KLLOHJLFVAV654Z2"
    assert temporary_name("hash:ip timeout 0 family inet6") == "TMP-3TF2IQ5MKRP6NAJL"


@pytest.mark.parametrize("family", Family)
def test_the_baseline_refers_only_to_what_it_makes(family: Family) -> None:
    found = objects(SMALL)
    made = tables(found, NODE, "1")[family]
    assert len(made.policy_chains) == SMALL.policies
    assert len(made.pod_chains) == SMALL.local
    chains = {*made.policy_chains, *(chain for chain, _ in made.pod_chains), *STANDING}
    lines = [*made.policy_lines, *(line for _, lines in made.pod_chains for line in lines)]
    used = set()
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "-A" and words[1] in chains and len(words[1]) <= 28
        target = words[words.index("-j") + 1]
        assert target in chains or target in {"ACCEPT", "RETURN", "REJECT", "MARK", "NFLOG"}
        used |= {words[at + 1] for at, word in enumerate(words) if word == "--match-set"}
    assert used and used <= set(made.sets)
    assert all(len(name) <= 31 and name.startswith("inet6:") == (family is Family.IPV6) for name in made.sets)
    jumps = [line for line in lines if re.match(r"-A KUBE-ROUTER-(INPUT|FORWARD|OUTPUT) ", line)]
    assert len(jumps) == 7 * SMALL.local


def test_the_baseline_fills_and_swaps_every_set() -> None:
    made = tables(objects(SMALL), NODE, "1")[Family.IPV6]
    script = restore_script(made.sets, {})
    assert {line.split()[2] for line in script.splitlines() if line.startswith("swap ")} == set(made.sets)
    entries = sum(len(members) for _, members in made.sets.values())
    assert sum(line.startswith("add TMP-") for line in script.splitlines()) == entries
    assert "create TMP-3TF2IQ5MKRP6NAJL hash:ip timeout 0 family inet6\n" in script
