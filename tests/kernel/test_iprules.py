"""The driver of the pods' policy rules on the real kernel: what it sees, adds, deletes and leaves alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.namespaces import Namespace

from kube_router.workers.kernel.iprules import PodRuleDriver
from kube_router.workers.tunnelfacts import PodRule, PodRulePlan

SOURCES = ("10.244.1.0/24", "fd00:244:1::/64", "0.0.0.0/0", "::/0")


@pytest.fixture
def rules(netns: Namespace) -> Iterator[PodRuleDriver]:
    with netns.enter():
        driver = PodRuleDriver()
        yield driver
        driver.close()


def shown(namespace: Namespace) -> list[str]:
    lines = namespace.run("ip -N rule show table 77; ip -6 -N rule show table 77").splitlines()
    return sorted(line.split("\t", 1)[1].strip() for line in lines)


def test_rules_are_added_seen_and_deleted(netns: Namespace, rules: PodRuleDriver) -> None:
    assert rules.apply(PodRulePlan(add=tuple(map(PodRule, SOURCES)))) == {}
    assert {(rule.source, rule.protocol) for rule in rules.observe()} == {(source, 17) for source in SOURCES}
    assert "from 10.244.1.0/24 lookup 77 proto 17" in shown(netns)
    assert "from fd00:244:1::/64 lookup 77 proto 17" in shown(netns)
    assert rules.apply(PodRulePlan(delete=rules.observe())) == {}
    assert rules.observe() == () and shown(netns) == []


def test_a_rule_of_everything_is_not_taken_for_one_of_a_pod_cidr(netns: Namespace, rules: PodRuleDriver) -> None:
    netns.run("ip rule add from all lookup 77; ip rule add from 10.244.1.0/24 lookup 77")
    theirs = {rule.source: rule for rule in rules.observe()}
    assert theirs.keys() == {"0.0.0.0/0", "10.244.1.0/24"}
    rules.apply(PodRulePlan(delete=(theirs["10.244.1.0/24"],)))
    assert [rule.source for rule in rules.observe()] == ["0.0.0.0/0"]


def test_of_two_equal_rules_the_one_that_is_meant_goes(netns: Namespace, rules: PodRuleDriver) -> None:
    netns.run("ip rule add from 10.244.1.0/24 lookup 77 protocol boot")
    rules.apply(PodRulePlan(add=(PodRule("10.244.1.0/24"),)))
    theirs = [rule for rule in rules.observe() if rule.protocol != 17]
    assert len(theirs) == 1
    rules.apply(PodRulePlan(delete=tuple(theirs)))
    assert [rule.protocol for rule in rules.observe()] == [17]


@pytest.mark.parametrize(
    "other",
    [
        "from 10.244.1.0/24 lookup 78",
        "from 10.244.1.0/24 to 10.0.0.0/8 lookup 77",
        "from 10.244.1.0/24 iif lo lookup 77",
        "from 10.244.1.0/24 fwmark 1 lookup 77",
        "not from 10.244.1.0/24 lookup 77",
        "from 10.244.1.0/24 tos 4 lookup 77",
        "from 10.244.1.0/24 ipproto tcp lookup 77",
        "from 10.244.1.0/24 lookup 77 suppress_prefixlength 0",
        "from 10.244.1.0/24 unreachable",
    ],
)
def test_rules_of_another_form_are_not_seen(netns: Namespace, rules: PodRuleDriver, other: str) -> None:
    netns.run(f"ip rule add {other}")
    assert rules.observe() == ()


def test_a_refused_rule_is_told_and_stops_no_other(netns: Namespace, rules: PodRuleDriver) -> None:
    refused = PodRule("10.244.1.0/24", priority=0)
    missing = PodRule("10.9.0.0/16", priority=5)
    bad = PodRule("10.244.1.0/33")
    failures = rules.apply(PodRulePlan(add=(bad, refused), delete=(missing,)))
    assert list(failures) == [bad]
    assert [rule.source for rule in rules.observe()] == ["10.244.1.0/24"]
