"""The snapshot on a disk that is full: a file system of its own, in a mount namespace of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, pathlib, sys
from kube_router.ipc.messages import Node
from kube_router.workers.watcher.diskcache import DiskCache, saved_cluster
cache = DiskCache(pathlib.Path(sys.argv[1], "watcher", "snapshot"))
small = saved_cluster("here", 1, {"nodes": [Node(name="n")]})
big = saved_cluster("here", 2, {"nodes": [Node(name=f"node-{n}", provider_id="x" * 100) for n in range(2000)]})
for cluster in (small, big):
    cache.save(cluster)
    cache.save_at_exit(None, 10)
    print(cache.trouble)
print(cache.load("here", ("nodes",)) == small, os.listdir(cache.path.parent))
"""


def test_full_disk_keeps_the_old_snapshot(tmp_path: Path) -> None:
    command = 'mount -t tmpfs -o size=64k small "$1" && exec "$2" -P -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", tmp_path, sys.executable, SCRIPT],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "None",
        f"snapshot on disk {tmp_path}/watcher/snapshot not written: No space left on device",
        "True ['snapshot']",
    ]
