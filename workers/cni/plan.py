"""The steps from what is to what is wanted, in the order in which they are safe.

Pure: `ActualCni` and `DesiredCni` in, `Plan` out: data that can be printed, counted and applied.

Order: the bridge before the file that names it; the record of what is ours before the file in which it stands, so that
a crash between the two never leaves a range that nobody owns; and forgotten only when nothing of it is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kube_router.workers.cni.desired import ActualBridge, ActualCni, ActualConf, DesiredCni, DesiredConf
from kube_router.workers.cni.names import BRIDGE, BRIDGE_MODULE, PHASE_BRIDGE, PHASE_FILE
from kube_router.workers.cni.netconf import NetconfError, RangeChange, edit, is_conflist
from kube_router.workers.linkfacts import IPInterface
from kube_router.workers.model import Failure, IPNetwork


@dataclass(frozen=True, slots=True)
class CreateBridge:
    """Add a plain bridge."""

    name: str

    def __str__(self) -> str:
        return f"create bridge {self.name}"


@dataclass(frozen=True, slots=True)
class SetBridgeUp:
    """Set the bridge administratively up."""

    name: str

    def __str__(self) -> str:
        return f"set {self.name} up"


@dataclass(frozen=True, slots=True)
class SetBridgeMtu:
    """Set the bridge's MTU in bytes."""

    name: str
    mtu: int

    def __str__(self) -> str:
        return f"set {self.name} mtu {self.mtu}"


@dataclass(frozen=True, slots=True)
class DeleteBridge:
    """Delete the bridge; only planned when it has no ports."""

    name: str

    def __str__(self) -> str:
        return f"delete bridge {self.name}"


@dataclass(frozen=True, slots=True)
class RemoveGateway:
    """Take the gateway of a range that is no longer ours off the bridge with ``index``.

    The bridge plugin put it there and never removes it. It must go: with another IPv4 address on the bridge the plugin
    refuses every new pod, and its connected route would swallow traffic to the node that has the CIDR now.
    """

    name: str
    index: int
    address: IPInterface

    def __str__(self) -> str:
        return f"remove gateway {self.address} from {self.name}"


@dataclass(frozen=True, slots=True)
class LoadModule:
    """Load a kernel module."""

    name: str

    def __str__(self) -> str:
        return f"load kernel module {self.name}"


@dataclass(frozen=True, slots=True)
class WriteSysctl:
    """Write a value to a path below /proc/sys."""

    path: str
    value: str

    def __str__(self) -> str:
        return f"set sysctl {self.path} to {self.value}"


@dataclass(frozen=True, slots=True)
class RecordRanges:
    """Write down which ranges in the configuration file at ``conf`` are ours."""

    conf: str
    ranges: tuple[IPNetwork, ...]

    def __str__(self) -> str:
        return f"record ranges of ours in {self.conf}: {', '.join(map(str, self.ranges)) or 'none'}"


@dataclass(frozen=True, slots=True)
class WriteConf:
    """Replace the configuration file's text."""

    path: str
    text: str
    summary: str

    def __str__(self) -> str:
        return f"write {self.path}: {self.summary}"


