"""Which pods network policy is about, and what it needs of them."""

from __future__ import annotations

import pytest
from support.policyworld import BOTH, NODE, pod

from kube_router.ipc.messages import ContainerPort, Pod
from kube_router.workers.firewall.podfacts import PodFacts, pod_facts
from kube_router.workers.model import Family

WEB = pod("shop/web", 7, ports={"http": 80}, app="web")


def changed(**fields: object) -> Pod:
    return Pod(**{name: getattr(WEB, name) for name in WEB.__struct_fields__} | fields)


def test_facts_of_a_running_pod() -> None:
    assert pod_facts(WEB, NODE, BOTH) == PodFacts(
        key="shop/web",
        namespace="shop",
        uid="uid-shop/web",
        labels={"app": "web"},
        addresses=("10.0.0.7", "fd00::7"),
        ports=(ContainerPort("http", 80, "TCP"),),
        local=True,
        terminating=False,
    )


@pytest.mark.parametrize("phase", ["Running", "Pending", "Unknown", ""])
def test_a_pod_counts_as_soon_as_it_has_an_address(phase: str) -> None:
    assert pod_facts(changed(phase=phase), NODE, BOTH) is not None
    assert pod_facts(changed(phase=phase, ips=()), NODE, BOTH) is None


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_finished_pod_is_out_at_once(phase: str) -> None:
    assert pod_facts(changed(phase=phase), NODE, BOTH) is None


@pytest.mark.parametrize("seconds", [0, 30])
def test_a_terminating_pod_counts_to_the_end(seconds: int) -> None:
    facts = pod_facts(changed(deletion_seconds=seconds), NODE, BOTH)
    assert facts is not None
    assert facts.terminating


def test_a_pod_on_the_hosts_network_is_no_pod_to_policy() -> None:
    assert pod_facts(changed(host_network=True), NODE, BOTH) is None


@pytest.mark.parametrize(
    ("family", "address"), [(Family.IPV4, "10.0.0.7"), (Family.IPV6, "fd00::7")], ids=["IPv4", "IPv6"]
)
def test_only_enabled_families_count(family: Family, address: str) -> None:
    facts = pod_facts(WEB, NODE, (family,))
    assert facts is not None
    assert facts.addresses == (address,)
    other = [text for text in WEB.ips if text != address]
    assert pod_facts(changed(ips=tuple(other)), NODE, (family,)) is None


def test_addresses_are_canonical_each_once_and_bad_ones_are_left_out() -> None:
    texts = ("10.0.0.7", "FD00:0::7", "", "10.0.0.300", "fd00::7", "10.0.0.7", "10.0.0.8")
    facts = pod_facts(changed(ips=texts), NODE, BOTH)
    assert facts is not None
    assert facts.addresses == ("10.0.0.7", "fd00::7", "10.0.0.8")


def test_local_is_who_was_scheduled_here() -> None:
    for node, local in ((NODE, True), ("n2", False), ("", False)):
        facts = pod_facts(changed(node_name=node), NODE, BOTH)
        assert facts is not None
        assert facts.local is local
