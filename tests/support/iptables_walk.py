"""A strict netfilter in memory for iptables: the text of ``iptables-save`` and ``ipset save`` in, a packet's way out.

Pure. It knows the matches and targets that we (and upstream's layout) use, with the kernel's semantics, and refuses all
others, as it refuses what the kernel or its tools refuse: jumps to missing chains, rules that name missing sets, loops,
ports without a protocol, names that are too long. `tests/kernel/test_walkers.py` holds it against the real kernel.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from support.walk import (
    DEPTH,
    HOOKS,
    NUMBERS,
    PORT_PROTOCOLS,
    STATES,
    Networks,
    Verdict,
    Walked,
    WalkError,
    WirePacket,
    depths,
)

from kube_router.workers.model import Family

Match = Callable[[WirePacket], bool]
SET_TYPES = {"hash:ip": 1, "hash:net": 1, "hash:ip,port": 2, "bitmap:port": 1}
"""Known set types and how many of ``src``/``dst`` a rule must give for them; with fewer the kernel never matches."""
LONGEST_CHAIN, LONGEST_SET, LONGEST_COMMENT = 28, 31, 255
ICMP = {
    Family.IPV4: {"echo-reply": 0, "destination-unreachable": 3, "echo-request": 8, "time-exceeded": 11},
    Family.IPV6: {
        "destination-unreachable": 1,
        "packet-too-big": 2,
        "time-exceeded": 3,
        "echo-request": 128,
        "echo-reply": 129,
        "neighbor-solicitation": 135,
        "neighbor-advertisement": 136,
    },
}
REJECTIONS = {
    Family.IPV4: {"icmp-port-unreachable", "icmp-admin-prohibited", "tcp-reset"},
    Family.IPV6: {"icmp6-port-unreachable", "icmp6-adm-prohibited", "tcp-reset"},
}
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"(?=\s|$)|([^\s"]+)(?=\s|$)|\s+')


# ------------------------------------------------------------------------------------------------------------- sets


@dataclass(slots=True)
class IpSet:
    """A set of ipset's with its members; ``family`` is None for ports, which any rule may ask for."""

    name: str
    kind: str
    family: Family | None
    limit: int = 65536
    networks: Networks | None = None
    triples: set[tuple[str, str, int]] = field(default_factory=set)
    ports: set[int] = field(default_factory=set)

    def add(self, entry: str) -> None:
        """Add a member as ``ipset restore`` would; raises `WalkError` for what it would refuse."""
        if self.kind == "bitmap:port":
            self.ports.add(_port(entry))
        elif self.kind == "hash:ip,port":
            self._add_triple(entry)
        else:
            assert self.networks is not None
            length = entry.partition("/")[2]
            if length == "0":
                raise WalkError(f"ipset {self.name}: hash:net holds no {entry}")
            if length and self.kind == "hash:ip":
                raise WalkError(f"ipset {self.name}: {entry} is a network")
            self.networks.add(entry)
        if max(len(self.triples), len(self.networks or ())) > self.limit:
            raise WalkError(f"ipset {self.name}: it is full at {entry}")

    def _add_triple(self, entry: str) -> None:
        found = re.fullmatch(r"([0-9a-f.:]+),(tcp|udp|sctp):(\d+)", entry)
        if not found:
            raise WalkError(f"ipset {self.name}: {entry!r} is no address,protocol:port")
        assert self.family is not None
        Networks(self.family, [found[1]])
        self.triples.add((str(ipaddress.ip_address(found[1])), found[2], _port(found[3])))

    def holds(self, packet: WirePacket, sides: tuple[str, ...]) -> bool:
        """Whether a packet is in it, looked at from ``src`` or ``dst``."""
        address = packet.source if sides[0] == "src" else packet.destination
        if self.kind == "bitmap:port":  # the kernel looks at TCP and UDP alone (ip_set_bitmap_port.c)
            return packet.protocol in ("tcp", "udp") and packet.port in self.ports
        if self.kind == "hash:ip,port":
            return (address, packet.protocol, packet.port) in self.triples
        assert self.networks is not None
        return address in self.networks


def parse_sets(text: str) -> dict[str, IpSet]:
    """The sets of ``ipset save``, or of what is given to ``ipset restore``; raises `WalkError`."""
    sets: dict[str, IpSet] = {}
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == "create" and len(words) > 2:
            made = _create(words[1], words[2], words[3:])
            if made.name in sets:
                raise WalkError(f"ipset {made.name} exists already")
            sets[made.name] = made
        elif words[0] == "add" and len(words) > 2:
            if words[1] not in sets:
                raise WalkError(f"{line!r}: there is no such set")
            if words[3:] not in ([], ["timeout", "0"]):
                raise WalkError(f"{line!r}: unknown words {words[3:]}")
            sets[words[1]].add(words[2])
        else:
            raise WalkError(f"{line!r} is not a line of ipset")
    return sets


