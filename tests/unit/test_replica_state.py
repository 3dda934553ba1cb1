"""The replica's logic, case by case: what it asks for, what it shows, what it refuses."""

from __future__ import annotations

import msgspec
import pytest

from kube_router.ipc.messages import (
    KINDS,
    Beacon,
    Delta,
    Key,
    Kind,
    KindSnapshot,
    Node,
    Pod,
    Projection,
    Snapshot,
    SourceState,
)
from kube_router.ipc.replica import HELD_DELTAS, Cluster, ReplicaState

IN_SYNC = SourceState(source="api", in_sync=True)
STALE = SourceState(source="api", stale=True)
LISTING = SourceState(source="api")


def node(name: str, version: int = 0) -> Node:
    return Node(name=name, provider_id=str(version))


def pod(name: str, version: int = 0) -> Pod:
    return Pod(name=name, namespace="x", phase=str(version))


def snapshot(
    *nodes: Node, pods: tuple[Pod, ...] = (), epoch: str = "1", seq: int = 0, state: SourceState = IN_SYNC
) -> Snapshot:
    parts: tuple[tuple[Kind, tuple[Projection, ...]], ...] = (("nodes", nodes), ("pods", pods))
    kinds = tuple(KindSnapshot(kind=kind, seq=seq, objects=objects) for kind, objects in parts)
    return Snapshot(epoch=epoch, state=state, kinds=kinds)


def delta(seq: int, *put: Node, gone: tuple[Key, ...] = (), epoch: str = "1") -> Delta:
    return Delta(epoch=epoch, kind="nodes", seq=seq, put=put, gone=gone)


def beacon(seq: int, *, epoch: str = "1", state: SourceState = IN_SYNC, pods: int = 0) -> Beacon:
    seqs = dict.fromkeys(KINDS, 0)
    return Beacon(epoch=epoch, seqs={**seqs, "nodes": seq, "pods": pods}, state=state)


def replica_with(*nodes: Node, seq: int = 0, state: SourceState = IN_SYNC) -> ReplicaState:
    replica = ReplicaState("w", ("nodes", "pods"))
    assert replica.on_snapshot(snapshot(*nodes, seq=seq, state=state)) is None
    replica.take_changes()
    return replica


def names(replica: ReplicaState) -> dict[str, str]:
    return {name: item.provider_id for name, item in replica.cluster.nodes.items()}


# asking


def test_asks_at_once_then_at_doubling_intervals_up_to_two_seconds() -> None:
    replica = ReplicaState("w", ("nodes", "pods"))
    asked = [step / 100 for step in range(1000) if replica.request_due(step / 100) is not None]
    assert asked == pytest.approx([0.0, 0.25, 0.75, 1.75, 3.75, 5.75, 7.75, 9.75])


def test_asks_for_its_kinds_by_name() -> None:
    request = ReplicaState("router", ("nodes", "pods", "nodes")).request_due(0.0)
    assert request is not None
    assert (request.worker, request.kinds) == ("router", ("nodes", "pods"))


def test_wait_tells_when_to_ask_again() -> None:
    replica = ReplicaState("w", ("nodes", "pods"))
    assert replica.wait(5.0) == 0.0
    replica.request_due(5.0)
    assert replica.wait(5.1) == pytest.approx(0.15)
    replica.on_snapshot(snapshot())
    assert replica.wait(5.1) == float("inf")


def test_gaps_without_end_are_asked_about_less_and_less_often() -> None:
    replica = replica_with()
    asked = []
    for step in range(3000):
        now = step / 100
        replica.on_delta(delta(1000 + 2 * step))
        if replica.request_due(now):
            asked.append(now)
            replica.on_snapshot(snapshot(seq=1000 + 2 * step))
    assert len(asked) < 20
    assert replica.wait(100.0) == float("inf") or replica.request_due(100.0) is not None


def test_after_quiet_times_a_gap_is_asked_about_quickly_again() -> None:
    replica = replica_with()
    replica.on_delta(delta(5))
    for now in (0.0, 0.25, 0.75):
        assert replica.request_due(now) is not None
    replica.on_snapshot(snapshot(seq=5))
    replica.on_delta(delta(9))
    assert replica.request_due(100.0) is not None
    assert replica.request_due(100.25) is not None


# following


def test_a_delta_changes_what_is_shown() -> None:
    replica = replica_with(node("a"), node("b"))
    replica.on_delta(delta(1, node("a", 1), node("c"), gone=("b",)))
    assert names(replica) == {"a": "1", "c": "0"}
    assert replica.take_changes() == {
        "nodes": {"a": (node("a"), node("a", 1)), "b": (node("b"), None), "c": (None, node("c"))}
    }
    assert replica.take_changes() == {}


