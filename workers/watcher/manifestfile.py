"""One manifest file: its text to projections, and to errors that name line, object and field.

Pure: bytes in, `ManifestContent` out. YAML scalars mean what they mean to ``kubectl`` (no dates, no base-60 numbers:
``64512:10`` is a text). Aliases are refused: a few lines of them can stand for gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import yaml

from kube_router.ipc.messages import Key, Kind, Projection
from kube_router.workers.watcher.apiobjects import OBJECTS
from kube_router.workers.watcher.kinds import RESOURCES, Resource, selected
from kube_router.workers.watcher.projections import PROJECT, ObjectError, check_identity

MAX_FILE_BYTES = 16 << 20
MAX_DEPTH = 100
"""Nesting of a manifest; a Kubernetes object has about ten levels, the parser's stack bears some hundreds."""

BY_OBJECT_KIND: dict[str, Resource] = {resource.object_kind: resource for resource in RESOURCES.values()}


class BadManifest(ValueError):
    """A file as a whole cannot be used; the text has the line, if one is to blame."""


@dataclass(frozen=True, slots=True)
class BrokenObject:
    """An object that cannot be used; the file's other objects can. ``key`` is empty when not even that can be told."""

    kind: Kind
    key: Key
    text: str


@dataclass(frozen=True, slots=True)
class ManifestContent:
    """What a file holds: objects in their order, and what is wrong with others."""

    objects: tuple[tuple[Kind, Projection], ...]
    broken: tuple[BrokenObject, ...]


def _loader() -> type[Any]:
    base: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class ManifestLoader(base):  # type: ignore[misc]
        """A safe loader with the scalars of Kubernetes."""

    dropped = {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
    ManifestLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in dropped]
        for first, resolvers in base.yaml_implicit_resolvers.items()
    }
    ManifestLoader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
            r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    )
    ManifestLoader.add_implicit_resolver(
        "tag:yaml.org,2002:int",
        re.compile(r"^(?:[-+]?0b[0-1_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+)$"),
        list("-+0123456789"),
    )
    return ManifestLoader


LOADER = _loader()


def parse_manifest(data: bytes) -> ManifestContent:
    """Parse a whole file; raises `BadManifest` when it is no YAML, too long, too deep or has aliases."""
    if len(data) > MAX_FILE_BYTES:
        raise BadManifest(f"more than {MAX_FILE_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadManifest(f"line {data[: error.start].count(10) + 1}: not UTF-8") from None
    _check_shape(text)
    objects: list[tuple[Kind, Projection]] = []
    broken: list[BrokenObject] = []
    for line, document in _documents(text):
        for place, item in _items(document, f"line {line}"):
            _take(item, place, objects, broken)
    return ManifestContent(tuple(objects), tuple(broken))


def _documents(text: str) -> Iterator[tuple[int, Any]]:
    """(first line, value) of each document."""
    loader = LOADER(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            yield node.start_mark.line + 1, loader.construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise BadManifest(_yaml_reason(error)) from None
    finally:
        loader.dispose()


def _check_shape(text: str) -> None:
    """Refuse aliases and deep nesting before anything is built from the text.

    The parser recurses in C, so depth must be known before. Only a text with as many opening signs or as wide an
    indentation as a deep one needs, or with an asterisk, is worth the look at its events.
    """
    suspicious = "*" in text or text.count("[") + text.count("{") > MAX_DEPTH or " " * MAX_DEPTH in text
    if not suspicious and not re.search(rf"(?:[-?] ){{{MAX_DEPTH // 4}}}", text):
        return
    depth = 0
    try:
        for event in yaml.parse(text, Loader=LOADER):
            if isinstance(event, yaml.AliasEvent):
                raise BadManifest(f"{_line(event)}: alias *{event.anchor} (aliases are not accepted)")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    raise BadManifest(f"{_line(event)}: nested deeper than {MAX_DEPTH} levels")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, BadManifest):
            raise
        if "nesting depth" in str(error):  # libyaml since 0.2.6 has a bound of its own, and its scanner reads ahead
            mark = getattr(error, "problem_mark", None)
            raise BadManifest(f"line {mark.line + 1 if mark else '?'}: nested deeper than {MAX_DEPTH} levels") from None
        raise BadManifest(_yaml_reason(error)) from None


def _line(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1 if event.start_mark else '?'}"


def _yaml_reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
    where = f"line {mark.line + 1}: " if mark else ""
    return f"{where}{' '.join(str(problem).split())}"


def _items(document: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The objects of a document: itself, or the items of a List (of any kind, ``List`` or ``NodeList``)."""
    if document is None:
        return
    if isinstance(document, dict):
        kind = document.get("kind")
        if isinstance(kind, str) and kind.endswith("List") and kind not in BY_OBJECT_KIND:
            items = document.get("items")
            if items is not None and not isinstance(items, list):
                raise BadManifest(f"{place}: {kind}: items is not a list")
            typed = (
                {} if kind == "List" else {"kind": kind.removesuffix("List"), "apiVersion": document.get("apiVersion")}
            )
            for index, item in enumerate(items or ()):
                yield from _items({**typed, **item} if isinstance(item, dict) else item, f"{place}, items[{index}]")
            return
    yield place, document


def _take(item: Any, place: str, objects: list[tuple[Kind, Projection]], broken: list[BrokenObject]) -> None:
    """Project one object into ``objects`` or say in ``broken`` why not; other kinds of objects are passed over."""
    if not isinstance(item, dict) or not isinstance(item.get("kind"), str):
        raise BadManifest(f"{place}: not a Kubernetes object: no kind")
    resource = BY_OBJECT_KIND.get(item["kind"])
    version = item.get("apiVersion")
    if resource is None or (isinstance(version, str) and version.rpartition("/")[0] != resource.group):
        return
    key = _key(item, resource)
    name = f"{place}: {resource.object_kind} {key or '?'}"
    if version != resource.api_version:
        broken.append(BrokenObject(resource.kind, key, f"{name}: apiVersion {version!r} is not {resource.api_version}"))
        return
    try:
        decoded = msgspec.convert(item, OBJECTS[resource.kind])
        if resource.namespaced and not decoded.metadata.namespace:
            decoded.metadata.namespace = "default"
        projection = PROJECT[resource.kind](decoded)
        check_identity(projection, resource.namespaced)
    except (msgspec.ValidationError, ObjectError, RecursionError, OverflowError) as error:
        broken.append(BrokenObject(resource.kind, key, f"{name}: {_path_first(error, item)}"))
        return
    if selected(projection):
        objects.append((resource.kind, projection))


def _path_first(error: Exception, item: Any) -> str:
    """``Expected `str`, got `int` - at `$.a.b``` as ``$.a.b: Expected `str`, got `int```, with the key of a map."""
    text, at, path = str(error).partition(" - at ")
    path = path.strip("`")
    if path.endswith("[...]"):  # the decoder does not say which entry of a map
        path = path.removesuffix("[...]")
        value = item
        for name, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", path):
            value = value[name] if name else value[int(index)]
        wrong = [key for key, entry in value.items() if not isinstance(entry, str)]
        path += f"[{wrong[0]!r}]" if wrong else ""
    return f"{path}: {text}" if at else text


def _key(item: dict[str, Any], resource: Resource) -> Key:
    """The object's key as far as it can be told without decoding it; empty if not."""
    metadata = item.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        return ""
    name = metadata["name"]
    return f"{metadata.get('namespace') or 'default'}/{name}" if resource.namespaced else name
