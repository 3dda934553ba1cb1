"""The configuration file as text: what changes, what survives, what is refused and how it is said."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import pytest

from kube_router.workers.cni.netconf import Edited, NetconfError, RangeChange, edit, is_conflist
from kube_router.workers.model import IPNetwork

V4, V6 = "10.1.0.0/24", "fd00:1::/64"


def networks(*texts: str) -> tuple[IPNetwork, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


def change(*wanted: str, owned: tuple[str, ...] = (), mtu: int | None = None, removable: bool = True) -> RangeChange:
    return RangeChange(networks(*wanted), frozenset(networks(*wanted, *owned)), mtu, removable)


def conf(ipam: object, **more: object) -> str:
    return json.dumps(
        {"cniVersion": "1.0.0", "name": "n", "type": "bridge", "bridge": "kube-bridge", "ipam": ipam, **more}
    )


def host_local(*sets: Any, **more: object) -> str:
    return conf({"type": "host-local", "ranges": list(sets), **more})


def ranges(edited: Edited) -> Any:
    return json.loads(edited.text)["ipam"]["ranges"]


def subnet(*texts: str) -> list[dict[str, str]]:
    return [{"subnet": text} for text in texts]


def test_each_cidr_becomes_a_range_set_of_its_own_in_order() -> None:
    edited = edit(conf({"type": "host-local"}), False, change(V4, V6))
    assert ranges(edited) == [subnet(V4), subnet(V6)]
    assert edited.present == networks(V4, V6)


@pytest.mark.parametrize("present", [V4, "10.1.0.7/24"])
def test_a_range_that_is_there_in_any_form_is_not_put_in_again(present: str) -> None:
    assert ranges(edit(host_local(subnet(present)), False, change(V4))) == [subnet(V4)]


def test_ipv6_is_compared_as_a_network_and_its_spelling_left_alone() -> None:
    text = host_local(subnet("FD00:0001:0::/64"))
    assert edit(text, False, change(V6)).text == text


def test_duplicates_that_upstream_left_go_and_the_first_stays() -> None:
    edited = edit(host_local(subnet("10.1.0.3/24"), subnet("10.9.0.0/24"), subnet(V4), subnet(V4)), False, change(V4))
    assert ranges(edited) == [subnet(V4), subnet("10.9.0.0/24")]


def test_nothing_to_change_leaves_the_text_byte_by_byte() -> None:
    text = '{"type":"bridge" ,\n "bridge":"kube-bridge",  "x": 1.50, "ipam":{"ranges":[[{"subnet": "10.1.0.0/24"}]]}}'
    assert edit(text, False, change(V4)).text == text


@pytest.mark.parametrize(("before", "after"), [(V4, "10.2.0.0/24"), (V6, "fd00:2::/64")])
def test_a_new_cidr_takes_the_place_of_the_old_one(before: str, after: str) -> None:
    text = host_local(subnet(V4), subnet("10.9.0.0/24"), subnet(V6), subnet("fd00:9::/64"))
    wanted = [after if each == before else each for each in (V4, V6)]
    edited = edit(text, False, change(*wanted, owned=(V4, V6)))
    expected = [subnet(after if each == before else each) for each in (V4, "10.9.0.0/24", V6, "fd00:9::/64")]
    assert ranges(edited) == expected


def test_a_family_that_is_no_longer_wanted_goes() -> None:
    edited = edit(host_local(subnet(V4), subnet(V6)), False, change(V4, owned=(V6,)))
    assert ranges(edited) == [subnet(V4)]


def test_ipv4_that_comes_later_stands_before_our_ipv6() -> None:
    edited = edit(host_local(subnet("fd00:9::/64"), subnet(V6)), False, change(V4, V6))
    assert ranges(edited) == [subnet("fd00:9::/64"), subnet(V4), subnet(V6)]


def test_ranges_of_the_user_are_never_removed() -> None:
    text = host_local(subnet("10.8.0.0/24"), [{"subnet": "10.9.0.0/24", "rangeStart": "10.9.0.9"}])
    edited = edit(text, False, change(V4, owned=("10.7.0.0/24",)))
    assert ranges(edited)[:2] == json.loads(text)["ipam"]["ranges"]


def test_options_within_our_range_survive_while_the_cidr_stays() -> None:
    entry = {"rangeStart": "10.1.0.20", "subnet": V4, "gateway": "10.1.0.254", "x": [1]}
    assert ranges(edit(host_local([entry]), False, change(V4, V6))) == [[entry], subnet(V6)]


def test_options_go_with_the_cidr_that_they_lie_in() -> None:
    text = host_local([{"subnet": V4, "gateway": "10.1.0.254"}, {"subnet": "10.9.0.0/24"}])
    edited = edit(text, False, change("10.2.0.0/24", owned=(V4,)))
    assert ranges(edited) == [subnet("10.2.0.0/24", "10.9.0.0/24")]


def test_what_may_not_be_removed_stays_and_keeps_its_family_from_getting_more() -> None:
    text = host_local(subnet(V4))
    edited = edit(text, False, change("10.2.0.0/24", V6, owned=(V4,), removable=False))
    assert ranges(edited) == [subnet(V4), subnet(V6)]


@pytest.mark.parametrize("sets", [[], None])
def test_without_anything_wanted_empty_ranges_stay_as_they_are(sets: object) -> None:
    text = conf({"type": "host-local", "ranges": sets})
    assert edit(text, False, change()).text == text


def test_null_ranges_are_filled() -> None:
    assert ranges(edit(conf({"type": "host-local", "ranges": None}), False, change(V4))) == [subnet(V4)]


# --- the legacy form


def test_legacy_subnet_moves_into_ranges_with_its_companions() -> None:
    text = conf(
        {"type": "host-local", "subnet": "10.9.0.0/24", "gateway": "10.9.0.1", "routes": [], "rangeEnd": "10.9.0.99"}
    )
    ipam = json.loads(edit(text, False, change(V4)).text)["ipam"]
    moved = {"subnet": "10.9.0.0/24", "rangeEnd": "10.9.0.99", "gateway": "10.9.0.1"}
    assert ipam == {"type": "host-local", "routes": [], "ranges": [[moved], subnet(V4)]}


def test_legacy_subnet_that_is_in_ranges_already_is_merged() -> None:
    text = host_local(subnet(V4), subnet="10.1.0.0/24", gateway="10.1.0.9")
    assert ranges(edit(text, False, change(V4))) == [[{"subnet": V4, "gateway": "10.1.0.9"}]]


def test_legacy_subnet_that_equals_a_former_cidr_of_ours_goes() -> None:
    text = conf({"type": "host-local", "subnet": V4})
    assert ranges(edit(text, False, change("10.2.0.0/24", owned=(V4,)))) == [subnet("10.2.0.0/24")]


# --- MTU and the plugin


@pytest.mark.parametrize("before", [{}, {"mtu": 0}, {"mtu": 9000}, {"mtu": 1450.0}, {"mtu": "1450"}])
def test_mtu_is_set_as_a_whole_number(before: dict[str, object]) -> None:
    edited = edit(conf({}, **before), False, change(mtu=1450))
    assert '"mtu": 1450}' in edited.text
    assert edited.mtu == 1450


@pytest.mark.parametrize("mtu", [0, 9000])
def test_the_users_mtu_stays_without_auto_mtu(mtu: int) -> None:
    assert json.loads(edit(conf({}, mtu=mtu), False, change(V4)).text)["mtu"] == mtu


def test_the_first_bridge_plugin_of_a_list_is_edited_and_no_other() -> None:
    other = {"type": "bridge", "ipam": {}}
    bridge = {"type": "bridge", "bridge": "kube-bridge", "ipam": {}}
    document = {"plugins": [{"type": "ptp", "ipam": {}}, bridge, other], "name": "n"}
    edited = json.loads(edit(json.dumps(document), True, change(V4)).text)
    assert edited["plugins"][1]["ipam"] == {"ranges": [subnet(V4)]}
    assert [edited["plugins"][0], edited["plugins"][2]] == [{"type": "ptp", "ipam": {}}, other]


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/a/10-x.conflist", True), ("/a/10-x.CONFLIST", True), ("/a/10-x.conf", False), ("/a.conflist/x.json", False)],
)
def test_list_or_not_by_suffix(path: str, expected: bool) -> None:
    assert is_conflist(path) is expected


def test_ranges_of_another_ipam_plugin_are_left_alone() -> None:
    text = conf({"type": "whereabouts", "range": "10.9.0.0/16"})
    edited = edit(text, False, change(V4))
    assert edited.text == text
    assert edited.warnings == ("ipam.type: 'whereabouts' is not host-local, its ranges are left alone",)


def test_another_bridge_is_told() -> None:
    text = json.dumps({"plugins": [{"type": "bridge", "ipam": {}}]})
    assert edit(text, True, change(V4)).warnings == (
        "plugins[0].bridge: 'cni0' is not kube-bridge, pods will not be behind kube-bridge",
    )


def test_overlaps_and_second_gateways_are_told() -> None:
    text = host_local(subnet("10.1.0.0/25"))[:-1] + ', "isDefaultGateway": true}'
    assert edit(text, False, change(V4)).warnings == (
        "ipam.ranges: 10.1.0.0/25 overlaps 10.1.0.0/24, host-local refuses such a file",
        "ipam.ranges: 10.1.0.0/25 and 10.1.0.0/24: the bridge plugin takes one IPv4 gateway and refuses a second",
    )


# --- how it is written


@pytest.mark.parametrize("indent", [2, 4, "\t"])
def test_indentation_line_end_and_order_are_kept(indent: int | str) -> None:
    document: dict[str, Any] = {
        "z": "\u00e9",
        "type": "bridge",
        "bridge": "kube-bridge",
        "ipam": {"y": 1, "a": 2},
        "b": {"d": 1, "c": 2},
    }
    text = json.dumps(document, indent=indent, ensure_ascii=False) + "\n\n"
    edited = edit(text, False, change(V4, mtu=1500)).text
    document["ipam"]["ranges"] = [subnet(V4)]
    document["mtu"] = 1500
    assert edited == json.dumps(document, indent=indent, ensure_ascii=False) + "\n\n"


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_single_line_stays_one(separators: tuple[str, str]) -> None:
    document: dict[str, Any] = {"type": "bridge", "ipam": {"x": 1}, "bridge": "kube-bridge"}
    edited = edit(json.dumps(document, separators=separators), False, change(V4)).text
    document["ipam"]["ranges"] = [subnet(V4)]
    assert edited == json.dumps(document, separators=separators)


def test_escapes_stay_escapes() -> None:
    text = '{"type":"bridge","ipam":{},"x":"\\u00e9\\ud800"}'
    assert '"\\u00e9\\ud800"' in edit(text, False, change(V4)).text


def test_half_a_surrogate_pair_in_a_file_with_other_letters_can_still_be_written() -> None:
    text = '{"type":"bridge","ipam":{},"x":"\u00e9\\ud800"}'
    assert json.loads(edit(text, False, change(V4)).text.encode())["x"] == "\u00e9\ud800"


# --- refusals


@pytest.mark.parametrize(
    ("text", "is_list", "message"),
    [
        ("", False, "the file is empty"),
        (" \n", False, "the file is empty"),
        ("{", False, "line 1 column 2: Expecting property name enclosed in double quotes"),
        ('{\n "a": 1,\n "b" 2}', False, "line 3 column 6: Expecting ':' delimiter"),
        ("\ufeff{}", False, "line 1 column 1: Unexpected UTF-8 BOM (decode using utf-8-sig)"),
        ('{"a', False, "line 1 column 2: Unterminated string"),
        ("[]", False, "not a JSON object"),
        ('{"mtu": NaN}', False, "NaN is not JSON"),
        ('{"x": 1e999}', False, "the number 1e999 is too large"),
        ('{"a": 1, "a": 2}', False, "the key 'a' stands twice in one object"),
        ("[" * 100_000, False, "nested too deeply"),
        ("{}", False, "type: missing"),
        ('{"type": 1}', False, "type: missing"),
        ('{"plugins": []}', False, "plugins: a plugin list; the file's name must end in .conflist"),
        ("{}", True, "plugins: missing or empty"),
        ('{"plugins": []}', True, "plugins: missing or empty"),
        ('{"plugins": {"type": "bridge"}}', True, "plugins: missing or empty"),
        ('{"plugins": [1]}', True, "plugins[0]: not an object"),
        ('{"plugins": [{"type": "ptp"}]}', True, "plugins: none is of type bridge"),
        (
            '{"plugins": [{"type": "ptp"}, {"type": "bridge"}]}',
            True,
            "plugins[1].ipam: missing, nowhere to put pod ranges",
        ),
        ('{"type": "bridge", "ipam": []}', False, "ipam: not an object, nowhere to put pod ranges"),
        ('{"type": "bridge", "ipam": {"ranges": {}}}', False, "ipam.ranges: not a list"),
        ('{"type": "bridge", "ipam": {"ranges": [{}]}}', False, "ipam.ranges[0]: not a list"),
        ('{"type": "bridge", "ipam": {"ranges": [[], [{}, 1]]}}', False, "ipam.ranges[1][1]: not an object"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(text: str, is_list: bool, message: str) -> None:
    with pytest.raises(NetconfError) as refused:
        edit(text, is_list, change(V4))
    assert str(refused.value) == message


def test_an_integer_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(NetconfError, match="digits"):
        edit('{"x": ' + "9" * 5000 + "}", False, change(V4))
