"""How a worker logs: one line a record on stdout, with the worker's name, as text or JSON.

Touches stdout, and the logging set-up of the process.

The lines end up in the agent's one stream, where the event listener of the supervisor merges all programs; it passes
lines of this form on as they are. A record of several lines (a traceback) is several lines of text, each with the name
in front, or one JSON object.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence

import msgspec

from kube_router.workers.settings import Settings

LEVEL_NAMES = {logging.DEBUG: "DEBUG", logging.INFO: "INFO", logging.WARNING: "WARN", logging.ERROR: "ERROR"}
"""Names of at most five letters, so that columns stand; what is above ERROR is an ERROR."""
REPAIRS_LOGGED = 20
"""Lines in the log for one foreign change; the counter has them all."""


class TextFormatter(logging.Formatter):
    """``2026-01-01T00:00:00.000Z INFO  router  message``."""

    def __init__(self, worker: str) -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        head = f"{timestamp(record.created)} {level_name(record.levelno):<5} {self._worker}  "
        lines = full_message(self, record).splitlines() or [""]
        return "\n".join(head + line for line in lines)


class JsonFormatter(logging.Formatter):
    """One object a record: ``time``, ``level`` (lower case), ``worker``, ``message``."""

    def __init__(self, worker: str) -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": timestamp(record.created),
            "level": level_name(record.levelno).lower(),
            "worker": self._worker,
            "message": full_message(self, record),
        }
        return msgspec.json.encode(fields).decode()


def timestamp(seconds: float) -> str:
    """UTC in RFC 3339 with milliseconds; ``seconds`` since the Unix epoch."""
    milliseconds = int(seconds * 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000)) + f".{milliseconds % 1000:03d}Z"


def level_name(level: int) -> str:
    """The name of the highest known level that ``level`` reaches."""
    return next((LEVEL_NAMES[known] for known in sorted(LEVEL_NAMES, reverse=True) if level >= known), "DEBUG")


def full_message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The message, and the traceback if there is one; text that is no UTF-8 comes out escaped."""
    text = record.getMessage()
    if record.exc_info:
        text += "\n" + formatter.formatException(record.exc_info)
    return text.encode("utf-8", "backslashreplace").decode()


def tell_repairs(log: logging.Logger, repaired: Sequence[str]) -> None:
    """A line for each thing that a foreign hand had changed, of many the first ones and how many more."""
    for line in repaired[:REPAIRS_LOGGED]:
        log.warning("repaired: %s", line)
    if len(repaired) > REPAIRS_LOGGED:
        log.warning("repaired: %d more", len(repaired) - REPAIRS_LOGGED)


def configure(worker: str, settings: Settings) -> None:
    """Send all log records of this process to stdout, line by line.

    ``-v 0`` shows INFO and above, any higher level everything. Libraries speak at WARNING, and all at ``-v 2``.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter(worker) if settings.log_format == "json" else TextFormatter(worker))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if settings.v >= 2 else logging.WARNING)
    logging.getLogger("kube_router").setLevel(logging.DEBUG if settings.v >= 1 else logging.INFO)
    logging.getLogger("__main__").setLevel(logging.DEBUG if settings.v >= 1 else logging.INFO)
    # A pipe that nobody reads, or a full disk, must not turn each log line into a traceback.
    logging.raiseExceptions = False
