"""A strict nftables in memory: the text of ``nft list table`` in, a packet's way out.

Pure. It knows the expressions and statements that our tables are made of, with the kernel's semantics, and refuses all
others, as it refuses what the kernel refuses: missing chains and sets, keys of the wrong type, overlapping intervals,
chains nested too deep. `tests/kernel/test_walkers.py` holds it against the real kernel.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

from support.walk import (
    DEPTH,
    HOOKS,
    PORT_PROTOCOLS,
    Hook,
    Verdict,
    Walked,
    WalkError,
    WirePacket,
    depths,
)

from kube_router.workers.model import Family

KIND = {"ip": Family.IPV4, "ip6": Family.IPV6}
ADDRESS = {Family.IPV4: "ipv4_addr", Family.IPV6: "ipv6_addr"}
PROTOCOLS = {*PORT_PROTOCOLS, "icmp", "ipv6-icmp"}
ICMP = {
    "icmp": {"echo-reply": 0, "destination-unreachable": 3, "echo-request": 8, "time-exceeded": 11},
    "icmpv6": {
        "destination-unreachable": 1,
        "packet-too-big": 2,
        "time-exceeded": 3,
        "echo-request": 128,
        "echo-reply": 129,
        "nd-neighbor-solicit": 135,
        "nd-neighbor-advert": 136,
    },
}
LONGEST_NAME, LONGEST_COMMENT = 255, 127
_TOKEN = re.compile(r'"([^"]*)"|(==|!=|[{}&|=;,@])|([^\s{}&|=;,@"!]+)|\s+')
_END = "\n"

Values = tuple[str | int, ...]
Match = Callable[[WirePacket], bool]


class Word(str):
    """A token; ``quoted`` ones are texts, never words of the language."""

    __slots__ = ("quoted",)
    quoted: bool


def words(text: str) -> list[Word]:
    """The tokens of a listing; the end of a line and ``;`` are the same token."""
    found: list[Word] = []
    for line in text.splitlines():
        position = 0
        while position < len(line):
            match = _TOKEN.match(line, position)
            if not match:
                raise WalkError(f"{line!r} cannot be read from {line[position:]!r}")
            quoted = match[1] is not None
            token = match[1] if quoted else match[2] or match[3]
            if token is not None:
                made = Word(_END if token == ";" and not quoted else token)
                made.quoted = quoted
                found.append(made)
            position = match.end()
        end = Word(_END)
        end.quoted = False
        found.append(end)
    return found


# ------------------------------------------------------------------------------------------------------------- sets


@dataclass(slots=True)
class NftSet:
    """A set or verdict map. ``types``: of the fields of its key; ``verdicts`` is of a map."""

    name: str
    types: tuple[str, ...]
    interval: bool = False
    is_map: bool = False
    keys: set[Values] = field(default_factory=set)
    spans: list[tuple[int, int]] = field(default_factory=list)
    verdicts: dict[Values, tuple[str, str]] = field(default_factory=dict)

    def add(self, texts: list[str], verdict: tuple[str, str] | None) -> None:
        """Add an element; raises `WalkError` for what the kernel refuses."""
        if len(texts) != len(self.types) or (verdict is None) == self.is_map:
            raise WalkError(f"set {self.name}: {texts} is no element of type {self.types}")
        if self.interval:
            self._add_span(texts[0])
            return
        key = tuple(value_of(kind, text) for kind, text in zip(self.types, texts, strict=True))
        if key in self.keys:
            raise WalkError(f"set {self.name}: {texts} is there twice")
        self.keys.add(key)
        if verdict is not None:
            self.verdicts[key] = verdict

    def _add_span(self, text: str) -> None:
        first, dash, last = text.partition("-")
        try:
            network = ipaddress.ip_network(first)
            low, high = int(network[0]), int(ipaddress.ip_address(last)) if dash else int(network[-1])
        except ValueError as error:
            raise WalkError(f"set {self.name}: {error}") from error
        if ADDRESS[Family(network.version)] != self.types[0] or low > high:
            raise WalkError(f"set {self.name}: {text} is no element of type {self.types[0]}")
        if any(low <= end and start <= high for start, end in self.spans):
            raise WalkError(f"set {self.name}: {text} overlaps another interval")
        self.spans.append((low, high))

    def __contains__(self, key: Values) -> bool:
        if self.interval:
            value = int(ipaddress.ip_address(str(key[0])))
            return any(low <= value <= high for low, high in self.spans)
        return key in self.keys


def value_of(kind: str, text: str) -> str | int:
    """One field of a key, as packets are compared with it; raises `WalkError`."""
    if kind == "inet_service":
        return port(text)
    if kind == "inet_proto":
        if text not in PROTOCOLS:
            raise WalkError(f"unknown protocol {text!r}")
        return text
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise WalkError(str(error)) from error
    if ADDRESS[Family(address.version)] != kind:
        raise WalkError(f"{text} is no {kind}")
    return str(address)


def port(text: str) -> int:
    """A port by its number; raises `WalkError`."""
    if not text.isdigit() or int(text) > 65535:
        raise WalkError(f"{text!r} is no port")
    return int(text)


# ------------------------------------------------------------------------------------------------------------ rules


@dataclass(frozen=True, slots=True)
class Step:
    """One expression or statement. A match that does not hold ends the rule; ``act`` is what else happens."""

    act: str
    match: Match | None = None
    target: str = ""
    mask: int = 0xFFFFFFFF
    value: int = 0
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: its steps, in order."""

    text: str
    steps: tuple[Step, ...]


