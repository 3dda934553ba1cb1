"""An agent under a real supervisord in a run directory and network namespace of its own, for the tests of its life.

Run as a program, this module is that agent: it launches what the JSON in its first argument says, like ``kube-router``
does after it has parsed its command line.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import msgspec

from kube_router.supervisor.programs import Program
from kube_router.workers.settings import Secrets, Settings

OPEN_MOUNTS = """
set -e
mount --make-rprivate /
for closed in "$@"; do
  [ "$closed" = -- ] && break
  mount -t tmpfs tmpfs "$WORK"
  mkdir "$WORK/upper" "$WORK/work"
  mount -t overlay overlay -o "lowerdir=$closed,upperdir=$WORK/upper,workdir=$WORK/work" "$closed"
  chmod o+rx "$closed"
  shift
done
shift
exec "$@"
"""
"""Shows closed directories as open ones, in a mount namespace of its own: the real ones stay as they are."""


def wait_until(condition: Callable[[], Any], seconds: float = 15.0) -> Any:
    """The first true value of ``condition``, or its last one after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def closed_folders(paths: Sequence[str]) -> list[str]:
    """The topmost directories above ``paths`` that other users cannot enter."""
    found = []
    for path in paths:
        parents = [*reversed(Path(path).parents)]
        closed = next((parent for parent in parents if parent.stat().st_mode & 0o005 != 0o005), None)
        if closed is not None:
            found.append(str(closed))
    return list(dict.fromkeys(found))


