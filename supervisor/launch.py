"""From checked settings to a running supervisord: the run directory, the checks that need the machine, then exec.

Touches files and the process. Everything that may be refused is refused here, before anything runs, in one line; what a
worker can do without is one warning. Nothing of the network is touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from kube_router.supervisor import conf, readable
from kube_router.supervisor.conf import Facts
from kube_router.supervisor.programs import PROGRAMS, RELOADER, ROOT, WORKER_USER, Program, wanted_programs
from kube_router.workers.settings import SECRETS_FILE, SETTINGS_FILE, Secrets, Settings, save

log = logging.getLogger(__name__)

LONGEST_RUN_DIR = 80
"""Bytes: a unix socket's path has 107, and supervisord first binds ``/supervisord.sock.<pid>`` there."""
LOCK_DESCRIPTOR = 3
"""supervisord keeps descriptors below 5 when it reloads, and closes 3 and above in its children."""
CAPABILITIES = {
    5: "kill",
    6: "setgid",
    7: "setuid",
    8: "setpcap",
    10: "net_bind_service",
    12: "net_admin",
    13: "net_raw",
    16: "sys_module",
}
"""linux/capability.h, what this module asks for."""
LEFTOVER_SECONDS = 2.0
LAUNCH_FILE = "launch.json"
"""In the run directory, mode 0600 (there may be passwords in the arguments): how the agent was started."""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed to read the flags again, and to write ``supervisord.conf`` again for this machine."""

    arguments: tuple[bytes, ...]
    working_directory: str
    facts: Facts


class CannotLaunch(Exception):
    """The agent does not start; one line."""


def launch(
    settings: Settings,
    secrets: Secrets,
    programs: Sequence[Program] | None = None,
    arguments: Sequence[str] = (),
) -> int:
    """Prepare everything and become supervisord. Returns, with an exit status, only if that fails.

    ``programs`` are those that the settings ask for unless given; ``arguments`` is the command line, which is kept for
    the program that follows the flags file.
    """
    try:
        run_dir = Path(settings.run_dir)
        chosen = wanted_programs(settings) if programs is None else tuple(programs)
        lock = take_run_dir(run_dir)
        end_leftovers(run_dir)
        facts = gather_facts(settings, chosen)
        for line in shortcomings(settings, facts, chosen):
            log.warning("%s", line)
        make_folders(settings, facts, chosen)
        save(run_dir / SECRETS_FILE, secrets, 0o600)
        write_shared(run_dir / conf.IPC_DIR / SETTINGS_FILE, settings)
        write_private(run_dir / conf.CONF_FILE, conf.render(settings, facts, chosen))
        keep_arguments(run_dir, arguments, facts, chosen)
        return become_supervisord(run_dir, facts, lock)
    except CannotLaunch as error:
        log.error("%s", error)
    except (OSError, ValueError) as error:
        log.error("cannot prepare --run-dir=%s: %s", settings.run_dir, error)
    return 1


def take_run_dir(run_dir: Path) -> int:
    """Create the run directory and lock it; returns the lock's descriptor. Raises `CannotLaunch`."""
    if len(os.fsencode(run_dir)) > LONGEST_RUN_DIR:
        raise CannotLaunch(f"--run-dir={run_dir}: must be at most {LONGEST_RUN_DIR} bytes long: sockets live there")
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if run_dir.stat().st_uid != os.geteuid():
        raise CannotLaunch(f"--run-dir={run_dir}: must belong to root: it belongs to user {run_dir.stat().st_uid}")
    run_dir.chmod(0o700)
    lock = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 32).decode("ascii", "replace").strip() or "unknown"
        raise CannotLaunch(f"--run-dir={run_dir}: another agent uses it (process {holder})") from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def end_leftovers(run_dir: Path) -> None:
    """End what a killed supervisord left: its programs were told to end, one that hangs is killed now.

    Recognised by its working directory together with what it runs, so that a shell in there is left alone.
    """
    deadline = time.monotonic() + LEFTOVER_SECONDS
    while found := list(leftovers(run_dir)):
        if time.monotonic() > deadline:
            for pid in found:
                log.warning("killing process %d, left over from an earlier agent in %s", pid, run_dir)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + LEFTOVER_SECONDS
        time.sleep(0.02)


