"""The firewall's part of the loop with a backend that the test holds: what it is handed, and what is said of it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
from support.policyworld import BOTH, NODE, block, pod, pods, policy, port, rule, select

from kube_router.ipc.messages import (
    ContainerPort,
    Kind,
    Namespace,
    NetworkPolicy,
    Node,
    Pod,
    Projection,
    Service,
    ServicePort,
    SourceState,
)
from kube_router.ipc.replica import Changes, Cluster
from kube_router.workers.firewall.backend import BackendError, Synced
from kube_router.workers.firewall.cleanup import Removed
from kube_router.workers.firewall.controller import FirewallController, Kernel
from kube_router.workers.firewall.rules import Changed, Frame, Ruleset
from kube_router.workers.model import Failure, Outcome
from kube_router.workers.runtime import Trigger
from kube_router.workers.settings import Settings

SETTINGS = Settings(node_name=NODE, enable_ipv6=True, iptables_sync_period=100.0)
IN_SYNC = SourceState(source="test", in_sync=True)
STALE = SourceState(source="test", stale=True)
KINDS: tuple[Kind, ...] = FirewallController.kinds
LOCKED = Failure("iptables", "iptables-restore: another program holds the xtables lock")


@dataclass
class Clock:
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_700_000_000.0 + self.now


@dataclass
class Sync:
    """One call of the backend, with what stood then."""

    policies: set[str]
    changed: Changed
    frame: Frame
    observe: bool
    hold: bool


@dataclass
class FakeBackend:
    """Answers what the test has put into ``answers``, else success."""

    clock: Clock
    name: str = "iptables"
    answers: deque[Synced | Exception] = field(default_factory=deque)
    syncs: list[Sync] = field(default_factory=list)
    closed: bool = False
    seconds: float = 0.0

    def sync(self, ruleset: Ruleset, changed: Changed, frame: Frame, *, observe: bool, hold: bool) -> Synced:
        self.syncs.append(Sync(set(ruleset.policies), changed, frame, observe, hold))
        self.clock.now += self.seconds
        answer = self.answers.popleft() if self.answers else Synced()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def plan(self, ruleset: Ruleset, frame: Frame) -> tuple[str, ...]:
        return ()

    def wakers(self) -> Mapping[int, Callable[[], bool]]:
        return {7: lambda: True}

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeLeftovers:
    answers: deque[Removed] = field(default_factory=deque)
    calls: int = 0

    def remove(self) -> Removed:
        self.calls += 1
        return self.answers.popleft() if self.answers else Removed()


@dataclass
class FakeRecheck:
    noted: list[Changed] = field(default_factory=list)
    cuts: int = 0
    outcome: Outcome = field(default_factory=Outcome)
    closed: bool = False

    def note(self, ruleset: Ruleset, changed: Changed) -> None:
        self.noted.append(changed)

    def cut(self, ruleset: Ruleset, frame: Frame) -> Outcome:
        self.cuts += 1
        return self.outcome

    def close(self) -> None:
        self.closed = True


class Bench:
    """A controller, its fakes, and the cluster that it is shown."""

    def __init__(self, settings: Settings = SETTINGS, *, recheck: bool = False) -> None:
        self.clock = Clock()
        self.backend, self.leftovers = FakeBackend(self.clock), FakeLeftovers()
        self.recheck = FakeRecheck() if recheck else None
        self.refusals: deque[BackendError] = deque()
        self.controller = FirewallController(settings, self.reach, self.clock)
        self.objects: dict[Kind, dict[str, Projection]] = {kind: {} for kind in KINDS}
        self.pending: Changes = {}
        self.state = IN_SYNC
        self.started = False

    def reach(self) -> Kernel:
        if self.refusals:
            raise self.refusals.popleft()
        return Kernel(self.backend, self.leftovers, self.recheck)

    def put(self, *objects: Node | Pod | Namespace | NetworkPolicy | Service) -> None:
        for item in objects:
            self._set(_kind(item), item.key, item)

    def remove(self, item: Node | Pod | Namespace | NetworkPolicy | Service) -> None:
        self._set(_kind(item), item.key, None)

    def _set(self, kind: Kind, key: str, new: Projection | None) -> None:
        old = self.objects[kind].pop(key, None)
        if new is not None:
            self.objects[kind][key] = new
        first = self.pending.get(kind, {}).get(key, (old, None))[0]
        self.pending.setdefault(kind, {})[key] = (first, new)

    def reconcile(self, **trigger: bool) -> Outcome:
        """One turn as the loop does it: changes are delivered again after a failure."""
        if not self.started:
            trigger["start"] = True
        cluster = Cluster(self.state, {kind: dict(table) for kind, table in self.objects.items()})
        seen = self.clock.now - 0.004 if self.pending else None
        outcome = self.controller.reconcile(cluster, Trigger(changes=self.pending, seen=seen, **trigger))
        self.started = True
        if not outcome.failures:
            self.pending = {}
        return outcome

    @property
    def last(self) -> Sync:
        return self.backend.syncs[-1]


def _kind(item: Projection) -> Kind:
    kinds: dict[type, Kind] = {
        Node: "nodes", Pod: "pods", Namespace: "namespaces", NetworkPolicy: "networkpolicies", Service: "services",
    }  # fmt: skip
    return kinds[type(item)]


def bench(*, recheck: bool = False, settings: Settings = SETTINGS) -> Bench:
    """Started: a node, a local and a remote pod, and a policy about the local one."""
    made = Bench(settings, recheck=recheck)
    made.put(
        Node(name=NODE, pod_cidrs=("10.0.0.0/24",)),
        Namespace(name="x", labels={"name": "x"}),
        pod("x/web", 1, app="web"),
        pod("x/client", 2, "n2", app="client"),
        policy("x/in", select(app="web"), ingress=[rule(ports=[port(80)])]),
    )
    outcome = made.reconcile()
    assert outcome.failures == () and outcome.warnings == ()
    return made


def test_the_first_call_observes_and_looks_at_everything() -> None:
    made = bench()
    assert made.last.observe and not made.last.hold
    assert made.last.changed.everything
    assert made.last.policies == {"x/in"}
    assert made.last.frame.families == BOTH


def test_a_change_is_handed_on_as_it_is_without_a_look_at_the_kernel() -> None:
    made = bench()
    made.put(policy("x/out", select(app="web"), egress=[]))
    made.reconcile()
    assert not made.last.observe
    assert made.last.changed == Changed(policies={"x/out"}, pods={"x/web"})
    made.put(pod("x/other", 3, app="other"))
    made.reconcile()
    assert made.last.changed == Changed(pods={"x/other"})


def test_members_alone_are_the_fast_lane() -> None:
    made = bench()
    made.put(policy("x/in", select(app="web"), ingress=[rule(pods(app="client"), ports=[port(80)])]))
    made.reconcile()
    made.put(pod("x/client", 2, "n2", app="other"))
    made.reconcile()
    assert made.last.changed.only_members
    [by_family] = made.last.changed.removed.values()
    assert {member for members in by_family.values() for member in members} == {"10.0.0.2", "fd00::2"}


def test_what_failed_is_handed_over_again_with_what_came_since() -> None:
    made = bench()
    made.backend.answers.append(Synced(failures=(LOCKED,)))
    made.put(policy("x/out", select(app="web"), egress=[]))
    assert made.reconcile().failures == (LOCKED,)
    made.put(pod("x/other", 3, app="other"))
    assert made.reconcile().failures == ()
    assert made.last.changed == Changed(policies={"x/out"}, pods={"x/web", "x/other"})
    assert not made.last.observe
    made.reconcile()
    assert not made.last.changed


def test_a_retry_observes() -> None:
    made = bench()
    made.backend.answers.append(Synced(failures=(LOCKED,)))
    made.put(pod("x/other", 3))
    made.reconcile()
    made.reconcile(retry=True)
    assert made.last.observe
    assert made.last.changed == Changed(pods={"x/other"})


def test_after_an_exception_nothing_is_believed() -> None:
    made = bench()
    made.backend.answers.append(RuntimeError("a bug"))
    made.put(pod("x/other", 3))
    with pytest.raises(RuntimeError):
        made.reconcile()
    made.reconcile()
    assert made.last.changed.everything and made.last.observe
    made.reconcile()
    assert not made.last.changed and not made.last.observe


def test_a_policy_that_fails_alone_is_tried_again_and_leaves_the_worker_healthy() -> None:
    made = bench()
    made.backend.answers.append(Synced(failed={"x/in": "ipset KUBE-SRC-X: it is full"}))
    made.put(pod("x/other", 3))
    made.clock.now += 50
    outcome = made.reconcile()
    assert outcome.failures == (Failure("policy", "x/in: ipset KUBE-SRC-X: it is full"),)
    assert outcome.counts["policy_failed"] == 1
    assert outcome.components[0].last_success == made.clock.time()
    [notice] = outcome.notices
    assert (notice.kind, notice.namespace, notice.name, notice.uid) == ("NetworkPolicy", "x", "in", "uid-x/in")
    assert (notice.reason, notice.type) == ("NetworkPolicyNotProgrammed", "Warning")
    assert notice.text == "node n1: ipset KUBE-SRC-X: it is full"
    made.reconcile()
    assert made.last.changed == Changed(policies={"x/in"})
    assert made.reconcile().failures == ()
    assert not made.last.changed


def test_other_failures_age_the_health_component() -> None:
    made = bench()
    [component] = made.reconcile().components
    assert (component.name, component.period) == ("NetworkPolicyController", 100.0)
    succeeded = component.last_success
    made.clock.now += 50
    made.backend.answers.append(Synced(failures=(LOCKED,)))
    assert made.reconcile().components[0].last_success == succeeded


def test_a_stale_state_is_held_and_confirmed_by_a_look_at_the_kernel() -> None:
    made = Bench()
    made.state = STALE
    made.put(Node(name=NODE), pod("x/web", 1), policy("x/in", ingress=[]))
    made.reconcile()
    assert made.last.hold
    assert made.leftovers.calls == 0
    made.put(pod("x/other", 3))
    made.reconcile()
    assert made.last.hold and not made.last.observe
    made.state = IN_SYNC
    made.reconcile(confirmed=True)
    assert not made.last.hold and made.last.observe
    assert made.leftovers.calls == 1


def test_foreign_changes_are_repaired_told_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    made = bench()
    made.backend.answers.append(Synced(writes=3, repaired=("chain KUBE-ROUTER-INPUT: was empty", "jump of FORWARD")))
    with caplog.at_level(logging.WARNING):
        outcome = made.reconcile(woken=True)
    assert made.last.observe
    assert (outcome.writes, outcome.counters["policy_drift_repairs"]) == (3, 2)
    assert [record.message for record in caplog.records] == [
        "repaired: chain KUBE-ROUTER-INPUT: was empty",
        "repaired: jump of FORWARD",
    ]
    assert list(made.controller.wakers()) == [7]


def test_the_background_check_comes_though_changes_never_cease() -> None:
    """The loop's own period would begin anew with each of them."""
    made = bench()
    looks = 0
    for number in range(30):
        made.clock.now += 10
        made.put(pod("x/other", 3 + number % 2))
        outcome = made.reconcile()
        looks += made.last.observe
        assert outcome.retry_after is not None and outcome.retry_after <= 100
    assert looks == 3


