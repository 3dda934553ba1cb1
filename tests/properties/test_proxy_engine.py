"""Law 3 for the proxy's engine, and the table that it keeps is what the judge says of every packet.

A small world of Services that quarrel about addresses, and of slices in every condition, is changed at random. After
each step the engine must hold what a fresh engine makes of the same cluster, `Changed` must name all that differs and
nothing else, and what the table says of any packet must be the judge's word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from support.proxyworld import (
    SETTINGS,
    Objects,
    judged,
    questions,
    random_change,
    random_objects,
    tabled,
)

from kube_router.ipc.messages import EndpointSlice, Service
from kube_router.workers.proxy.engine import Engine
from kube_router.workers.proxy.model import ServiceTable


def copied(table: ServiceTable) -> ServiceTable:
    return ServiceTable(dict(table.frontends), dict(table.pools), dict(table.health))


def differing(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> set[Any]:
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def fresh(objects: Objects) -> Engine:
    engine = Engine(SETTINGS)
    engine.update(objects.cluster(), None)
    return engine


@given(random_objects())
@settings(max_examples=80)
def test_the_table_says_of_every_packet_what_the_judge_says(objects: Objects) -> None:
    table = fresh(objects).table
    for asked in questions(objects):
        assert tabled(table, asked) == judged(objects, asked), asked


@given(random_objects(), st.data())
@settings(max_examples=80)
def test_after_any_changes_it_is_the_table_of_the_end(objects: Objects, data: st.DataObject) -> None:
    engine = fresh(objects)
    objects.changes()
    assert engine.take_changed().everything
    for _ in range(data.draw(st.integers(1, 4))):
        before = copied(engine.table)
        for _ in range(data.draw(st.integers(1, 3))):
            present = sorted((kind, key) for kind, key in objects.items if kind != "nodes")
            if present and data.draw(st.booleans()):
                objects.remove(*data.draw(st.sampled_from(present)))
            else:
                objects.put(data.draw(random_change(objects)))
        engine.update(objects.cluster(), objects.changes())
        changed = engine.take_changed()
        other = fresh(objects)
        assert copied(engine.table) == copied(other.table)
        assert list(engine.problems()) == list(other.problems())
        assert not changed.everything
        assert changed.frontends == differing(before.frontends, engine.table.frontends)
        assert changed.pools == differing(before.pools, engine.table.pools)
        assert changed.health == differing(before.health, engine.table.health)


@given(random_objects())
@settings(max_examples=30)
def test_being_told_of_everything_once_more_changes_nothing(objects: Objects) -> None:
    engine = fresh(objects)
    engine.take_changed()
    before = copied(engine.table)
    everything = {
        kind: {item.key: (None, item) for item in objects.of(type_)}
        for kind, type_ in (("services", Service), ("endpointslices", EndpointSlice))
    }
    engine.update(objects.cluster(), everything)
    assert not engine.take_changed()
    engine.update(objects.cluster(), None)
    assert not engine.take_changed()
    assert copied(engine.table) == before
