"""The command ``kube-routerctl``: look at a running agent from the same host (or inside of its container).

Touches the agent's sockets and the kernel's routes, for reading only. Exit codes: 0 healthy, 1 not healthy, 2 the agent
or the kernel cannot be asked, or the command line is wrong. Each subcommand is a function that `add_…` hangs into the
parser; later ones join there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kube_router.supervisor import status
from kube_router.workers.settings import Settings

HEALTHY, UNHEALTHY, UNREACHABLE = 0, 1, 2
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
    return parser


def add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``status``: workers, source, sessions, routes, warnings."""
    parser = commands.add_parser(
        "status",
        help="how the agent stands: workers, source of state, BGP sessions, routes, warnings",
        description="How the agent stands. Exit status 0: healthy, 1: not healthy, 2: it cannot be reached.",
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


def show_status(options: argparse.Namespace) -> int:
    """Print the status and return its exit code."""
    try:
        found = status.collect(options.run_dir, options.timeout)
    except status.Unreachable as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return UNREACHABLE
    print(json.dumps(found, indent=2) if options.output == "json" else status.render(found))
    sys.stdout.flush()
    return HEALTHY if found["healthy"] else UNHEALTHY


if __name__ == "__main__":
    sys.exit(main())
