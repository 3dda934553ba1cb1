"""Real gobgpd daemons in network namespaces, and a router worker's BGP half that drives one of them.

Touches the kernel and starts processes; everything started here is ended here, by its process id. `Daemon` restarts
its process when it ends, as the agent's supervisor does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from select import select

from support.namespaces import Namespace, veth

from kube_router.ipc.messages import Node
from kube_router.workers.model import Outcome
from kube_router.workers.nodefacts import node_facts
from kube_router.workers.router.bgp import Bgp
from kube_router.workers.router.bgpstate import BgpState
from kube_router.workers.router.gobgp.client import Client, GobgpError, connect
from kube_router.workers.router.gobgp.watch import Watch
from kube_router.workers.router.plan import diff
from kube_router.workers.router.rib import Rib
from kube_router.workers.router.vips import NO_VIPS
from kube_router.workers.settings import Secrets, Settings

TOOLS = Path(os.environ.get("KUBE_ROUTER_TOOLS", Path.home() / ".cache" / "kube-router-tools"))
BINARIES = {3: Path("/usr/bin/gobgpd"), 4: TOOLS / "gobgpd"}
PORT = 1790
"""Sessions are held on a port that no other daemon of the machine uses, for readable captures."""


class Daemon:
    """One supervised gobgpd with its private socket in ``run_dir``."""

    def __init__(self, namespace: Namespace, generation: int, run_dir: Path) -> None:
        self.namespace, self.generation, self.run_dir = namespace, generation, run_dir
        self.socket = run_dir / "gobgpd" / "gobgpd.sock"
        self.log = run_dir / "gobgpd.log"
        self.socket.parent.mkdir(parents=True, exist_ok=True)
        self.starts = 0
        self._process: subprocess.Popen[str] | None = None
        self._ending = threading.Event()
        self._paused = threading.Event()
        self._thread = threading.Thread(target=self._supervise, daemon=True)

    def start(self) -> None:
        """Start it, and again whenever it ends."""
        self._thread.start()
        wait_for(self.socket.exists, 10, f"{self.socket} appears")

    def _supervise(self) -> None:
        arguments = [str(BINARIES[self.generation]), f"--api-hosts=unix://{self.socket}", "--pprof-disable"]
        arguments += ["--metrics-path="] if self.generation == 4 else []
        while not self._ending.is_set():
            if self._paused.is_set():
                time.sleep(0.05)
                continue
            self.socket.unlink(missing_ok=True)
            with self.log.open("a") as log:
                self._process = self.namespace.start([*arguments, "-l", "info"], stdout=log, stderr=log)
                self.starts += 1
                self._process.wait()
            self._ending.wait(0.2)

    @property
    def pid(self) -> int:
        """``ip netns exec`` replaces itself by the program, so this is gobgpd."""
        assert self._process is not None
        return self._process.pid

    def kill(self, *, pause: bool = False) -> None:
        """kill -9; with ``pause`` it is not started again before `resume`."""
        if pause:
            self._paused.set()
        os.kill(self.pid, signal.SIGKILL)

    def resume(self) -> None:
        """Let it start again."""
        self._paused.clear()

    def stop(self) -> None:
        """End it for good."""
        self._ending.set()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self._thread.join(timeout=5)


class Speaker:
    """A node's BGP half, driven by hand: the loop of the worker without its sockets."""

    def __init__(self, daemon: Daemon, name: str, settings: Settings, secrets: Secrets | None = None) -> None:
        self.daemon, self.name = daemon, name
        self.settings, self.secrets = settings, secrets or Secrets()
        self.bgp = Bgp(self.settings, self.secrets)
        self.cluster: dict[str, Node] = {}
        self.keep = False
        self.vips = NO_VIPS
        self.outcome = Outcome()
        self.writes = 0
        self._fresh = True

    def restart(self) -> None:
        """The worker process ends and a new one begins; gobgpd goes on."""
        self.bgp.close()
        self.bgp = Bgp(self.settings, self.secrets)
        self._fresh, self.writes = True, 0

    def close(self) -> None:
        """The worker process ends; gobgpd goes on."""
        self.bgp.close()

    def see(self, *nodes: Node) -> Outcome:
        """The cluster now consists of these nodes; one reconciliation."""
        self.cluster = {node.name: node for node in nodes}
        return self.reconcile(compare=True)

    def reconcile(self, *, compare: bool = False, observe: bool = False, retry: bool = False) -> Outcome:
        """One call of the BGP half."""
        own = self.cluster[self.name]
        facts = [node_facts(node, self.settings.families) for node in self.cluster.values()]
        self.outcome = self.bgp.reconcile(
            own,
            node_facts(own, self.settings.families),
            facts,
            self.vips,
            compare=compare or self._fresh,
            observe=observe,
            retry=retry,
            keep=self.keep,
        )
        self._fresh = False
        self.writes += self.outcome.writes
        return self.outcome

    def turn(self) -> None:
        """Take what has come from gobgpd, and reconcile as the loop would."""
        wakers = self.bgp.wakers()
        for descriptor in select(list(wakers), [], [], 0.05)[0]:
            wakers[descriptor]()
        self.reconcile(retry=bool(self.outcome.failures))

    def __str__(self) -> str:
        return f"{self.name}: {self.outcome}\nlearned {dict(self.bgp.learned)}"

    @property
    def settled(self) -> bool:
        """Whether deletions are no longer held back."""
        return not self.bgp.hold_deletions

    def states(self) -> Mapping[str, str]:
        """Session state by peer address."""
        return {session.address: session.state for session in self.outcome.sessions}


