"""The firewall worker process: ``python -P -m kube_router.workers.firewall``, run in the agent's ipc folder."""

from __future__ import annotations

import sys

from kube_router.workers.firewall.controller import FirewallController
from kube_router.workers.firewall.reach import reach
from kube_router.workers.runtime import Pace, main

PACE = Pace(min_interval=0.005, at_once=True)
"""A pod waits for its policies: a single change goes at once, and what follows closely becomes one sync."""

if __name__ == "__main__":
    sys.exit(main("firewall", lambda settings: FirewallController(settings, lambda: reach(settings)), PACE))
