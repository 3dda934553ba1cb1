"""Where the test tools built from Go modules lie (kube-apiserver, gobgpd 4, current CNI plugins)."""

from __future__ import annotations

import os
from pathlib import Path


def tools_dir() -> Path:
    """The cache folder; ``make test`` fills it, KUBE_ROUTER_TOOLS overrides it."""
    return Path(os.environ.get("KUBE_ROUTER_TOOLS", Path.home() / ".cache" / "kube-router-tools"))


def tool(name: str) -> str:
    """Path of one tool; fails the test with what to do when it is missing."""
    path = tools_dir() / name
    if not path.exists():
        raise AssertionError(f"{path} is missing: run deploy/setup/go-tools.sh")
    return str(path)
