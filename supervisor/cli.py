"""The command ``kube-router``: parse, check, then become the supervisor, or do the one thing that a flag asks for.

Touches the process: prints, logs, and hands over to `launch` (which does not return while the agent runs) or `cleanup`.
The order of the checks and the exit codes are upstream's: 2 for a command line that is no sentence of the grammar, 1
for anything else that is wrong, 0 for help, version, clean-up, a stop by signal, and for no worker to run.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kube_router.supervisor import govalues
from kube_router.supervisor.flags import PROGRAM, help_text, parse_arguments
from kube_router.supervisor.pflag import FlagError, Parsed

log = logging.getLogger(__name__)

OK, FAILED, BAD_SYNTAX = 0, 1, 2
CLIENT_PREFIX = "failed to parse kube-router config: "
RUN_PREFIX = "failed to run kube-router: "


class StartError(Exception):
    """The agent does not start; one line a reason."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``kube-router`` with ``arguments`` (those of the process by default) and return its exit status."""
    program = program_name(sys.argv[0])
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        parsed = parse_arguments(arguments)
    except FlagError as error:
        tell(help_text(program).rstrip("\n"), str(error))
        return BAD_SYNTAX
    try:
        return run(parsed, program, arguments)
    except StartError as error:
        tell(*error.lines)
        return FAILED


def program_name(argv0: str) -> str:
    """The program as the user called it; run as a module it has its own name."""
    return PROGRAM if argv0.endswith(".py") or argv0 in ("", "-c", "-m") else argv0


def tell(*lines: str) -> None:
    """Print lines to stderr; bytes of the command line that are no UTF-8 come out escaped."""
    for line in lines:
        sys.stderr.write(line.encode("utf-8", "backslashreplace").decode() + "\n")
    sys.stderr.flush()


def run(parsed: Parsed, program: str, arguments: Sequence[str]) -> int:
    """What follows the parsing, in upstream's order."""
    check_words(parsed)
    if parsed.values["help"]:
        tell(help_text(program).rstrip("\n"))
        return OK
    if parsed.values["version"]:
        tell(version_line(program))
        return OK
    if os.geteuid() != 0:
        raise StartError(f"{PROGRAM} must run as root: it configures the network of this host (user id {os.geteuid()})")
    return clean(parsed) if parsed.values["cleanup-config"] else start(parsed, program, arguments)


def check_words(parsed: Parsed) -> None:
    """The log level and stray words, which are refused even where help is asked for."""
    level = str(parsed.values["v"])
    try:
        govalues.parse_int(level, 32)
    except ValueError as error:
        raise StartError(f"failed to set log level to {govalues.quote(level)}: {error}") from None
    if parsed.positionals:
        raise StartError(f"unrecognized positional argument(s): [{' '.join(parsed.positionals)}]")


def version_line(program: str) -> str:
    """The line of ``--version``."""
    from kube_router.supervisor import version  # reads package metadata: only where it is wanted

    return version.version_line(program)


def clean(parsed: Parsed) -> int:
    """``--cleanup-config``. Wrong values of other flags are told but keep nothing from being cleaned."""
    from kube_router.supervisor.cleanup import cleanup
    from kube_router.supervisor.reading import read_configuration
    from kube_router.workers.logs import configure

    configuration = read_configuration(parsed, str(Path.cwd()))
    resolution = configuration.resolution
    configure(PROGRAM, resolution.settings)
    for problem in (*configuration.file_problems, *resolution.problems):
        log.warning("ignored while cleaning up: %s", problem)
    return cleanup(resolution.settings)


def start(parsed: Parsed, program: str, arguments: Sequence[str]) -> int:
    """Check everything, then become the supervisor; ``arguments`` are what ``parsed`` was read from."""
    from kube_router.supervisor.reading import read_configuration
    from kube_router.supervisor.surroundings import check_listening, check_source
    from kube_router.workers.logs import configure

    configuration = read_configuration(parsed, str(Path.cwd()))
    resolution, parsed = configuration.resolution, configuration.parsed
    settings = resolution.settings
    of_client = [problem for problem in resolution.problems if problem.of_client]
    of_client = of_client or configuration.located(check_source(parsed, settings))
    of_run: list[object] = [problem for problem in resolution.problems if not problem.of_client]
    of_run[:0] = configuration.file_problems
    if of_client:  # upstream's order: a bad source of state comes before the question whether there is a worker to run
        refuse(of_client, of_run)
    configure(PROGRAM, settings)
    log.info("%s", version_line(program))
    if not (settings.run_router or settings.run_firewall or settings.run_service_proxy):
        log.info("no worker to run: none of --run-router, --run-firewall and --run-service-proxy is true")
        return OK
    refuse([], of_run)
    from kube_router.supervisor.launch import launch, leftovers

    if not any(leftovers(Path(settings.run_dir))):  # they may still hold the ports; launch ends them
        refuse([], configuration.located(check_listening(parsed, settings)))
    for remark in resolution.remarks:
        log.warning("%s", remark)
    for worker in settings.unbuilt_workers:
        log.warning("%s is asked for and not built yet: it does not run, and nothing else is affected", worker)
    return launch(settings, resolution.secrets, arguments=arguments)


def refuse(of_client: Sequence[object], of_run: Sequence[object]) -> None:
    """Raise `StartError` with a line for each problem, if there is one; the prefixes are upstream's."""
    lines = [f"{CLIENT_PREFIX}{problem}" for problem in of_client]
    lines += [f"{RUN_PREFIX}{problem}" for problem in of_run]
    if lines:
        raise StartError(*lines)


if __name__ == "__main__":
    sys.exit(main())
