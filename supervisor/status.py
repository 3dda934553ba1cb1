"""How an agent stands, put together for ``kube-routerctl status``: as data (the JSON output) and as text for people.

Touches sockets and files of the run directory, for reading. Three sources, each of which may be missing: the health
worker (heartbeats and verdict), the listener's ``processes.json``, and supervisord itself. So a dead health worker, or
a dead listener, is told instead of hiding the rest.
"""

from __future__ import annotations

import http.client
import time
import xmlrpc.client
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from kube_router.ipc.channels import request_status
from kube_router.ipc.codec import BadMessage
from kube_router.ipc.messages import Heartbeat, StatusReply
from kube_router.supervisor.conf import IPC_DIR, LISTENER, RELOAD_FILE
from kube_router.supervisor.programs import RELOADER
from kube_router.supervisor.rpc import supervisord
from kube_router.workers.health.processes import PROCESSES_FILE, ProcessState, ProcessTable, read_processes
from kube_router.workers.settings import SETTINGS_FILE, Settings, load_settings

Status = dict[str, Any]
"""``healthy``, ``reasons``, ``workers``, ``source``, ``sessions``, ``counts``, ``warnings``, ``unbuilt_workers``."""
SUPERVISORD_SECONDS = 2.0


class Unreachable(Exception):
    """No agent answers in this run directory; one line."""


def collect(run_dir: str, timeout: float) -> Status:
    """Ask everyone; raises `Unreachable`. Ages are seconds."""
    folder = Path(run_dir)
    running = ask_supervisord(folder)
    ipc = folder / IPC_DIR
    troubles = []
    reply: StatusReply | None = None
    try:
        reply = request_status(ipc, timeout)
    except (OSError, BadMessage) as error:
        troubles.append(f"health: {error}")
    found = build(reply, running, read_processes(ipc / PROCESSES_FILE), read_settings(ipc), troubles, time.time())
    told = read_warnings(folder)
    return {**found, "reasons": [*found["reasons"], *told], "warnings": [*found["warnings"], *told]}


def read_warnings(run_dir: Path) -> list[str]:
    """What the program that follows the flags file has to tell."""
    try:
        state = msgspec.json.decode((run_dir / RELOAD_FILE).read_bytes())
        return [f"{RELOADER}: {line}" for line in state["warnings"]]
    except (OSError, msgspec.DecodeError, KeyError, TypeError):
        return []


def read_settings(ipc: Path) -> Settings:
    """The agent's settings, or the defaults if they cannot be read."""
    try:
        return load_settings(ipc / SETTINGS_FILE)
    except (OSError, msgspec.DecodeError):
        return Settings()


def ask_supervisord(run_dir: Path) -> ProcessTable:
    """The programs as supervisord itself sees them; raises `Unreachable`."""
    path = str(run_dir / "supervisord.sock")
    try:
        answer: Any = supervisord(path, SUPERVISORD_SECONDS).supervisor.getAllProcessInfo()
    except FileNotFoundError:
        raise Unreachable(f"no agent runs with --run-dir={run_dir}: there is no {path}") from None
    except PermissionError:
        raise Unreachable(f"--run-dir={run_dir}: only root may ask the agent") from None
    except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
        raise Unreachable(f"the agent with --run-dir={run_dir} does not answer on {path}: {error}") from None
    programs = {
        str(item["name"]): ProcessState(
            state=str(item["statename"]), pid=int(item["pid"]), reason=str(item["spawnerr"]), since=float(item["start"])
        )
        for item in answer
    }
    return ProcessTable(programs=programs)


def build(
    reply: StatusReply | None,
    running: ProcessTable,
    recorded: ProcessTable,
    settings: Settings,
    troubles: Iterable[str],
    now: float,
) -> Status:
    """Put the parts together. Pure. What supervisord says of a program's state is newer than what is recorded."""
    beats = {beat.worker: beat for beat in reply.heartbeats} if reply else {}
    names = [name for name in (*recorded.programs, *running.programs) if name != LISTENER]
    workers = [
        worker_status(name, running.programs.get(name), recorded.programs.get(name), beats.get(name), now)
        for name in dict.fromkeys(names)
    ]
    reasons = [*(reply.reasons if reply else ()), *troubles]
    watcher = beats.get("watcher")
    source = next((beat.source for beat in (watcher, *beats.values()) if beat is not None and beat.source), None)
    return {
        "healthy": reply is not None and reply.healthy,
        "node": settings.node_name,
        "reasons": reasons,
        "workers": workers,
        "source": msgspec.to_builtins(source) if source else None,
        "sessions": [msgspec.to_builtins(session) for beat in beats.values() for session in beat.sessions],
        "counts": {name: value for beat in beats.values() for name, value in sorted(beat.counts.items())},
        "warnings": [f"{beat.worker}: {text}" for beat in beats.values() for text in beat.warnings],
        "unbuilt_workers": list(settings.unbuilt_workers),
    }


