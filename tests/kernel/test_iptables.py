"""The iptables driver: which kind it chooses, what it does when a program fails, and that reading makes nothing."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from support.namespaces import Namespace

from kube_router.workers.kernel import iptables
from kube_router.workers.kernel.iptables import IptablesError, Programs, RuleDriver, find_programs
from kube_router.workers.model import Family
from kube_router.workers.rulefacts import RulePlan, RuleStep, RuleText

ACCEPT = RuleText("-i a -j ACCEPT")
LEGACY = Programs("legacy", "-legacy", (1, 8, 9))


def plan(family: Family = Family.IPV4) -> RulePlan:
    return RulePlan(family, "filter", (RuleStep("append", "FORWARD", ACCEPT),))


@pytest.mark.parametrize(
    ("commands", "backend"),
    [
        ("true", "nft"),
        ("iptables-legacy -A INPUT -j ACCEPT", "legacy"),
        ("iptables-legacy -A INPUT -j ACCEPT; ip6tables-nft -t mangle -N KUBE-KUBELET-CANARY", "nft"),
        ("iptables-nft -A INPUT -j ACCEPT; ip6tables-legacy -t mangle -N KUBE-IPTABLES-HINT", "legacy"),
        ("iptables-nft -A INPUT -j ACCEPT; iptables-legacy -A INPUT -j ACCEPT", "nft"),
        (
            "iptables-nft -A INPUT -j ACCEPT; ip6tables-legacy -A INPUT -j ACCEPT -s ::1; ip6tables-legacy -A INPUT",
            "legacy",
        ),
    ],
)
def test_the_kind_of_the_host_is_chosen(netns: Namespace, commands: str, backend: str) -> None:
    netns.run(commands)
    with netns.enter():
        programs = find_programs()
    assert programs.backend == backend
    assert programs.random_fully


def test_a_mixed_host_is_told_once_and_clearly(netns: Namespace) -> None:
    netns.run("iptables-nft -A INPUT -j ACCEPT; iptables-legacy -A INPUT -j ACCEPT; ip6tables-legacy -A INPUT -j DROP")
    with netns.enter():
        assert find_programs().warnings == (
            "this host has 1 nft and 2 legacy iptables rules; both apply to every packet, and a drop in either is "
            "final; using legacy",
        )


@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_choosing_and_reading_create_no_table(netns: Namespace, backend: str) -> None:
    with netns.enter():
        find_programs()
        driver = RuleDriver(Programs("legacy" if backend == "legacy" else "nft", f"-{backend}", (1, 8, 9)))
        for family in Family:
            assert driver.observe(family, "filter", "FORWARD") == ()
            assert driver.observe(family, "nat", "POSTROUTING") == ()
    assert netns.run("nft list ruleset; cat /proc/net/ip_tables_names /proc/net/ip6_tables_names") == ""


def test_a_held_xtables_lock_is_a_clear_error_after_a_bounded_wait(
    netns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(lock))
    monkeypatch.setattr(iptables, "WAIT_SECONDS", 1)
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with netns.enter():
        driver = RuleDriver(LEGACY)
        with pytest.raises(IptablesError, match="another program holds the xtables lock for more than 1 s"):
            driver.apply(plan())
        assert driver.writes == 0
        os.close(descriptor)
        driver.apply(plan())
        assert driver.observe(Family.IPV4, "filter", "FORWARD") == (ACCEPT,)


def test_a_missing_program_is_named(netns: Namespace) -> None:
    with pytest.raises(IptablesError, match="ip6tables-none: no such program on PATH"):
        RuleDriver(Programs("nft", "-none", ())).observe(Family.IPV6, "filter", "FORWARD")


def test_a_table_that_the_kernel_does_not_have_is_that_table_s_failure(netns: Namespace) -> None:
    with netns.enter():
        driver = RuleDriver(Programs("nft", "-nft", (1, 8, 9)))
        with pytest.raises(IptablesError, match=r"ip6tables-nft-restore.*nosuch"):
            driver.apply(RulePlan(Family.IPV6, "nosuch", (RuleStep("append", "FORWARD", ACCEPT),)))
        driver.apply(plan())
        assert driver.observe(Family.IPV4, "filter", "FORWARD") == (ACCEPT,)


def test_a_foreign_nftables_table_in_the_way_is_a_clear_error(netns: Namespace) -> None:
    """A table of the name, which iptables-nft cannot use, is left as it is."""
    netns.run("nft add table ip filter")
    netns.run("nft 'add chain ip filter FORWARD { type filter hook forward priority 5 ; policy drop ; }'")
    before = netns.run("nft list ruleset")
    with netns.enter(), pytest.raises(IptablesError, match="iptables-nft"):
        RuleDriver(Programs("nft", "-nft", (1, 8, 9))).apply(plan())
    assert netns.run("nft list ruleset") == before
