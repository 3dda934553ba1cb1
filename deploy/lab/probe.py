"""Inside a pod: ``probe.py serve PORT…`` answers connections, ``probe.py ask [--every S] ADDRESS,PORT…`` makes them.

Touches sockets of the namespace that it is started in. Standard library only: it is run by ``python -I -S``, so that a
start is quick. ``ask`` prints a JSON list with one object for each target: how many attempts ended in which way
(`ANSWERED`, …, or the name of the error). With ``--every`` it begins an attempt every so many seconds, whatever became
of the one before, until its standard input is closed.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import json
import os
import socket
import struct
import sys

GREETING = b"here\n"
ANSWERED = "answered"
LATE = "answered, after a packet was lost"
OPENED = "opened, but not answered"
TIMEOUT = "timeout"
PATIENCE = 0.9
"""Seconds for an attempt: fewer than until the kernel sends a lost SYN again, so that one attempt is one SYN.

A refusal can take this long too: the kernel limits the rate of the ICMP errors that REJECT sends.
"""

TCP_INFO_RETRANSMITS = 100
"""Offset of ``tcpi_total_retrans`` in struct tcp_info (linux/tcp.h)."""


async def serve(ports: list[int]) -> None:
    """Greet everybody who connects, over both families; says "ready" on stdout."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        writer.close()

    for port in ports:
        listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
        await asyncio.start_server(greet, sock=listener)
    print("ready", flush=True)
    await asyncio.Event().wait()


async def attempt(address: str, port: int) -> str:
    """One connection; how it ended."""
    opened = False
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(address, port)
            opened = True
            try:
                answered = await reader.read(len(GREETING)) == GREETING
                information = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            finally:
                writer.close()
    except OSError as error:  # TimeoutError is one
        if opened:
            return OPENED
        return errno.errorcode.get(error.errno, "?") if error.errno else TIMEOUT
    if not answered:
        return OPENED
    return LATE if struct.unpack_from("I", information, TCP_INFO_RETRANSMITS)[0] else ANSWERED


async def ask(targets: list[tuple[str, int]], every: float | None) -> list[dict[str, int]]:
    """Attempts to all targets at once: one each, or one each ``every`` seconds until standard input is closed."""
    seen = [collections.Counter[str]() for _ in targets]
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def heard() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            stop.set()

    if every is not None:
        loop.add_reader(0, heard)

    async def one(index: int) -> None:
        seen[index][await attempt(*targets[index])] += 1

    running: set[asyncio.Task[None]] = set()
    due = loop.time()
    while not stop.is_set():
        running |= {asyncio.create_task(one(index)) for index in range(len(targets))}
        if every is None:
            break
        running = {task for task in running if not task.done()}
        due += every
        await asyncio.sleep(max(0.0, due - loop.time()))
    await asyncio.gather(*running)
    return [dict(counts) for counts in seen]


def main(arguments: list[str]) -> None:
    """``serve`` or ``ask``; arguments come from the lab only."""
    if arguments[0] == "serve":
        asyncio.run(serve([int(port) for port in arguments[1:]]))
        return
    every = float(arguments[2]) if arguments[1] == "--every" else None
    pairs = [text.rpartition(",") for text in arguments[1 if every is None else 3 :]]
    print(json.dumps(asyncio.run(ask([(address, int(port)) for address, _, port in pairs], every))))


if __name__ == "__main__":
    main(sys.argv[1:])