def worker_status(
    name: str, running: ProcessState | None, recorded: ProcessState | None, beat: Heartbeat | None, now: float
) -> Status:
    """One entry of ``workers``; what only a heartbeat tells is null without one of the running process."""
    process = running or recorded or ProcessState()
    if beat is not None and process.pid != beat.pid:
        beat = None  # from the process before this one
    return {
        "name": name,
        "state": process.state,
        "pid": process.pid,
        "restarts": recorded.restarts if recorded else 0,
        "last_end": (recorded.reason if recorded else "") or process.reason,
        "uptime": round(now - process.since, 1) if process.up and process.since else None,
        "last_sync_age": round(max(0.0, now - beat.last_sync), 1) if beat and beat.last_sync is not None else None,
        "sync_seconds": beat.sync_seconds if beat else None,
        "syncs": beat.syncs if beat else None,
        "writes": beat.writes if beat else None,
        "pending": beat.pending if beat else None,
        "in_sync": beat.in_sync if beat else None,
        "stale": beat.stale if beat else None,
        "errors": dict(beat.errors) if beat else {},
        "rss": beat.rss if beat else None,
        "privileges": beat.privileges if beat else None,
    }


def render(found: Mapping[str, Any]) -> str:
    """The status for people. Pure."""
    lines = [f"{found['node'] or 'agent'}: {'healthy' if found['healthy'] else 'NOT HEALTHY'}"]
    lines += [f"  ! {reason}" for reason in found["reasons"]]
    rows: list[tuple[str, ...]] = [
        ("WORKER", "STATE", "PID", "UPTIME", "RESTARTS", "LAST SYNC", "PENDING", "PRIVILEGES")
    ]
    rows += [worker_row(worker) for worker in found["workers"]]
    lines += ["", *table(rows)]
    ends = [f"  {worker['name']}: {worker['last_end']}" for worker in found["workers"] if worker["last_end"]]
    if ends:
        lines += ["", "Last ends:", *ends]
    lines += ["", *source_lines(found["source"])]
    if found["sessions"]:
        heads = [("BGP SESSION", "AS", "KIND", "STATE", "RECEIVED", "ACCEPTED")]
        keys = ("address", "asn", "type", "state", "received", "accepted")
        lines += ["", *table([*heads, *(tuple(str(session[key]) for key in keys) for session in found["sessions"])])]
    if found["counts"]:
        lines += ["", "Counts:", *(f"  {name} {value:g}" for name, value in found["counts"].items())]
    lines += ["", *(f"Not built yet: {name}" for name in found["unbuilt_workers"])]
    return "\n".join(lines).rstrip()


def worker_row(worker: Mapping[str, Any]) -> tuple[str, ...]:
    """One worker's line of the table."""
    pending = "-" if worker["pending"] is None else str(worker["pending"])
    return (
        worker["name"],
        worker["state"],
        str(worker["pid"] or "-"),
        shown_age(worker["uptime"]),
        str(worker["restarts"]),
        shown_age(worker["last_sync_age"], " ago") + (" (stale)" if worker["stale"] else ""),
        pending,
        worker["privileges"] or "-",
    )


def source_lines(source: Mapping[str, Any] | None) -> list[str]:
    """Where the cluster's state comes from, and how good it is."""
    if source is None:
        return ["Source: unknown (no worker has told)"]
    state = (
        "in sync" if source["in_sync"] else "stale: from the last snapshot on disk" if source["stale"] else "waiting"
    )
    return [f"Source: {source['source']}: {state}", *(f"  ! {line}" for line in source["degraded"])]


def shown_age(seconds: float | None, suffix: str = "") -> str:
    """``4s``, ``3m20s``, ``5h12m``, ``8d3h``; ``-`` for none."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    for unit, size, smaller, small in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small}{smaller}{suffix}"
    return f"{whole}s{suffix}"


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows as lines of aligned columns."""
    kept = list(rows)
    widths = [max(map(len, column)) for column in zip(*kept, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in kept]
