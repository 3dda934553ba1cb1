"""The cluster as the watcher knows it now, once: for commands that look at an agent without being one of its workers.

Touches the watcher's sockets.
"""

from __future__ import annotations

import time
from pathlib import Path

from kube_router.ipc.channels import Poller
from kube_router.ipc.messages import Kind
from kube_router.ipc.replica import Cluster, Replica


class NoCluster(Exception):
    """The watcher gave no state in time; one line."""


def take_cluster(name: str, kinds: tuple[Kind, ...], ipc: Path, seconds: float) -> Cluster:
    """The cluster's objects of ``kinds``, confirmed if that comes in time; ``ipc`` is the agent's socket directory.

    ``name`` stands for the asking command in the watcher's log. Raises `NoCluster` after ``seconds``.
    """
    replica = Replica(name, kinds, ipc)
    try:
        end = time.monotonic() + seconds
        while not replica.usable and (left := end - time.monotonic()) > 0:
            replica.receive(time.monotonic())
            if not replica.usable:
                Poller.wait(replica.sockets, min(left, replica.wait(time.monotonic())))
        if not replica.usable:
            raise NoCluster(f"the watcher gave no state within {seconds:g} s")
        return replica.cluster
    finally:
        replica.close()