def _create(name: str, kind: str, options: list[str]) -> IpSet:
    if kind not in SET_TYPES:
        raise WalkError(f"ipset {name}: unknown type {kind}")
    if len(name.encode()) > LONGEST_SET:
        raise WalkError(f"ipset {name}: the name is longer than {LONGEST_SET} bytes")
    values = dict(zip(options[::2], options[1::2], strict=True))
    unknown = values.keys() - {"family", "hashsize", "maxelem", "bucketsize", "initval", "timeout", "range"}
    if unknown or values.get("timeout", "0") != "0":
        raise WalkError(f"ipset {name}: unknown options {options}")
    if kind == "bitmap:port":
        if values.get("range") != "0-65535":
            raise WalkError(f"ipset {name}: its range is {values.get('range')}")
        return IpSet(name, kind, None)
    family = {"inet": Family.IPV4, "inet6": Family.IPV6}[values.get("family", "inet")]
    return IpSet(name, kind, family, int(values.get("maxelem", 65536)), Networks(family))


# ------------------------------------------------------------------------------------------------------------ rules


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: it acts if all matches hold. ``target`` belongs to ``action`` jump and goto."""

    text: str
    matches: tuple[Match, ...]
    action: str
    target: str = ""
    value: int = 0
    mask: int = 0


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise WalkError(f"{text!r} is no port")
    return int(text)


def _range(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    low, high = _port(first), _port(last if colon else first)
    if low > high:
        raise WalkError(f"{text!r} is an empty range of ports")
    return low, high


def _masked(text: str) -> tuple[int, int]:
    value, _, mask = text.partition("/")
    return int(value, 0), int(mask, 0) if mask else 0xFFFFFFFF


def tokens(line: str) -> list[str]:
    """The words of a line, by iptables-save's quoting: double quotes, a backslash keeps the next character."""
    words, position = [], 0
    while position < len(line):
        found = _TOKEN.match(line, position)
        if not found:
            raise WalkError(f"cannot be read from {line[position:]!r}")
        if found[1] is not None:
            words.append(re.sub(r"\\(.)", r"\1", found[1]))
        elif found[2] is not None:
            words.append(found[2])
        position = found.end()
    return words


def inverted(match: Match) -> Match:
    """Holds when ``match`` does not."""
    return lambda packet: not match(packet)


