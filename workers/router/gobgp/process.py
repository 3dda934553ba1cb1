"""The gobgpd process behind its socket: which it is, how long it has been running, and how it is ended.

Touches the socket, ``/proc`` and, in `terminate`, the process. The process belongs to the supervisor, which starts a
fresh one when it ends; nothing here starts it.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
from collections.abc import Container, Iterable
from pathlib import Path

_CREDENTIALS = struct.Struct("3i")


def process_id(path: Path) -> int:
    """The process that listens on the unix socket (SO_PEERCRED, unix(7)); raises OSError."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        probe.connect(str(path))
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[0])


def age_seconds(path: Path) -> float:
    """How long the process has been running; infinity when that cannot be told (another pid namespace)."""
    try:
        fields = Path(f"/proc/{process_id(path)}/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, float(Path("/proc/uptime").read_text().split()[0]) - started)
    except (OSError, ValueError, IndexError):
        return float("inf")


def terminate(path: Path, *, silently: bool = False) -> None:
    """End the process; raises OSError.

    SIGTERM makes it tell its peers (CEASE), which drop our routes at once. ``silently``, by SIGKILL, it tells nobody:
    peers that know graceful restart keep them (RFC 4724).
    """
    pid = process_id(path)
    if pid > 1:
        os.kill(pid, signal.SIGKILL if silently else signal.SIGTERM)


def unbindable(addresses: Iterable[str], listening: Container[str]) -> frozenset[str]:
    """Those on which nobody can listen in this network namespace; what BGP is ``listening`` on is not asked.

    If that would leave none, no address is named: BGP must not listen everywhere, and gobgpd says what is wrong.
    """
    wanted = frozenset(addresses)
    failing = frozenset(address for address in wanted if address not in listening and not _bindable(address))
    return failing if failing != wanted else frozenset()


def taken(addresses: Iterable[str], port: int) -> str | None:
    """The first address on which somebody listens to ``port`` already, in this network namespace."""
    for address in sorted(addresses):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
                probe.listen(1)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return address
    return None


def _bindable(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