Step = (
    CreateBridge
    | SetBridgeUp
    | SetBridgeMtu
    | DeleteBridge
    | RemoveGateway
    | LoadModule
    | WriteSysctl
    | RecordRanges
    | WriteConf
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Ordered steps, and what could not be planned (``failures``) or should be known (``warnings``)."""

    steps: tuple[Step, ...] = ()
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([*map(str, self.steps), *map(str, self.failures), *self.warnings])


def diff(actual: ActualCni, desired: DesiredCni, *, load_modules: bool = True) -> Plan:
    """The plan from ``actual`` to ``desired``; empty when nothing is to be done.

    ``load_modules``: whether to try a missing kernel module (again). It forks, so it is not done at every event.
    """
    parts = [
        _plan_bridge(actual, desired),
        _plan_sysctls(actual, desired, load_modules),
        _plan_conf(actual.conf, desired.conf, actual.bridge),
    ]
    return Plan(
        steps=tuple(step for part in parts for step in part.steps),
        failures=(*desired.failures, *(failure for part in parts for failure in part.failures)),
        warnings=(*desired.warnings, *(warning for part in parts for warning in part.warnings)),
    )


def _plan_bridge(actual: ActualCni, desired: DesiredCni) -> Plan:
    bridge, wanted = actual.bridge, desired.bridge
    if wanted is None:
        return _plan_removal(bridge)
    if bridge is not None and bridge.kind != "bridge":
        text = f"link {BRIDGE}: is {bridge.kind or 'a plain device'}, not a bridge; rename or delete it"
        return Plan(failures=(Failure(PHASE_BRIDGE, text),))
    steps: list[Step] = []
    if bridge is None:
        steps.append(CreateBridge(BRIDGE))
    if bridge is None or not bridge.up:
        steps.append(SetBridgeUp(BRIDGE))
    # A new bridge has 1500; setting that again is nothing to the kernel, so it is always in the plan.
    if wanted.mtu is not None and (bridge is None or bridge.mtu != wanted.mtu):
        steps.append(SetBridgeMtu(BRIDGE, wanted.mtu))
    return Plan(steps=tuple(steps))


def _plan_removal(bridge: ActualBridge | None) -> Plan:
    if bridge is None or bridge.kind != "bridge":
        return Plan()
    if bridge.ports:
        return Plan(warnings=(f"link {BRIDGE}: has ports ({', '.join(bridge.ports)}), left in place",))
    return Plan(steps=(DeleteBridge(BRIDGE),))


def _plan_sysctls(actual: ActualCni, desired: DesiredCni, load_modules: bool) -> Plan:
    steps: list[Step] = []
    warnings = []
    for path, value in desired.sysctls.items():
        present = actual.sysctls.get(path)
        if present is not None:
            if present != value:
                steps.append(WriteSysctl(path, value))
        elif not path.startswith("net/bridge/"):
            warnings.append(f"sysctl {path}: not there, the kernel has no IPv6")
        elif load_modules:
            if LoadModule(BRIDGE_MODULE) not in steps:
                steps.append(LoadModule(BRIDGE_MODULE))
            steps.append(WriteSysctl(path, value))
        else:
            warnings.append(
                f"sysctl {path}: not there, kernel module {BRIDGE_MODULE} is not loaded; network policies do not see "
                "traffic between pods of this node"
            )
    if actual.bridge is not None and actual.bridge.ports:
        warnings += [
            f"sysctl {path}: is 0, pods on {BRIDGE} cannot be reached through this node"
            for path in desired.forwarding
            if actual.sysctls.get(path) == "0"
        ]
    return Plan(steps=tuple(steps), warnings=tuple(warnings))


def _plan_conf(actual: ActualConf | None, desired: DesiredConf | None, bridge: ActualBridge | None) -> Plan:
    if desired is None or actual is None:
        return Plan()
    if actual.text is None:
        return Plan(failures=(Failure(PHASE_FILE, f"{desired.path}: {actual.error or 'does not exist'}"),))
    claim = {*desired.ranges, *(desired.claimable if actual.recorded is None else actual.recorded)}
    change = RangeChange(desired.ranges, frozenset(claim), desired.mtu, desired.removable)
    try:
        edited = edit(actual.text, is_conflist(desired.path), change)
    except NetconfError as error:
        return Plan(failures=(Failure(PHASE_FILE, f"{desired.path}: {error}; the file is left as it is"),))
    steps: list[Step] = []
    recorded = actual.recorded
    if edited.text != actual.text:
        interim = _ordered(claim)
        if interim != recorded:
            steps.append(RecordRanges(desired.path, interim))
            recorded = interim
        summary = f"ranges {', '.join(map(str, edited.present)) or 'none'}; mtu {edited.mtu or 'not set'}"
        steps.append(WriteConf(desired.path, edited.text, summary))
    remembered = claim.intersection(edited.present)
    if desired.removable:
        steps += _plan_gateways(claim.difference(remembered, desired.ranges), bridge)
    else:  # what is recorded and not in the file may still have a gateway: not forgotten before that can be removed
        remembered.update(actual.recorded or ())
    final = _ordered(remembered)
    if final != recorded:
        steps.append(RecordRanges(desired.path, final))
    return Plan(steps=tuple(steps), warnings=tuple(f"{desired.path}: {warning}" for warning in edited.warnings))


def _plan_gateways(gone: set[IPNetwork], bridge: ActualBridge | None) -> list[RemoveGateway]:
    """The gateways of ranges that were ours; known by their prefix, whichever address in it was chosen."""
    addresses = () if bridge is None or bridge.kind != "bridge" else bridge.addresses
    return [RemoveGateway(BRIDGE, bridge.index, each) for each in addresses if bridge and each.network in gone]


def _ordered(networks: Iterable[IPNetwork]) -> tuple[IPNetwork, ...]:
    return tuple(
        sorted(networks, key=lambda network: (network.version, int(network.network_address), network.prefixlen))
    )
