"""The command ``kube-routerctl``: look at a running agent from the same host (or inside of its container).

Touches the agent's sockets and the kernel, for reading only. Exit codes: 0 healthy, 1 not healthy, 2 the agent or the
kernel cannot be asked, or the command line is wrong; ``plan`` has its own. Each subcommand is a function that `add_…`
hangs into the parser; later ones join there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec

from kube_router.supervisor import routerstatus, status
from kube_router.supervisor.conf import IPC_DIR
from kube_router.workers.settings import SETTINGS_FILE, Settings, load_secrets, load_settings

HEALTHY, UNHEALTHY, UNREACHABLE = 0, 1, 2
NOTHING_TO_DO, NO_PLAN, CHANGES = 0, 1, 2
"""Of ``plan``."""
WORKERS = {"router": routerstatus}
"""Workers of which ``status`` shows more; each is a module with ``collect`` and ``render``."""
PROGRAM = "kube-routerctl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``kube-routerctl`` with ``arguments`` (those of the process by default) and return its exit status."""
    options = make_parser().parse_args(arguments)
    run = options.run
    try:
        return int(run(options))
    except BrokenPipeError:  # ``| head``
        sys.stderr.close()
        return UNREACHABLE


def default_run_dir(here: Path) -> str:
    """``here`` when it is an agent's run directory (as supervisorctl looks there too), else the flag's default."""
    return str(here) if (here / "supervisord.sock").exists() else Settings().run_dir


def make_parser() -> argparse.ArgumentParser:
    """The grammar of the command line."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Look at a running kube-router agent.")
    parser.add_argument(
        "--run-dir",
        default=default_run_dir(Path.cwd()),
        metavar="DIR",
        help="the agent's --run-dir (default: the working directory if it is one, else %(default)s)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_status(commands)
    add_routes(commands)
    add_plan(commands)
    return parser


def add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``status [router]``: workers, source, sessions, routes, warnings; of one worker, all that it looks after."""
    parser = commands.add_parser(
        "status",
        help="how the agent stands: workers, source of state, BGP sessions, routes, warnings",
        description="How the agent stands. Exit status 0: healthy, 1: not healthy, 2: it cannot be reached.",
    )
    parser.add_argument(
        "worker",
        nargs="?",
        choices=tuple(WORKERS),
        help="show all of this worker's: peers, announced paths and learned routes of the router (needs root)",
    )
    add_output(parser)
    parser.add_argument(
        "--timeout",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="wait so long for the health worker (default %(default)g)",
    )
    parser.set_defaults(run=show_status)


def add_output(parser: argparse.ArgumentParser) -> None:
    """``-o text|json``, as every subcommand that prints something takes it."""
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="(default %(default)s)")


