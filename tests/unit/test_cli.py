"""The command in real processes: order of the checks, exit codes, what goes to which stream, and no secret anywhere."""

from __future__ import annotations

import base64
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kube_router.supervisor import surroundings
from kube_router.supervisor.cli import program_name
from kube_router.supervisor.flags import help_text, parse_arguments
from kube_router.supervisor.settings import resolve
from kube_router.supervisor.surroundings import check_source, read_surroundings

COMMAND = [sys.executable, "-P", "-m", "kube_router.supervisor.cli"]
# A user without privileges who may still read the interpreter's files, wherever they lie.
UNPRIVILEGED = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
MAY_READ = [
    "--bounding-set=-all,+dac_read_search",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=+dac_read_search",
]
SECRET = "ganz geheim"
ENCODED = base64.b64encode(SECRET.encode()).decode()
NO_WORKER = ["--run-router=false", "--run-firewall=false", "--run-service-proxy=false"]


def run(*arguments: str, prefix: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "NODE_NAME": "node-1", "PYTHONSAFEPATH": "1", **environment},
    )


def unprivileged(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(*arguments, prefix=(*UNPRIVILEGED, *MAY_READ))


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    (tmp_path / "manifests").mkdir()
    return tmp_path / "manifests"


# --- before anything is configured ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["-hV"], ["--version", "--help"]])
@pytest.mark.parametrize("runner", [run, unprivileged])
def test_help_goes_to_stderr_for_everyone(arguments: list[str], runner: object) -> None:
    result = runner(*arguments)  # type: ignore[operator]
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr == help_text()


@pytest.mark.parametrize("arguments", [["--version"], ["-V"]])
@pytest.mark.parametrize("runner", [run, unprivileged])
def test_version_is_one_line_on_stderr(arguments: list[str], runner: object) -> None:
    result = runner(*arguments)  # type: ignore[operator]
    assert (result.returncode, result.stdout) == (0, "")
    words = result.stderr.split()
    assert result.stderr.count("\n") == 1
    assert [words[0], words[1], words[2], words[4:6], words[7]] == [
        "Running",
        "kube-router",
        "version",
        ["built", "on"],
        "Python",
    ]
    assert words[3][0].isdigit() and words[6].startswith("20")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nope"], "unknown flag: --nope"),
        (["--help", "--nope"], "unknown flag: --nope"),
        (["-x"], "unknown shorthand flag: 'x' in -x"),
        (["--bgp-port"], "flag needs an argument: --bgp-port"),
        (
            ["--routes-sync-period=1"],
            'invalid argument "1" for "--routes-sync-period" flag: time: missing unit in duration "1"',
        ),
    ],
)
@pytest.mark.parametrize("runner", [run, unprivileged])
def test_bad_syntax_is_2_with_usage_and_then_the_error(arguments: list[str], line: str, runner: object) -> None:
    result = runner(*arguments)  # type: ignore[operator]
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{help_text()}{line}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["-v=x", "stray", "--help"],
            'failed to set log level to "x": strconv.ParseInt: parsing "x": invalid syntax',
        ),
        (
            ["--v=2147483648", "--version"],
            'failed to set log level to "2147483648": strconv.ParseInt: parsing "2147483648": value out of range',
        ),
        (["stray", "--help"], "unrecognized positional argument(s): [stray]"),
        (["--version", "--run-router", "false", "x"], "unrecognized positional argument(s): [false x]"),
        (["--", "--help"], "unrecognized positional argument(s): [--help]"),
    ],
)
@pytest.mark.parametrize("runner", [run, unprivileged])
def test_log_level_and_stray_words_beat_help_and_version(arguments: list[str], line: str, runner: object) -> None:
    result = runner(*arguments)  # type: ignore[operator]
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"{line}\n")