def test_latency_is_measured_from_the_first_change_to_the_kernels_word() -> None:
    made = bench()
    made.backend.seconds = 0.006
    made.put(pod("x/other", 3))
    outcome = made.reconcile()
    assert outcome.observations["policy_enforcement_latency_seconds"] == pytest.approx((0.010,))
    assert outcome.observations["controller_iptables_sync_time"] == pytest.approx((0.006,))
    made.put(Namespace(name="nobody"))
    assert "policy_enforcement_latency_seconds" not in made.reconcile().observations, "it concerned nothing"
    made.put(pod("x/other", 4))
    made.backend.answers.append(Synced(failures=(LOCKED,)))
    assert "policy_enforcement_latency_seconds" not in made.reconcile().observations


def test_metrics_of_the_backend_and_counts_of_what_stands() -> None:
    made = bench()
    made.backend.answers.append(
        Synced(counts={"controller_policy_chains": 9}, observations={"controller_iptables_v4_restore_time": (0.02,)})
    )
    made.put(pod("x/free", 5, app="free"))
    outcome = made.reconcile()
    assert outcome.counts == {
        "controller_policy_chains": 9,
        "policy_enforced": 1,
        "policy_failed": 0,
        "policy_local_pods": 2,
        "policy_isolated_pods": 1,
        "policy_sets": 0,
    }
    assert outcome.observations["controller_iptables_v4_restore_time"] == (0.02,)