def add_routes(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``routes``: what the router worker keeps in the kernel, read by another library than it writes with."""
    parser = commands.add_parser(
        "routes",
        help="the pod routes that stand in this host's kernel, read independently of the agent",
        description="The routes of protocol 17 in the main table of this network namespace, read by pyroute2 and not "
        "by the agent's own driver; the agent need not run. Exit status 0, or 2 if the kernel cannot be asked.",
    )
    add_output(parser)
    parser.set_defaults(run=show_routes)


def show_routes(options: argparse.Namespace) -> int:
    """Print the routes and return an exit code."""
    from kube_router.workers.kernel.survey import survey_routes  # 22 MB and 0.2 s that `status` need not pay

    try:
        found = survey_routes()
    except OSError as error:
        print(f"{PROGRAM}: the kernel's routes cannot be read: {error}", file=sys.stderr)
        return UNREACHABLE
    if options.output == "json":
        print(json.dumps([asdict(route) for route in found], indent=2))
    else:
        rows = [("PREFIX", "VIA", "LINK"), *((route.prefix, ", ".join(route.gateways), route.link) for route in found)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    sys.stdout.flush()
    return HEALTHY


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``plan firewall|router``: what a worker would change now."""
    parser = commands.add_parser(
        "plan",
        help="what a worker would change in the kernel or gobgpd now; nothing on a healthy node",
        description="What a worker would change in this network namespace, and the router in gobgpd, now, by a plan of "
        "its own making from the watcher's state and what is there, all only read; the worker itself is not disturbed. "
        "Needs root. Exit status 0: nothing, 2: there are changes, 1: no plan can be made.",
    )
    parser.add_argument("worker", choices=tuple(PLANNERS), help="the worker")
    add_output(parser)
    parser.add_argument(
        "--timeout",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="wait so long for the watcher (default %(default)g)",
    )
    parser.set_defaults(run=show_plan)


def show_plan(options: argparse.Namespace) -> int:
    """Print the plan and return its exit code."""
    try:
        found = make_plan(options.worker, Path(options.run_dir), options.timeout)
    except NoPlan as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return NO_PLAN
    if options.output == "json":
        print(json.dumps({"worker": options.worker, **asdict(cast(Any, found))}, indent=2))
    else:
        sys.stdout.writelines(f"{line}\n" for line in found.changes)
    if found.stale:
        print(f"{PROGRAM}: the state is not confirmed: nothing is removed for the time being", file=sys.stderr)
    sys.stdout.flush()
    return CHANGES if found.changes else NOTHING_TO_DO


class NoPlan(Exception):
    """Why no plan can be made, in one line."""


class Preview(Protocol):
    """A plan as data: a dataclass with at least these fields."""

    @property
    def stale(self) -> bool: ...

    @property
    def changes(self) -> tuple[str, ...]: ...


def make_plan(worker: str, run_dir: Path, seconds: float) -> Preview:
    """The plan of ``worker``; raises `NoPlan`."""
    if os.geteuid() != 0:
        raise NoPlan(f"only root may look at what the {worker} worker looks after")
    ipc = run_dir / IPC_DIR
    try:
        settings = load_settings(ipc / SETTINGS_FILE)
    except (OSError, msgspec.DecodeError) as error:
        raise NoPlan(f"no agent runs with --run-dir={run_dir}: {error}") from None
    if not getattr(settings, f"run_{worker}"):
        raise NoPlan(f"this agent has no {worker} worker: it runs with --run-{worker}=false")
    return PLANNERS[worker](settings, ipc, seconds)


def plan_firewall(settings: Settings, ipc: Path, seconds: float) -> Preview:
    """The firewall's plan; raises `NoPlan`."""
    from kube_router.workers.firewall import preview  # the drivers, which `status` need not load

    try:
        return preview.preview(settings, ipc, seconds)
    except preview.PlanError as error:
        raise NoPlan(str(error)) from None


def plan_router(settings: Settings, ipc: Path, seconds: float) -> Preview:
    """The router's plan; raises `NoPlan`."""
    from kube_router.workers.router import preview  # the drivers and grpc

    try:
        return preview.preview(settings, load_secrets(settings.run_dir), ipc, seconds)
    except (preview.PlanError, OSError, msgspec.DecodeError) as error:
        raise NoPlan(str(error)) from None


PLANNERS: Mapping[str, Callable[[Settings, Path, float], Preview]] = {
    "firewall": plan_firewall,
    "router": plan_router,
}
"""The workers that have a plan to show; each is named as its flag ``--run-…``."""


def show_status(options: argparse.Namespace) -> int:
    """Print the status and return its exit code."""
    shown = WORKERS[options.worker] if options.worker else status
    try:
        found = shown.collect(options.run_dir, options.timeout)
    except status.Unreachable as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return UNREACHABLE
    print(json.dumps(found, indent=2) if options.output == "json" else shown.render(found))
    sys.stdout.flush()
    return HEALTHY if found["healthy"] else UNHEALTHY


if __name__ == "__main__":
    sys.exit(main())