@pytest.mark.parametrize("arguments", [[], ["--cleanup-config"], ["--overlay-type=foo"], NO_WORKER])
def test_only_root_may_go_on(arguments: list[str]) -> None:
    result = unprivileged(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == ("kube-router must run as root: it configures the network of this host (user id 65534)\n")


def test_bytes_that_are_no_text_are_shown_escaped() -> None:
    result = subprocess.run([*COMMAND, b"--nope-\xff"], capture_output=True, check=False, timeout=60)
    assert result.returncode == 2
    assert result.stderr.endswith(b"unknown flag: --nope-\\udcff\n")


@pytest.mark.parametrize(
    ("argv0", "name"),
    [
        ("/usr/local/bin/kube-router", "/usr/local/bin/kube-router"),
        ("kube-router", "kube-router"),
        ("/x/supervisor/cli.py", "kube-router"),
        ("", "kube-router"),
    ],
)
def test_the_program_is_called_as_the_user_called_it(argv0: str, name: str) -> None:
    assert program_name(argv0) == name


# --- the source of the cluster's state -----------------------------------------------------------------------------


def test_a_bad_source_is_told_before_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    result = run(f"--manifests={path}", "--bgp-port=0")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "failed to parse kube-router config: "
        f'--manifests="{path}": must be a directory that can be read: No such file or directory',
        'failed to run kube-router: --bgp-port="0": must be from 1 to 65535',
    ]


def test_kinds_of_bad_sources(tmp_path: Path, manifests: Path) -> None:
    binary, empty, long = tmp_path / "binary", tmp_path / "empty", tmp_path / "long"
    binary.write_bytes(b"\xff\xfe")
    empty.write_text(" \n")
    long.write_bytes(b"#" * (surroundings.LONGEST_FILE + 1))
    expected = {
        f"--manifests={empty}": "must be a directory that can be read: Not a directory",
        f"--kubeconfig={tmp_path / 'nothing'}": "must be a file that can be read: No such file or directory",
        f"--kubeconfig={manifests}": "must be a file that can be read: is not a regular file",
        "--kubeconfig=/dev/zero": "must be a file that can be read: is not a regular file",
        f"--kubeconfig={binary}": "must be a text file: it is no UTF-8",
        f"--kubeconfig={empty}": "must be a kubeconfig: it is empty",
        f"--kubeconfig={long}": "must be a file that can be read: is longer than 1048576 bytes",
    }
    for argument, rule in expected.items():
        name, _, path = argument.partition("=")
        parsed = parse_arguments([argument])
        settings = resolve(parsed, read_surroundings(parsed)).settings
        assert list(map(str, check_source(parsed, settings))) == [f'{name}="{path}": {rule}']


