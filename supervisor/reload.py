"""The program ``reload``: follows the flags file and the passwords file, and brings a running agent to what they say.

Touches those files (by inotify and by reading), the generated files of the run directory, and supervisord. It runs only
if one of the two flags is given.

A new content is checked like a command line. One fault, and nothing changes: the fault is told, in the log and in
``kube-routerctl status``, until the content is good again. Else settings and secrets are written anew, and just the
programs that read what changed are restarted, which is lossless. What must be done is written down before it is begun,
so that a process that is killed in between is continued by its successor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kube_router.supervisor import conf
from kube_router.supervisor.changes import Reload, Step, Verb, plan_reload
from kube_router.supervisor.flags import parse_arguments
from kube_router.supervisor.launch import LAUNCH_FILE, Launch, write_private, write_shared
from kube_router.supervisor.pflag import Parsed
from kube_router.supervisor.programs import RELOADER, wanted_programs
from kube_router.supervisor.reading import Configuration, read_configuration
from kube_router.supervisor.surroundings import check_listening
from kube_router.workers import logs
from kube_router.workers.kernel.filewatch import FileWatch
from kube_router.workers.settings import (
    SECRETS_FILE,
    SETTINGS_FILE,
    Secrets,
    Settings,
    load_secrets,
    load_settings,
    save,
)

log = logging.getLogger(__name__)

CHECK_SECONDS = 60.0
"""Files are read again so often even without an event: not every file system has events."""
RETRY_SECONDS = 2.0

RPC_SECONDS = 10.0
STOP_SECONDS, STOP_CHECK_SECONDS = 10.0, 0.05
_ENDED = ("STOPPED", "EXITED", "FATAL", "UNKNOWN")
_SO_ALREADY = (10, 60, 70, 90)
"""Faults BAD_NAME, ALREADY_STARTED, NOT_RUNNING and ALREADY_ADDED of supervisord (supervisor/xmlrpc.py)."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """``reload.json``: what has still to be done, and what ``status`` tells."""

    pending: tuple[Step, ...] = ()
    warnings: tuple[str, ...] = ()


def read_state(run_dir: Path) -> State:
    """What the file says; nothing if there is none."""
    try:
        return msgspec.json.decode((run_dir / conf.RELOAD_FILE).read_bytes(), type=State)
    except (OSError, msgspec.DecodeError):
        return State()


class Reloader:
    """One agent's files and programs. ``call`` asks supervisord: method, arguments."""

    def __init__(self, run_dir: Path, launch: Launch, call: Callable[..., Any]) -> None:
        self._run_dir, self._launch, self._call = run_dir, launch, call
        self._command: Parsed = parse_arguments([os.fsdecode(argument) for argument in launch.arguments])
        self._state = read_state(run_dir)
        self._told: tuple[str, ...] = ()

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return load_settings(self._run_dir / conf.IPC_DIR / SETTINGS_FILE)

    def turn(self) -> float:
        """Read, compare and do what must be done; the seconds after which to come again."""
        found = read_configuration(self._command, self._launch.working_directory)
        old = self.settings
        faults = self._faults(old, found)
        if faults:
            self._tell([f"{fault}; the settings stay as they are" for fault in faults])
        else:
            self._take(old, found)
        return RETRY_SECONDS if not self._carry_out() else CHECK_SECONDS

    def _faults(self, old: Settings, found: Configuration) -> list[object]:
        problems: list[object] = [*found.file_problems, *found.resolution.problems]
        new = found.resolution.settings
        if not problems and not (new.run_router or new.run_firewall or new.run_service_proxy):
            problems.append("no worker to run: none of --run-router, --run-firewall and --run-service-proxy is true")
        if not problems:
            problems += found.located(check_listening(found.parsed, _only_new_listeners(old, new)))
        return problems

    def _take(self, old: Settings, found: Configuration) -> None:
        secrets = found.resolution.secrets
        new_secrets = secrets != load_secrets(str(self._run_dir))
        plan = plan_reload(old, found.resolution.settings, new_secrets=new_secrets)
        self._tell([str(problem) for problem in found.located(plan.refused)])
        if plan.settings == old and not new_secrets:
            return
        self._announce(old, plan, new_secrets)
        for remark in found.resolution.remarks:
            log.warning("%s", remark)
        for worker in set(plan.settings.unbuilt_workers) - set(old.unbuilt_workers):
            log.warning("%s is asked for and not built yet: it does not run, and nothing else is affected", worker)
        steps = tuple(dict.fromkeys((*self._state.pending, *plan.steps)))
        self._keep(msgspec.structs.replace(self._state, pending=steps))
        self._write(plan.settings, secrets)

    def _announce(self, old: Settings, plan: Reload, new_secrets: bool) -> None:
        changes = [*plan.changes, *(["passwords of BGP peers"] if new_secrets else [])]
        steps = ", ".join(map(str, plan.steps)) or "no program reads it"
        log.info("settings change: %s: %s", "; ".join(changes), steps)
        if Step(Verb.REPLACE, conf.SPEAKER) in plan.steps:
            hosts = [
                ",".join(conf.admin_hosts(item.gobgp_admin_address, item.gobgp_admin_port)) or "none"
                for item in (old, plan.settings)
            ]
            how = "peers keep our routes" if old.bgp_graceful_restart else "all BGP sessions drop for some seconds"
            log.warning("gobgpd is replaced: its administration moves from %s to %s; %s", *hosts, how)

    def _write(self, settings: Settings, secrets: Secrets) -> None:
        save(self._run_dir / SECRETS_FILE, secrets, 0o600)
        text = conf.render(settings, self._launch.facts, wanted_programs(settings))
        write_private(self._run_dir / conf.CONF_FILE, text)
        write_shared(self._run_dir / conf.IPC_DIR / SETTINGS_FILE, settings)

    def _carry_out(self) -> bool:
        """Take the pending steps; False when one must be tried again."""
        if not self._state.pending:
            return True
        try:
            self._call("reloadConfig")
            for step in self._state.pending:
                self._do(step)
                rest = tuple(item for item in self._state.pending if item != step)
                self._keep(msgspec.structs.replace(self._state, pending=rest))
        except OSError as error:
            log.error("supervisord does not do what was asked for: %s; it is asked again", error)
            return False
        return True

    def _do(self, step: Step) -> None:
        """One step; each can be repeated."""
        name = step.program
        match step.verb:
            case Verb.RESTART:
                self._stop(name)
                self._call("startProcess", name, False)
            case Verb.ADD:
                self._call("addProcessGroup", name)
            case Verb.REMOVE | Verb.REPLACE:
                if name == conf.SPEAKER and self.settings.bgp_graceful_restart:
                    # supervisord stops it by the signal that was right when it was started.
                    self._call("signalProcess", name, "KILL")
                self._stop(name)
                self._call("removeProcessGroup", name)
                if step.verb is Verb.REPLACE:
                    self._call("addProcessGroup", name)

    def _stop(self, name: str) -> None:
        """Returns when it has ended. To be asked wakes supervisord, whose own wait for it takes up to a second more."""
        self._call("stopProcess", name, False)
        deadline = time.monotonic() + STOP_SECONDS
        while (found := self._call("getProcessInfo", name)) and found["statename"] not in _ENDED:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} does not end")
            time.sleep(STOP_CHECK_SECONDS)

    def _tell(self, lines: Sequence[str]) -> None:
        """Log what is new among the warnings, and keep them for ``status``."""
        for line in lines:
            if line not in self._told:
                log.error("%s", line)
        self._told = tuple(lines)
        if self._state.warnings != self._told:
            self._keep(msgspec.structs.replace(self._state, warnings=self._told))

    def _keep(self, state: State) -> None:
        write_private(self._run_dir / conf.RELOAD_FILE, msgspec.json.encode(state).decode())
        self._state = state

    def files(self) -> tuple[str, ...]:
        """The files to watch."""
        settings = self.settings
        return tuple(filter(None, (settings.flags_file, settings.peer_router_passwords_file)))


