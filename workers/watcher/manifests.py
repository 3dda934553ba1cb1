"""A directory of manifests as a source: what the files say is the cluster.

Touches the file system (reads, inotify). `Catalogue` is the pure part: it holds what each file last said and makes the
cluster of it. Rules:

- ``*.yaml``, ``*.yml`` and ``*.json`` directly in the directory; not in sub-directories, and no names that begin with
  a dot or end in ``~`` (editors' and kubelet's own). Links are followed, so a ConfigMap volume (``..data`` is swapped)
  works; a change behind another link is seen at the next `RESCAN_SECONDS`.
- A file that does not parse, or cannot be read, keeps its last good content; so does an object that does not decode.
  If it has no earlier content, objects that an earlier run knew and that no file claims are kept: they may be in it.
- The same object in two files: the first file by name wins, with one line.
- A directory that is not there changes nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from inotify_simple import INotify, flags

from kube_router.ipc.messages import Key, Kind, Projection
from kube_router.workers.watcher.kinds import RESOURCES
from kube_router.workers.watcher.manifestfile import (
    MAX_FILE_BYTES,
    BadManifest,
    ManifestContent,
    parse_manifest,
)
from kube_router.workers.watcher.source import Alive, Feed, Listed, News, Stopped, Trouble

log = logging.getLogger(__name__)

SUFFIXES = (".yaml", ".yml", ".json")
SETTLE_SECONDS = 0.03
"""After an event, so much time for those that belong to it (a rename, a second file)."""
RESCAN_SECONDS = 5.0
"""The directory is looked at so often without an event: links that lead elsewhere, network file systems."""
POLL_SECONDS = 0.1
"""The same where inotify cannot be had."""

INTEREST = (
    flags.CLOSE_WRITE
    | flags.MOVED_TO
    | flags.MOVED_FROM
    | flags.DELETE
    | flags.CREATE
    | flags.ATTRIB
    | flags.DELETE_SELF
    | flags.MOVE_SELF
    | flags.ONLYDIR
)

Signature = tuple[int, int, int, int]
"""device, inode, size and modification time in ns of the file behind a name."""


@dataclass(slots=True)
class _File:
    """What is known of one file. ``objects`` is the last good content; ``blind``: something in it was never read."""

    objects: dict[tuple[Kind, Key], Projection] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    blind: bool = False


class Catalogue:
    """What the files say, file by file, and the cluster that they make. Pure."""

    def __init__(self, kinds: Iterable[Kind], earlier: Iterable[tuple[Kind, Projection]] = ()) -> None:
        """``earlier`` are objects that an earlier run knew."""
        self._kinds = frozenset(kinds)
        self._files: dict[str, _File] = {}
        self._earlier = {(kind, item.key): item for kind, item in earlier}

    @property
    def names(self) -> frozenset[str]:
        """The files known."""
        return frozenset(self._files)

    def read(self, name: str, content: ManifestContent) -> None:
        """A file has been parsed."""
        before = self._files.get(name) or _File()
        file = _File(errors=tuple(f"{name}, {broken.text}" for broken in content.broken if broken.kind in self._kinds))
        errors = list(file.errors)
        for kind, item in content.objects:
            if kind not in self._kinds:
                continue
            if (kind, item.key) in file.objects:
                errors.append(f"{name}: {_object_name(kind, item.key)} twice in this file: the first one counts")
                continue
            file.objects[kind, item.key] = item
        for broken in content.broken:
            if broken.kind not in self._kinds or (broken.kind, broken.key) in file.objects:
                continue
            if (last_good := before.objects.get((broken.kind, broken.key))) is not None:
                file.objects[broken.kind, broken.key] = last_good
            else:
                file.blind = True
        file.errors = tuple(errors)
        self._files[name] = file

    def failed(self, name: str, reason: str) -> None:
        """A file cannot be read or parsed; what it said before stays."""
        file = self._files.setdefault(name, _File(blind=True))
        file.errors = (f"{name}: {reason}",)

    def removed(self, name: str) -> None:
        """A file is no longer there."""
        self._files.pop(name, None)

    def cluster(self) -> tuple[dict[Kind, dict[Key, Projection]], tuple[str, ...]]:
        """Objects by kind and key, and all that is wrong, one line each."""
        objects: dict[Kind, dict[Key, Projection]] = {kind: {} for kind in self._kinds}
        owners: dict[tuple[Kind, Key], str] = {}
        errors: list[str] = []
        for name in sorted(self._files):
            errors.extend(self._files[name].errors)
            for (kind, key), item in self._files[name].objects.items():
                if first := owners.get((kind, key)):
                    errors.append(f"{name}: {_object_name(kind, key)} is also in {first}, which counts")
                    continue
                owners[kind, key] = name
                self._earlier.pop((kind, key), None)  # from now on its file decides
                objects[kind][key] = item
        if any(file.blind for file in self._files.values()):
            for (kind, key), item in self._earlier.items():
                objects.get(kind, {}).setdefault(key, item)
        else:
            self._earlier = {}
        return objects, tuple(errors)


def _object_name(kind: Kind, key: Key) -> str:
    return f"{RESOURCES[kind].object_kind} {key}"


class ManifestSource:
    """Watches one directory in a thread of its own."""

    def __init__(self, directory: Path, kinds: Iterable[Kind]) -> None:
        self.name = f"manifests {directory}"
        self._directory, self._kinds = directory, tuple(kinds)
        self._catalogue = Catalogue(self._kinds)
        self._signatures: dict[str, Signature | None] = {}
        self._told: set[str] = set()
        self._file_errors: set[str] = set()
        self._unlistable: str | None = None
        self._listed = False
        self._feed: Feed | None = None
        self._thread: threading.Thread | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def seed(self, objects: Mapping[Kind, Iterable[Projection]]) -> None:
        """Remember what an earlier run knew, for files that cannot be read now."""
        self._catalogue = Catalogue(self._kinds, ((kind, item) for kind, items in objects.items() for item in items))

    def start(self, feed: Feed) -> None:
        """Start the thread."""
        self._feed = feed
        self._thread = threading.Thread(target=self._run, args=(feed,), name="manifests", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Wake the thread and wait shortly; parsing a big file may outlast that."""
        if self._feed is not None:
            self._feed.stopping.set()
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join(0.4)

    def _run(self, feed: Feed) -> None:
        watch = DirectoryWatch(self._directory)
        try:
            while True:
                watch.ensure()
                began = time.monotonic()
                changed = self._scan(watch.take_dirty())
                for news in self._news(changed, watch.trouble):
                    feed.put(news)
                if changed:
                    log.debug("%s: read in %.3f s", self.name, time.monotonic() - began)
                watch.wait(self._wake)
                feed.pause(0)
        except Stopped:
            return
        finally:
            watch.close()

    def _scan(self, dirty: frozenset[str]) -> bool:
        """Read what is new; whether anything was. A directory that cannot be listed leaves all as it is."""
        try:
            present = dict(self._present())
        except OSError as error:
            self._unlistable = f"{self.name}: {error.strerror}: keeping what was read last"
            return False
        self._unlistable = None
        changed = False
        for name in self._catalogue.names - present.keys():
            self._catalogue.removed(name)
            self._signatures.pop(name, None)
            changed = True
        for name, signature in sorted(present.items()):
            if name in dirty or name not in self._signatures or self._signatures[name] != signature:
                self._signatures[name] = signature
                self._read(name)
                changed = True
        return changed

    def _present(self) -> Iterator[tuple[str, Signature | None]]:
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.name.endswith(SUFFIXES):
                    continue
                try:
                    status = entry.stat()
                    if not entry.is_dir():
                        yield entry.name, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                except FileNotFoundError:
                    if entry.is_symlink():  # a dangling link: a file that cannot be read
                        yield entry.name, None
                except OSError:
                    yield entry.name, None

    def _read(self, name: str) -> None:
        try:
            with open(self._directory / name, "rb", opener=_open_without_blocking) as file:
                data = file.read(MAX_FILE_BYTES + 1)
            self._catalogue.read(name, parse_manifest(data))
        except OSError as error:
            self._catalogue.failed(name, f"cannot be read: {error.strerror}")
        except BadManifest as error:
            self._catalogue.failed(name, str(error))

    def _news(self, changed: bool, trouble: str | None) -> Iterator[News]:
        # Before a first look at the directory there is no cluster, not an empty one.
        if self._unlistable is None and (changed or not self._listed):
            objects, lines = self._catalogue.cluster()
            self._file_errors = {f"manifest {line}" for line in lines}
            self._listed = True
            for kind in self._kinds:
                yield Listed(kind, tuple(objects[kind].values()))
        errors = {line for line in (self._unlistable, trouble) if line}
        errors |= self._file_errors
        for line in sorted(self._told - errors):
            yield Trouble(line, None)
        for line in sorted(errors - self._told):
            yield Trouble(line, line)
        self._told = errors
        if self._unlistable is None:
            for kind in self._kinds:
                yield Alive(kind)


