"""An allocator of load-balancer addresses on a real API server, driven by hand: its worker's loop without sockets."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.apiserver import AGENT_TOKEN, ApiServer
from support.follower import Follower

from kube_router.ipc.messages import Kind, SourceState
from kube_router.ipc.replica import Cluster
from kube_router.workers.kubeapi.apiserver import ApiServer as Way
from kube_router.workers.kubeapi.credentials import Credentials, load_access
from kube_router.workers.loadbalancer.controller import LoadBalancerController
from kube_router.workers.model import Outcome
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings
from kube_router.workers.watcher.kubernetesapi import KubernetesSource

KINDS: tuple[Kind, ...] = ("nodes", "services")


class FaultyWay(Way):
    """The way to a real server; ``before`` sees each request and may delay it, ``after`` may lose its answer."""

    def __init__(self, credentials: Credentials) -> None:
        super().__init__(credentials, "loadbalancer")
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.after: Callable[[str, str], None] = lambda method, path: None
        self.asked: list[tuple[str, str]] = []

    def open(self, method: str, path: str, *arguments: Any, **keywords: Any) -> Any:
        """As the real one."""
        self.asked.append((method, path))
        self.before(method, path)
        response = super().open(method, path, *arguments, **keywords)
        self.after(method, path)
        return response


class Allocator:
    """One agent's allocator, as user ``agent`` with the documented rights."""

    def __init__(self, server: ApiServer, folder: Path, pod: str, namespace: str = "kube-system", **flags: Any) -> None:
        kubeconfig = folder / f"kubeconfig-{pod}"
        server.write_kubeconfig(kubeconfig, {"token": AGENT_TOKEN})
        credentials = Credentials(lambda: load_access(str(kubeconfig), ""))
        self.follower = Follower(KubernetesSource(Way(credentials), "test", KINDS), KINDS)
        self.way = FaultyWay(Credentials(lambda: load_access(str(kubeconfig), "")))
        ranges = ("192.0.2.0/26", "2001:db8:5::/122")
        settings = Settings(
            **{
                "enable_ipv6": True,
                "loadbalancer_ip_range": ranges,
                "pod_name": pod,
                "pod_namespace": namespace,
                **flags,
            }
        )
        self.controller = LoadBalancerController(settings, self.way)
        self.outcome = Outcome()
        self.deaf = False
        self._seen: dict[Kind, dict[str, Any]] = {}

    def __enter__(self) -> Allocator:
        self.follower.__enter__()
        self.follower.until_listed()
        return self

    def __exit__(self, *_: object) -> None:
        self.follower.__exit__()
        self.controller.close()

    @property
    def leads(self) -> bool:
        """Whether it holds the Lease."""
        return self.controller._lease.leads()

    def die(self) -> None:
        """As by kill -9: it renews nothing and gives nothing back."""
        self.controller._lease._stopping.set()
        self.controller._lease._thread.join()
        self.controller._lease._election.resign()

    def turn(self) -> Outcome:
        """One call of the loop, with what the watch has told; a ``deaf`` one hears nothing of the watch."""
        if not self.deaf:
            self.follower.take()
        found: dict[Kind, dict[str, Any]] = (
            self._seen if self.deaf else {kind: dict(self.follower.store.objects(kind)) for kind in KINDS}
        )
        changes = {
            kind: {
                key: (self._seen.get(kind, {}).get(key), found[kind].get(key))
                for key in self._seen.get(kind, {}).keys() | found[kind].keys()
                if self._seen.get(kind, {}).get(key) is not found[kind].get(key)
            }
            for kind in KINDS
        }
        trigger = Trigger(start=not self._seen, retry=bool(self.outcome.failures), changes=changes)
        self._seen = found
        state = SourceState(source="test", in_sync=True)
        self.outcome = self.controller.reconcile(Cluster(state, found), trigger)
        return self.outcome


def turn_until(condition: Callable[[], bool], *allocators: Allocator, seconds: float = 30.0) -> None:
    """Turn the allocators until the condition holds; AssertionError with what they say if it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, [allocator.outcome for allocator in allocators]
        for allocator in allocators:
            allocator.turn()
        time.sleep(0.02)
