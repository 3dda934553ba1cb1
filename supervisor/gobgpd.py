"""The launcher of gobgpd: makes way for its socket, checks its ports, and becomes gobgpd.

Touches sockets and the process: run in the folder of the private socket, under the privileges that gobgpd is to have.

- A socket file that a killed gobgpd left behind makes the next one exit: it is removed, unless somebody answers on it.
- A port of ``--gobgp-admin-address`` that is taken makes gobgpd 3 exit, while gobgpd 4 goes on without any of its
  listeners, the private one included. It is left out with a line that says so: routing does not depend on it.
- The flags differ: gobgpd 4 has a metrics listener that must be told to stay away.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def tell(level: str, text: str) -> None:
    """One line in gobgpd's own form, which the listener turns into ours."""
    print(json.dumps({"level": level, "msg": text}), flush=True)


def clear_socket(path: str) -> bool:
    """Remove a socket file that nobody listens on; False if somebody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return True
        except OSError:
            os.unlink(path)
            return True
    return False


def bind_trouble(host: str) -> str | None:
    """Why ``address:port`` (IPv6 in brackets) cannot be listened on, None if it can."""
    address, _, port = host.rpartition(":")
    family = socket.AF_INET6 if address.startswith("[") else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        # As Go does: without it, connections of a gobgpd that just ended would count as "in use".
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address.strip("[]"), int(port)))
            listener.listen(1)
        except OSError as error:
            return os.strerror(error.errno) if error.errno else str(error)
    return None


def speaker_arguments(binary: str, api_hosts: Sequence[str], log_level: str, help_text: str) -> list[str]:
    """The command line of gobgpd; ``help_text`` tells which flags it knows."""
    arguments = [binary, f"--api-hosts={','.join(api_hosts)}", "--pprof-disable", "-l", log_level]
    if "--metrics-path" in help_text:
        arguments.append("--metrics-path=")
    return arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Become gobgpd; returns only if that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--admin", action="append", default=[])
    options = parser.parse_args(arguments)
    if not clear_socket(options.socket):
        tell("error", f"{options.socket}: another gobgpd listens on it")
        return 1
    hosts = [f"unix://{options.socket}"]
    for host in options.admin:
        if trouble := bind_trouble(host):
            flags = "--gobgp-admin-address, --gobgp-admin-port"
            tell("error", f"{flags}: cannot listen on {host}: {trouble}; gobgpd runs without it until its next start")
        else:
            hosts.append(host)
    try:
        shown = subprocess.run([options.binary, "--help"], check=False, capture_output=True, text=True, timeout=10)
        os.execvp(options.binary, speaker_arguments(options.binary, hosts, options.log_level, shown.stdout))
    except FileNotFoundError:
        tell("error", f"{options.binary}: no such program on PATH: BGP needs gobgpd to be installed")
    except OSError as error:
        tell("error", f"{options.binary}: cannot be run: {os.strerror(error.errno or errno.EIO)}")
    except subprocess.TimeoutExpired:
        tell("error", f"{options.binary}: --help gave no answer within 10 s")
    return 127


if __name__ == "__main__":
    sys.exit(main())
