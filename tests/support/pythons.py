"""Which Python interpreters of the supported versions this machine has."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SUPPORTED = ("3.11", "3.12", "3.13")
# A launcher may be there without the version behind it; headers and ensurepip may be missing: unusable here.
PROBE = """
import ensurepip, pathlib, sys, sysconfig, venv
assert pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()
print("%d.%d" % sys.version_info[:2], sys.implementation.name)
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """One usable interpreter; ``version`` is major.minor."""

    version: str
    path: Path


@dataclass(frozen=True, slots=True)
class Installed:
    """A clean virtual environment that holds the project's wheel and what it requires."""

    interpreter: Interpreter
    wheel: Path
    bin: Path
    packages: Path


def usable(path: Path, version: str) -> bool:
    """Whether ``path`` runs as CPython of that version and can make environments and extensions."""
    try:
        done = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.stdout.split() == [version, "cpython"]


@cache
def interpreters() -> tuple[Interpreter, ...]:
    """One of each supported version that is present; always the version that runs the tests."""
    running = ".".join(map(str, sys.version_info[:2]))
    found = []
    for version in sorted({*SUPPORTED, running}):
        candidates = [Path(sys.executable)] if version == running else []
        candidates += [Path(path) for path in [shutil.which(f"python{version}")] if path]
        candidates += sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python{version}"), reverse=True)
        path = next((path for path in candidates if usable(path, version)), None)
        if path is None and version == running:
            raise AssertionError(f"{sys.executable} cannot build extensions: install its venv and dev packages")
        if path is not None:
            found.append(Interpreter(version, path))
    return tuple(found)
