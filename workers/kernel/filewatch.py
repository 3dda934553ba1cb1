"""Hears of a file being replaced, written, made or deleted, by inotify(7).

Touches the kernel: one inotify descriptor. It watches the *folder* (a file that is replaced by rename is another inode)
and goes by the name; a symbolic link is watched at both ends. A folder that does not exist yet is watched as soon as it
does: call `follow` again now and then.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Self

_IN_CLOSE_WRITE, _IN_MOVED_FROM, _IN_MOVED_TO = 0x8, 0x40, 0x80
_IN_CREATE, _IN_DELETE, _IN_DELETE_SELF, _IN_MOVE_SELF = 0x100, 0x200, 0x400, 0x800
_IN_Q_OVERFLOW, _IN_ONLYDIR = 0x4000, 0x1000000
_MASK = _IN_CLOSE_WRITE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_DELETE_SELF | _IN_MOVE_SELF
_EVENT = struct.Struct("=iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class FileWatch:
    """Watches one path; `drain` tells whether something happened to it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._names: set[str] = set()
        self._descriptor = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._descriptor < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"inotify: {os.strerror(number)}")
        self.follow()

    def fileno(self) -> int:
        """For poll."""
        return int(self._descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def follow(self) -> None:
        """Watch the folders of the path and of what it links to; a folder already watched costs nothing."""
        self._names.clear()
        for end in {self._path, os.path.realpath(self._path)}:
            folder, name = os.path.split(end)
            self._names.add(name)
            _libc.inotify_add_watch(self._descriptor, os.fsencode(folder or "."), _MASK | _IN_ONLYDIR)

    def drain(self) -> bool:
        """Read all events; whether one concerns the file or its folder."""
        matters = False
        while True:
            try:
                data = os.read(self._descriptor, 65536)
            except BlockingIOError:
                return matters
            offset = 0
            while offset < len(data):
                _, mask, _, length = _EVENT.unpack_from(data, offset)
                offset += _EVENT.size + length
                name = os.fsdecode(data[offset - length : offset].rstrip(b"\0"))
                if mask & (_IN_Q_OVERFLOW | _IN_DELETE_SELF | _IN_MOVE_SELF):
                    matters = True
                elif name in self._names:
                    # A regular file has nothing in it yet when it is created: its end of writing is what matters.
                    matters = matters or not mask & _IN_CREATE or os.path.islink(self._path)
