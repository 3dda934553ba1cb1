"""What the own Node's annotations say about announced and refused routes: communities, path prepending, custom rejects.

Pure: annotation texts in, values and `Problem`s out. A bad item of a list is named and skipped, the others count. Two
annotations that make one value (path prepending) stay at what gobgpd holds while they cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from kube_router.workers.model import IPNetwork, parse_network
from kube_router.workers.nodefacts import Problem, parse_base0
from kube_router.workers.router import names
from kube_router.workers.router.bgpstate import Attributes

INVALID_COMMUNITY = "InvalidCommunity"
INVALID_PREPEND = "InvalidPathPrepend"
INVALID_REJECT = "InvalidCustomImportReject"
WELL_KNOWN = {
    "internet": 0x00000000,
    "planned-shut": 0xFFFF0000,
    "accept-own": 0xFFFF0001,
    "route-filter-translated-v4": 0xFFFF0002,
    "route-filter-v4": 0xFFFF0003,
    "route-filter-translated-v6": 0xFFFF0004,
    "route-filter-v6": 0xFFFF0005,
    "llgr-stale": 0xFFFF0006,
    "no-llgr": 0xFFFF0007,
    "blackhole": 0xFFFF029A,
    "no-export": 0xFFFFFF01,
    "no-advertise": 0xFFFFFF02,
    "no-export-subconfed": 0xFFFFFF03,
    "no-peer": 0xFFFFFF04,
}
"""IANA's "BGP Well-known Communities", as far as gobgpd has names for them."""
MOST_COMMUNITIES = 500
MOST_LARGE_COMMUNITIES = 60
"""An UPDATE has 4,096 bytes (RFC 4271), and all attributes of a prefix must fit into one: these take 2,000 and 720 of
them, and 255 prepended AS numbers another 1,020."""
AS_TRANS = 23456
MOST_REPEATS = 255
MOST_SHOWN, MOST_NAMED = 40, 5
"""Characters of a bad item, and bad items of a list, that a message repeats."""
RULES = {
    names.COMMUNITIES: "community (32-bit number, number:number of 16 bits each, or a well-known name)",
    names.LARGE_COMMUNITIES: "large community (number:number:number of 32 bits each)",
}

T = TypeVar("T")


class OwnAttributes(NamedTuple):
    """``attributes`` never sets the next hop: that is a flag's business."""

    attributes: Attributes
    problems: tuple[Problem, ...]


class CustomRejects(NamedTuple):
    """Prefixes of both families that no peer may announce, nor parts of them."""

    networks: tuple[IPNetwork, ...]
    problems: tuple[Problem, ...]


def own_attributes(node: str, annotations: Mapping[str, str], held: Attributes) -> OwnAttributes:
    """What ``node`` adds to the routes that it announces to external peers; ``held``: what it adds now.

    Values are as gobgpd reads them back: communities as ``a:b``, each once; in numeric order, which means nothing.
    """
    problems: list[Problem] = []
    communities = _list(node, annotations, names.COMMUNITIES, _community, MOST_COMMUNITIES, problems)
    large = _list(node, annotations, names.LARGE_COMMUNITIES, _large_community, MOST_LARGE_COMMUNITIES, problems)
    return OwnAttributes(
        Attributes(
            prepend=_prepend(node, annotations, held, problems),
            communities=tuple(f"{value >> 16}:{value & 0xFFFF}" for (value,) in communities),
            large_communities=tuple(":".join(map(str, parts)) for parts in large),
        ),
        tuple(problems),
    )


def custom_rejects(node: str, annotations: Mapping[str, str]) -> CustomRejects:
    """The prefixes of ``kube-router.io/node.bgp.customimportreject``, both families in one list."""
    where = f"node {node}: annotation {names.CUSTOM_IMPORT_REJECT}"
    networks, bad = _parsed(annotations.get(names.CUSTOM_IMPORT_REJECT, ""), parse_network)
    problem = Problem(INVALID_REJECT, f"{where}: {_shown_list(bad)} no CIDR; ignored")
    return CustomRejects(tuple(networks), (problem,) if bad else ())


