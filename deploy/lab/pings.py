"""Pings inside the lab: single ones for the connectivity matrix, steady ones while something is being killed."""

from __future__ import annotations

import re
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lab.cluster import Lab
from lab.topology import EXTERNAL_HOSTS

SEQUENCE = re.compile(r"bytes from .*icmp_seq=(\d+)")
COUNTS = re.compile(r"(\d+) packets transmitted, (\d+) received")


@dataclass(frozen=True, slots=True)
class Reached:
    """One cell of the connectivity matrix."""

    source: str
    target: str
    family: str
    ok: bool


def family_of(address: str) -> str:
    """``IPv4`` or ``IPv6``, by the text."""
    return "IPv6" if ":" in address else "IPv4"


def ping_once(lab: Lab, source: str, address: str) -> bool:
    """Whether one of two echo requests comes back within a second."""
    command = lab.namespaces.command(source, ["ping", "-n", "-q", "-c", "2", "-i", "0.2", "-W", "1", address])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    counts = COUNTS.search(done.stdout)
    return counts is not None and int(counts[2]) > 0


def matrix(lab: Lab) -> list[Reached]:
    """Every pod to every other pod and to the external host, both families."""
    cases: list[tuple[str, str, str]] = []
    for pod in lab.pods.values():
        for other in lab.pods.values():
            if other is not pod:
                cases += [(pod.name, other.name, address) for address in other.addresses]
        cases += [(pod.name, "external", host) for host in EXTERNAL_HOSTS]

    def probe(case: tuple[str, str, str]) -> Reached:
        source, target, address = case
        return Reached(source, target, family_of(address), ping_once(lab, source, address))

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(probe, cases))


class SteadyPing:
    """A ping at 100 Hz from a pod to an address, until `stop`."""

    def __init__(self, lab: Lab, source: str, target: str, address: str) -> None:
        self.source, self.target, self.family = source, target, family_of(address)
        # Output to a file: nobody reads a pipe while the ping runs, and a full one would stop it.
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            lab.namespaces.command(source, ["ping", "-n", "-i", "0.01", "-W", "1", address]),
            stdout=self._output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )

    def stop(self) -> tuple[int, int]:
        """End the ping; returns (sent, lost). The very last packet, if still on its way, is counted as neither."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=10)
        self._output.seek(0)
        text = self._output.read()
        self._output.close()
        counts = COUNTS.search(text)
        if counts is None:
            return 0, 0
        sent = int(counts[1])
        answered = {int(number) for number in SEQUENCE.findall(text)}
        if sent not in answered:
            sent -= 1
        return sent, len(set(range(1, sent + 1)) - answered)