class _RuleReader:
    """Reads one rule's words into steps."""

    def __init__(self, tokens: list[Word], family: Family, sets: dict[str, NftSet]) -> None:
        self.tokens, self.family, self.sets = tokens, family, sets
        self.text = " ".join(f'"{token}"' if token.quoted else token for token in tokens)
        self.ip = "ip6" if family is Family.IPV6 else "ip"

    def fail(self, why: str) -> WalkError:
        return WalkError(f"rule {self.text!r}: {why}")

    def take(self, *expected: str) -> str:
        if not self.tokens:
            raise self.fail("it ends too early")
        word = self.tokens.pop(0)
        if expected and word not in expected:
            raise self.fail(f"{word!r} where one of {expected} was expected")
        return word

    def next_is(self, *expected: str) -> bool:
        if self.tokens and not self.tokens[0].quoted and self.tokens[0] in expected:
            self.tokens.pop(0)
            return True
        return False

    def number(self) -> int:
        word = self.take()
        try:
            return int(word, 0)
        except ValueError:
            raise self.fail(f"{word!r} is no number") from None

    def read(self) -> Rule:
        text = self.text
        steps = []
        while self.tokens:
            if self.next_is("comment"):
                if not self.tokens[:1] or not self.tokens[0].quoted or len(self.take().encode()) > LONGEST_COMMENT:
                    raise self.fail("no comment")
                if self.tokens:
                    raise self.fail("something follows the comment")
                break
            steps.append(self._step())
        for early in steps[:-1]:
            if early.act in ("accept", "drop", "reject", "return", "jump", "goto", "vmap"):
                raise self.fail(f"something follows {early.act}")
        if any(step.act == "limit" for step in steps) and steps[-1].act != "log":
            raise self.fail("a verdict that depends on a limit is no verdict")
        return Rule(text, tuple(steps))

    def _step(self) -> Step:
        word = self.take()
        if word in ("accept", "drop", "return"):
            return Step(word)
        if word in ("jump", "goto"):
            return Step(word, target=self.take())
        if word == "reject":
            return self._reject()
        if word == "counter":
            if self.next_is("packets"):
                self.number()
                self.take("bytes")
                self.number()
            return Step("counter")
        if word == "limit":
            return self._limit()
        if word == "log":
            self.take("group")
            self.number()
            return Step("log")
        if word == "meta" and self.tokens[:1] == ["mark"]:
            return self._mark()
        if word == "ct":
            return self._conntrack()
        if word == "fib":
            return self._fib()
        return self._lookup(word)

    def _reject(self) -> Step:
        if self.next_is("with"):
            if self.next_is("tcp"):
                self.take("reset")
            else:
                self.take("icmp", "icmpv6", "icmpx")
                if self.tokens[:1] == ["type"]:
                    self.take("type")
                self.take("port-unreachable", "admin-prohibited")
        return Step("reject")

    def _limit(self) -> Step:
        self.take("rate")
        if not re.fullmatch(r"\d+/(second|minute|hour|day)", self.take()):
            raise self.fail("no rate")
        if self.next_is("burst"):
            self.number()
            self.take("packets")
        return Step("limit")

    def _mark(self) -> Step:
        self.take("mark")
        if self.next_is("set"):
            return self._set_mark()
        mask = self.number() if self.next_is("&") else 0xFFFFFFFF
        differs = self.take("==", "!=") == "!=" if self.tokens[:1] in (["=="], ["!="]) else False
        value = self.number()
        return Step("match", lambda packet: (packet.mark & mask == value) is not differs)

    def _set_mark(self) -> Step:
        if not self.next_is("meta"):
            return Step("mark", mask=0, value=self.number())
        self.take("mark")
        operator, number = self.take("&", "|"), self.number()
        if operator == "&":
            return Step("mark", mask=number, value=0)
        return Step("mark", mask=0xFFFFFFFF ^ number, value=number)

    def _conntrack(self) -> Step:
        self.take("state")
        differs = self.next_is("!=")
        states = {self.take("new", "established", "related", "invalid")}
        while self.next_is(","):
            states.add(self.take("new", "established", "related", "invalid"))
        return Step("match", lambda packet: (packet.state.lower() in states) is not differs)

    def _fib(self) -> Step:
        side = self.take("saddr", "daddr")
        self.take("type")
        differs = self.next_is("!=")
        self.take("local")
        if side == "saddr":
            return Step("match", lambda packet: packet.source_local is not differs)
        return Step("match", lambda packet: packet.destination_local is not differs)

    def _field(self, word: str) -> str:
        """One selector: ``ip saddr``, ``meta l4proto``, ``th dport``, ``tcp dport``, ``icmp type``."""
        if word in KIND:
            if word != self.ip:
                raise self.fail(f"{word} in a table of {self.ip}")
            return self.take("saddr", "daddr")
        if word == "meta":
            return self.take("l4proto")
        if word in (*PORT_PROTOCOLS, "th"):
            self.take("dport")
            return f"{word} dport"
        if word in ICMP:
            if (word == "icmpv6") is not (self.family is Family.IPV6):
                raise self.fail(f"{word} in a table of {self.ip}")
            self.take("type")
            return f"{word} type"
        raise self.fail(f"unknown word {word!r}")

    def _type(self, name: str) -> str:
        if name in ("saddr", "daddr"):
            return ADDRESS[self.family]
        if name.endswith("dport"):
            return "inet_service"
        return "inet_proto" if name == "l4proto" else name

    def _lookup(self, word: str) -> Step:
        fields = [self._field(word)]
        while self.next_is("."):
            fields.append(self._field(self.take()))
        if len(fields) > 1 and any(name.startswith((*PORT_PROTOCOLS, "icmp")) for name in fields):
            raise self.fail("a concatenation is walked with th dport only")
        if fields == ["th dport"]:
            raise self.fail("th dport alone looks into any protocol")
        if self.next_is("vmap"):
            return Step("vmap", self._applies(fields), target=self._named(fields, is_map=True).name, fields=(*fields,))
        differs = self.next_is("!=")
        applies = self._applies(fields)
        holds = self._right_side(fields)
        return Step("match", lambda packet: applies(packet) and holds(packet) is not differs)

    @staticmethod
    def _applies(fields: list[str]) -> Match:
        """``tcp dport`` and ``icmp type`` ask for the protocol first, and the rule ends if it is another."""
        asked = fields[0].partition(" ")[0]
        protocol = {"icmpv6": "ipv6-icmp"}.get(asked, asked)
        if protocol in PROTOCOLS:
            return lambda packet: packet.protocol == protocol
        return lambda packet: True

    def _right_side(self, fields: list[str]) -> Match:
        if self.tokens[:1] == ["@"]:
            found = self._named(fields, is_map=False)
            return lambda packet: key_of(packet, fields) in found
        if len(fields) > 1:
            raise self.fail("a concatenation needs a set")
        kind = self._type(fields[0])
        items = [self.take()]
        if items == ["{"]:
            items = [self.take()]
            while self.take(",", "}") == ",":
                items.append(self.take())
        tests = [self._test(kind, item) for item in items]
        return lambda packet: any(test(key_of(packet, fields)[0]) for test in tests)

    def _test(self, kind: str, item: str) -> Callable[[str | int], bool]:
        if kind == "inet_service":
            first, dash, last = item.partition("-")
            low, high = port(first), port(last if dash else first)
            if low > high:
                raise self.fail("an empty range")
            return lambda value: low <= int(value) <= high
        if kind.endswith(" type"):
            numbers = ICMP[kind.split(maxsplit=1)[0]]
            if item not in numbers:
                raise self.fail(f"unknown ICMP type {item}")
            return lambda value: value == numbers[item]
        if kind == "inet_proto":
            wanted = value_of(kind, item)
            return lambda value: value == wanted
        try:
            network = ipaddress.ip_network(item)
        except ValueError as error:
            raise self.fail(str(error)) from error
        if network.version != self.family:
            raise self.fail(f"{item} is of the other family")
        return lambda value: ipaddress.ip_address(value) in network

    def _named(self, fields: list[str], *, is_map: bool) -> NftSet:
        self.take("@")
        name = self.take()
        if name not in self.sets:
            raise self.fail(f"there is no set {name}")
        found = self.sets[name]
        if found.types != tuple(map(self._type, fields)) or found.is_map is not is_map:
            raise self.fail(f"{name} is not asked by {fields}")
        return found


