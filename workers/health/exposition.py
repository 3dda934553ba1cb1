"""Metrics in the text format of Prometheus (version 0.0.4), from heartbeats and the table of processes.

Pure: the same input gives the same text. Names are upstream's where upstream has the thing; what the workers count
comes under the names they give it. A series is a name with, or without, a block of labels (``routes{family="IPv4"}``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from kube_router.ipc.messages import Heartbeat, Session
from kube_router.workers.health.processes import ProcessTable

PREFIX = "kube_router_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds in seconds: the default ones of Prometheus' client libraries, as upstream uses."""
MOST_HISTOGRAMS = 500
KUBE_PROXY = "kubeproxy_"
"""What begins so is kube-proxy's name for it, and gets no prefix of ours."""
PROGRAMMING_BUCKETS = (0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
"""kube-proxy's, in seconds, of ``kubeproxy_network_programming_duration_seconds``."""

HELP = {
    "build_info": "Version of kube-router, and of what runs it",
    "bgp_peer_info": "One for each BGP session: its address, kind, AS number and state",
    "bgp_peer_flaps_total": "How often a session has ended since the router worker's start",
    "bgp_peer_prefixes_accepted": "Prefixes of a peer without AS loop; the import policy comes after that",
    "bgp_peer_prefixes_advertised": "Prefixes announced to a peer",
    "bgp_peer_prefixes_received": "Prefixes that a peer announces",
    "bgp_peer_uptime_seconds": "Seconds since a session was established, 0 if it is not",
    "controller_bgp_advertisements_received": "Best-path events received",
    "controller_bgp_advertisements_sent": "Paths advertised or withdrawn",
    "controller_bgp_internal_peers_sync_time": "Seconds for a sync of the internal peers",
    "controller_iptables_sync_time": "Seconds for a sync of the network policies",
    "controller_iptables_v4_restore_time": "Seconds to write IPv4 chains",
    "controller_iptables_v4_save_time": "Seconds to read IPv4 chains",
    "controller_iptables_v6_restore_time": "Seconds to write IPv6 chains",
    "controller_iptables_v6_save_time": "Seconds to read IPv6 chains",
    "controller_policy_chains": "Chains of network policies in both families",
    "controller_policy_chains_sync_time": "Seconds for a sync of the chains of network policies",
    "controller_policy_ipset_v4_restore_time": "Seconds to write IPv4 sets",
    "controller_policy_ipset_v6_restore_time": "Seconds to write IPv6 sets",
    "controller_policy_ipsets": "Sets of network policies in both families",
    "controller_repairs": "Things that somebody else took away or altered and that were put back, by kind",
    "controller_routes_sync_time": "Seconds for a sync of the node and pod sets",
    "controller_ipvs_services": "Addresses and ports at which Services are served",
    "controller_ipvs_services_sync_time": "Seconds for a sync of the Services",
    "healthy": "Whether /healthz answers with success",
    "host_routes_added": "Kernel routes written",
    "host_routes_removed": "Kernel routes removed",
    "host_routes_sync_time": "Seconds for a sync of the kernel routes",
    "host_routes_synced": "Kernel routes that are kept in sync",
    "loadbalancer_addresses": "Usable addresses in the ranges of the load balancer",
    "loadbalancer_leader": "Whether this agent gives out load-balancer addresses",
    "loadbalancer_reservations": "Addresses given out and not seen in their Service yet",
    "loadbalancer_services_waiting": "Services that lack an address",
    "host_tunnels_added": "Tunnel devices made",
    "host_tunnels_changed": "Tunnel devices changed in place",
    "host_tunnels_removed": "Tunnel devices removed",
    "host_tunnels_synced": "Tunnel devices that are kept in sync",
    "kubeproxy_network_programming_duration_seconds": "Seconds from a change of pods or Services to the kernel",
    "policy_connections_cut": "Open connections cut because a change of policies or pods forbids them",
    "policy_drift_repairs": "Foreign changes to network policy's chains, sets and tables that were undone",
    "policy_enforced": "Network policies in force on this node",
    "policy_enforcement_latency_seconds": "Seconds from a change in the cluster's state to the kernel's word",
    "policy_failed": "Network policies of which the kernel refused a part",
    "policy_isolated_pods": "Pods of this node that some network policy isolates",
    "policy_local_pods": "Pods of this node that network policy can concern",
    "policy_sets": "Address and port sets of the network policies in force",
    "service_drift_repairs": "Foreign changes to what translates Services that were undone",
    "service_frontends": "Addresses and ports that are programmed, in both families",
    "service_health_ports": "Health check ports of Services",
    "service_ports": "Ports of Services",
    "source_degraded": "Number of troubles with the source of the cluster's state",
    "source_in_sync": "Whether the source of the cluster's state has been listed completely",
    "source_stale": "Whether the cluster's state is that of the last snapshot on disk",
    "worker_dropped_total": "Messages lost or refused",
    "worker_errors_total": "Failed steps by phase",
    "worker_last_sync_timestamp_seconds": "Unix time of the last successful sync",
    "worker_pending": "Steps that wait to be tried again",
    "worker_restarts_total": "Starts of the process after the first",
    "worker_rss_bytes": "Resident memory",
    "worker_sync_seconds": "Seconds that the last sync took",
    "worker_syncs_total": "Syncs since the process started",
    "worker_up": "Whether the process is running",
    "worker_writes_total": "Changes made to kernel, files and daemons since the process started",
}

_SERIES = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\.)*",?)*)\})?\Z')