def test_a_delta_of_a_kind_that_was_not_asked_for_is_ignored() -> None:
    replica = replica_with()
    replica.on_delta(Delta(epoch="1", kind="services", seq=77))
    assert replica.request_due(0.0) is None


def test_an_old_delta_is_ignored() -> None:
    replica = replica_with(node("a", 5), seq=5)
    replica.on_delta(delta(5, node("a", 4)))
    assert names(replica) == {"a": "5"}
    assert replica.request_due(0.0) is None


def test_a_gap_asks_and_goes_on_showing_the_old() -> None:
    replica = replica_with(node("a"))
    replica.on_delta(delta(2, node("a", 2)))
    assert replica.request_due(0.0) is not None
    assert names(replica) == {"a": "0"}
    assert replica.usable


def test_deltas_that_come_while_waiting_are_applied_after_the_snapshot() -> None:
    replica = replica_with(node("a"))
    for seq in (2, 3, 4):
        replica.on_delta(delta(seq, node("a", seq)))
    replica.on_snapshot(snapshot(node("a", 3), seq=3))
    assert names(replica) == {"a": "4"}
    assert replica.take_changes() == {"nodes": {"a": (node("a"), node("a", 4))}}
    assert replica.request_due(10.0) is None


def test_held_deltas_are_bounded_and_their_loss_is_noticed() -> None:
    replica = replica_with()
    for seq in range(2, HELD_DELTAS + 100):
        replica.on_delta(delta(seq))
    assert len(replica._held) == HELD_DELTAS
    replica.on_snapshot(snapshot(seq=2))
    assert replica.request_due(10.0) is not None


def test_a_beacon_shows_a_lost_last_delta() -> None:
    replica = replica_with(node("a"))
    replica.on_beacon(beacon(1))
    assert replica.request_due(0.0) is not None


def test_a_beacon_that_is_older_than_the_snapshot_says_nothing() -> None:
    replica = replica_with(node("a"), seq=3)
    replica.on_beacon(beacon(2, state=LISTING))
    assert replica.cluster.state == IN_SYNC
    assert replica.request_due(0.0) is None


def test_a_change_back_before_it_is_taken_is_no_change() -> None:
    replica = replica_with(node("a"))
    replica.on_delta(delta(1, node("a", 1), node("b")))
    replica.on_delta(delta(2, node("a"), gone=("b",)))
    assert replica.take_changes() == {}


def test_an_unchanged_object_stays_the_same_one_over_a_snapshot() -> None:
    replica = replica_with(node("a"), node("b"))
    before = replica.cluster.nodes["a"]
    replica.on_delta(delta(5))
    replica.on_snapshot(snapshot(node("a"), node("b", 1), seq=5))
    assert replica.cluster.nodes["a"] is before
    assert replica.take_changes() == {"nodes": {"b": (node("b"), node("b", 1))}}


def test_a_snapshot_that_was_not_asked_for_is_ignored() -> None:
    replica = replica_with(node("a", 2), seq=2)
    replica.on_snapshot(snapshot(node("a", 1), seq=3))
    assert names(replica) == {"a": "2"}


def test_a_late_answer_to_an_earlier_request_does_not_set_back() -> None:
    replica = replica_with(node("a", 4), seq=4)
    replica.on_delta(delta(6))
    replica.on_snapshot(snapshot(node("a", 1), seq=1))
    assert names(replica) == {"a": "4"}
    assert replica.request_due(0.0) is not None


def test_a_snapshot_without_all_kinds_is_refused_by_name() -> None:
    replica = ReplicaState("w", ("nodes", "services", "pods", "namespaces"))
    assert replica.on_snapshot(snapshot()) == "the watcher does not watch namespaces, services"
    assert not replica.usable
    assert replica.request_due(0.0) is not None


# a new watcher


def test_a_new_epoch_hands_out_only_the_difference() -> None:
    replica = replica_with(node("a"), node("b"), node("c"))
    replica.on_beacon(beacon(0, epoch="2"))
    assert replica.request_due(0.0) is not None
    replica.on_snapshot(snapshot(node("a"), node("b", 1), node("d"), epoch="2"))
    assert replica.take_changes() == {
        "nodes": {"b": (node("b"), node("b", 1)), "c": (node("c"), None), "d": (None, node("d"))}
    }


