"""The cni worker process: ``python -P -m kube_router.workers.cni``, run in the agent's ipc folder."""

from __future__ import annotations

import sys

from kube_router.workers import logs
from kube_router.workers.cni.controller import CniController
from kube_router.workers.runtime import run
from kube_router.workers.settings import load_settings


def main() -> int:
    """Run until told to stop; returns the exit status."""
    settings = load_settings()
    logs.configure("cni", settings)
    return run(CniController(settings))


if __name__ == "__main__":
    sys.exit(main())