class Agent:
    """One agent; ``stop`` or the end of the ``with`` block ends it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        settings.setdefault("gobgp_admin_port", 0)
        settings.setdefault("health_port", 0)
        self.settings = Settings(run_dir=str(self.run_dir), state_dir=str(folder / "state"), **settings)
        self.programs: list[Program] | None = None
        self.arguments: list[str] | None = None
        """The arguments of ``kube-router``, if it is to be started by its command line."""
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = dict(os.environ)
        self.log_path = folder / "agent.log"
        self.wrapper: list[str] = []
        self.addresses: list[str] = []
        """With prefix length: on the loopback interface of its network namespace."""

    def script(self, name: str, text: str, **fields: Any) -> None:
        """Add a program of a few lines of Python; ``say`` prints a line of the workers' form."""
        path = self.folder / f"{name}.py"
        head = f"""
            import os, signal, sys, time
            def say(text, level="INFO "):
                print(f"2026-01-01T00:00:00.000Z {{level}} {name}  {{text}}", flush=True)
        """
        path.write_text(textwrap.dedent(head) + textwrap.dedent(text))
        fields.setdefault("command", (sys.executable, "-I", "-S", str(path)))
        self.programs = [*(self.programs or []), Program(name, (), True, **fields)]

    def open_to_others(self, *paths: str) -> None:
        """Run where other users can reach ``paths``, the interpreter and the installed code."""
        wanted = [os.path.realpath(sys.executable), sys.executable, msgspec.__file__, __file__, *paths]
        work = self.folder / "overlay"
        work.mkdir()
        self.environment["WORK"] = str(work)
        self.wrapper = ["unshare", "--mount", "sh", "-c", OPEN_MOUNTS, "sh", *closed_folders(wanted), "--"]

    def start(self, *, as_pid_1: bool = False, stdout: int | IO[bytes] | None = None, namespace: bool = True) -> None:
        """Start it; output goes to ``log_path`` unless ``stdout`` is given."""
        programs = None if self.programs is None else [asdict(program) for program in self.programs]
        what = json.dumps({"settings": msgspec.to_builtins(self.settings), "programs": programs})
        command = [sys.executable, "-P", __file__, what]
        if self.arguments is not None:
            command = [sys.executable, "-P", "-m", "kube_router.supervisor.cli", *self.arguments]
        if as_pid_1:
            command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *command]
        command = [*self.wrapper, *command]
        if namespace:
            setup = " && ".join(["ip link set lo up", *(f"ip address add {one} dev lo" for one in self.addresses)])
            command = ["unshare", "--net", "sh", "-c", f'{setup} && exec "$@"', "sh", *command]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log if stdout is None else stdout,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    # -- what is known of it -----------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """The agent's one stream."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def table(self) -> dict[str, Any]:
        """The programs in ``processes.json``."""
        try:
            found = json.loads((self.run_dir / "ipc" / "processes.json").read_text())
        except (OSError, ValueError):
            return {}
        programs = found["programs"]
        assert isinstance(programs, dict)
        return programs

    def running(self, *names: str) -> bool:
        """Whether these programs are in the state RUNNING."""
        table = self.table()
        return all(table.get(name, {}).get("state") == "RUNNING" for name in names)

    def wait_running(self, *names: str) -> dict[str, Any]:
        """Wait for it; returns the table."""
        assert wait_until(lambda: self.running(*names), 30), (self.table(), self.log)
        return self.table()

    def wait_log(self, text: str, seconds: float = 20.0) -> None:
        """Wait until ``text`` is in the stream."""
        assert wait_until(lambda: text in self.log, seconds), f"no {text!r} in:\n{self.log}"

    def supervisord(self) -> int:
        """Process id of supervisord, as this process sees it."""
        assert self.process is not None
        pids = [self.process.pid, *descendants(self.process.pid)]
        return next(pid for pid in pids if b"supervisor.supervisord" in command_line(pid))

    def pid_of(self, name: str) -> int:
        """Process id of a program, as this process sees it (also from another process namespace)."""
        inner = self.table()[name]["pid"]
        assert inner, (name, self.table())
        for pid in descendants(self.supervisord()):
            status = Path(f"/proc/{pid}/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("NSpid:"))
            if int(line.split()[-1]) == inner:
                return pid
        raise AssertionError(f"{name}: no process {inner}")

    def run(self, *command: str, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
        """A command in the agent's run directory and network namespace."""
        inside = ["nsenter", f"--net=/proc/{self.supervisord()}/ns/net", "--", *command]
        return subprocess.run(inside, cwd=self.run_dir, text=True, capture_output=True, timeout=timeout)

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``kube-routerctl``."""
        module = [sys.executable, "-P", "-m", "kube_router.supervisor.ctl", "--run-dir", str(self.run_dir)]
        return self.run(*module, *arguments)

    # -- its end -----------------------------------------------------------------------------------------------

    def stop(self, timeout: float = 30.0) -> tuple[int, float]:
        """SIGTERM to supervisord; returns exit status and seconds."""
        assert self.process is not None
        began = time.monotonic()
        os.kill(self.supervisord(), signal.SIGTERM)
        status = self.process.wait(timeout)
        return status, time.monotonic() - began

    def kill(self) -> None:
        """End everything of it at once."""
        if self.process is None:
            return
        pids = [self.process.pid, *descendants(self.process.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)


@contextlib.contextmanager
def new_agent(folder: Path, **settings: Any) -> Iterator[Agent]:
    """An agent that is gone at the end of the block."""
    agent = Agent(folder, **settings)
    try:
        yield agent
    finally:
        agent.kill()


def descendants(pid: int) -> list[int]:
    """Children, their children and so on."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def command_line(pid: int) -> bytes:
    """Arguments of a process, separated by NUL; empty for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def status_fields(pid: int) -> dict[str, list[str]]:
    """``/proc/PID/status``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def main() -> int:
    """Be the agent."""
    from kube_router.supervisor.launch import launch
    from kube_router.workers import logs

    what = json.loads(sys.argv[1])
    settings = msgspec.convert(what["settings"], Settings)
    programs = None if what["programs"] is None else [msgspec.convert(item, Program) for item in what["programs"]]
    logs.configure("kube-router", settings)
    return launch(settings, Secrets(), programs)


if __name__ == "__main__":
    sys.exit(main())
