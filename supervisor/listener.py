"""supervisord's event listener: one log stream of all programs, another try for those that failed, the record of it.

Touches the agent's stdout, supervisord's socket and ``processes.json``. Imports the standard library only and little of
it, and is run without ``site``: it lives as long as the agent, and each module costs memory.

The protocol (supervisor's documentation, "Event Listeners"): READY out, a header line and a payload in, RESULT out. The
length in the header counts characters. A chunk that supervisord could not decode comes as ``Undecodable: b'…'``.

What comes from where: states from the events; process ids and exit reasons from supervisord's own log, as the events
carry neither. Both are kept in ``processes.json``, by which a restarted listener goes on.

supervisord looks at its children once a second: Python goes on with an interrupted poll (PEP 475), so no SIGCHLD ends
it. Reaping, starting anew and each step of stopping would wait for that. The listener watches the processes itself
(pidfd) and nudges supervisord: an empty line on stderr, which supervisord reads, is enough to make it look.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import select
import signal
import sys
import time

SHARED_GROUP = 65532
LONGEST_LINE = 16384
MOST_UNWRITTEN = 1 << 20
"""Bytes of log that wait for a reader of stdout; beyond it lines are dropped and counted: no worker waits for a log."""
RETRY_MOST = 60.0
Told = tuple[str, str]
"""Level and text of a line of our own."""
HANG_SECONDS = 2.0
"""At the end of the agent a worker has this long after SIGTERM."""
NUDGE_SECONDS = 0.02
NUDGED_SECONDS = 2.0
"""Longest time of nudging for one process: it may be that nothing is left to do."""
SETTLE_SECONDS = 1.05
"""A little more than ``startsecs``: then a starting program is looked at again, and found running."""
UNTOLD = frozenset(("gobgpd",))
"""Not told to end by us: stopped by supervisord after the workers, with the signal of the configuration. With graceful
restart it is killed, as any notification would make its peers drop our routes; that flag may have changed since."""
LEVELS = {"debug": "DEBUG", "info": "INFO", "warn": "WARN", "warning": "WARN", "error": "ERROR", "fatal": "ERROR"}


def timestamp(seconds: float) -> str:
    """UTC in RFC 3339 with milliseconds, as the workers write it."""
    milliseconds = int(seconds * 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000)) + f".{milliseconds % 1000:03d}Z"


class Lines:
    """Chunks of one program's output in, whole lines out; an endless line is cut."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, chunk: str) -> list[str]:
        """The lines that ``chunk`` completes, without their ends."""
        *lines, self._rest = (self._rest + chunk).split("\n")
        while len(self._rest) > LONGEST_LINE:
            lines.append(self._rest[:LONGEST_LINE])
            self._rest = self._rest[LONGEST_LINE:]
        return lines

    def flush(self) -> list[str]:
        """What is left when the program has ended."""
        rest, self._rest = self._rest, ""
        return [rest] if rest else []


class Chunks:
    """Bytes of events cut anywhere: a character may be in two chunks, then neither could be decoded by supervisord."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def feed(self, data: str) -> str:
        """Text of a PROCESS_LOG payload."""
        if data.startswith(("Undecodable: b'", 'Undecodable: b"')):
            raw = codecs.escape_decode(data[len("Undecodable: b'") : -1].encode("latin-1", "replace"))[0]
        else:
            raw = data.encode("utf-8", "replace")
        return self._decoder.decode(raw)


def record(level: str, worker: str, message: str, as_json: bool, now: float) -> str:
    """A line of the stream."""
    if as_json:
        return json.dumps(
            {"time": timestamp(now), "level": level.lower(), "worker": worker, "message": message}, ensure_ascii=False
        )
    return f"{timestamp(now)} {level:<5} {worker}  {message}"


def is_record(line: str, as_json: bool) -> bool:
    """Whether a worker's logging made this line."""
    if as_json:
        return line.startswith('{"time":')
    return len(line) > 24 and line[10] == "T" and line[23] == "Z" and line[4] == "-"


def foreign_message(program: str, line: str) -> Told:
    """A line of a program that does not log as we do (gobgpd: JSON), or a crash message of one that does."""
    level, message = "INFO" if program == "gobgpd" else "ERROR", line
    if line.startswith("{"):
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        if isinstance(fields, dict) and "msg" in fields:
            level = LEVELS.get(str(fields.pop("level", "info")).lower(), "INFO")
            message = str(fields.pop("msg")).strip()
            fields.pop("time", None)
            message = " ".join([message, *(f"{key}={value}" for key, value in fields.items())])
    return level, message


