"""External BGP peers, as flags and the own Node's annotations give them.

Pure: settings, secrets and annotations in, `ExternalPeers` out. Precedence as kube-router's: flags hide annotations
entirely, ``kube-router.io/peers`` hides the ``kube-router.io/peer.*`` lists. Unlike there, a bad entry spoils only
itself: it becomes a `Problem` that names node, key, index and value (never a password), and a session that runs with
the address of a bad entry goes on as it is. When an annotation cannot be read as a whole, all running external sessions
go on.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kube_router.workers.model import IPAddress
from kube_router.workers.nodefacts import Problem, parse_address, parse_base0
from kube_router.workers.router import names
from kube_router.workers.router.bgpstate import Bfd
from kube_router.workers.settings import Secrets, Settings

BGP_PORT = 179
PASSWORD_BYTES = 80
"""Longest TCP-MD5 key that Linux takes (TCP_MD5SIG_MAXKEYLEN, linux/tcp.h)."""
PEER_ASNS = ((1, 23455), (23457, 63999), (64512, 65534), (131072, 4294967294))
"""AS numbers that a peer may have (RFC 6996, RFC 7300 and kube-router's own check)."""
INVALID_PEER = "InvalidBGPPeer"
TRUE = ("1", "t", "T", "true", "TRUE", "True")
FALSE = ("0", "f", "F", "false", "FALSE", "False")
"""As Go's ``strconv.ParseBool``."""


@dataclass(frozen=True, slots=True)
class ExternalPeer:
    """One peer as configured. ``local_address`` None: the own address of the peer's family.

    ``multihop_ttl`` and ``hold_seconds`` None: what the flags say.
    """

    address: IPAddress
    asn: int
    port: int = BGP_PORT
    local_address: IPAddress | None = None
    password: str = field(default="", repr=False)
    multihop_ttl: int | None = None
    hold_seconds: int | None = None
    bfd: Bfd | None = None


@dataclass(frozen=True, slots=True)
class ExternalPeers:
    """``held``: addresses of entries that cannot be used now; ``hold_all``: no entry could be read."""

    peers: tuple[ExternalPeer, ...] = ()
    held: frozenset[str] = frozenset()
    hold_all: bool = False
    problems: tuple[Problem, ...] = ()


class _Bad(ValueError):
    """An entry is not usable; the text names field, value and rule."""


def external_peers(settings: Settings, secrets: Secrets, node: str, annotations: Mapping[str, str]) -> ExternalPeers:
    """The external peers of ``node``, whose annotations are given."""
    if settings.peer_router_ips:
        collected = _collect("flag --peer-router-ips", _flag_entries(settings, secrets))
        bfd = _flag_bfd(settings)
        return replace(collected, peers=tuple(replace(peer, bfd=bfd) for peer in collected.peers))
    if annotations.get(names.PEERS, "").strip():
        where = f"node {node}: annotation {names.PEERS}"
        try:
            return _collect(where, _yaml_entries(annotations[names.PEERS]))
        except _Bad as error:
            return ExternalPeers(hold_all=True, problems=(Problem(INVALID_PEER, f"{where}: {error}"),))
    if names.PEER_IPS in annotations and names.PEER_ASNS in annotations:
        where = f"node {node}: annotation {names.PEER_IPS}"
        try:
            return _collect(where, _list_entries(annotations))
        except _Bad as error:
            return ExternalPeers(hold_all=True, problems=(Problem(INVALID_PEER, f"node {node}: {error}"),))
    return ExternalPeers()


Entry = Mapping[str, Any]
"""Texts of one entry by the keys of the ``peers`` annotation; ``bfd``: a mapping of its own."""
KNOWN_KEYS = frozenset({"remoteip", "remoteasn", "localip", "password", "port", "bfd", "multihopttl", "holdtime"})
"""``multihopttl`` and ``holdtime`` (seconds) are ours."""
BFD_FIELDS = {
    "port": ("port", 1, 65535),
    "detection_multiplier": ("multiplier", 1, 255),
    "desired_min_tx_interval": ("send_milliseconds", 1, 4294967),
    "required_min_rx_interval": ("receive_milliseconds", 1, 4294967),
}
"""Keys of ``bfd`` by the fields of `Bfd`, with what gobgpd takes: microseconds in 32 bits."""


def _collect(where: str, entries: Sequence[object]) -> ExternalPeers:
    peers: dict[str, ExternalPeer] = {}
    held: set[str] = set()
    problems = []
    for index, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise _Bad("is not a mapping of fields")
            unknown = _unknown_keys(entry)
            if unknown:
                text = f"{where}: peer {index + 1}: unknown keys are ignored: {', '.join(unknown)[:100]!r}"
                problems.append(Problem(INVALID_PEER, text))
            peer = _peer(entry)
            if str(peer.address) in peers:
                raise _Bad(f"remoteip {peer.address} is there twice; the first entry counts")
            peers[str(peer.address)] = peer
        except _Bad as error:
            problems.append(Problem(INVALID_PEER, f"{where}: peer {index + 1}: {error}"))
            held |= _address_of(entry)
    return ExternalPeers(tuple(peers.values()), frozenset(held - peers.keys()), False, tuple(problems))


def _unknown_keys(entry: Entry) -> list[str]:
    section = entry.get("bfd")
    inner = section if isinstance(section, dict) else {}
    unknown = [str(name) for name in entry if name not in KNOWN_KEYS]
    return sorted(unknown + [f"bfd.{name}" for name in inner if name != "enabled" and name not in BFD_FIELDS])


def _address_of(entry: object) -> set[str]:
    text = entry.get("remoteip") if isinstance(entry, dict) else None
    try:
        return {str(parse_address(text))} if isinstance(text, str) else set()
    except ValueError:
        return set()


def _peer(entry: Entry) -> ExternalPeer:
    for name, value in entry.items():
        if name in KNOWN_KEYS and name != "bfd" and not isinstance(value, str):
            raise _Bad(f"{name}: is not a single value")
    if not entry.get("remoteip"):
        raise _Bad("remoteip is missing")
    if not entry.get("remoteasn"):
        raise _Bad("remoteasn is missing")
    address = _address("remoteip", entry["remoteip"])
    local = _address("localip", entry["localip"]) if _given(entry.get("localip")) else None
    if local is not None and local.version != address.version:
        raise _Bad(f"localip {local} and remoteip {address} are of different families")
    return ExternalPeer(
        address=address,
        asn=_asn(entry["remoteasn"]),
        port=_port(entry["port"]) if _given(entry.get("port")) else BGP_PORT,
        local_address=local,
        password=_password(entry.get("password", "")),
        multihop_ttl=_number("multihopttl", entry, 1, 255),
        hold_seconds=_number("holdtime", entry, 3, 65535),
        bfd=_bfd(entry.get("bfd")),
    )


def _number(name: str, entry: Entry, least: int, most: int) -> int | None:
    text = entry.get(name)
    if not _given(text):
        return None
    try:
        value = parse_base0(text) if isinstance(text, str) else -1
    except ValueError:
        value = -1
    if not least <= value <= most:
        raise _Bad(f"{name} {text!r} is not a number from {least} to {most}")
    return value


def _bfd(section: object) -> Bfd | None:
    if section in (None, "", "~", "null"):
        return None
    if not isinstance(section, dict):
        raise _Bad("bfd is not a mapping of fields")
    enabled = section.get("enabled", "false")
    if enabled not in TRUE and enabled not in FALSE:
        raise _Bad(f"bfd: enabled {enabled!r} is neither true nor false")
    values = {}
    for key, (name, least, most) in BFD_FIELDS.items():
        try:
            value = _number(key, section, least, most)
        except _Bad as error:
            raise _Bad(f"bfd: {error}") from None
        if value is not None:
            values[name] = value
    return Bfd(**values) if enabled in TRUE else None


def _flag_bfd(settings: Settings) -> Bfd | None:
    if not settings.enable_bfd:
        return None
    return Bfd(
        port=settings.bfd_port,
        multiplier=settings.bfd_detection_multiplier,
        send_milliseconds=settings.bfd_desired_min_tx_interval,
        receive_milliseconds=settings.bfd_required_min_rx_interval,
    )


def _given(text: object) -> bool:
    return text not in (None, "", "~", "null")


def _address(name: str, text: str) -> IPAddress:
    try:
        return parse_address(text)
    except ValueError:
        raise _Bad(f"{name} {text!r} is not an IP address") from None


def _asn(text: str) -> int:
    try:
        value = parse_base0(text)
    except ValueError:
        raise _Bad(f"remoteasn {text!r} is not a number") from None
    if not any(first <= value <= last for first, last in PEER_ASNS):
        allowed = ", ".join(f"{first}-{last}" for first, last in PEER_ASNS)
        raise _Bad(f"remoteasn {text!r} is reserved or out of range; allowed: {allowed}")
    return value


def _port(text: str) -> int:
    try:
        value = parse_base0(text)
    except ValueError:
        raise _Bad(f"port {text!r} is not a number") from None
    if not 1 <= value <= 65535:
        raise _Bad(f"port {text!r} is not in 1-65535")
    return value


def _password(text: str) -> str:
    """Standard base64 with padding; line breaks inside are skipped, as Go does."""
    try:
        secret = base64.b64decode(text.replace("\r", "").replace("\n", ""), validate=True).decode()
    except (binascii.Error, ValueError):
        raise _Bad("password is not base64 of a text (value not shown)") from None
    if len(secret.encode()) > PASSWORD_BYTES:
        raise _Bad(f"password is longer than {PASSWORD_BYTES} bytes (value not shown)")
    return secret


def _flag_entries(settings: Settings, secrets: Secrets) -> list[dict[str, str]]:
    """The flags' lists are of equal length or empty: the command line has seen to that."""
    columns = (
        ("remoteip", settings.peer_router_ips),
        ("remoteasn", tuple(map(str, settings.peer_router_asns))),
        ("port", tuple(map(str, settings.peer_router_ports))),
        ("password", tuple(base64.b64encode(text.encode()).decode() for text in secrets.peer_router_passwords)),
    )
    return [
        {name: column[index] for name, column in columns if index < len(column)}
        for index in range(len(settings.peer_router_ips))
    ]


def _list_entries(annotations: Mapping[str, str]) -> list[dict[str, str]]:
    """The ``peer.*`` lists side by side; raises `_Bad` when their lengths leave open what belongs to what."""
    columns: dict[str, list[str]] = {}
    for name, key in (
        ("remoteip", names.PEER_IPS),
        ("remoteasn", names.PEER_ASNS),
        ("port", names.PEER_PORTS),
        ("password", names.PEER_PASSWORDS),
        ("localip", names.PEER_LOCAL_IPS),
    ):
        text = annotations.get(key, "")
        if text.strip() or name in ("remoteip", "remoteasn"):
            columns[name] = [item.strip() for item in text.split(",")]
        count, wanted = len(columns.get(name, ())), len(columns["remoteip"])
        if name in columns and count != wanted:
            raise _Bad(f"annotation {key} has {count} items, {names.PEER_IPS} has {wanted}; they must be as many")
    return [{name: column[index] for name, column in columns.items()} for index in range(len(columns["remoteip"]))]


def _yaml_entries(text: str) -> list[object]:
    """The list in the ``peers`` annotation, every scalar as text; raises `_Bad`."""
    import yaml  # 1 MB that most nodes never need

    try:
        # BaseLoader makes texts and nothing else: no types to abuse, and 2001:10:… stays an address.
        value = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark is not None else ""
        raise _Bad(f"is not YAML{place}: {getattr(error, 'problem', None) or type(error).__name__}") from None
    if not isinstance(value, list):
        raise _Bad("is not a YAML list of peers")
    return value
