"""The tests of this folder run in a virtual machine with a Debian kernel (`support.vm`).

On the host they are collected as always; instead of being run, each gets the reports that its run in the guest made. In
the guest, this file sends those reports. A test file here needs nothing for that: it is an ordinary test file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.vm import REPORTS_TO, Machine, VmError, in_guest

HERE = Path(__file__).resolve().parent


class Host:
    """Runs the chosen tests of this folder in one boot, when the first of them is due."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._machine: Machine | None = None
        self._refused = ""

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """In place of running the test: show the reports that came."""
        if not item.path.is_relative_to(HERE):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        try:
            data = self._started(item.session).reports(item.nodeid)
        except VmError as error:
            return [_failed(item, str(error))]
        reports = [self._config.hook.pytest_report_from_serializable(config=self._config, data=one) for one in data]
        phases = [report.when for report in reports]
        if phases != ["setup", "call", "teardown"] and (phases != ["setup", "teardown"] or reports[0].passed):
            return [*reports, _failed(item, f"the guest sent no whole report of this test, but {phases}")]
        return reports

    def _started(self, session: pytest.Session) -> Machine:
        if self._refused:
            raise VmError(self._refused)
        if self._machine is None:
            try:
                self._machine = Machine([one.nodeid for one in session.items if one.path.is_relative_to(HERE)])
            except VmError as error:
                self._refused = str(error)
                raise
            self._config.add_cleanup(self._machine.close)
        return self._machine


def _failed(item: pytest.Item, why: str) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid, location=item.location, keywords={}, outcome="failed", longrepr=why, when="call"
    )


class Guest:
    """Sends what happens to the host, one JSON object a line."""

    def __init__(self, config: pytest.Config, descriptor: int) -> None:
        self._config = config
        self._stream = os.fdopen(os.dup(descriptor), "w")

    def _send(self, **event: Any) -> None:
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._send(begin=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._send(report=self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._send(end=nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._send(broken=report.longreprtext)


def pytest_configure(config: pytest.Config) -> None:
    """Be the host's or the guest's half; neither in a guest where somebody runs pytest by hand."""
    if not in_guest():
        config.pluginmanager.register(Host(config), "vm-host")
    elif REPORTS_TO in os.environ:
        config.pluginmanager.register(Guest(config, int(os.environ[REPORTS_TO])), "vm-guest")
