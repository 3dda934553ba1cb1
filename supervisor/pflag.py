"""The grammar of a command line as pflag (the flag library of kube-router) has it, and its help text.

Pure: a table of flags and arguments in, `Parsed` or `FlagError` out. Long names take two dashes and ``=VALUE`` or the
next argument; a bool takes a value only by ``=``; shorthands may be grouped and take their value at once, after ``=``
or from the next argument; flags and positional arguments mix; ``--`` ends the flags. A flag given twice keeps the last
value, a list flag appends (its first use replaces the default). Where an error would repeat the value of a secret flag,
it says ``<hidden>`` instead.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kube_router.supervisor import govalues

Kind = Literal[
    "bool",
    "string",
    "strings",
    "duration",
    "uint",
    "uint8",
    "uint16",
    "uint32",
    "uints",
    "ipSlice",
]
Value = bool | int | str | tuple[str, ...] | tuple[int, ...]
"""What a flag of each kind parses to: a duration is whole nanoseconds, an address is canonical text."""

HIDDEN = "<hidden>"
_BITS = {"uint": 64, "uint8": 8, "uint16": 16, "uint32": 32}
_LISTS = ("strings", "uints", "ipSlice")


class FlagError(Exception):
    """The command line is no sentence of the grammar; the text is pflag's, and never holds a secret."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: ``default`` and ``usage`` as the help prints them; a ``secret`` one's value is never repeated."""

    name: str
    kind: Kind
    default: str
    usage: str
    shorthand: str = ""
    secret: bool = False

    @property
    def title(self) -> str:
        """The flag as error messages call it."""
        return f"-{self.shorthand}, --{self.name}" if self.shorthand else f"--{self.name}"

    def read(self, text: str) -> Value:
        """The value of one use of the flag; raises ValueError with Go's words."""
        match self.kind:
            case "bool":
                return govalues.parse_bool(text)
            case "string":
                return text
            case "strings":
                return govalues.read_csv(text)
            case "duration":
                return govalues.parse_duration(text)
            case "uints":
                return tuple(govalues.parse_uint(item, 10, 64) for item in text.split(","))
            case "ipSlice":
                return _read_addresses(text)
            case number:
                return govalues.parse_uint(text, 0, _BITS[number])

    def default_value(self) -> Value:
        """The value of a flag that is not given."""
        return () if self.kind in _LISTS and not self.default else self.read(self.default)


def _read_addresses(text: str) -> tuple[str, ...]:
    unquoted = text.translate({ord(mark): None for mark in "\"'`"})
    try:
        items = govalues.read_csv(unquoted)
    except ValueError:  # only EOF is left without quotes, and an address list forgives it
        items = ()
    return tuple(_read_address(item) for item in items)


def _read_address(item: str) -> str:
    try:
        if "%" in item:
            raise ValueError
        address = ipaddress.ip_address(item.strip())
    except ValueError:
        raise ValueError(f"invalid string being converted to IP address: {item}") from None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed command line. ``texts`` holds each given flag's text as given (hidden for secrets), for messages."""

    values: Mapping[str, Value]
    texts: Mapping[str, str]
    positionals: tuple[str, ...]

    def given(self, name: str) -> bool:
        """Whether the operator gave the flag."""
        return name in self.texts


def parse(flags: Sequence[Flag], arguments: Sequence[str]) -> Parsed:
    """Read ``arguments`` (without the program's name); raises `FlagError` at the first fault, as pflag does."""
    reader = _Reader({flag.name: flag for flag in flags}, list(arguments))
    reader.read()
    values = {flag.name: flag.default_value() for flag in flags}
    return Parsed(
        values=values | reader.values,
        texts=reader.texts,
        positionals=tuple(reader.positionals),
    )