def test_words_of_a_watcher_that_is_gone_are_ignored() -> None:
    replica = replica_with(node("a"))
    replica.on_snapshot(snapshot(node("b"), epoch="2"))
    replica.on_delta(delta(7, node("c"), epoch="1"))
    replica.on_beacon(beacon(9, epoch="1", state=LISTING))
    replica.on_snapshot(snapshot(node("d"), epoch="1", seq=9))
    assert names(replica) == {"b": "0"}
    assert replica.cluster.state == IN_SYNC
    assert replica.request_due(0.0) is None


@pytest.mark.parametrize("state", [STALE, LISTING])
def test_a_new_watcher_without_its_source_adds_but_neither_deletes_nor_sets_back(state: SourceState) -> None:
    replica = replica_with(node("a", 2), node("b"))
    replica.on_snapshot(snapshot(node("a", 1), node("c"), epoch="2", state=state))
    assert names(replica) == {"a": "2", "b": "0", "c": "0"}
    assert replica.usable
    assert (replica.cluster.state.in_sync, replica.cluster.state.stale) == (False, True)
    replica.on_delta(delta(1, node("a", 3), gone=("b", "c"), epoch="2"))
    assert names(replica) == {"a": "3", "b": "0", "c": "0"}
    replica.take_changes()
    replica.on_beacon(beacon(1, epoch="2"))
    assert names(replica) == {"a": "3"}
    assert replica.cluster.state == IN_SYNC
    assert replica.take_changes() == {"nodes": {"b": (node("b"), None), "c": (node("c"), None)}}


def test_the_first_snapshot_of_a_watcher_that_still_lists_is_not_usable() -> None:
    replica = replica_with(node("a"), state=LISTING)
    assert not replica.usable
    replica.on_beacon(beacon(0))
    assert replica.usable
    assert names(replica) == {"a": "0"}


def test_the_first_snapshot_from_disk_is_usable_and_stale() -> None:
    replica = replica_with(node("a"), state=STALE)
    assert replica.usable
    assert (replica.cluster.state.in_sync, replica.cluster.state.stale) == (False, True)


def test_coming_in_sync_waits_for_the_deltas_before_it() -> None:
    replica = replica_with(node("a"), state=STALE)
    replica.on_beacon(beacon(1))
    assert not replica.cluster.state.in_sync
    replica.on_snapshot(snapshot(seq=1))
    assert replica.cluster.state.in_sync
    assert names(replica) == {}


def test_out_of_sync_within_an_epoch_nothing_is_deleted() -> None:
    replica = replica_with(node("a"))
    replica.on_beacon(beacon(0, state=LISTING))
    replica.on_delta(delta(1, gone=("a",)))
    assert names(replica) == {"a": "0"}
    assert replica.usable
    replica.on_beacon(beacon(1))
    assert names(replica) == {}


def test_an_unlisted_kind_stops_only_those_who_read_it() -> None:
    state = msgspec.structs.replace(LISTING, unlisted=("networkpolicies",), degraded=("networkpolicies: forbidden",))
    replica = replica_with(node("a"), state=state)
    assert replica.cluster.state == msgspec.structs.replace(state, in_sync=True)
    reader = ReplicaState("firewall", ("nodes", "networkpolicies"))
    parts = tuple(KindSnapshot(kind=kind, seq=0, objects=()) for kind in reader.kinds)
    reader.on_snapshot(Snapshot(epoch="1", state=state, kinds=parts))
    assert not reader.usable


# the view


def test_a_view_is_frozen() -> None:
    replica = replica_with(node("a"))
    view = replica.cluster
    with pytest.raises(TypeError):
        view.nodes["b"] = node("b")  # type: ignore[index]
    replica.on_delta(delta(1, node("a", 1), gone=()))
    replica.on_delta(delta(2, node("b"), gone=("a",)))
    assert dict(view.nodes) == {"a": node("a")}
    assert names(replica) == {"b": "0"}


def test_the_view_is_the_same_until_something_changes() -> None:
    replica = replica_with(node("a"))
    view = replica.cluster
    replica.on_beacon(beacon(0))
    replica.on_delta(delta(1, node("a")))
    assert replica.cluster is view
    replica.on_beacon(beacon(1, state=msgspec.structs.replace(IN_SYNC, degraded=("api: gone",))))
    assert replica.cluster is not view
    assert replica.cluster.state.degraded == ("api: gone",)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_name_in_the_view(kind: Kind) -> None:
    item = Pod(name="a")
    view = Cluster(IN_SYNC, {kind: {"a": item}})
    assert getattr(view, kind)["a"] is item
    assert view.objects(kind)["a"] is item


def test_a_kind_that_was_not_asked_for_is_an_error() -> None:
    with pytest.raises(KeyError, match="services"):
        replica_with().cluster.objects("services")