def _open_without_blocking(path: str, mode: int) -> int:
    """A named pipe must not hold the thread."""
    return os.open(path, mode | os.O_NONBLOCK | os.O_CLOEXEC)


class DirectoryWatch:
    """inotify on a directory that may come and go; without inotify, a poll."""

    def __init__(self, directory: Path) -> None:
        self.trouble: str | None = None
        self._directory = directory
        self._inotify: INotify | None = None
        self._watching: tuple[int, int] | None = None
        self._dirty: set[str] = set()

    def close(self) -> None:
        """Release the descriptor."""
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    def ensure(self) -> None:
        """Watch the directory that is there now; call before each scan, so that nothing falls between."""
        try:
            status = os.stat(self._directory)
        except OSError:
            self._watching = None
            return
        identity = (status.st_dev, status.st_ino)
        if identity == self._watching:
            return
        self.close()
        try:
            self._inotify = INotify(nonblocking=True)
            self._inotify.add_watch(self._directory, INTEREST)
            self._watching, self.trouble = identity, None
        except OSError as error:
            self.close()
            self._watching = None
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                self.trouble = f"manifests {self._directory}: no inotify ({error.strerror}): polling instead"

    def take_dirty(self) -> frozenset[str]:
        """Names that were written since the last call, to be read whatever their signature says."""
        dirty, self._dirty = frozenset(self._dirty), set()
        return dirty

    def wait(self, wake: int) -> None:
        """Until something happens in the directory, ``wake`` is readable, or it is time for a look without reason."""
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        if self._inotify is None or self._watching is None:
            poll.poll(POLL_SECONDS * 1000)
            return
        poll.register(self._inotify.fileno(), select.POLLIN)
        deadline = time.monotonic() + RESCAN_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            poll.poll(left * 1000)
            if self._relevant():
                time.sleep(SETTLE_SECONDS)
                self._relevant()
                return
            try:
                os.eventfd_read(wake)
                return
            except BlockingIOError:
                continue

    def _relevant(self) -> bool:
        """Take the events that are there; whether one of them calls for a look."""
        assert self._inotify is not None
        relevant = False
        for event in self._inotify.read(timeout=0):
            if event.mask & (flags.Q_OVERFLOW | flags.DELETE_SELF | flags.MOVE_SELF | flags.IGNORED | flags.UNMOUNT):
                self._watching = None
                relevant = True
            elif event.name.startswith(".") and not event.name.startswith(".."):
                continue
            elif event.mask & flags.CREATE and not self._whole_at_once(event.name):
                continue  # its writer is still at it; CLOSE_WRITE will come
            else:
                relevant = True
                if event.mask & flags.CLOSE_WRITE:
                    self._dirty.add(event.name)
        return relevant

    def _whole_at_once(self, name: str) -> bool:
        """Links are complete when they appear."""
        try:
            status = os.lstat(self._directory / name)
        except OSError:
            return True
        return not (os.path.isfile(self._directory / name) and not os.path.islink(self._directory / name)) or (
            status.st_nlink > 1
        )
