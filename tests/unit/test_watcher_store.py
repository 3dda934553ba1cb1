"""The watcher's store: differences only, whatever way the state is told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kube_router.ipc.messages import Node, Projection, SourceState
from kube_router.workers.watcher.store import Step, Store


def node(name: str, provider: str = "") -> Node:
    return Node(name=name, provider_id=provider)


def store(*objects: Node) -> Store:
    made = Store(("nodes",), SourceState(source="t"))
    made.seed("nodes", objects)
    return made


def test_replace_tells_the_difference_and_lists_the_kind() -> None:
    held = store(node("a"), node("b"), node("c"))
    assert not held.complete
    step = held.replace("nodes", [node("b"), node("c", "new"), node("d")])
    assert step == Step("nodes", (node("c", "new"), node("d")), ("a",))
    assert held.complete
    assert held.replace("nodes", [node("b"), node("c", "new"), node("d")]) is None


def test_apply_leaves_out_what_is_known() -> None:
    held = store(node("a"))
    assert held.apply("nodes", [node("a")], ["x"]) is None
    assert held.apply("nodes", [node("a"), node("b")], []) == Step("nodes", (node("b"),), ())
    assert held.apply("nodes", [node("a", "new")], ["b", "b"]) == Step("nodes", (node("a", "new"),), ("b",))


def test_a_key_in_both_lists_is_put() -> None:
    held = store(node("a"))
    assert held.apply("nodes", [node("a", "new")], ["a"]) == Step("nodes", (node("a", "new"),), ())


def test_seeding_deletes_nothing_and_lists_nothing() -> None:
    held = store(node("a"))
    held.seed("nodes", [])
    assert set(held.objects("nodes")) == {"a"}
    assert held.listed == set()


NODES = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("xy"))


@given(st.lists(NODES, max_size=6))
def test_steps_replayed_make_the_same_cluster(clusters: list[dict[str, str]]) -> None:
    held = store()
    copy: dict[str, Projection] = {}
    for cluster in clusters:
        step = held.replace("nodes", [node(name, provider) for name, provider in cluster.items()])
        for item in step.put if step else ():
            copy[item.key] = item
        for key in step.gone if step else ():
            del copy[key]
        assert copy == held.objects("nodes") == {name: node(name, provider) for name, provider in cluster.items()}
