"""Label selectors as Kubernetes has them: operators, canonical form, and what the API server would refuse."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from support.policyworld import select

from kube_router.ipc.messages import LabelExpression, LabelSelector
from kube_router.workers.firewall.selectors import Requirement, matches, selector


@pytest.mark.parametrize(
    ("condition", "labels", "expected"),
    [
        ("app In a,b", {"app": "a"}, True),
        ("app In a,b", {"app": "c"}, False),
        ("app In a,b", {}, False),
        ("app NotIn a,b", {"app": "c"}, True),
        ("app NotIn a,b", {"app": "b"}, False),
        ("app NotIn a,b", {}, True),  # a missing key is in no list
        ("app", {"app": ""}, True),  # an empty value is a value
        ("app", {"application": "x"}, False),
        ("!app", {"application": "x"}, True),
        ("!app", {"app": ""}, False),
    ],
)
def test_operators(condition: str, labels: Mapping[str, str], expected: bool) -> None:
    assert matches(selector(select(condition)), labels) is expected


def test_empty_selector_takes_everything() -> None:
    assert selector(LabelSelector()) == ()
    assert matches((), {})
    assert matches((), {"app": "a"})


@pytest.mark.parametrize("labels", [{"app": "a"}, {"tier": "x"}, {"app": "a", "tier": "y"}, {}])
def test_all_conditions_have_to_hold(labels: Mapping[str, str]) -> None:
    both = selector(select("tier In x", app="a"))
    assert not matches(both, labels)
    assert matches(both, {"app": "a", "tier": "x", "more": ""})


def test_conditions_that_exclude_each_other_take_nothing() -> None:
    nobody = selector(select("app NotIn a", app="a"))
    assert not any(matches(nobody, {"app": value}) for value in ("a", "b"))


def test_equal_selections_have_one_form() -> None:
    expressions = [
        LabelExpression(key="app", operator="In", values=("b", "a", "b")),
        LabelExpression(key="tier", operator="Exists"),
        LabelExpression(key="old", operator="DoesNotExist"),
        LabelExpression(key="tier", operator="Exists"),
    ]
    forms = {
        selector(LabelSelector(match_expressions=order, match_labels={"x": "y"}))
        for order in itertools.permutations(expressions)
    }
    assert forms == {
        (
            Requirement("app", "In", ("a", "b")),
            Requirement("old", "DoesNotExist"),
            Requirement("tier", "Exists"),
            Requirement("x", "In", ("y",)),
        )
    }


def test_a_label_is_an_expression_with_one_value() -> None:
    assert selector(select(app="a")) == selector(select("app In a")) != selector(select("app In a,b"))


@pytest.mark.parametrize(
    ("condition", "complaint"),
    [
        ("app Gt 3", "operator 'Gt' on label 'app' is not known"),
        ("app in a", "operator 'in' on label 'app' is not known"),
        ("app In", "operator In on label 'app' has no values"),
        ("app NotIn", "operator NotIn on label 'app' has no values"),
        ("app Exists a", "operator Exists on label 'app' takes no values"),
        ("app DoesNotExist a", "operator DoesNotExist on label 'app' takes no values"),
    ],
)
def test_what_the_api_server_would_refuse(condition: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{complaint}$"):
        selector(select(condition))
