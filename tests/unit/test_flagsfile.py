"""The flags file: its grammar, how it lies under the command line, and what each fault says."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from kube_router.supervisor.flags import parse_arguments
from kube_router.supervisor.flagsfile import read_flags
from kube_router.supervisor.reading import read_configuration
from kube_router.workers.settings import Settings

SECRET = "ganz-geheim"
TEXT = """
# comment
  --bgp-holdtime=30s
--enable-ipv6\r
-v=1
--peer-router-ips=192.0.2.1
--peer-router-ips=192.0.2.2,2001:db8::1
--metrics-path=/a#b
"""


def test_a_line_is_an_argument() -> None:
    file = read_flags("/f", TEXT)
    assert file.problems == ()
    values = file.parsed.values
    assert (values["bgp-holdtime"], values["enable-ipv6"], values["v"]) == (30_000_000_000, True, "1")
    assert values["peer-router-ips"] == ("192.0.2.1", "192.0.2.2", "2001:db8::1")
    assert values["metrics-path"] == "/a#b"
    assert file.lines == {"bgp-holdtime": 3, "enable-ipv6": 4, "v": 5, "peer-router-ips": 7, "metrics-path": 8}


def test_the_command_line_wins_and_its_lists_replace() -> None:
    command = parse_arguments(["--bgp-holdtime=9s", "--peer-router-ips=198.51.100.1", "--enable-ipv6=false"])
    merged = read_flags("/f", TEXT).under(command)
    assert merged.values["bgp-holdtime"] == 9_000_000_000
    assert merged.values["peer-router-ips"] == ("198.51.100.1",)
    assert merged.values["enable-ipv6"] is False
    assert merged.values["metrics-path"] == "/a#b"
    assert merged.values["bgp-port"] == 179
    assert merged.given("metrics-path") and not merged.given("bgp-port")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--no-such=1", "unknown flag: --no-such"),
        ("--bgp-port=x", 'invalid argument "x" for "--bgp-port" flag'),
        ("--bgp-port", "flag needs an argument: --bgp-port"),
        ("bgp-port=1790", "must be --name=value"),
        ("--bgp-port 1790", "must be --name=value"),
        ("--bgp-port=1790 --enable-ipv6", "invalid argument"),
        ("--help", "--help: can be given on the command line only"),
        ("--flags-file=/x", "--flags-file: can be given on the command line only"),
        ("--cleanup-config", "--cleanup-config: can be given on the command line only"),
        ("--", "must be --name=value"),
        (f"--peer-router-passwords {SECRET}", "must be --name=value"),
        (f"peer-router-passwords={SECRET}", "must be --name=value"),
        (f"--peer-router-password={SECRET}", "unknown flag: --peer-router-password"),
        (f'--peer-router-passwords="{SECRET}', "<hidden>"),
        (SECRET, "must be --name=value"),
    ],
)
def test_a_bad_line_is_told_with_its_number_without_a_secret_and_spoils_only_itself(line: str, told: str) -> None:
    file = read_flags("/etc/flags", f"--enable-ipv6\n\n{line}\n--bgp-holdtime=30s\n")
    assert len(file.problems) == 1
    assert file.problems[0].startswith("/etc/flags:3: ") and told in file.problems[0]
    assert SECRET not in file.problems[0]
    assert set(file.parsed.texts) == {"enable-ipv6", "bgp-holdtime"}


def configure(folder: Path, text: str, *arguments: str) -> tuple[Settings, list[str]]:
    (folder / "flags").write_text(text)
    found = read_configuration(parse_arguments(["--flags-file=flags", *arguments]), str(folder))
    return found.resolution.settings, [*found.file_problems, *map(str, found.resolution.problems)]


def test_a_bad_value_is_told_with_file_and_line_unless_the_command_line_gives_it(tmp_path: Path) -> None:
    text = "--overlay-type=foo\n--bgp-port=0\n"
    settings, problems = configure(tmp_path, text, "--bgp-port=70000", "--hostname-override=node1")
    assert problems == [
        '--bgp-port="70000": must be from 1 to 65535',
        'flags:1: --overlay-type="foo": must be "subnet" or "full"',
    ]
    assert settings.flags_file == f"{tmp_path}/flags"


def test_a_password_in_the_file_is_hidden_when_it_is_bad(tmp_path: Path) -> None:
    encoded = base64.b64encode(SECRET.encode() * 10).decode()
    text = f"--peer-router-ips=192.0.2.1\n--peer-router-asns=64512\n--peer-router-passwords={encoded}\n"
    _, problems = configure(tmp_path, text, "--hostname-override=node1")
    assert len(problems) == 1 and "flags:3: --peer-router-passwords=<hidden>: " in problems[0]
    assert encoded not in problems[0] and SECRET not in problems[0]


def test_a_missing_file_is_a_fault(tmp_path: Path) -> None:
    found = read_configuration(parse_arguments(["--flags-file=nowhere", "--hostname-override=n"]), str(tmp_path))
    assert found.file_problems == ('--flags-file="nowhere": must be a readable text file: No such file or directory',)