class _RuleReader:
    """Reads one rule's words into matches and a target."""

    def __init__(self, words: list[str], family: Family, sets: dict[str, IpSet], text: str) -> None:
        self.words, self.family, self.sets, self.text = list(words), family, sets, text
        self.matches: list[Match] = []
        self.modules: set[str] = set()
        self.protocol = ""
        self.limited = False

    def fail(self, why: str) -> WalkError:
        return WalkError(f"rule {self.text!r}: {why}")

    def take(self) -> str:
        if not self.words:
            raise self.fail("it ends too early")
        return self.words.pop(0)

    def read(self) -> Rule:
        action, target, value, mask = "", "", 0, 0
        while self.words:
            word = self.take()
            negated = word == "!"
            if negated:
                word = self.take()
            if word in ("-j", "-g") and not negated and not action:
                action, target, value, mask = self._target(word)
            elif word == "-m" and not negated:
                self._module(self.take())
            else:
                match = self._match(word, negated)
                if match is not None:
                    self.matches.append(inverted(match) if negated else match)
        if self.limited and action != "NFLOG":
            raise self.fail("a verdict that depends on a limit is no verdict")
        return Rule(self.text, tuple(self.matches), action, target, value, mask)

    def _module(self, name: str) -> None:
        known = {"set", "addrtype", "multiport", "mark", "conntrack", "comment", "limit", "physdev"}
        if name not in known | PORT_PROTOCOLS.keys() | {"icmp", "icmp6"}:
            raise self.fail(f"unknown match {name}")
        if name in PORT_PROTOCOLS and name != self.protocol:
            raise self.fail(f"-m {name} without -p {name}")
        self.modules.add(name)

    def _need(self, module: str) -> None:
        if module not in self.modules:
            raise self.fail(f"an option without -m {module}")

    def _match(self, word: str, negated: bool) -> Match | None:
        reader = getattr(self, "_read_" + word.lstrip("-").replace("-", "_"), None)
        if reader is None or not word.startswith("-"):
            raise self.fail(f"unknown word {word!r}")
        if negated and word in ("--comment", "--limit", "--limit-burst", "-p"):
            raise self.fail(f"{word} cannot be negated")
        return cast("Match | None", reader())

    def _read_s(self) -> Match:
        networks = Networks(self.family, [self.take()])
        return lambda packet: packet.source in networks

    def _read_d(self) -> Match:
        networks = Networks(self.family, [self.take()])
        return lambda packet: packet.destination in networks

    def _read_p(self) -> Match:
        protocol = self.take().lower()
        protocol = {"icmpv6": "ipv6-icmp", "icmp6": "ipv6-icmp"}.get(protocol, protocol)
        if protocol not in NUMBERS or self.protocol:
            raise self.fail(f"unknown protocol {protocol}")
        self.protocol = protocol
        return lambda packet: packet.protocol == protocol

    def _read_dport(self) -> Match:
        if self.protocol not in PORT_PROTOCOLS:
            raise self.fail("unknown option --dport: there is no protocol with ports")
        low, high = _range(self.take())
        return lambda packet: low <= packet.port <= high

    def _read_dports(self) -> Match:
        self._need("multiport")
        if self.protocol not in PORT_PROTOCOLS:
            raise self.fail("multiport needs a protocol with ports")
        ranges = [_range(part) for part in self.take().split(",")]
        if len(ranges) + sum(low != high for low, high in ranges) > 15:
            raise self.fail("multiport takes 15 ports")
        return lambda packet: any(low <= packet.port <= high for low, high in ranges)

    def _read_icmp_type(self) -> Match:
        return self._icmp(Family.IPV4, "icmp")

    def _read_icmpv6_type(self) -> Match:
        return self._icmp(Family.IPV6, "ipv6-icmp")

    def _icmp(self, family: Family, protocol: str) -> Match:
        if self.family is not family or self.protocol != protocol:
            raise self.fail(f"an ICMP type without -p {protocol}")
        word = self.take()
        number = ICMP[family].get(word, int(word) if word.isdigit() else -1)
        if number < 0:
            raise self.fail(f"unknown ICMP type {word}")
        return lambda packet: packet.icmp == number

    def _read_match_set(self) -> Match:
        self._need("set")
        name, sides = self.take(), tuple(self.take().split(","))
        if name not in self.sets:
            raise self.fail(f"Set {name} doesn't exist.")
        found = self.sets[name]
        if len(sides) != SET_TYPES[found.kind] or not set(sides) <= {"src", "dst"}:
            raise self.fail(f"{found.kind} is not asked by {','.join(sides)}")
        if found.family not in (None, self.family):
            raise self.fail(f"{name} is of the other family, it never matches")
        if sides[0] != "dst" and found.kind in ("bitmap:port", "hash:ip,port"):
            raise self.fail("source ports are not walked")
        return lambda packet: found.holds(packet, sides)

    def _read_src_type(self) -> Match:
        self._local()
        return lambda packet: packet.source_local

    def _read_dst_type(self) -> Match:
        self._local()
        return lambda packet: packet.destination_local

    def _local(self) -> None:
        self._need("addrtype")
        if self.take() != "LOCAL":
            raise self.fail("unknown type of address")

    def _read_mark(self) -> Match:
        self._need("mark")
        value, mask = _masked(self.take())
        return lambda packet: packet.mark & mask == value

    def _read_ctstate(self) -> Match:
        self._need("conntrack")
        states = set(self.take().split(","))
        if not states <= set(STATES):
            raise self.fail(f"unknown state in {sorted(states)}")
        return lambda packet: packet.state in states

    def _read_physdev_is_bridged(self) -> Match:
        self._need("physdev")
        return lambda packet: packet.bridged and packet.hook == "FORWARD"

    def _read_comment(self) -> None:
        self._need("comment")
        if len(self.take().encode()) > LONGEST_COMMENT:
            raise self.fail("the comment is too long")

    def _read_limit(self) -> None:
        self._need("limit")
        if not re.fullmatch(r"\d+/(sec|second|min|minute|hour|day)", self.take()):
            raise self.fail("no rate")
        self.limited = True

    def _read_limit_burst(self) -> None:
        self._need("limit")
        _port(self.take())

    def _target(self, word: str) -> tuple[str, str, int, int]:
        name = self.take()
        if word == "-g":
            return "goto", name, 0, 0
        if name in ("ACCEPT", "DROP", "RETURN"):
            return name, "", 0, 0
        if name == "REJECT":
            if self.words[:1] == ["--reject-with"]:
                self.take()
                if (kind := self.take()) not in REJECTIONS[self.family]:
                    raise self.fail(f"unknown rejection {kind}")
            return name, "", 0, 0
        if name == "NFLOG":
            self._nflog()
            return name, "", 0, 0
        if name == "MARK":
            option = self.take()
            if option not in ("--set-xmark", "--set-mark"):
                raise self.fail(f"unknown option {option}")
            value, mask = _masked(self.take())
            return name, "", value, mask if option == "--set-xmark" else mask | value
        return "jump", name, 0, 0

    def _nflog(self) -> None:
        while self.words[:1] and self.words[0].startswith("--nflog-"):
            option = self.take()
            if option not in ("--nflog-group", "--nflog-prefix"):
                raise self.fail(f"unknown option {option}")
            self.take()


