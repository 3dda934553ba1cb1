"""A kernel in memory: routes, sets and rules that obey the real one's rules, for tests without root.

It refuses what the kernel refuses, with the same errors: a gateway on no connected subnet, a second route in one place,
a route over a missing device, a rule that names a missing set, a set that a rule refers to. The overlay's devices,
ports and rules stand in `fake_overlay`. `tests/contract` holds it against the real kernel. It is
made of the drivers' interfaces, so a worker's code runs on it unaltered.
"""

from __future__ import annotations

import errno
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from kube_router.workers.kernel.ipset import SetError, SetFull, SetReferenced
from kube_router.workers.kernel.iptables import IptablesError, Programs
from kube_router.workers.kernel.netlink import NetlinkError
from kube_router.workers.kernel.routes import MAIN_TABLE, PROTOCOL, AppliedRoutes, RouteFailure, only_protocol
from kube_router.workers.model import Family
from kube_router.workers.routefacts import ActualRoutes, Prefix, Route, RoutePlan, Stray
from kube_router.workers.rulefacts import Members, RulePlan, RuleText, SetName, SetPlan, SetSpec

METRIC = {4: 0, 6: 1024}
CHAINS = {"filter": ("INPUT", "FORWARD", "OUTPUT"), "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING")}


@dataclass(frozen=True)
class TableEntry:
    """One route."""

    prefix: Prefix
    metric: int
    protocol: int
    gateway: str
    device: str = ""
    source: str = ""
    mtu: int = 0
    advmss: int = 0

    @property
    def route(self) -> Route:
        return Route(self.gateway, self.device, self.source, self.mtu, self.advmss)


@dataclass
class FakeKernel:
    """One network namespace: the main table, in which subnets of links stand too (protocol 2), and the overlay's.

    ``devices``: links that routes can lead through, by name, and whether each is up; ``addresses``: its own.
    """

    table: list[TableEntry] = field(default_factory=list)
    overlay_table: list[TableEntry] = field(default_factory=list)
    devices: dict[str, bool] = field(default_factory=dict)
    addresses: set[str] = field(default_factory=set)
    sets: dict[str, tuple[SetSpec, set[str]]] = field(default_factory=dict)
    chains: dict[tuple[Family, str, str], list[RuleText]] = field(default_factory=dict)

    def connect(self, subnet: str, address: str = "") -> None:
        """A link with an address of ``subnet`` is up."""
        metric = 0 if ipaddress.ip_network(subnet).version == 4 else 256
        self.table.append(TableEntry(Prefix(subnet), metric, 2, ""))
        self.addresses |= {address} if address else set()

    def drop(self, device: str, *, only_ipv4: bool = False) -> None:
        """Routes over ``device`` vanish, as they do when it goes or, those of IPv4, when it goes down."""
        for table in (self.table, self.overlay_table):
            table[:] = [entry for entry in table if entry.device != device or (only_ipv4 and ":" in entry.prefix)]

    def reachable(self, gateway: str) -> bool:
        """Whether a connected subnet holds ``gateway``."""
        address = ipaddress.ip_address(gateway)
        return any(entry.protocol == 2 and address in ipaddress.ip_network(entry.prefix) for entry in self.table)

    def chain(self, family: Family, table: str, chain: str) -> list[RuleText]:
        """The rules of a built-in chain; KeyError for one that does not exist."""
        if chain not in CHAINS[table]:
            raise KeyError(chain)
        return self.chains.setdefault((family, table, chain), [])

    def refers(self, name: str) -> bool:
        """Whether some rule names the set ``name``."""
        return any(f"--match-set {name} " in rule for rules in self.chains.values() for rule in rules)


