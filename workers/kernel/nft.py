"""nftables tables over nfnetlink: commands as text in, all of them done or one error out; one table read back.

Touches the kernel. The commands (`nftmessages.py`) become one batch of messages here, without the ``nft`` program and
without its library. libnftables was tried first: before every transaction it lists the headers of all sets (10 ms
beside 2,000 of them), it takes fifty times the memory of a text, and the process ends (SIGSEGV, 1.0.6) as soon as any
table of the host holds a set that a newer nft has made, as on a node whose nft is newer than that of the container.

A socket belongs to the network namespace that the creating thread is in.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kube_router.workers.kernel.netlink import (
    Message,
    NetlinkError,
    Overflow,
    Request,
    attribute_map,
    text_of,
)
from kube_router.workers.kernel.nftelements import SUBSYSTEM
from kube_router.workers.kernel.nftmessages import (
    CHAIN_HOOK,
    CHAIN_NAME,
    CHAIN_POLICY,
    CHAIN_TYPE,
    HOOKS,
    INTERVAL,
    MAP,
    NAME,
    RULE_CHAIN,
    RULE_EXPRESSIONS,
    RULE_USERDATA,
    SET_DATA_TYPE,
    SET_FLAGS,
    SET_KEY_TYPE,
    TABLE,
    TYPES,
    VERDICT_TYPE,
    Commands,
    start,
)
from kube_router.workers.kernel.nftsocket import NftError, NftSocket, words
from kube_router.workers.model import Family
from kube_router.workers.nftcode import text, without_counts

_GETTABLE, _GETCHAIN, _GETRULE, _GETSET = 1, 4, 7, 10
_SET_DESC, _SET_TIMEOUT, _SET_GC, _SET_EXPR, _SET_EXPRESSIONS = 9, 11, 12, 17, 18
_TYPE_NAMES = {number: name for name, (number, _) in TYPES.items()}
_POLICIES = ("drop", "accept")
_WORDS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class ListedChain:
    """A chain as it stands: its header (as nft lists it; empty without a hook), and its rules.

    A rule is its expressions with counters at zero, and its user data; see `nftcode`.
    """

    header: str
    rules: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class ListedSet:
    """A set or map as it stands: its type in nft's words, with everything that is not as `Nft` makes them behind it."""

    type: str
    interval: bool

    @property
    def word(self) -> str:
        """``set`` or ``map``."""
        return "map" if " : " in self.type else "set"


@dataclass(slots=True)
class ListedTable:
    """A table without elements."""

    chains: dict[str, ListedChain] = field(default_factory=dict)
    sets: dict[str, ListedSet] = field(default_factory=dict)


class Nft(NftSocket):
    """Tables, chains and sets by commands, through one socket."""

    def __init__(self) -> None:
        """Raises OSError."""
        super().__init__()
        self._commands = Commands()

    def run(self, commands: Sequence[str]) -> None:
        """Carry out all commands (in order), or none. Raises `NftError`."""
        requests: list[Request] = []
        owners: list[int] = []
        refused: list[tuple[int, str]] = []
        for index, command in enumerate(commands):
            try:
                made = [*self._commands.requests(command)]
            except ValueError as error:
                refused.append((index, str(error)))
                continue
            requests += made
            owners += [index] * len(made)
        if refused:
            raise _error(commands, refused)
        try:
            errors = self._netlink.transaction(SUBSYSTEM, requests)
        except (OSError, Overflow) as error:
            raise NftError(f"nftables: {words(error)}") from error
        if errors:
            raise _error(commands, [(owners[at], words(error)) for at, error in errors.items()])

    def list_table(self, family: Family, name: str) -> ListedTable | None:
        """One table; None when it does not exist. Raises `NftError`."""
        try:
            self._netlink.query(SUBSYSTEM << 8 | _GETTABLE, start(family) + text(TABLE, name))
            listed = ListedTable()
            self._list_sets(listed, family, name)
            self._list_chains(listed, family, name)
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return None
            raise NftError(f"table {name}: {words(error)}") from error
        except (OSError, Overflow) as error:
            raise NftError(f"table {name}: {words(error)}") from error
        return listed

    def _list_sets(self, listed: ListedTable, family: Family, table: str) -> None:
        for message in self._netlink.dump(SUBSYSTEM << 8 | _GETSET, start(family) + text(TABLE, table)):
            if _is_of(message, table):
                found = attribute_map(message.payload, 4)
                listed.sets[text_of(found[NAME])] = _listed_set(found)

    def _list_chains(self, listed: ListedTable, family: Family, table: str) -> None:
        headers: dict[str, str] = {}
        for message in self._netlink.dump(SUBSYSTEM << 8 | _GETCHAIN, start(family)):
            if _is_of(message, table):
                found = attribute_map(message.payload, 4)
                headers[text_of(found[CHAIN_NAME])] = _header_of(found)
        rules: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in headers}
        for message in self._netlink.dump(SUBSYSTEM << 8 | _GETRULE, start(family) + text(TABLE, table)):
            chain, rule = _listed_rule(message)
            rules.setdefault(chain, []).append(rule)
        listed.chains = {name: ListedChain(headers.get(name, ""), tuple(found)) for name, found in rules.items()}


