"""Node facts: addresses, pod CIDRs, ASN and overlaps, each against upstream's rules and the issue's."""

from __future__ import annotations

import ipaddress

import pytest

from kube_router.ipc.messages import Node, NodeAddress
from kube_router.workers.model import Family, parse_network
from kube_router.workers.nodefacts import (
    DEPRECATED_ANNOTATION,
    INVALID_ASN,
    INVALID_NODE_ADDRESS,
    INVALID_POD_CIDR,
    MISSING_NODE_ADDRESS,
    NODE_ASN,
    OVERLAPPING_POD_CIDR,
    POD_CIDR,
    POD_CIDRS,
    NodeFacts,
    node_facts,
    overlapping_pod_cidrs,
    parse_base0,
)

BOTH = (Family.IPV4, Family.IPV6)
V4, V6 = "192.0.2.1", "2001:db8::1"


def node(
    *addresses: str,
    name: str = "n1",
    external: tuple[str, ...] = (),
    pod_cidr: str = "",
    pod_cidrs: tuple[str, ...] = (),
    **annotations: str,
) -> Node:
    keys = {"pod_cidr": POD_CIDR, "pod_cidrs": POD_CIDRS, "asn": NODE_ASN}
    return Node(
        name=name,
        uid="u1",
        addresses=(
            NodeAddress("Hostname", "n1"),
            *(NodeAddress("ExternalIP", address) for address in external),
            *(NodeAddress("InternalIP", address) for address in addresses),
        ),
        pod_cidr=pod_cidr,
        pod_cidrs=pod_cidrs,
        annotations={keys[key.removeprefix("annotation_")]: value for key, value in annotations.items()},
    )


def cidrs(facts: NodeFacts) -> list[str]:
    return [str(cidr) for cidr in facts.pod_cidrs]


def reasons(facts: NodeFacts) -> list[str]:
    return [problem.reason for problem in facts.problems]


# --- addresses


def test_primary_is_the_first_internal_address_whatever_stands_before_it() -> None:
    facts = node_facts(node(V6, V4, external=("198.51.100.1",)), BOTH)
    assert str(facts.primary) == V6
    assert [str(address) for address in facts.addresses] == [V6, V4, "198.51.100.1"]
    assert str(facts.address(Family.IPV4)) == V4
    assert facts.problems == ()


def test_primary_is_an_external_address_when_there_is_no_internal_one() -> None:
    facts = node_facts(node(external=("198.51.100.1", "2001:db8:f::1")), BOTH)
    assert str(facts.primary) == "198.51.100.1"
    assert facts.families == BOTH


def test_an_address_that_is_both_internal_and_external_counts_once() -> None:
    assert len(node_facts(node(V4, external=(V4,)), (Family.IPV4,)).addresses) == 1


@pytest.mark.parametrize(("families", "expected"), [((Family.IPV4,), V4), ((Family.IPV6,), V6)])
def test_a_family_that_is_not_enabled_does_not_exist(families: tuple[Family, ...], expected: str) -> None:
    facts = node_facts(node(V6, V4, pod_cidrs=("10.0.0.0/24", "fd00::/64")), families)
    assert [str(address) for address in facts.addresses] == [expected]
    assert str(facts.primary) == expected
    assert facts.families == families
    assert {cidr.version for cidr in facts.pod_cidrs} == set(families)
    assert facts.problems == ()


@pytest.mark.parametrize(("present", "missing"), [(V4, "IPv6"), (V6, "IPv4")])
def test_an_enabled_family_without_address_is_told(present: str, missing: str) -> None:
    facts = node_facts(node(present), BOTH)
    assert reasons(facts) == [MISSING_NODE_ADDRESS]
    assert f"node n1: status.addresses: {missing} was enabled" in facts.problems[0].text


@pytest.mark.parametrize(
    "bad", ["", "192.0.2.256", "192.0.2.01", "fe80::1%eth0", "node-1", "192.0.2.1/24", " 192.0.2.1"]
)
def test_a_bad_address_is_named_and_the_others_count(bad: str) -> None:
    facts = node_facts(node(bad, V4), (Family.IPV4,))
    assert str(facts.primary) == V4
    assert reasons(facts) == [INVALID_NODE_ADDRESS]
    assert repr(bad) in facts.problems[0].text


