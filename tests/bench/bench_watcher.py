"""List and project 10,000 pods from a real kube-apiserver's bytes, against the official client's models."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from run import Baseline, Result
from support.apiserver import ADMIN_TOKEN, ApiServer

PODS = 10_000
PAGE = 500
BASELINE_PAGES = 2


def pod(number: int) -> dict[str, object]:
    """A pod of ordinary size."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"app-{number}",
            "namespace": "default",
            "labels": {"app": f"app-{number % 300}", "pod-template-hash": f"6f7c9d{number:04x}", "tier": "backend"},
            "annotations": {"checksum/config": f"{number:064x}"},
        },
        "spec": {
            "nodeName": f"node-{number % 100}",
            "containers": [
                {
                    "name": "app",
                    "image": "registry.example/app:1",
                    "ports": [{"name": "http", "containerPort": 8080}],
                    "env": [{"name": f"VARIABLE_{i}", "value": f"value {i}"} for i in range(5)],
                    "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}},
                }
            ],
        },
    }


def fill(server: ApiServer) -> None:
    """Create the pods over eight connections."""

    def some(start: int) -> None:
        connection = server.connect()
        for number in range(start, PODS, 8):
            server.request_on(connection, "POST", "/api/v1/namespaces/default/pods", pod(number))
        connection.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(some, range(8)))


def save_pages(server: ApiServer, folder: Path) -> None:
    """Every page of the list as the server sends it, one file each."""
    connection = server.connect()
    token, number = "", 0
    while True:
        path = f"/api/v1/pods?limit={PAGE}" + (f"&continue={token}" if token else "")
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}", "Accept": "application/json"}
        connection.request("GET", path, headers=headers)
        data = connection.getresponse().read()
        (folder / f"{number:03}.json").write_bytes(data)
        token, number = json.loads(data)["metadata"].get("continue", ""), number + 1
        if not token:
            connection.close()
            return


def run() -> Iterator[Result]:
    """Each way runs in a process of its own, so that its peak memory is its own."""
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder) / "pages"
        pages.mkdir()
        with ApiServer(Path(folder) / "api") as server:
            fill(server)
            save_pages(server, pages)
        ours = [measure("ours", pages) for _ in range(3)]
        client = measure("client", pages)
    cpu, growth = sorted(ours)[1]
    client_cpu, client_growth = client
    scale = PODS / (BASELINE_PAGES * PAGE)
    shape = f"{PODS} pods in pages of {PAGE}; the client's models on {BASELINE_PAGES} pages, times {scale:g}"
    baseline = Baseline("official client's models", client_cpu * scale * 1000)
    yield Result("watcher.list.cpu", "decode and project 10,000 pods", cpu * 1000, "ms CPU", 150.0, baseline, shape)
    baseline = Baseline("official client's models", client_growth * scale)
    yield Result("watcher.list.memory", "peak growth for 10,000 pods", growth, "MiB", 40.0, baseline, shape)


def measure(way: str, pages: Path) -> tuple[float, float]:
    """(CPU seconds, peak growth in MiB) of one way, in a new process."""
    command = [sys.executable, "-P", str(Path(__file__)), way, str(pages)]
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    cpu, growth = done.stdout.split()
    return float(cpu), float(growth)


def ours(pages: Path) -> object:
    """As the watcher does it: page by page, only projections are kept."""
    import msgspec

    from kube_router.workers.watcher.apiobjects import OBJECTS, Page
    from kube_router.workers.watcher.projections import PROJECT

    decoder = msgspec.json.Decoder(Page[OBJECTS["pods"]])  # type: ignore[misc]
    project = PROJECT["pods"]
    ready()
    kept = []
    for path in sorted(pages.iterdir()):
        kept.extend(map(project, decoder.decode(path.read_bytes()).items or ()))
    assert len(kept) == PODS
    return kept


def client(pages: Path) -> object:
    """As a user of the official client gets them."""
    from kubernetes import client as kubernetes_client

    api = kubernetes_client.ApiClient()
    ready()
    return [_deserialize(api, path.read_text()) for path in sorted(pages.iterdir())[:BASELINE_PAGES]]


def _deserialize(api: Any, text: str) -> object:
    if "response_text" in inspect.signature(api.deserialize).parameters:
        return api.deserialize(text, "V1PodList", "application/json")
    return api.deserialize(SimpleNamespace(data=text), "V1PodList")  # clients before 36


_before = (0.0, 0.0)


def ready() -> None:
    """Imports are done: what comes now counts."""
    global _before
    # The kernel's high-water mark outlives exec: begin it anew (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    _before = (time.process_time(), _peak())


def _peak() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


if __name__ == "__main__":
    result = {"ours": ours, "client": client}[sys.argv[1]](Path(sys.argv[2]))
    print(time.process_time() - _before[0], _peak() - _before[1])
