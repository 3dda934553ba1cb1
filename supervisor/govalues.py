"""How Go reads and prints the values of flags: numbers, booleans, durations, one CSV record, quoted text.

Pure: text in, value or `ValueError` out. The rules and the wording of the errors are those of Go's strconv, time,
encoding/csv and fmt packages, because an operator's manifests and eyes are used to them. Two things differ from Python
and matter: a number with base 0 knows the old octal form (``010`` is 8), and a duration counts whole nanoseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

TRUE_WORDS = frozenset(("1", "t", "T", "TRUE", "true", "True"))
FALSE_WORDS = frozenset(("0", "f", "F", "FALSE", "false", "False"))
NANOSECONDS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,  # U+00B5
    "μs": 1_000,  # U+03BC
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_INT64_LIMIT = 1 << 63
_ESCAPES = {
    "\a": "a",
    "\b": "b",
    "\f": "f",
    "\n": "n",
    "\r": "r",
    "\t": "t",
    "\v": "v",
    '"': '"',
    "\\": "\\",
}
_BASES = {"b": 2, "o": 8, "x": 16}
_DURATION_PART = re.compile(r"([0-9]*)(?:(\.)([0-9]*))?([^.0-9]*)")


def quote(text: str) -> str:
    """``text`` between double quotes as fmt's ``%q`` prints it: one line, whatever is inside.

    Bytes that are no UTF-8 (surrogate escapes, as in ``sys.argv``) come out as ``\\xNN``.
    """
    return '"' + "".join(_quoted_character(character) for character in text) + '"'


def quote_character(character: str) -> str:
    """One character between single quotes, as ``%q`` prints a rune."""
    inner = "\\'" if character == "'" else '"' if character == '"' else _quoted_character(character)
    return f"'{inner}'"


def _quoted_character(character: str) -> str:
    if character in _ESCAPES:
        return "\\" + _ESCAPES[character]
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x20 or code == 0x7F:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def parse_bool(text: str) -> bool:
    """strconv.ParseBool."""
    if text in TRUE_WORDS:
        return True
    if text in FALSE_WORDS:
        return False
    raise ValueError(f"strconv.ParseBool: parsing {quote(text)}: invalid syntax")


def parse_uint(text: str, base: int, bits: int) -> int:
    """strconv.ParseUint with base 0 (prefixes, old octal, ``_`` between digits) or 10; below ``2**bits``."""

    def fail(reason: str) -> ValueError:
        return ValueError(f"strconv.ParseUint: parsing {quote(text)}: {reason}")

    digits, radix = text, 10
    if base == 0 and text.startswith("0"):
        prefixed = len(text) >= 3 and text[1].lower() in _BASES
        radix = _BASES[text[1].lower()] if prefixed else 8
        digits = text[2:] if prefixed else text[1:]
    if not text:
        raise fail("invalid syntax")
    value = 0
    for character in digits:  # in order: Go reports what it meets first, overflow or a stranger
        if base == 0 and character == "_":
            continue
        digit = int(character, 36) if character.isascii() and character.isalnum() else radix
        if digit >= radix:
            raise fail("invalid syntax")
        value = value * radix + digit
        if value >> bits:
            raise fail("value out of range")
    if "_" in digits and not _underscores_between_digits(text, digits):
        raise fail("invalid syntax")
    return value


def _underscores_between_digits(text: str, digits: str) -> bool:
    prefixed = len(text) != len(digits)  # a base prefix counts as a digit before the underscore
    body = digits if not prefixed else "0" + digits
    return not (body.startswith("_") or body.endswith("_") or "__" in body)


def parse_int(text: str, bits: int) -> int:
    """strconv.ParseInt with base 10: an optional sign and digits."""

    def fail(reason: str) -> ValueError:
        return ValueError(f"strconv.ParseInt: parsing {quote(text)}: {reason}")

    if not re.fullmatch(r"[+-]?[0-9]+", text, re.ASCII):
        raise fail("invalid syntax")
    sign, digits = (-1 if text[0] == "-" else 1), text.lstrip("+-").lstrip("0")
    if len(digits) > 20 or not -(1 << bits - 1) <= sign * int(digits or "0") < 1 << bits - 1:
        raise fail("value out of range")
    return sign * int(digits or "0")


def parse_duration(text: str) -> int:
    """time.ParseDuration: whole nanoseconds. ``90s``, ``1h2m3.5s``, ``-1.5ms``, ``0``; there is no day."""
    invalid = ValueError(f"time: invalid duration {_time_quote(text)}")
    unsigned = text[1:] if text[:1] in ("-", "+") else text
    if unsigned == "0":
        return 0
    if not unsigned:
        raise invalid
    total = 0
    position = 0
    while position < len(unsigned):
        match = _DURATION_PART.match(unsigned, position)
        if match is None or not (match[1] or match[3]):
            raise invalid
        position = match.end()
        whole = match[1].lstrip("0")
        if len(whole) > len(str(_INT64_LIMIT)) or int(whole or "0") > _INT64_LIMIT:
            raise invalid
        if not match[4]:
            raise ValueError(f"time: missing unit in duration {_time_quote(text)}")
        if match[4] not in NANOSECONDS:
            raise ValueError(f"time: unknown unit {_time_quote(match[4])} in duration {_time_quote(text)}")
        total += _nanoseconds(whole, match[3] or "", NANOSECONDS[match[4]])
        if total > _INT64_LIMIT:
            raise invalid
    negative = text.startswith("-")
    if total == _INT64_LIMIT and not negative:
        raise invalid
    return -total if negative else total


def _nanoseconds(whole: str, fraction: str, unit: int) -> int:
    """One part of a duration. Go keeps what of the fraction fits an int64 and multiplies in floating point."""
    value, scale = 0, 1.0
    for digit in fraction:
        longer = value * 10 + int(digit)
        if value > (_INT64_LIMIT - 1) // 10 or longer > _INT64_LIMIT:
            break
        value, scale = longer, scale * 10
    return int(whole or "0") * unit + (int(float(value) * (float(unit) / scale)) if value else 0)


def _time_quote(text: str) -> str:
    """The time package's own quoting: bytes outside printable ASCII as ``\\xNN``."""
    parts = []
    for byte in text.encode("utf-8", "surrogateescape"):
        if byte in b'"\\':
            parts.append("\\" + chr(byte))
        else:
            parts.append(chr(byte) if 0x20 <= byte < 0x80 else f"\\x{byte:02x}")
    return '"' + "".join(parts) + '"'


