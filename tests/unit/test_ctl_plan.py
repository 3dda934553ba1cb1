"""``kube-routerctl plan firewall``: its output, its exit codes, and why there may be no plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kube_router.supervisor import ctl
from kube_router.workers.firewall.preview import Preview
from kube_router.workers.settings import SETTINGS_FILE, Settings, save

LINES = ("IPv4: flush KUBE-NWPLCY-COMMON", "IPv6: add KUBE-SRC-X fd00::1")


def planned(monkeypatch: pytest.MonkeyPatch, *changes: str, stale: bool = False) -> None:
    monkeypatch.setattr(ctl, "make_plan", lambda worker, run_dir, seconds: Preview("iptables", stale, changes))


def test_nothing_to_change_is_no_output_and_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(monkeypatch)
    assert ctl.main(["plan", "firewall"]) == 0
    assert capsys.readouterr() == ("", "")


def test_changes_are_a_line_each_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(monkeypatch, *LINES)
    assert ctl.main(["plan", "firewall"]) == 2
    assert capsys.readouterr() == ("".join(f"{line}\n" for line in LINES), "")


def test_json_holds_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    planned(monkeypatch, *LINES)
    assert ctl.main(["plan", "firewall", "-o", "json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found == {"worker": "firewall", "backend": "iptables", "stale": False, "changes": list(LINES)}


def test_a_stale_state_is_told_beside_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(monkeypatch, stale=True)
    assert ctl.main(["plan", "firewall"]) == 0
    out, error = capsys.readouterr()
    assert out == "" and "not confirmed" in error


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    (tmp_path / "ipc").mkdir()
    return tmp_path


def refusal(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert ctl.main(["--run-dir", str(run_dir), "plan", "firewall", "--timeout", "0.2"]) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("kube-routerctl: ") and error.count("\n") == 1
    return error


def test_without_an_agent_there_is_no_plan(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"no agent runs with --run-dir={run_dir}" in refusal(run_dir, capsys)


def test_an_agent_without_a_firewall_has_none_either(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(run_dir / "ipc" / SETTINGS_FILE, Settings(run_firewall=False), 0o600)
    assert "--run-firewall=false" in refusal(run_dir, capsys)


def test_a_watcher_that_says_nothing_is_waited_for_in_vain(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(run_dir / "ipc" / SETTINGS_FILE, Settings(node_name="n1"), 0o600)
    assert "the watcher gave no state within 0.2 s" in refusal(run_dir, capsys)


def test_only_root_may_look(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "only root" in refusal(run_dir, capsys)


def test_other_workers_have_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ctl.main(["plan", "cni"])
    assert "invalid choice: 'cni'" in capsys.readouterr().err


def test_the_router_s_plan_goes_the_same_way(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(run_dir / "ipc" / SETTINGS_FILE, Settings(run_router=False), 0o600)
    assert ctl.main(["--run-dir", str(run_dir), "plan", "router"]) == 1
    assert "--run-router=false" in capsys.readouterr().err
