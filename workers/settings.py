"""The settings of one agent, as every worker reads them: one field a flag, typed and already validated.

Pure but for `load_settings`/`save_settings`, which read and write the two files in the run directory. The command line
(``supervisor/flags.py``) is the only maker of a `Settings`; workers trust it. Field names are flag names with ``_``
for ``-``; durations are seconds (float), addresses and CIDRs are in canonical text.

Secrets are kept apart (`Secrets`, a file that only root reads), so that neither the watcher nor health, nor a dump of
the settings, can hold a BGP password.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from kube_router.workers.model import Family

SETTINGS_FILE = "settings.json"
"""In the run directory's ``ipc`` folder, which is the working directory of every worker; mode 0640."""
SECRETS_FILE = "secrets.json"
"""In the run directory; owner root, mode 0600."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Every flag (defaults as upstream v2.11), plus what the agent adds and what it found out at start."""

    # which controllers run
    run_router: bool = True
    run_firewall: bool = True
    run_service_proxy: bool = True
    run_loadbalancer: bool = False
    # API server and node
    kubeconfig: str = ""
    master: str = ""
    hostname_override: str = ""
    enable_ipv4: bool = True
    enable_ipv6: bool = False
    cache_sync_timeout: float = 60.0
    # health, metrics, profiling
    health_addr: str = ""
    health_port: int = 20244
    metrics_addr: str = ""
    metrics_port: int = 0
    metrics_path: str = "/metrics"
    enable_pprof: bool = False
    v: int = 0
    # router
    advertise_cluster_ip: bool = False
    advertise_external_ip: bool = False
    advertise_loadbalancer_ip: bool = False
    advertise_pod_cidr: bool = True
    enable_ibgp: bool = True
    nodes_full_mesh: bool = True
    cluster_asn: int = 0
    peer_router_ips: tuple[str, ...] = ()
    peer_router_asns: tuple[int, ...] = ()
    peer_router_ports: tuple[int, ...] = ()
    peer_router_passwords_file: str = ""
    peer_router_multihop_ttl: int = 0
    bgp_port: int = 179
    bgp_holdtime: float = 90.0
    bgp_graceful_restart: bool = False
    bgp_graceful_restart_time: float = 90.0
    bgp_graceful_restart_deferral_time: float = 360.0
    router_id: str = ""
    override_nexthop: bool = False
    gobgp_admin_address: str = "127.0.0.1"
    gobgp_admin_port: int = 50051
    enable_bfd: bool = False
    bfd_port: int = 3784
    bfd_detection_multiplier: int = 3
    bfd_desired_min_tx_interval: int = 1000
    bfd_required_min_rx_interval: int = 1000
    enable_cni: bool = True
    auto_mtu: bool = True
    enable_overlay: bool = True
    overlay_type: str = "subnet"
    overlay_encap: str = "ipip"
    overlay_encap_port: int = 5555
    enable_pod_egress: bool = True
    disable_source_dest_check: bool = True
    routes_sync_period: float = 300.0
    injected_routes_sync_period: float = 60.0
    # service proxy
    ipvs_sync_period: float = 300.0
    ipvs_permit_all: bool = True
    ipvs_graceful_termination: bool = False
    ipvs_graceful_period: float = 30.0
    masquerade_all: bool = False
    hairpin_mode: bool = False
    nodeport_bindon_all_ip: bool = False
    excluded_cidrs: tuple[str, ...] = ()
    runtime_endpoint: str = ""
    service_tcp_timeout: float = 0.0
    service_tcpfin_timeout: float = 0.0
    service_udp_timeout: float = 0.0
    # firewall
    iptables_sync_period: float = 300.0
    service_node_port_range: str = "30000:32767"
    netpol_default_deny: bool = False
    use_nftables_for_netpol: bool = False
    netpol_recheck_established: bool = False
    # address ranges
    service_cluster_ip_range: tuple[str, ...] = ("10.96.0.0/12",)
    service_external_ip_range: tuple[str, ...] = ()
    loadbalancer_ip_range: tuple[str, ...] = ()
    strict_external_ip_validation: bool = True
    # load balancer
    loadbalancer_default_class: bool = True
    loadbalancer_sync_period: float = 60.0
    # ours
    flags_file: str = ""
    service_proxy_backend: str = "auto"
    overlay_encap_accept_ports: tuple[int, ...] = ()
    bgp_max_prefixes: int = 50_000
    bgp_accept_covering_prefixes: bool = False
    bgp_long_lived_graceful_restart_time: float = 0.0
    manifests: str = ""
    run_dir: str = "/run/kube-router"
    state_dir: str = "/var/lib/kube-router"
    log_format: str = "text"
    # found out at start
    node_name: str = ""
    pod_name: str = ""
    pod_namespace: str = ""
    cni_conf_file: str = "/etc/cni/net.d/10-kuberouter.conf"
    unbuilt_workers: tuple[str, ...] = ()

    @property
    def families(self) -> tuple[Family, ...]:
        """The enabled address families, IPv4 first."""
        wanted = ((Family.IPV4, self.enable_ipv4), (Family.IPV6, self.enable_ipv6))
        return tuple(family for family, enabled in wanted if enabled)


class Secrets(msgspec.Struct, frozen=True, kw_only=True):
    """What must not be readable by a worker that has no use for it: decoded BGP passwords, one a flag peer."""

    peer_router_passwords: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Secrets(peer_router_passwords=<{len(self.peer_router_passwords)} hidden>)"


def save(path: Path, value: Settings | Secrets, mode: int) -> None:
    """Write ``value`` as JSON to ``path`` with ``mode``, by rename, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(msgspec.json.encode(value))
    temporary.replace(path)


def load_settings(path: Path = Path(SETTINGS_FILE)) -> Settings:
    """Read the settings; raises FileNotFoundError or msgspec.ValidationError."""
    return msgspec.json.decode(path.read_bytes(), type=Settings)


def load_secrets(run_dir: str) -> Secrets:
    """Read the secrets of the agent whose run directory is ``run_dir``; needs root."""
    return msgspec.json.decode((Path(run_dir) / SECRETS_FILE).read_bytes(), type=Secrets)
