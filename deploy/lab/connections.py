"""TCP connections inside the lab: a server in a pod, one attempt from everybody, a steady stream of attempts.

Touches processes: starts ``probe.py`` inside the pods' namespaces.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lab import network
from lab.cluster import Lab, wait_until
from lab.pings import family_of
from lab.probe import ANSWERED, LATE, OPENED
from lab.shop import MANIFESTS, PODS, QUESTIONS, SERVER, Question, Stage

PROBE = [sys.executable, "-I", "-S", str(Path(__file__).with_name("probe.py"))]

SETTLE_SECONDS = 0.3
"""What has just been written to the manifest directory is to be in force when somebody asks."""

Verdicts = Mapping[Question, Mapping[str, bool]]
"""By question and family: whether the server answered."""


def open_shop(lab: Lab) -> None:
    """Start the shop's pods, and the server in its pod; returns when it answers."""
    for pod in PODS:
        lab.run_pod(pod)
    command = lab.namespaces.command(SERVER.short, [*PROBE, "serve", *map(str, SERVER.ports.values())])
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    if process.stdout is None or process.stdout.readline() != b"ready\n":
        raise network.LabError(f"the server of {SERVER.key} did not start")


def close_shop(lab: Lab) -> None:
    """Remove the shop's policies and pods."""
    for name in MANIFESTS:
        lab.remove_manifest(name)
    for pod in PODS:
        if pod.short in lab.pods:
            lab.delete_pod(pod.short)


def post(lab: Lab, stage: Stage) -> None:
    """Let exactly the policies of ``stage`` stand."""
    for name, manifest in MANIFESTS.items():
        if name in stage.manifests:
            lab.write_manifest(name, manifest)
        else:
            lab.remove_manifest(name)


def _ask(lab: Lab, question: Question, *options: str) -> list[str]:
    targets = [f"{address},{question.port}" for address in lab.pods[SERVER.short].addresses]
    return lab.namespaces.command(question.source, [*PROBE, "ask", *options, *targets])


def verdicts(lab: Lab) -> Verdicts:
    """Ask the server everything that `shop` knows to ask, once, over both families."""
    families = [family_of(address) for address in lab.pods[SERVER.short].addresses]

    def ask(question: Question) -> dict[str, bool]:
        seen: list[dict[str, int]] = json.loads(network.run(_ask(lab, question)))
        return {family: bool(how.keys() & {ANSWERED, LATE}) for family, how in zip(families, seen, strict=True)}

    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        return dict(zip(QUESTIONS, pool.map(ask, QUESTIONS), strict=True))


def wrong(found: Verdicts, stage: Stage) -> list[str]:
    """What differs from ``stage``, one line each."""
    return [
        f"{question.text}, {family}: {'allowed' if allowed else 'blocked'}"
        for question, families in found.items()
        for family, allowed in families.items()
        if allowed != (question in stage.allowed)
    ]


def verdicts_of(lab: Lab, stage: Stage, seconds: float = 10) -> Verdicts:
    """Ask until the answers are those of ``stage`` or the time is over; the last answers."""
    found: list[Verdicts] = []

    def settled() -> bool:
        found.append(verdicts(lab))
        return not wrong(found[-1], stage)

    time.sleep(SETTLE_SECONDS)
    wait_until(settled, seconds, 0.05)
    return found[-1]


@dataclass(frozen=True, slots=True)
class Attempts:
    """What became of a stream of attempts. ``lost``: not answered, or only after a packet had been sent again."""

    made: int
    lost: int
    opened: int
    how: Mapping[str, int]


class SteadyConnections:
    """Attempts at 50 Hz and family from a source to the server's port, until `stop_all`."""

    def __init__(self, lab: Lab, question: Question) -> None:
        self._process = subprocess.Popen(
            _ask(lab, question, "--every", "0.02"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def end(self) -> None:
        """Begin no more attempts."""
        if self._process.stdin is not None:
            self._process.stdin.close()
            self._process.stdin = None

    def result(self) -> Attempts:
        """Wait for the last attempts of an ended stream."""
        output, _ = self._process.communicate(timeout=15)
        how: dict[str, int] = {}
        for counts in json.loads(output):
            for outcome, count in counts.items():
                how[outcome] = how.get(outcome, 0) + count
        made = sum(how.values())
        return Attempts(
            made=made,
            lost=made - how.get(ANSWERED, 0),
            opened=sum(how.get(outcome, 0) for outcome in (ANSWERED, LATE, OPENED)),
            how=how,
        )


def stop_all(streams: Mapping[Question, SteadyConnections]) -> dict[Question, Attempts]:
    """End streams together, and what became of each."""
    for stream in streams.values():
        stream.end()
    return {question: stream.result() for question, stream in streams.items()}


def verdict_rows(columns: Sequence[tuple[str, Verdicts]]) -> list[tuple[str, ...]]:
    """A table of who is answered: a row a question, a column for each of ``columns`` (title, answers)."""
    head = (f"connections to {SERVER.key} on {SERVER.node}, both families", *(title for title, _ in columns))
    return [
        head,
        *((question.text, *(_shown(found[question]) for _, found in columns)) for question in QUESTIONS),
    ]


def _shown(families: Mapping[str, bool]) -> str:
    if len(set(families.values())) == 1:
        return "allowed" if any(families.values()) else "blocked"
    return "only " + ", ".join(family for family, allowed in families.items() if allowed)
