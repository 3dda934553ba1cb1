"""The allocator's process: ``python -P -m kube_router.workers.loadbalancer``, run in the agent's ipc folder."""

from __future__ import annotations

import sys

from kube_router.workers.kubeapi.apiserver import make_server
from kube_router.workers.loadbalancer.controller import LoadBalancerController
from kube_router.workers.runtime import main
from kube_router.workers.settings import Settings

NAME = LoadBalancerController.name


def controller(settings: Settings) -> LoadBalancerController:
    """The allocator, with the way to the API server that the flags name."""
    return LoadBalancerController(settings, make_server(settings.kubeconfig, settings.master, NAME))


if __name__ == "__main__":
    sys.exit(main(NAME, controller))
