"""The version line: what is running, when it was installed, and on which Python.

Touches files: reads the metadata of the installed distribution.
"""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "kube-router"


def version() -> str:
    """The version of the installed distribution; ``unknown`` if it runs without being installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"


def build_date() -> str:
    """When the code was put where it is (in an image: when that was built), as upstream writes it, in UTC."""
    written = Path(__file__).stat().st_mtime
    return datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%dT%H:%M:%S%z")


def version_line(program: str) -> str:
    """One line in upstream's form, with Python's version in the place of Go's."""
    return f"Running {program} version {version()}, built on {build_date()}, Python {platform.python_version()}"
