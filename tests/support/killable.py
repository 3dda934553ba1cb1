"""A firewall worker that can be killed at any moment, and started anew in no time: forked off a process that is ready.

Run as ``python -P -m support.killable FILE`` inside of a network namespace. FILE is a pickled `Life`. Each line of
standard input starts a worker, which has no memory of the one before it and is told its process id on standard output;
the number on the line is the step of the cluster that it finds. It then goes on through the steps, round and round,
until it is killed. One byte a step goes to standard error.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.firewallnode import KIND_OF, FirewallNode
from support.namespaces import Namespace

from kube_router.ipc.messages import Projection
from kube_router.workers.settings import Settings

Objects = tuple[Projection, ...]
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Life:
    """What a worker is given: its settings, and the clusters that it sees one after the other."""

    settings: Settings
    steps: tuple[Objects, ...]


@dataclass
class Killed:
    """What came of it: how many workers were killed, and how many steps they had finished before that."""

    workers: int = 0
    steps: int = 0


class Hasty(FirewallNode):
    """A worker whose cluster changes again as soon as it has followed."""

    def settle(self, quiet: float = 0.0, most: float = 1.0) -> None:
        """One reconciliation is enough."""
        syncs = self.beat.syncs
        self.until(lambda: self.beat.syncs > syncs, most)
        os.write(2, b".")


def run(life: Life, first: int) -> None:
    """Be a worker, to the end."""
    node = Hasty(life.settings)
    before = life.steps[first]
    node.begin(*before)
    for number in itertools.count(first + 1):
        after = life.steps[number % len(life.steps)]
        kept = {(KIND_OF[type(item)], item.key) for item in after}
        for item in before:
            if (KIND_OF[type(item)], item.key) not in kept:
                node._delta(KIND_OF[type(item)], gone=(item.key,))
        for item in after:
            if item not in before:
                node._delta(KIND_OF[type(item)], put=(item,))
        before = after
        node.settle()


def main() -> None:
    """See the module."""
    life: Life = pickle.loads(Path(sys.argv[1]).read_bytes())
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(life, int(line))
        print(child, flush=True)
        os.waitpid(child, 0)


@contextlib.contextmanager
def _started(namespace: Namespace, life: Life, folder: Path) -> Iterator[subprocess.Popen[str]]:
    file = folder / "life.pickle"
    file.write_bytes(pickle.dumps(life))
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    arguments = [sys.executable, "-P", "-m", "support.killable", str(file)]
    process = namespace.start(arguments, stdin=-1, stdout=-1, stderr=-1, env=environment)
    with process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


def kill_again_and_again(namespace: Namespace, life: Life, folder: Path, times: int, seed: int) -> Killed:
    """Start a worker and kill it (SIGKILL) within its first step or one of the next three; the next finds any step."""
    chance = random.Random(seed)
    killed = Killed()
    with _started(namespace, life, folder) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(times):
            _wait(process.stderr.fileno(), 0)  # what the last one had still to say
            process.stdin.write(f"{chance.randrange(len(life.steps))}\n")
            process.stdin.flush()
            pid = int(process.stdout.readline())
            if steps := chance.randrange(4):
                killed.steps += _wait(process.stderr.fileno(), steps)
            time.sleep(chance.uniform(0, 0.06))
            os.kill(pid, signal.SIGKILL)
            killed.workers += 1
    return killed


def _wait(descriptor: int, steps: int) -> int:
    """Wait until a worker has done so many steps, two seconds at most; without a number, none. How many it did."""
    done, end = b"", time.monotonic() + (2.0 if steps else 0.0)
    while (len(done) < steps or not steps) and select.select([descriptor], [], [], max(end - time.monotonic(), 0))[0]:
        done += os.read(descriptor, 64)
        assert not done.strip(b"."), done
    return len(done)


if __name__ == "__main__":
    main()