def test_bad_policies_are_warnings_everywhere_and_events_where_they_count() -> None:
    made = bench()
    made.put(
        policy("x/bad", select(app="web"), ingress=[rule(block("10.0.0.0/99"))]),
        policy("x/elsewhere", select(app="client"), ingress=[rule(block("10.0.0.0/98"))]),
    )
    outcome = made.reconcile()
    assert outcome.failures == ()
    assert ["/99" in line or "/98" in line for line in outcome.warnings] == [True, True]
    [notice] = outcome.notices
    assert (notice.name, notice.uid, notice.reason) == ("bad", "uid-x/bad", "InvalidNetworkPolicy")
    assert notice.text in outcome.warnings
    made.put(policy("x/bad", select(app="web"), ingress=[]), policy("x/elsewhere", select(app="client"), ingress=[]))
    outcome = made.reconcile()
    assert (outcome.warnings, outcome.notices) == ((), ())


def test_default_deny_without_pod_cidrs_is_a_warning_and_the_node_is_followed_live() -> None:
    made = bench(settings=Settings(node_name=NODE, netpol_default_deny=True))
    made.put(Node(name=NODE))
    outcome = made.reconcile()
    assert outcome.failures == ()
    [warning] = outcome.warnings
    assert "has no IPv4 pod CIDR" in warning
    assert made.last.frame.pod_cidrs == ()
    made.put(Node(name=NODE, pod_cidrs=("10.7.0.0/24",)))
    assert made.reconcile().warnings == ()
    assert str(made.last.frame.pod_cidrs[0]) == "10.7.0.0/24"