def _only_new_listeners(old: Settings, new: Settings) -> Settings:
    """``new`` without the ports that are listened on already."""
    same = {
        f"{what}_port": 0
        for what in ("health", "metrics")
        if [getattr(old, f"{what}_{part}") for part in ("addr", "port")]
        == [getattr(new, f"{what}_{part}") for part in ("addr", "port")]
    }
    return msgspec.structs.replace(new, **same)


def ask_supervisord(run_dir: Path) -> Callable[..., Any]:
    """A function that calls a method of supervisord; that something is so already is no failure. Raises OSError."""

    def call(method: str, *arguments: Any) -> Any:
        # XML-RPC costs memory, and most agents' flags never change.
        import http.client
        import xmlrpc.client

        from kube_router.supervisor.rpc import supervisord

        proxy = supervisord(str(run_dir / "supervisord.sock"), RPC_SECONDS)
        try:
            return getattr(proxy.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode in _SO_ALREADY:
                return None
            raise OSError(f"{method}{arguments}: {fault.faultString}") from None
        except http.client.HTTPException as error:
            raise OSError(f"{method}{arguments}: {error}") from None

    return call


def wait(watches: Iterable[FileWatch], seconds: float) -> None:
    """Until one of the files may have changed, or the time is over."""
    watches = list(watches)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select(watches, [], [], left)
        changed = [watch.drain() for watch in ready]
        if any(changed):
            return


def main() -> int:
    """Follow the files until the process is ended."""
    run_dir = Path.cwd().parent
    settings = load_settings()
    logs.configure(RELOADER, settings)
    launch = msgspec.json.decode((run_dir / LAUNCH_FILE).read_bytes(), type=Launch)
    reloader = Reloader(run_dir, launch, ask_supervisord(run_dir))
    log.info("started: following %s", " ".join(reloader.files()))
    watches: dict[str, FileWatch] = {}
    while True:
        # Watched before they are read: what changes in between is an event.
        for path in reloader.files():
            if path in watches:
                watches[path].follow()
            else:
                with contextlib.suppress(OSError):
                    watches[path] = FileWatch(path)
        wait(watches.values(), reloader.turn())


if __name__ == "__main__":
    sys.exit(main())
