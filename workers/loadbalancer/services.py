"""Services on the API server: read all once, and write one's addresses and condition.

Touches the network. A write is a compare-and-swap: the Service is read afresh, must be the one that was decided about
and hold what it held then, and goes back under its resourceVersion. What is not ours in its status stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kube_router.ipc.messages import Key, Service
from kube_router.workers.kubeapi.apiserver import ApiError, ApiServer
from kube_router.workers.kubeapi.times import rfc3339
from kube_router.workers.loadbalancer import names
from kube_router.workers.loadbalancer.desired import addresses_of
from kube_router.workers.loadbalancer.lease import request
from kube_router.workers.model import IPAddress

PAGE = 500
LIST_SECONDS = 20.0


class Behind(Exception):
    """The Service is not, or not yet, what was decided about: wait for the watch to tell."""


@dataclass(frozen=True, slots=True)
class Condition:
    """The condition that says how a Service stands; ``message`` in one line."""

    ok: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Holding:
    """What a Service holds on the server, as listed; ``condition``: the one of ours, if it has it."""

    key: Key
    uid: str
    addresses: tuple[IPAddress, ...]
    condition: Condition | None


class Services:
    """The Services of one API server."""

    def __init__(self, server: ApiServer, may_write: Callable[[], bool]) -> None:
        """``may_write`` is asked right before each write: reading may have taken longer than the Lease lasts."""
        self._server, self._may_write = server, may_write

    def holdings(self) -> Iterator[Holding]:
        """The addresses of all Services, by a list that is not older than this call; raises `ApiError`."""
        more = ""
        while True:
            path = f"/api/v1/services?limit={PAGE}" + (f"&continue={more}" if more else "")
            page = request(self._server, "GET", path, seconds=LIST_SECONDS)
            for item in page.get("items") or ():
                yield _holding(item)
            more = (page.get("metadata") or {}).get("continue") or ""
            if not more:
                return

    def write(self, service: Service, addresses: Sequence[IPAddress] | None, condition: Condition, now: float) -> None:
        """Let ``service`` have ``condition`` and, for all entries that it has, ``addresses`` (None: as they are).

        ``now`` in Unix seconds. Raises `Behind`, or `ApiError`: with ``status`` None the write may have happened.
        """
        path = f"/api/v1/namespaces/{service.namespace}/services/{service.name}"
        try:
            fresh = request(self._server, "GET", path)
        except ApiError as error:
            if error.status == 404:
                raise Behind(f"service {service.key} is gone") from None
            raise
        status = fresh.setdefault("status", {})
        balancer = status.setdefault("loadBalancer", {})
        entries = balancer.get("ingress") or []
        told = [(entry.ip, entry.hostname) for entry in service.ingress]
        if fresh["metadata"].get("uid") != service.uid or told != [_identity(entry) for entry in entries]:
            raise Behind(f"service {service.key} has changed")
        if addresses is not None:
            kept = {entry.get("ip"): entry for entry in entries}
            balancer["ingress"] = [kept.get(str(address), {"ip": str(address)}) for address in addresses]
        status["conditions"] = _with_condition(status.get("conditions") or [], condition, fresh, now)
        if not self._may_write():
            raise Behind("the Lease is lost")
        try:
            request(self._server, "PUT", f"{path}/status", fresh)
        except ApiError as error:
            if error.status in (404, 409):
                raise Behind(f"service {service.key} has changed") from None
            raise


def _identity(entry: dict[str, Any]) -> tuple[str, str]:
    return entry.get("ip") or "", entry.get("hostname") or ""


def _with_condition(
    conditions: list[dict[str, Any]], condition: Condition, fresh: dict[str, Any], now: float
) -> list[dict[str, Any]]:
    status = "True" if condition.ok else "False"
    before = next((item for item in conditions if item.get("type") == names.CONDITION), {})
    ours = {
        "type": names.CONDITION,
        "status": status,
        "reason": condition.reason,
        "message": condition.message,
        "lastTransitionTime": before.get("lastTransitionTime") if before.get("status") == status else rfc3339(now),
        "observedGeneration": fresh["metadata"].get("generation", 0),
    }
    return [*(item for item in conditions if item.get("type") != names.CONDITION), ours]


def _holding(item: dict[str, Any]) -> Holding:
    meta, spec, status = item["metadata"], item.get("spec") or {}, item.get("status") or {}
    texts = [*(spec.get("externalIPs") or ())]
    texts += [entry.get("ip") for entry in (status.get("loadBalancer") or {}).get("ingress") or ()]
    found = next((each for each in status.get("conditions") or () if each.get("type") == names.CONDITION), None)
    condition = found and Condition(found.get("status") == "True", found.get("reason", ""), found.get("message", ""))
    held = addresses_of(filter(None, texts))
    return Holding(f"{meta['namespace']}/{meta['name']}", meta.get("uid", ""), held, condition)
