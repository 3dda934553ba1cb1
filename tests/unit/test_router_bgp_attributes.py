"""Communities, large communities, path prepending and custom rejects: how their annotations are read."""

from __future__ import annotations

import ipaddress

import pytest
from support.bgp import asking, node

from kube_router.workers.router.attributes import (
    MOST_COMMUNITIES,
    MOST_LARGE_COMMUNITIES,
    WELL_KNOWN,
    custom_rejects,
    own_attributes,
)
from kube_router.workers.router.bgpstate import Attributes

NONE = Attributes()
PREFIX = "kube-router.io/"


def read(held: Attributes = NONE, **values: str) -> tuple[Attributes, list[str]]:
    keys = {
        "communities": "node.bgp.communities",
        "large": "node.bgp.large-communities",
        "asn": "path-prepend.as",
        "repeat": "path-prepend.repeat-n",
    }
    found = own_attributes("a", {PREFIX + keys[name]: text for name, text in values.items()}, held)
    return found.attributes, [problem.text for problem in found.problems]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ()),
        (" , ,", ()),
        ("0", ("0:0",)),
        ("4294967295", ("65535:65535",)),
        ("65537", ("1:1",)),
        (" 65000:1 ,0:7", ("0:7", "65000:1")),
        ("65000:10,65000:9,65000:10", ("65000:9", "65000:10")),
        ("no-export,65535:65281,4294967041", ("65535:65281",)),
    ],
)
def test_communities_become_what_gobgpd_reads_back(text: str, wanted: tuple[str, ...]) -> None:
    assert read(communities=text) == (Attributes(communities=wanted), [])


def test_every_well_known_name_is_a_community() -> None:
    attributes, problems = read(communities=",".join(WELL_KNOWN))
    assert len(attributes.communities) == len(WELL_KNOWN) == 14
    assert problems == []
    assert read(communities="blackhole")[0].communities == ("65535:666",)
    assert read(communities="no-export-subconfed, llgr-stale")[0].communities == ("65535:6", "65535:65283")


@pytest.mark.parametrize(
    "bad", ["4294967296", "65536:1", "1:65536", "1:", ":1", "1:2:3", "-1", "0x10", "No-Export", "٣"]
)
def test_a_bad_community_is_named_and_spoils_only_itself(bad: str) -> None:
    attributes, (problem,) = read(communities=f"65000:1,{bad},no-export")
    assert attributes.communities == ("65000:1", "65535:65281")
    assert problem.startswith("node a: annotation kube-router.io/node.bgp.communities: ")
    assert repr(bad) in problem and "\n" not in problem


def test_large_communities_are_three_numbers() -> None:
    text = "64512:1:2, 4294967295:0:4294967295,64512:1:2,1:2,1:2:3:4,1:2:4294967296,a:b:c"
    attributes, (problem,) = read(large=text)
    assert attributes.large_communities == ("64512:1:2", "4294967295:0:4294967295")
    for bad in ("'1:2'", "'1:2:3:4'", "'1:2:4294967296'", "'a:b:c'"):
        assert bad in problem


def test_a_list_of_four_thousand_characters_is_read_and_what_does_not_fit_is_told() -> None:
    fits = ",".join(f"65000:{number}" for number in range(400))
    assert 3500 < len(fits) < 4000
    attributes, problems = read(communities=fits)
    assert (len(attributes.communities), problems) == (400, [])
    attributes, (problem,) = read(communities=",".join(map(str, range(1, 1000))))
    assert len(attributes.communities) == MOST_COMMUNITIES
    assert "999 communities" in problem and str(MOST_COMMUNITIES) in problem
    attributes, (problem,) = read(large=",".join(f"1:2:{number}" for number in range(200)))
    assert len(attributes.large_communities) == MOST_LARGE_COMMUNITIES


