"""Commands of nftables as messages: the few forms that the firewall writes, one line of text each.

Pure. A command becomes the messages that ``nft`` would send for it, with the user data by which ``nft`` lists types and
comments. Numbers after ``include/uapi/linux/netfilter/nf_tables.h`` and ``include/libnftnl/udata.h``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator

from kube_router.workers.kernel.netlink import NLM_F_CREATE, Request
from kube_router.workers.kernel.nftelements import MESSAGE_BYTES, SUBSYSTEM, Key, block_edges, key_element, pack_member
from kube_router.workers.kernel.routes import AF
from kube_router.workers.model import Family
from kube_router.workers.nftcode import attribute, comment_data, compile_rule, number, text, userdata_item, verdict

KIND = {Family.IPV4: "ip", Family.IPV6: "ip6"}
"""The words of nftables for a table's family."""

_NEWTABLE, _DELTABLE, _NEWCHAIN, _DELCHAIN, _NEWRULE, _DELRULE = 0, 2, 3, 5, 6, 8
_NEWSET, _DELSET, _NEWSETELEM, _DELSETELEM = 9, 11, 12, 14
_APPEND = 0x800
TABLE, NAME = 1, 2
CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_TYPE, _CHAIN_USERDATA = 3, 4, 5, 7, 12
RULE_CHAIN, RULE_EXPRESSIONS, RULE_USERDATA = 2, 4, 7
SET_FLAGS, SET_KEY_TYPE, _SET_KEY_LEN, SET_DATA_TYPE, _SET_DATA_LEN, _SET_ID, _SET_USERDATA = 3, 4, 5, 6, 7, 10, 13
INTERVAL, MAP = 4, 8
VERDICT_TYPE, _VERDICT_LEN = 0xFFFFFF00, 16
TYPES = {"ipv4_addr": (7, 4), "ipv6_addr": (8, 16), "inet_proto": (12, 1), "inet_service": (13, 2)}
"""Number and length of the types of which keys are made."""
HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
_TABLE_USERDATA = 6
_ELEMENTS, _ELEM_DATA, _ELEM_USERDATA = 3, 2, 6
_KEY_ORDER, _DATA_ORDER, _DATA_INTERVAL, _SET_COMMENT = 0, 1, 6, 7
_NO_ORDER, _BIG_ENDIAN = 0, 2

_HEADER_TEXT = re.compile(r"type filter hook (\w+) priority filter; policy accept; ")
_COMMENT_TEXT = re.compile(r'comment "([^"]*)"; ')
_SHAPE_TEXT = re.compile(r'\{ type ([\w .:]+); (flags interval; )?(?:comment "([^"]*)"; )?\}')
_ELEMENT_TEXT = re.compile(r'([^"\s]+(?: \. [^"\s]+)*)(?: comment "([^"]*)")?(?: : (\w+)(?: (\S+))?)?')

Made = Iterator[tuple[int, int, bytes]]
"""Message, flags, and attributes behind the table's name."""


class Commands:
    """Reads commands; numbers the sets that one socket makes."""

    def __init__(self) -> None:
        self._set_number = 0

    def requests(self, command: str) -> Iterator[Request]:
        """The messages of one command. ValueError for what is none."""
        verb, _, rest = command.partition(" ")
        word, _, rest = rest.partition(" ")
        kind, _, rest = rest.partition(" ")
        table, _, rest = rest.partition(" ")
        family = next((family for family, name in KIND.items() if name == kind), None)
        make = _COMMANDS.get((verb, word))
        if make is None or family is None:
            raise ValueError(f"{command[:80]!r} is no command that is known here")
        name, _, rest = rest.partition(" ")
        for message, flags, payload in make(self, family, name, rest):
            yield Request(SUBSYSTEM << 8 | message, flags, start(family) + text(TABLE, table) + payload)

    def _add_table(self, family: Family, name: str, rest: str) -> Made:
        found = _COMMENT_TEXT.match(rest)
        data = attribute(_TABLE_USERDATA, comment_data(found[1])) if found else b""
        yield _NEWTABLE, NLM_F_CREATE, data

    def _delete_table(self, family: Family, name: str, rest: str) -> Made:
        yield _DELTABLE, 0, b""

    def _add_set(self, family: Family, name: str, rest: str) -> Made:
        found = _SHAPE_TEXT.fullmatch(rest)
        if found is None:
            raise ValueError(f"{rest!r} is no type of a set that is known here")
        key, _, value = found[1].partition(" : ")
        key_type, key_length = _key_type(key)
        flags = (INTERVAL if found[2] else 0) | (MAP if value else 0)
        self._set_number += 1
        order = _NO_ORDER if " . " in key else _BIG_ENDIAN
        data = userdata_item(_KEY_ORDER, struct.pack("=I", order))
        parts = [text(NAME, name), number(SET_FLAGS, flags)]
        parts += [number(SET_KEY_TYPE, key_type), number(_SET_KEY_LEN, key_length)]
        if value:
            parts += [number(SET_DATA_TYPE, VERDICT_TYPE), number(_SET_DATA_LEN, _VERDICT_LEN)]
            data += userdata_item(_DATA_ORDER, struct.pack("=I", _NO_ORDER))
            data += userdata_item(_DATA_INTERVAL, bytes(4))
        data += comment_data(found[3] or "", _SET_COMMENT)
        yield (
            _NEWSET,
            NLM_F_CREATE,
            b"".join([*parts, number(_SET_ID, self._set_number), attribute(_SET_USERDATA, data)]),
        )

    def _delete_set(self, family: Family, name: str, rest: str) -> Made:
        yield _DELSET, 0, text(NAME, name)

    def _flush_set(self, family: Family, name: str, rest: str) -> Made:
        yield _DELSETELEM, 0, text(NAME, name)

    def _add_elements(self, family: Family, name: str, rest: str) -> Made:
        for part in _portions(_elements(rest, family)):
            yield _NEWSETELEM, NLM_F_CREATE, text(NAME, name) + attribute(_ELEMENTS, part)

    def _delete_elements(self, family: Family, name: str, rest: str) -> Made:
        for part in _portions(_elements(rest, family)):
            yield _DELSETELEM, 0, text(NAME, name) + attribute(_ELEMENTS, part)

    def _add_chain(self, family: Family, name: str, rest: str) -> Made:
        parts = [text(CHAIN_NAME, name)]
        if hook := _HEADER_TEXT.search(rest):
            place = number(1, HOOKS.index(hook[1])) + number(2, 0)
            parts += [attribute(CHAIN_HOOK, place), number(CHAIN_POLICY, 1), text(CHAIN_TYPE, "filter")]
        if comment := _COMMENT_TEXT.search(rest):
            parts.append(attribute(_CHAIN_USERDATA, comment_data(comment[1])))
        yield _NEWCHAIN, NLM_F_CREATE, b"".join(parts)

    def _flush_chain(self, family: Family, name: str, rest: str) -> Made:
        yield _DELRULE, 0, text(RULE_CHAIN, name)

    def _delete_chain(self, family: Family, name: str, rest: str) -> Made:
        yield _DELCHAIN, 0, text(CHAIN_NAME, name)

    def _add_rule(self, family: Family, name: str, rest: str) -> Made:
        code = compile_rule(rest, family)
        data = attribute(RULE_USERDATA, code.userdata) if code.userdata else b""
        expressions = attribute(RULE_EXPRESSIONS, code.expressions)
        yield _NEWRULE, NLM_F_CREATE | _APPEND, text(RULE_CHAIN, name) + expressions + data