def key_of(packet: WirePacket, fields: Iterable[str]) -> Values:
    """What a packet is looked up by."""
    return tuple(_field_of(packet, name) for name in fields)


def _field_of(packet: WirePacket, name: str) -> str | int:
    if name == "saddr":
        return packet.source
    if name == "daddr":
        return packet.destination
    if name == "l4proto":
        return packet.protocol
    return packet.icmp if name.endswith(" type") else packet.port


# ------------------------------------------------------------------------------------------------------------ tables


@dataclass(slots=True)
class Chain:
    """A chain; ``hook`` and ``policy`` of a base chain."""

    name: str
    rules: list[Rule] = field(default_factory=list)
    hook: Hook | None = None
    policy: Verdict = "ACCEPT"


class NftWalk:
    """One table of one family: `walk` leads a packet through it."""

    def __init__(self, listing: str) -> None:
        """``listing`` in the words of ``nft list table``, with its elements. Raises `WalkError`."""
        self.sets: dict[str, NftSet] = {}
        self.chains: dict[str, Chain] = {}
        self._tokens = words(listing)
        self._bodies: dict[str, list[list[Word]]] = {}
        self._skip_ends()
        self._take("table")
        kind = self._take(*KIND)
        self.family = KIND[kind]
        self.name = self._take()
        self._take("{")
        self._table()
        for name, body in self._bodies.items():
            self.chains[name].rules = [_RuleReader(list(line), self.family, self.sets).read() for line in body]
        self._check()

    def _take(self, *expected: str) -> Word:
        if not self._tokens:
            raise WalkError("the listing ends too early")
        word = self._tokens.pop(0)
        if expected and (word.quoted or word not in expected):
            raise WalkError(f"{word!r} where one of {expected} was expected")
        return word

    def _skip_ends(self) -> None:
        while self._tokens and self._tokens[0] == _END:
            self._tokens.pop(0)

    def _line(self) -> list[Word]:
        """The words up to the end of a line; empty at the closing brace."""
        self._skip_ends()
        line: list[Word] = []
        depth = 0
        while self._tokens and (depth or self._tokens[0] != _END):
            if self._tokens[0] == "}" and not depth:
                break
            word = self._tokens.pop(0)
            depth += {"{": 1, "}": -1}.get(word, 0)
            if word != _END:
                line.append(word)
        return line

    def _table(self) -> None:
        while True:
            self._skip_ends()
            word = self._take("set", "map", "chain", "comment", "}")
            if word == "}":
                break
            if word == "comment":
                self._take()
                continue
            name = self._take()
            if len(name.encode()) > LONGEST_NAME or name in (self.chains if word == "chain" else self.sets):
                raise WalkError(f"{word} {name} is there twice, or its name is too long")
            self._take("{")
            if word == "chain":
                self._chain(name)
            else:
                self._set(name, is_map=word == "map")
            self._take("}")
        self._skip_ends()
        if self._tokens:
            raise WalkError(f"something follows the table: {self._tokens[0]!r}")

    def _set(self, name: str, *, is_map: bool) -> None:
        made = NftSet(name, (), is_map=is_map)
        while line := self._line():
            if line[0] == "type":
                made.types = self._types(name, line[1:], is_map)
            elif line == ["flags", "interval"] and len(made.types) == 1 and not is_map:
                made.interval = True
            elif line[0] == "elements" and line[1] == "=":
                self._elements(made, line[3:-1])
            elif line[0] != "comment":
                raise WalkError(f"set {name}: unknown words {line}")
        if not made.types:
            raise WalkError(f"set {name} has no type")
        self.sets[name] = made

    def _types(self, name: str, line: list[Word], is_map: bool) -> tuple[str, ...]:
        if is_map:
            if line[-2:] != [":", "verdict"]:
                raise WalkError(f"map {name} is no verdict map")
            line = line[:-2]
        kinds, dots = line[::2], line[1::2]
        if set(dots) - {"."} or set(kinds) - {ADDRESS[self.family], "inet_proto", "inet_service"}:
            raise WalkError(f"set {name}: unknown type {line}")
        return tuple(map(str, kinds))

    @staticmethod
    def _elements(made: NftSet, line: list[Word]) -> None:
        items: list[list[Word]] = [[]]
        for word in line:
            if word == "," and not word.quoted:
                items.append([])
            else:
                items[-1].append(word)
        for item in items:
            verdict = None
            if ":" in item[1:]:
                at = item.index(":", 1)  # type: ignore[arg-type]
                if len(item) != at + 3 or item[at + 1] not in ("jump", "goto"):
                    raise WalkError(f"map {made.name}: unknown verdict {item[at:]}")
                verdict = (str(item[at + 1]), str(item[at + 2]))
                item = item[:at]  # noqa: PLW2901
            if "comment" in item:
                item = item[: item.index("comment")]  # type: ignore[arg-type]  # noqa: PLW2901
            if set(item[1::2]) - {"."}:
                raise WalkError(f"set {made.name}: unknown element {item}")
            made.add([str(word) for word in item[::2]], verdict)

    def _chain(self, name: str) -> None:
        made = self.chains[name] = Chain(name)
        body: list[list[Word]] = []
        while line := self._line():
            if line[0] == "comment" and len(line) == 2 and not body:
                continue
            if line[0] == "type":
                made.hook = self._hook(name, line)
            elif line[0] == "policy":
                made.policy = "ACCEPT" if line == ["policy", "accept"] else "DROP"
                if line not in (["policy", "accept"], ["policy", "drop"]):
                    raise WalkError(f"chain {name}: unknown words {line}")
            else:
                body.append(line)
        self._bodies[name] = body

    @staticmethod
    def _hook(name: str, line: list[Word]) -> Hook:
        hook = line[3].upper()
        if line[:3] != ["type", "filter", "hook"] or hook not in HOOKS or line[4] != "priority":
            raise WalkError(f"chain {name}: {line} is no hook of a filter")
        return hook

    def _check(self) -> None:
        jumps: dict[str, set[str]] = {}
        for chain in self.chains.values():
            targets = set()
            for step in (step for rule in chain.rules for step in rule.steps):
                if step.act in ("jump", "goto"):
                    targets.add(step.target)
                elif step.act == "vmap":
                    targets |= {target for _, target in self.sets[step.target].verdicts.values()}
            jumps[chain.name] = targets
            for target in targets:
                if target not in self.chains or self.chains[target].hook:
                    raise WalkError(f"chain {chain.name} leads to {target}, which no rule may")
        for name, depth in depths(jumps).items():
            if self.chains[name].hook and depth >= DEPTH:
                raise WalkError(f"{name}: chains are nested {depth} deep")

    def walk(self, packet: WirePacket) -> Walked:
        """Lead a packet through the hook's base chain; without one it is accepted."""
        if packet.family is not self.family:
            raise WalkError(f"{packet.source} is not {self.family}")
        base = [chain for chain in self.chains.values() if chain.hook == packet.hook]
        if len(base) > 1:
            raise WalkError(f"two chains in hook {packet.hook}: only one is walked")
        return _Walk(self, packet).run(base[0]) if base else Walked("ACCEPT", packet.mark, (), 0)


