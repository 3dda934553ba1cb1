"""From settings to the text of ``supervisord.conf``: one program a worker, gobgpd, and the event listener.

Pure: what the machine is like comes in as `Facts`; the same input gives the same text, which a golden test holds.

Each program starts through util-linux ``setpriv``: it gets the user and the capabilities of the table in
``programs``, as far as the agent has them to give, ``no_new_privs``, and a signal for the death of supervisord
(``PR_SET_PDEATHSIG``), so that nothing outlives it unsupervised. Its working directory is the run directory's ``ipc``
folder, in which all sockets have short relative names.

gobgpd is stopped by TERM, upon which it tells its peers that it goes; with graceful restart by KILL, as any
notification would make the peers drop the routes that they are meant to keep.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from kube_router.supervisor.programs import ROOT, WORKER_USER, Program, wanted_programs
from kube_router.workers.settings import Settings

LISTENER = "listener"
SPEAKER = "gobgpd"
SPEAKER_DIR = "gobgpd"
SPEAKER_SOCKET = "gobgpd.sock"
IPC_DIR = "ipc"
LOG_DIR = "log"
CONF_FILE = "supervisord.conf"
RELOAD_FILE = "reload.json"
"""In the run directory, mode 0600: what the program that follows the flags file has still to do, and to tell."""
STOP_SECONDS = 2
"""For each program, before it is killed; supervisord stops them one after the other, the listener all at once."""
BUFFERED_EVENTS = 1000
"""Log chunks and state changes that supervisord keeps while the listener restarts."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the machine is like, as far as the configuration depends on it.

    ``listener`` is the path of the listener's source. ``capabilities``: what the agent has and may hand on.
    ``as_root``: programs that run as root although they need not, as files are closed to their own user.
    ``may_bound``, ``may_switch``: whether the agent may take capabilities from its children (CAP_SETPCAP) and give
    them another user (CAP_SETUID, CAP_SETGID).
    """

    python: str
    setpriv: str
    gobgpd: str
    listener: str
    capabilities: frozenset[str]
    as_root: frozenset[str] = field(default_factory=frozenset)
    may_bound: bool = True
    may_switch: bool = True


def render(settings: Settings, facts: Facts, programs: Sequence[Program] | None = None) -> str:
    """The whole configuration; ``programs`` are those that the settings ask for unless given.

    Raises ValueError for a path that cannot stand in such a file.
    """
    chosen = wanted_programs(settings) if programs is None else tuple(programs)
    sections = [*_head(settings), _listener(settings, facts, chosen)]
    sections += [_program(program, place, settings, facts) for place, program in enumerate(chosen)]
    return "\n\n".join(_section(title, options) for title, options in sections) + "\n"


Section = tuple[str, dict[str, str]]


def _section(title: str, options: dict[str, str]) -> str:
    return "\n".join([f"[{title}]", *(f"{key} = {_escaped(key, value)}" for key, value in options.items())])


def _escaped(key: str, value: str) -> str:
    """A value as the file wants it: ``%`` doubled; a comment or a line break inside cannot be expressed.

    supervisord expands the log files of a program twice.
    """
    if re.search(r"\s[;#]|[\r\n]", value):
        raise ValueError(f"{value!r} cannot stand in supervisord.conf: it has a blank before ; or #, or a line break")
    return value.replace("%", "%%%%" if key in ("stdout_logfile", "stderr_logfile") else "%%")


def _head(settings: Settings) -> list[Section]:
    socket = f"{settings.run_dir}/supervisord.sock"
    return [
        (
            "supervisord",
            {
                "nodaemon": "true",
                "silent": "true",
                "user": "root",
                "logfile": f"{settings.run_dir}/supervisord.log",
                "logfile_maxbytes": "1MB",
                "logfile_backups": "1",
                "pidfile": f"{settings.run_dir}/supervisord.pid",
                "nocleanup": "true",
                "minfds": "256",
                "minprocs": "1",
            },
        ),
        ("unix_http_server", {"file": socket, "chmod": "0700"}),
        (
            "rpcinterface:supervisor",
            {"supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"},
        ),
        ("supervisorctl", {"serverurl": f"unix://{socket}"}),
    ]


def _listener(settings: Settings, facts: Facts, programs: Sequence[Program]) -> Section:
    """The listener imports the standard library only, so it does without ``site``: half the memory."""
    names = [program.name for program in programs]
    command = [facts.setpriv, "--no-new-privs", "--pdeathsig", "TERM", "--", facts.python, "-I", "-S", facts.listener]
    command += [settings.run_dir, settings.log_format, *names]
    options = {
        "command": shlex.join(command),
        "directory": f"{settings.run_dir}/{IPC_DIR}",
        "events": "PROCESS_LOG,PROCESS_STATE,PROCESS_GROUP_REMOVED,SUPERVISOR_STATE_CHANGE",
        "buffer_size": str(BUFFERED_EVENTS),
        "priority": "1",
        "autorestart": "true",
        "startsecs": "0",
        "stopwaitsecs": str(STOP_SECONDS),
        "stdout_logfile": "NONE",
        "stderr_logfile": f"{settings.run_dir}/{LOG_DIR}/{LISTENER}.log",
        "stderr_logfile_maxbytes": "1MB",
        "stderr_logfile_backups": "1",
    }
    return f"eventlistener:{LISTENER}", options


def _program(program: Program, place: int, settings: Settings, facts: Facts) -> Section:
    speaker = program.name == SPEAKER
    command = [facts.setpriv, *privileges(program, facts), "--"]
    command += program.command or (
        speaker_command(settings, facts)
        if speaker
        else (facts.python, "-P", "-m", f"kube_router.{program.folder}.{program.name}")
    )
    options = {
        "command": shlex.join(command),
        "directory": f"{settings.run_dir}/{SPEAKER_DIR if speaker else IPC_DIR}",
        "environment": 'PYTHONSAFEPATH="1"',
        "priority": str(10 * (place + 1)),
        "autorestart": "true",
        "startsecs": "1",
        "startretries": "0",
        "stopsignal": "KILL" if speaker and settings.bgp_graceful_restart else "TERM",
        "stopwaitsecs": str(STOP_SECONDS),
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": f"{settings.run_dir}/{LOG_DIR}/{program.name}.log",
        "stdout_logfile_maxbytes": "1MB",
        "stdout_logfile_backups": "1",
        "stdout_events_enabled": "true",
    }
    if speaker:
        options["umask"] = "007"
    return f"program:{program.name}", options


def user_of(program: Program, facts: Facts) -> int:
    """The user that the program runs as."""
    return ROOT if program.name in facts.as_root or not facts.may_switch else program.user


def privileges(program: Program, facts: Facts) -> list[str]:
    """``setpriv`` options: the program's user, what it may do at most, and the signal when supervisord dies."""
    user = user_of(program, facts)
    wanted = [name for name in (*program.capabilities, *program.helpful) if name in facts.capabilities]
    listed = ",".join(["-all", *(f"+{name}" for name in wanted)])
    # Root gets its capabilities by the bounding set; another user keeps them over exec only as ambient ones.
    kept = listed if user != ROOT else "-all"
    options = ["--no-new-privs", "--pdeathsig", "KILL" if program.name == SPEAKER else "TERM"]
    options += [f"--inh-caps={kept}", f"--ambient-caps={kept}"]
    if facts.may_bound:
        options.append(f"--bounding-set={listed}")
    if user != ROOT:
        options += [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    elif facts.may_switch:
        options.append("--clear-groups" if program.name == SPEAKER else f"--groups={WORKER_USER}")
    return options


def speaker_command(settings: Settings, facts: Facts) -> tuple[str, ...]:
    """The launcher of gobgpd, which becomes gobgpd once its socket and its ports are free."""
    command = [facts.python, "-P", "-m", "kube_router.supervisor.gobgpd", f"--binary={facts.gobgpd}"]
    command += [f"--socket={SPEAKER_SOCKET}", f"--log-level={'debug' if settings.v >= 2 else 'info'}"]
    command += [f"--admin={host}" for host in admin_hosts(settings.gobgp_admin_address, settings.gobgp_admin_port)]
    return tuple(command)


def admin_hosts(address: str, port: int) -> tuple[str, ...]:
    """Where gobgpd's gRPC listens for the operator, by upstream's rule; nowhere for port 0.

    A text that is no address: 127.0.0.1. A loopback or unspecified address: just that. Any other: it, and 127.0.0.1.
    """
    if not port:
        return ()
    try:
        parsed = ipaddress.ip_address(address.removeprefix("[").removesuffix("]"))
    except ValueError:
        return (f"127.0.0.1:{port}",)
    shown = f"[{parsed}]:{port}" if parsed.version == 6 else f"{parsed}:{port}"
    return (shown,) if parsed.is_loopback or parsed.is_unspecified else (shown, f"127.0.0.1:{port}")