# ------------------------------------------------------------------------------------------------------------ tables


class IptablesWalk:
    """The filter table of one family: `walk` leads a packet through it."""

    def __init__(self, family: Family, saved: str, sets: str = "") -> None:
        """``saved`` in the words of ``iptables-save -t filter``, ``sets`` of ``ipset save``. Raises `WalkError`."""
        self.family = family
        self.sets = parse_sets(sets)
        self.policies: dict[str, Verdict] = dict.fromkeys(HOOKS, "ACCEPT")
        self.chains: dict[str, list[Rule]] = {hook: [] for hook in HOOKS}
        body = self._body(saved)
        for line in body:
            if line.startswith(":"):
                self._declare(line)
        for line in body:
            if not line.startswith(":"):
                self._append(line)
        self._check()

    @staticmethod
    def _body(saved: str) -> list[str]:
        lines = [line for line in saved.splitlines() if line.strip() and not line.startswith("#")]
        if not lines:
            return []
        if lines[0] != "*filter" or lines[-1] != "COMMIT" or any(line in ("*filter", "COMMIT") for line in lines[1:-1]):
            raise WalkError("this is not the text of one table filter")
        return lines[1:-1]

    def _declare(self, line: str) -> None:
        found = re.fullmatch(r":(\S+) (ACCEPT|DROP|-)(?: \[\d+:\d+\])?", line)
        if not found:
            raise WalkError(f"{line!r} declares no chain")
        name, policy = found[1], found[2]
        if (policy == "-") == (name in HOOKS):
            raise WalkError(f"{line!r}: only a built-in chain has a policy")
        if policy != "-":
            self.policies[name] = cast(Verdict, policy)
        elif name in self.chains:
            raise WalkError(f"chain {name} is declared twice")
        elif len(name.encode()) > LONGEST_CHAIN:
            raise WalkError(f"chain {name}: the name is longer than {LONGEST_CHAIN} bytes")
        else:
            self.chains[name] = []

    def _append(self, line: str) -> None:
        words = tokens(re.sub(r"^\[\d+:\d+\] ", "", line))
        if len(words) < 2 or words[0] != "-A" or words[1] not in self.chains:
            raise WalkError(f"{line!r} appends to no chain")
        self.chains[words[1]].append(_RuleReader(words[2:], self.family, self.sets, line).read())

    def _check(self) -> None:
        jumps: dict[str, set[str]] = {}
        for chain, rules in self.chains.items():
            jumps[chain] = {rule.target for rule in rules if rule.target}
            if missing := jumps[chain] - (self.chains.keys() - set(HOOKS)):
                raise WalkError(f"chain {chain} leads to {sorted(missing)}, which no rule may")
        for chain, depth in depths(jumps).items():
            if chain in HOOKS and depth >= DEPTH:
                raise WalkError(f"{chain}: chains are nested {depth} deep")

    def walk(self, packet: WirePacket) -> Walked:
        """Lead a packet through the hook's chain."""
        if packet.family is not self.family:
            raise WalkError(f"{packet.source} is not {self.family}")
        chain, index = cast(str, packet.hook), 0
        above: list[tuple[str, int]] = []
        path: list[str] = []
        looked, logged = 0, False

        def done(verdict: Verdict) -> Walked:
            return Walked(verdict, packet.mark, tuple(path), looked, logged)

        while True:
            if index == len(self.chains[chain]):
                if not above:
                    return done(self.policies[packet.hook])
                chain, index = above.pop()
                continue
            rule = self.chains[chain][index]
            index, looked = index + 1, looked + 1
            if not all(match(packet) for match in rule.matches):
                continue
            path.append(rule.text)
            if rule.action in ("ACCEPT", "DROP", "REJECT"):
                return done(cast(Verdict, rule.action))
            if rule.action == "RETURN":
                if not above:
                    return done(self.policies[packet.hook])
                chain, index = above.pop()
            elif rule.action in ("jump", "goto"):
                if rule.action == "jump":
                    above.append((chain, index))  # a goto leaves nothing behind: its end is the end of this chain
                chain, index = rule.target, 0
            elif rule.action == "MARK":
                packet = packet.marked((packet.mark & ~rule.mask) ^ rule.value)
            elif rule.action == "NFLOG":
                logged = True