def leftovers(run_dir: Path) -> Iterator[int]:
    """Processes of an earlier agent of this run directory; the lock says that it is gone."""
    folders = {str(run_dir / conf.IPC_DIR), str(run_dir / conf.SPEAKER_DIR)}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if os.readlink(f"{entry.path}/cwd") not in folders:
                continue
            arguments = Path(entry.path, "cmdline").read_bytes()
        except OSError:
            continue
        if b"kube_router." in arguments or b"--api-hosts=unix://" in arguments or b"listener.py\0" in arguments:
            yield int(entry.name)


def gather_facts(settings: Settings, programs: Sequence[Program]) -> Facts:
    """Look at the machine; raises `CannotLaunch` without ``setpriv``, which every program is started by."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise CannotLaunch("setpriv: no such program on PATH: every worker is started by it (Debian: util-linux)")
    mine = own_capabilities()
    gobgpd = shutil.which("gobgpd") or "gobgpd"
    may_switch = {"setuid", "setgid"} <= mine
    closed = {}
    if may_switch:
        closed = {
            program.name: path
            for program in with_later_ones(programs)
            if program.user != ROOT and (path := readable.first_closed(program, settings, gobgpd))
        }
    chosen = {program.name for program in programs}
    for path in dict.fromkeys(path for name, path in closed.items() if name in chosen):
        names = ", ".join(name for name, its_path in closed.items() if its_path == path and name in chosen)
        log.info("as root, with no more than the capabilities needed: %s: %s is closed to other users", names, path)
    return Facts(
        python=sys.executable,
        setpriv=setpriv,
        gobgpd=gobgpd,
        listener=str(Path(__file__).with_name("listener.py")),
        capabilities=mine,
        as_root=frozenset(closed),
        may_bound="setpcap" in mine,
        may_switch=may_switch,
    )


def with_later_ones(programs: Sequence[Program]) -> Sequence[Program]:
    """``programs``, and those that a flag may still switch on while the agent runs."""
    names = {program.name for program in programs}
    return (*programs, *(program for program in PROGRAMS if program.built and program.name not in names))


def own_capabilities() -> frozenset[str]:
    """Which of `CAPABILITIES` this process holds and may hand on (permitted and bounding set, proc(5))."""
    mask = ~0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("CapPrm:", "CapBnd:")):
            mask &= int(line.split()[1], 16)
    return frozenset(name for bit, name in CAPABILITIES.items() if mask >> bit & 1)


def shortcomings(settings: Settings, facts: Facts, programs: Sequence[Program]) -> Iterator[str]:
    """What the agent lacks, a line each; its other parts work without."""
    for name in sorted({name for program in programs for name in program.capabilities} - facts.capabilities):
        users = ", ".join(program.name for program in programs if name in program.capabilities)
        yield f"CAP_{name.upper()} is missing: {users} cannot work fully; grant it to the container"
    if not (facts.may_bound and facts.may_switch):
        lacking = [name for name in ("setpcap", "setuid", "setgid") if name not in facts.capabilities]
        names = ", ".join(f"CAP_{name.upper()}" for name in lacking)
        yield f"{names} missing: the workers cannot be confined to what they need"
    for program in programs:
        for tool in program.tools:
            if shutil.which(tool) is None:
                yield f"{tool}: no such program on PATH: {program.name} needs it"
    if settings.enable_pprof:
        yield "--enable-pprof: there is no profiling endpoint yet; the flag changes nothing"


def make_folders(settings: Settings, facts: Facts, programs: Sequence[Program]) -> None:
    """The folders of the run directory, empty of an earlier agent's sockets, and of the state directory."""
    users = {program.name: conf.user_of(program, facts) for program in with_later_ones(programs)}
    run_dir, state_dir = Path(settings.run_dir), Path(settings.state_dir)
    speaker = users.get(conf.SPEAKER, ROOT)
    make_folder(run_dir / conf.LOG_DIR, 0o700)
    # Set-group-ID: sockets belong to the group whoever binds them. Sticky: no one removes another's file.
    make_folder(run_dir / conf.IPC_DIR, 0o3770, group=WORKER_USER if facts.may_switch else ROOT)
    # gobgpd's socket gets group root by set-group-ID: the router is root, without the power to override modes.
    make_folder(run_dir / conf.SPEAKER_DIR, 0o2710 if speaker != ROOT else 0o700, user=speaker)
    for entry in (run_dir / conf.IPC_DIR).iterdir():
        if not entry.is_dir() or entry.is_symlink():
            entry.unlink()
    (run_dir / "supervisord.log").unlink(missing_ok=True)
    try:
        make_folder(state_dir, 0o755)
        make_folder(state_dir / "watcher", 0o700, user=users.get("watcher", ROOT), contents=True)
        make_folder(state_dir / "router", 0o700)
    except OSError as error:
        log.warning("--state-dir=%s: %s: nothing is kept over a restart", settings.state_dir, error)


