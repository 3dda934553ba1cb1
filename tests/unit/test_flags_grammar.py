"""The grammar of the command line: pflag's own answers (recorded), Go's rules by hand, and generated values."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kube_router.supervisor import govalues
from kube_router.supervisor.flags import FLAGS, parse_arguments
from kube_router.supervisor.pflag import FlagError, Value, usage_text

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "pflag.json").read_text())
KINDS = {flag.name: flag.kind for flag in FLAGS}


def go_text(kind: str, value: Value) -> str:
    """A value as the String method of its pflag type prints it."""
    if kind == "duration":
        assert isinstance(value, int)
        return govalues.format_duration(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ",".join(go_csv_field(str(item)) for item in value) + "]"
    return str(value)


def go_csv_field(item: str) -> str:
    if any(mark in item for mark in ',"\r\n') or item[:1].isspace():
        return '"' + item.replace('"', '""') + '"'
    return item


def answer(arguments: list[str]) -> dict[str, Any]:
    """What the project makes of arguments, in the form of the recording."""
    try:
        parsed = parse_arguments(arguments)
    except FlagError as error:
        return {"arguments": arguments, "error": str(error)}
    found: dict[str, Any] = {"arguments": arguments}
    if parsed.texts:
        found["values"] = {name: go_text(KINDS[name], parsed.values[name]) for name in sorted(parsed.texts)}
    if parsed.positionals:
        found["rest"] = list(parsed.positionals)
    return found


def test_recording_is_worth_comparing() -> None:
    cases = RECORDED["cases"]
    assert len(cases) > 500
    assert 100 < sum("error" in case for case in cases) < len(cases) - 100


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: ascii(" ".join(case["arguments"])))
def test_reads_as_pflag_does(case: dict[str, Any]) -> None:
    assert answer(case["arguments"]) == case


def test_help_is_laid_out_as_pflags() -> None:
    assert usage_text(FLAGS).splitlines() == RECORDED["usage"]


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--run-router=false"], "run-router", False),
        (["--run-router", "--run-router=0"], "run-router", False),
        (["--enable-ipv6"], "enable-ipv6", True),
        (["--bgp-port", "0x1F"], "bgp-port", 31),
        (["--bgp-port=010"], "bgp-port", 8),
        (["--bgp-port=0o1_7"], "bgp-port", 15),
        (["--bgp-port=1_000"], "bgp-port", 1000),
        (["--peer-router-asns=65000,65001", "--peer-router-asns", "65002"], "peer-router-asns", (65000, 65001, 65002)),
        (["--peer-router-asns=0010"], "peer-router-asns", (10,)),
        (["--peer-router-ips", "'10.0.0.1', \"FD00::0001\""], "peer-router-ips", ("10.0.0.1", "fd00::1")),
        (["--service-cluster-ip-range=fd00::/108"], "service-cluster-ip-range", ("fd00::/108",)),
        (
            ["--service-cluster-ip-range=a", "--service-cluster-ip-range=b,c"],
            "service-cluster-ip-range",
            ("a", "b", "c"),
        ),
        (["--service-cluster-ip-range="], "service-cluster-ip-range", ()),
        (["--service-cluster-ip-range", " a, b"], "service-cluster-ip-range", (" a", " b")),
        (["--excluded-cidrs", '"a,b",c'], "excluded-cidrs", ("a,b", "c")),
        (["--routes-sync-period=2h22m"], "routes-sync-period", 8520 * 10**9),
        (["--routes-sync-period=" + "0" * 5000 + "1s"], "routes-sync-period", 10**9),
        (["--routes-sync-period", "-1.5s"], "routes-sync-period", -15 * 10**8),
        (["-v", "3"], "v", "3"),
        (["-v3"], "v", "3"),
        (["-v=3"], "v", "3"),
        (["-hv3"], "v", "3"),
        (["-hV"], "version", True),
        (["--master=a=b"], "master", "a=b"),
        (["--master="], "master", ""),
        (["--hostname-override", "--run-router"], "hostname-override", "--run-router"),
    ],
)
def test_accepted(arguments: list[str], name: str, value: object) -> None:
    parsed = parse_arguments(arguments)
    assert parsed.values[name] == value
    assert parsed.given(name)
    assert not parsed.positionals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nope"], "unknown flag: --nope"),
        (["-run-router"], "unknown shorthand flag: 'r' in -run-router"),
        (["--bgp-port"], "flag needs an argument: --bgp-port"),
        (["-v"], "flag needs an argument: 'v' in -v"),
        (["-hv"], "flag needs an argument: 'v' in -v"),
        (["---v"], "bad flag syntax: ---v"),
        (["--=v"], "bad flag syntax: --=v"),
        (
            ["--run-router=yes"],
            'invalid argument "yes" for "--run-router" flag: strconv.ParseBool: parsing "yes": invalid syntax',
        ),
        (
            ["--health-port=65536"],
            'invalid argument "65536" for "--health-port" flag: strconv.ParseUint: parsing "65536": value out of range',
        ),
        (
            ["--peer-router-ips=10.0.0.1,x"],
            'invalid argument "10.0.0.1,x" for "--peer-router-ips" flag: '
            "invalid string being converted to IP address: x",
        ),
        (
            ["--routes-sync-period=5"],
            'invalid argument "5" for "--routes-sync-period" flag: time: missing unit in duration "5"',
        ),
        (["-h=x"], 'invalid argument "x" for "-h, --help" flag: strconv.ParseBool: parsing "x": invalid syntax'),
    ],
)
def test_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(FlagError) as refused:
        parse_arguments(arguments)
    assert str(refused.value) == message


def test_flags_and_words_mix_and_two_dashes_end_the_flags() -> None:
    parsed = parse_arguments(["one", "--run-router=false", "two", "-", "--", "--nope", "-v"])
    assert parsed.positionals == ("one", "two", "-", "--nope", "-v")
    assert parsed.values["run-router"] is False


def test_a_bool_does_not_take_the_next_word() -> None:
    parsed = parse_arguments(["--run-router", "false"])
    assert parsed.values["run-router"] is True
    assert parsed.positionals == ("false",)


@pytest.mark.parametrize(
    "arguments",
    [
        ['--peer-router-passwords="Z2VoZWlt'],
        ["-peer-router-passwords=Z2VoZWlt"],
        ["---peer-router-passwords=Z2VoZWlt"],
        ['--peer-router-passwords=a"Z2VoZWlt'],
    ],
)
def test_a_malformed_secret_is_not_repeated(arguments: list[str]) -> None:
    with pytest.raises(FlagError) as refused:
        parse_arguments(arguments)
    assert "Z2VoZWlt" not in str(refused.value)
    assert "<hidden>" in str(refused.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--peer-router-passwords=YQ==,", "Z2VoZWlt"],
        ["--peer-router-passwords", "YQ==,", "Z2VoZWlt", "Z2VoZWlt"],
        ["--peer-router-passwords", "YQ==,", "--", "Z2VoZWlt"],
    ],
)
def test_a_word_behind_a_secret_is_taken_for_its_rest(arguments: list[str]) -> None:
    parsed = parse_arguments(arguments)
    assert parsed.positionals and set(parsed.positionals) == {"<hidden>"}
    assert parsed.texts["peer-router-passwords"] == "<hidden>"


# --- Go's numbers and durations ------------------------------------------------------------------------------------

UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


@given(st.lists(st.tuples(st.integers(0, 999), st.sampled_from(sorted(UNITS))), min_size=1, max_size=6), st.booleans())
def test_a_duration_is_the_sum_of_its_parts(parts: list[tuple[int, str]], negative: bool) -> None:
    text = ("-" if negative else "") + "".join(f"{number}{unit}" for number, unit in parts)
    total = sum(number * UNITS[unit] for number, unit in parts)
    assert govalues.parse_duration(text) == (-total if negative else total)


@given(st.integers(-(2**63), 2**63 - 1))
def test_a_printed_duration_reads_back(nanoseconds: int) -> None:
    assert govalues.parse_duration(govalues.format_duration(nanoseconds)) == nanoseconds


@given(st.integers(0, 10**6), st.integers(0, 10**9 - 1))
def test_the_fraction_of_a_second_is_exact_to_the_nanosecond(seconds: int, nanoseconds: int) -> None:
    text = f"{seconds}.{nanoseconds:09}s"
    # Go multiplies the fraction in floating point and cuts: at most one nanosecond is lost
    exact = Fraction(seconds * 10**9 + nanoseconds)
    assert 0 <= exact - govalues.parse_duration(text) <= 1


@given(st.integers(0, 2**63 - 1), st.sampled_from(["s", "m", "h", "ms", "us", "ns"]))
def test_a_duration_of_more_than_292_years_is_refused(number: int, unit: str) -> None:
    if number * UNITS[unit] < 2**63:
        assert govalues.parse_duration(f"{number}{unit}") == number * UNITS[unit]
    else:
        with pytest.raises(ValueError, match="invalid duration"):
            govalues.parse_duration(f"{number}{unit}")


@given(st.integers(0, 2**70), st.sampled_from([8, 16, 32, 64]), st.sampled_from(["", "0x", "0X", "0o", "0b", "0"]))
def test_a_number_in_any_base_fits_its_bits(number: int, bits: int, prefix: str) -> None:
    digits = {"": "d", "0x": "x", "0X": "X", "0o": "o", "0b": "b", "0": "o"}[prefix]
    text = f"{prefix}{number:{digits}}"
    if number < 2**bits:
        assert govalues.parse_uint(text, 0, bits) == number
    else:
        with pytest.raises(ValueError, match="value out of range"):
            govalues.parse_uint(text, 0, bits)


@given(st.from_regex(r"[0-9_]{1,12}", fullmatch=True))
def test_underscores_stand_between_digits(text: str) -> None:
    octal = text[0] == "0"
    legal = all(text.split("_")) and not (octal and any(digit in text for digit in "89"))
    if legal:
        assert govalues.parse_uint(text, 0, 64) == int(text.replace("_", ""), 8 if octal else 10)
    else:
        with pytest.raises(ValueError, match="invalid syntax"):
            govalues.parse_uint(text, 0, 64)


def read_or_complaint(read: Callable[[], int]) -> tuple[int | None, str]:
    """The number, or None and what the ValueError says; any other exception comes through."""
    try:
        return read(), ""
    except ValueError as error:
        return None, str(error)


@given(st.text(max_size=12), st.sampled_from([0, 10]))
def test_no_text_makes_the_number_reader_stumble(text: str, base: int) -> None:
    value, complaint = read_or_complaint(lambda: govalues.parse_uint(text, base, 32))
    if value is None:
        assert complaint.startswith(f"strconv.ParseUint: parsing {govalues.quote(text)}: ")
    else:
        assert 0 <= value < 2**32
        assert text.isascii()


@given(st.text(max_size=20))
def test_no_text_makes_the_duration_reader_stumble(text: str) -> None:
    value, complaint = read_or_complaint(lambda: govalues.parse_duration(text))
    assert complaint.startswith("time: ") if value is None else -(2**63) <= value < 2**63


@given(st.lists(st.text(alphabet=st.characters(exclude_characters="\r", codec="utf-8"), max_size=8), min_size=1))
def test_a_written_csv_record_reads_back(items: list[str]) -> None:
    record = ",".join('"' + item.replace('"', '""') + '"' for item in items)
    assert govalues.read_csv(record) == tuple(items)


@given(st.text())
def test_a_quoted_text_is_one_printable_line(text: str) -> None:
    quoted = govalues.quote(text)
    assert quoted.isprintable() and quoted[0] == quoted[-1] == '"'


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-1", -1), ("+7", 7), ("007", 7), ("2147483647", 2**31 - 1), ("-2147483648", -(2**31))],
)
def test_log_level_numbers(text: str, value: int) -> None:
    assert govalues.parse_int(text, 32) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *((text, "invalid syntax") for text in ("", "x", "1x", "0x1", "1_0", " 1", "1 ", "--1", "١", "1.0")),
        *((text, "value out of range") for text in ("2147483648", "-2147483649", "9" * 5000)),
    ],
)
def test_log_level_words(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{reason}$"):
        govalues.parse_int(text, 32)