def parse_header(line: str) -> dict[str, str]:
    """``key:value key:value`` as a dict."""
    return dict(item.split(":", 1) for item in line.split())


class Process:
    """What is known of one program."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = "STOPPED"
        self.pid = 0
        self.starts = 0
        self.reason = ""
        self.since = 0.0
        self.failures = 0
        self.last_words = ""
        self.watched_pid = 0

    def as_dict(self) -> dict[str, object]:
        """For ``processes.json``."""
        return {
            "state": self.state,
            "pid": self.pid,
            "starts": self.starts,
            "restarts": max(0, self.starts - 1),
            "reason": self.reason,
            "since": self.since,
            "failures": self.failures,
        }

    def take(self, known: dict[str, str]) -> None:
        """Go on from what an earlier listener wrote."""
        self.state, self.pid = str(known["state"]), int(known["pid"])
        self.starts, self.failures = int(known["starts"]), int(known["failures"])
        self.reason, self.since = str(known["reason"]), float(known["since"])


class Record:
    """All programs, and the rules by which events change what is known of them. Time is a parameter."""

    def __init__(self, names: list[str]) -> None:
        self.processes = {name: Process(name) for name in names}
        self.retry_at: dict[str, float] = {}
        self.stopping = False

    def of(self, name: str) -> Process:
        """The process of that name; one that is new (``supervisorctl add``) is taken in."""
        return self.processes.setdefault(name, Process(name))

    def forget(self, name: str) -> None:
        """A program that was removed from supervisord."""
        self.processes.pop(name, None)
        self.retry_at.pop(name, None)

    def log_line(self, line: str) -> Told | None:
        """A line of supervisord's log; returns what to tell."""
        words = line.split(" ", 3)
        if len(words) < 4:
            return None
        level, text = words[2], words[3]
        if text.startswith("spawned: '") and "' with pid " in text:
            name, _, pid = text[len("spawned: '") :].partition("' with pid ")
            process = self.processes.get(name)
            if process is not None and pid.isdigit():
                process.pid, process.last_words = int(pid), ""
                process.starts += 1
                again = f" (restart {process.starts - 1})" if process.starts > 1 else ""
                return "INFO", f"{name}: started as process {pid}{again}"
        elif text.startswith(("exited: ", "stopped: ")):
            name, _, reason = text.partition(": ")[2].partition(" (")
            process = self.processes.get(name)
            if process is not None:
                process.pid = 0
                reason = reason.removesuffix(")").removesuffix("; not expected").removesuffix("; expected")
                if process.last_words and reason.startswith("exit status ") and reason != "exit status 0":
                    reason += f": {process.last_words}"
                process.reason = reason
                if process.state == "STARTING" and not self.stopping:
                    return None  # the line about the next try tells the reason
                level = "INFO" if self.stopping or text.startswith("stopped") else "WARN"
                return level, f"{name}: ended: {process.reason}"
        elif text.startswith("spawnerr: ") or level == "ERRO":
            return "ERROR", f"supervisord: {text}"
        return None

    def state(self, name: str, event: str, now: float, clock: float) -> Told | None:
        """A PROCESS_STATE event at ``now`` (monotonic) and ``clock`` (Unix time); returns what to tell."""
        process = self.of(name)
        process.state, process.since = event, clock
        if event == "RUNNING":
            process.failures = 0
            self.retry_at.pop(name, None)
        elif event in ("STOPPED", "STARTING"):
            self.retry_at.pop(name, None)
        elif event == "FATAL" and not self.stopping:
            return self.plan_retry(process, now)
        return None

    def plan_retry(self, process: Process, now: float) -> Told:
        """1, 2, 4 … 60 seconds after the failure."""
        delay = min(2.0**process.failures, RETRY_MOST)
        process.failures = min(process.failures + 1, 10)
        self.retry_at[process.name] = now + delay
        why = process.reason or "it could not be started"
        return "ERROR", f"{process.name}: failed at its start ({why}); next try in {delay:g} s"

    def due(self, now: float) -> list[str]:
        """The programs whose time to try again has come."""
        return [name for name, at in self.retry_at.items() if at <= now]


