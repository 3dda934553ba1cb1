"""The router worker process: ``python -P -m kube_router.workers.router``, run in the agent's ipc folder."""

from __future__ import annotations

import sys

from kube_router.workers.router.controller import RouterController
from kube_router.workers.router.views import views
from kube_router.workers.runtime import main
from kube_router.workers.settings import Settings, load_secrets


def make(settings: Settings) -> RouterController:
    """The controller, with the secrets that only root reads."""
    return RouterController(settings, load_secrets(settings.run_dir))


if __name__ == "__main__":
    sys.exit(main("router", make, views=views))
