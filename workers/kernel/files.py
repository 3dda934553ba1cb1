"""Whole small files: read one with a bound, replace one atomically.

Touches the file system. A reader of the file sees the old or the new content, never a part, whatever happens in
between: temporary file in the same folder, fsync, rename, fsync of the folder (rename(2), fsync(2)).
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

TEMPORARY_SUFFIX = ".kube-router-new"
"""Ends the names of temporary files, so that nobody who goes by suffix (CRI: .conf, .conflist, .json) reads them."""


class TooLarge(OSError):
    """A file that is larger than its reader wants to hold."""


def read_file(path: str, most_bytes: int) -> bytes:
    """The content of a regular file; raises OSError (FileNotFoundError, `TooLarge`…)."""
    # O_NONBLOCK: a FIFO under that name must not hold us up.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(None, "not a regular file")
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise TooLarge(None, f"larger than {most_bytes} bytes")
    return content


def replace_file(path: str, content: bytes, mode: int = 0o644) -> bool:
    """Make ``content`` the content of the file; whether anything was written. Raises OSError; then nothing changed.

    ``mode`` is for a new file; an old one's mode and owner are kept. A symbolic link is followed: its target is
    replaced, the link stays.
    """
    target = Path(os.path.realpath(path))
    with contextlib.suppress(OSError, ValueError):
        if read_file(str(target), len(content)) == content:
            return False
    temporary = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")
    try:
        _write_like(temporary, content, target, mode)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)
    return True


def _write_like(temporary: Path, content: bytes, model: Path, mode: int) -> None:
    temporary.unlink(missing_ok=True)  # left by a crash
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(temporary, flags, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        with contextlib.suppress(FileNotFoundError):
            before = model.stat()
            mode = stat.S_IMODE(before.st_mode)
            if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                with contextlib.suppress(
                    PermissionError
                ):  # without CAP_CHOWN the file becomes ours, and stays readable
                    os.fchown(descriptor, before.st_uid, before.st_gid)
        os.fchmod(descriptor, mode)
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