class Stream:
    """The agent's stdout, never waited for. ``descriptor`` is in non-blocking mode."""

    def __init__(self, descriptor: int, as_json: bool = False) -> None:
        self.descriptor = descriptor
        self._as_json = as_json
        self._unwritten = bytearray()
        self._lost = 0

    @property
    def pending(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._unwritten)

    def line(self, text: str) -> None:
        """Write a line now or keep it; drop it when too much is kept already."""
        data = (text + "\n").encode("utf-8", "backslashreplace")
        if len(self._unwritten) + len(data) > MOST_UNWRITTEN:
            self._lost += 1
            return
        self._unwritten += data
        self.write()

    def write(self) -> None:
        """Write what can be written without waiting."""
        try:
            while self._unwritten:
                del self._unwritten[: os.write(self.descriptor, self._unwritten)]
                if self._lost and not self._unwritten:
                    text = f"{self._lost} log lines lost: nobody read the log stream"
                    self._lost = 0
                    line = record("WARN", "supervisor", text, self._as_json, time.time())
                    self._unwritten += line.encode() + b"\n"
        except BlockingIOError:
            pass
        except OSError:  # the reader is gone, or the disk is full: the log files of the run directory remain
            self._lost += self._unwritten.count(b"\n")
            self._unwritten.clear()


