"""The router worker process: ``python -P -m kube_router.workers.router``, run in the agent's ipc folder."""

from __future__ import annotations

import logging
import sys

from kube_router.workers.kernel.rttables import declare_table
from kube_router.workers.router.controller import RouterController
from kube_router.workers.router.views import views
from kube_router.workers.runtime import main
from kube_router.workers.settings import Settings, load_secrets


def make(settings: Settings) -> RouterController:
    """The controller, with the secrets that only root reads; the overlay's table gets its name."""
    problem = declare_table() if settings.enable_overlay else None
    if problem:
        logging.getLogger(__name__).warning("%s", problem)
    return RouterController(settings, load_secrets(settings.run_dir))


if __name__ == "__main__":
    sys.exit(main("router", make, views=views))
