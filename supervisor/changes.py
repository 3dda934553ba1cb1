"""What a change of settings asks for while the agent runs: which programs to restart, add, remove or replace.

Pure: old and new settings in, `Reload` out. What each program reads decides (`READ_BY`, which a test holds against the
sources); a setting that the table does not know restarts every worker, which is lossless. gobgpd is told everything by
the router over its socket, so only another command line replaces it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from kube_router.supervisor.conf import SPEAKER, admin_hosts
from kube_router.supervisor.programs import PROGRAMS, RELOADER, wanted_programs
from kube_router.supervisor.settings import Problem
from kube_router.workers.settings import Settings

FIXED = frozenset(
    (
        "run_dir",
        "state_dir",
        "flags_file",
        "hostname_override",
        "node_name",
        "pod_name",
        "pod_namespace",
        "log_format",
        "kubeconfig",
        "master",
        "manifests",
        "cni_conf_file",
    )
)
"""Settings that stay until the agent is restarted: folders, identity, form of the log, source of the state."""

_KINDS = ("run_router", "run_firewall", "run_service_proxy", "run_loadbalancer", "enable_cni", "unbuilt_workers")
_FAMILIES = ("enable_ipv4", "enable_ipv6")
_RANGES = ("service_cluster_ip_range", "service_external_ip_range", "loadbalancer_ip_range")
_ROUTER = (
    *("advertise_cluster_ip", "advertise_external_ip", "advertise_loadbalancer_ip", "advertise_pod_cidr"),
    *("enable_ibgp", "nodes_full_mesh", "cluster_asn", "router_id", "override_nexthop", "bgp_port", "bgp_holdtime"),
    *("peer_router_ips", "peer_router_asns", "peer_router_ports", "peer_router_multihop_ttl"),
    *("bgp_graceful_restart", "bgp_graceful_restart_time", "bgp_graceful_restart_deferral_time"),
    *("bgp_long_lived_graceful_restart_time", "bgp_max_prefixes", "bgp_accept_covering_prefixes"),
    *("enable_bfd", "bfd_port", "bfd_detection_multiplier"),
    *("bfd_desired_min_tx_interval", "bfd_required_min_rx_interval"),
    *("enable_overlay", "overlay_type", "overlay_encap", "overlay_encap_port", "overlay_encap_accept_ports"),
    *("enable_pod_egress", "disable_source_dest_check", "strict_external_ip_validation"),
    *("routes_sync_period", "injected_routes_sync_period", "enable_cni"),
)
_PROXY = (
    "service_proxy_backend",
    *("ipvs_sync_period", "ipvs_permit_all", "ipvs_graceful_termination", "ipvs_graceful_period"),
    *("masquerade_all", "hairpin_mode", "nodeport_bindon_all_ip", "excluded_cidrs", "runtime_endpoint"),
    *("service_tcp_timeout", "service_tcpfin_timeout", "service_udp_timeout", "strict_external_ip_validation"),
    "service_node_port_range",
)
_FIREWALL = (
    *("iptables_sync_period", "service_node_port_range", "netpol_default_deny"),
    *("use_nftables_for_netpol", "netpol_recheck_established"),
)
READ_BY: dict[str, frozenset[str]] = {
    "watcher": frozenset((*_KINDS, "cache_sync_timeout")),
    "router": frozenset((*_ROUTER, *_FAMILIES, *_RANGES)),
    "cni": frozenset((*_FAMILIES, "auto_mtu", "enable_cni", "enable_overlay", "overlay_type", "overlay_encap")),
    "firewall": frozenset((*_FIREWALL, *_FAMILIES, *_RANGES)),
    "proxy": frozenset((*_PROXY, *_FAMILIES, *_RANGES)),
    "loadbalancer": frozenset(("loadbalancer_default_class", "loadbalancer_sync_period", *_FAMILIES, *_RANGES)),
    "health": frozenset(("health_addr", "health_port", "metrics_addr", "metrics_port", "metrics_path")),
    SPEAKER: frozenset(("gobgp_admin_address", "gobgp_admin_port")),
}
"""The settings that a program reads, besides those that every program reads (``v``)."""
UNREAD = frozenset(("enable_pprof", "peer_router_passwords_file"))
"""Settings that no running program reads: what the second one names is in the secrets."""
_KNOWN = frozenset().union(*READ_BY.values(), UNREAD)


class Verb(StrEnum):
    """What is done to a program; `REPLACE` also gives it the new command line."""

    REMOVE = "remove"
    RESTART = "restart"
    REPLACE = "replace"
    ADD = "add"


class Step(msgspec.Struct, frozen=True, array_like=True):
    """One program and what is done to it."""

    verb: Verb
    program: str

    def __str__(self) -> str:
        return f"{self.verb} {self.program}"


@dataclass(frozen=True, slots=True)
class Reload:
    """``settings`` are the new ones, with what cannot change as it was; ``changes`` and ``refused`` are for the log."""

    settings: Settings
    steps: tuple[Step, ...] = ()
    changes: tuple[str, ...] = ()
    refused: tuple[Problem, ...] = ()


def plan_reload(old: Settings, new: Settings, *, new_secrets: bool = False) -> Reload:
    """What to do about ``new`` settings; ``new_secrets``: whether the passwords of peers changed."""
    refused = tuple(_refusals(old, new))
    settings = msgspec.structs.replace(new, **{name: getattr(old, name) for name in FIXED})
    changed = tuple(name for name in Settings.__struct_fields__ if getattr(old, name) != getattr(settings, name))
    changes = tuple(f"{_flag(name)}={_shown(old, name)} -> {_shown(settings, name)}" for name in changed)
    return Reload(settings, tuple(_steps(old, settings, frozenset(changed), new_secrets)), changes, refused)


def _refusals(old: Settings, new: Settings) -> Iterator[Problem]:
    for name in sorted(FIXED):
        if getattr(old, name) != getattr(new, name) and not (name == "node_name" and _renamed(old, new)):
            rule = f"cannot change while the agent runs: it goes on with {_shown(old, name)!r} until it is restarted"
            yield Problem(_flag(name), _shown(new, name), rule)


def _renamed(old: Settings, new: Settings) -> bool:
    """Whether the flag says it already."""
    return old.hostname_override != new.hostname_override


def _steps(old: Settings, new: Settings, changed: frozenset[str], new_secrets: bool) -> Iterator[Step]:
    before = {program.name for program in wanted_programs(old)}
    after = {program.name for program in wanted_programs(new)}
    names = [program.name for program in PROGRAMS if program.name != RELOADER]
    yield from (Step(Verb.REMOVE, name) for name in reversed(names) if name in before - after)
    for name in names:
        if name in before & after:
            if name == SPEAKER:
                if _speaker_hosts(old) != _speaker_hosts(new):
                    yield Step(Verb.REPLACE, name)
            elif _concerns(name, changed) or (name == "router" and new_secrets):
                yield Step(Verb.RESTART, name)
    yield from (Step(Verb.ADD, name) for name in names if name in after - before)


def _concerns(program: str, changed: frozenset[str]) -> bool:
    return bool(changed & READ_BY[program] or changed - _KNOWN)


def _speaker_hosts(settings: Settings) -> tuple[str, ...]:
    return admin_hosts(settings.gobgp_admin_address, settings.gobgp_admin_port)


def _flag(name: str) -> str:
    """The flag of a setting, or the setting itself for what no flag gives."""
    return name if name in ("node_name", "cni_conf_file", "unbuilt_workers") else f"--{name.replace('_', '-')}"


def _shown(settings: Settings, name: str) -> str:
    """A value as an operator may write it."""
    value = getattr(settings, name)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}s" if isinstance(value, float) else str(value)
