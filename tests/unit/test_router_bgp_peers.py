"""External peers from flags and annotations: what is taken, what is refused, and in which words."""

from __future__ import annotations

import base64
import ipaddress

import pytest

from kube_router.workers.router.bgpstate import Bfd
from kube_router.workers.router.peers import ExternalPeer, ExternalPeers, external_peers
from kube_router.workers.settings import Secrets, Settings

SECRET = "s3cret-w0rd"
ENCODED = base64.b64encode(SECRET.encode()).decode()


def of(annotations: dict[str, str]) -> ExternalPeers:
    named = {f"kube-router.io/{key}": value for key, value in annotations.items()}
    return external_peers(Settings(), Secrets(), "node-1", named)


def peer(address: str, asn: int, port: int = 179, local: str | None = None, password: str = "") -> ExternalPeer:
    local_address = ipaddress.ip_address(local) if local else None
    return ExternalPeer(ipaddress.ip_address(address), asn, port, local_address, password)


def test_peers_annotation_in_full_and_at_its_shortest() -> None:
    text = f"""
- remoteip: 10.0.1.1
  remoteasn: 64640
- remoteip: 2001:10:20:30:40:50:1:2
  remoteasn: 0xfc80
  port: 1179
  localip: 2001:db8::9
  password: {ENCODED}
"""
    found = of({"peers": text})
    assert found.problems == ()
    assert found.peers == (
        peer("10.0.1.1", 64640),
        peer("2001:10:20:30:40:50:1:2", 64640, 1179, "2001:db8::9", SECRET),
    )


def test_each_peer_has_its_own_hold_time_ttl_and_bfd() -> None:
    text = """
- {remoteip: 10.0.1.1, remoteasn: 64640, multihopttl: 3, holdtime: 30, bfd: {enabled: true}}
- remoteip: 10.0.1.2
  remoteasn: 64640
  bfd: {enabled: t, port: 4784, detection_multiplier: 5, desired_min_tx_interval: 50, required_min_rx_interval: 60}
- {remoteip: 10.0.1.3, remoteasn: 64640, bfd: {enabled: false, detection_multiplier: 5}}
- {remoteip: 10.0.1.4, remoteasn: 64640, bfd: , holdtime: ~}
"""
    found = of({"peers": text})
    assert found.problems == ()
    assert [(item.multihop_ttl, item.hold_seconds, item.bfd) for item in found.peers] == [
        (3, 30, Bfd()),
        (None, None, Bfd(4784, 5, 50, 60)),
        (None, None, None),
        (None, None, None),
    ]


@pytest.mark.parametrize(
    ("field", "word"),
    [
        ("holdtime: 2", "holdtime '2'"),
        ("holdtime: 90s", "holdtime '90s'"),
        ("multihopttl: 256", "multihopttl '256'"),
        ("bfd: yes", "bfd is not a mapping"),
        ("bfd: {enabled: perhaps}", "bfd: enabled 'perhaps'"),
        ("bfd: {enabled: true, detection_multiplier: 0}", "bfd: detection_multiplier '0'"),
        ("bfd: {enabled: true, desired_min_tx_interval: 4294968}", "bfd: desired_min_tx_interval '4294968'"),
        ("bfd: {enabled: true, port: [1]}", "bfd: port ['1']"),
    ],
)
def test_a_field_out_of_its_range_spoils_its_peer_only(field: str, word: str) -> None:
    found = of(
        {"peers": f"- {{remoteip: 10.0.1.1, remoteasn: 65000, {field}}}\n- {{remoteip: 10.0.1.2, remoteasn: 1}}"}
    )
    assert ([str(item.address) for item in found.peers], found.held) == (["10.0.1.2"], frozenset({"10.0.1.1"}))
    assert word in found.problems[0].text and "peer 1" in found.problems[0].text


def test_unknown_keys_are_named_and_do_not_hurt() -> None:
    found = of({"peers": "- {remoteip: 10.0.1.1, remoteasn: 65000, ttl: 3, secret: x, bfd: {fast: true}}"})
    assert found.peers == (peer("10.0.1.1", 65000),)
    (problem,) = found.problems
    assert "peer 1: unknown keys are ignored: 'bfd.fast, secret, ttl'" in problem.text


def test_flags_give_bfd_to_all_flag_peers() -> None:
    settings = Settings(
        peer_router_ips=("10.0.1.1", "10.0.1.2"), peer_router_asns=(65000, 65001), enable_bfd=True, bfd_port=4784
    )
    assert [item.bfd for item in external_peers(settings, Secrets(), "n", {}).peers] == [Bfd(port=4784)] * 2


def test_peer_lists_side_by_side_with_blanks() -> None:
    found = of(
        {
            "peer.ips": "10.0.1.1, 2001:db8::7",
            "peer.asns": "65000,65001",
            "peer.ports": "179,1790",
            "peer.passwords": f",{ENCODED}\n",
            "peer.localips": "10.0.0.9,",
        }
    )
    assert found.problems == ()
    assert found.peers == (
        peer("10.0.1.1", 65000, local="10.0.0.9"),
        peer("2001:db8::7", 65001, 1790, password=SECRET),
    )


def test_lists_need_both_addresses_and_asns() -> None:
    assert of({"peer.ips": "10.0.1.1"}) == ExternalPeers()
    assert of({"peer.asns": "65000"}) == ExternalPeers()