def test_good_sources(tmp_path: Path, manifests: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text("apiVersion: v1\nkind: Config\n")
    for argument in (f"--manifests={manifests}", f"--kubeconfig={kubeconfig}"):
        parsed = parse_arguments([argument])
        assert check_source(parsed, resolve(parsed, read_surroundings(parsed)).settings) == []


def test_outside_of_a_pod_a_source_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = parse_arguments([])
    settings = resolve(parsed, read_surroundings(parsed)).settings
    monkeypatch.setattr(surroundings, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    rule = "outside of a pod --kubeconfig or --manifests must be given"
    assert [str(line) for line in check_source(parsed, settings)] == [
        f'--kubeconfig="": {rule}: there is no {tmp_path}/token'
    ]
    (tmp_path / "token").write_text("t")
    (tmp_path / "ca.crt").write_text("c")
    assert [str(line) for line in check_source(parsed, settings)] == [
        f'--kubeconfig="": {rule}: KUBERNETES_SERVICE_HOST is not set'
    ]
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    assert check_source(parsed, settings) == []


# --- values --------------------------------------------------------------------------------------------------------


def test_every_bad_value_is_one_line(manifests: Path) -> None:
    result = run(f"--manifests={manifests}", "--overlay-type=foo", "--routes-sync-period=0s", "--router-id=\nx")
    assert (result.returncode, result.stderr.count("\n")) == (1, 3)
    assert result.stderr.splitlines()[:2] == [
        'failed to run kube-router: --router-id="\\nx": must be an IPv4 address other than 0.0.0.0, "generate", '
        "or empty for the node's IPv4 address",
        'failed to run kube-router: --overlay-type="foo": must be "subnet" or "full"',
    ]


def test_no_worker_to_run_is_success(manifests: Path) -> None:
    result = run(f"--manifests={manifests}", "--overlay-type=foo", "--run-loadbalancer", *NO_WORKER)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert "Running kube-router version" in lines[0]
    assert lines[1].endswith("no worker to run: none of --run-router, --run-firewall and --run-service-proxy is true")


def test_a_bad_source_beats_no_worker() -> None:
    assert run("--manifests=/nowhere/at/all", *NO_WORKER).returncode == 1


@pytest.fixture(params=["127.0.0.1", "::1"])
def busy(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """An address and a port that somebody listens on."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server((request.param, 0), family=family) as server:
        yield request.param, server.getsockname()[1]


@pytest.mark.parametrize("what", ["health", "metrics"])
def test_a_port_in_use(what: str, busy: tuple[str, int], manifests: Path, tmp_path: Path) -> None:
    address, port = busy
    own = [f"--{what}-addr={address}", f"--{what}-port={port}"]
    other = [] if what == "health" else ["--health-port=0"]
    result = run(f"--manifests={manifests}", f"--run-dir={tmp_path}/run", *own, *other)
    assert result.returncode == 1
    assert result.stderr == (
        f'failed to run kube-router: --{what}-port="{port}": must be a free TCP port: '
        f"cannot listen on it at {address}: Address already in use\n"
    )
    assert not (tmp_path / "run").exists()


def test_an_address_of_nobody(manifests: Path, tmp_path: Path) -> None:
    result = run(f"--manifests={manifests}", f"--run-dir={tmp_path}/run", "--health-addr=[2001:db8::1]")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "cannot listen on it at 2001:db8::1: Cannot assign requested address" in result.stderr


def test_all_that_can_be_asked_for_is_built_and_remarks_are_one_line_each(manifests: Path) -> None:
    # The run directory cannot be made: all checks are passed and nothing is started.
    arguments = [f"--manifests={manifests}", "--health-port=0", "--run-dir=/proc/version/run"]
    result = run(*arguments, "--enable-ipv4=false", "--enable-ipv6")
    assert (result.returncode, result.stderr) == (1, "")
    assert "not built yet" not in result.stdout
    assert sum("--service-cluster-ip-range" in line for line in result.stdout.splitlines()) == 1


# --- secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [f"--peer-router-passwords={ENCODED}"],
        [f"--peer-router-passwords={ENCODED},{ENCODED}"],
        [f"--peer-router-passwords={ENCODED}!"],
        [f'--peer-router-passwords="{ENCODED}'],
        [f"--peer-router-passwords={ENCODED}", "--bgp-port=0", "-v=9"],
        ["--peer-router-passwords", f"{ENCODED},", ENCODED],
        [f"-peer-router-passwords={ENCODED}"],
        [f"--peer-router-passwords={ENCODED}", "--cluster-asn=x"],
        [f"--master=https://admin:{ENCODED}@10.0.0.1"],
    ],
)
def test_no_secret_in_any_output(arguments: list[str], manifests: Path) -> None:
    peers = ["--peer-router-ips=10.0.0.1", "--peer-router-asns=65001"]
    source = [] if arguments[0].startswith("--master") else [f"--manifests={manifests}"]
    result = run(*source, *peers, "--run-dir=/proc/version/run", "--health-port=0", "-v=2", *arguments)
    assert result.returncode in (1, 2)
    for secret in (ENCODED, SECRET):
        assert secret not in result.stdout + result.stderr


@pytest.mark.parametrize("content", [ENCODED + "!", f"{ENCODED},{ENCODED}", ENCODED])
def test_no_secret_of_a_file_in_any_output(content: str, manifests: Path, tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    file.write_text(content + "\n")
    peers = ["--peer-router-ips=10.0.0.1", "--peer-router-asns=65001", f"--peer-router-passwords-file={file}"]
    result = run(f"--manifests={manifests}", *peers, "--run-dir=/proc/version/run", "--health-port=0", "-v=2")
    assert result.returncode == 1
    assert ("item" in result.stderr) == (content != ENCODED)
    for secret in (ENCODED, SECRET):
        assert secret not in result.stdout + result.stderr