def test_garbage_of_any_length_is_one_short_line() -> None:
    for garbage in ("x" * 4000, ",".join("x" * 3 for _ in range(1000)), "{[\n" * 1300):
        attributes, problems = read(communities=garbage, large=garbage)
        assert attributes == NONE
        assert len(problems) == 2
        assert all(len(problem) < 400 and "\n" not in problem for problem in problems)


@pytest.mark.parametrize(
    ("asn", "repeat", "wanted"),
    [
        ("65100", "1", (65100, 1)),
        ("0xfe4c", "0b11", (65100, 3)),
        (" 4294967295 ", "255", (4294967295, 255)),
        ("65_100", "0", None),
    ],
)
def test_prepending_follows_gos_numbers(asn: str, repeat: str, wanted: tuple[int, int] | None) -> None:
    assert read(asn=asn, repeat=repeat) == (Attributes(prepend=wanted), [])


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"asn": "0", "repeat": "1"}, "path-prepend.as"),
        ({"asn": "23456", "repeat": "1"}, "path-prepend.as"),
        ({"asn": "4294967296", "repeat": "1"}, "path-prepend.as"),
        ({"asn": "AS65100", "repeat": "1"}, "path-prepend.as"),
        ({"asn": "65100", "repeat": "256"}, "path-prepend.repeat-n"),
        ({"asn": "65100", "repeat": "-1"}, "path-prepend.repeat-n"),
        ({"asn": "65100", "repeat": ""}, "path-prepend.repeat-n"),
        ({"asn": "65100"}, "path-prepend.repeat-n"),
    ],
)
def test_a_bad_prepend_is_told_and_the_last_good_one_stays(values: dict[str, str], key: str) -> None:
    held = Attributes(prepend=(65007, 2), communities=("65000:1",))
    attributes, (problem,) = read(held, **values)
    assert attributes == Attributes(prepend=(65007, 2)), "communities that are gone from the annotation go"
    assert "node a" in problem and key in problem and "65007" in problem
    attributes, (problem,) = read(NONE, **values)
    assert attributes == NONE and "none is prepended" in problem


def test_a_repetition_alone_is_nothing() -> None:
    assert read(Attributes(prepend=(65007, 2)), repeat="3") == (NONE, [])


def test_custom_rejects_take_both_families_and_skip_what_is_bad() -> None:
    text = " 192.0.2.1/24, 2001:db8::/32 ,10.0.0.0,fe80::1%eth0/64,10.0.0.0/33,,192.0.2.0/24"
    networks, (problem,) = custom_rejects("a", {PREFIX + "node.bgp.customimportreject": text})
    assert networks == (ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("2001:db8::/32"))
    assert "node a: annotation kube-router.io/node.bgp.customimportreject" in problem.text
    for bad in ("'10.0.0.0'", "'fe80::1%eth0/64'", "'10.0.0.0/33'"):
        assert bad in problem.text
    assert custom_rejects("a", {}) == ((), ())


def test_only_external_peers_get_attributes_and_a_restarted_worker_knows_the_last_good_ones() -> None:
    annotations = {"node.bgp.communities": "no-export", "path-prepend.as": "65100", "path-prepend.repeat-n": "2"}
    own = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"], annotations)
    other = node("b", ["10.0.0.2", "2001:db8::2"])
    peers = {"peer_router_ips": ("10.0.1.1",), "peer_router_asns": (65000,)}
    running = asking(own, other, **peers).state
    wanted = Attributes(prepend=(65100, 2), communities=("65535:65281",))
    for statement in running.policies.export:
        assert statement.attributes == (wanted if "external" in statement.neighbor_set else NONE)
    assert all(statement.attributes == NONE for statement in running.policies.import_)
    bad = node("a", ["10.0.0.1", "2001:db8::1"], own.pod_cidrs, {**annotations, "path-prepend.as": "x"})
    desired = asking(bad, other, actual=running, **peers)
    assert desired.state == running
    assert [problem.reason for problem in desired.problems] == ["InvalidPathPrepend"]
