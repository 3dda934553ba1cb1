"""Every flag's own rule: good values with their canonical form, bad ones with one line that names flag, value, rule."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from kube_router.supervisor.flags import parse_arguments
from kube_router.supervisor.settings import Problem, Resolution, Surroundings, field_name, resolve
from kube_router.workers.settings import Settings

MACHINE = Surroundings(environment={"NODE_NAME": "node-1"}, host_name="host-1", working_directory="/somewhere")


def resolution(*arguments: str, machine: Surroundings = MACHINE) -> Resolution:
    return resolve(parse_arguments(arguments), machine)


GOOD = [
    ("cache-sync-timeout", "1ns", 1e-9),
    ("cache-sync-timeout", "1m30s", 90.0),
    ("health-addr", "", ""),
    ("health-addr", "127.0.0.1", "127.0.0.1"),
    ("health-addr", "fd00::0001", "fd00::1"),
    ("health-addr", "[FD00::1]", "fd00::1"),
    ("health-addr", "localhost", "127.0.0.1"),
    ("health-port", "0", 0),
    ("health-port", "65535", 65535),
    ("metrics-addr", "[::]", "::"),
    ("metrics-port", "65535", 65535),
    ("metrics-path", "/", "/"),
    ("metrics-path", "/a/b-c_d.e", "/a/b-c_d.e"),
    ("hostname-override", "worker-1.example.org", "worker-1.example.org"),
    ("master", "https://10.0.0.1:6443/", "https://10.0.0.1:6443"),
    ("master", "http://[fd00::1]:8080", "http://[fd00::1]:8080"),
    ("master", "10.0.0.1:6443", "https://10.0.0.1:6443"),
    ("v", "-1", -1),
    ("v", "4", 4),
    ("cluster-asn", "64512", 64512),
    ("cluster-asn", "65535", 65535),
    ("cluster-asn", "4200000000", 4200000000),
    ("cluster-asn", "4294967294", 4294967294),
    ("cluster-asn", "0", 0),
    ("peer-router-multihop-ttl", "255", 255),
    ("bgp-port", "1", 1),
    ("bgp-port", "65535", 65535),
    ("bgp-holdtime", "3s", 3.0),
    ("bgp-holdtime", "65535s", 65535.0),
    ("bgp-holdtime", "4.5s", 4.5),
    ("router-id", "", ""),
    ("router-id", "generate", "generate"),
    ("router-id", "10.0.0.1", "10.0.0.1"),
    ("gobgp-admin-address", "", "127.0.0.1"),
    ("gobgp-admin-address", "[::1]", "::1"),
    ("gobgp-admin-address", "0.0.0.0", "0.0.0.0"),
    ("gobgp-admin-port", "0", 0),
    ("bfd-port", "65535", 65535),
    ("bfd-detection-multiplier", "1", 1),
    ("bfd-detection-multiplier", "255", 255),
    ("bfd-desired-min-tx-interval", "1", 1),
    ("bfd-required-min-rx-interval", "4294967", 4294967),
    ("overlay-type", "full", "full"),
    ("overlay-encap", "fou", "fou"),
    ("overlay-encap-port", "1024", 1024),
    ("routes-sync-period", "1ms", 0.001),
    ("ipvs-graceful-period", "0", 0.0),
    ("excluded-cidrs", "10.1.2.3/8, fd00::1/64", ("10.0.0.0/8", "fd00::/64")),
    ("excluded-cidrs", "", ()),
    ("runtime-endpoint", "unix:///run/containerd/containerd.sock", "unix:///run/containerd/containerd.sock"),
    ("runtime-endpoint", "", ""),
    ("service-tcp-timeout", "0", 0.0),
    ("service-udp-timeout", "1s", 1.0),
    ("service-tcpfin-timeout", "2147483s", 2147483.0),
    ("service-node-port-range", "30000-32767", "30000:32767"),
    ("service-node-port-range", "1:65535", "1:65535"),
    ("service-node-port-range", "0-1", "0:1"),
    ("service-cluster-ip-range", "10.96.0.1/12", ("10.96.0.0/12",)),
    ("service-cluster-ip-range", "10.96.0.0/12,10.1.0.0/16", ("10.96.0.0/12", "10.1.0.0/16")),
    ("service-external-ip-range", "1.2.3.0/24,1.2.4.0/24,1.2.5.0/24", ("1.2.3.0/24", "1.2.4.0/24", "1.2.5.0/24")),
    ("run-dir", "/run/kr/", "/run/kr"),
    ("run-dir", "relative", "/somewhere/relative"),
    ("run-dir", "/" + "x" * 79, "/" + "x" * 79),
    ("state-dir", "/var/lib//k:r=1@x,+_-.y", "/var/lib/k:r=1@x,+_-.y"),
    ("log-format", "json", "json"),
    ("kubeconfig", "conf", "/somewhere/conf"),
    ("kubeconfig", "/etc/a b", "/etc/a b"),
    ("kubeconfig", "", ""),
    ("manifests", "dir", "/somewhere/dir"),
]


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_good_value(name: str, text: str, value: object) -> None:
    result = resolution(f"--{name}={text}")
    assert result.problems == ()
    assert getattr(result.settings, field_name(name)) == value


PERIODS = [
    "cache-sync-timeout",
    "routes-sync-period",
    "injected-routes-sync-period",
    "ipvs-sync-period",
    "iptables-sync-period",
    "loadbalancer-sync-period",
]
ADDRESS_RULE = "must be an IP address (IPv6 with or without brackets)"
BAD = [
    *((name, text, "must be above 0s") for name in PERIODS for text in ("0", "-1s", "0s")),
    *(
        (name, text, f"{ADDRESS_RULE}, or empty for all addresses")
        for name in ("health-addr", "metrics-addr")
        for text in ("nowhere", "256.1.1.1", "1.2.3.4:80", "fd00::1]", "[fd00::1", "10.0.0.0/8", " ", "010.0.0.1")
    ),
    ("health-addr", "[127.0.0.1]", "must be an IP address; brackets are for IPv6, or empty for all addresses"),
    ("gobgp-admin-address", "gobgp", ADDRESS_RULE),
    *(
        ("metrics-path", text, 'must begin with "/" and hold no blanks, "?", "#", "%", quotes, braces or backslashes')
        for text in ("", "metrics", "/a b", "/{x}", "/a?b", "/a#b", "/\n", "http://x/")
    ),
    *(
        ("hostname-override", text, "must be the name of a Node: lower-case letters, digits, '-' and '.', at most 253")
        for text in ("Node", "node_1", "-a", "a-", "a..b", ".", "a" * 254, "nodé", "a\n")
    ),
    *(
        ("master", text, "must be the http or https URL of an API server")
        for text in (
            "ftp://x",
            "https://",
            "http://x:99999",
            "https://x/?a=b",
            "https://a b",
            "unix:///x",
            "http://x:0",
        )
    ),
    ("v", "2147483648", 'strconv.ParseInt: parsing "2147483648": value out of range'),
    *(
        ("cluster-asn", text, "must be a private AS number from 64512-65535 or 4200000000-4294967294, or 0 for 64512")
        for text in ("1", "64511", "65536", "4199999999", "4294967295", "18446744073709551615")
    ),
    *(("bgp-port", text, "must be from 1 to 65535") for text in ("0", "65536", "4294967295")),
    *(("bfd-port", text, "must be from 1 to 65535") for text in ("0", "65536")),
    *(("bgp-holdtime", text, "must be from 3s to 18h12m15s") for text in ("0", "2.999s", "65535.1s", "65536s", "-90s")),
    *(
        (
            "router-id",
            text,
            'must be an IPv4 address other than 0.0.0.0, "generate", or empty for the node\'s IPv4 address',
        )
        for text in ("fd00::1", "1.2.3", "0.0.0.0", "Generate", "17", " 1.2.3.4")
    ),
    *(("bfd-detection-multiplier", text, "must be from 1 to 255") for text in ("0", "256")),
    *(
        (name, text, "must be from 1 to 4294967")
        for name in ("bfd-desired-min-tx-interval", "bfd-required-min-rx-interval")
        for text in ("0", "4294968")
    ),
    *(("overlay-type", text, 'must be "subnet" or "full"') for text in ("", "Full", "none", "foo")),
    *(("overlay-encap", text, 'must be "ipip" or "fou"') for text in ("", "gre", "vxlan")),
    *(("overlay-encap-port", text, "must be from 1024 to 65535") for text in ("0", "1023")),
    ("ipvs-graceful-period", "-1ns", "must not be negative"),
    *(
        (name, text, "must be 0s (leave as it is), or from 1s to 2147483s")
        for name in ("service-tcp-timeout", "service-tcpfin-timeout", "service-udp-timeout")
        for text in ("-1s", "999ms", "2147484s")
    ),
    *(
        (name, "10.0.0.0/8,x/8", 'item 2, "x/8", must be a CIDR such as 10.96.0.0/12')
        for name in ("excluded-cidrs", "service-cluster-ip-range", "service-external-ip-range", "loadbalancer-ip-range")
    ),
    ("loadbalancer-ip-range", "10.0.0.1", 'item 1, "10.0.0.1", must be a CIDR such as 10.96.0.0/12'),
    ("excluded-cidrs", "10.0.0.0/33", 'item 1, "10.0.0.0/33", must be a CIDR such as 10.96.0.0/12'),
    ("excluded-cidrs", "10.0.0.0/8,", 'item 2, "", must be a CIDR such as 10.96.0.0/12'),
    ("service-cluster-ip-range", "", "must hold one or two CIDRs, not 0"),
    ("service-cluster-ip-range", "10.0.0.0/16,10.1.0.0/16,10.2.0.0/16", "must hold one or two CIDRs, not 3"),
    *(
        ("runtime-endpoint", text, 'must be "unix://" and the absolute path of a socket, or empty')
        for text in ("/run/containerd.sock", "tcp://x", "unix://", "unix://run/x", "docker", "unix:///a b")
    ),
    *(
        (
            "service-node-port-range",
            text,
            "must be FIRST-LAST or FIRST:LAST, two ports up to 65535, the first below the last",
        )
        for text in ("", "30000", "2-1", "1-1", "1-65536", "1 - 2", "a-b", "1-2-3", "1,2", "-1-2")
    ),
    ("run-dir", "/" + "x" * 80, "must be at most 80 bytes long, for the sockets in it"),
    *(
        (
            name,
            text,
            "must be a directory other than /, named with letters, digits and ._/+@:=,- only, without '..'",
        )
        for name in ("run-dir", "state-dir")
        for text in ("", "/", "//", "/a b", "/a%b", "/a;b", "/a/../b", "/ä", "/a\nb", '/"', "..")
    ),
    ("log-format", "yaml", 'must be "text" or "json"'),
    ("manifests", "", "must name a directory"),
]


@pytest.mark.parametrize(("name", "text", "rule"), BAD)
def test_bad_value_is_one_line_with_flag_value_and_rule(name: str, text: str, rule: str) -> None:
    result = resolution(f"--{name}={text}")
    assert result.problems == (Problem(f"--{name}", text, rule),)
    line = str(result.problems[0])
    assert line.startswith(f'--{name}="') and line.endswith(f'": {rule}') and line.isprintable()


@pytest.mark.parametrize(("name", "text", "rule"), BAD)
def test_a_flag_at_fault_keeps_its_default(name: str, text: str, rule: str) -> None:
    result = resolution(f"--{name}={text}")
    assert getattr(result.settings, field_name(name)) == getattr(Settings(), field_name(name))


def test_all_faults_are_told_in_one_go() -> None:
    result = resolution("--overlay-type=x", "--bgp-port=0", "--routes-sync-period=0", "--peer-router-asns=1")
    assert {problem.key for problem in result.problems} == {
        "--overlay-type",
        "--bgp-port",
        "--routes-sync-period",
        "--peer-router-asns",
    }


@pytest.mark.parametrize(
    ("name", "longest", "beyond"),
    [("bgp-graceful-restart-time", "4095s", "4096s"), ("bgp-graceful-restart-deferral-time", "18h", "18h0m0.1s")],
)
def test_graceful_restart_times_count_only_with_graceful_restart(name: str, longest: str, beyond: str) -> None:
    assert not resolution("--bgp-graceful-restart", f"--{name}={longest}").problems
    for bad in (beyond, "0", "-1s"):
        assert not resolution(f"--{name}={bad}").problems
        (problem,) = resolution("--bgp-graceful-restart", f"--{name}={bad}").problems
        assert (problem.key, problem.value) == (f"--{name}", bad)
        assert problem.rule.startswith("must be above 0s and at most ")


def test_credentials_in_the_master_url_are_refused_and_not_shown() -> None:
    (problem,) = resolution("--master=https://admin:geheim@10.0.0.1").problems
    assert "must hold no user name or password" in problem.rule
    assert "geheim" not in str(problem)


def test_the_agent_is_told_by_its_environment() -> None:
    def named(environment: Mapping[str, str], host_name: str = "host-1", *arguments: str) -> Resolution:
        return resolution(*arguments, machine=Surroundings(environment, host_name, "/"))

    assert named({}).settings.node_name == "host-1"
    assert named({}, "Host-1.Example").settings.node_name == "host-1.example"
    assert named({"NODE_NAME": "n"}).settings.node_name == "n"
    assert named({"NODE_NAME": "n"}, "h", "--hostname-override=o").settings.node_name == "o"
    assert [str(problem) for problem in named({"NODE_NAME": "N_1"}).problems] == [
        "NODE_NAME=\"N_1\": must be the name of a Node: lower-case letters, digits, '-' and '.', at most 253; "
        "--hostname-override overrides it"
    ]
    assert [problem.key for problem in named({}, "under_score").problems] == ["hostname"]
    assert [problem.key for problem in named({}, "").problems] == ["--hostname-override"]
    assert not named({"NODE_NAME": "N_1"}, "h", "--hostname-override=o").problems


def test_the_cni_file_comes_from_the_environment() -> None:
    def told(path: str) -> Resolution:
        return resolution(machine=Surroundings({"KUBE_ROUTER_CNI_CONF_FILE": path, "NODE_NAME": "n"}, "h", "/"))

    assert resolution().settings.cni_conf_file == "/etc/cni/net.d/10-kuberouter.conf"
    assert told("").settings.cni_conf_file == "/etc/cni/net.d/10-kuberouter.conf"
    assert told("/etc/cni/net.d/x.conflist").settings.cni_conf_file == "/etc/cni/net.d/x.conflist"
    assert [str(problem) for problem in told("x.conf").problems] == [
        'KUBE_ROUTER_CNI_CONF_FILE="x.conf": must be an absolute path'
    ]
