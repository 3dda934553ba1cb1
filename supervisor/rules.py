"""One rule a flag: what its value must be, and the canonical form that workers get.

Pure: `RULES` maps a flag's name to a function that takes the parsed value and returns the canonical one, or raises
ValueError with the rule in words ("must be …"), to be read after the flag and its value. A flag without an entry takes
every value of its type. Rules that look at two flags are in `settings`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from kube_router.supervisor import govalues
from kube_router.supervisor.govalues import NANOSECONDS
from kube_router.workers.model import parse_network

Rule = Callable[[Any], object]
"""The argument has the type of its flag's kind (see `pflag.Value`)."""

SECOND = NANOSECONDS["s"]
PRIVATE_ASNS = ((64512, 65535), (4200000000, 4294967294))
"""What ``--cluster-asn`` may be (RFC 6996; 65535 is let through, as upstream does)."""
PEER_ASNS = ((1, 23455), (23457, 63999), (64512, 65534), (131072, 4294967294))
"""What a peer's ASN may be: not AS_TRANS (RFC 6793), nor reserved or for documentation (RFC 5398, RFC 7300)."""
LONGEST_IPVS_TIMEOUT = 2_147_483
"""Seconds; the kernel keeps IPVS timeouts as int jiffies (HZ up to 1000)."""
LONGEST_RUN_DIR = 80
"""Bytes, so that the longest socket path below, supervisord's temporary one, fits sun_path (unix(7): 107)."""

_PATH = re.compile(r"/[A-Za-z0-9._/+@:=,-]*", re.ASCII)
_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", re.ASCII)
_PORT_RANGE = re.compile(r"([0-9]{1,5})[-:]([0-9]{1,5})", re.ASCII)
_METRICS_PATH = re.compile(r"/[^\s?#{}%\"\\]*")


def any_value(value: object) -> object:
    """Every value of the flag's type."""
    return value


def seconds(nanoseconds: int) -> float:
    """A duration as workers take it."""
    return nanoseconds / SECOND


def period(value: int) -> float:
    """A duration above zero."""
    if value <= 0:
        raise ValueError("must be above 0s")
    return seconds(value)


def not_negative(value: int) -> float:
    """A duration of zero or more."""
    if value < 0:
        raise ValueError("must not be negative")
    return seconds(value)


def duration(least: int, most: int) -> Callable[[int], float]:
    """A duration from ``least`` to ``most`` seconds; 0 as ``least`` is itself too little."""

    def rule(value: int) -> float:
        if not (least * SECOND <= value <= most * SECOND) or value == 0:
            longest = govalues.format_duration(most * SECOND)
            raise ValueError(
                f"must be from {least}s to {longest}" if least else f"must be above 0s and at most {longest}"
            )
        return seconds(value)

    return rule


def ipvs_timeout(value: int) -> float:
    """Zero (leave the kernel's), or what the kernel can keep, in whole seconds at least."""
    if value != 0 and not SECOND <= value <= LONGEST_IPVS_TIMEOUT * SECOND:
        raise ValueError(f"must be 0s (leave as it is), or from 1s to {LONGEST_IPVS_TIMEOUT}s")
    return seconds(value)


def number(least: int, most: int) -> Callable[[int], int]:
    """A number from ``least`` to ``most``."""

    def rule(value: int) -> int:
        if not least <= value <= most:
            raise ValueError(f"must be from {least} to {most}")
        return value

    return rule


port = number(1, 65535)


def ports(values: Sequence[int]) -> tuple[int, ...]:
    """TCP ports."""
    for item, value in enumerate(values, 1):
        if not 1 <= value <= 65535:
            raise ValueError(f"item {item} must be from 1 to 65535")
    return tuple(values)


def encap_ports(values: Sequence[int]) -> tuple[int, ...]:
    """UDP ports of tunnels."""
    for item, value in enumerate(values, 1):
        if not 1024 <= value <= 65535:
            raise ValueError(f"item {item} must be from 1024 to 65535")
    return tuple(dict.fromkeys(values))


