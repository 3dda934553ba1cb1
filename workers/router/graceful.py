"""What must be known of the last gobgpd to come back gracefully (RFC 4724): which peers know graceful restart.

Touches one small file in the state directory, so that it outlives the worker and its container. A peer that knows
graceful restart keeps our routes while gobgpd is away, and takes the new one for the old if that says that it has
restarted. A peer that does not know it must not be told: gobgpd would withhold its routes for a while. The file holds
addresses and no secret. Without it the next start is an ordinary one. It counts for the running kernel only: after a
reboot nothing was forwarded meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

FILE = "gobgpd-peers.json"
"""In the state directory."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class GracefulMemory:
    """The peers that know graceful restart, and when gobgpd was last seen (seconds of CLOCK_MONOTONIC)."""

    def __init__(self, folder: Path, *, enabled: bool, rewrite_seconds: float) -> None:
        """``enabled`` False: nothing is known, read or written. A file as young as ``rewrite_seconds`` stays as is."""
        self._path = folder / FILE
        self._enabled, self._rewrite_seconds = enabled, rewrite_seconds
        self._peers: frozenset[str] = frozenset()
        self._seen = self._written = float("-inf")
        self._told = False
        if enabled:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self._read()

    def _read(self) -> None:
        found = json.loads(self._path.read_bytes())
        if found["boot"] == _boot_id():
            self._seen = self._written = float(found["seen"])
            self._peers = frozenset(map(str, found["peers"]))

    def returning(self, now: float, seconds: float) -> frozenset[str]:
        """The peers that still keep our routes, if they keep them for ``seconds``."""
        gone_for = now - self._seen
        return self._peers if 0 <= gone_for <= seconds + self._rewrite_seconds else frozenset()

    def see(self, peers: frozenset[str], now: float) -> None:
        """gobgpd is alive, and these are the peers that know graceful restart."""
        if not self._enabled:
            return
        stale = peers != self._peers or now >= self._written + self._rewrite_seconds or now < self._written
        self._peers, self._seen = peers, now
        if stale:
            self._written = now
            self._write()

    @property
    def peers(self) -> frozenset[str]:
        """The peers that are known to know graceful restart."""
        return self._peers

    def _write(self) -> None:
        temporary = self._path.with_name(f".{FILE}.new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            content = {"boot": _boot_id(), "seen": self._seen, "peers": sorted(self._peers)}
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(content, file)
            temporary.replace(self._path)
            self._told = False
        except OSError as error:
            if not self._told:
                log.warning("%s: cannot be written (%s): a restart of gobgpd may not be graceful", self._path, error)
            self._told = True


def _boot_id() -> str:
    return BOOT_ID.read_text().strip()
