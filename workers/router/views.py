"""What the router keeps of the objects that it gets: of Services and slices only what `VipTable` looks at.

Pure. In a cluster of a thousand nodes nearly all endpoints are elsewhere: without them a slice is small, and a slice
that changes elsewhere is no change at all here, so it wakes nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kube_router.ipc.messages import EndpointSlice, Kind, Projection, Service
from kube_router.workers.router.vips import LEADER_ANNOTATION
from kube_router.workers.settings import Settings


def views(settings: Settings) -> Mapping[Kind, Callable[[Projection], Projection]]:
    """What to keep, by kind."""
    node = settings.node_name

    def of_slice(item: Projection) -> Projection:
        assert isinstance(item, EndpointSlice)
        return EndpointSlice(
            name=item.name,
            namespace=item.namespace,
            annotations=LEADER if LEADER_ANNOTATION in item.annotations else NO_ANNOTATIONS,
            service=item.service,
            address_type=item.address_type,
            endpoints=tuple([one for one in item.endpoints if one.node_name is None or one.node_name == node]),
        )

    return {"services": of_service, "endpointslices": of_slice}


NO_ANNOTATIONS: dict[str, str] = {}
LEADER = {LEADER_ANNOTATION: ""}


def of_service(item: Projection) -> Projection:
    """A Service without ports, labels, selector and the like."""
    assert isinstance(item, Service)
    return Service(
        name=item.name,
        namespace=item.namespace,
        uid=item.uid,
        annotations=item.annotations or NO_ANNOTATIONS,
        type=item.type,
        cluster_ips=item.cluster_ips,
        external_ips=item.external_ips,
        internal_traffic_policy=item.internal_traffic_policy,
        external_traffic_policy=item.external_traffic_policy,
        ingress=item.ingress,
    )
