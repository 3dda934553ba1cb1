"""The last snapshot, on disk: what the agent goes on from when it starts while the source is away.

Touches the file system: one file, written to a temporary name, synced and renamed, so that a crash at any moment leaves
the old one or the new one. A file of another version, a damaged one or one of another source is ignored with one line.

Layout: one line of ASCII ``kube-router-snapshot VERSION PROTOCOL SHA256``, then msgpack of `SavedCluster`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

import msgspec

from kube_router.ipc.messages import (
    PROTOCOL,
    EndpointSlice,
    Kind,
    Namespace,
    NetworkPolicy,
    Node,
    Pod,
    Projection,
    Service,
)

log = logging.getLogger(__name__)

VERSION = 1
MAGIC = "kube-router-snapshot"
MIN_INTERVAL = 5.0
"""Seconds between two writes; a busy cluster must not wear the disk out."""
DUTY = 50
"""A write that took long is followed by a pause of at least so many times its duration."""
RETRY_SECONDS = 30.0
"""Pause after a write that failed."""
MAX_BYTES = 512 << 20


class SavedCluster(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in the file. A kind that is None was not watched; ``saved`` is seconds since the Unix epoch."""

    source: str
    saved: float
    nodes: tuple[Node, ...] | None = None
    pods: tuple[Pod, ...] | None = None
    services: tuple[Service, ...] | None = None
    endpointslices: tuple[EndpointSlice, ...] | None = None
    networkpolicies: tuple[NetworkPolicy, ...] | None = None
    namespaces: tuple[Namespace, ...] | None = None

    def objects(self, kind: Kind) -> tuple[Projection, ...] | None:
        """The objects of a kind, None when the kind was not saved."""
        return cast("tuple[Projection, ...] | None", getattr(self, kind))


class BadCache(ValueError):
    """The file is there but cannot be used; the text says why."""


def encode(cluster: SavedCluster) -> bytes:
    """The file's content."""
    payload = msgspec.msgpack.encode(cluster)
    return f"{MAGIC} {VERSION} {PROTOCOL} {hashlib.sha256(payload).hexdigest()}\n".encode() + payload


def decode(data: bytes) -> SavedCluster:
    """The cluster in a file's content; raises `BadCache`."""
    head, newline, payload = data.partition(b"\n")
    fields = head.decode("ascii", "replace").split(" ")
    if not newline or len(fields) != 4 or fields[0] != MAGIC:
        raise BadCache("not a snapshot")
    if fields[1:3] != [str(VERSION), str(PROTOCOL)]:
        ours = f"{VERSION}.{PROTOCOL}"
        raise BadCache(f"written in version {fields[1][:10]}.{fields[2][:10]}, this program reads {ours} only")
    if hashlib.sha256(payload).hexdigest() != fields[3]:
        raise BadCache("damaged: the checksum does not match")
    try:
        return msgspec.msgpack.decode(payload, type=SavedCluster)
    except msgspec.MsgspecError as error:
        raise BadCache(f"damaged: {error}") from None


class DiskCache:
    """The file, and the thread that writes it; reading and writing raise nothing."""

    def __init__(self, path: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.trouble: str | None = None
        self._monotonic = monotonic
        self._next_at = 0.0
        self._writer: threading.Thread | None = None

    def load(self, source: str, kinds: Iterable[Kind]) -> SavedCluster | None:
        """The saved cluster if it is of ``source`` and holds all ``kinds``; else None, and why in the log."""
        try:
            with self.path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise BadCache(f"longer than {MAX_BYTES} bytes")
            cluster = decode(data)
            if cluster.source != source:
                raise BadCache(f"it is of another source: {cluster.source}")
            if missing := [kind for kind in kinds if cluster.objects(kind) is None]:
                raise BadCache(f"it has no {', '.join(missing)}")
        except FileNotFoundError:
            return None
        except (OSError, BadCache) as error:
            log.warning("snapshot on disk %s ignored: %s", self.path, _reason(error))
            return None
        return cluster

    def due_in(self) -> float:
        """Seconds until a write is allowed again; 0 when now."""
        if self._writer is not None and self._writer.is_alive():
            return 0.1
        return max(0.0, self._next_at - self._monotonic())

    def save(self, cluster: SavedCluster) -> None:
        """Write in a thread: a slow disk delays no delta. Call only when `due_in` is 0."""
        self._next_at = self._monotonic() + MIN_INTERVAL
        self._writer = threading.Thread(target=self._write, args=(cluster,), name="disk", daemon=True)
        self._writer.start()

    def save_at_exit(self, cluster: SavedCluster | None, timeout: float) -> None:
        """The last write, if there is something unsaved; gives up after ``timeout`` seconds."""
        deadline = self._monotonic() + timeout
        self._join(timeout)
        if cluster is not None and (self._writer is None or not self._writer.is_alive()):
            self.save(cluster)
            self._join(max(0.0, deadline - self._monotonic()))

    def _join(self, timeout: float) -> None:
        if self._writer is not None:
            self._writer.join(timeout)

    def _write(self, cluster: SavedCluster) -> None:
        began = self._monotonic()
        try:
            replace_file(self.path, encode(cluster))
        except (OSError, ValueError, OverflowError) as error:
            self.trouble = f"snapshot on disk {self.path} not written: {_reason(error)}"
            self._next_at = self._monotonic() + RETRY_SECONDS
        else:
            self.trouble = None
            ended = self._monotonic()
            self._next_at = max(self._next_at, ended + DUTY * (ended - began))


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that it is there whole or not at all, also after a power cut; raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def saved_cluster(source: str, saved: float, objects: Mapping[Kind, Iterable[Projection]]) -> SavedCluster:
    """A `SavedCluster` of the given kinds; copies the collections, so it can be written in another thread."""
    return SavedCluster(source=source, saved=saved, **{kind: tuple(items) for kind, items in objects.items()})  # type: ignore[arg-type]


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
