"""The Lease on the API server, and the thread that contends for it as long as the worker runs.

Touches the network. Renewing must not wait for a slow write of an address, nor the other way round: hence the thread.
A candidate that loses the Lease goes on contending; one that ends gives it back, so that the next need not wait.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import msgspec
from urllib3.exceptions import HTTPError

from kube_router.workers.kubeapi.apiserver import ApiError, ApiServer
from kube_router.workers.kubeapi.times import micro_time
from kube_router.workers.loadbalancer import names
from kube_router.workers.loadbalancer.election import (
    LEASE_SECONDS,
    RETRY_SECONDS,
    WRITE_SECONDS,
    Election,
    LeaseRecord,
    Move,
)
from kube_router.workers.runtime import Clock

log = logging.getLogger(__name__)

READ_SECONDS = 4.0
STOP_SECONDS = 1.0
"""The process has two seconds to end."""


def request(server: ApiServer, method: str, path: str, body: Any = None, seconds: float = WRITE_SECONDS) -> Any:
    """One request with a JSON body and a JSON answer; raises `ApiError`."""
    data = None if body is None else msgspec.json.encode(body)
    response = server.open(method, path, body=data, silence=seconds)
    try:
        return msgspec.json.decode(response.read())
    except (HTTPError, OSError) as error:
        raise server.failure(error, seconds) from None
    except msgspec.DecodeError as error:
        raise ApiError(f"{server.name}: {method} {path}: answer is not JSON: {error}") from None
    finally:
        response.close()


class LeaseKeeper:
    """Contends for the Lease; `leads` is the answer at any moment."""

    def __init__(self, server: ApiServer, namespace: str, identity: str, clock: Clock, eventfd: int) -> None:
        """``eventfd`` is written to when the lead is won or lost."""
        self._server, self._clock, self._eventfd = server, clock, eventfd
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._election = Election(identity)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._led = False
        self.trouble = ""
        self.terms = 0
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> None:
        """Begin to contend."""
        self._thread.start()

    def stop(self) -> None:
        """End, and give the Lease back if it is ours."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)
        if self.leads() and self._election.record is not None:
            record = self._election.record
            self._election.resign()
            try:
                self._write(record, holder="", duration=1.0, seconds=STOP_SECONDS / 2)
            except ApiError as error:
                log.info("the Lease %s is not given back: %s", names.LEASE, error)

    def leads(self) -> bool:
        """Whether this agent may write at this moment."""
        with self._lock:
            return self._election.leads(self._clock.monotonic())

    @property
    def holder(self) -> str:
        """Who holds the Lease, as far as known."""
        with self._lock:
            return self._election.record.holder if self._election.record else ""

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.step()
                self.trouble = ""
            except ApiError as error:
                self.trouble = f"Lease {names.LEASE}: {error}"
            except Exception as error:
                log.exception("the election failed with an unexpected error")
                self.trouble = f"Lease {names.LEASE}: {type(error).__name__}: {error}"
            self._notice()
            self._stopping.wait(RETRY_SECONDS)

    def _notice(self) -> None:
        leads = self.leads()
        if leads != self._led:
            self._led = leads
            self.terms += leads
            log.info("%s the Lease %s", "won" if leads else "lost", names.LEASE)
            os.eventfd_write(self._eventfd, 1)

    def step(self) -> None:
        """Read the Lease and do what is to be done with it; raises `ApiError`."""
        record = self._read()
        now = self._clock.monotonic()
        with self._lock:
            self._election.observe(record, now)
            move = self._election.move(now)
        if move is Move.WAIT:
            return
        try:
            written = self._write(record, holder=self._election.identity, duration=LEASE_SECONDS)
        except ApiError as error:
            if error.status == 409:  # somebody else was first; the next step sees who
                return
            raise
        with self._lock:
            self._election.succeeded(written, now)

    def _read(self) -> LeaseRecord | None:
        try:
            return record_of(request(self._server, "GET", f"{self._collection}/{names.LEASE}", seconds=READ_SECONDS))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def _write(
        self, record: LeaseRecord | None, *, holder: str, duration: float, seconds: float = WRITE_SECONDS
    ) -> LeaseRecord:
        now = micro_time(self._clock.time())
        same = record is not None and record.holder == holder
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": names.LEASE, **({"resourceVersion": record.version} if record else {})},
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": int(duration),
                "acquireTime": record.acquired if same and record else now,
                "renewTime": now,
                "leaseTransitions": (record.transitions if record else 0) + (not same and bool(holder)),
            },
        }
        if record is None:
            return record_of(request(self._server, "POST", self._collection, body, seconds))
        return record_of(request(self._server, "PUT", f"{self._collection}/{names.LEASE}", body, seconds))


def record_of(lease: Any) -> LeaseRecord:
    """The record of a Lease object; what is missing in it reads as zero, as in Go."""
    meta, spec = lease.get("metadata") or {}, lease.get("spec") or {}
    return LeaseRecord(
        holder=spec.get("holderIdentity") or "",
        duration=float(spec.get("leaseDurationSeconds") or 0),
        acquired=spec.get("acquireTime") or micro_time(0.0),
        renewed=spec.get("renewTime") or "",
        transitions=spec.get("leaseTransitions") or 0,
        version=meta.get("resourceVersion") or "",
    )
