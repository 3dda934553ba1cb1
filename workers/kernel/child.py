"""A program that runs beside a worker for some seconds, for what must not keep the worker waiting.

Starts one process, and nothing else: no shell, no input. The worker asks now and then whether it has ended.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

MOST_OUTPUT = 64_000
"""Bytes of standard output that are read; a pipe holds as much, so a child that says no more never waits for us."""


@dataclass(frozen=True, slots=True)
class Ended:
    """``status``: the exit status, negative for a signal. ``late``: it had to be killed, its time was over."""

    status: int
    output: str
    late: bool = False


class Child:
    """One running program; standard error is the worker's own."""

    def __init__(self, command: Sequence[str], seconds: float) -> None:
        """Start it; it may run for so many seconds. Raises OSError when it cannot be started."""
        self._until = time.monotonic() + seconds
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)

    def ended(self) -> Ended | None:
        """How it ended; None while it runs. Never waits. Once it has ended, ask no more."""
        late = False
        if self._process.poll() is None:
            if time.monotonic() < self._until:
                return None
            self._process.kill()
            self._process.wait()
            late = True
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            output = stream.read(MOST_OUTPUT)
        return Ended(self._process.returncode, output, late)

    def kill(self) -> None:
        """End it now; what it had to say is lost."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