class _Walk:
    """One packet on its way."""

    def __init__(self, table: NftWalk, packet: WirePacket) -> None:
        self.table, self.packet = table, packet
        self.path: list[str] = []
        self.looked, self.logged = 0, False

    def run(self, base: Chain) -> Walked:
        chain, index = base, 0
        above: list[tuple[Chain, int]] = []
        while True:
            if index == len(chain.rules):
                if not above:
                    return self._done(base.policy)
                chain, index = above.pop()
                continue
            rule = chain.rules[index]
            index, self.looked = index + 1, self.looked + 1
            verdict, target = self._rule(rule)
            if verdict in ("accept", "drop", "reject"):
                return self._done(cast(Verdict, verdict.upper()))
            if verdict == "return":
                if not above:
                    return self._done(base.policy)
                chain, index = above.pop()
            elif verdict in ("jump", "goto"):
                if verdict == "jump":
                    above.append((chain, index))
                chain, index = self.table.chains[target], 0

    def _done(self, verdict: Verdict) -> Walked:
        return Walked(verdict, self.packet.mark, tuple(self.path), self.looked, self.logged)

    def _rule(self, rule: Rule) -> tuple[str, str]:
        for step in rule.steps:
            if step.match is not None and not step.match(self.packet):
                return "", ""
            if step.act == "mark":
                self.packet = self.packet.marked((self.packet.mark & step.mask) ^ step.value)
            elif step.act == "log":
                self.logged = True
            elif step.act == "vmap":
                verdict = self.table.sets[step.target].verdicts.get(key_of(self.packet, step.fields))
                if verdict is None:
                    return "", ""
                self.path.append(rule.text)
                return verdict
        self.path.append(rule.text)
        last = rule.steps[-1] if rule.steps else Step("counter")
        return last.act, last.target
