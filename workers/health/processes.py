"""What supervisord's event listener writes about the programs: ``processes.json`` in the ``ipc`` folder.

Touches that one file, for reading. It may be missing (the listener has not started yet) and is never half-written.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

PROCESSES_FILE = "processes.json"


class ProcessState(msgspec.Struct, frozen=True, kw_only=True):
    """One program: supervisord's name for its state, process id (0: none), why it ended last, and since when (Unix)."""

    state: str = ""
    pid: int = 0
    starts: int = 0
    restarts: int = 0
    reason: str = ""
    since: float = 0.0

    @property
    def up(self) -> bool:
        """Whether the program runs, or has just been started."""
        return self.state in ("RUNNING", "STARTING")


class ProcessTable(msgspec.Struct, frozen=True, kw_only=True):
    """All programs under supervisord but the listener itself, by name."""

    supervisord: int = 0
    programs: dict[str, ProcessState] = {}


def read_processes(path: Path = Path(PROCESSES_FILE)) -> ProcessTable:
    """The table; an empty one if it cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ProcessTable)
    except (OSError, msgspec.DecodeError):
        return ProcessTable()
