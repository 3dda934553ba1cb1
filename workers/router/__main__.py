"""The router worker process: ``python -P -m kube_router.workers.router``, run in the agent's ipc folder."""

from __future__ import annotations

import sys

from kube_router.workers.router.controller import RouterController
from kube_router.workers.runtime import main
from kube_router.workers.settings import load_secrets

if __name__ == "__main__":
    sys.exit(main("router", lambda settings: RouterController(settings, load_secrets(settings.run_dir))))