def test_node_ports_come_from_services_alone() -> None:
    made = bench()
    service = Service(name="web", namespace="x", type="NodePort", ports=(ServicePort(port=80, node_port=30080),))
    made.put(service)
    made.reconcile()
    assert made.last.frame.node_ports == {("tcp", 30080)}
    assert not made.last.changed
    made.remove(service)
    made.reconcile()
    assert made.last.frame.node_ports == frozenset()


def test_leftovers_go_once_after_a_sync_without_failures() -> None:
    made = Bench()
    made.put(Node(name=NODE), pod("x/web", 1), policy("x/in", ingress=[]))
    made.backend.answers += [Synced(failures=(LOCKED,)), Synced(failed={"x/in": "refused"})]
    made.reconcile()
    made.reconcile(retry=True)
    assert made.leftovers.calls == 0
    busy = Failure("ipset", "ipset kube-router-local-pods: destroy: something still refers to it")
    made.leftovers.answers.append(Removed((busy,)))
    assert made.reconcile(retry=True).failures == (busy,)
    kept = "iptables-legacy: chain KUBE-NWPLCY-TAIL stays"
    made.leftovers.answers.append(Removed(kept=(kept,)))
    outcome = made.reconcile(retry=True)
    assert (outcome.failures, outcome.warnings) == ((), (kept,))
    assert made.reconcile().warnings == (kept,)
    assert made.leftovers.calls == 2


