"""The whole configuration of an agent: command line, over the flags file, with what the machine says.

Touches files, for reading: at start, and again whenever one of them changes (`follow`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from kube_router.supervisor.flagsfile import FlagsFile, read_flags
from kube_router.supervisor.pflag import Parsed
from kube_router.supervisor.settings import Problem, Resolution, resolve
from kube_router.supervisor.surroundings import read_surroundings, read_text


@dataclass(frozen=True, slots=True)
class Configuration:
    """``command`` is the command line alone, ``parsed`` has the flags file under it.

    ``file_problems``: lines about the flags file that are no problem of a flag's value.
    """

    command: Parsed
    parsed: Parsed
    resolution: Resolution
    file: FlagsFile | None = None
    file_problems: tuple[str, ...] = ()

    def located(self, problems: Iterable[Problem]) -> list[Problem]:
        """The problems, each with file and line if its value comes from the flags file."""
        if self.file is None:
            return list(problems)
        found = []
        for problem in problems:
            place = self.file.place(problem.key.removeprefix("--"), self.command)
            found.append(replace(problem, where=place or problem.where))
        return found


def read_configuration(command: Parsed, working_directory: str) -> Configuration:
    """Read all files that the flags name and check every value; relative paths count from ``working_directory``."""
    file: FlagsFile | None = None
    file_problems: tuple[str, ...] = ()
    name = str(command.values["flags-file"])
    if name:
        try:
            file = read_flags(name, read_text(Path(working_directory, name)))
            file_problems = file.problems
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text or too long"
            file_problems = (str(Problem("--flags-file", name, f"must be a readable text file: {reason}")),)
    parsed = command if file is None else file.under(command)
    resolution = resolve(parsed, read_surroundings(parsed, working_directory))
    configuration = Configuration(command, parsed, resolution, file, file_problems)
    problems = tuple(configuration.located(resolution.problems))
    return replace(configuration, resolution=replace(resolution, problems=problems))
