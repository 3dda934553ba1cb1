"""A second opinion on the kernel: what pyroute2, and not our own drivers, reads of our routes and of kube-bridge.

Touches the kernel: reads only, and only for people (``kube-routerctl routes``) and tests. No worker imports this:
pyroute2 costs 22 MB in each process that does, which is why the drivers have a codec of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyroute2 import IPRoute

from kube_router.workers.kernel.routes import AF, MAIN_TABLE, PROTOCOL
from kube_router.workers.model import Family


@dataclass(frozen=True, slots=True)
class SurveyedRoute:
    """A route of the main table with our protocol. ``gateways`` holds several only if some other hand made it so."""

    prefix: str
    gateways: tuple[str, ...]
    link: str


def survey_routes() -> list[SurveyedRoute]:
    """Our routes of both families in the network namespace of the caller, IPv4 first, each family by prefix text."""
    with IPRoute() as kernel:
        names = {link["index"]: link.get("IFLA_IFNAME", "?") for link in kernel.get_links()}
        found = []
        for family in Family:
            routes = kernel.get_routes(family=int(AF[family]), table=MAIN_TABLE, proto=PROTOCOL)
            found += sorted(_read(routes, family, names), key=lambda route: route.prefix)
        return found


def _read(routes: object, family: Family, names: dict[int, str]) -> Iterator[SurveyedRoute]:
    anywhere = "0.0.0.0" if family is Family.IPV4 else "::"
    for route in routes:  # type: ignore[attr-defined]
        destination = route.get("RTA_DST") or anywhere
        hops = route.get("RTA_MULTIPATH") or [route]
        gateways = tuple(hop.get("RTA_GATEWAY") or "" for hop in hops)
        index = route.get("RTA_OIF") or hops[0].get("oif", 0)
        yield SurveyedRoute(f"{destination}/{route['dst_len']}", gateways, names.get(index, "?"))
