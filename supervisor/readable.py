"""Whether a program could run as a user of its own: a try, as that user, at every file that it must read.

Touches the process: a forked child takes the user on, looks, and ends. A look at mode bits would miss access control
lists and directories on the way.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from kube_router.supervisor.programs import Program
from kube_router.workers.settings import Settings

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
MOST_MANIFESTS = 1000


def first_closed(program: Program, settings: Settings, gobgpd: str) -> str | None:
    """The first path that keeps ``program`` from running as its own user; None if nothing does."""
    wanted = [os.path.realpath(sys.executable), *code_paths()]
    if program.name == "gobgpd":
        wanted.append(gobgpd)
    if program.name in ("watcher", "loadbalancer"):
        exec_plugin, files = source_files(settings)
        if exec_plugin:
            return f"what the exec plugin of {settings.kubeconfig} reads"
        wanted += files
    return first_unreadable(program.user, wanted)


def code_paths() -> Iterator[str]:
    """The interpreter's library, the installed packages and our own code: a file of each stands for its folder."""
    yield os.__file__
    yield msgspec.__file__
    yield str(Path(__file__).resolve())
    yield sysconfig.get_path("platstdlib")


def source_files(settings: Settings) -> tuple[bool, list[str]]:
    """(whether an exec plugin is used, files) that lead to the cluster's state."""
    if settings.manifests:
        return False, [settings.manifests, *sorted(map(str, Path(settings.manifests).glob("*")))[:MOST_MANIFESTS]]
    if not settings.kubeconfig:
        return False, [f"{SERVICE_ACCOUNT}/{name}" for name in ("token", "ca.crt")]
    import yaml  # costs 30 ms, and only where there is a kubeconfig

    try:
        document = yaml.safe_load(Path(settings.kubeconfig).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False, [settings.kubeconfig]
    entries = list(_entries(document))
    folder = Path(settings.kubeconfig).parent
    keys = ("certificate-authority", "client-certificate", "client-key", "tokenFile")
    named = [str(folder / entry[key]) for entry in entries for key in keys if isinstance(entry.get(key), str)]
    return any("exec" in entry for entry in entries), [settings.kubeconfig, *named]


def _entries(document: Any) -> Iterator[dict[str, Any]]:
    """The cluster and user entries of a kubeconfig, whatever else is in it."""
    for plural, single in (("clusters", "cluster"), ("users", "user")):
        listed = document.get(plural) if isinstance(document, dict) else None
        for item in listed if isinstance(listed, list) else ():
            entry = item.get(single) if isinstance(item, dict) else None
            if isinstance(entry, dict):
                yield entry


def first_unreadable(user: int, paths: Iterable[str]) -> str | None:
    """The first of ``paths`` that is there and that ``user`` (also as its group, with no other) cannot read."""
    present = [path for path in dict.fromkeys(paths) if os.path.exists(path)]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "the switch of user"
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            answer = next((path for path in present if not _open_to_me(path)), "")
        finally:
            os.write(writer, os.fsencode(answer)[:4000])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        found = os.fsdecode(answers.read())
    os.waitpid(child, 0)
    return found or None


def _open_to_me(path: str) -> bool:
    executable = os.path.isdir(path) or path == os.path.realpath(sys.executable)
    needed = os.R_OK | os.X_OK if executable else os.R_OK
    return os.access(path, needed)
