"""From a command line to settings: rules about several flags, families, peers and passwords, what is not built."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kube_router.supervisor.flags import FLAGS, parse_arguments
from kube_router.supervisor.pflag import FlagError
from kube_router.supervisor.settings import Resolution, Surroundings, decode_passwords, resolve
from kube_router.workers.settings import Secrets, Settings

MACHINE = Surroundings(environment={"NODE_NAME": "node-1"}, host_name="host-1", working_directory="/")
SECRET = "ganz geheim"
ENCODED = base64.b64encode(SECRET.encode()).decode()
PEER = ("--peer-router-ips=10.0.0.1", "--peer-router-asns=65001")
TWO_PEERS = ("--peer-router-ips=10.0.0.1,fd00::1", "--peer-router-asns=65001,65002")


def resolution(*arguments: str, **machine: Any) -> Resolution:
    return resolve(parse_arguments(arguments), replace(MACHINE, **machine))


def faults(*arguments: str, passwords_file: str | None = None) -> list[str]:
    return [str(problem) for problem in resolution(*arguments, passwords_file=passwords_file).problems]


def test_without_flags_the_settings_are_the_defaults() -> None:
    result = resolution()
    assert result.problems == () and result.remarks == ()
    unbuilt = ()
    assert result.settings == msgspec.structs.replace(Settings(), node_name="node-1", unbuilt_workers=unbuilt)
    assert result.secrets == Secrets()


def test_settings_survive_their_file() -> None:
    settings = resolution(*TWO_PEERS, "--excluded-cidrs=10.0.0.0/8", "-v=2").settings
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings) == settings


def test_every_worker_that_can_be_asked_for_is_built() -> None:
    assert resolution("--run-loadbalancer", environment=POD).settings.unbuilt_workers == ()


# --- the allocator of load-balancer addresses -------------------------------------------------------------------------


POD = {"POD_NAME": "kube-router-x7k2p", "POD_NAMESPACE": "kube-system"}


def test_the_allocator_knows_its_pod() -> None:
    settings = resolution("--run-loadbalancer", environment=POD).settings
    assert (settings.pod_name, settings.pod_namespace) == ("kube-router-x7k2p", "kube-system")


def test_the_namespace_comes_from_the_service_account_too() -> None:
    environment = {"POD_NAME": "kube-router-x7k2p"}
    result = resolution("--run-loadbalancer", environment=environment, namespace_file="networking\n")
    assert (result.problems, result.settings.pod_namespace) == ((), "networking")


@pytest.mark.parametrize(
    ("environment", "key", "value"),
    [
        ({}, "POD_NAME", ""),
        ({"POD_NAME": "a"}, "POD_NAMESPACE", ""),
        ({**POD, "POD_NAME": "../x"}, "POD_NAME", "../x"),
        ({**POD, "POD_NAMESPACE": "a b"}, "POD_NAMESPACE", "a b"),
    ],
)
def test_without_its_pod_the_allocator_cannot_start(environment: dict[str, str], key: str, value: str) -> None:
    problems = [str(problem) for problem in resolution("--run-loadbalancer", environment=environment).problems]
    rule = "must be set to the agent's own pod by the downward API, for --run-loadbalancer"
    assert f'{key}="{value}": {rule}' in problems
    assert resolution(environment=environment).problems == ()


def test_without_an_api_server_there_is_no_allocator() -> None:
    result = resolution("--run-loadbalancer", "--manifests=/m", environment=POD)
    assert (result.problems, result.settings.run_loadbalancer) == ((), False)
    assert "no API server" in result.remarks[0]


# --- families ------------------------------------------------------------------------------------------------------


def test_an_agent_of_no_family_cannot_start() -> None:
    assert faults("--enable-ipv4=false") == ['--enable-ipv4="false": must be true unless --enable-ipv6 is']


def test_an_ipv6_only_agent_starts_with_the_untouched_cluster_ip_range() -> None:
    result = resolution("--enable-ipv4=false", "--enable-ipv6")
    assert result.problems == ()
    assert result.settings.service_cluster_ip_range == ()
    assert len(result.remarks) == 1 and "--service-cluster-ip-range" in result.remarks[0]


@pytest.mark.parametrize("name", ["service-cluster-ip-range", "service-external-ip-range", "loadbalancer-ip-range"])
@pytest.mark.parametrize(
    ("enabled", "cidr", "rule"),
    [
        ("ipv4", "fd00::/108", "fd00::/108 is IPv6, and --enable-ipv6 is false"),
        ("ipv6", "10.96.0.0/12", "10.96.0.0/12 is IPv4, and --enable-ipv4 is false"),
    ],
)
def test_a_range_of_a_family_that_is_off(name: str, enabled: str, cidr: str, rule: str) -> None:
    families = [f"--enable-ipv4={enabled == 'ipv4'}", f"--enable-ipv6={enabled == 'ipv6'}"]
    explicit = [] if enabled == "ipv4" else ["--service-cluster-ip-range=fd00::/108"]
    if name == "service-cluster-ip-range":
        explicit = []
    assert faults(*families, *explicit, f"--{name}={cidr}") == [f'--{name}="{cidr}": {rule}']


def test_ranges_of_both_families() -> None:
    result = resolution("--enable-ipv6", "--service-cluster-ip-range=10.0.0.0/16, fd00::/108")
    assert result.problems == () and result.remarks == ()
    assert result.settings.service_cluster_ip_range == ("10.0.0.0/16", "fd00::/108")


# --- where the cluster's state comes from --------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["kubeconfig", "master"])
def test_manifests_and_an_api_server_exclude_each_other(other: str) -> None:
    (problem,) = resolution(
        "--manifests=/m", f"--{other}=/x" if other == "kubeconfig" else "--master=https://x"
    ).problems
    assert problem.key == "--manifests" and f"--{other}" in problem.rule and problem.of_client


def test_kubeconfig_and_master_go_together() -> None:
    assert not faults("--kubeconfig=/x", "--master=https://x")


def test_run_and_state_directory_are_two() -> None:
    assert faults("--run-dir=/a", "--state-dir=/a/") == ['--state-dir="/a/": must not be the --run-dir too']


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--metrics-port=20244"], True),
        (["--metrics-port=20244", "--metrics-addr=127.0.0.1"], True),
        (["--metrics-port=1", "--health-port=1", "--metrics-addr=127.0.0.1", "--health-addr=127.0.0.1"], True),
        (["--metrics-port=1", "--health-port=1", "--metrics-addr=127.0.0.1", "--health-addr=127.0.0.2"], False),
        (["--metrics-port=20245"], False),
        (["--metrics-port=0", "--health-port=0"], False),
    ],
)
def test_health_and_metrics_do_not_share_a_port(arguments: list[str], wrong: bool) -> None:
    keys = [problem.key for problem in resolution(*arguments).problems]
    assert keys == (["--metrics-port"] if wrong else [])


# --- BGP -----------------------------------------------------------------------------------------------------------


def test_peers_of_both_families() -> None:
    settings = resolution(*TWO_PEERS, "--peer-router-ports=179,1179").settings
    assert settings.peer_router_ips == ("10.0.0.1", "fd00::1")
    assert settings.peer_router_asns == (65001, 65002)
    assert settings.peer_router_ports == (179, 1179)


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ["--peer-router-ips=10.0.0.1"],
            ['--peer-router-asns="": must hold one item for each of the 1 --peer-router-ips, not 0'],
        ),
        (
            ["--peer-router-asns=65001"],
            ['--peer-router-asns="65001": must hold one item for each of the 0 --peer-router-ips, not 1'],
        ),
        (
            [*TWO_PEERS, "--peer-router-ports=179"],
            ['--peer-router-ports="179": must hold none or one item for each of the 2 --peer-router-ips, not 1'],
        ),
        ([*PEER, "--peer-router-ports=0"], ['--peer-router-ports="0": item 1 must be from 1 to 65535']),
        (
            ["--peer-router-ips=10.0.0.1,10.0.0.1", "--peer-router-asns=65001,65002"],
            ['--peer-router-ips="10.0.0.1,10.0.0.1": must name every peer once'],
        ),
    ],
)
def test_lists_about_peers(arguments: list[str], lines: list[str]) -> None:
    assert faults(*arguments) == lines


@pytest.mark.parametrize("asn", [1, 23455, 23457, 63999, 64512, 65534, 131072, 4199999999, 4200000000, 4294967294])
def test_asn_of_a_peer(asn: int) -> None:
    assert resolution("--peer-router-ips=10.0.0.1", f"--peer-router-asns={asn}").settings.peer_router_asns == (asn,)


@pytest.mark.parametrize("asn", [0, 23456, 64000, 64511, 65535, 131071, 4294967295, 2**64 - 1])
def test_no_asn_of_a_peer(asn: int) -> None:
    (line,) = faults("--peer-router-ips=10.0.0.1", f"--peer-router-asns={asn}")
    assert line == (
        f'--peer-router-asns="{asn}": item 1 must be an AS number from '
        "1-23455, 23457-63999, 64512-65534 or 131072-4294967294"
    )


def test_the_cluster_asn_counts_only_in_the_full_mesh() -> None:
    assert faults("--cluster-asn=1")
    assert not faults("--cluster-asn=1", "--nodes-full-mesh=false")


# --- passwords -----------------------------------------------------------------------------------------------------


def test_passwords_are_decoded_into_the_secrets_only() -> None:
    result = resolution(*TWO_PEERS, f"--peer-router-passwords= {ENCODED} ,")
    assert result.problems == ()
    assert result.secrets.peer_router_passwords == (SECRET, "")
    for shown in (
        repr(result),
        repr(result.settings),
        repr(result.secrets),
        msgspec.json.encode(result.settings).decode(),
    ):
        assert SECRET not in shown and ENCODED not in shown


def test_passwords_from_a_file_are_trimmed() -> None:
    result = resolution(*TWO_PEERS, "--peer-router-passwords-file=/p", passwords_file=f"\n{ENCODED} ,\t{ENCODED}\r\n")
    assert result.problems == ()
    assert result.secrets.peer_router_passwords == (SECRET, SECRET)
    assert result.settings.peer_router_passwords_file == "/p"


def test_the_flag_beats_the_file() -> None:
    arguments = [*PEER, f"--peer-router-passwords={ENCODED}", "--peer-router-passwords-file=/p"]
    assert resolution(*arguments, passwords_file="YQ==").secrets.peer_router_passwords == (SECRET,)


LONG = base64.b64encode(b"x" * 81).decode()


@pytest.mark.parametrize(
    ("items", "rule"),
    [
        ("geheim!", "item 1 must be text in standard base64"),
        ("Z2VoZWlt!", "item 1 must be text in standard base64"),
        ("Z2Vo_-lt", "item 1 must be text in standard base64"),
        ("Z2VoZWlt=", "item 1 must be text in standard base64"),
        ("geheimé", "item 1 must be text in standard base64"),
        ("/////w==", "item 1 must be text in standard base64"),
        ("AGdlaGVpbQ==", "item 1 must hold no zero byte"),
        (LONG, "item 1 must be at most 80 bytes before base64"),
        (f"{ENCODED},{ENCODED}", "must hold none or one item for each of the 1 --peer-router-ips, not 2"),
    ],
)
def test_bad_passwords_are_told_without_their_value(items: str, rule: str) -> None:
    assert faults(*PEER, f"--peer-router-passwords={items}") == [f"--peer-router-passwords=<hidden>: {rule}"]
    of_file = faults(*PEER, "--peer-router-passwords-file=/p", passwords_file=items)
    assert of_file == [f'--peer-router-passwords-file="/p": {rule}']


def test_a_passwords_file_that_cannot_be_read() -> None:
    line = '--peer-router-passwords-file="/p": must be a readable text file'
    assert faults(*PEER, "--peer-router-passwords-file=/p", passwords_file=None) == [line]


def test_a_passwords_file_without_an_item_for_each_peer() -> None:
    assert faults(*TWO_PEERS, "--peer-router-passwords-file=/p", passwords_file="")


@given(st.lists(st.binary(max_size=90), max_size=4))
def test_any_bytes_decode_or_are_refused_without_being_shown(keys: list[bytes]) -> None:
    items = [base64.b64encode(key).decode() for key in keys]
    complaint = ""
    try:
        passwords = tuple(decode_passwords(items))
    except ValueError as error:
        complaint = str(error)
    if complaint:
        assert not any(item in complaint for item in items if len(item) > 4)
    else:
        assert [password.encode() for password in passwords] == keys
        assert all(len(key) <= 80 for key in keys)


# --- any command line ----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(sorted(flag.name for flag in FLAGS)), st.text(max_size=10)), max_size=5))
def test_any_command_line_gives_settings_or_lines(flags: list[tuple[str, str]]) -> None:
    try:
        result = resolution(*(f"--{name}={text}" for name, text in flags))
    except FlagError:
        return
    assert msgspec.convert(msgspec.to_builtins(result.settings), Settings) == result.settings
    assert all(str(problem).isprintable() for problem in result.problems)
