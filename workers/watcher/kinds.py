"""Which kinds the watcher reads, for whom and from where: one table.

Pure: constants and functions on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from kube_router.ipc.messages import KINDS, Kind, Pod, Projection
from kube_router.workers.settings import Settings

WORKER_KINDS: dict[str, tuple[Kind, ...]] = {
    "router": ("nodes", "services", "endpointslices"),
    "cni": ("nodes",),
    "firewall": ("nodes", "pods", "services", "networkpolicies", "namespaces"),
    "proxy": ("nodes", "services", "endpointslices"),
    "loadbalancer": ("nodes", "services"),
}
"""What each worker reads. A kind that nobody reads is not listed, so it needs no RBAC and costs no memory."""


@dataclass(frozen=True, slots=True)
class Resource:
    """Where a kind lives in the API. ``selector`` is a field selector that the server applies for us."""

    kind: Kind
    group: str
    version: str
    object_kind: str
    namespaced: bool
    selector: str = ""

    @property
    def path(self) -> str:
        """Path of the collection over all namespaces."""
        root = f"/apis/{self.group}" if self.group else "/api"
        return f"{root}/{self.version}/{self.kind}"

    @property
    def api_version(self) -> str:
        """``apiVersion`` as objects carry it."""
        return f"{self.group}/{self.version}" if self.group else self.version


FINISHED_PHASES = ("Succeeded", "Failed")
"""A pod in one of these phases never runs again: it has no traffic, and its address may belong to another pod."""

RESOURCES: dict[Kind, Resource] = {
    resource.kind: resource
    for resource in (
        Resource("nodes", "", "v1", "Node", namespaced=False),
        Resource("namespaces", "", "v1", "Namespace", namespaced=False),
        Resource(
            "pods",
            "",
            "v1",
            "Pod",
            namespaced=True,
            selector=",".join(f"status.phase!={phase}" for phase in FINISHED_PHASES),
        ),
        Resource("services", "", "v1", "Service", namespaced=True),
        Resource("endpointslices", "discovery.k8s.io", "v1", "EndpointSlice", namespaced=True),
        Resource("networkpolicies", "networking.k8s.io", "v1", "NetworkPolicy", namespaced=True),
    )
}


def selected(item: Projection) -> bool:
    """What the field selectors mean, for sources without a server that applies them."""
    return not (isinstance(item, Pod) and item.phase in FINISHED_PHASES)


def enabled_workers(settings: Settings) -> tuple[str, ...]:
    """The workers that flags ask for and that are built."""
    wanted = {
        "router": settings.run_router,
        "cni": settings.run_router and settings.enable_cni,
        "firewall": settings.run_firewall,
        "proxy": settings.run_service_proxy,
        "loadbalancer": settings.run_loadbalancer,
    }
    return tuple(worker for worker, on in wanted.items() if on and worker not in settings.unbuilt_workers)


def wanted_kinds(settings: Settings) -> tuple[Kind, ...]:
    """The kinds that some enabled, built worker reads, in the order of `KINDS`."""
    wanted = {kind for worker in enabled_workers(settings) for kind in WORKER_KINDS[worker]}
    return tuple(kind for kind in KINDS if kind in wanted)