def test_an_ipv4_mapped_address_is_ipv4() -> None:
    assert str(node_facts(node("::ffff:192.0.2.1"), (Family.IPV4,)).primary) == V4


# --- pod CIDRs


def test_order_of_sources() -> None:
    everything = {
        "pod_cidr": "10.4.0.0/24",
        "pod_cidrs": ("10.3.0.0/24",),
        "annotation_pod_cidrs": "10.2.0.0/24",
        "annotation_pod_cidr": "10.1.0.0/24",
    }
    for expected, remove in (
        ("10.1.0.0/24", "annotation_pod_cidr"),
        ("10.2.0.0/24", "annotation_pod_cidrs"),
        ("10.3.0.0/24", "pod_cidrs"),
        ("10.4.0.0/24", "pod_cidr"),
    ):
        assert cidrs(node_facts(node(V4, **everything), (Family.IPV4,))) == [expected]  # type: ignore[arg-type]
        del everything[remove]
    assert cidrs(node_facts(node(V4), (Family.IPV4,))) == []


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ("10.9.0.0/24", ["10.9.0.0/24", "fd00::/64"]),
        ("fd09::/64", ["10.0.0.0/24", "fd09::/64"]),
        ("fd09::/64,10.9.0.0/24", ["10.9.0.0/24", "fd09::/64"]),
    ],
)
@pytest.mark.parametrize("key", ["annotation_pod_cidr", "annotation_pod_cidrs"])
def test_a_source_with_one_family_does_not_hide_the_other(key: str, annotation: str, expected: list[str]) -> None:
    one = node(V4, V6, pod_cidrs=("10.0.0.0/24", "fd00::/64"), **{key: annotation})  # type: ignore[arg-type]
    assert cidrs(node_facts(one, BOTH)) == expected


def test_the_deprecated_annotation_is_told_once_and_only_when_it_says_something() -> None:
    facts = node_facts(node(V4, annotation_pod_cidr="10.1.0.0/24"), (Family.IPV4,))
    assert reasons(facts) == [DEPRECATED_ANNOTATION]
    assert POD_CIDR in facts.problems[0].text and POD_CIDRS in facts.problems[0].text
    assert reasons(node_facts(node(V4, annotation_pod_cidr=" "), (Family.IPV4,))) == []


def test_annotation_items_are_trimmed_put_in_network_form_and_counted_once() -> None:
    facts = node_facts(node(V4, V6, annotation_pod_cidrs=" fd00:0::5/64 ,10.1.2.3/24, ,10.1.2.0/24,10.1.3.0/24"), BOTH)
    assert cidrs(facts) == ["10.1.2.0/24", "10.1.3.0/24", "fd00::/64"]
    assert facts.problems == ()


@pytest.mark.parametrize(
    "bad",
    [
        "10.1.0.0",
        "10.1.0.0/33",
        "10.1.0.0/",
        "10.1.0.0/255.255.255.0",
        "10.1.0.0/-1",
        "fe80::%1/64",
        "fd00::/129",
        "x/24",
    ],
)
def test_a_bad_item_is_named_and_the_others_count(bad: str) -> None:
    facts = node_facts(node(V4, V6, annotation_pod_cidrs=f"{bad},fd00::/64", pod_cidrs=("10.0.0.0/24",)), BOTH)
    assert cidrs(facts) == ["10.0.0.0/24", "fd00::/64"]
    assert reasons(facts) == [INVALID_POD_CIDR]
    assert f"node n1: annotation {POD_CIDRS}: {bad!r}" in facts.problems[0].text


def test_spec_pod_cidr_serves_only_the_family_that_spec_pod_cidrs_leaves_out() -> None:
    assert cidrs(node_facts(node(V4, V6, pod_cidrs=("fd00::/64",), pod_cidr="10.0.0.0/24"), BOTH)) == [
        "10.0.0.0/24",
        "fd00::/64",
    ]


