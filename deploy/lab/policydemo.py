"""The demo's steps about network policy: the shop's stages, and the firewall worker killed under connection attempts.

Touches the kernel through `Lab`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from lab.cluster import Lab, wait_until
from lab.connections import SteadyConnections, Verdicts, open_shop, post, stop_all, verdict_rows, verdicts_of, wrong
from lab.report import Line, print_rows
from lab.shop import GUARDED, QUESTIONS, SERVER, STAGES, UNWANTED, WANTED, Question


def network_policy(lab: Lab, progress: Callable[[str], None]) -> list[Line]:
    """Every stage in its turn; in the guarded one the firewall worker of the server's node is killed."""
    progress(f"starting {SERVER.key} on {SERVER.node} and four pods that will ask it")
    open_shop(lab)
    lines: list[Line] = []
    columns: list[tuple[str, Verdicts]] = []
    for stage in STAGES:
        post(lab, stage)
        found = verdicts_of(lab, stage)
        columns.append((stage.title, found))
        faults = wrong(found, stage)
        allowed = sum(sum(families.values()) for families in found.values())
        expected = f"{2 * len(stage.allowed)} of {2 * len(QUESTIONS)}"
        seen = f"{allowed} of {2 * len(QUESTIONS)}"
        progress(f"{stage.title}: {seen} connections allowed")
        for fault in faults:
            progress(f"  wrong: {fault}")
        if faults:
            seen += f" ({len(faults)} wrong)"
        lines.append(Line(f"{stage.title}: connections allowed", expected, seen, not faults))
        if stage is GUARDED:
            lines += kill_firewall(lab, progress)
    print_rows(verdict_rows(columns))
    return lines


def kill_firewall(lab: Lab, progress: Callable[[str], None]) -> list[Line]:
    """SIGKILL while allowed and forbidden connections are attempted; none may be lost, none let through."""
    streams: dict[Question, SteadyConnections] = {
        question: SteadyConnections(lab, question) for question in (*WANTED, *UNWANTED)
    }
    time.sleep(0.5)
    progress(f"kill -9 of {SERVER.node}'s firewall under connections allowed and forbidden")
    pid = int(lab.workers(SERVER.node).get("firewall", {}).get("pid") or 0)
    if pid:
        os.kill(pid, signal.SIGKILL)
    back = bool(pid) and wait_until(lambda: lab.restarted(SERVER.node, "firewall", pid), 15)
    time.sleep(0.5)
    ended = stop_all(streams)
    wanted, unwanted = ([ended[question] for question in part] for part in (WANTED, UNWANTED))
    lost, tried = sum(item.lost for item in wanted), sum(item.made for item in wanted)
    opened, refused = sum(item.opened for item in unwanted), sum(item.made for item in unwanted)
    return [
        Line(
            "firewall killed: allowed connections lost", "0", f"{lost} of {tried}", back and lost == 0 and tried > 100
        ),
        Line(
            "firewall killed: forbidden ones let through",
            "0",
            f"{opened} of {refused}",
            back and opened == 0 and refused > 100,
        ),
    ]
