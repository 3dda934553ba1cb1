"""Kernel switches below /proc/sys, and the modules that bring them.

Touches the kernel: /proc/sys of the calling thread's network namespace, and modprobe(8). Reads and writes only the
paths that it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path("/proc/sys")
MODPROBE_SECONDS = 5.0
"""As upstream: a module that takes longer is given up."""


def observe_sysctls(paths: Iterable[str]) -> Mapping[str, str | None]:
    """The value of each path (``net/ipv4/ip_forward``); None when the kernel has no such switch."""
    return {path: _read(path) for path in paths}


def _read(path: str) -> str | None:
    try:
        return (ROOT / path).read_text().strip()
    except FileNotFoundError:
        return None


def write_sysctl(path: str, value: str) -> None:
    """Write a value; raises OSError."""
    (ROOT / path).write_text(value)


def load_module(name: str) -> str | None:
    """Load a kernel module; why it failed in one line, or None. Takes at most `MODPROBE_SECONDS`."""
    import subprocess  # only where a module is missing: costs memory that most workers never need

    try:
        done = subprocess.run(
            ["modprobe", name],
            check=False,
            capture_output=True,
            text=True,
            timeout=MODPROBE_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        return f"kernel module {name}: the program modprobe was not found"
    except subprocess.TimeoutExpired:
        return f"kernel module {name}: modprobe took more than {MODPROBE_SECONDS:g} s"
    except OSError as error:
        return f"kernel module {name}: modprobe: {error.strerror}"
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()
        return f"kernel module {name}: {words[-1] if words else f'modprobe ended with status {done.returncode}'}"
    return None