@pytest.mark.parametrize("text", ["10.0.0.0/8", "fd00::/8", "0.0.0.0/0", "::/0"])
def test_parse_network_takes_what_go_takes(text: str) -> None:
    assert parse_network(text) == ipaddress.ip_network(text)


# --- ASN


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64512", 64512),
        ("4294967295", 4294967295),
        ("64_512", 64512),
        ("0xFC00", 64512),
        ("0x_fc_00", 64512),
        ("0o176000", 64512),
        ("0176000", 64512),
        ("0_176_000", 64512),
        ("0b11", 3),
        ("0B_11", 3),
        ("1", 1),
    ],
)
def test_an_asn_by_the_rules_of_go(text: str, value: int) -> None:
    facts = node_facts(node(V4, asn=text), (Family.IPV4,))
    assert (facts.asn, facts.problems) == (value, ())


@pytest.mark.parametrize(
    "text",
    [
        "",
        " 1",
        "1 ",
        "+1",
        "-1",
        "0",
        "00",
        "4294967296",
        "1_",
        "_1",
        "1__0",
        "0x",
        "0_",
        "089",
        "0b2",
        "1.0",
        "1e3",
        "\u0661",
    ],
)
def test_a_bad_asn_is_named(text: str) -> None:
    facts = node_facts(node(V4, asn=text), (Family.IPV4,))
    assert facts.asn is None
    assert reasons(facts) == [INVALID_ASN]
    assert f"annotation {NODE_ASN}: {text!r}" in facts.problems[0].text


def test_no_asn_is_no_problem() -> None:
    facts = node_facts(node(V4), (Family.IPV4,))
    assert (facts.asn, facts.problems) == (None, ())


def test_base0_zero_is_a_number() -> None:
    assert (parse_base0("0"), parse_base0("00"), parse_base0("0x0")) == (0, 0, 0)


# --- overlaps


def facts_of(name: str, *pod_cidrs: str) -> NodeFacts:
    return node_facts(node(V4, V6, name=name, pod_cidrs=pod_cidrs), BOTH)


@pytest.mark.parametrize(
    ("one", "other"),
    [("10.1.0.0/16", "10.1.5.0/24"), ("fd00::/48", "fd00:0:0:7::/64"), ("10.1.0.0/24", "10.1.0.0/24")],
)
def test_an_overlap_names_both_nodes_and_both_cidrs(one: str, other: str) -> None:
    (overlap,) = overlapping_pod_cidrs([facts_of("b", other), facts_of("a", one), facts_of("c", "10.200.0.0/24")])
    assert overlap.problem.reason == OVERLAPPING_POD_CIDR
    assert overlap.problem.text == f"node a: pod CIDR {one} overlaps {other} of node b"
    assert overlap.involves("a") and overlap.involves("b") and not overlap.involves("c")


def test_neighbours_do_not_overlap_and_families_are_apart() -> None:
    assert overlapping_pod_cidrs([facts_of("a", "10.1.0.0/24", "::/0"), facts_of("b", "10.1.1.0/24")]) == ()


def test_every_contained_cidr_is_told_with_the_smallest_around_it() -> None:
    found = overlapping_pod_cidrs(
        [facts_of("a", "10.0.0.0/8"), facts_of("b", "10.1.0.0/16", "10.2.0.0/16"), facts_of("c", "10.1.1.0/24")]
    )
    assert [(each.node, each.other_node, str(each.other_cidr)) for each in found] == [
        ("a", "b", "10.1.0.0/16"),
        ("b", "c", "10.1.1.0/24"),
        ("a", "b", "10.2.0.0/16"),
    ]


def test_the_order_of_nodes_does_not_matter() -> None:
    nodes = [facts_of("a", "10.0.0.0/8"), facts_of("b", "10.1.0.0/16"), facts_of("c", "10.1.0.0/16")]
    assert overlapping_pod_cidrs(nodes) == overlapping_pod_cidrs(reversed(nodes))
