"""Rules of address translation as the kernel holds them: what they say in nftables' words, and their expressions.

Pure. Each function gives one part of a rule; `rule` joins them. The bytes are in the form in which the kernel dumps
them, so that what stands is compared with what should by a look. The words are those in which ``nft`` lists the rule
(tests/kernel/test_proxy_rules.py holds both against the program and the kernel). Numbers after
``include/uapi/linux/netfilter/nf_tables.h``.

A concatenation lies in registers of four bytes, each field at the next one; results of maps take its place.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from kube_router.workers.model import Family
from kube_router.workers.nftcode import attribute, number, text, verdict

FIRST = 8
"""Number of the first register of four bytes."""
_NETWORK, _TRANSPORT = 1, 2
_OFFSETS = {Family.IPV4: {"saddr": 12, "daddr": 16}, Family.IPV6: {"saddr": 8, "daddr": 24}}
_L4PROTO = 16
_CT_STATE, _CT_STATUS, _CT_PROTO_DST = 0, 2, 12
_CT_ADDRESS = {
    Family.IPV4: {"saddr": 19, "daddr": 20},
    Family.IPV6: {"saddr": 21, "daddr": 22},
}
_ORIGINAL = 0
_NEW, _DNAT_STATUS = 8, 0x20
_EQ, _NEQ = 0, 1
_IP = {Family.IPV4: "ip", Family.IPV6: "ip6"}
_NFPROTO = {Family.IPV4: 2, Family.IPV6: 10}
_SNAT, _DNAT = 0, 1
_MAP_IPS, _PROTO_SPECIFIED, _FULLY_RANDOM = 1, 2, 16
_INCREMENTAL, _JHASH = 0, 0
_UPDATE = 1
_FIB_DADDR, _FIB_TYPE, _LOCAL = 2, 3, 2
_UNREACHABLE = {Family.IPV4: 3, Family.IPV6: 4}
_ECHO_REQUEST = {Family.IPV4: ("icmp", 1, 8), Family.IPV6: ("icmpv6", 58, 128)}


class Rule(NamedTuple):
    """A rule: what it says, and its expressions."""

    words: str
    code: bytes


class Part(NamedTuple):
    """Part of a rule."""

    words: str
    code: bytes


def rule(*parts: Part) -> Rule:
    """The whole of its parts."""
    return Rule(" ".join(part.words for part in parts if part.words), b"".join(part.code for part in parts))


def words_of(family: Family) -> int:
    """Registers that an address of a family takes."""
    return family.bits // 32


def _register(register: int) -> int:
    """A register as the kernel dumps it: every fourth by its old number."""
    return register if register % 4 else register // 4 - 1


def _expression(name: str, *attributes: bytes) -> bytes:
    return attribute(1, text(1, name) + attribute(2, b"".join(attributes)))


def _payload(base: int, offset: int, length: int, register: int) -> bytes:
    return _expression("payload", number(1, register), number(2, base), number(3, offset), number(4, length))


def _meta(key: int, register: int) -> bytes:
    return _expression("meta", number(2, key), number(1, register))


def _ct(key: int, register: int, *, directed: bool = True) -> bytes:
    direction = attribute(3, bytes([_ORIGINAL])) if directed else b""
    return _expression("ct", number(1, register), number(2, key), direction)


def _compare(operator: int, value: bytes) -> bytes:
    return _expression("cmp", number(1, 1), number(2, operator), attribute(3, attribute(1, value)))


def _masked(mask: bytes) -> bytes:
    parts = (number(1, 1), number(2, 1), number(3, len(mask)), number(6, 0))
    return _expression(
        "bitwise", *parts, attribute(4, attribute(1, mask)), attribute(5, attribute(1, bytes(len(mask))))
    )


def _host(value: int) -> bytes:
    return struct.pack("=I", value)


class Field(NamedTuple):
    """One field of a key: its words, the registers that it takes, and how it is loaded into one."""

    words: str
    registers: int
    load: Callable[[int], bytes]


def address(family: Family, side: str) -> Field:
    """``ip saddr`` or ``ip daddr`` of the packet."""
    offset, size = _OFFSETS[family][side], family.bits // 8
    return Field(
        f"{_IP[family]} {side}", size // 4, lambda register: _payload(_NETWORK, offset, size, _register(register))
    )


PROTOCOL = Field("meta l4proto", 1, lambda register: _meta(_L4PROTO, _register(register)))
PORT = Field("th dport", 1, lambda register: _payload(_TRANSPORT, 2, 2, _register(register)))
SOURCE_PORT = Field("th sport", 1, lambda register: _payload(_TRANSPORT, 0, 2, _register(register)))
ORIGINAL_PORT = Field("ct original proto-dst", 1, lambda register: _ct(_CT_PROTO_DST, _register(register)))


def original_address(family: Family, side: str) -> Field:
    """``ct original ip saddr`` or ``daddr``: as the connection was opened."""
    key = _CT_ADDRESS[family][side]
    return Field(f"ct original {_IP[family]} {side}", family.bits // 32, lambda at: _ct(key, _register(at)))


def counted(modulus: int, offset: int) -> Field:
    """The next number of ``offset`` … ``offset + modulus - 1``, by turns."""
    words = f"numgen inc mod {modulus}" + (f" offset {offset}" if offset else "")
    return Field(
        words,
        1,
        lambda at: _expression(
            "numgen", number(1, _register(at)), number(2, modulus), number(3, _INCREMENTAL), number(4, offset)
        ),
    )


def hashed(fields: Sequence[Field], modulus: int, seed: int, offset: int) -> Field:
    """A number of ``offset`` … ``offset + modulus - 1`` that hangs on ``fields`` alone, the same on every node."""
    words = f"jhash {' . '.join(field.words for field in fields)} mod {modulus} seed {seed:#x}"
    words += f" offset {offset}" if offset else ""
    length = 4 * sum(field.registers for field in fields)

    def load(at: int) -> bytes:
        # Behind everything else, where an address of 16 bytes is aligned.
        scratch = FIRST + (at - FIRST + 4) // 4 * 4
        code, _ = _loaded(fields, scratch)
        numbers = [number(1, _register(scratch)), number(2, _register(at)), number(3, length), number(4, modulus)]
        tail = [number(5, seed), *([number(6, offset)] if offset else []), number(7, _JHASH)]
        return code + _expression("hash", *numbers, *tail)

    return Field(words, 1, load)


def _loaded(fields: Iterable[Field], at: int = FIRST) -> tuple[bytes, int]:
    """The code that loads fields one behind the other, and the next free register."""
    code = b""
    for field in fields:
        code += field.load(at)
        at += field.registers
    return code, at


def _concatenated(fields: Iterable[Field]) -> str:
    return " . ".join(field.words for field in fields)


def is_in(fields: Sequence[Field], name: str, *, negated: bool = False) -> Part:
    """Only packets whose fields are, or are not, in a set."""
    code, _ = _loaded(fields)
    look = _expression("lookup", text(1, name), number(2, 1), number(5, _NEQ if negated else _EQ))
    return Part(f"{_concatenated(fields)} {'!= ' if negated else ''}@{name}", code + look)


def by_map(fields: Sequence[Field], name: str) -> Part:
    """The verdict of a map; packets that are not in it go on."""
    code, _ = _loaded(fields)
    look = _expression("lookup", text(1, name), number(2, 1), number(3, 0), number(5, _EQ))
    return Part(f"{_concatenated(fields)} vmap @{name}", code + look)


def dnat(family: Family, fields: Sequence[Field], name: str) -> Part:
    """Translate the destination to the address and port that a map has; packets that are not in it go on."""
    code, _ = _loaded(fields)
    look = _expression("lookup", text(1, name), number(2, 1), number(3, 1), number(5, _EQ))
    port = _register(FIRST + words_of(family))
    registers = (number(3, 1), number(4, 1), number(5, port), number(6, port))
    flags = number(7, _MAP_IPS | _PROTO_SPECIFIED)
    action = _expression("nat", number(1, _DNAT), number(2, _NFPROTO[family]), *registers, flags)
    return Part(f"dnat {_IP[family]} to {_concatenated(fields)} map @{name}", code + look + action)


def _snat(family: Family, source: bytes, words: str, flags: int) -> Part:
    registers = (number(3, 1), number(4, 1))
    action = _expression("nat", number(1, _SNAT), number(2, _NFPROTO[family]), *registers, number(7, flags))
    return Part(words, source + action)


def snat(family: Family, address_: bytes) -> Part:
    """Give the connection a source of this node; the port by chance, so that two nodes never choose alike."""
    load = _expression("immediate", number(1, 1), attribute(2, attribute(1, address_)))
    words = f"snat to {IPv6Address(address_) if family is Family.IPV6 else IPv4Address(address_)} fully-random"
    return _snat(family, load, words, _MAP_IPS | _FULLY_RANDOM)


def snat_to_original(family: Family) -> Part:
    """Give the connection the address for a source that it was opened to."""
    field = original_address(family, "daddr")
    return _snat(family, field.load(FIRST), f"snat to {field.words}", _MAP_IPS)


MASQUERADE = Part("masquerade fully-random", _expression("masq", number(1, _FULLY_RANDOM)))
REDIRECT = Part("redirect", _expression("redir"))
DROP = Part("drop", _expression("immediate", number(1, 0), attribute(2, attribute(2, verdict("drop")))))


def jump(chain: str) -> Part:
    """Go through a chain, and come back."""
    value = attribute(2, attribute(2, verdict("jump", chain)))
    return Part(f"jump {chain}", _expression("immediate", number(1, 0), value))


def update(fields: Sequence[Field], name: str, seconds: int, data: Sequence[Field]) -> Part:
    """Enter fields with their data into a map, or let the entry that is there live on for so long."""
    code, after = _loaded(fields)
    more, _ = _loaded(data, after)
    action = _expression(
        "dynset",
        number(4, 1),
        number(5, _register(after)),
        number(3, _UPDATE),
        text(1, name),
        attribute(6, struct.pack("!Q", seconds * 1000)),
        number(9, 0),
    )
    words = f"update @{name} {{ {_concatenated(fields)} timeout {_span(seconds)} : {_concatenated(data)} }}"
    return Part(words, code + more + action)


def _span(seconds: int) -> str:
    """As nftables writes it."""
    parts = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def _bit_of(load: bytes, bit: int, words: str) -> Part:
    return Part(words, load + _masked(_host(bit)) + _compare(_NEQ, bytes(4)))


STATE_NEW = _bit_of(_ct(_CT_STATE, 1, directed=False), _NEW, "ct state new")
STATUS_DNAT = _bit_of(_ct(_CT_STATUS, 1, directed=False), _DNAT_STATUS, "ct status dnat")
RESET = Part("reject with tcp reset", _meta(_L4PROTO, 1) + _compare(_EQ, b"\x06") + _expression("reject", number(1, 1)))
"""Of TCP packets; all others go on."""


def unreachable(family: Family) -> Part:
    """Tell the sender that nobody listens on this port."""
    return Part("reject", _expression("reject", number(1, 0), attribute(2, bytes([_UNREACHABLE[family]]))))


def echo_request(family: Family) -> Part:
    """Only pings."""
    word, protocol, kind = _ECHO_REQUEST[family]
    code = _meta(_L4PROTO, 1) + _compare(_EQ, bytes([protocol])) + _payload(_TRANSPORT, 0, 1, 1)
    return Part(f"{word} type echo-request", code + _compare(_EQ, bytes([kind])))


def to_this_host() -> Part:
    """Only packets for an address of this host, whichever."""
    load = _expression("fib", number(1, 1), number(2, _FIB_TYPE), number(3, _FIB_DADDR))
    return Part("fib daddr type local", load + _compare(_EQ, _host(_LOCAL)))


def is_not_loopback(family: Family) -> Part:
    """Not to 127.0.0.0/8 or ::1, from where nothing can be sent on."""
    if family is Family.IPV4:
        return Part("ip daddr != 127.0.0.0/8", _payload(_NETWORK, 16, 1, 1) + _compare(_NEQ, b"\x7f"))
    return Part("ip6 daddr != ::1", _payload(_NETWORK, 24, 16, 1) + _compare(_NEQ, bytes(15) + b"\x01"))
