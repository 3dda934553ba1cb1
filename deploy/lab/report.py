"""What the lab says on the terminal: steps with their time, tables.

Touches nothing but stdout and the monotonic clock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the closing table."""

    what: str
    expected: str
    seen: str
    ok: bool


class Progress:
    """Steps on the terminal with the seconds since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.1f}s] {text}", flush=True)


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """A table; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for number, row in enumerate(rows):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths).rstrip())


def print_lines(lines: Sequence[Line]) -> None:
    """The closing table."""
    rows = [(line.what, line.expected, line.seen, "ok" if line.ok else "NOT OK") for line in lines]
    print_rows([("what", "expected", "seen", ""), *rows])