@dataclass(slots=True)
class _Reader:
    flags: Mapping[str, Flag]
    arguments: list[str]
    values: dict[str, Value] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    positionals: list[str] = field(default_factory=list)

    def read(self) -> None:
        after_secret = False  # `--passwords a, b`: the stray word is the rest of the secret
        while self.arguments:
            argument = self.arguments.pop(0)
            if len(argument) < 2 or argument[0] != "-":
                self.positionals.append(HIDDEN if after_secret else argument)
            elif argument == "--":
                self.positionals += [HIDDEN if after_secret else rest for rest in self.arguments]
                return
            elif argument.startswith("--"):
                after_secret = self._long(argument).secret
            else:
                after_secret = False
                self._short(argument[1:])

    def _long(self, argument: str) -> Flag:
        name, equals, value = argument[2:].partition("=")
        if not name or name.startswith("-"):
            raise FlagError(f"bad flag syntax: {self._redacted(argument)}")
        flag = self.flags.get(name)
        if flag is None:
            raise FlagError(f"unknown flag: --{name}")
        if not equals:
            value = self._missing_value(flag, f"--{name}")
        self._set(flag, value)
        return flag

    def _short(self, letters: str) -> None:
        by_letter = {flag.shorthand: flag for flag in self.flags.values() if flag.shorthand}
        while letters:
            shown = f"{govalues.quote_character(letters[0])} in -{self._redacted(letters)}"
            flag = by_letter.get(letters[0])
            if flag is None:
                raise FlagError(f"unknown shorthand flag: {shown}")
            letters = letters[1:]
            if len(letters) > 1 and letters[0] == "=":
                value, letters = letters[1:], ""
            elif flag.kind == "bool":
                value = "true"
            elif letters:
                value, letters = letters, ""
            else:
                value = self._missing_value(flag, shown)
            self._set(flag, value)

    def _missing_value(self, flag: Flag, shown: str) -> str:
        if flag.kind == "bool":
            return "true"
        if not self.arguments:
            raise FlagError(f"flag needs an argument: {shown}")
        return self.arguments.pop(0)

    def _set(self, flag: Flag, text: str) -> None:
        try:
            value = flag.read(text)
        except ValueError as error:
            shown = govalues.quote(HIDDEN if flag.secret else text)
            raise FlagError(f'invalid argument {shown} for "{flag.title}" flag: {error}') from None
        before, before_text = self.values.get(flag.name), self.texts.get(flag.name)
        if isinstance(before, tuple) and isinstance(value, tuple):
            value = (*before, *value)  # both are lists of the flag's own kind
            text = f"{before_text},{text}"
        self.values[flag.name] = value
        self.texts[flag.name] = HIDDEN if flag.secret else text

    def _redacted(self, argument: str) -> str:
        """A malformed argument without what follows ``=`` if it can be meant for a secret flag."""
        name, equals, _ = argument.partition("=")
        flag = self.flags.get(name.lstrip("-"))
        return f"{name}={HIDDEN}" if equals and flag is not None and flag.secret else argument


def usage_text(flags: Sequence[Flag]) -> str:
    """The help of all flags, sorted by name and aligned as pflag's FlagUsages."""
    rows = []
    for flag in sorted(flags, key=lambda flag: flag.name):
        left = f"  -{flag.shorthand}, --{flag.name}" if flag.shorthand else f"      --{flag.name}"
        if flag.kind != "bool":
            left += f" {flag.kind}"
        rows.append((left, flag.usage + _default_text(flag)))
    width = max(len(left) for left, _ in rows)
    return "".join(f"{left:<{width}}   {right}\n" for left, right in rows)


def _default_text(flag: Flag) -> str:
    if flag.kind in _LISTS:
        # pflag leaves out the empty default of a list of strings, but prints that of numbers and addresses
        return "" if flag.kind == "strings" and not flag.default else f" (default [{flag.default}])"
    if flag.default in ("", "0", "0s", "false"):
        return f" (default {govalues.quote(flag.default)})" if flag.kind == "string" and flag.default else ""
    return f" (default {govalues.quote(flag.default) if flag.kind == 'string' else flag.default})"
