"""Hypothesis strategies for every message and projection, made from the types: a new field is covered too."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal

import msgspec
from hypothesis import strategies as st

from kube_router.ipc.messages import KINDS, OBJECT_TYPES, Delta, Kind, KindSnapshot, Projection

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
INTEGER = st.integers(-(2**63), 2**64 - 1)
NUMBER = st.floats(allow_nan=False)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXT,
    int: INTEGER,
    float: NUMBER,
    bool: st.booleans(),
    type(None): st.none(),
}


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of one field's type; raises for a type that no strategy is known for."""
    if annotation in SCALARS:
        return SCALARS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, arguments))
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return structs(annotation)
    raise TypeError(f"no strategy for {annotation!r}")


def structs(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Instances of a message or projection with any of its fields set."""
    if cls is KindSnapshot:
        return st.sampled_from(KINDS).flatmap(_kind_snapshots)
    if cls is Delta:
        return st.sampled_from(KINDS).flatmap(_deltas)
    required: dict[str, st.SearchStrategy[Any]] = {}
    optional: dict[str, st.SearchStrategy[Any]] = {}
    hints = typing.get_type_hints(cls)
    for field in msgspec.structs.fields(cls):
        if field.name != "protocol":
            (required if field.required else optional)[field.name] = values(hints[field.name])
    return st.fixed_dictionaries(required, optional=optional).map(lambda fields: cls(**fields))


def objects(kind: Kind) -> st.SearchStrategy[tuple[Projection, ...]]:
    """Some objects of a kind."""
    return st.lists(structs(OBJECT_TYPES[kind]), max_size=3).map(tuple)


def _kind_snapshots(kind: Kind) -> st.SearchStrategy[KindSnapshot]:
    return st.builds(KindSnapshot, kind=st.just(kind), seq=INTEGER, objects=objects(kind))


def _deltas(kind: Kind) -> st.SearchStrategy[Delta]:
    gone = st.lists(TEXT, max_size=3).map(tuple)
    return st.builds(Delta, epoch=TEXT, kind=st.just(kind), seq=INTEGER, put=objects(kind), gone=gone)