def test_a_backend_that_cannot_be_made_is_tried_again() -> None:
    made = Bench()
    made.refusals.append(BackendError("iptables: no such program on PATH"))
    made.put(Node(name=NODE), pod("x/web", 1), policy("x/in", ingress=[]))
    outcome = made.reconcile()
    assert outcome.failures == (Failure("backend", "iptables: no such program on PATH"),)
    assert outcome.components[0].last_success is None
    assert made.controller.wakers() == {}
    made.controller.close()
    assert made.reconcile(retry=True).failures == ()
    assert made.last.changed.everything and made.last.observe
    made.controller.close()
    assert made.backend.closed


def test_open_connections_are_rechecked_after_a_good_sync_and_never_on_a_stale_word() -> None:
    made = bench(recheck=True)
    assert made.recheck is not None
    assert (len(made.recheck.noted), made.recheck.cuts) == (1, 1)
    made.backend.answers.append(Synced(failures=(LOCKED,)))
    made.put(policy("x/out", select(app="web"), egress=[]))
    made.reconcile()
    assert (len(made.recheck.noted), made.recheck.cuts) == (2, 1), "the old rules still stand"
    made.recheck.outcome = Outcome(writes=2, counters={"policy_connections_cut": 2.0})
    outcome = made.reconcile(retry=True)
    assert (outcome.writes, outcome.counters["policy_connections_cut"]) == (2, 2)
    assert made.recheck.noted[-1].policies == {"x/out"}
    made.state = STALE
    made.reconcile()
    assert made.recheck.cuts == 2
    made.controller.close()
    assert made.recheck.closed


def test_a_failed_recheck_is_a_failure_of_its_own() -> None:
    made = bench(recheck=True)
    assert made.recheck is not None
    trouble = Failure("conntrack", "open connections cannot be rechecked: refused")
    made.recheck.outcome = Outcome(failures=(trouble,))
    outcome = made.reconcile()
    assert outcome.failures == (trouble,)
    assert outcome.components[0].last_success == made.clock.time()


def test_a_named_port_that_nobody_has_is_told_until_somebody_has_it() -> None:
    made = bench()
    made.put(
        policy(
            "x/names",
            select(app="web"),
            ingress=[rule(pods(app="client"), ports=[port("http"), port("http"), port(80)])],
            egress=[rule(pods(app="client"), ports=[port("dns", protocol="UDP")])],
        )
    )
    outcome = made.reconcile()
    inside = "networkpolicy x/names: spec.ingress[0].ports: no pod of this node that it selects has a TCP port named"
    outside = "networkpolicy x/names: spec.egress[0].ports: no peer has a UDP port named 'dns'; it allows nothing"
    assert outcome.warnings == (f"{inside} 'http'; it allows nothing", outside)
    assert [(notice.reason, notice.name, notice.text) for notice in outcome.notices] == [
        ("UnresolvedNamedPort", "names", f"{inside} 'http'; it allows nothing"),
        ("UnresolvedNamedPort", "names", outside),
    ]
    made.put(pod("x/dns", 9, "n2", app="client", ports=[ContainerPort("dns", 53, "UDP")]))
    assert made.reconcile().warnings == (f"{inside} 'http'; it allows nothing",)
    made.put(pod("x/web", 1, app="web", ports={"http": 8080}))
    assert made.reconcile().warnings == ()
    made.remove(pod("x/dns", 9, "n2"))
    assert made.reconcile().warnings == (outside,)
    made.remove(policy("x/names"))
    outcome = made.reconcile()
    assert outcome.warnings == () and outcome.notices == ()