def make_folder(path: Path, mode: int, user: int = ROOT, group: int | None = None, contents: bool = False) -> None:
    """A folder with this owner and mode, whatever there was; ``contents`` also hands over the files in it."""
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise CannotLaunch(f"{path}: must be a directory of the agent: it is a symbolic link")
    owner_group = group if group is not None else ROOT
    paths = [path, *(path.iterdir() if contents else ())]
    for each in paths:
        status = each.lstat()
        if (status.st_uid, status.st_gid) != (user, owner_group):
            os.chown(each, user, owner_group, follow_symlinks=False)
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def write_shared(path: Path, settings: Settings) -> None:
    """The settings, for the workers' group to read."""
    save(path, settings, 0o640)


def write_private(path: Path, text: str) -> None:
    """A file for root only, by rename."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.replace(path)


def keep_arguments(run_dir: Path, arguments: Sequence[str], facts: Facts, programs: Sequence[Program]) -> None:
    """Write down how the agent was started, if a program of it will read its files again; forget an earlier agent's."""
    for name in (LAUNCH_FILE, conf.RELOAD_FILE):
        (run_dir / name).unlink(missing_ok=True)
    if any(program.name == RELOADER for program in programs):
        given = tuple(map(os.fsencode, arguments))
        known = Launch(arguments=given, working_directory=str(Path.cwd()), facts=facts)
        write_private(run_dir / LAUNCH_FILE, msgspec.json.encode(known).decode())


def become_supervisord(run_dir: Path, facts: Facts, lock: int) -> int:
    """Replace this process by supervisord; the lock stays with it."""
    relay_socket()
    os.environ["PYTHONSAFEPATH"] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(lock, LOCK_DESCRIPTOR)
    os.set_inheritable(LOCK_DESCRIPTOR, True)  # dup2 of a descriptor onto itself would not do it
    knock(run_dir, lock)
    arguments = [facts.python, "-P", "-m", "supervisor.supervisord", "-n", "-c", str(run_dir / conf.CONF_FILE)]
    os.execv(facts.python, arguments)
    return 1


def knock(run_dir: Path, lock: int) -> None:
    """Let a child connect to supervisord as soon as that listens.

    Before it starts the first program, supervisord waits up to a second for something to happen: this happens.
    """
    if os.fork():
        return
    try:
        for descriptor in {lock, LOCK_DESCRIPTOR}:
            os.close(descriptor)
        for _ in range(1000):
            time.sleep(0.01)
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(run_dir / "supervisord.sock"))
                break
    finally:
        os._exit(0)


def relay_socket() -> None:
    """Let ``cat`` write to a stdout that is a socket (systemd's journal): a socket cannot be opened a second time.

    The listener opens supervisord's stdout by its name in /proc, which works for pipes, files and terminals. ``cat``
    ends with the last writer.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(1).st_mode):
            return
    except OSError:  # closed
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1, inheritable=True)
        return
    cat = shutil.which("cat")
    if cat is None:
        log.warning("cat: no such program on PATH: nothing can be logged to a socket; see log/ in the run directory")
        return
    reader, writer = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, reader, 0), (os.POSIX_SPAWN_CLOSE, reader), (os.POSIX_SPAWN_CLOSE, writer)]
    os.posix_spawn(cat, [cat], os.environ, file_actions=actions, setpgroup=0)
    os.dup2(writer, 1, inheritable=True)
    os.close(reader)
    os.close(writer)
