"""Annotations about routes, whatever is written into them: values are canonical, bad items cost themselves only."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from kube_router.workers.router.attributes import (
    MOST_COMMUNITIES,
    MOST_LARGE_COMMUNITIES,
    WELL_KNOWN,
    custom_rejects,
    own_attributes,
)
from kube_router.workers.router.bgpstate import Attributes

COMMUNITIES = "kube-router.io/node.bgp.communities"
LARGE = "kube-router.io/node.bgp.large-communities"
PREPEND_AS, PREPEND_REPEAT = "kube-router.io/path-prepend.as", "kube-router.io/path-prepend.repeat-n"
REJECT = "kube-router.io/node.bgp.customimportreject"

numbers = st.integers(-1, (1 << 33) - 1).map(str)
community = st.one_of(
    numbers, st.tuples(numbers, numbers).map(":".join), st.sampled_from(sorted(WELL_KNOWN)), st.text(max_size=12)
)
large = st.one_of(st.tuples(numbers, numbers, numbers).map(":".join), st.text(max_size=12))
cidr = st.one_of(st.ip_addresses().map(lambda address: f"{address}/24"), st.text(max_size=20))
blanks = st.sampled_from(["", " ", "  ", "\t"])


def comma_list(item: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(st.tuples(blanks, item, blanks).map("".join), max_size=30).map(",".join)


held = st.builds(Attributes, prepend=st.one_of(st.none(), st.just((65007, 3))))


@given(comma_list(community), comma_list(large), st.one_of(numbers, st.text(max_size=8)), numbers, held)
def test_any_text_gives_canonical_values_and_one_line_a_problem(
    communities: str, larges: str, asn: str, repeat: str, running: Attributes
) -> None:
    annotations = {COMMUNITIES: communities, LARGE: larges, PREPEND_AS: asn, PREPEND_REPEAT: repeat}
    attributes, problems = own_attributes("n", annotations, running)
    again = {COMMUNITIES: ",".join(attributes.communities), LARGE: ",".join(attributes.large_communities)}
    read_back = own_attributes("n", again, Attributes())
    assert read_back.problems == ()
    assert read_back.attributes.communities == attributes.communities
    assert read_back.attributes.large_communities == attributes.large_communities
    assert len(attributes.communities) <= MOST_COMMUNITIES
    assert len(attributes.large_communities) <= MOST_LARGE_COMMUNITIES
    prepend = attributes.prepend
    assert prepend is None or prepend == running.prepend or (0 < prepend[0] < 1 << 32 and 0 < prepend[1] <= 255)
    assert not attributes.next_hop_self
    assert len(problems) <= 3
    for problem in problems:
        assert problem.text.startswith("node n: annotation kube-router.io/") and "\n" not in problem.text


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=30), st.randoms())
def test_order_and_repetition_mean_nothing(values: list[int], chance: object) -> None:
    shuffled = [*values, *values[:5]]
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    texts = (",".join(map(str, values)), ", ".join(f"{value >> 16}:{value & 0xFFFF}" for value in shuffled))
    first, second = (own_attributes("n", {COMMUNITIES: text}, Attributes()) for text in texts)
    assert first == second


@given(comma_list(cidr))
def test_rejects_are_the_items_that_are_cidrs(text: str) -> None:
    networks, problems = custom_rejects("n", {REJECT: text})
    items = [item.strip() for item in text.split(",") if item.strip()]
    good = {ipaddress.ip_network(item, strict=False) for item in items if _is_cidr(item)}
    assert set(networks) == good and len(networks) == len(good)
    assert len(problems) == any(not _is_cidr(item) for item in items)


def _is_cidr(item: str) -> bool:
    address, slash, length = item.partition("/")
    try:
        ipaddress.ip_network(item, strict=False)
    except ValueError:
        return False
    return bool(slash) and length.isascii() and length.isdigit() and "%" not in address
