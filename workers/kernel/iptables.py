"""Rules in built-in iptables chains, through the iptables programs of the host's own kind (nft or legacy).

Touches the kernel: forks ``iptables -S CHAIN`` to read one chain and ``iptables-restore --noflush`` to change one
table, never once a rule. A restore is a transaction: all steps of a plan happen, or none. The driver changes exactly
the rules that a plan names; rules and chains of others stay, with their counters.

Which kind: as the iptables-wrappers of Kubernetes decide. The one in which kubelet left its hint chain; else the one
with more rules; else nft. The variant programs are called by their own names (``iptables-nft``), so that nothing on the
host is switched.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from kube_router.workers.kernel.monitor import legacy_tables
from kube_router.workers.model import Family
from kube_router.workers.rulefacts import RulePlan, RuleText

log = logging.getLogger(__name__)

Backend = Literal["nft", "legacy"]

WAIT_SECONDS = 5
"""How long the programs wait for the xtables lock."""
RUN_SECONDS = 60
"""A program that runs longer is ended: the kernel or a huge table is stuck."""
_LOCKED_STATUS = 4
_RANDOM_FULLY = (1, 6, 2)
_HINT_CHAINS = re.compile(r"^:KUBE-(?:IPTABLES-HINT|KUBELET-CANARY) ", re.MULTILINE)
_RULE_LINES = re.compile(r"^-", re.MULTILINE)
_PROGRAM = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}
_EXTRA_PATH = "/usr/sbin:/sbin:/usr/local/sbin"


class IptablesError(Exception):
    """A program failed; the text names program, table and its own words."""


class Refused(IptablesError):
    """A program, or the kernel behind it, did not take what it was given; something else might be taken."""


@dataclass(frozen=True, slots=True)
class Programs:
    """Which programs to call, and what they can do."""

    backend: Backend
    suffix: str
    version: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    @property
    def random_fully(self) -> bool:
        """Whether MASQUERADE takes ``--random-fully``."""
        return self.version >= _RANDOM_FULLY

    def name(self, family: Family, action: str = "") -> str:
        """``ip6tables-legacy-restore`` for (IPv6, ``-restore``)."""
        return f"{_PROGRAM[family]}{self.suffix}{action}"


def _environment() -> Mapping[str, str]:
    path = os.environ.get("PATH", os.defpath)
    return {**os.environ, "PATH": f"{path}:{_EXTRA_PATH}", "LC_ALL": "C"}


class Running:
    """One of the programs at work, so that several can be at work at once."""

    def __init__(self, arguments: list[str], stdin: str = "") -> None:
        """Start it; raises `IptablesError` when there is no such program."""
        environment = _environment()
        program = shutil.which(arguments[0], path=environment["PATH"])
        if program is None:
            raise IptablesError(f"{arguments[0]}: no such program on PATH ({environment['PATH']})")
        self._arguments = arguments
        # A file, not a pipe: a program that is not read from yet need not be waited for with large inputs.
        descriptor = os.memfd_create("iptables", os.MFD_CLOEXEC)
        try:
            with open(descriptor, "w", encoding="utf-8", errors="surrogateescape", closefd=False) as file:
                file.write(stdin)
            os.lseek(descriptor, 0, os.SEEK_SET)
            self._process = subprocess.Popen(
                [program, *arguments[1:]],
                stdin=descriptor,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="surrogateescape",
                env=environment,
            )
        finally:
            os.close(descriptor)
        self.pid = self._process.pid

    def output(self) -> str:
        """Its output, once it has ended; raises `IptablesError`."""
        try:
            stdout, stderr = self._process.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise IptablesError(f"{' '.join(self._arguments)}: no end after {RUN_SECONDS} s") from None
        status = self._process.returncode
        if status == 0:
            return stdout
        words = "; ".join(line for line in stderr.splitlines() if not line.startswith(("Try ", "Error occurred")))
        if status == _LOCKED_STATUS and "lock" in words:
            words = f"another program holds the xtables lock for more than {WAIT_SECONDS} s"
            raise IptablesError(f"{' '.join(self._arguments)}: {words}")
        raise Refused(f"{' '.join(self._arguments)}: {words or f'ended with status {status}'}")


def run_program(arguments: list[str], stdin: str = "") -> str:
    """Run one of the programs and return its output; raises `IptablesError`."""
    return Running(arguments, stdin).output()


def all_programs(run: Callable[[list[str]], str] = run_program) -> tuple[Programs, ...]:
    """Every kind of iptables on this host, for a cleanup that must find rules of an earlier kind too."""
    kinds = _present()
    if not kinds:
        return (find_programs(run),)
    return tuple(Programs(kind, f"-{kind}", _version(run([f"iptables-{kind}", "--version"]))) for kind in kinds)


def _present() -> list[Backend]:
    path = _environment()["PATH"]
    kinds: tuple[Backend, ...] = ("nft", "legacy")
    return [kind for kind in kinds if shutil.which(f"iptables-{kind}", path=path)]


def find_programs(run: Callable[[list[str]], str] = run_program) -> Programs:
    """Decide once, at start, which kind of iptables this host uses; raises `IptablesError` when it has none."""
    present = _present()
    warnings: tuple[str, ...] = ()
    if not present:
        text = run(["iptables", "--version"])
        return Programs("nft" if "nf_tables" in text else "legacy", "", _version(text))
    if len(present) == 1:
        chosen = present[0]
    else:
        chosen, warnings = _choose(run)
    return Programs(chosen, f"-{chosen}", _version(run([f"iptables-{chosen}", "--version"])), warnings)


def _choose(run: Callable[[list[str]], str]) -> tuple[Backend, tuple[str, ...]]:
    saved = {"nft": _save("nft", run)}
    # Without legacy tables in the kernel there is nothing to save, and saving could load the modules.
    has_legacy = any(legacy_tables(family) for family in Family)
    saved["legacy"] = _save("legacy", run) if has_legacy else ""
    rules = {kind: len(_RULE_LINES.findall(text)) for kind, text in saved.items()}
    chosen: Backend = "legacy" if rules["legacy"] > rules["nft"] else "nft"
    if _HINT_CHAINS.search(saved["nft"]):
        chosen = "nft"
    elif _HINT_CHAINS.search(saved["legacy"]):
        chosen = "legacy"
    if not all(rules.values()):
        return chosen, ()
    warning = (
        f"this host has {rules['nft']} nft and {rules['legacy']} legacy iptables rules; both apply to every packet, "
        f"and a drop in either is final; using {chosen}"
    )
    return chosen, (warning,)


def _save(kind: Backend, run: Callable[[list[str]], str]) -> str:
    texts = []
    for family in Family:
        try:
            texts.append(run([f"{_PROGRAM[family]}-{kind}-save"]))
        except IptablesError as error:  # one family without kernel support decides nothing
            log.debug("%s", error)
    return "".join(texts)


def _version(text: str) -> tuple[int, ...]:
    found = re.search(r"v(\d+(?:\.\d+)*)", text)
    return tuple(map(int, found[1].split("."))) if found else ()


@dataclass(slots=True)
class RuleDriver:
    """Reads chains and executes plans with the host's programs. ``writes`` counts steps that were carried out."""

    programs: Programs = field(default_factory=find_programs)
    writes: int = 0

    def has_table(self, family: Family, table: str) -> bool:
        """Whether a table may hold rules: reading a legacy table that does not exist would create it."""
        return self.programs.backend != "legacy" or table in legacy_tables(family)

    def observe(self, family: Family, table: str, chain: str) -> tuple[RuleText, ...]:
        """The rules of one built-in chain, in order. Raises `IptablesError`."""
        if not self.has_table(family, table):
            return ()
        program = self.programs.name(family)
        output = run_program([program, "-w", str(WAIT_SECONDS), "-t", table, "-S", chain])
        start = f"-A {chain} "
        return tuple(RuleText(line[len(start) :]) for line in output.splitlines() if line.startswith(start))

    def save(self, family: Family, table: str) -> list[str]:
        """A whole table, line by line, as ``iptables-save`` prints it; empty without one. Raises `IptablesError`."""
        if not self.has_table(family, table):
            return []
        return run_program([self.programs.name(family, "-save"), "-t", table]).splitlines()

    def restore(self, family: Family, text: str) -> None:
        """Carry out the lines of one table, all or none; what they do not name stays. Raises `IptablesError`."""
        run_program([self.programs.name(family, "-restore"), "--noflush", "--wait", str(WAIT_SECONDS)], stdin=text)

    def apply(self, plan: RulePlan) -> None:
        """Carry out all steps of a plan, or none. Raises `IptablesError`."""
        if not plan.steps:
            return
        self.restore(plan.family, str(plan))
        self.writes += len(plan.steps)
