"""The router worker process: ``python -P -m kube_router.workers.router``, run in the agent's ipc folder."""

from __future__ import annotations

import sys

from kube_router.workers import logs
from kube_router.workers.router.controller import RouterController
from kube_router.workers.runtime import run
from kube_router.workers.settings import load_secrets, load_settings


def main() -> int:
    """Run until told to stop; returns the exit status."""
    settings = load_settings()
    logs.configure("router", settings)
    return run(RouterController(settings, load_secrets(settings.run_dir)))


if __name__ == "__main__":
    sys.exit(main())