def wait_for(condition: Callable[[], bool], seconds: float, what: str, *speakers: Speaker | Outsider) -> None:
    """Turn the speakers until ``condition`` holds; raises AssertionError naming ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            seen = "".join(f"\n{speaker}" for speaker in speakers)
            raise AssertionError(f"not within {seconds} s: {what}{seen}")
        for speaker in speakers:
            speaker.turn()
        if not speakers:
            time.sleep(0.02)


@contextlib.contextmanager
def daemons(*places: tuple[Namespace, int, Path]) -> Iterator[list[Daemon]]:
    """Running daemons, one a (namespace, generation, run directory); ended at the end of the block."""
    with contextlib.ExitStack() as stack:
        started = []
        for namespace, generation, run_dir in places:
            daemon = Daemon(namespace, generation, run_dir)
            stack.callback(daemon.stop)
            daemon.start()
            started.append(daemon)
        yield started


class Outsider:
    """A router of somebody else: a gobgpd without policies, which remembers every prefix it was ever sent."""

    def __init__(self, daemon: Daemon, state: BgpState) -> None:
        self.daemon, self.state = daemon, state
        self.client = attached(daemon)
        self.plan(state)
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        self._watch = Watch(self.client, self._eventfd)
        self.rib = Rib()
        self.ever: set[str] = set()

    def plan(self, state: BgpState) -> None:
        """Bring the daemon to ``state``."""
        plan = diff(self.client.observe(), state)
        assert self.client.apply(plan) == (len(plan.steps), ())
        self.state = state

    def turn(self) -> None:
        """Take what has come."""
        self.rib.apply(self._watch.take().routes.values())
        self.ever |= self.rib.routes.keys()

    def routes(self) -> dict[str, str]:
        """Next hop by prefix, as it has them now."""
        self.turn()
        return dict(self.rib.routes)

    def established(self, address: str) -> bool:
        """Whether its session with ``address`` is up."""
        return any(peer.status.established for peer in self.client.peers(address))

    def close(self) -> None:
        """Let go of the daemon, which goes on."""
        self._watch.close()
        self.client.close()
        os.close(self._eventfd)


def attached(daemon: Daemon) -> Client:
    """A client of a daemon that is starting."""
    found: list[Client] = []

    def attempt() -> bool:
        try:
            found.append(connect(daemon.socket))
        except GobgpError as error:
            assert error.gone, error
        return bool(found)

    wait_for(attempt, 10, "gobgpd answers")
    return found[0]


def segment(hub: Namespace, *members: tuple[Namespace, tuple[str, ...]]) -> None:
    """One L2 segment: a bridge in ``hub``, a link ``eth0`` with the given addresses in each member."""
    hub.run("ip link add seg0 type bridge; ip link set seg0 up")
    for number, (member, addresses) in enumerate(members):
        veth(hub, f"port{number}", member, "eth0", right_addresses=addresses)
        hub.run(f"ip link set port{number} master seg0")
