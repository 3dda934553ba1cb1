"""The host as the cni worker sees it: what is there, and the steps of a plan carried out one by one.

Touches the kernel, through the drivers in ``workers.kernel`` only. Recognises its own: the bridge by its name; ranges
in the configuration file by the record in the state directory, which is written before them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kube_router.workers.cni.desired import ActualBridge, ActualCni, ActualConf
from kube_router.workers.cni.names import (
    BRIDGE,
    PHASE_BRIDGE,
    PHASE_FILE,
    PHASE_SYSCTL,
    STATE_FILE,
    STATE_FOLDER,
)
from kube_router.workers.cni.plan import (
    CreateBridge,
    DeleteBridge,
    LoadModule,
    Plan,
    RecordRanges,
    RemoveGateway,
    SetBridgeMtu,
    SetBridgeUp,
    Step,
    WriteConf,
    WriteSysctl,
)
from kube_router.workers.kernel.files import read_file, replace_file
from kube_router.workers.kernel.links import LinkDriver
from kube_router.workers.kernel.sysctl import load_module, observe_sysctls, write_sysctl
from kube_router.workers.linkfacts import Links
from kube_router.workers.model import Failure, IPNetwork, parse_network

MOST_CONF_BYTES = 1 << 20
"""A larger configuration is a mistake (libcni reads it whole for every pod)."""
RECORD_VERSION = 1


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Which ranges in the configuration file at ``conf`` are ours, as it is kept in the state directory."""

    version: int
    conf: str
    ranges: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of a plan.

    ``mtu_refused`` and ``module_refused`` say why the bridge did not take its MTU, or the kernel a module: both have a
    way on, so they are no failures. When the MTU was refused the file was not written.
    """

    writes: int = 0
    failures: tuple[Failure, ...] = ()
    mtu_refused: str | None = None
    module_refused: str | None = None


class Host:
    """Observes and applies for one agent: ``conf`` is the configuration file, ``state_dir`` the agent's."""

    def __init__(self, conf: str, state_dir: str) -> None:
        self._conf = conf
        self._record = Path(state_dir) / STATE_FOLDER / STATE_FILE
        self._links = LinkDriver()

    def close(self) -> None:
        """Close the netlink socket."""
        self._links.close()

    @property
    def link_writes(self) -> int:
        """Netlink requests sent so far that change something."""
        return self._links.writes

    def observe_links(self) -> Links:
        """All links; raises OSError."""
        return self._links.observe()

    def observe(self, links: Links, sysctls: Iterable[str]) -> ActualCni:
        """What is there. A file that cannot be read is part of the answer, not an error."""
        bridge = links.named(BRIDGE)
        found = None
        if bridge is not None:
            ports = tuple(port.name for port in links.ports_of(bridge))
            found = ActualBridge(bridge.index, bridge.kind, bridge.up, bridge.mtu, ports, bridge.addresses)
        text, error = self._read_conf()
        return ActualCni(found, observe_sysctls(sysctls), ActualConf(text, error, self._read_record()))

    def _read_conf(self) -> tuple[str | None, str | None]:
        try:
            return read_file(self._conf, MOST_CONF_BYTES).decode(), None
        except FileNotFoundError:
            return None, "does not exist; the CNI configuration must be put there (see the init container)"
        except UnicodeDecodeError as error:
            return None, f"not UTF-8 at byte {error.start}; the file is left as it is"
        except OSError as error:
            return None, f"cannot be read: {error.strerror}"

    def _read_record(self) -> tuple[IPNetwork, ...] | None:
        """The recorded ranges; None when there is no usable record for this file (then pod CIDRs count as ours)."""
        try:
            record = msgspec.json.decode(self._record.read_bytes(), type=Record)
            if record.version != RECORD_VERSION or record.conf != self._conf:
                return None
            return tuple(parse_network(text) for text in record.ranges)
        except (OSError, msgspec.MsgspecError, ValueError):
            return None

    def apply(self, plan: Plan) -> Applied:
        """Carry out the steps in order. A failed step stops only those that build on it."""
        failures: list[Failure] = []
        refused: dict[type[Step], str] = {}
        failed: set[type[Step]] = set()
        writes = 0
        for step in plan.steps:
            if self._must_wait(step, failed):
                failed.add(type(step))
                continue
            try:
                self._apply_step(step)
                writes += 1
            except (OSError, ModuleUnavailable) as error:
                failed.add(type(step))
                text = f"{step}: {getattr(error, 'strerror', None) or error}"
                if isinstance(step, SetBridgeMtu | LoadModule):
                    refused[type(step)] = text
                else:
                    failures.append(Failure(_phase(step), text))
        return Applied(writes, tuple(failures), refused.get(SetBridgeMtu), refused.get(LoadModule))

    @staticmethod
    def _must_wait(step: Step, failed: set[type[Step]]) -> bool:
        """Whether ``step`` builds on one that failed."""
        match step:
            case SetBridgeUp() | SetBridgeMtu():
                return CreateBridge in failed
            case WriteSysctl():
                return LoadModule in failed and not (Path("/proc/sys") / step.path).exists()
            case RecordRanges() | WriteConf() | RemoveGateway():
                # After a refused MTU another one goes into the file: the controller plans again.
                refused = SetBridgeMtu in failed and CreateBridge not in failed
                return refused or bool(failed & {RecordRanges, WriteConf, RemoveGateway})
            case _:
                return False

    def _apply_step(self, step: Step) -> None:
        match step:
            case CreateBridge(name):
                self._links.create_bridge(name)
            case SetBridgeUp(name):
                self._links.set_up(name)
            case SetBridgeMtu(name, mtu):
                self._links.set_mtu(name, mtu)
            case DeleteBridge(name):
                self._links.delete(name)
            case RemoveGateway(_, index, address):
                self._links.delete_address(index, address)
            case LoadModule(name):
                reason = load_module(name)
                if reason is not None:
                    raise ModuleUnavailable(reason.removeprefix(f"kernel module {name}: "))
            case WriteSysctl(path, value):
                write_sysctl(path, value)
            case RecordRanges(conf, ranges):
                self._record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                record = Record(version=RECORD_VERSION, conf=conf, ranges=tuple(map(str, ranges)))
                replace_file(str(self._record), msgspec.json.encode(record), 0o600)
            case WriteConf(path, text):
                replace_file(path, text.encode())


class ModuleUnavailable(Exception):
    """A kernel module that could not be loaded; the text says why."""


def _phase(step: Step) -> str:
    if isinstance(step, RecordRanges | WriteConf):
        return PHASE_FILE
    return PHASE_SYSCTL if isinstance(step, WriteSysctl | LoadModule) else PHASE_BRIDGE
