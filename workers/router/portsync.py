"""The UDP ports of the overlay: opens what is wanted, closes what this agent opened and nobody wants any more.

Drives a FoU driver (a parameter). A port says nothing of its owner, so what is opened is first written down in the
state directory; a port that is not in that record is never closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import msgspec

from kube_router.workers.kernel.files import replace_file
from kube_router.workers.kernel.netlink import NetlinkError
from kube_router.workers.model import Failure, Family
from kube_router.workers.tunnelfacts import FouPort

RECORD = "router/fou-ports.json"
"""In the state directory."""
PHASE = "overlay-ports"


class Record(msgspec.Struct, frozen=True):
    """The ports that this agent opened, by IP version."""

    version: int
    ports: tuple[tuple[int, int], ...]


class Fou(Protocol):
    """What this module asks of a FoU driver."""

    def available(self) -> bool: ...

    def observe(self) -> frozenset[FouPort]: ...

    def open(self, ports: Iterable[FouPort]) -> dict[FouPort, NetlinkError]: ...

    def shut(self, ports: Iterable[FouPort]) -> dict[FouPort, NetlinkError]: ...


class PortSync:
    """The ports of one agent. ``load`` loads the kernel modules for some families and says why it could not."""

    def __init__(
        self,
        driver: Fou,
        state_dir: str,
        load: Callable[[Iterable[Family]], str | None],
        keep: Callable[[Path, bytes], None],
    ) -> None:
        """``keep`` writes the record to its file."""
        self._driver, self._load, self._keep = driver, load, keep
        self._path = Path(state_dir) / RECORD
        self._recorded = self._read()
        self._open: frozenset[FouPort] | None = None
        self._wanted: frozenset[FouPort] = frozenset()
        self._tried_to_load = False
        self._module_problem = ""  # why the modules could not be loaded

    def sync(self, wanted: frozenset[FouPort], *, needed: bool, observe: bool) -> tuple[int, list[Failure], list[str]]:
        """(ports opened and closed, failures, warnings). ``needed``: this node sends over UDP itself.

        Where it does not, a kernel without FoU is no trouble. Raises OSError, `Overflow`.
        """
        if observe or wanted != self._wanted:
            self._open = None
        if not wanted and not self._recorded:
            self._wanted = wanted
            return 0, [], []
        if self._open is None:
            self._load_modules(wanted, needed)
            self._open = self._driver.observe()
        self._wanted = wanted
        warnings = [self._module_problem] if needed and self._module_problem else []
        if not needed and not self._driver.available():
            return 0, [], warnings
        there = self._open
        opened, failures = self._add(there, wanted - there, warnings)
        if not needed:  # nobody is known to send to them yet
            warnings += [failure.text for failure in failures]
            failures = []
        closed, more = self._remove(there & (self._recorded - wanted), self._recorded - wanted - there)
        return opened + closed, failures + more, warnings

    def differs(self) -> bool:
        """Whether a port that should be open is not; the kernel sends no events of ports."""
        if self._open is None or not self._wanted & self._open:
            return False
        try:
            return not self._wanted & self._open <= self._driver.observe()
        except OSError:
            return True

    def _load_modules(self, wanted: frozenset[FouPort], needed: bool) -> None:
        """Once, and where FoU is needed, again as long as the kernel lacks it."""
        families = sorted({port.family for port in wanted})
        if families and (not self._tried_to_load or (needed and not self._driver.available())):
            self._tried_to_load = True
            self._module_problem = self._load(families) or ""

    def _add(
        self, there: frozenset[FouPort], ports: frozenset[FouPort], warnings: list[str]
    ) -> tuple[int, list[Failure]]:
        if not ports:
            return 0, []
        try:
            self._write(self._recorded | ports)
        except OSError as error:
            warnings.append(f"{self._path}: {error.strerror}: the overlay's UDP ports will stay open after their time")
        self._open = None  # until it is known what got through
        failed = self._driver.open(sorted(ports))
        self._open = None if failed else there | ports
        failures = [Failure(PHASE, f"UDP {port} cannot be opened: {error.strerror}") for port, error in failed.items()]
        return len(ports) - len(failed), failures

    def _remove(self, ports: frozenset[FouPort], gone: frozenset[FouPort]) -> tuple[int, list[Failure]]:
        failed = self._driver.shut(sorted(ports)) if ports else {}
        failures = [Failure(PHASE, f"UDP {port} cannot be closed: {error.strerror}") for port, error in failed.items()]
        closed = ports - failed.keys()
        if self._open is not None:
            self._open -= closed
        if closed or gone:
            try:
                self._write(self._recorded - closed - gone)
            except OSError as error:
                failures.append(Failure(PHASE, f"{self._path}: {error.strerror}"))
        return len(closed), failures

    def _read(self) -> frozenset[FouPort]:
        try:
            record = msgspec.json.decode(self._path.read_bytes(), type=Record)
            return frozenset(FouPort(Family(version), port) for version, port in record.ports)
        except (OSError, msgspec.MsgspecError, ValueError):
            return frozenset()

    def _write(self, ports: frozenset[FouPort]) -> None:
        if ports != self._recorded:
            record = Record(1, tuple((int(port.family), port.port) for port in sorted(ports)))
            self._keep(self._path, msgspec.json.encode(record))
            self._recorded = ports


def keep_record(path: Path, data: bytes) -> None:
    """Put the record into its file, for root alone; raises OSError."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    replace_file(str(path), data, 0o600)