class Histogram:
    """Samples by bucket, as Prometheus counts them: each bucket holds all that is not greater than its bound."""

    __slots__ = ("bounds", "count", "counts", "total")

    def __init__(self, bounds: Sequence[float] = BUCKETS) -> None:
        self.bounds = bounds
        self.counts = [0] * len(bounds)
        self.count = 0
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Add a sample."""
        self.count += 1
        self.total += value
        for place, bound in enumerate(self.bounds):
            if value <= bound:
                self.counts[place] += 1


class Histograms:
    """All histograms by series; they live here, as heartbeats carry each sample once."""

    def __init__(self) -> None:
        self.by_series: dict[str, Histogram] = {}

    def take(self, beat: Heartbeat) -> None:
        """Add the samples of a heartbeat."""
        for series, values in beat.observations.items():
            if series not in self.by_series and len(self.by_series) >= MOST_HISTOGRAMS:
                continue
            bounds = PROGRAMMING_BUCKETS if series.startswith(KUBE_PROXY) else BUCKETS
            histogram = self.by_series.setdefault(series, Histogram(bounds))
            for value in values:
                histogram.observe(value)


class Families:
    """Samples grouped by metric, as the format demands; each metric has one type."""

    def __init__(self) -> None:
        self._types: dict[str, str] = {}
        self._samples: dict[str, list[str]] = {}

    def add(self, kind: str, series: str, value: float, **labels: str) -> None:
        """One sample; a series that is no metric name, or that has another type already, is left out."""
        if (parsed := self._open(kind, series)) is not None:
            name, inner = parsed
            self._samples[name].append(f"{_prefixed(name)}{_labels(labels, inner)} {_number(value)}")

    def add_histogram(self, series: str, histogram: Histogram) -> None:
        """All samples of a histogram."""
        if (parsed := self._open("histogram", series)) is None:
            return
        name, inner = parsed
        samples, counts = self._samples[name], (*histogram.counts, histogram.count)
        for bound, count in zip((*map(_number, histogram.bounds), "+Inf"), counts, strict=True):
            samples.append(f"{_prefixed(name)}_bucket{_labels({'le': bound}, inner)} {count}")
        samples.append(f"{_prefixed(name)}_sum{_labels({}, inner)} {_number(histogram.total)}")
        samples.append(f"{_prefixed(name)}_count{_labels({}, inner)} {histogram.count}")

    def _open(self, kind: str, series: str) -> tuple[str, str] | None:
        match = _SERIES.match(series)
        if match is None or self._types.setdefault(match[1], kind) != kind:
            return None
        self._samples.setdefault(match[1], [])
        return match[1], (match[2] or "").rstrip(",")

    def text(self) -> str:
        """The exposition, by name."""
        lines = []
        for name in sorted(self._samples):
            lines.append(f"# HELP {_prefixed(name)} {HELP.get(name, name.replace('_', ' '))}")
            lines.append(f"# TYPE {_prefixed(name)} {self._types[name]}")
            lines += self._samples[name]
        return "\n".join(lines) + "\n"


def _prefixed(name: str) -> str:
    return name if name.startswith(KUBE_PROXY) else f"{PREFIX}{name}"


def _labels(labels: Mapping[str, str], inner: str) -> str:
    parts = [inner] if inner else []
    parts += [f'{name}="{_escaped(value)}"' for name, value in labels.items()]
    return "{" + ",".join(parts) + "}" if parts else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))


def render_metrics(
    heartbeats: Iterable[Heartbeat],
    table: ProcessTable,
    histograms: Histograms,
    *,
    healthy: bool,
    version: str,
    runtime: str,
) -> str:
    """The whole exposition. ``runtime`` stands where upstream names the version of Go."""
    families = Families()
    families.add("gauge", "build_info", 1, goversion=runtime, version=version)
    families.add("gauge", "healthy", healthy)
    beats = list(heartbeats)
    for beat in beats:
        _add_worker(families, beat)
    for name, process in table.programs.items():
        families.add("gauge", "worker_up", process.state == "RUNNING", worker=name)
        families.add("counter", "worker_restarts_total", process.restarts, worker=name)
    source = next((beat.source for beat in beats if beat.worker == "watcher" and beat.source is not None), None)
    if source is not None:
        families.add("gauge", "source_in_sync", source.in_sync)
        families.add("gauge", "source_stale", source.stale)
        families.add("gauge", "source_degraded", len(source.degraded))
    for series, histogram in histograms.by_series.items():
        families.add_histogram(series, histogram)
    return families.text()


def _add_worker(families: Families, beat: Heartbeat) -> None:
    worker = beat.worker
    families.add("counter", "worker_syncs_total", beat.syncs, worker=worker)
    families.add("counter", "worker_writes_total", beat.writes, worker=worker)
    families.add("counter", "worker_dropped_total", beat.dropped, worker=worker)
    families.add("gauge", "worker_pending", beat.pending, worker=worker)
    families.add("gauge", "worker_rss_bytes", beat.rss, worker=worker)
    if beat.sync_seconds is not None:
        families.add("gauge", "worker_sync_seconds", beat.sync_seconds, worker=worker)
    if beat.last_sync is not None:
        families.add("gauge", "worker_last_sync_timestamp_seconds", beat.last_sync, worker=worker)
    for phase, count in beat.errors.items():
        families.add("counter", "worker_errors_total", count, worker=worker, phase=phase)
    for series, value in beat.counts.items():
        families.add("gauge", series, value)
    for series, value in beat.counters.items():
        families.add("counter", series, value)
    for session in beat.sessions:
        _add_session(families, session, beat.sent)


def _add_session(families: Families, session: Session, now: float) -> None:
    address = session.address
    labels = {"address": address, "type": session.type, "asn": str(session.asn), "state": session.state}
    families.add("gauge", "bgp_peer_info", 1, **labels)
    families.add("gauge", "bgp_peer_prefixes_received", session.received, address=address)
    families.add("gauge", "bgp_peer_prefixes_accepted", session.accepted, address=address)
    if session.advertised is not None:
        families.add("gauge", "bgp_peer_prefixes_advertised", session.advertised, address=address)
    up = session.state == "established" and session.since is not None
    families.add(
        "gauge", "bgp_peer_uptime_seconds", max(0.0, now - (session.since or 0.0)) if up else 0, address=address
    )
    families.add("counter", "bgp_peer_flaps_total", session.flaps, address=address)
