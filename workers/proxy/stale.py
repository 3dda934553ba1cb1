"""Tracked UDP connections to endpoints that a frontend no longer has: away with them, and only them.

Touches the kernel. UDP has no end of a connection: a client that goes on sending from one port would be sent to an
endpoint that is gone for as long as it asks. TCP ends by itself, and an endpoint that only drains keeps its
connections.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Collection

from kube_router.workers.flowfacts import Flow
from kube_router.workers.kernel.conntrack import ConntrackDriver
from kube_router.workers.model import Failure, Family
from kube_router.workers.nftcode import attribute
from kube_router.workers.proxy.nftdiff import Left

PHASE = "conntrack"
_UDP = 17
_DESTINATION = {Family.IPV4: 2, Family.IPV6: 4}
_DESTINATION_PORT = 3


def forget_connections(left: Collection[Left]) -> tuple[Failure, ...]:
    """Delete the tracked UDP connections that lead from a frontend to an endpoint which has left it."""
    failures = []
    for family in Family:
        ways = [way for way in left if way.family is family and way.protocol == _UDP]
        if not ways:
            continue
        try:
            driver = ConntrackDriver()
            try:
                addresses = {_endpoint(way)[0] for way in ways}
                flows = driver.flows_of(family, addresses)
                driver.delete(flow for flow in flows if any(_leads(flow, way) for way in ways))
            finally:
                driver.close()
        except OSError as error:
            failures.append(Failure(PHASE, f"{family}: tracked UDP connections: {error.strerror or error}"))
    return tuple(failures)


def _endpoint(way: Left) -> tuple[str, int]:
    size = way.family.bits // 8
    return str(ipaddress.ip_address(way.target[:size])), int.from_bytes(way.target[size : size + 2], "big")


def _leads(flow: Flow, way: Left) -> bool:
    """Whether a connection was opened to the frontend and ends at the endpoint."""
    if flow.protocol.lower() != "udp" or (flow.destination, flow.port) != _endpoint(way):
        return False
    if attribute(_DESTINATION_PORT, struct.pack("!H", way.port)) not in flow.original:
        return False
    return not way.address or attribute(_DESTINATION[way.family], way.address) in flow.original
