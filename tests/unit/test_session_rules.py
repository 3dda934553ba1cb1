"""The rules of tests/conftest.py hold: a skip fails where CI runs, and the repository root is not importable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PASSING = "def test_fine():\n    pass\n"
SKIPPED = "import pytest\n\ndef test_left_out():\n    pytest.skip('no such kernel')\n"


def session(folder: Path, code: str, ci: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on one planted test with the real configuration and conftest."""
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    (folder / "tests" / "test_planted.py").write_text(code)
    environment = {**os.environ, "CI": ci, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("code", "ci", "status"),
    [(PASSING, "true", 0), (PASSING, "", 0), (SKIPPED, "", 0), (SKIPPED, "true", 1), (PASSING + SKIPPED, "true", 1)],
)
def test_a_skip_fails_where_ci_runs(tmp_path: Path, code: str, ci: str, status: int) -> None:
    done = session(tmp_path, code, ci)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("count as failures" in done.stdout) == bool(status)
    assert done.stdout.rstrip().splitlines()[-1].startswith("=")


def test_the_root_is_not_importable() -> None:
    import supervisor

    assert ROOT not in {Path(entry or ".").resolve() for entry in sys.path}
    assert not Path(str(supervisor.__file__)).is_relative_to(ROOT / "supervisor")
