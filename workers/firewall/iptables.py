"""The iptables backend: ipsets by netlink, chains by one restore a family; see `chains.py` for the layout.

Touches the kernel, through the drivers only. The order of a sync keeps traffic as it was or closed after each step:

1. sets are made and filled: no rule names them yet, or they gain members that their policies ask for;
2. the set of local pods, which leads packets into the chains (with default-deny, lets them live): gone ones go;
3. chains, jumps and removals of chains: one transaction a family;
4. the set of local pods: new ones come;
5. members go, then sets that no rule names any more.

Step 4 comes before step 3 while the tail in the kernel refuses nobody for not being in that set: then new pods open
nothing, and when the chains begin to ask for the set (at the first sync, or after Go kube-router) it is full.

A change of members alone is steps 1 and 5 for the sets that it concerns; it forks nothing and lists nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kube_router.workers.firewall.backend import BackendError, Synced
from kube_router.workers.firewall.chainsync import ChainResult, ChainSync
from kube_router.workers.firewall.familychains import Wanted
from kube_router.workers.firewall.iptableswatch import IptablesWatch
from kube_router.workers.firewall.rules import Changed, Direction, Frame, Ruleset, SetKey
from kube_router.workers.firewall.setsync import SetResult, SetSync, local_pods, local_pods_spec, node_port_specs
from kube_router.workers.kernel.chains import ChainDriver
from kube_router.workers.kernel.ipset import SetDriver
from kube_router.workers.kernel.iptables import IptablesError
from kube_router.workers.model import Failure, Family
from kube_router.workers.rulefacts import SetSpec


@dataclass(slots=True)
class _Sync:
    """One sync at work: what it was asked, and what it came to."""

    ruleset: Ruleset
    changed: Changed
    frame: Frame
    observe: bool
    hold: bool
    new_frame: bool
    sets: SetResult = field(default_factory=SetResult)
    chains: ChainResult = field(default_factory=ChainResult)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def everything(self) -> bool:
        return self.observe or self.changed.everything

    @property
    def pods(self) -> bool:
        """Whether the set of local pods may differ."""
        return self.everything or bool(self.changed.pods)


class Iptables:
    """A `Backend`."""

    name = "iptables"

    def __init__(
        self,
        *,
        chains: ChainDriver | None = None,
        sets: SetDriver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``chains``, ``sets``: drivers other than the host's. Raises `BackendError` without programs or netlink."""
        self._clock = clock
        with contextlib.ExitStack() as opened:
            try:
                self._chain_driver = chains or ChainDriver()
                self._set_driver = sets or SetDriver()
                opened.callback(self._set_driver.close)
                self._watch = IptablesWatch(self._chain_driver, self._sets_differ)
            except IptablesError as error:
                raise BackendError(str(error)) from error
            except OSError as error:
                raise BackendError(f"iptables: {error.strerror or error}") from error
            opened.pop_all()
        self._sets = SetSync(self._set_driver, ())
        self._chains = ChainSync(self._chain_driver, (), clock)
        self._frame: Frame | None = None
        self._held = False
        self._settled_at: int | None = None
        """The watch's generation at which all rules were as they should be; no rule is read again while it is that."""

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        """Listeners for what others do to our rules, and a tick for what the kernel tells nothing of."""
        return self._watch.wakers()

    def close(self) -> None:
        """Release the sockets; the kernel keeps everything."""
        self._watch.close()
        self._set_driver.close()

    def _sets_differ(self) -> bool:
        return self._sets.differs()

    def sync(self, ruleset: Ruleset, changed: Changed, frame: Frame, *, observe: bool, hold: bool) -> Synced:
        """See `Backend.sync`."""
        began = self._clock()
        if self._frame is None or frame.families != self._frame.families:
            self._sets = SetSync(self._set_driver, frame.families)
            self._chains = ChainSync(self._chain_driver, frame.families, self._clock)
            self._watch.families = frame.families
            observe = True
        # What a hold left undone is in no later change: it is found by looking.
        observe = observe or (self._held and not hold)
        sync = _Sync(ruleset, changed, frame, observe, hold, frame != self._frame)
        self._frame, self._held = frame, hold
        failed = set(self._sets.failed), set(self._sets.failed_fixed)
        self._add_to_sets(sync)
        others = failed != (set(self._sets.failed), set(self._sets.failed_fixed))
        if not (changed.only_members and not observe and not sync.new_frame and not others):
            self._write_chains(sync, everything=changed.everything or sync.new_frame or others)
        self._take_from_sets(sync)
        sync.seconds["controller_iptables_sync_time"] = self._clock() - began
        return self._report(sync)

    # ------------------------------------------------------------------------------------------------- steps

    def _add_to_sets(self, sync: _Sync) -> None:
        for family in sync.frame.families:
            began = self._clock()
            self._sets.add(sync.ruleset, sync.changed, family, everything=sync.everything, result=sync.sets)
            sync.seconds[f"controller_policy_ipset_v{family.value}_restore_time"] = self._clock() - began
        if sync.observe or sync.new_frame:
            for spec, ports in _node_ports(sync.frame).items():
                self._sets.fix(spec, ports, observe=sync.observe, add=True, delete=False, result=sync.sets)

    def _write_chains(self, sync: _Sync, *, everything: bool) -> None:
        began = self._clock()
        wanted = self._wanted(sync.ruleset, sync.frame)
        generation = self._watch.generation()
        untouched = generation is not None and generation == self._settled_at
        observe = sync.observe and not untouched
        with contextlib.suppress(OSError):
            if observe:
                self._watch.reading()
        plans = self._chains.prepare(
            wanted, sync.changed, observe=observe, everything=everything, hold=sync.hold, result=sync.chains
        )
        for family in list(plans):
            add = not self._chains.of[family].gated
            if not self._local_pods(sync, family, observe=sync.observe, add=add):
                spec = local_pods_spec(family)
                self._chains.withhold(family, f"no rules without a set: {self._sets.failed_fixed[spec.name]}")
                del plans[family]
        with self._watch.writing():
            self._chains.write(plans, sync.chains)
        settled = (observe or untouched) and self._chains.settled and not any(plans.values()) and not sync.hold
        # The number was asked for before the rules were read: who came in between has made it another.
        self._settled_at = generation if settled else None
        sync.seconds["controller_policy_chains_sync_time"] = self._clock() - began

    def _local_pods(self, sync: _Sync, family: Family, *, observe: bool, add: bool) -> bool:
        """Bring the set of local pods up to date; ``add``: not only by removals. Whether that went well."""
        if not sync.pods:
            return True
        spec, desired = local_pods_spec(family), local_pods(sync.ruleset, family)
        return self._sets.fix(spec, desired, observe=observe, add=add, delete=not sync.hold, result=sync.sets)

    def _take_from_sets(self, sync: _Sync) -> None:
        for family in sync.chains.done:
            self._local_pods(sync, family, observe=False, add=True)
        if sync.observe or sync.new_frame:
            for spec, ports in _node_ports(sync.frame).items():
                self._sets.fix(spec, ports, observe=False, add=True, delete=not sync.hold, result=sync.sets)
        self._sets.remove(sync.changed, hold=sync.hold, result=sync.sets)
        if not sync.hold:
            self._sets.destroy(observe=sync.observe, result=sync.sets)

    def _wanted(self, ruleset: Ruleset, frame: Frame) -> Wanted:
        return Wanted(ruleset, frame, self._sets.failed, self._sets.failed_fixed, self._sets.name)

    # ------------------------------------------------------------------------------------------------ reports

    def _report(self, sync: _Sync) -> Synced:
        self._chains.tell(sync.ruleset, sync.chains)
        self._tell_without_sets(sync)
        failures = [*sync.sets.failures, *sync.chains.failures]
        failures += [Failure("ipset", why) for why in self._sets.failed_fixed.values()]
        self._sets.again = bool(failures)  # all of the change will be told once more
        seconds = sync.chains.seconds | sync.seconds
        return Synced(
            writes=sync.sets.writes + sync.chains.writes,
            failures=tuple(dict.fromkeys(failures)),
            failed=sync.chains.failed,
            repaired=(*sync.sets.repaired, *sync.chains.repaired),
            warnings=(*self._chain_driver.programs.warnings, *sync.sets.warnings, *sync.chains.warnings),
            counts={
                "controller_policy_chains": self._chains.standing,
                "controller_policy_ipsets": self._sets.standing,
            },
            observations={name: (value,) for name, value in seconds.items()},
        )

    def _tell_without_sets(self, sync: _Sync) -> None:
        """Name the policies that lack a set, and why."""
        if not self._sets.failed:
            return
        reasons: dict[SetKey, list[str]] = {}
        for (key, _), why in self._sets.failed.items():
            reasons.setdefault(key, []).append(why)
        for name, policy in sync.ruleset.policies.items():
            clauses = (clause for direction in Direction for clause in policy.clauses(direction) or ())
            lacking = {why for clause in clauses for key in clause.sets for why in reasons.get(key, ())}
            for why in sorted(lacking):
                sync.chains.fail(name, f"the clauses of a set allow nothing: {why}")

    def plan(self, ruleset: Ruleset, frame: Frame) -> tuple[str, ...]:
        """See `Backend.plan`."""
        sets = SetSync(self._set_driver, frame.families)
        fixed = {spec: frozenset(ports) for spec, ports in _node_ports(frame).items()}
        fixed |= {local_pods_spec(family): local_pods(ruleset, family) for family in frame.families}
        chains = ChainSync(self._chain_driver, frame.families, self._clock)
        return (*sets.plan(ruleset, fixed), *chains.plan(self._wanted(ruleset, frame)))


def _node_ports(frame: Frame) -> dict[SetSpec, frozenset[str]]:
    """The sets of node ports and what belongs in them."""
    return {
        spec: frozenset(str(port) for name, port in frame.node_ports if name == protocol)
        for protocol, spec in node_port_specs().items()
    }
