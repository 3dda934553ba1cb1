"""nftables through libnftables, inside this process: commands as text in, all of them done or one error out.

Touches the kernel. No program is forked and no JSON is made: a transaction of one chain takes 0.1 ms beside an empty
table and 5 ms beside 2,000 sets (the library looks names up by listing the headers of a table's sets and chains, which
is why members go another way: `nftelements.py`). A whole transaction happens, or none of it.

The library's socket belongs to the network namespace that the creating thread is in; a context is used by one thread.
The library keeps nothing between calls but its heap, which does not grow (tests/kernel/test_nft.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
from collections.abc import Sequence

from kube_router.workers.kernel.netlink import NETLINK_NETFILTER
from kube_router.workers.model import Family

LIBRARY = "libnftables.so.1"
KIND = {Family.IPV4: "ip", Family.IPV6: "ip6"}
"""The words of nftables for a table's family."""

_STATELESS, _TERSE = 1 << 2, 1 << 11
_ABSENT = "No such file or directory"
_ERROR = re.compile(r"^(?:/\S*?:(?P<line>\d+):[\d-]+: )?(?:\w+: )?Error: (?P<words>.*)$", re.MULTILINE)
_WORDS_SHOWN = 3
_LARGE = 256 * 1024
"""Bytes of commands or of a listing after which the heap is worth the milliseconds that trimming it takes."""


class NftError(Exception):
    """The library or the kernel refused commands; one line of text.

    ``refused``: (index of the command, why) for every command that is at fault, as far as that is known.
    """

    def __init__(self, text: str, refused: Sequence[tuple[int, str]] = ()) -> None:
        super().__init__(text)
        self.refused = tuple(refused)


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise NftError(f"{LIBRARY} cannot be loaded (Debian's package is libnftables1): {error}") from None
    context, flags, text = ctypes.c_void_p, ctypes.c_uint, ctypes.c_char_p
    for name, result, arguments in (
        ("nft_ctx_new", context, [flags]),
        ("nft_ctx_free", None, [context]),
        ("nft_ctx_buffer_output", ctypes.c_int, [context]),
        ("nft_ctx_buffer_error", ctypes.c_int, [context]),
        ("nft_ctx_get_output_buffer", text, [context]),
        ("nft_ctx_get_error_buffer", text, [context]),
        ("nft_ctx_output_set_flags", None, [context, flags]),
        ("nft_run_cmd_from_buffer", ctypes.c_int, [context, text]),
        ("nft_run_cmd_from_filename", ctypes.c_int, [context, text]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Nft:
    """One context of the library. ``portid``: that of its socket, by which its own events are told from others'."""

    def __init__(self) -> None:
        """Raises `NftError` when the library is missing or cannot open its socket."""
        self._library = _load()
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)  # other C libraries than glibc lack it
        before = _descriptors()
        # The library ends the process when it cannot open its socket: whether it can is found out first.
        try:
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER).close()
        except OSError as error:
            raise NftError(f"this kernel has no nfnetlink: {error.strerror}") from None
        self._context = self._library.nft_ctx_new(0)
        if not self._context:
            raise NftError(f"{LIBRARY} gives no context")
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)
        self._library.nft_run_cmd_from_buffer(self._context, b"list tables ip")  # the socket has no address before
        self.portid = _portid({number for number, file in _descriptors().items() if file not in before.values()})
        # Elements and counters are not listed: the first can be many, the second always differ.
        self._library.nft_ctx_output_set_flags(self._context, _STATELESS | _TERSE)

    def close(self) -> None:
        """Free the context; it must not be used afterwards."""
        context, self._context = self._context, None
        if context:
            self._library.nft_ctx_free(context)

    def run(self, commands: Sequence[str]) -> None:
        """Carry out all commands (one line of text each, in order), or none. Raises `NftError`."""
        # Only for a file does the library say which line an error is about.
        descriptor = os.memfd_create("nft", os.MFD_CLOEXEC)
        try:
            with open(descriptor, "w", closefd=False) as file:
                file.writelines(f"{command}\n" for command in commands)
            size = os.fstat(descriptor).st_size
            status = self._library.nft_run_cmd_from_filename(self._context, b"/proc/self/fd/%d" % descriptor)
        finally:
            os.close(descriptor)
        self._library.nft_ctx_get_output_buffer(self._context)
        words = self._errors()
        self._give_back(size)
        if status != 0:
            raise _error(commands, words)

    def list_table(self, family: Family, name: str) -> str | None:
        """The text of one table without elements and counters; None when it does not exist. Raises `NftError`."""
        command = f"list table {KIND[family]} {name}"
        status = self._library.nft_run_cmd_from_buffer(self._context, command.encode())
        text: bytes = self._library.nft_ctx_get_output_buffer(self._context) or b""
        words = self._errors()
        self._give_back(len(text))
        if status == 0:
            return text.decode("utf-8", "replace")
        if _ABSENT in words:
            return None
        raise _error([command], words)

    def _give_back(self, size: int) -> None:
        """The library needs some fifty times the size of a text, and glibc would keep that."""
        if size >= _LARGE:
            self._trim(0)

    def _errors(self) -> str:
        return (self._library.nft_ctx_get_error_buffer(self._context) or b"").decode("utf-8", "replace")


def _error(commands: Sequence[str], words: str) -> NftError:
    """What the library said in several lines and underlined, in one."""
    refused: list[tuple[int, str]] = []
    texts: dict[str, None] = {}
    for found in _ERROR.finditer(words):
        reason = found["words"].removeprefix("Could not process rule: ").strip()
        index = int(found["line"]) - 1 if found["line"] else -1
        if 0 <= index < len(commands):
            refused.append((index, reason))
            texts[f"{_shortened(commands[index])}: {reason}"] = None
        else:
            texts[reason] = None
    shown = [*texts][:_WORDS_SHOWN]
    if len(texts) > _WORDS_SHOWN:
        shown.append(f"and {len(texts) - _WORDS_SHOWN} more")
    return NftError("nft: " + ("; ".join(shown) or " ".join(words.split()) or "refused without a word"), refused)


def _shortened(command: str, limit: int = 160) -> str:
    return command if len(command) <= limit else f"{command[:limit]}…"


def _descriptors() -> dict[int, str]:
    """What every open descriptor is; numbers alone are used again."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _portid(descriptors: set[int]) -> int:
    """The netlink address of the socket among new descriptors; 0 when there is none."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as found:
            if found.family == socket.AF_NETLINK:
                return int(found.getsockname()[0])
    return 0
