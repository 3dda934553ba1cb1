"""The cni worker process: ``python -P -m kube_router.workers.cni``, run in the agent's ipc folder."""

from __future__ import annotations

import sys

from kube_router.workers.cni.controller import CniController
from kube_router.workers.runtime import main

if __name__ == "__main__":
    sys.exit(main("cni", CniController))