def format_duration(nanoseconds: int) -> str:
    """time.Duration.String: ``1m0s``, ``1.5s``, ``100ms``, ``0s``."""
    if nanoseconds < 0:
        return "-" + format_duration(-nanoseconds)
    for unit, symbol in ((1, "ns"), (1_000, "µs"), (1_000_000, "ms")):
        if 0 < nanoseconds < unit * 1_000:
            return _decimal(nanoseconds, unit) + symbol
    minutes, rest = divmod(nanoseconds, NANOSECONDS["m"])
    text = _decimal(rest, NANOSECONDS["s"]) + "s"
    if minutes:
        hours, minutes = divmod(minutes, 60)
        text = f"{minutes}m{text}"
        if hours:
            text = f"{hours}h{text}"
    return text


def _decimal(value: int, unit: int) -> str:
    whole, rest = divmod(value, unit)
    fraction = str(rest).rjust(len(str(unit)) - 1, "0").rstrip("0") if rest else ""
    return f"{whole}.{fraction}" if fraction else str(whole)


def read_csv(text: str) -> tuple[str, ...]:
    """The first record of ``text`` by encoding/csv: ``,`` between fields, double quotes around a field, not trimmed.

    Empty text is an empty list; text of empty lines only is the error ``EOF``; a record ends at the line's end, unless
    the line break is quoted.
    """
    if not text:
        return ()
    lines = _lines(text)
    for number, line in enumerate(lines, 1):
        if line != "\n":
            return tuple(_fields(line, lines, number))
    raise ValueError("EOF")


def _lines(text: str) -> Iterator[str]:
    """Lines with their ``\\n``; ``\\r\\n`` counts as ``\\n``, and a last ``\\r`` without one is dropped."""
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        if line.endswith("\r\n"):
            yield line[:-2] + "\n"
        elif line.endswith("\n"):
            yield line
        elif line != "\r":
            yield line.removesuffix("\r")


def _fields(line: str, lines: Iterator[str], number: int) -> Iterator[str]:
    start = number

    def fail(consumed: str, reason: str) -> ValueError:
        where = f"parse error on line {number}, column {len(_utf8(consumed)) + 1}: {reason}"
        return ValueError(where if number == start else f"record on line {start}; {where}")

    rest = line
    while True:
        if not rest.startswith('"'):
            field, comma, after = rest.partition(",")
            field = field if comma else field.removesuffix("\n")
            if '"' in field:
                before = line[: len(line) - len(rest)] + field[: field.index('"')]
                raise fail(before, 'bare " in non-quoted-field')
            yield field
            if not comma:
                return
            rest = after
            continue
        value, rest = "", rest[1:]
        while True:
            piece, mark, after = rest.partition('"')
            value += piece
            if not mark:
                following = next(lines, None)
                if following is None:
                    raise fail(line, 'extraneous or missing " in quoted-field')
                number, line, rest = number + 1, following, following
                continue
            rest = after
            if rest.startswith('"'):
                value, rest = value + '"', rest[1:]
            elif rest.startswith(","):
                yield value
                rest = rest[1:]
                break
            elif rest in ("", "\n"):
                yield value
                return
            else:
                raise fail(
                    line[: len(line) - len(rest) - 1],
                    'extraneous or missing " in quoted-field',
                )


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
