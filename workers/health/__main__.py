"""The health worker process: ``python -P -m kube_router.workers.health``, run in the agent's ipc folder."""

from __future__ import annotations

import sys

from kube_router.workers import logs
from kube_router.workers.health.worker import run_health
from kube_router.workers.settings import load_settings


def main() -> int:
    """Run until told to stop; returns the exit status."""
    settings = load_settings()
    logs.configure("health", settings)
    return run_health(settings)


if __name__ == "__main__":
    sys.exit(main())
