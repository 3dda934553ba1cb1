"""The kernel's nftables machine in small: runs the expressions of dumped rules for one packet of a new connection.

Pure. It knows registers, sets and verdicts, and nothing of who wrote the rules: what is loaded, looked up and done is
read from the bytes that the kernel gave back. What chooses by turns or by a hash is told what to choose, so that every
choice can be tried. An expression that it does not know is an error.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from kube_router.workers.model import Family
from kube_router.workers.nfttypes import CodedChain, Element, ElementData, SetShape, key_length

NUMBERS = {"icmp": 1, "tcp": 6, "udp": 17, "ipv6-icmp": 58, "sctp": 132}
_JUMP, _GOTO, _RETURN, _CONTINUE = -3, -4, -5, -1
_WORDS = {0: "drop", 1: "accept"}


class MachineError(AssertionError):
    """Bytes that the kernel would refuse, or that the machine does not know."""


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and value of each netlink attribute."""
    while data:
        length, kind = struct.unpack_from("=HH", data)
        if not 4 <= length <= len(data):
            raise MachineError("attributes end in the middle of one")
        yield kind & 0x3FFF, data[4:length]
        data = data[(length + 3) & ~3 :]


def number(value: bytes) -> int:
    """A 32-bit attribute in network order."""
    return int.from_bytes(value, "big", signed=True)


@dataclass
class Table:
    """A table as it was read. ``sets``: by name, shape and elements."""

    family: Family
    chains: Mapping[str, CodedChain]
    sets: Mapping[str, tuple[SetShape, dict[bytes, ElementData]]]

    def find(self, name: str, key: bytes) -> ElementData | None:
        """The data of a key, empty for a set; None if it is not in there."""
        shape, elements = self.sets[name]
        if not shape.interval:
            return elements.get(key)
        parts = [*_fields(shape)]
        for first, last in elements.items():
            assert isinstance(last, bytes)
            if all(first[a:b] <= key[a:b] <= last[a:b] for a, b in parts):
                return b""
        return None


def _fields(shape: SetShape) -> Iterator[tuple[int, int]]:
    at = 0
    for word in shape.key.split(" . "):
        yield at, at + key_length(word)
        at += key_length(word)


@dataclass
class Packet:
    """The first packet of a connection; ``way``: the hooks that it passes. ``turn``: what is chosen, by modulus."""

    source: str
    destination: str
    protocol: str
    port: int
    way: tuple[str, ...]
    source_port: int = 40000
    turn: int = 0
    local: frozenset[str] = frozenset()
    original: tuple[str, int] = field(init=False)
    translated: bool = False
    masqueraded: str = ""
    redirected: bool = False
    modulus: int = 1

    def __post_init__(self) -> None:
        self.original = (self.destination, self.port)


@dataclass(frozen=True)
class Fate:
    """What became of a packet: ``pass``, ``drop`` or ``reject``, and to whom it goes."""

    verdict: str
    target: tuple[str, int]
    translated: bool
    source: str
    redirected: bool


def run(table: Table, packet: Packet) -> Fate:
    """Lead a packet through all base chains of its hooks, by priority."""
    for hook in packet.way:
        bases = [chain for chain in table.chains.values() if chain.hook is not None and chain.hook.hook == hook]
        for base in sorted(bases, key=lambda chain: chain.hook.priority if chain.hook else 0):
            verdict = _Walk(table, packet).chain(base.name)
            if verdict in ("drop", "reject"):
                return _fate(verdict, packet)
    return _fate("pass", packet)


def _fate(verdict: str, packet: Packet) -> Fate:
    target = (packet.destination, packet.port)
    return Fate(verdict, target, packet.translated, packet.masqueraded or packet.source, packet.redirected)


def fates(table: Table, make: object) -> set[Fate]:
    """Every fate that chance or a hash may give; ``make`` is a function that gives the same packet anew."""
    found, turn, modulus = set(), 0, 1
    while turn < modulus:
        packet = make()  # type: ignore[operator]
        packet.turn = turn
        found.add(run(table, packet))
        turn, modulus = turn + 1, max(modulus, packet.modulus)
    return found