def _list(
    node: str,
    annotations: Mapping[str, str],
    key: str,
    parse: Callable[[str], tuple[int, ...]],
    most: int,
    problems: list[Problem],
) -> list[tuple[int, ...]]:
    where = f"node {node}: annotation {key}"
    found, bad = _parsed(annotations.get(key, ""), parse)
    if bad:
        problems.append(Problem(INVALID_COMMUNITY, f"{where}: {_shown_list(bad)} no {RULES[key]}; ignored"))
    if len(found) > most:
        text = f"{where}: has {len(found)} communities, {most} fit into one message; those after them are ignored"
        problems.append(Problem(INVALID_COMMUNITY, text))
    return sorted(found[:most])


def _parsed(text: str, parse: Callable[[str], T]) -> tuple[list[T], list[str]]:
    """The items of a comma list, each once: what they say, and those that cannot be read."""
    found: dict[T, None] = {}
    bad = []
    for item in filter(None, map(str.strip, text.split(","))):
        try:
            found[parse(item)] = None
        except ValueError:
            bad.append(item)
    return list(found), bad


def _community(text: str) -> tuple[int, ...]:
    if text in WELL_KNOWN:
        return (WELL_KNOWN[text],)
    match [_decimal(part) for part in text.split(":")]:
        case [value] if value < 1 << 32:
            return (value,)
        case [high, low] if high < 1 << 16 and low < 1 << 16:
            return (high << 16 | low,)
    raise ValueError(text)


def _large_community(text: str) -> tuple[int, ...]:
    parts = tuple(_decimal(part) for part in text.split(":"))
    if len(parts) != 3 or any(part >= 1 << 32 for part in parts):
        raise ValueError(text)
    return parts


def _decimal(text: str) -> int:
    """A number of decimal digits; one that is too large for everything where it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else 1 << 32


def _prepend(
    node: str, annotations: Mapping[str, str], held: Attributes, problems: list[Problem]
) -> tuple[int, int] | None:
    """Both annotations or none; a bad one leaves what is held. Zero times is none."""
    if names.PREPEND_AS not in annotations:
        return None
    kept = "; none is prepended" if held.prepend is None else "; AS {} goes on being prepended {} times"
    kept = kept.format(*held.prepend or ())
    if names.PREPEND_REPEAT not in annotations:
        text = f"node {node}: annotation {names.PREPEND_AS} needs {names.PREPEND_REPEAT} beside it{kept}"
        problems.append(Problem(INVALID_PREPEND, text))
        return held.prepend
    asn = _number(annotations[names.PREPEND_AS])
    repeats = _number(annotations[names.PREPEND_REPEAT])
    for key, good, rule in (
        (names.PREPEND_AS, 0 < asn < 1 << 32 and asn != AS_TRANS, "an AS number (1-4294967295, not 23456)"),
        (names.PREPEND_REPEAT, 0 <= repeats <= MOST_REPEATS, f"a number of times (0-{MOST_REPEATS})"),
    ):
        if not good:
            text = f"node {node}: annotation {key}: {_shown(annotations[key])} is not {rule}{kept}"
            problems.append(Problem(INVALID_PREPEND, text))
            return held.prepend
    return (asn, repeats) if repeats else None


def _number(text: str) -> int:
    """By Go's base-0 rules, blanks around it aside; -1 where it is no number."""
    try:
        return parse_base0(text.strip())
    except ValueError:
        return -1


def _shown(item: str) -> str:
    return repr(item if len(item) <= MOST_SHOWN else item[:MOST_SHOWN] + "…")


def _shown_list(items: Sequence[str]) -> str:
    rest = len(items) - MOST_NAMED
    shown = [_shown(item) for item in items[:MOST_NAMED]] + ([f"{rest} more"] if rest > 0 else [])
    return f"{', '.join(shown)} {'is' if len(items) == 1 else 'are'}"
