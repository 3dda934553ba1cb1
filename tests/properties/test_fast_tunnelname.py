"""Tunnel names: the vectors that exist on kube-router's nodes, and equality with the twin for any text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import twin_tunnelname as twin

from kube_router._fast.tunnelname import legacy_tunnel_name, tunnel_name


@pytest.mark.parametrize(
    ("next_hop", "name"),
    [
        ("10.0.0.1", "tun-e443169117a"),
        ("100.200.300.400", "tun-9033d7906c7"),
        ("2001:db8:42:2::/64", "tun-ba56986ef05"),
        ("fd00::1", "tun-5393ee7fb5c"),
        ("21.3.0.4", "tun-8bbcaad3138"),
        ("2.13.0.4", "tun-8bbcaad3138"),
    ],
)
def test_current_names(next_hop: str, name: str) -> None:
    assert tunnel_name(next_hop) == name
    assert twin.tunnel_name(next_hop) == name


@pytest.mark.parametrize(
    ("next_hop", "name"),
    [
        ("10.0.0.1", "tun-10001"),
        ("192.168.10.11", "tun-1921681011"),
        ("192.168.100.11", "tun-19216810011"),
        ("192.168.100.110", "tun192168100110"),
        ("100.200.300.400", "tun100200300400"),
    ],
)
def test_legacy_names(next_hop: str, name: str) -> None:
    assert legacy_tunnel_name(next_hop) == name


@given(st.ip_addresses())
def test_name_of_an_address_fits_a_device(address: object) -> None:
    name = tunnel_name(str(address))
    assert len(name) == 15
    assert name.startswith("tun-")
    assert name == twin.tunnel_name(str(address))


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=300))
def test_any_text_as_the_twin(text: str) -> None:
    assert tunnel_name(text) == twin.tunnel_name(text)
    assert legacy_tunnel_name(text) == twin.legacy_tunnel_name(text)


@pytest.mark.parametrize("length", [0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 121, 127, 128, 129, 1000])
def test_lengths_around_the_hash_blocks(length: int) -> None:
    assert tunnel_name("f" * length) == twin.tunnel_name("f" * length)


@pytest.mark.parametrize("function", [tunnel_name, legacy_tunnel_name])
@pytest.mark.parametrize("value", [None, b"10.0.0.1", 1])
def test_only_text(function: object, value: object) -> None:
    with pytest.raises(TypeError):
        function(value)  # type: ignore[operator]


def test_text_without_a_utf8_form() -> None:
    with pytest.raises(UnicodeEncodeError):
        tunnel_name("\ud800")