class _Walk:
    """One packet in one base chain."""

    def __init__(self, table: Table, packet: Packet) -> None:
        self.table, self.packet = table, packet
        self.registers = bytearray(80)
        self.size = table.family.bits // 8

    def chain(self, name: str, depth: int = 0) -> str:
        """``accept``, ``drop``, ``reject``, or empty at the chain's end."""
        if depth > 15:
            raise MachineError("chains are nested too deep")
        for rule in self.table.chains[name].rules:
            verdict, target = self.rule(rule)
            if verdict == "jump":
                verdict = self.chain(target, depth + 1)
            elif verdict == "goto":
                return self.chain(target, depth + 1)
            elif verdict == "return":
                return ""
            if verdict:
                return verdict
        return ""

    def rule(self, code: bytes) -> tuple[str, str]:
        self.registers = bytearray(b"\xee" * 80)
        for _, element in attributes(code):
            parts = dict(attributes(element))
            name = parts[1].rstrip(b"\0").decode()
            act = getattr(self, f"on_{name}", None)
            if act is None:
                raise MachineError(f"expression {name} is not known")
            done = act(dict(attributes(parts.get(2, b""))))
            if done is not None:
                return done  # type: ignore[no-any-return]
        return "", ""

    # registers: 1 to 4 are of 16 bytes, 8 and above of 4, in the same place

    @staticmethod
    def place(register: bytes) -> int:
        value = number(register)
        return 4 * (value - 8) if value >= 8 else 16 * (value - 1)

    def load(self, register: bytes, value: bytes) -> None:
        at = self.place(register)
        padded = value + bytes(-len(value) % 4)
        self.registers[at : at + len(padded)] = padded

    def read(self, register: bytes, length: int) -> bytes:
        at = self.place(register)
        return bytes(self.registers[at : at + length])

    # expressions; ("", "") ends the rule without a verdict

    def on_payload(self, said: dict[int, bytes]) -> tuple[str, str] | None:
        base, offset, length = (number(said[kind]) for kind in (2, 3, 4))
        packet, start = self.packet, 12 if self.size == 4 else 8
        if base == 1:
            header = bytes(start) + ip_address(packet.source).packed + ip_address(packet.destination).packed
        elif packet.protocol in ("icmp", "ipv6-icmp"):
            header = bytes([8 if packet.protocol == "icmp" else 128, 0, 0, 0])
        else:
            header = struct.pack("!HH", packet.source_port, packet.port)
        self.load(said[1], header[offset : offset + length])
        return None

    def on_meta(self, said: dict[int, bytes]) -> None:
        if number(said[2]) != 16:
            raise MachineError("meta: only the protocol is known")
        self.load(said[1], bytes([NUMBERS[self.packet.protocol]]))

    def on_ct(self, said: dict[int, bytes]) -> None:
        key, packet = number(said[2]), self.packet
        values = {
            0: struct.pack("=I", 8),
            2: struct.pack("=I", 0x20 if packet.translated else 0),
            12: struct.pack("!H", packet.original[1]),
        }
        values |= dict.fromkeys((19, 21), ip_address(packet.source).packed)
        values |= dict.fromkeys((20, 22), ip_address(packet.original[0]).packed)
        self.load(said[1], values[key])

    def on_cmp(self, said: dict[int, bytes]) -> tuple[str, str] | None:
        wanted = dict(attributes(said[3]))[1]
        equal = self.read(said[1], len(wanted)) == wanted
        return None if equal is (number(said[2]) == 0) else ("", "")

    def on_bitwise(self, said: dict[int, bytes]) -> None:
        mask, xor = (dict(attributes(said[kind]))[1] for kind in (4, 5))
        value = self.read(said[1], len(mask))
        self.load(said[2], bytes((a & b) ^ c for a, b, c in zip(value, mask, xor, strict=True)))

    def on_fib(self, said: dict[int, bytes]) -> None:
        self.load(said[1], struct.pack("=I", 2 if self.packet.destination in self.packet.local else 1))

    def on_numgen(self, said: dict[int, bytes]) -> None:
        self.choose(said[1], number(said[2]), number(said[4]))

    def on_hash(self, said: dict[int, bytes]) -> None:
        self.choose(said[2], number(said[4]), number(said[6]) if 6 in said else 0)

    def choose(self, register: bytes, modulus: int, offset: int) -> None:
        self.packet.modulus = max(self.packet.modulus, modulus)
        self.load(register, struct.pack("=I", self.packet.turn % modulus + offset))

    def on_lookup(self, said: dict[int, bytes]) -> tuple[str, str] | None:
        name = said[1].rstrip(b"\0").decode()
        shape, _ = self.table.sets[name]
        found = self.table.find(name, self.read(said[2], key_length(shape.key)))
        inverted = bool(number(said.get(5, bytes(4))) & 1)
        if (found is None) is not inverted:
            return "", ""
        if 3 not in said or found is None:
            return None
        if isinstance(found, str):
            return "jump", found
        self.load(said[3], found)
        return None

    def on_immediate(self, said: dict[int, bytes]) -> tuple[str, str] | None:
        data = dict(attributes(said[2]))
        if 1 in data:
            self.load(said[1], data[1])
            return None
        verdict = dict(attributes(data[2]))
        code = number(verdict[1])
        if code in (_JUMP, _GOTO):
            return "jump" if code == _JUMP else "goto", verdict[2].rstrip(b"\0").decode()
        return ("return", "") if code == _RETURN else (_WORDS[code], "")

    def on_reject(self, said: dict[int, bytes]) -> tuple[str, str]:
        if number(said[1]) == 1 and self.packet.protocol != "tcp":
            raise MachineError("only TCP can be reset")
        return "reject", ""

    def on_nat(self, said: dict[int, bytes]) -> tuple[str, str]:
        address = str(ip_address(self.read(said[3], self.size)))
        if number(said[1]) == 0:
            self.packet.masqueraded = address
        else:
            self.packet.destination = address
            self.packet.port = int.from_bytes(self.read(said[5], 2), "big")
            self.packet.translated = True
        return "accept", ""

    def on_masq(self, said: dict[int, bytes]) -> tuple[str, str]:
        self.packet.masqueraded = "masqueraded"
        return "accept", ""

    def on_redir(self, said: dict[int, bytes]) -> tuple[str, str]:
        self.packet.redirected = self.packet.translated = True
        return "accept", ""

    def on_dynset(self, said: dict[int, bytes]) -> None:
        """What is remembered is another packet's business."""


Read = tuple[SetShape, Iterable[Element]]
"""A set and what was read of it."""


def table_of(family: Family, chains: Mapping[str, CodedChain], sets: Iterable[Read]) -> Table:
    """A table from what was read of it."""
    return Table(family, chains, {shape.name: (shape, dict(elements)) for shape, elements in sets})
