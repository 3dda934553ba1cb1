"""Chooses the firewall's backend by the settings, and makes it with what belongs to it.

Touches the kernel only by opening sockets, in the network namespace of the calling thread. A backend brings its
libraries with it, so only the one that is asked for is imported.
"""

from __future__ import annotations

import logging

from kube_router.workers.firewall.backend import Backend, BackendError
from kube_router.workers.firewall.cleanup import Leftovers
from kube_router.workers.firewall.controller import Kernel
from kube_router.workers.firewall.established import Established
from kube_router.workers.kernel.iptables import Backend as Kind
from kube_router.workers.kernel.iptables import IptablesError, find_programs
from kube_router.workers.settings import Settings

log = logging.getLogger(__name__)


def reach(settings: Settings) -> Kernel:
    """The kernel, reached through the backend of ``--use-nftables-for-netpol``; raises `BackendError`."""
    try:
        backend, kind = _nftables() if settings.use_nftables_for_netpol else _iptables()
        recheck = Established() if settings.netpol_recheck_established else None
    except (OSError, IptablesError) as error:
        raise BackendError(str(error)) from error
    log.info("policies are enforced by %s", f"iptables ({kind})" if kind else "nftables")
    return Kernel(backend, Leftovers(settings.families, kind), recheck)


def _nftables() -> tuple[Backend, Kind | None]:
    from kube_router.workers.firewall.nftables import Nftables

    return Nftables(), None


def _iptables() -> tuple[Backend, Kind | None]:
    from kube_router.workers.firewall.iptables import Iptables
    from kube_router.workers.kernel.chains import ChainDriver

    programs = find_programs()
    return Iptables(chains=ChainDriver(programs)), programs.backend