class FakeRoutes:
    """`RouteDriver` on a `FakeKernel`; ``before`` is called before each single step."""

    def __init__(
        self,
        kernel: FakeKernel,
        table: int = MAIN_TABLE,
        ours: Callable[[Prefix, int, Route], bool] = only_protocol,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._kernel, self._ours, self._before = kernel, ours, before
        self._table = kernel.table if table == MAIN_TABLE else kernel.overlay_table
        self.writes = 0

    def close(self) -> None:
        """As the driver's."""

    def observe(self) -> ActualRoutes:
        ours: dict[Prefix, Route] = {}
        strays = []
        foreign = set()
        for entry in self._table:
            if not self._ours(entry.prefix, entry.protocol, entry.route):
                foreign.add(entry.prefix)
            elif entry.metric == METRIC[ipaddress.ip_network(entry.prefix).version] and entry.prefix not in ours:
                ours[entry.prefix] = entry.route
            else:
                strays.append(Stray(entry.prefix, entry.metric, entry.gateway))
        return ActualRoutes(ours, tuple(strays), frozenset(foreign))

    def apply(self, plan: RoutePlan) -> AppliedRoutes:
        self.writes += len(plan)
        failures: list[RouteFailure] = []
        added = removed = 0
        for step, steps in (("add", plan.add), ("replace", plan.replace)):
            for prefix, route in steps:
                self._before()
                number = self._write(prefix, route, exclusive=step == "add")
                if number:
                    failures.append(RouteFailure(step, prefix, route.way, NetlinkError(number)))
                else:
                    added += 1
        for stray in (*(Stray(prefix, 0, "") for prefix in plan.delete), *plan.strays):
            self._before()
            removed += self._remove(stray)
        return AppliedRoutes(added, removed, tuple(failures))

    def _write(self, prefix: Prefix, route: Route, *, exclusive: bool) -> int:
        """The kernel replaces the first route of the same destination and metric, whatever its protocol."""
        metric = METRIC[ipaddress.ip_network(prefix).version]
        places = [index for index, entry in enumerate(self._table) if (entry.prefix, entry.metric) == (prefix, metric)]
        number = self._refusal(prefix, route)
        if places and exclusive and (not number or ":" not in prefix):
            return errno.EEXIST
        if number:
            return number
        entry = TableEntry(prefix, metric, PROTOCOL, *route)
        if places:
            self._table[places[0]] = entry
        else:
            self._table.append(entry)
        return 0

    def _refusal(self, prefix: Prefix, route: Route) -> int:
        if route.source and route.source not in self._kernel.addresses:
            return errno.EINVAL
        if route.device:
            up = self._kernel.devices.get(route.device)
            return errno.ENODEV if up is None else 0 if up else errno.ENETDOWN
        if not self._kernel.reachable(route.gateway):
            return errno.ENETUNREACH if ":" not in prefix else errno.EHOSTUNREACH
        return 0

    def _remove(self, stray: Stray) -> int:
        metric = stray.metric or METRIC[ipaddress.ip_network(stray.prefix).version]
        for entry in self._table:
            same = (entry.prefix, entry.metric, entry.protocol) == (stray.prefix, metric, PROTOCOL)
            if same and stray.gateway in ("", entry.gateway):
                self._table.remove(entry)
                return 1
        return 0


class FakeSets:
    """`SetDriver` on a `FakeKernel`."""

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel
        self.writes = 0

    def _own(self, spec: SetSpec) -> set[str] | None:
        if spec.name not in self._kernel.sets:
            return None
        present, members = self._kernel.sets[spec.name]
        if (present.type, present.family) != (spec.type, spec.family):
            raise SetError(f"ipset {spec.name}: exists as {present.type}, but must be {spec.type}")
        return members

    def observe(self, spec: SetSpec) -> Members | None:
        members = self._own(spec)
        return None if members is None else spec.members(members)

    def count(self, spec: SetSpec) -> int | None:
        members = self._own(spec)
        return None if members is None else len(members)

    def names(self, ours: Callable[[str], bool]) -> frozenset[SetName]:
        return frozenset(SetName(name) for name in self._kernel.sets if ours(name))

    def apply(self, plan: SetPlan) -> None:
        if plan.create:
            if plan.spec.name in self._kernel.sets:
                raise SetError(f"ipset {plan.spec.name}: create: File exists")
            self._kernel.sets[plan.spec.name] = (plan.spec, set())
            self.writes += 1
        self.change(plan.spec, plan.add, plan.delete)

    def change(self, spec: SetSpec, add: Members, delete: Members) -> None:
        name = spec.name
        if not add and not delete:
            return
        if name not in self._kernel.sets:
            raise SetError(f"ipset {name}: {'add' if add else 'delete'}: No such file or directory")
        self.writes += bool(add) + bool(delete)
        present, members = self._kernel.sets[name]
        for member in add.texts():
            if len(members) >= present.max_members and member not in members:
                raise SetFull(f"ipset {name}: add: it is full")
            members.add(member)
        members.difference_update(delete.texts())

    def replace(self, spec: SetSpec, members: Members, spare: SetName) -> None:
        if spec.name not in self._kernel.sets:
            raise SetError(f"ipset {spec.name}: swap: No such file or directory")
        if len(members) > spec.max_members:
            raise SetFull(f"ipset {spare}: add: it is full")
        self.writes += 1
        self._kernel.sets[spec.name] = (spec, set(members.texts()))

    def destroy(self, spec: SetSpec) -> bool:
        return self._own(spec) is not None and self.remove(spec.name)

    def remove(self, name: SetName) -> bool:
        if name not in self._kernel.sets:
            return False
        if self._kernel.refers(name):
            raise SetReferenced(f"ipset {name}: destroy: something still refers to it")
        self.writes += 1
        del self._kernel.sets[name]
        return True


class FakeRules:
    """`RuleDriver` on a `FakeKernel`."""

    def __init__(self, kernel: FakeKernel, *, version: tuple[int, ...] = (1, 8, 9)) -> None:
        self._kernel = kernel
        self.programs = Programs("nft", "-nft", version)
        self.writes = 0

    def observe(self, family: Family, table: str, chain: str) -> tuple[RuleText, ...]:
        return tuple(self._kernel.chain(family, table, chain))

    def apply(self, plan: RulePlan) -> None:
        """All or nothing: works on copies and puts them in place at the end."""
        copies: dict[str, list[RuleText]] = {}
        for step in plan.steps:
            try:
                rules = copies.setdefault(step.chain, list(self._kernel.chain(plan.family, plan.table, step.chain)))
            except KeyError:
                raise IptablesError(f"restore: no chain {step.chain}") from None
            if step.verb != "delete":
                for name in re.findall(r"--match-set (\S+) ", step.rule):
                    if name not in self._kernel.sets:
                        raise IptablesError(f"restore: set {name} does not exist")
            if step.verb == "append":
                rules.append(step.rule)
            elif step.verb == "insert" and 1 <= step.position <= len(rules) + 1:
                rules.insert(step.position - 1, step.rule)
            elif step.verb == "delete" and step.rule in rules:
                rules.remove(step.rule)
            else:
                raise IptablesError(f"restore: {step} cannot be done")
        for chain, rules in copies.items():
            self._kernel.chain(plan.family, plan.table, chain)[:] = rules
        self.writes += len(plan.steps)
