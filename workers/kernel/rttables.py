"""The name of the overlay's routing table in ``rt_tables``, for the eyes of ``ip route``; nothing depends on it.

Touches the file system: the first of iproute2's files that exists, or a new one in ``/etc/iproute2`` if that folder
does. Ours is exactly one line, ``77 kube-router``.
"""

from __future__ import annotations

from pathlib import Path

from kube_router.workers.kernel.files import read_file, replace_file
from kube_router.workers.tunnelfacts import OVERLAY_TABLE, OVERLAY_TABLE_NAME

FOLDERS = ("/etc/iproute2", "/usr/lib/iproute2", "/usr/share/iproute2")
FILE = "rt_tables"
LINE = f"{OVERLAY_TABLE} {OVERLAY_TABLE_NAME}"
_MOST_BYTES = 1 << 20


def declare_table(root: str = "/") -> str | None:
    """Put our line into the file, once; why it was not, in one line, or None. ``root`` stands before the folders."""
    path = _file(root)
    try:
        content = read_file(str(path), _MOST_BYTES).decode(errors="surrogateescape") if path is not None else ""
        if path is None:
            folder = _under(root, FOLDERS[0])
            if not folder.is_dir():
                return None
            path = folder / FILE
        conflict, there = _look(content)
        if conflict:
            return f"{path}: {conflict}: table {OVERLAY_TABLE} is used all the same, without a name there"
        if not there:
            end = "" if not content or content.endswith("\n") else "\n"
            replace_file(str(path), f"{content}{end}{LINE}\n".encode(errors="surrogateescape"), 0o644)
    except OSError as error:
        return f"{path}: {error.strerror}: the routing table {OVERLAY_TABLE} has no name"
    return None


def forget_table(root: str = "/") -> str | None:
    """Take exactly our line out of every such file; why it was not, in one line, or None."""
    for folder in FOLDERS:
        path = _under(root, folder) / FILE
        try:
            lines = read_file(str(path), _MOST_BYTES).decode(errors="surrogateescape").splitlines(keepends=True)
            kept = [line for line in lines if line.rstrip("\n") != LINE]
            if kept != lines:
                replace_file(str(path), "".join(kept).encode(errors="surrogateescape"))
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{path}: {error.strerror}"
    return None


def _under(root: str, folder: str) -> Path:
    return Path(root) / folder.lstrip("/")


def _file(root: str) -> Path | None:
    paths = (_under(root, folder) / FILE for folder in FOLDERS)
    return next((path for path in paths if path.exists()), None)


def _look(content: str) -> tuple[str, bool]:
    """(what else has our number or our name, whether they stand together), as iproute2 reads the file."""
    there = False
    for line in content.splitlines():
        words = line.split("#", 1)[0].split()
        if len(words) != 2:
            continue
        try:
            number = int(words[0], 0)
        except ValueError:
            continue
        if (number, words[1]) == (OVERLAY_TABLE, OVERLAY_TABLE_NAME):
            there = True
        elif number == OVERLAY_TABLE or words[1] == OVERLAY_TABLE_NAME:
            return f"{line.strip()!r} is in the way", there
    return "", there
