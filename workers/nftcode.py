"""nftables rules as the kernel holds them: text in, expressions out; and what of a dumped rule tells it from others.

Pure. The grammar is that of the rules which the firewall writes, in the words in which ``nft`` lists them; anything
else is refused. The code is what ``nft`` makes of the same text (tests/kernel/test_nft.py compares them), attributes in
the order in which the kernel dumps them, so that what stands is compared with what should by a look at the bytes.
Numbers after ``include/uapi/linux/netfilter/nf_tables.h``.
"""

from __future__ import annotations

import functools
import ipaddress
import struct
from collections.abc import Iterator
from typing import NamedTuple

from kube_router.workers.model import Family

_HEADER = struct.Struct("=HH")

_EQ, _NEQ, _LTE, _GTE = 0, 1, 3, 5
_NETWORK, _TRANSPORT = 1, 2
_L4PROTO, _MARK = 16, 3
_REGISTER = 1
_ACCEPT, _DROP, _RETURN, _GOTO, _JUMP = 1, 0, -5 & 0xFFFFFFFF, -4 & 0xFFFFFFFF, -3 & 0xFFFFFFFF
_VERDICTS = {"accept": _ACCEPT, "drop": _DROP, "return": _RETURN}
_OFFSETS = {Family.IPV4: {"saddr": 12, "daddr": 16}, Family.IPV6: {"saddr": 8, "daddr": 24}}
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
_STATES = {"invalid": 1, "established": 2, "related": 4, "new": 8}
_FIB = {"saddr": 1, "daddr": 2}
_FIB_TYPE, _LOCAL = 3, 2
_ICMP_PROTOCOL = {"icmp": 1, "icmpv6": 58}
_ICMP_TYPES = {
    "icmp": {"echo-request": 8, "destination-unreachable": 3, "time-exceeded": 11},
    "icmpv6": {
        "echo-request": 128,
        "echo-reply": 129,
        "destination-unreachable": 1,
        "time-exceeded": 3,
        "nd-neighbor-solicit": 135,
        "nd-neighbor-advert": 136,
    },
}
_FLAGS = {"fin": 1, "syn": 2, "rst": 4, "ack": 16}
_UNREACHABLE = {Family.IPV4: 3, Family.IPV6: 4}
_UNITS = {"second": 1, "minute": 60, "hour": 3600}

_KEPT = {
    "payload": {1, 2, 3, 4, 5},
    "lookup": {1, 2, 3, 5},
    "cmp": {1, 2, 3},
    "bitwise": {1, 2, 3, 4, 5, 6},
    "meta": {1, 2, 3},
    "ct": {1, 2, 3, 4},
    "fib": {1, 2, 3},
    "limit": {1, 2, 3, 4, 5},
    "log": {1, 2, 3, 4, 5, 6},
    "immediate": {1, 2},
    "reject": {1, 2},
}
"""Attributes that say what an expression does; a newer kernel may dump more of them."""


class Code(NamedTuple):
    """A rule: its expressions, and the user data that hold its comment; in the kernel's bytes."""

    expressions: bytes
    userdata: bytes = b""


def attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded."""
    return _HEADER.pack(4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def text(kind: int, value: str) -> bytes:
    """A NUL-terminated attribute."""
    return attribute(kind, value.encode() + b"\0")


def number(kind: int, value: int) -> bytes:
    """A 32-bit attribute in network order, as nearly all of nftables' are."""
    return struct.pack("=HH", 8, kind) + value.to_bytes(4, "big")


def userdata_item(kind: int, value: bytes) -> bytes:
    """One item of the user data that nft keeps with an object: type, length, value."""
    return bytes([kind, len(value)]) + value


def comment_data(comment: str, kind: int = 0) -> bytes:
    """User data with a comment; ``kind`` depends on the object."""
    return userdata_item(kind, comment.encode() + b"\0") if comment else b""