def long_lived(value: int) -> float:
    """Zero, or what 24 bits of seconds hold (RFC 9494 section 3)."""
    if not 0 <= value < 2**24 * SECOND:
        raise ValueError(f"must be from 0s to {govalues.format_duration((2**24 - 1) * SECOND)}")
    return seconds(value)


def peer_asns(values: Sequence[int]) -> tuple[int, ...]:
    """ASNs that a peer may have."""
    for item, value in enumerate(values, 1):
        if not in_ranges(value, PEER_ASNS):
            raise ValueError(f"item {item} must be an AS number from {range_text(PEER_ASNS)}")
    return tuple(values)


def in_ranges(value: int, ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether ``value`` is inside one of the closed ``ranges``."""
    return any(first <= value <= last for first, last in ranges)


def range_text(ranges: Sequence[tuple[int, int]]) -> str:
    """``1-5, 7-9 or 11-12``."""
    texts = [f"{first}-{last}" for first, last in ranges]
    return " or ".join((", ".join(texts[:-1]), texts[-1])) if len(texts) > 1 else texts[0]


def one_of(*words: str) -> Callable[[str], str]:
    """One of some words."""

    def rule(value: str) -> str:
        if value not in words:
            raise ValueError("must be " + " or ".join(govalues.quote(word) for word in words))
        return value

    return rule


def address(value: str) -> str:
    """An IP address, an IPv6 one with or without brackets; ``localhost`` is 127.0.0.1."""
    bare = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    if bare == "localhost":
        return "127.0.0.1"
    try:
        parsed = ipaddress.ip_address(bare)
    except ValueError:
        raise ValueError("must be an IP address (IPv6 with or without brackets)") from None
    if parsed.version == 4 and bare != value:
        raise ValueError("must be an IP address; brackets are for IPv6")
    return str(parsed)


def listen_address(value: str) -> str:
    """An address to listen on; empty is all of them."""
    if not value:
        return ""
    try:
        return address(value)
    except ValueError as error:
        raise ValueError(f"{error}, or empty for all addresses") from None


def admin_address(value: str) -> str:
    """As upstream, empty is loopback; unlike upstream, a word that is no address is refused."""
    return address(value) if value else "127.0.0.1"


def router_id(value: str) -> str:
    """An IPv4 address other than 0.0.0.0 (RFC 6286), ``generate``, or empty."""
    if value in ("", "generate"):
        return value
    try:
        parsed = ipaddress.IPv4Address(value)
    except ValueError:
        parsed = ipaddress.IPv4Address(0)
    if not int(parsed):
        raise ValueError(
            'must be an IPv4 address other than 0.0.0.0, "generate", or empty for the node\'s IPv4 address'
        )
    return str(parsed)


def cidrs(values: Sequence[str]) -> tuple[str, ...]:
    """CIDRs, blanks around them forgiven, host bits cleared."""
    canonical = []
    for item, value in enumerate(values, 1):
        try:
            canonical.append(str(parse_network(value.strip())))
        except ValueError:
            raise ValueError(f"item {item}, {govalues.quote(value)}, must be a CIDR such as 10.96.0.0/12") from None
    return tuple(canonical)


def cluster_ip_range(values: Sequence[str]) -> tuple[str, ...]:
    """One or two CIDRs."""
    if not 1 <= len(values) <= 2:
        raise ValueError(f"must hold one or two CIDRs, not {len(values)}")
    return cidrs(values)


def node_port_range(value: str) -> str:
    """``FIRST-LAST`` or ``FIRST:LAST``, to ``FIRST:LAST``."""
    match = _PORT_RANGE.fullmatch(value)
    if match is None or not 0 <= int(match[1]) < int(match[2]) <= 65535:
        raise ValueError("must be FIRST-LAST or FIRST:LAST, two ports up to 65535, the first below the last")
    return f"{int(match[1])}:{int(match[2])}"


def metrics_path(value: str) -> str:
    """The path of an URL."""
    if not _METRICS_PATH.fullmatch(value):
        raise ValueError('must begin with "/" and hold no blanks, "?", "#", "%", quotes, braces or backslashes')
    return value


def runtime_endpoint(value: str) -> str:
    """``unix://`` and an absolute path, or empty."""
    if value and not re.fullmatch(r"unix:///[^\s\0]+", value):
        raise ValueError('must be "unix://" and the absolute path of a socket, or empty')
    return value


def api_url(value: str) -> str:
    """The URL of an API server; without a scheme it is https."""
    if not value:
        return ""
    url = value if "://" in value else f"https://{value}"
    rule = "must be the http or https URL of an API server"
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or parts.query
    except ValueError:
        raise ValueError(rule) from None
    if wrong or re.search(r"[\s\0]", value):
        raise ValueError(rule)
    if parts.username is not None:
        raise ValueError("must hold no user name or password; use --kubeconfig for credentials")
    return url.rstrip("/")


def node_name(value: str) -> str:
    """The name of a Node: a DNS subdomain (RFC 1123), or empty."""
    if value and not is_dns_subdomain(value):
        raise ValueError("must be the name of a Node: lower-case letters, digits, '-' and '.', at most 253")
    return value


def is_dns_subdomain(value: str) -> bool:
    """Whether `node_name` takes it; pods and namespaces are named by the same rule."""
    return len(value) <= 253 and _NODE_NAME.fullmatch(value) is not None


def directory(value: str) -> str:
    """A directory whose name can stand in any configuration file unquoted; already absolute."""
    if not _PATH.fullmatch(value) or value.strip("/") == "" or ".." in value.split("/"):
        raise ValueError(
            "must be a directory other than /, named with letters, digits and ._/+@:=,- only, without '..'"
        )
    return "/" + "/".join(part for part in value.split("/") if part not in ("", "."))


def run_directory(value: str) -> str:
    """A directory short enough for the names of sockets in it."""
    canonical = directory(value)
    if len(canonical) > LONGEST_RUN_DIR:
        raise ValueError(f"must be at most {LONGEST_RUN_DIR} bytes long, for the sockets in it")
    return canonical


def log_level(value: str) -> int:
    """A 32-bit number."""
    return govalues.parse_int(value, 32)


RULES: dict[str, Rule] = {
    "v": log_level,
    "master": api_url,
    "hostname-override": node_name,
    "cache-sync-timeout": period,
    "health-addr": listen_address,
    "metrics-addr": listen_address,
    "metrics-path": metrics_path,
    "peer-router-asns": peer_asns,
    "peer-router-ports": ports,
    "bgp-port": port,
    "bgp-holdtime": duration(3, 65535),
    "bgp-graceful-restart-time": duration(0, 4095),
    "bgp-graceful-restart-deferral-time": duration(0, 18 * 3600),
    "router-id": router_id,
    "gobgp-admin-address": admin_address,
    "bfd-port": port,
    "bfd-detection-multiplier": number(1, 255),
    "bfd-desired-min-tx-interval": number(1, 4294967),
    "bfd-required-min-rx-interval": number(1, 4294967),
    "overlay-type": one_of("subnet", "full"),
    "overlay-encap": one_of("ipip", "fou"),
    "overlay-encap-port": number(1024, 65535),
    "overlay-encap-accept-ports": encap_ports,
    "bgp-long-lived-graceful-restart-time": long_lived,
    "routes-sync-period": period,
    "injected-routes-sync-period": period,
    "ipvs-sync-period": period,
    "ipvs-graceful-period": not_negative,
    "excluded-cidrs": cidrs,
    "runtime-endpoint": runtime_endpoint,
    "service-tcp-timeout": ipvs_timeout,
    "service-tcpfin-timeout": ipvs_timeout,
    "service-udp-timeout": ipvs_timeout,
    "iptables-sync-period": period,
    "service-node-port-range": node_port_range,
    "service-cluster-ip-range": cluster_ip_range,
    "service-external-ip-range": cidrs,
    "loadbalancer-ip-range": cidrs,
    "loadbalancer-sync-period": period,
    "run-dir": run_directory,
    "state-dir": directory,
    "log-format": one_of("text", "json"),
    "service-proxy-backend": one_of("auto", "ipvs", "nftables"),
}
