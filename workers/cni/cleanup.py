"""What ``--cleanup-config`` does about CNI: the plan towards wanting nothing, carried out.

Touches the kernel through `Host`. Decisions:

- kube-bridge goes when it has no ports. With ports, pods (or somebody else) still use it: it is left, which is told.
- The CNI configuration file stays as it is, ranges of ours included, as with upstream: without it, the container
  runtime would take the node's network for unready, and pods that are still there could not be deleted in order. The
  record of our ranges stays with it, so that a later agent still knows them for its own.
- Sysctls stay: others may rely on them by now.
"""

from __future__ import annotations

from kube_router.workers.cni.desired import DesiredCni
from kube_router.workers.cni.host import Host
from kube_router.workers.cni.names import PHASE_BRIDGE
from kube_router.workers.cni.plan import diff
from kube_router.workers.model import Failure
from kube_router.workers.settings import Settings


def cleanup(settings: Settings) -> list[Failure]:
    """Remove what the cni worker made; what was left, and why, as failures."""
    host = Host(settings.cni_conf_file, settings.state_dir)
    try:
        plan = diff(host.observe(host.observe_links(), ()), DesiredCni())
        applied = host.apply(plan)
    except OSError as error:
        return [Failure(PHASE_BRIDGE, f"links cannot be listed: {error.strerror}")]
    finally:
        host.close()
    left = (Failure(PHASE_BRIDGE, warning) for warning in plan.warnings)
    return [*plan.failures, *left, *applied.failures]
