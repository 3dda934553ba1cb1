"""What holds for every tier: no repository root on ``sys.path``, and no skipped test where CI runs.

The root would let our ``supervisor/`` hide PyPI's and let a test import the sources instead of what is installed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
IN_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def drop_root(path: list[str]) -> None:
    """Take the repository root, also written as '' or '.', out of ``path``."""
    path[:] = [entry for entry in path if Path(entry or ".").resolve() != ROOT]


# Time is measured by benchmarks alone: an example that a busy machine makes slow is no failure.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

drop_root(sys.path)
os.environ["PYTHONSAFEPATH"] = "1"  # for the children of tests: the same rule


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With CI=true a skipped test fails the session: a proof that did not run is no proof."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = len(reporter.stats.get("skipped", [])) if reporter is not None else 0
    if IN_CI and skipped and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why such a session failed."""
    skipped = len(terminalreporter.stats.get("skipped", []))
    if IN_CI and skipped:
        terminalreporter.write_line(f"CI: {skipped} skipped test(s) count as failures", red=True)
