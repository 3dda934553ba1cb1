"""Peers and roles, whatever is written into annotations: one clear line, no password, and what is good goes on."""

from __future__ import annotations

import base64
import json

from hypothesis import given
from hypothesis import strategies as st
from support.bgp import asking, node

from kube_router.workers.router.bgpstate import Neighbor
from kube_router.workers.router.peers import KNOWN_KEYS, external_peers
from kube_router.workers.settings import Secrets, Settings

SECRET = "s3cr3t-of-a-peer"
ENCODED = base64.b64encode(SECRET.encode()).decode()
texts = st.text(max_size=20)
numbers = st.integers(-2, 1 << 33)
addresses = st.ip_addresses().map(str)
scalars = st.one_of(texts, numbers, addresses, st.none(), st.booleans(), st.sampled_from([ENCODED, "0xfde8", "65000"]))
values = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner), st.dictionaries(texts, inner)), max_leaves=6)
entries = st.dictionaries(st.one_of(st.sampled_from(sorted(KNOWN_KEYS)), texts), values, max_size=8)
GOOD = {"remoteip": "192.0.2.77", "remoteasn": 65000, "password": ENCODED}


def clear(text: str) -> bool:
    return "\n" not in text and len(text) < 400 and SECRET not in text and ENCODED not in text


@given(st.lists(st.one_of(entries, values), max_size=4))
def test_any_list_of_peers_costs_nothing_but_its_bad_entries(others: list[object]) -> None:
    annotation = json.dumps([*others, GOOD])  # JSON is YAML
    found = external_peers(Settings(), Secrets(), "n", {"kube-router.io/peers": annotation})
    assert "192.0.2.77" in {str(peer.address) for peer in found.peers}
    assert not found.hold_all
    assert len({peer.address for peer in found.peers}) == len(found.peers)
    assert all(
        clear(problem.text) or any(word in repr(others) for word in (SECRET, ENCODED)) for problem in found.problems
    )
    assert SECRET not in repr(found)
    for peer in found.peers:
        assert 1 <= peer.port <= 65535 and 0 < peer.asn < 1 << 32
        assert peer.hold_seconds is None or 3 <= peer.hold_seconds <= 65535
        assert peer.local_address is None or peer.local_address.version == peer.address.version


@given(st.text(max_size=200))
def test_any_text_for_the_peers_annotation_is_one_clear_line_or_peers(text: str) -> None:
    found = external_peers(Settings(), Secrets(), "n", {"kube-router.io/peers": text})
    assert all(clear(problem.text) for problem in found.problems)
    assert found.peers or found.problems or found.hold_all or not text.strip() or text.strip()[0] in "[-#%'\"&!"


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("ips", "asns", "ports", "passwords", "localips"), texts)))
def test_any_text_in_the_peer_lists_is_clear_lines_or_peers(lists: dict[str, str]) -> None:
    annotations = {f"kube-router.io/peer.{key}": text for key, text in lists.items()}
    found = external_peers(Settings(), Secrets(), "n", annotations)
    assert all(clear(problem.text) for problem in found.problems)


@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("rr.server", "rr.client", "node.asn", "bgp-local-addresses"), texts)
    )
)
def test_any_role_number_or_address_leaves_a_speaker_that_makes_sense(annotations: dict[str, str]) -> None:
    own = node("a", ["10.0.0.1"], ["10.244.1.0/24"], annotations)
    desired = asking(own, node("b", ["10.0.0.2"], ["10.244.2.0/24"]), enable_ipv6=False)
    assert desired.state.speaker is not None
    assert desired.state.speaker.listen_addresses
    client = "rr.client" in annotations and "rr.server" not in annotations
    wanted: set[str] = set() if client else {"10.0.0.2"}
    assert desired.state.neighbors.keys() == wanted, "a client without any server has nobody"
    assert all(
        isinstance(item, Neighbor) and item.cluster_id.count(".") in (0, 3) for item in desired.state.neighbors.values()
    )
    assert all(clear(problem.text) for problem in desired.problems)
