"""One real kube-apiserver (and etcd) for all tests of this tier; a test that stops it starts one of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.apiserver import AGENT_TOKEN, AGENT_TOKENS, ApiServer, grant_agents
from support.follower import Follower

from kube_router.ipc.messages import KINDS, Kind
from kube_router.workers.kubeapi.apiserver import ApiServer as WatcherApiServer
from kube_router.workers.kubeapi.credentials import Credentials, load_access
from kube_router.workers.watcher.kubernetesapi import KubernetesSource
from kube_router.workers.watcher.listwatch import Tuning

Follow = Callable[..., Follower]


@pytest.fixture(scope="session")
def apiserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """The shared server: read it, add to it, do not stop it."""
    with ApiServer(tmp_path_factory.mktemp("apiserver"), tokens=AGENT_TOKENS) as server:
        grant_agents(server)
        yield server


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Follow]:
    """``follow(server, kinds, user=…, tuning=…)``: a follower by a kubeconfig with that user entry."""
    running: list[Follower] = []

    def start(
        server: ApiServer,
        kinds: tuple[Kind, ...] = KINDS,
        user: dict[str, Any] | None = None,
        tuning: Tuning | None = None,
    ) -> Follower:
        path = tmp_path / f"kubeconfig-{len(running)}"
        server.write_kubeconfig(path, user or {"token": AGENT_TOKEN})
        api = WatcherApiServer(Credentials(lambda: load_access(str(path), "")))
        follower = Follower(KubernetesSource(api, "test", kinds, tuning), kinds)
        running.append(follower.__enter__())
        return follower

    yield start
    for follower in running:
        follower.__exit__()