_COMMANDS: dict[tuple[str, str], Callable[[Commands, Family, str, str], Made]] = {
    ("add", "table"): Commands._add_table,
    ("delete", "table"): Commands._delete_table,
    ("add", "set"): Commands._add_set,
    ("add", "map"): Commands._add_set,
    ("delete", "set"): Commands._delete_set,
    ("delete", "map"): Commands._delete_set,
    ("flush", "set"): Commands._flush_set,
    ("add", "element"): Commands._add_elements,
    ("delete", "element"): Commands._delete_elements,
    ("add", "chain"): Commands._add_chain,
    ("flush", "chain"): Commands._flush_chain,
    ("delete", "chain"): Commands._delete_chain,
    ("add", "rule"): Commands._add_rule,
}


def start(family: Family) -> bytes:
    """The header of a message about a family (``struct nfgenmsg``)."""
    return struct.pack("=BBH", AF[family], 0, 0)


def _key_type(words: str) -> tuple[int, int]:
    """Number and length of a type; of a concatenation, its fields six bits and four bytes each."""
    unknown = [word for word in words.split(" . ") if word not in TYPES]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no type that is known here")
    fields = [TYPES[word] for word in words.split(" . ")]
    if len(fields) == 1:
        return fields[0]
    kind = 0
    for number_, _ in fields:
        kind = kind << 6 | number_
    return kind, sum((length + 3) & ~3 for _, length in fields)


def _elements(rest: str, family: Family) -> Iterator[bytes]:
    """The elements of ``{ a, b }``: keys, keys with a verdict, or networks (an interval is two elements)."""
    items = rest.removeprefix("{ ").removesuffix(" }").split(", ")
    if "/" in items[0].partition(" ")[0]:
        yield from block_edges(items, family)
        return
    for item in items:
        if " " not in item:
            yield key_element(pack_member(item, family))
            continue
        found = _ELEMENT_TEXT.fullmatch(item)
        if found is None:
            raise ValueError(f"{item!r} is no element")
        value = attribute(_ELEM_DATA, attribute(2, verdict(found[3], found[4] or ""))) if found[3] else b""
        data = attribute(_ELEM_USERDATA, comment_data(found[2])) if found[2] else b""
        yield key_element(_pack_fields(found[1], family), value + data)


def _pack_fields(words: str, family: Family) -> Key:
    first, *rest = words.split(" . ")
    if not rest:
        return pack_member(first, family)
    if len(rest) == 2:
        return pack_member(f"{first},{rest[0]}:{rest[1]}", family)
    return pack_member(first, family) + pack_member(rest[0], family)


def _portions(elements: Iterable[bytes]) -> Iterator[bytes]:
    """Elements in parts of what one attribute can hold."""
    part: list[bytes] = []
    size = 0
    for element in elements:
        if size + len(element) > MESSAGE_BYTES:
            yield b"".join(part)
            part, size = [], 0
        part.append(element)
        size += len(element)
    if part:
        yield b"".join(part)
