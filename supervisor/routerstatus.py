"""How the router stands, for ``kube-routerctl status router``: sessions, announced paths, learned routes.

Touches sockets, gobgpd and the kernel, for reading. The sessions come from the worker's heartbeat, for only the worker
has seen them come and go; the rest is read from gobgpd and the kernel themselves, also while no worker runs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from kube_router.ipc.channels import request_status
from kube_router.ipc.codec import BadMessage
from kube_router.ipc.messages import Heartbeat
from kube_router.supervisor.conf import IPC_DIR
from kube_router.supervisor.status import Status, ask_supervisord, read_settings, shown_age, table
from kube_router.workers.settings import Settings, load_secrets

NAME = "router"
MOST_ANNOUNCED = 12
"""Pod CIDRs that the text names one by one; service addresses are only counted there."""


def collect(run_dir: str, timeout: float) -> Status:
    """Ask everyone; raises `Unreachable`. ``since`` and other times are seconds since the Unix epoch."""
    folder = Path(run_dir)
    programs = ask_supervisord(folder).programs
    troubles = []
    beats: Sequence[Heartbeat] = ()
    try:
        beats = request_status(folder / IPC_DIR, timeout).heartbeats
    except (OSError, BadMessage) as error:
        troubles.append(f"health: {error}")
    settings = read_settings(folder / IPC_DIR)
    if NAME not in programs:
        troubles.append("this agent has no router worker: it runs with --run-router=false")
    pids = {process.pid for name, process in programs.items() if name == NAME}
    beat = next((each for each in beats if each.worker == NAME and each.pid in pids), None)
    if beat is None:
        troubles.append("the router worker has not been heard of")
    found = _found(settings, folder / IPC_DIR, timeout, troubles)
    troubles += beat.warnings if beat else ()
    return {
        "node": settings.node_name,
        "healthy": beat is not None and not beat.pending and found["daemon"] is not None,
        "time": time.time(),
        "troubles": troubles,
        "sessions": [msgspec.to_builtins(session) for session in beat.sessions] if beat else [],
        **found,
    }


def _found(settings: Settings, ipc: Path, timeout: float, troubles: list[str]) -> Status:
    """What gobgpd and the kernel say; a trouble, and nothing, when they cannot be read."""
    from kube_router.workers.router import preview  # the drivers and grpc
    from kube_router.workers.router.bgpstate import is_host_prefix

    try:
        view = preview.look(settings, load_secrets(settings.run_dir), ipc, timeout)
    except (preview.PlanError, OSError, msgspec.DecodeError) as error:
        troubles.append(str(error))
        return {"daemon": None, "speaker": None, "announced": [], "learned": [], "changes": None}
    speaker = view.actual.speaker
    troubles += view.failures
    return {
        "daemon": f"gobgpd {view.generation}",
        "speaker": asdict(speaker) | {"listen_addresses": sorted(speaker.listen_addresses)} if speaker else None,
        "announced": [
            {"prefix": prefix, "next_hop": hop, "kind": "service" if is_host_prefix(prefix) else "pods"}
            for prefix, hop in sorted(view.actual.paths.items())
        ],
        "learned": [
            {
                "prefix": prefix,
                "next_hop": view.learned[prefix],
                "injection": decision.injection.value,
                "route": str(decision.route) if decision.route else None,
                "reason": decision.reason,
            }
            for prefix, decision in sorted(view.decisions.items())
        ],
        "changes": len(view.plan.steps) + len(view.kernel),
    }


def render(found: Mapping[str, Any]) -> str:
    """The status for people. Pure."""
    lines = [f"{found['node'] or 'agent'}: router {'healthy' if found['healthy'] else 'NOT HEALTHY'}"]
    speaker = found["speaker"]
    if speaker is not None:
        where = ", ".join(sorted(speaker["listen_addresses"])) or "all addresses"
        lines.append(
            f"{found['daemon']}: AS {speaker['asn']}, router-id {speaker['router_id']}, port {speaker['listen_port']} "
            f"on {where}"
        )
    elif found["daemon"] is not None:
        lines.append(f"{found['daemon']}: BGP is not started")
    lines += [f"  ! {line}" for line in found["troubles"]]
    if found["sessions"]:
        heads = ("PEER", "AS", "KIND", "STATE", "SINCE", "DROPS", "FAMILIES", "IN", "ACCEPTED", "OUT", "RESTART")
        lines += ["", *table([heads, *(_row(session, found["time"]) for session in found["sessions"])])]
        why = [f"  {item['address']}: {item['last_error']}" for item in found["sessions"] if item["last_error"]]
        lines += ["", "Last errors:", *why] if why else []
    lines += ["", *_announced(found["announced"]), *_learned(found["learned"])]
    if found["changes"]:
        lines.append(f"{found['changes']} changes are due: kube-routerctl plan router shows them")
    return "\n".join(lines).rstrip()


def _row(session: Mapping[str, Any], now: float) -> tuple[str, ...]:
    out = session["advertised"]
    return (
        session["address"],
        str(session["asn"]),
        session["type"],
        session["state"],
        shown_age(max(0.0, now - session["since"]) if session["since"] is not None else None),
        str(session["flaps"]),
        "+".join(session["families"]) or "-",
        str(session["received"]),
        str(session["accepted"]),
        "-" if out is None else str(out),
        session["graceful_restart"] or "-",
    )


def _announced(paths: Sequence[Mapping[str, Any]]) -> list[str]:
    pods = [f"{path['prefix']} via {path['next_hop']}" for path in paths if path["kind"] == "pods"]
    services = len(paths) - len(pods)
    more = f" and {len(pods) - MOST_ANNOUNCED} more" if len(pods) > MOST_ANNOUNCED else ""
    lines = [f"Announced: {', '.join(pods[:MOST_ANNOUNCED]) or 'no pod CIDR'}{more}"]
    return [*lines, f"           {services} service addresses"] if services else lines


def _learned(routes: Sequence[Mapping[str, Any]]) -> list[str]:
    ways = Counter(route["injection"] if route["route"] else "refused" for route in routes)
    counted = ", ".join(f"{number} {way}" for way, number in sorted(ways.items()))
    lines = [f"Learned: {len(routes)} routes" + (f": {counted}" if counted else "")]
    reasons: dict[str, list[str]] = {}
    for route in routes:
        if not route["route"]:
            reasons.setdefault(route["reason"], []).append(route["prefix"])
    for reason, prefixes in sorted(reasons.items()):
        what = prefixes[0] if len(prefixes) == 1 else f"{len(prefixes)} routes, first {prefixes[0]}"
        lines.append(f"  {what}: {reason}")
    return lines
