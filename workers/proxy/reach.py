"""Chooses the proxy's backend by the settings and by what this kernel has, and makes it.

Touches the kernel only by opening sockets, in the network namespace of the calling thread. A backend brings its modules
with it, so only the one that is used is imported.
"""

from __future__ import annotations

import logging

from kube_router.workers.proxy.backend import Backend, BackendError
from kube_router.workers.settings import Settings

log = logging.getLogger(__name__)

AUTO, IPVS, NFTABLES = "auto", "ipvs", "nftables"
FLAG = "--service-proxy-backend"


def reach(settings: Settings) -> Backend:
    """The backend of ``--service-proxy-backend``; raises `BackendError`."""
    wanted = settings.service_proxy_backend
    if wanted == IPVS:
        raise BackendError(f"{FLAG} {IPVS}: this backend is not built yet; use {NFTABLES}")
    from kube_router.workers.proxy.nftables import Nftables

    backend = Nftables()
    log.info("Services are translated by %s", backend.name)
    return backend
