"""Which run directory kube-routerctl looks at without being told."""

from __future__ import annotations

from pathlib import Path

from kube_router.supervisor.ctl import default_run_dir


def test_the_working_directory_counts_when_an_agent_has_its_socket_there(tmp_path: Path) -> None:
    assert default_run_dir(tmp_path) == "/run/kube-router"
    (tmp_path / "supervisord.sock").touch()
    assert default_run_dir(tmp_path) == str(tmp_path)