def test_peers_annotation_hides_the_lists() -> None:
    found = of({"peers": "- {remoteip: 10.0.1.1, remoteasn: 65000}", "peer.ips": "10.0.1.2", "peer.asns": "65000"})
    assert [str(item.address) for item in found.peers] == ["10.0.1.1"]


@pytest.mark.parametrize("name", ["peer.asns", "peer.ports", "peer.passwords", "peer.localips"])
def test_lists_of_unequal_length_are_refused_whole_and_hold_what_runs(name: str) -> None:
    lists = {"peer.ips": "10.0.1.1,10.0.1.2,10.0.1.3", "peer.asns": "65000,65000,65000", name: f"{ENCODED},{ENCODED}"}
    found = of(lists)
    assert (found.peers, found.hold_all) == ((), True)
    (problem,) = found.problems
    assert f"kube-router.io/{name} has 2 items" in problem.text and "has 3" in problem.text
    assert ENCODED not in problem.text


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{remoteasn: 65000}", ["remoteip is missing"]),
        ("{remoteip: 10.0.1.1}", ["remoteasn is missing"]),
        ("{remoteip: 10.0.1, remoteasn: 65000}", ["remoteip '10.0.1'"]),
        ("{remoteip: 'fe80::1%eth0', remoteasn: 65000}", ["remoteip"]),
        ("{remoteip: 10.0.1.1, remoteasn: many}", ["remoteasn 'many'"]),
        ("{remoteip: 10.0.1.1, remoteasn: 0}", ["remoteasn '0'", "allowed"]),
        ("{remoteip: 10.0.1.1, remoteasn: 23456}", ["remoteasn '23456'", "reserved"]),
        ("{remoteip: 10.0.1.1, remoteasn: 64000}", ["remoteasn '64000'"]),
        ("{remoteip: 10.0.1.1, remoteasn: 65535}", ["remoteasn '65535'"]),
        ("{remoteip: 10.0.1.1, remoteasn: 4294967295}", ["remoteasn '4294967295'"]),
        ("{remoteip: 10.0.1.1, remoteasn: 65000, port: 70000}", ["port '70000'", "1-65535"]),
        ("{remoteip: 10.0.1.1, remoteasn: 65000, port: http}", ["port 'http'"]),
        ("{remoteip: 10.0.1.1, remoteasn: 65000, localip: x}", ["localip 'x'"]),
        ("{remoteip: 10.0.1.1, remoteasn: 65000, localip: '::1'}", ["different families"]),
        ("{remoteip: 10.0.1.1, remoteasn: [1]}", ["remoteasn"]),
        ("just words", ["not a mapping"]),
        ("{remoteip: 10.0.9.9, remoteasn: 65000}", ["twice"]),
    ],
)
def test_a_bad_entry_is_named_and_spoils_no_other(entry: str, words: list[str]) -> None:
    found = of({"peers": f"- {{remoteip: 10.0.9.9, remoteasn: 65009}}\n- {entry}\n"})
    assert found.peers == (peer("10.0.9.9", 65009),)
    (problem,) = found.problems
    for word in ("node node-1", "kube-router.io/peers", "peer 2", *words):
        assert word in problem.text
    assert found.hold_all is False


@pytest.mark.parametrize(
    "password",
    ["not base64!", ENCODED[:-1], base64.b64encode(b"\xff\xfe").decode(), base64.b64encode(b"x" * 81).decode()],
)
def test_a_bad_password_is_never_shown(password: str) -> None:
    found = of({"peers": f"- {{remoteip: 10.0.1.1, remoteasn: 65000, password: '{password}'}}"})
    assert (found.peers, found.held) == ((), frozenset({"10.0.1.1"}))
    assert "password" in found.problems[0].text
    assert password not in str(found) and "x" * 81 not in str(found)


def test_no_text_form_shows_a_password() -> None:
    found = of({"peers": f"- {{remoteip: 10.0.1.1, remoteasn: 65000, password: {ENCODED}}}"})
    assert found.peers[0].password == SECRET
    for text in (str(found), repr(found), repr(found.peers[0])):
        assert SECRET not in text and ENCODED not in text


@pytest.mark.parametrize(
    "text",
    ["remoteip: 10.0.1.1", "- {remoteip: 10.0.1.1", "\t- x", "!!python/object:os.system []\n- }", "[" * 5000, "word"],
)
def test_text_that_is_no_list_of_peers_holds_what_runs(text: str) -> None:
    found = of({"peers": text})
    assert (found.peers, found.hold_all) == ((), True)
    (problem,) = found.problems
    assert "node node-1: annotation kube-router.io/peers" in problem.text
    assert len(problem.text) < 300


def test_a_yaml_bomb_costs_nothing() -> None:
    levels = "".join(f"- &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 30))
    found = of({"peers": f"- &a0 [x]\n{levels}- {{remoteip: 10.0.1.1, remoteasn: 65000}}"})
    assert [str(item.address) for item in found.peers] == ["10.0.1.1"]
    assert len(found.problems) == 30
    assert all(len(problem.text) < 300 for problem in found.problems)


def test_flags_are_read_side_by_side() -> None:
    settings = Settings(peer_router_ips=("10.0.1.1", "2001:db8::7"), peer_router_asns=(65000, 65001))
    found = external_peers(settings, Secrets(peer_router_passwords=("", SECRET)), "n", {})
    assert found.peers == (peer("10.0.1.1", 65000), peer("2001:db8::7", 65001, password=SECRET))
