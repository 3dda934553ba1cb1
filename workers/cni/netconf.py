"""A CNI network configuration as text: parse it, put our ranges and MTU into it, write it as it was written.

Pure: text in, text out. Only what is ours changes: keys, plugins and ranges of the user stay, in their order and with
the file's own indentation.

What host-local makes of ranges decides the rules here: each range *set* gives a pod one address, the order of the sets
is the order of the pod's addresses, a subnet with host bits and two overlapping ranges make every ADD fail.
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kube_router.workers.cni.names import BRIDGE
from kube_router.workers.model import IPNetwork, parse_network

JsonObject = dict[str, Any]

LEGACY_RANGE_KEYS = ("subnet", "rangeStart", "rangeEnd", "gateway")
"""Keys of a single range that older configurations hold in ``ipam`` itself (host-local reads them as one range)."""


class NetconfError(ValueError):
    """A configuration that cannot be used; the text says where and why. ``line`` and ``column`` count from 1."""

    def __init__(self, reason: str, line: int | None = None, column: int | None = None) -> None:
        where = "" if line is None else f"line {line} column {column}: "
        super().__init__(where + reason)
        self.line, self.column = line, column


@dataclass(frozen=True, slots=True)
class Style:
    """How a file was written: indentation (None for a single line), separators, end of file, escapes."""

    indent: str | None
    separators: tuple[str, str]
    ending: str
    ascii_only: bool


@dataclass(frozen=True, slots=True)
class RangeChange:
    """What shall be in the file. All networks are in network form.

    ``wanted``: our ranges, in the order that pods shall get their addresses. ``owned``: ranges that count as put in by
    us. ``removable``: those that are no longer wanted go; if not, they stay, and a family that has one gets no other
    (two IPv4 ranges on one bridge make every ADD fail). ``mtu``: None leaves the user's.
    """

    wanted: tuple[IPNetwork, ...]
    owned: frozenset[IPNetwork]
    mtu: int | None
    removable: bool = True


@dataclass(frozen=True, slots=True)
class Edited:
    """The outcome of `edit`: ``text`` equals the input exactly when nothing had to change.

    ``present``: every range in the new file, user's and ours, in order. ``warnings`` are lines without the file name.
    """

    text: str
    present: tuple[IPNetwork, ...]
    mtu: int | None
    warnings: tuple[str, ...]


def edit(text: str, is_list: bool, change: RangeChange) -> Edited:
    """``text`` with `change` made in it; ``is_list`` tells a conflist from a single configuration.

    Raises NetconfError when the text is no usable configuration.
    """
    try:
        return _edit(text, is_list, change)
    except RecursionError as error:
        raise NetconfError("nested too deeply") from error


def _edit(text: str, is_list: bool, change: RangeChange) -> Edited:
    document, before = parse(text), parse(text)
    plugin, where = bridge_plugin(document, is_list)
    warnings = list(_plugin_warnings(plugin, where))
    ipam = plugin.get("ipam")
    if not isinstance(ipam, dict):
        raise NetconfError(f"{where}ipam: {'missing' if ipam is None else 'not an object'}, nowhere to put pod ranges")
    present: tuple[IPNetwork, ...] = ()
    if ipam.get("type", "host-local") == "host-local":
        present = _edit_ranges(ipam, f"{where}ipam", change)
        warnings += _refusals(present, f"{where}ipam.ranges", plugin)
    else:
        warnings.append(f"{where}ipam.type: {ipam['type']!r} is not host-local, its ranges are left alone")
    if change.mtu is not None and (plugin.get("mtu") != change.mtu or isinstance(plugin.get("mtu"), float)):
        plugin["mtu"] = change.mtu
    mtu = plugin.get("mtu")
    return Edited(
        # As text: 1500 and 1500.0 are equal to Python, and not to the plugins.
        text=text if json.dumps(document) == json.dumps(before) else render(document, style_of(text)),
        present=present,
        mtu=mtu if isinstance(mtu, int) else None,
        warnings=tuple(warnings),
    )


def is_conflist(path: str) -> bool:
    """Whether the file at ``path`` holds a list of plugins: decided by its suffix, in any case, as CRI does."""
    return path.lower().endswith(".conflist")


def parse(text: str) -> JsonObject:
    """The JSON object in ``text``; raises NetconfError with line and column."""
    if not text.strip():
        raise NetconfError("the file is empty")
    try:
        document = json.loads(
            text, parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_without_duplicates
        )
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at").removesuffix(" starting")  # the place stands in front here
        raise NetconfError(reason, error.lineno, error.colno) from error
    except RecursionError as error:
        raise NetconfError("nested too deeply") from error
    except NetconfError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise NetconfError(str(error)) from error
    if not isinstance(document, dict):
        raise NetconfError("not a JSON object")
    return document


def bridge_plugin(document: JsonObject, is_list: bool) -> tuple[JsonObject, str]:
    """The plugin to edit (the object itself, not a copy) and the text to put before its keys in a message.

    In a list: the first plugin of type bridge. A single configuration is the plugin, whatever its type.
    """
    if not is_list:
        if "plugins" in document and "type" not in document:
            raise NetconfError("plugins: a plugin list; the file's name must end in .conflist")
        if not isinstance(document.get("type"), str) or not document["type"]:
            raise NetconfError("type: missing")
        return document, ""
    plugins = document.get("plugins")
    if not isinstance(plugins, list) or not plugins:
        raise NetconfError("plugins: missing or empty")
    for number, plugin in enumerate(plugins):
        if not isinstance(plugin, dict):
            raise NetconfError(f"plugins[{number}]: not an object")
        if plugin.get("type") == "bridge":
            return plugin, f"plugins[{number}]."
    raise NetconfError("plugins: none is of type bridge")


def ranges_of(ipam: JsonObject, where: str) -> list[list[JsonObject]]:
    """``ipam.ranges``, checked down to each range being an object; an absent or null key is an empty list."""
    ranges = ipam.get("ranges")
    if ranges is None:
        return []
    if not isinstance(ranges, list):
        raise NetconfError(f"{where}.ranges: not a list")
    for number, range_set in enumerate(ranges):
        if not isinstance(range_set, list):
            raise NetconfError(f"{where}.ranges[{number}]: not a list")
        for place, entry in enumerate(range_set):
            if not isinstance(entry, dict):
                raise NetconfError(f"{where}.ranges[{number}][{place}]: not an object")
    return ranges


def subnet_of(entry: JsonObject) -> IPNetwork | None:
    """The subnet of a range in network form; None when it has none that can be read (then it is the user's matter)."""
    subnet = entry.get("subnet")
    if not isinstance(subnet, str):
        return None
    try:
        return parse_network(subnet)
    except ValueError:
        return None


def _edit_ranges(ipam: JsonObject, where: str, change: RangeChange) -> tuple[IPNetwork, ...]:
    ranges = ranges_of(ipam, where)
    _move_legacy_subnet(ipam, ranges)
    _drop_duplicates(ranges, frozenset(change.wanted))
    kept: set[int] = set()
    if change.removable:
        _replace_unwanted(ranges, change)
    else:
        kept = {each.version for each in _networks(ranges) if each in change.owned and each not in change.wanted}
    for position, network in enumerate(change.wanted):
        if network not in _networks(ranges) and network.version not in kept:
            later = {each for each in change.owned if each.version > network.version}
            _insert(ranges, network, later.union(change.wanted[position + 1 :]))
    for range_set in ranges:
        for entry in range_set:
            network_or_none = subnet_of(entry)
            if network_or_none in change.wanted and _has_host_bits(entry["subnet"]):
                entry["subnet"] = str(network_or_none)
    if ranges and ipam.get("ranges") is None:
        ipam["ranges"] = ranges
    return tuple(_networks(ranges))


def _move_legacy_subnet(ipam: JsonObject, ranges: list[list[JsonObject]]) -> None:
    """``ipam.subnet`` and its companions become the first range set, which is how host-local reads them."""
    network = subnet_of(ipam)
    if network is None:
        return
    legacy = {key: ipam.pop(key) for key in LEGACY_RANGE_KEYS if key in ipam}
    for range_set in ranges:
        for entry in range_set:
            if subnet_of(entry) == network:
                for key, value in legacy.items():
                    entry.setdefault(key, value)
                return
    ranges.insert(0, [legacy])


def _drop_duplicates(ranges: list[list[JsonObject]], wanted: frozenset[IPNetwork]) -> None:
    """Remove second mentions of our own ranges: upstream appended a CIDR with host bits at every start."""
    seen: set[IPNetwork] = set()
    for range_set in list(ranges):
        for entry in list(range_set):
            network = subnet_of(entry)
            if network is None or network not in wanted:
                continue
            if network in seen and set(entry) == {"subnet"}:
                _remove(ranges, range_set, entry)
            seen.add(network)


def _replace_unwanted(ranges: list[list[JsonObject]], change: RangeChange) -> None:
    """Take out ranges of ours that are no longer wanted; a new one of the same family takes the place of an old one.

    Keeping the place keeps the order of a pod's addresses, and with it the pod's primary family.
    """
    missing = [network for network in change.wanted if network not in _networks(ranges)]
    for range_set in list(ranges):
        for place, entry in enumerate(list(range_set)):
            network = subnet_of(entry)
            if network is None or network in change.wanted or network not in change.owned:
                continue
            successor = next((each for each in missing if each.version == network.version), None)
            if successor is None:
                _remove(ranges, range_set, entry)
            else:
                missing.remove(successor)
                # The options of the old range (rangeStart, gateway…) lie within the old CIDR: they go with it.
                range_set[_place(range_set, entry, place)] = {"subnet": str(successor)}


def _insert(ranges: list[list[JsonObject]], network: IPNetwork, later: set[IPNetwork]) -> None:
    """Add a range set of its own: before the first of our ranges that comes ``later`` in order, else last."""
    for number, range_set in enumerate(ranges):
        if any(subnet_of(entry) in later for entry in range_set):
            ranges.insert(number, [{"subnet": str(network)}])
            return
    ranges.append([{"subnet": str(network)}])


def _place(range_set: list[JsonObject], entry: JsonObject, guess: int) -> int:
    return next((place for place, each in enumerate(range_set) if each is entry), guess)


def _remove(ranges: list[list[JsonObject]], range_set: list[JsonObject], entry: JsonObject) -> None:
    """Remove ``entry`` (that very object) and its set, if nothing else is in it."""
    del range_set[_place(range_set, entry, 0)]
    if not range_set:
        del ranges[next(number for number, each in enumerate(ranges) if each is range_set)]


def _networks(ranges: Iterable[Iterable[JsonObject]]) -> list[IPNetwork]:
    found = (subnet_of(entry) for range_set in ranges for entry in range_set)
    return [network for network in found if network is not None]


def _has_host_bits(subnet: str) -> bool:
    try:
        ipaddress.ip_network(subnet, strict=True)
    except ValueError:
        return True
    return False


def _refusals(present: Sequence[IPNetwork], where: str, plugin: JsonObject) -> list[str]:
    """What host-local and the bridge plugin will not take, and so would make every ADD fail."""
    found = []
    for number, one in enumerate(present):
        for other in present[number + 1 :]:
            if one.version == other.version and one.overlaps(other):
                found.append(f"{where}: {one} overlaps {other}, host-local refuses such a file")
    gateway = plugin.get("isGateway") or plugin.get("isDefaultGateway")
    ipv4 = [str(network) for network in present if network.version == 4]
    if len(ipv4) > 1 and plugin.get("type") == "bridge" and gateway and not plugin.get("forceAddress"):
        found.append(f"{where}: {' and '.join(ipv4)}: the bridge plugin takes one IPv4 gateway and refuses a second")
    return found


def _plugin_warnings(plugin: JsonObject, where: str) -> Iterable[str]:
    if plugin.get("type") == "bridge" and plugin.get("bridge", "cni0") != BRIDGE:
        yield f"{where}bridge: {plugin.get('bridge', 'cni0')!r} is not {BRIDGE}, pods will not be behind {BRIDGE}"


def style_of(text: str) -> Style:
    """How ``text`` is written, as far as `render` can repeat it."""
    stripped = text.rstrip()
    indented = re.search(r"[{\[]\r?\n([ \t]+)", stripped)
    indent = indented.group(1) if indented else None
    colon = ": " if re.search(r'"\s*:\s', stripped) else ":"
    comma = "," if indent is not None or not re.search(r",\s", stripped) else ", "
    return Style(indent, (comma, colon), text[len(stripped) :], text.isascii())


def render(document: JsonObject, style: Style) -> str:
    """``document`` as JSON text; keys in their order."""
    text = json.dumps(document, indent=style.indent, separators=style.separators, ensure_ascii=style.ascii_only)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: only an escape can hold it
        text = json.dumps(document, indent=style.indent, separators=style.separators, ensure_ascii=True)
    return text + style.ending


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise NetconfError(f"the number {text} is too large")
    return value


def _no_constant(text: str) -> float:
    raise NetconfError(f"{text} is not JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> JsonObject:
    found: JsonObject = {}
    for key, value in pairs:
        if key in found:
            raise NetconfError(f"the key {key!r} stands twice in one object")
        found[key] = value
    return found
