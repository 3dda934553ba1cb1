"""The 79 flags of upstream v2.11 and ours: names, kinds, defaults, shorthands. The table is written by hand."""

from __future__ import annotations

import ast

import msgspec
import pytest

from kube_router.supervisor.flags import FLAGS, OWN_FLAGS, UPSTREAM_FLAGS, parse_arguments
from kube_router.supervisor.rules import RULES
from kube_router.supervisor.settings import NOT_SETTINGS, field_name
from kube_router.workers.settings import Settings

# name, kind, default (a duration in seconds)
UPSTREAM = """
advertise-cluster-ip bool False
advertise-external-ip bool False
advertise-loadbalancer-ip bool False
advertise-pod-cidr bool True
auto-mtu bool True
bfd-desired-min-tx-interval uint32 1000
bfd-detection-multiplier uint32 3
bfd-port uint32 3784
bfd-required-min-rx-interval uint32 1000
bgp-graceful-restart bool False
bgp-graceful-restart-deferral-time duration 360
bgp-graceful-restart-time duration 90
bgp-holdtime duration 90
bgp-port uint32 179
cache-sync-timeout duration 60
cleanup-config bool False
cluster-asn uint 0
disable-source-dest-check bool True
enable-bfd bool False
enable-cni bool True
enable-ibgp bool True
enable-ipv4 bool True
enable-ipv6 bool False
enable-overlay bool True
enable-pod-egress bool True
enable-pprof bool False
excluded-cidrs strings ()
gobgp-admin-address string '127.0.0.1'
gobgp-admin-port uint16 50051
hairpin-mode bool False
health-addr string ''
health-port uint16 20244
help bool False
hostname-override string ''
injected-routes-sync-period duration 60
iptables-sync-period duration 300
ipvs-graceful-period duration 30
ipvs-graceful-termination bool False
ipvs-permit-all bool True
ipvs-sync-period duration 300
kubeconfig string ''
loadbalancer-default-class bool True
loadbalancer-ip-range strings ()
loadbalancer-sync-period duration 60
masquerade-all bool False
master string ''
metrics-addr string ''
metrics-path string '/metrics'
metrics-port uint16 0
netpol-default-deny bool False
nodeport-bindon-all-ip bool False
nodes-full-mesh bool True
overlay-encap string 'ipip'
overlay-encap-port uint16 5555
overlay-type string 'subnet'
override-nexthop bool False
peer-router-asns uints ()
peer-router-ips ipSlice ()
peer-router-multihop-ttl uint8 0
peer-router-passwords strings ()
peer-router-passwords-file string ''
peer-router-ports uints ()
router-id string ''
routes-sync-period duration 300
run-firewall bool True
run-loadbalancer bool False
run-router bool True
run-service-proxy bool True
runtime-endpoint string ''
service-cluster-ip-range strings ('10.96.0.0/12',)
service-external-ip-range strings ()
service-node-port-range string '30000-32767'
service-tcp-timeout duration 0
service-tcpfin-timeout duration 0
service-udp-timeout duration 0
strict-external-ip-validation bool True
use-nftables-for-netpol bool False
v string '0'
version bool False
"""
OURS = {
    "manifests": ("string", ""),
    "run-dir": ("string", "/run/kube-router"),
    "state-dir": ("string", "/var/lib/kube-router"),
    "log-format": ("string", "text"),
    "netpol-recheck-established": ("bool", "false"),
    "service-proxy-backend": ("string", "auto"),
    "flags-file": ("string", ""),
    "overlay-encap-accept-ports": ("uints", ""),
    "bgp-max-prefixes": ("uint32", "50000"),
    "bgp-accept-covering-prefixes": ("bool", "false"),
    "bgp-long-lived-graceful-restart-time": ("duration", "0s"),
}
EXPECTED = {
    name: (kind, ast.literal_eval(default) * 10**9) if kind == "duration" else (kind, ast.literal_eval(default))
    for name, kind, default in (line.split(" ", 2) for line in UPSTREAM.strip().splitlines())
}


def test_upstream_has_79_flags() -> None:
    assert len(EXPECTED) == 79
    assert len(UPSTREAM_FLAGS) == 79
    assert len({flag.name for flag in FLAGS}) == 90


@pytest.mark.parametrize("name", EXPECTED)
def test_kind_and_default_are_upstreams(name: str) -> None:
    flag = next(flag for flag in UPSTREAM_FLAGS if flag.name == name)
    assert (flag.kind, flag.default_value()) == EXPECTED[name]
    assert parse_arguments([]).values[name] == EXPECTED[name][1]


def test_nothing_else_is_in_the_table() -> None:
    assert {flag.name for flag in UPSTREAM_FLAGS} == set(EXPECTED)
    assert {flag.name: (flag.kind, flag.default) for flag in OWN_FLAGS} == OURS


def test_the_only_shorthands() -> None:
    assert {flag.shorthand: flag.name for flag in FLAGS if flag.shorthand} == {"h": "help", "v": "v", "V": "version"}


def test_only_the_passwords_are_secret() -> None:
    assert [flag.name for flag in FLAGS if flag.secret] == ["peer-router-passwords"]


def test_every_flag_is_a_field_of_the_settings_and_the_other_way_round() -> None:
    found_out_at_start = {"node_name", "pod_name", "pod_namespace", "cni_conf_file", "unbuilt_workers"}
    fields = {field.name for field in msgspec.structs.fields(Settings)} - found_out_at_start
    assert {field_name(flag.name) for flag in FLAGS if flag.name not in NOT_SETTINGS} == fields


def test_every_rule_has_its_flag_and_every_duration_a_rule() -> None:
    names = {flag.name for flag in FLAGS}
    assert set(RULES) <= names
    assert {flag.name for flag in FLAGS if flag.kind == "duration"} <= set(RULES)


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_help_of_a_flag_is_one_sentence_in_one_line(flag: object) -> None:
    usage = flag.usage  # type: ignore[attr-defined]
    assert usage.endswith(".") and "\n" not in usage and "`" not in usage and len(usage) <= 110
