"""The service proxy's process: ``python -P -m kube_router.workers.proxy``, run in the agent's ipc folder."""

from __future__ import annotations

import sys

from kube_router.workers.proxy.cleanup import Leftovers
from kube_router.workers.proxy.controller import ProxyController
from kube_router.workers.proxy.reach import reach
from kube_router.workers.runtime import Pace, main
from kube_router.workers.settings import Settings

PACE = Pace(min_interval=0.005, at_once=True)
"""An endpoint that has gone is still called until it is programmed: a single change goes at once."""


def make(settings: Settings) -> ProxyController:
    """The controller of these settings."""
    return ProxyController(settings, lambda: reach(settings), lambda _: Leftovers(settings.families))


if __name__ == "__main__":
    sys.exit(main("proxy", make, PACE))