def _is_of(message: Message, table: str) -> bool:
    """Whether an object is of a table, told without reading it: the chains of all tables of a family are dumped."""
    name = text(TABLE, table)
    return message.payload[4 : 4 + len(name)] == name


def _listed_set(found: Mapping[int, memoryview]) -> ListedSet:
    kind = int.from_bytes(found.get(SET_KEY_TYPE, b""), "big")
    fields: list[str] = []
    while kind:
        fields.insert(0, _TYPE_NAMES.get(kind & 63, f"type {kind & 63}"))
        kind >>= 6
    words = " . ".join(fields)
    flags = int.from_bytes(found.get(SET_FLAGS, b""), "big")
    if flags & MAP:
        data = int.from_bytes(found.get(SET_DATA_TYPE, b""), "big")
        words += " : verdict" if data == VERDICT_TYPE else f" : type {data}"
    if others := flags & ~(INTERVAL | MAP):
        words += f"; flags {others:#x}"
    strange = [kind for kind in (_SET_TIMEOUT, _SET_GC, _SET_EXPR, _SET_EXPRESSIONS) if kind in found]
    if strange or len(found.get(_SET_DESC, b"")) > 0:
        words += "; a size, a timeout or something else of a set's own"
    return ListedSet(words, bool(flags & INTERVAL))


def _header_of(found: Mapping[int, memoryview]) -> str:
    if CHAIN_HOOK not in found:
        return ""
    place = attribute_map(found[CHAIN_HOOK])
    hook, priority = (int.from_bytes(place.get(kind, b""), "big", signed=True) for kind in (1, 2))
    policy = int.from_bytes(found.get(CHAIN_POLICY, b""), "big")
    word = HOOKS[hook] if hook < len(HOOKS) else str(hook)
    kind = text_of(found.get(CHAIN_TYPE, b""))
    return f"type {kind} hook {word} priority {priority or 'filter'}; policy {_POLICIES[policy & 1]};"


def _listed_rule(message: Message) -> tuple[str, tuple[bytes, bytes]]:
    found = attribute_map(message.payload, 4)
    expressions = without_counts(bytes(found.get(RULE_EXPRESSIONS, b"")))
    return text_of(found[RULE_CHAIN]), (expressions, bytes(found.get(RULE_USERDATA, b"")))


def _error(commands: Sequence[str], refused: Sequence[tuple[int, str]]) -> NftError:
    """All that was refused, in one line."""
    texts = {f"{_shortened(commands[index])}: {reason}": None for index, reason in refused}
    shown = [*texts][:_WORDS_SHOWN]
    if len(texts) > _WORDS_SHOWN:
        shown.append(f"and {len(texts) - _WORDS_SHOWN} more")
    return NftError("nftables: " + "; ".join(shown), refused)


def _shortened(command: str, limit: int = 160) -> str:
    return command if len(command) <= limit else f"{command[:limit]}…"
