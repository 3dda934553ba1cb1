"""What a change of settings asks for: the table of who reads what is held against the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import kube_router.workers
from kube_router.supervisor.changes import FIXED, READ_BY, UNREAD, Reload, plan_reload
from kube_router.workers.settings import Settings

WORKERS = Path(next(iter(kube_router.workers.__path__)))
FIELDS = frozenset(Settings.__struct_fields__)
FAMILIES = {"enable_ipv4", "enable_ipv6"}


def read_fields(package: Path) -> Iterator[str]:
    """The settings that the sources of a package read, as ``….settings.NAME`` or ``settings.NAME``."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in {*FIELDS, "families"}:
                holder = node.value
                name = str(getattr(holder, "id", "") or getattr(holder, "attr", ""))
                if name.lstrip("_") == "settings":
                    yield from FAMILIES if node.attr == "families" else [node.attr]


@pytest.mark.parametrize("worker", sorted(READ_BY.keys() - {"gobgpd"}))
def test_the_table_holds_what_each_worker_reads(worker: str) -> None:
    found = set(read_fields(WORKERS / worker))
    assert found - READ_BY[worker] - FIXED == set()


def test_the_table_names_settings_that_there_are() -> None:
    named = {name for names in READ_BY.values() for name in names} | FIXED | UNREAD
    assert named <= FIELDS
    assert FIELDS - named == {"v"}


def plan(before: dict[str, Any] | None = None, *, new_secrets: bool = False, **after: Any) -> Reload:
    old = Settings(**(before or {}))
    return plan_reload(old, msgspec.structs.replace(old, **after), new_secrets=new_secrets)


def steps(*args: Any, **kwargs: Any) -> list[str]:
    return [str(step) for step in plan(*args, **kwargs).steps]


def test_nothing_changed_asks_for_nothing() -> None:
    assert plan() == Reload(Settings())


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"bgp_holdtime": 30.0}, ["restart router"]),
        ({"iptables_sync_period": 30.0}, ["restart firewall"]),
        ({"metrics_port": 9000}, ["restart health"]),
        ({"auto_mtu": False}, ["restart cni"]),
        ({"enable_ipv6": True}, ["restart router", "restart cni", "restart firewall", "restart proxy"]),
        ({"ipvs_sync_period": 30.0}, ["restart proxy"]),
        ({"enable_pprof": True}, []),
        ({"peer_router_passwords_file": "/x"}, []),
        ({"v": 1}, [f"restart {name}" for name in ("watcher", "router", "cni", "firewall", "proxy", "health")]),
        ({"gobgp_admin_port": 0}, ["replace gobgpd"]),
        ({"bgp_graceful_restart": True}, ["restart router"]),
        ({"cluster_asn": 64999}, ["restart router"]),
        ({"run_firewall": False}, ["remove firewall", "restart watcher"]),
        ({"run_router": False}, ["remove cni", "remove router", "remove gobgpd", "restart watcher"]),
        ({"enable_cni": False}, ["remove cni", "restart watcher", "restart router"]),
    ],
    ids=str,
)
def test_just_the_programs_that_read_it(change: dict[str, Any], wanted: list[str]) -> None:
    assert steps(**change) == wanted


def test_what_is_switched_on_is_added_after_the_watcher_that_serves_it() -> None:
    assert steps({"run_router": False}, run_router=True) == ["restart watcher", "add gobgpd", "add router", "add cni"]


def test_the_admin_port_is_shown_to_nobody_while_there_is_no_gobgpd() -> None:
    assert steps({"run_router": False}, gobgp_admin_port=0) == []


def test_new_passwords_restart_the_router_once() -> None:
    assert steps(new_secrets=True) == ["restart router"]
    assert steps(new_secrets=True, bgp_holdtime=30.0) == ["restart router"]
    assert steps({"run_router": False}, new_secrets=True) == []


@pytest.mark.parametrize("name", sorted(FIXED - {"node_name"}))
def test_what_cannot_change_stays_and_is_told(name: str) -> None:
    found = plan({}, **{name: "other"})
    assert found.settings == Settings() and found.steps == () and found.changes == ()
    assert len(found.refused) == 1
    assert "restarted" in str(found.refused[0]) and '"other"' in str(found.refused[0])


def test_another_node_name_is_told_once_by_its_flag() -> None:
    found = plan({}, hostname_override="b", node_name="b")
    assert [problem.key for problem in found.refused] == ["--hostname-override"]
    assert found.settings == Settings()


def test_changes_are_shown_as_flags() -> None:
    found = plan({}, bgp_holdtime=30.0, enable_ipv6=True, peer_router_ips=("192.0.2.1", "::1"))
    assert found.changes == (
        "--enable-ipv6=false -> true",
        "--peer-router-ips= -> 192.0.2.1,::1",
        "--bgp-holdtime=90s -> 30s",
    )
