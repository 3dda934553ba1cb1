"""Rule-set digests: equal to the twin's, different for different lists, the same in another process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support import twin_rulehash as twin

from kube_router._fast.rulehash import rule_set_hash, rule_set_hashes

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200)
RULES = st.lists(TEXT, max_size=20)


@given(RULES)
def test_as_the_twin(rules: list[str]) -> None:
    assert rule_set_hash(rules) == twin.rule_set_hash(rules)
    assert rule_set_hash(tuple(rules)) == rule_set_hash(rules)


@given(st.dictionaries(TEXT, RULES, max_size=10))
def test_chains_as_the_twin(chains: dict[str, Sequence[str]]) -> None:
    assert rule_set_hashes(chains) == twin.rule_set_hashes(chains)


@given(RULES, RULES)
def test_different_lists_differ(left: list[str], right: list[str]) -> None:
    assume(left != right)
    assert rule_set_hash(left) != rule_set_hash(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([], [""]),
        ([""], ["", ""]),
        (["ab"], ["a", "b"]),
        (["a\nb"], ["a", "b"]),
        (["a", "b"], ["b", "a"]),
        (["-A X -j DROP"], ["-A X -j DROP "]),
        (["a\0"], ["a"]),
    ],
)
def test_framing_is_injective(left: list[str], right: list[str]) -> None:
    assert rule_set_hash(left) != rule_set_hash(right)


@pytest.mark.parametrize("length", [*range(110, 140), 247, 248, 249, 255, 256, 257])
def test_lengths_around_the_hash_blocks(length: int) -> None:
    for rules in (["r" * length], ["r" * length, "s" * (length % 7)]):
        assert rule_set_hash(rules) == twin.rule_set_hash(rules)


def test_known_digests() -> None:
    """Written down once: a digest kept on disk by one version has to be understood by the next."""
    assert rule_set_hash([]).hex() == "cae66941d9efbd404e4d88758ea67670"
    assert rule_set_hash(["-A FORWARD -i kube-bridge -j ACCEPT"]).hex() == "b599161b2db5e9b0eb89cffe29aa8dd9"


def test_same_in_another_process() -> None:
    rules = ["-A FORWARD -i kube-bridge -j ACCEPT", "ünïcode"]
    code = f"from kube_router._fast.rulehash import rule_set_hash; print(rule_set_hash({rules!r}).hex())"
    other = subprocess.run(
        [sys.executable, "-P", "-X", "utf8", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    )
    assert other.stdout.strip() == rule_set_hash(rules).hex()


def test_one_text_is_no_list_of_rules() -> None:
    with pytest.raises(TypeError, match="sequence of str"):
        rule_set_hash("-A FORWARD -j ACCEPT")


@pytest.mark.parametrize("rule", [None, b"-A X", 7])
def test_a_rule_is_text(rule: object) -> None:
    with pytest.raises(TypeError, match=f"not {type(rule).__name__}"):
        rule_set_hash([rule])  # type: ignore[list-item]


def test_text_without_a_utf8_form() -> None:
    with pytest.raises(UnicodeEncodeError):
        rule_set_hash(["\ud800"])
