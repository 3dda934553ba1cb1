"""Whatever the user's file holds: what is not ours survives, in its order; a second edit changes nothing."""

from __future__ import annotations

import copy
import ipaddress
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kube_router.workers.cni.netconf import RangeChange, edit
from kube_router.workers.model import IPNetwork

OURS = tuple(ipaddress.ip_network(text) for text in ("10.1.0.0/24", "10.2.0.0/24", "fd00:1::/64", "fd00:2::/64"))
FOREIGN = ("10.9.0.0/24", "fd00:9::/64", "10.8.0.1/24", "not a subnet")

keys = st.text(max_size=4).filter(
    lambda key: key not in ("type", "ipam", "mtu", "plugins", "subnet", "ranges", "bridge")
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)
extras = st.dictionaries(keys, values, max_size=3)


@st.composite
def range_entries(draw: st.DrawFn) -> dict[str, Any]:
    subnet = draw(st.sampled_from([str(network) for network in OURS] + list(FOREIGN) + ["10.1.0.9/24"]))
    return {**draw(extras), "subnet": subnet, **draw(extras)}


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    ipam = {**draw(extras), "type": "host-local", **draw(extras)}
    if draw(st.booleans()):
        ipam["ranges"] = draw(st.lists(st.lists(range_entries(), min_size=1, max_size=2), max_size=4))
    plugin = {**draw(extras), "type": "bridge", "ipam": ipam, **draw(extras)}
    return {**draw(extras), "plugins": [{"type": "loopback"}, plugin, {"type": "portmap", **draw(extras)}]}


changes = st.builds(
    RangeChange,
    wanted=st.sets(st.sampled_from(OURS)).map(lambda wanted: tuple(each for each in OURS if each in wanted)),
    owned=st.frozensets(st.sampled_from(OURS)),
    mtu=st.none() | st.integers(1280, 65535),
    removable=st.booleans(),
)
layouts = st.sampled_from([{"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}, {}])


def network_of(entry: dict[str, Any]) -> IPNetwork | None:
    try:
        return ipaddress.ip_network(entry["subnet"], strict=False)
    except ValueError:
        return None


def foreign_part(document: dict[str, Any], ours: frozenset[IPNetwork]) -> str:
    """The document without MTU and without ranges that may be ours, as text, so that order counts."""
    rest = copy.deepcopy(document)
    plugin = rest["plugins"][1]
    plugin.pop("mtu", None)
    sets = plugin["ipam"].pop("ranges", [])
    users = [entry for range_set in sets for entry in range_set if network_of(entry) not in ours]
    return json.dumps([rest, users])


@given(documents(), changes, layouts)
def test_the_users_part_survives_in_its_order(document: dict[str, Any], change: RangeChange, layout: Any) -> None:
    text = json.dumps(document, **layout)
    edited = json.loads(edit(text, True, change).text)
    ours = change.owned | set(change.wanted)
    assert foreign_part(edited, ours) == foreign_part(json.loads(text), ours)


@given(documents(), changes, layouts)
def test_a_second_edit_changes_nothing(document: dict[str, Any], change: RangeChange, layout: Any) -> None:
    once = edit(json.dumps(document, **layout), True, change)
    assert edit(once.text, True, change).text == once.text


@given(documents(), changes)
def test_what_is_wanted_is_there_and_what_is_ours_no_more_is_gone(
    document: dict[str, Any], change: RangeChange
) -> None:
    edited = edit(json.dumps(document), True, change)
    present = set(edited.present)
    unwanted = change.owned.difference(change.wanted)
    if change.removable:
        assert present.issuperset(change.wanted)
        assert not present & unwanted
    else:
        before = {network_of(entry) for each in document["plugins"][1]["ipam"].get("ranges", []) for entry in each}
        assert present >= unwanted & before
    if change.mtu is not None:
        assert json.loads(edited.text)["plugins"][1]["mtu"] == change.mtu


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda data: data.decode("latin-1")), st.booleans(), changes)
def test_garbage_is_refused_in_one_line_or_edited(text: str, is_list: bool, change: RangeChange) -> None:
    try:
        edit(text, is_list, change)
    except ValueError as error:
        assert "\n" not in str(error) and str(error)