def open_stream(supervisord: int) -> int:
    """supervisord's stdout, opened anew so that non-blocking mode is ours alone; our stderr if that cannot be."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        return os.open(f"/proc/{supervisord}/fd/1", flags)
    except OSError as error:
        sys.stderr.write(f"cannot open the agent's stdout ({os.strerror(error.errno or errno.EIO)}): logging here\n")
        sys.stderr.flush()
        return 2


class SupervisorLog:
    """Reads on in supervisord's log; follows its rotation."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.offset = 0

    def lines(self) -> list[str]:
        """Whole lines written since the last call."""
        try:
            with open(self._path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size < self.offset:
                    self.offset = 0
                file.seek(self.offset)
                data = file.read()
        except OSError:
            return []
        end = data.rfind(b"\n") + 1
        self.offset += end
        return data[:end].decode("utf-8", "replace").splitlines()


def concerns(line: str, program: str, state: str) -> bool:
    """Whether a line of supervisord's log tells what an event with this new state of a program stands for."""
    text = line.split(" ", 3)[-1]
    if state == "STARTING":
        return text.startswith(f"spawned: '{program}' with pid ")
    if state in ("EXITED", "BACKOFF", "STOPPED"):
        return text.startswith((f"exited: {program} (", f"stopped: {program} ("))
    return False


def start_program(socket_path: str, name: str) -> None:
    """Ask supervisord to start a program, without waiting: XML-RPC ``supervisor.startProcess`` over its socket."""
    import socket  # only when something has failed

    body = (
        "<?xml version='1.0'?><methodCall><methodName>supervisor.startProcess</methodName><params>"
        f"<param><value><string>{name}</string></value></param><param><value><boolean>0</boolean></value></param>"
        "</params></methodCall>"
    )
    request = (
        f"POST /RPC2 HTTP/1.0\r\nHost: localhost\r\nContent-Type: text/xml\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(socket_path)
        connection.sendall(request.encode())
        while connection.recv(65536):
            pass


class Listener:
    """The loop: events in, lines out, and what is due."""

    def __init__(self, run_dir: str, as_json: bool, names: list[str]) -> None:
        self._run_dir, self._as_json = run_dir, as_json
        self._supervisord = os.getppid()
        self._stream = Stream(open_stream(self._supervisord), as_json)
        self._log = SupervisorLog(f"{run_dir}/supervisord.log")
        self._record = Record(names)
        self._log_lines: list[str] = []
        self._last_line: dict[str, str] = {}
        self._lines: dict[str, Lines] = {}
        self._chunks: dict[str, Chunks] = {}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._buffer = ""
        self._kill_at: float | None = None
        self._watched: dict[int, Process] = {}
        self._nudge_until: dict[str, float] = {}
        self._settle_at: dict[str, float] = {}
        self._write_failed = False
        self._load()

    # -- the record on disk ------------------------------------------------------------------------------------

    def _load(self) -> None:
        try:
            with open("processes.json") as file:
                known = json.load(file)
            if known["supervisord"] == self._supervisord:
                # Programs may have come and gone since we were told their names.
                self._record.processes.clear()
                for name, fields in known["programs"].items():
                    self._record.of(name).take(fields)
                self._log.offset = int(known["offset"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        for process in self._record.processes.values():
            if process.state == "FATAL":
                delay = min(2.0 ** max(0, process.failures - 1), RETRY_MOST)
                self._record.retry_at[process.name] = time.monotonic() + delay
        self._save()

    def _save(self) -> None:
        """Write ``processes.json`` by rename; unprivileged workers may write to the folder: no link is followed."""
        text = json.dumps(
            {
                "supervisord": self._supervisord,
                "updated": time.time(),
                "offset": self._log.offset,
                "programs": {process.name: process.as_dict() for process in self._record.processes.values()},
            }
        )
        temporary = ".processes.json.new"
        try:
            if os.path.lexists(temporary):
                os.unlink(temporary)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(temporary, flags, 0o640), "w") as file:
                file.write(text)
            os.replace(temporary, "processes.json")
            self._write_failed = False
        except OSError as error:
            if not self._write_failed:
                self._tell("ERROR", f"processes.json: cannot be written: {os.strerror(error.errno or errno.EIO)}")
            self._write_failed = True

    # -- lines -------------------------------------------------------------------------------------------------

    def _tell(self, level: str, text: str) -> None:
        self._stream.line(record(level, "supervisor", text, self._as_json, time.time()))

    def _output(self, name: str, data: str) -> None:
        text = self._chunks.setdefault(name, Chunks()).feed(data)
        self._pass_on(name, self._lines.setdefault(name, Lines()).feed(text))

    def _pass_on(self, name: str, lines: list[str]) -> None:
        for line in lines:
            self._last_line[name] = line
            if is_record(line, self._as_json):
                self._stream.line(line)
            elif line.strip():
                level, message = foreign_message(name, line)
                if level == "ERROR":
                    self._record.of(name).last_words = message.strip()[:500]
                self._stream.line(record(level, name, message, self._as_json, time.time()))

    # -- events ------------------------------------------------------------------------------------------------

    def _read_log(self, until: tuple[str, str] | None = None) -> None:
        """Take lines of supervisord's log up to the one that belongs to an event, or all of them.

        The log is ahead of the events: what it says of a program's end is taken with the event of that end, behind the
        program's last words, and what it says of a start with the event of the start.
        """
        self._log_lines += self._log.lines()
        taken = len(self._log_lines)
        if until is not None:
            taken = next((place + 1 for place, line in enumerate(self._log_lines) if concerns(line, *until)), 0)
        lines, self._log_lines = self._log_lines[:taken], self._log_lines[taken:]
        for line in lines:
            if told := self._record.log_line(line):
                self._tell(*told)
        watched = {process.watched_pid for process in self._watched.values()}
        for process in self._record.processes.values():
            if process.pid and process.pid not in watched:
                self._watch(process)

    def _watch(self, process: Process) -> None:
        """Hear of the end of a process, also of one that is over already."""
        self._nudge_until.pop(process.name, None)
        self._settle_at[process.name] = time.monotonic() + SETTLE_SECONDS
        process.watched_pid = process.pid
        try:
            self._watched[os.pidfd_open(process.pid)] = process
        except OSError:
            self._nudge_until[process.name] = time.monotonic() + NUDGED_SECONDS

    def _ended(self, descriptor: int) -> None:
        process = self._watched.pop(descriptor)
        os.close(descriptor)
        process.watched_pid = 0
        if process.pid:
            self._nudge_until[process.name] = time.monotonic() + NUDGED_SECONDS

    def _nudge(self, now: float) -> None:
        """Make supervisord look at its children, while one of them has ended or should be running by now."""
        self._nudge_until = {name: until for name, until in self._nudge_until.items() if until > now}
        settled = [name for name, at in self._settle_at.items() if at <= now]
        for name in settled:
            del self._settle_at[name]
        if settled or self._nudge_until:
            os.write(2, b"\n")

    def _event(self, header: dict[str, str], payload: str) -> None:
        name = header["eventname"]
        if name.startswith("PROCESS_LOG"):
            first, _, data = payload.partition("\n")
            self._output(parse_header(first)["processname"], data)
        elif name.startswith("PROCESS_STATE_"):
            self._state_event(parse_header(payload)["processname"], name.removeprefix("PROCESS_STATE_"))
        elif name == "PROCESS_GROUP_REMOVED":
            self._record.forget(parse_header(payload)["groupname"])
            self._save()
        elif name == "SUPERVISOR_STATE_CHANGE_STOPPING":
            self._stop_all()

    def _state_event(self, program: str, state: str) -> None:
        if program == "listener":
            return
        self._record.of(program)  # one that was added must be known when its start is read from the log
        if state in ("EXITED", "BACKOFF", "STOPPED", "FATAL") and program in self._lines:
            self._pass_on(program, self._lines[program].flush())
        self._read_log((program, state))
        if told := self._record.state(program, state, time.monotonic(), time.time()):
            self._tell(*told)
        if state in ("FATAL", "STOPPED", "RUNNING"):
            self._nudge_until.pop(program, None)
        self._save()

    def _stop_all(self) -> None:
        """All workers at once; supervisord itself would stop one after the other."""
        self._record.stopping = True
        self._record.retry_at.clear()
        self._tell("INFO", "stopping; the state of the network stays as it is")
        self._signal(signal.SIGTERM)
        if graceful_restart():
            self._signal(signal.SIGKILL, UNTOLD)
        self._kill_at = time.monotonic() + HANG_SECONDS
        self._nudge_until[""] = time.monotonic() + 60

    def _signal(self, number: int, only: frozenset[str] | None = None) -> None:
        for process in self._record.processes.values():
            meant = process.name not in UNTOLD if only is None else process.name in only
            if meant and process.pid and process.state in ("STARTING", "RUNNING", "STOPPING"):
                with contextlib.suppress(OSError):
                    os.kill(process.pid, number)

    # -- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until supervisord closes our stdin or tells us to end."""
        os.write(1, b"READY\n")
        while True:
            ready = self._wait()
            for descriptor in ready & self._watched.keys():
                self._ended(descriptor)
            if 0 in ready:
                data = os.read(0, 1 << 16)
                if not data:
                    break
                self._buffer += self._decoder.decode(data)
                self._take_events()
            self._do_what_is_due()

    def finish(self) -> None:
        """Say and write what is left; supervisord sends no more events."""
        self._read_last_words()
        self._read_log()
        self._save()
        self._stream.write()

    def _read_last_words(self) -> None:
        """Lines that are in a program's log file and did not come as an event: those of its last moments."""
        for name, line in list(self._last_line.items()):
            try:
                with open(f"{self._run_dir}/log/{name}.log", "rb") as file:
                    file.seek(max(0, file.seek(0, os.SEEK_END) - 4 * LONGEST_LINE))
                    text = file.read().decode("utf-8", "backslashreplace")
            except OSError:
                continue
            _, found, rest = text.rpartition(line + "\n")
            if found:
                self._pass_on(name, rest.splitlines())

    def _wait(self) -> set[int]:
        poller = select.poll()
        poller.register(0, select.POLLIN)
        if self._stream.pending:
            poller.register(self._stream.descriptor, select.POLLOUT)
        for descriptor in self._watched:
            poller.register(descriptor, select.POLLIN)
        now = time.monotonic()
        planned = [*self._record.retry_at.values(), *self._settle_at.values()]
        planned += [self._kill_at] if self._kill_at is not None else []
        planned += [now + NUDGE_SECONDS] if self._nudge_until else []
        ready = poller.poll(max(0.0, min(planned) - now) * 1000 + 1 if planned else None)
        return {descriptor for descriptor, _ in ready}

    def _take_events(self) -> None:
        while "\n" in self._buffer:
            line, _, rest = self._buffer.partition("\n")
            header = parse_header(line)
            length = int(header["len"])
            if len(rest) < length:
                return
            self._buffer = rest[length:]
            try:
                self._event(header, rest[:length])
            except (KeyError, ValueError) as error:
                self._tell("ERROR", f"an event of supervisord could not be understood: {error!r}")
            os.write(1, b"RESULT 2\nOKREADY\n")

    def _do_what_is_due(self) -> None:
        self._stream.write()
        now = time.monotonic()
        self._nudge(now)
        for name in self._record.due(now):
            del self._record.retry_at[name]
            try:
                start_program(f"{self._run_dir}/supervisord.sock", name)
            except OSError as error:
                self._record.retry_at[name] = now + 5.0
                self._tell("ERROR", f"{name}: supervisord could not be asked to start it: {error}")
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._signal(signal.SIGKILL)


def graceful_restart() -> bool:
    """Whether ``--bgp-graceful-restart`` is set now."""
    try:
        with open("settings.json") as file:
            return bool(json.load(file)["bgp_graceful_restart"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Ending(BaseException):
    """SIGTERM."""


def end(signum: int, frame: object) -> None:
    """Leave the wait at once; nothing is lost by it, as an unanswered event comes again."""
    raise Ending


def main(arguments: list[str]) -> int:
    """Run; returns the exit status."""
    run_dir, log_format, *names = arguments
    signal.signal(signal.SIGTERM, end)
    listener = Listener(run_dir, log_format == "json", names)
    try:
        with contextlib.suppress(Ending):
            listener.run()
        listener.finish()
    except Exception as error:  # supervisord starts us again at once: not in a tight circle
        sys.stderr.write(f"listener: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
        time.sleep(1)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