def verdict(word: str, chain: str = "") -> bytes:
    """The value of a verdict: ``accept``, ``drop``, ``return``, or ``jump`` and ``goto`` with a chain."""
    if word in _VERDICTS:
        return number(1, _VERDICTS[word])
    return number(1, _JUMP if word == "jump" else _GOTO) + text(2, chain)


@functools.lru_cache(512)  # the rules of the frame, and those that many chains share
def compile_rule(rule: str, family: Family) -> Code:
    """The code of a rule. ValueError for one that is not of this grammar."""
    words, _, comment = rule.partition(' comment "')
    if not words:
        raise ValueError("a rule without words")
    try:
        code = b"".join(_Reader(words, family).read())
    except (struct.error, OverflowError) as error:
        raise ValueError(f"{rule!r}: {error}") from error
    return Code(code, comment_data(comment.removesuffix('"')))


def _expression(name: str, *attributes: bytes) -> bytes:
    return attribute(1, text(1, name) + attribute(2, b"".join(attributes)))


# Thousands of rules are made of the same few of these.


@functools.lru_cache(256)
def _payload(base: int, offset: int, length: int, register: int = _REGISTER) -> bytes:
    return _expression("payload", number(1, register), number(2, base), number(3, offset), number(4, length))


@functools.lru_cache(256)
def _compare(operator: int, value: bytes) -> bytes:
    return _expression("cmp", number(1, _REGISTER), number(2, operator), attribute(3, attribute(1, value)))


@functools.lru_cache(256)
def _bitwise(mask: bytes, xor: bytes) -> bytes:
    return _expression(
        "bitwise",
        number(1, _REGISTER),
        number(2, _REGISTER),
        number(3, len(mask)),
        number(6, 0),
        attribute(4, attribute(1, mask)),
        attribute(5, attribute(1, xor)),
    )


@functools.lru_cache(256)
def _load_meta(key: int, register: int = _REGISTER) -> bytes:
    return _expression("meta", number(2, key), number(1, register))


def _host(value: int) -> bytes:
    """A 32-bit value that the kernel holds in its own byte order, like a mark."""
    return struct.pack("=I", value)


