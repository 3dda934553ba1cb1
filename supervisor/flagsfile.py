"""The file of ``--flags-file``: flags, one a line, that the command line wins over.

Pure: the file's text in, `FlagsFile` out. A line is one argument exactly as it would stand on a command line or in the
``args`` of a manifest, and always ``--name=value`` (a bool may stand alone); blank lines, blanks around a line and
lines that begin with ``#`` count for nothing, and nothing is quoted. A list that is given twice adds up within the
file; a list on the command line replaces that of the file.

Each fault is a line that names file and line number. What cannot be read as a flag is not repeated: it may be the rest
of a password.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kube_router.supervisor.flags import parse_arguments
from kube_router.supervisor.pflag import FlagError, Parsed

REFUSED = frozenset(("flags-file", "help", "version", "cleanup-config"))
"""Flags that mean something only on the command line."""
_ARGUMENT = re.compile(r"(?:--([A-Za-z0-9][A-Za-z0-9.-]*)|-v)(?:=.*)?")


@dataclass(frozen=True, slots=True)
class FlagsFile:
    """What a flags file says. ``lines``: where each flag stands last; ``problems``: one line a fault."""

    path: str
    parsed: Parsed
    lines: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def under(self, command: Parsed) -> Parsed:
        """The command line, completed by the flags that it does not give."""
        values = {
            name: value if command.given(name) or not self.parsed.given(name) else self.parsed.values[name]
            for name, value in command.values.items()
        }
        return replace(command, values=values, texts={**self.parsed.texts, **command.texts})

    def place(self, flag_name: str, command: Parsed) -> str:
        """``FILE:LINE: `` when the flag comes from the file, else nothing."""
        line = self.lines.get(flag_name)
        return "" if line is None or command.given(flag_name) else f"{self.path}:{line}: "


def read_flags(path: str, text: str) -> FlagsFile:
    """Parse the file; a line at fault is left out and told, the others are read on."""
    arguments: list[str] = []
    lines: dict[str, int] = {}
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        argument = line.strip()
        if not argument or argument.startswith("#"):
            continue
        try:
            for name in _names(argument):
                lines[name] = number
            arguments.append(argument)
        except FlagError as error:
            problems.append(f"{path}:{number}: {error}")
    return FlagsFile(path, parse_arguments(arguments), lines, tuple(problems))


def _names(argument: str) -> Mapping[str, str]:
    """The flag that an argument gives, by name; raises `FlagError`."""
    match = _ARGUMENT.fullmatch(argument)
    if match is None:
        raise FlagError("must be --name=value, a comment (#) or empty")
    if match[1] in REFUSED:
        raise FlagError(f"--{match[1]}: can be given on the command line only")
    return parse_arguments([argument]).texts
