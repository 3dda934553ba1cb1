"""Loading a kernel module: every way in which modprobe can fail is one line, and none stops the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from kube_router.workers.cni.host import Host
from kube_router.workers.cni.plan import LoadModule, Plan, RecordRanges, WriteSysctl
from kube_router.workers.kernel import sysctl
from kube_router.workers.kernel.sysctl import load_module, observe_sysctls


def modprobe(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``script`` the program that PATH gives for modprobe."""
    program = folder / "modprobe"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_module_that_loads_is_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modprobe(tmp_path, f'echo "$@" > {tmp_path}/asked', monkeypatch)
    assert load_module("br_netfilter") is None
    assert (tmp_path / "asked").read_text() == "br_netfilter\n"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo one >&2; echo 'FATAL: Module x not found' >&2; exit 1", "kernel module x: FATAL: Module x not found"),
        ("exit 3", "kernel module x: modprobe ended with status 3"),
        ("sleep 5", "kernel module x: modprobe took more than 0.1 s"),
    ],
)
def test_failures_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    monkeypatch.setattr(sysctl, "MODPROBE_SECONDS", 0.1 if "sleep" in script else 5.0)
    modprobe(tmp_path, script, monkeypatch)
    assert load_module("x") == message


def test_no_modprobe_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_module("x") == "kernel module x: the program modprobe was not found"


def test_a_missing_module_holds_back_only_its_own_switches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    host = Host(str(tmp_path / "x.conf"), str(tmp_path / "state"))
    try:
        steps = (LoadModule("x"), WriteSysctl("net/bridge/no-such-switch", "1"), RecordRanges("x", ()))
        applied = host.apply(Plan(steps))
    finally:
        host.close()
    assert (applied.writes, applied.failures, applied.mtu_refused) == (1, (), None)
    assert applied.module_refused == ("load kernel module x: the program modprobe was not found")


def test_a_switch_that_the_kernel_does_not_have_is_none() -> None:
    observed = observe_sysctls(["net/bridge/no-such-switch", "kernel/ostype"])
    assert observed == {"net/bridge/no-such-switch": None, "kernel/ostype": "Linux"}