class _Reader:
    """Reads the words of one rule and gives its expressions, one statement after the other."""

    def __init__(self, words: str, family: Family) -> None:
        self._words, self._family = words.split(), family
        self._at, self._known = 0, -1
        self._ip = "ip6" if family is Family.IPV6 else "ip"

    def read(self) -> Iterator[bytes]:
        """The code of each statement."""
        while self._at < len(self._words):
            yield self._statement(self._take())

    def _take(self, *expected: str) -> str:
        if self._at >= len(self._words):
            raise ValueError(f"{' '.join(self._words)!r} ends too early")
        word = self._words[self._at]
        if expected and word not in expected:
            raise ValueError(f"{' '.join(self._words)!r}: {word!r} is none of {', '.join(expected)}")
        self._at += 1
        return word

    def _next_is(self, *words: str) -> bool:
        """Whether these words come next; then they are taken."""
        if tuple(self._words[self._at : self._at + len(words)]) != words:
            return False
        self._at += len(words)
        return True

    def _operator(self) -> int:
        return _NEQ if self._next_is("!=") else _EQ

    def _statement(self, word: str) -> bytes:
        if word == "counter":
            return _COUNTER
        if word in _VERDICTS:
            return self._verdict(verdict(word))
        if word in ("jump", "goto"):
            return self._verdict(verdict(word, self._take()))
        if word == self._ip:
            return self._address(self._take("saddr", "daddr"))
        if word == "meta":
            return self._meta()
        if word in PROTOCOLS:
            return self._transport(word)
        if word in _ICMP_PROTOCOL:
            return self._icmp(word)
        simple = {"fib": self._fib, "ct": self._state, "reject": self._reject, "limit": self._limit, "log": self._log}
        if word in simple:
            return simple[word]()
        raise ValueError(f"{' '.join(self._words)!r}: {word!r} is not known")

    @staticmethod
    def _verdict(value: bytes) -> bytes:
        return _expression("immediate", number(1, 0), attribute(2, attribute(2, value)))

    def _load(self, side: str, length: int, register: int = _REGISTER) -> bytes:
        return _payload(_NETWORK, _OFFSETS[self._family][side], length, register)

    def _address(self, side: str) -> bytes:
        size = self._family.bits // 8
        load = self._load(side, size)
        if self._next_is("."):
            return load + self._more_fields(size)
        if self._next_is("vmap"):
            return load + self._lookup(self._take(), _EQ, vmap=True)
        operator = self._operator()
        word = self._take()
        if word.startswith("@"):
            return load + self._lookup(word, operator)
        return self._network(side, operator, ipaddress.ip_network(word))

    def _network(self, side: str, operator: int, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bytes:
        if network.version != self._family:
            raise ValueError(f"{network} is not {self._family}")
        packed, size = network.network_address.packed, self._family.bits // 8
        whole, rest = divmod(network.prefixlen, 8)
        if rest or not whole:
            mask = _bitwise(network.netmask.packed, bytes(size))
            return self._load(side, size) + mask + _compare(operator, packed)
        return self._load(side, whole) + _compare(operator, packed[:whole])

    def _more_fields(self, size: int) -> bytes:
        """The other fields of a concatenation; each begins at the next register of four bytes."""
        # Registers of four bytes are numbered from 8; the kernel dumps every fourth by its old number.
        following = 8 + size // 4
        register = _register(following)
        if self._next_is(self._ip, "daddr"):
            fields = self._load("daddr", size, register)
        else:
            for word in ("meta", "l4proto", ".", "th", "dport"):
                self._take(word)
            fields = _load_meta(_L4PROTO, register) + _payload(_TRANSPORT, 2, 2, _register(following + 1))
        return fields + self._lookup(self._take(), self._operator())

    @staticmethod
    def _lookup(word: str, operator: int, *, vmap: bool = False) -> bytes:
        if not word.startswith("@"):
            raise ValueError(f"{word!r} is no set")
        into = number(3, 0) if vmap else b""
        return _expression("lookup", text(1, word[1:]), number(2, _REGISTER), into, number(5, operator))

    def _protocol(self, value: int) -> bytes:
        if value == self._known:  # nft asks once
            return b""
        self._known = value
        return _load_meta(_L4PROTO) + _compare(_EQ, bytes([value]))

    def _transport(self, protocol: str) -> bytes:
        start = self._protocol(PROTOCOLS[protocol])
        if self._take("dport", "flags") == "flags":
            return start + self._tcp_flags()
        load = start + _payload(_TRANSPORT, 2, 2)
        word = self._take()
        if word.startswith("@"):
            return load + self._lookup(word, _EQ)
        first, _, last = word.partition("-")
        if not last:
            return load + _compare(_EQ, struct.pack("!H", int(first)))
        return load + _compare(_GTE, struct.pack("!H", int(first))) + _compare(_LTE, struct.pack("!H", int(last)))

    def _tcp_flags(self) -> bytes:
        operator = self._operator()
        value = _FLAGS[self._take(*_FLAGS)]
        self._take("/")
        mask = sum(_FLAGS[word] for word in self._take().split(","))
        return _payload(_TRANSPORT, 13, 1) + _bitwise(bytes([mask]), b"\0") + _compare(operator, bytes([value]))

    def _icmp(self, word: str) -> bytes:
        self._take("type")
        kinds = _ICMP_TYPES[word]
        kind = kinds[self._take(*kinds)]
        return self._protocol(_ICMP_PROTOCOL[word]) + _payload(_TRANSPORT, 0, 1) + _compare(_EQ, bytes([kind]))

    def _meta(self) -> bytes:
        if self._next_is("l4proto"):
            return self._protocol(PROTOCOLS[self._take(*PROTOCOLS)])
        self._take("mark")
        if self._next_is("set", "meta", "mark"):
            operator = self._take("&", "|")
            value = int(self._take(), 16)
            mask, xor = (value, 0) if operator == "&" else (value ^ 0xFFFFFFFF, value)
            setting = _expression("meta", number(2, _MARK), number(3, _REGISTER))
            return _load_meta(_MARK) + _bitwise(_host(mask), _host(xor)) + setting
        self._take("&")
        mask = int(self._take(), 16)
        self._take("==")
        return _load_meta(_MARK) + _bitwise(_host(mask), _host(0)) + _compare(_EQ, _host(int(self._take(), 16)))

    def _fib(self) -> bytes:
        side = _FIB[self._take(*_FIB)]
        self._take("type")
        operator = self._operator()
        self._take("local")
        load = _expression("fib", number(1, _REGISTER), number(2, _FIB_TYPE), number(3, side))
        return load + _compare(operator, _host(_LOCAL))

    def _state(self) -> bytes:
        self._take("state")
        words = self._take().split(",")
        if not {*words} <= _STATES.keys():
            raise ValueError(f"{words} are no states of connections")
        mask = sum(_STATES[word] for word in words)
        load = _expression("ct", number(1, _REGISTER), number(2, 0))
        return load + _bitwise(_host(mask), _host(0)) + _compare(_NEQ, _host(0))

    def _reject(self) -> bytes:
        if self._next_is("with", "tcp", "reset"):
            return self._protocol(PROTOCOLS["tcp"]) + _expression("reject", number(1, 1))
        return _expression("reject", number(1, 0), attribute(2, bytes([_UNREACHABLE[self._family]])))

    def _limit(self) -> bytes:
        self._take("rate")
        rate, _, unit = self._take().partition("/")
        self._take("burst")
        burst = int(self._take())
        self._take("packets")
        return _expression(
            "limit",
            attribute(1, struct.pack("!Q", int(rate))),
            attribute(2, struct.pack("!Q", _UNITS[unit])),
            number(3, burst),
            number(4, 0),
            number(5, 0),
        )

    def _log(self) -> bytes:
        self._take("group")
        return _expression("log", attribute(1, struct.pack("!H", int(self._take()))))


def _register(number_of_four: int) -> int:
    """A register of four bytes as the kernel dumps it."""
    return number_of_four if number_of_four % 4 else number_of_four // 4 - 1


_COUNTER_START = text(1, "counter")
_COUNTER = _expression("counter", attribute(1, bytes(8)), attribute(2, bytes(8)))
_COUNTER_DATA = _COUNTER[4 + len(_COUNTER_START) :]


def without_counts(expressions: bytes) -> bytes:
    """Dumped expressions with their counters at zero, as they are compiled."""
    at = expressions.find(_COUNTER_START)
    while at >= 0:
        start = at + len(_COUNTER_START)
        end = start + len(_COUNTER_DATA)
        expressions = expressions[:start] + _COUNTER_DATA + expressions[end:]
        at = expressions.find(_COUNTER_START, end)
    return expressions


def canonical(expressions: bytes) -> bytes:
    """Dumped expressions as they would be compiled, whatever else this kernel tells of them."""
    parts = []
    for _, element in _attributes(expressions):
        found = dict(_attributes(element))
        name = found.get(1, b"").split(b"\0", 1)[0].decode("utf-8", "replace")
        data = found.get(2, b"")
        if name == "counter":
            parts.append(_COUNTER)
        elif name in _KEPT:
            kept = (attribute(kind, value) for kind, value in _attributes(data) if kind in _KEPT[name])
            parts.append(_expression(name, *kept))
        else:
            parts.append(_expression(name, data))
    return b"".join(parts)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset, end = 0, len(data)
    while end - offset >= 4:
        length, kind = _HEADER.unpack_from(data, offset)
        if length < 4 or length > end - offset:
            return
        yield kind & 0x3FFF, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
