"""The machine itself: another kernel than the host's, with the modules that the tests of this folder are about."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.vm import in_guest, modprobe


def test_this_runs_in_the_machine() -> None:
    assert in_guest()
    assert os.uname().release.endswith("-amd64")


@pytest.mark.parametrize("module", ["ipip", "ip6_tunnel", "fou", "fou6", "ip_vs", "dummy"])
def test_the_kernel_has(module: str) -> None:
    modprobe(module)
    assert Path("/sys/module", module).is_dir()
