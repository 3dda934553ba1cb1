"""What the machine says about a command line: environment, host name, files that flags name, addresses to listen on.

Touches files and sockets: reads, and binds for a moment; changes nothing. The judgement about values is in `settings`;
here are the checks that need the machine.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from kube_router.supervisor.pflag import Parsed
from kube_router.supervisor.settings import Problem, Surroundings, shown_value
from kube_router.workers.settings import Settings

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
LONGEST_FILE = 1 << 20
"""Bytes: neither a kubeconfig nor a list of passwords is longer."""


def read_surroundings(parsed: Parsed, working_directory: str | None = None) -> Surroundings:
    """Collect what `settings.resolve` wants to know of the machine; relative paths count from the directory."""
    working_directory = working_directory or str(Path.cwd())
    passwords_file = None
    name = parsed.values["peer-router-passwords-file"]
    if name and not parsed.values["peer-router-passwords"]:
        try:
            passwords_file = read_text(Path(working_directory, str(name)))
        except (OSError, ValueError):
            passwords_file = None
    return Surroundings(
        environment=dict(os.environ),
        host_name=socket.gethostname(),
        working_directory=working_directory,
        passwords_file=passwords_file,
        namespace_file=_namespace(),
    )


def _namespace() -> str:
    try:
        return read_text(SERVICE_ACCOUNT / "namespace")
    except (OSError, ValueError):
        return ""


def read_text(path: Path) -> str:
    """A regular text file; raises OSError, or ValueError for one that is too long or no text."""
    if not path.is_file():
        path.stat()  # raises the better error if there is nothing
        raise OSError(None, "is not a regular file")
    with path.open("rb") as file:
        content = file.read(LONGEST_FILE + 1)
    if len(content) > LONGEST_FILE:
        raise ValueError(f"is longer than {LONGEST_FILE} bytes")
    return content.decode()


def check_source(parsed: Parsed, settings: Settings) -> list[Problem]:
    """Whether the source of the cluster's state is there at all; its content is the watcher's concern."""
    if settings.manifests:
        return _check_manifests(parsed, settings)
    if settings.kubeconfig:
        return _check_kubeconfig(parsed, settings)
    missing = [name for name in ("token", "ca.crt") if not (SERVICE_ACCOUNT / name).is_file()]
    rule = "outside of a pod --kubeconfig or --manifests must be given"
    if missing:
        return [Problem("--kubeconfig", "", f"{rule}: there is no {SERVICE_ACCOUNT / missing[0]}")]
    if not settings.master and not os.environ.get("KUBERNETES_SERVICE_HOST"):
        return [Problem("--kubeconfig", "", f"{rule}: KUBERNETES_SERVICE_HOST is not set")]
    return []


def _check_manifests(parsed: Parsed, settings: Settings) -> list[Problem]:
    try:
        with os.scandir(settings.manifests):
            return []
    except OSError as error:
        return [_problem(parsed, "manifests", "a directory that can be read", error)]


def _check_kubeconfig(parsed: Parsed, settings: Settings) -> list[Problem]:
    try:
        content = read_text(Path(settings.kubeconfig))
    except UnicodeDecodeError:
        return [Problem("--kubeconfig", shown_value(parsed, "kubeconfig"), "must be a text file: it is no UTF-8")]
    except (OSError, ValueError) as error:
        return [_problem(parsed, "kubeconfig", "a file that can be read", error)]
    if not content.strip():
        return [Problem("--kubeconfig", shown_value(parsed, "kubeconfig"), "must be a kubeconfig: it is empty")]
    return []


def _problem(parsed: Parsed, flag_name: str, wanted: str, error: Exception) -> Problem:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return Problem(f"--{flag_name}", shown_value(parsed, flag_name), f"must be {wanted}: {reason}")


def check_listening(parsed: Parsed, settings: Settings) -> list[Problem]:
    """Whether the addresses of /healthz and of the metrics can be bound, as upstream tries before it starts."""
    problems = []
    for what in ("health", "metrics"):
        address, port = getattr(settings, f"{what}_addr"), getattr(settings, f"{what}_port")
        if port:
            try:
                bind_once(address, port)
            except OSError as error:
                shown = address or "all addresses"
                rule = f"must be a free TCP port: cannot listen on it at {shown}: {error.strerror}"
                problems.append(Problem(f"--{what}-port", shown_value(parsed, f"{what}-port"), rule))
    return problems


def bind_once(address: str, port: int) -> None:
    """Bind and close a TCP listener; an empty address is every one of both families. Raises OSError."""
    family = socket.AF_INET if "." in address and ":" not in address else socket.AF_INET6
    if not address and not socket.has_dualstack_ipv6():
        family = socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if not address else 1)
        host = address or ("::" if family is socket.AF_INET6 else "0.0.0.0")
        where = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)[0][4]
        listener.bind(where)
        listener.listen(1)
