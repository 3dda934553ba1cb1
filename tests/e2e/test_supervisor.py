"""The life of an agent under a real supervisord: one stream, restarts, privileges, stopping; also as PID 1."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.agent import Agent, command_line, descendants, new_agent, status_fields, wait_until
from support.gotools import tool

GOOD = """
def end(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("stopped")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
say("up")
while True: signal.pause()
"""
HUNG = 'signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsay("up")\nwhile True: time.sleep(1)\n'
SUPERVISORCTL = (sys.executable, "-P", "-m", "supervisor.supervisorctl")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="krt-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def agent(folder: Path) -> Iterator[Agent]:
    with new_agent(folder) as made:
        yield made


# -- one stream ------------------------------------------------------------------------------------------------------


def collect(stdout: str, agent: Agent) -> Any:
    """Start the agent with that kind of stdout; returns a function that gives what has come out of it."""
    if stdout == "file":
        agent.start()
        return lambda: agent.log
    ours, theirs = os.pipe() if stdout == "pipe" else [each.detach() for each in socket.socketpair()]
    if stdout == "pipe":
        agent.start(stdout=theirs)
    else:
        agent.start(stdout=theirs)
    os.close(theirs)
    received = bytearray()

    def drain() -> None:
        while data := os.read(ours, 65536):
            received.extend(data)
        os.close(ours)

    threading.Thread(target=drain, daemon=True).start()
    return lambda: received.decode(errors="replace")


@pytest.mark.parametrize("stdout", ["pipe", "file", "socket"])
def test_all_programs_write_to_one_stream(agent: Agent, stdout: str) -> None:
    agent.script("router", 'say("café")\nprint("half a li", end="", flush=True)\ntime.sleep(0.3)\nprint("ne")\n' + GOOD)
    agent.script("watcher", 'sys.stderr.write("to stderr\\n")\n' + GOOD)
    text = collect(stdout, agent)
    agent.wait_running("router", "watcher")
    assert wait_until(lambda: "half a line" in text() and "to stderr" in text())
    lines = text().splitlines()
    assert "2026-01-01T00:00:00.000Z INFO  router  café" in lines
    assert any(line.endswith("ERROR router  half a line") for line in lines), lines
    assert any(line.endswith("ERROR watcher  to stderr") for line in lines)
    assert any("INFO  supervisor  router: started as process " in line for line in lines)
    assert all(line[10] == "T" and line[23] == "Z" for line in lines), lines
    assert agent.stop()[0] == 0
    assert wait_until(lambda: "router: ended: exit status 0" in text()), text()


def test_a_json_stream_is_json_in_every_line(folder: Path) -> None:
    with new_agent(folder, log_format="json") as agent:
        agent.script("router", 'print(\'{"time":"x","level":"info","worker":"router","message":"mine"}\')\n' + GOOD)
        agent.script("gobgpd", 'print(\'{"level":"warning","msg":"theirs","Key":"a"}\')\n' + GOOD)
        agent.script("cni", 'print("boom")\nsys.exit(3)\n')
        agent.start()
        agent.wait_log("next try in 2 s")
        agent.stop()
        lines = [json.loads(line) for line in agent.log.splitlines()]
    assert {"time": "x", "level": "info", "worker": "router", "message": "mine"} in lines
    assert {(line["worker"], line["level"], line["message"]) for line in lines} >= {
        ("gobgpd", "warn", "theirs Key=a"),
        ("cni", "error", "boom"),
        ("supervisor", "error", "cni: failed at its start (exit status 3: boom); next try in 1 s"),
    }


def test_a_log_that_nobody_reads_stops_no_worker(agent: Agent) -> None:
    """More than the pipe, supervisord and the listener can hold."""
    mark = agent.folder / "done"
    agent.script("router", f'for n in range(40_000): say("x" * 100)\nopen({str(mark)!r}, "w")\n' + GOOD)
    ours, theirs = os.pipe()
    agent.start(stdout=theirs)
    os.close(theirs)
    assert wait_until(mark.exists, 60), "the worker hangs in its log"
    assert wait_until(lambda: agent.running("router"))
    os.set_blocking(ours, False)
    text = b""

    def told() -> bool:
        nonlocal text
        with contextlib.suppress(BlockingIOError):
            text += os.read(ours, 1 << 20)
        return b"log lines lost: nobody read the log stream" in text

    assert wait_until(told), "the reader is not told what it missed"
    assert agent.stop()[0] == 0
    os.close(ours)


# -- restarts --------------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_back_at_once_and_the_reason_is_kept(agent: Agent) -> None:
    agent.script("router", GOOD)
    agent.script("cni", GOOD)
    agent.start()
    before = agent.wait_running("router", "cni")
    os.kill(agent.pid_of("router"), signal.SIGKILL)
    began = time.monotonic()
    assert wait_until(lambda: agent.table()["router"]["pid"] not in (0, before["router"]["pid"]), 10), agent.log
    assert time.monotonic() - began < 2.0
    after = agent.wait_running("router")
    assert (after["router"]["restarts"], after["router"]["reason"]) == (1, "terminated by SIGKILL")
    assert after["cni"] == before["cni"], "no other worker is touched"
    agent.wait_log("WARN  supervisor  router: ended: terminated by SIGKILL")
    agent.wait_log("(restart 1)")


def test_a_program_that_fails_is_tried_with_back_off_until_it_runs(agent: Agent) -> None:
    mark = agent.folder / "repaired"
    agent.script("router", f'if not os.path.exists({str(mark)!r}): sys.exit("broken: no such thing")\n' + GOOD)
    agent.script("cni", GOOD)
    agent.start()
    agent.wait_log("next try in 4 s")
    steps = [line.rpartition(" supervisor  ")[2] for line in agent.log.splitlines() if "next try" in line]
    assert steps == [
        f"router: failed at its start (exit status 1: broken: no such thing); next try in {delay} s"
        for delay in (1, 2, 4)
    ]
    assert agent.table()["router"]["state"] == "FATAL"
    mark.touch()
    agent.wait_running("router", "cni")
    assert agent.table()["cni"]["restarts"] == 0


def test_a_killed_listener_goes_on_where_it_was(agent: Agent) -> None:
    agent.script("router", GOOD)
    agent.script("cni", 'sys.exit("broken")\n')
    agent.start()
    agent.wait_running("router")
    os.kill(agent.pid_of("router"), signal.SIGKILL)
    wait_until(lambda: agent.table()["router"]["restarts"] == 1)
    agent.wait_running("router")
    agent.wait_log("next try in 2 s")
    listener = next(pid for pid in descendants(agent.supervisord()) if b"listener.py" in command_line(pid))
    os.kill(listener, signal.SIGKILL)
    agent.wait_log("next try in 4 s", 15)
    os.kill(agent.pid_of("router"), signal.SIGKILL)
    assert wait_until(lambda: agent.table()["router"]["restarts"] == 2), agent.table()
    assert agent.stop()[0] == 0


# -- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_pid_1", [False, True], ids=["process", "pid-1"])
def test_sigterm_ends_all_within_ten_seconds_though_workers_hang(agent: Agent, as_pid_1: bool) -> None:
    for name in ("watcher", "gobgpd", "router", "cni", "health"):
        agent.script(name, HUNG)
    agent.start(as_pid_1=as_pid_1)
    agent.wait_running("watcher", "gobgpd", "router", "cni", "health")
    pids = descendants(agent.supervisord())
    status, seconds = agent.stop()
    assert status == 0
    assert seconds < 10.0
    assert not [pid for pid in pids if command_line(pid)]


def test_workers_that_obey_are_stopped_together(agent: Agent) -> None:
    for name in ("watcher", "gobgpd", "router", "cni", "health"):
        agent.script(name, GOOD)
    agent.start()
    agent.wait_running("watcher", "gobgpd", "router", "cni", "health")
    status, seconds = agent.stop()
    assert status == 0
    assert seconds < 4.0
    for name in ("watcher", "router", "cni", "health"):
        assert f"{name}  stopped" in agent.log


@pytest.mark.parametrize("graceful", [False, True])
def test_gobgpd_is_told_to_stop_unless_its_peers_shall_keep_the_routes(folder: Path, graceful: bool) -> None:
    with new_agent(folder, bgp_graceful_restart=graceful) as agent:
        agent.script("gobgpd", GOOD)
        agent.script("router", GOOD)
        agent.start()
        agent.wait_running("gobgpd", "router")
        assert agent.stop()[0] == 0
        assert ("gobgpd  stopped" in agent.log) is not graceful
        assert "router  stopped" in agent.log


def test_as_pid_1_orphans_are_reaped(agent: Agent) -> None:
    orphans = (
        "for _ in range(20):\n    if os.fork() == 0:\n        if os.fork() == 0: time.sleep(0.2)\n        os._exit(0)\n"
    )
    agent.script("router", orphans + "while True:\n    try: os.waitpid(-1, 0)\n    except OSError: break\n" + GOOD)
    agent.start(as_pid_1=True)
    agent.wait_running("router")
    assert status_fields(agent.supervisord())["NSpid"][-1] == "1"

    def zombies() -> list[int]:
        return [pid for pid in descendants(agent.supervisord()) if status_fields(pid)["State"][0] == "Z"]

    assert wait_until(lambda: "reaped unknown pid" in (agent.run_dir / "supervisord.log").read_text())
    assert wait_until(lambda: not zombies())
    assert agent.stop()[0] == 0


def test_a_killed_supervisord_takes_its_workers_along_and_the_next_agent_starts(agent: Agent) -> None:
    """One worker hangs, so that its death signal does nothing; gobgpd is real and leaves its socket file behind."""
    agent.script("router", GOOD)
    agent.script("cni", HUNG, command=(sys.executable, "-P", str(agent.folder / "cni.py"), "kube_router.workers.cni"))
    agent.programs = [*(agent.programs or []), next(p for p in all_programs() if p.name == "gobgpd")]
    agent.start()
    before = agent.wait_running("router", "cni", "gobgpd")
    pids = {name: agent.pid_of(name) for name in before}
    assert agent.process is not None
    os.kill(agent.supervisord(), signal.SIGKILL)
    agent.process.wait(5)
    assert wait_until(lambda: not command_line(pids["router"]) and not command_line(pids["gobgpd"])), "left running"
    assert command_line(pids["cni"]), "the one that hangs is still there"
    assert (agent.run_dir / "gobgpd" / "gobgpd.sock").exists()
    agent.start()
    agent.wait_log(f"killing process {pids['cni']}, left over from an earlier agent")
    assert wait_until(lambda: agent.table().get("router", {}).get("pid") not in (None, 0, before["router"]["pid"]))
    agent.wait_running("router", "cni", "gobgpd")
    assert not command_line(pids["cni"])
    assert agent.stop()[0] == 0


def all_programs() -> Any:
    from kube_router.supervisor.programs import PROGRAMS

    return PROGRAMS


# -- the run directory -----------------------------------------------------------------------------------------------


def test_a_second_agent_in_the_same_run_directory_is_refused(agent: Agent) -> None:
    agent.script("router", GOOD)
    agent.start()
    before = agent.wait_running("router")
    second = Agent(agent.folder)
    second.programs = agent.programs
    second.log_path = agent.folder / "second.log"
    second.start()
    assert second.process is not None
    assert second.process.wait(10) == 1
    line = f"--run-dir={agent.run_dir}: another agent uses it (process {agent.supervisord()})"
    assert [text.rpartition("kube-router  ")[2] for text in second.log.splitlines()] == [line]
    assert agent.table() == before


def test_modes_and_owners_of_the_run_directory(agent: Agent) -> None:
    agent.script("router", GOOD)
    agent.start()
    agent.wait_running("router")
    found = {}
    for name in (".", "ipc", "log", "ipc/settings.json", "secrets.json", "supervisord.conf", "supervisord.sock"):
        status = (agent.run_dir / name).stat()
        found[name] = (oct(stat.S_IMODE(status.st_mode)), status.st_uid, status.st_gid)
    processes = (agent.run_dir / "ipc/processes.json").stat()
    assert found == {
        ".": ("0o700", 0, 0),
        "ipc": ("0o3770", 0, 65532),
        "log": ("0o700", 0, 0),
        "ipc/settings.json": ("0o640", 0, 65532),
        "secrets.json": ("0o600", 0, 0),
        "supervisord.conf": ("0o600", 0, 0),
        "supervisord.sock": ("0o700", 0, 0),
    }
    assert (oct(stat.S_IMODE(processes.st_mode)), processes.st_gid) == ("0o640", 65532)


def test_what_an_unprivileged_worker_plants_is_not_followed(agent: Agent) -> None:
    """The folder of the sockets is open to the workers' group; root writes there too."""
    target = agent.folder / "precious"
    target.write_text("untouched")
    agent.script("router", GOOD)
    agent.start()
    agent.wait_running("router")
    (agent.run_dir / "ipc" / ".processes.json.new").symlink_to(target)
    os.kill(agent.pid_of("router"), signal.SIGKILL)
    assert wait_until(lambda: agent.table()["router"]["restarts"] == 1)
    assert target.read_text() == "untouched"
    taken = subprocess.run(
        ["setpriv", "--reuid=65532", "--regid=65532", "--clear-groups", "rm", "-f", "settings.json"],
        cwd=agent.run_dir / "ipc",
        capture_output=True,
    )
    assert taken.returncode != 0
    assert (agent.run_dir / "ipc" / "settings.json").exists()


def test_supervisorctl_works_in_the_run_directory_without_c(agent: Agent) -> None:
    agent.script("router", GOOD)
    agent.start()
    before = agent.wait_running("router")["router"]["pid"]
    shown = agent.run(*SUPERVISORCTL, "status", "router")
    assert shown.stdout.split()[:2] == ["router", "RUNNING"]
    assert "router: started" in agent.run(*SUPERVISORCTL, "restart", "router").stdout
    assert wait_until(lambda: agent.table()["router"]["pid"] not in (0, before))
    assert "router  up" in agent.run(*SUPERVISORCTL, "tail", "router").stdout
    assert "router: stopped" in agent.run(*SUPERVISORCTL, "stop", "router").stdout
    time.sleep(1.5)
    assert agent.table()["router"]["state"] == "STOPPED", "what was stopped by hand stays stopped"


def test_without_setpriv_the_agent_says_so_and_does_not_start(agent: Agent) -> None:
    tools = agent.folder / "bin"
    tools.mkdir()
    for name in ("sh", "ip", "unshare"):
        (tools / name).symlink_to(shutil.which(name) or "")
    agent.environment["PATH"] = str(tools)
    agent.script("router", GOOD)
    agent.start()
    assert agent.process is not None
    assert agent.process.wait(10) == 1
    assert agent.log.count("\n") == 1
    assert "setpriv: no such program on PATH" in agent.log


# -- privileges ------------------------------------------------------------------------------------------------------

REPORT = """
    fields = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
    keys = ("Uid", "Gid", "Groups", "CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb", "NoNewPrivs")
    say(" ".join(key + "=" + ",".join(fields[key].split()) for key in keys))
"""
KILL, NET_BIND_SERVICE, NET_ADMIN, NET_RAW, SYS_MODULE = (1 << bit for bit in (5, 10, 12, 13, 16))


def reported(agent: Agent, name: str) -> dict[str, str]:
    line = next(line for line in agent.log.splitlines() if f" {name}  Uid=" in line)
    return dict(item.split("=") for item in line.partition(f" {name}  ")[2].split())


def test_each_worker_has_the_user_and_the_capabilities_of_the_table_and_no_more(agent: Agent) -> None:
    expected = {
        "watcher": (65532, "", 0),
        "health": (65532, "", 0),
        "gobgpd": (65533, "", NET_BIND_SERVICE),
        "router": (0, "65532", KILL | NET_ADMIN | NET_RAW),
        "cni": (0, "65532", NET_ADMIN | SYS_MODULE),
    }
    for program in all_programs():
        if program.name in expected:
            fields = {"user": program.user, "capabilities": program.capabilities, "helpful": program.helpful}
            agent.script(program.name, "".join([REPORT.replace("\n    ", "\n"), GOOD]), **fields)
    agent.open_to_others()
    agent.start()
    agent.wait_running(*expected)
    for name, (user, groups, capabilities) in expected.items():
        found = reported(agent, name)
        assert found["Uid"] == ",".join([str(user)] * 4), (name, agent.log)
        assert found["Gid"] == ",".join([str(user)] * 4)
        assert found["Groups"] == groups
        assert {int(found[key], 16) for key in ("CapEff", "CapPrm", "CapBnd")} == {capabilities}
        assert found["NoNewPrivs"] == "1"
    assert "as root" not in agent.log


def test_a_closed_interpreter_makes_workers_run_as_root_without_capabilities(agent: Agent) -> None:
    """A copy of the interpreter's link in a folder that only root may enter."""
    closed = agent.folder / "closed"
    closed.mkdir(mode=0o700)
    kubeconfig = closed / "kubeconfig"
    kubeconfig.write_text("users: [{name: a, user: {tokenFile: token}}]\n")
    agent.settings = with_settings(agent, kubeconfig=str(kubeconfig))
    agent.script("watcher", REPORT.replace("\n    ", "\n") + GOOD, user=65532)
    agent.script("health", REPORT.replace("\n    ", "\n") + GOOD, user=65532)
    agent.open_to_others()
    agent.start()
    agent.wait_running("watcher", "health")
    assert (reported(agent, "watcher")["Uid"], reported(agent, "watcher")["CapBnd"]) == ("0,0,0,0", "0" * 16)
    assert reported(agent, "health")["Uid"].startswith("65532")
    needed = "as root, with no more than the capabilities needed: watcher: "
    assert f"{needed}{kubeconfig} is closed to other users" in agent.log


def with_settings(agent: Agent, **fields: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(agent.settings, **fields)


def test_capabilities_that_the_agent_lacks_are_told_and_it_runs(agent: Agent) -> None:
    agent.script("router", REPORT.replace("\n    ", "\n") + GOOD, capabilities=("net_admin", "net_raw"))
    agent.wrapper = ["setpriv", "--bounding-set=-net_admin,-sys_module", "--inh-caps=-all"]
    agent.start()
    agent.wait_running("router")
    assert int(reported(agent, "router")["CapBnd"], 16) == NET_RAW
    assert "CAP_NET_ADMIN is missing: router cannot work fully; grant it to the container" in agent.log


# -- gobgpd ----------------------------------------------------------------------------------------------------------

SPEAKERS = {"debian": "/usr/bin/gobgpd", "current": ""}


@pytest.fixture(params=SPEAKERS)
def speaker(request: pytest.FixtureRequest, agent: Agent) -> Agent:
    """An agent with nothing but a real gobgpd, of the one or the other generation, in a folder open to all."""
    binary = SPEAKERS[request.param] or tool("gobgpd")
    tools = agent.folder / "bin"
    tools.mkdir()
    shutil.copy(binary, tools / "gobgpd")
    agent.environment["PATH"] = f"{tools}:{os.environ['PATH']}"
    agent.programs = [program for program in all_programs() if program.name == "gobgpd"]
    agent.open_to_others()
    return agent


def listening(agent: Agent) -> list[str]:
    """Local TCP addresses in the agent's network namespace."""
    return sorted(line.split()[3] for line in agent.run("ss", "-Htln").stdout.splitlines())


def test_gobgpd_runs_as_a_user_of_its_own_and_only_root_reaches_its_socket(speaker: Agent) -> None:
    speaker.settings = with_settings(speaker, gobgp_admin_port=50051)
    speaker.start()
    speaker.wait_running("gobgpd")
    fields = status_fields(speaker.pid_of("gobgpd"))
    assert fields["Uid"] == ["65533"] * 4
    assert {int(fields[key][0], 16) for key in ("CapEff", "CapBnd")} == {NET_BIND_SERVICE}
    assert fields["NoNewPrivs"] == ["1"]
    path = speaker.run_dir / "gobgpd" / "gobgpd.sock"
    assert wait_until(path.exists)
    probe = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r})"
    root = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--groups=65532", sys.executable, "-c", probe]
    assert wait_until(lambda: subprocess.run(root, capture_output=True).returncode == 0), "root without capabilities"
    for user in ("65532", "65534"):
        other = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--bounding-set=-all"]
        denied = subprocess.run([*other, "test", "-S", str(path)], capture_output=True)
        assert denied.returncode != 0
    assert listening(speaker) == ["127.0.0.1:50051"], "no metrics, no profiling"


def test_gobgpd_goes_on_when_its_admin_port_is_taken(speaker: Agent) -> None:
    holder = "import socket, time\ns = socket.create_server(('127.0.0.1', 50051))\n"
    speaker.script("cni", holder + GOOD)
    speaker.settings = with_settings(speaker, gobgp_admin_port=50051, gobgp_admin_address="127.0.0.1")
    assert speaker.programs is not None
    speaker.programs.reverse()
    speaker.start()
    speaker.wait_running("gobgpd", "cni")
    if "cannot listen" not in speaker.log:  # gobgpd was faster: now the port is taken
        os.kill(speaker.pid_of("gobgpd"), signal.SIGKILL)
    flags = "--gobgp-admin-address, --gobgp-admin-port"
    speaker.wait_log(f"ERROR gobgpd  {flags}: cannot listen on 127.0.0.1:50051: Address already in use")
    speaker.wait_running("gobgpd")
    assert wait_until((speaker.run_dir / "gobgpd" / "gobgpd.sock").exists)
    assert speaker.table()["gobgpd"]["restarts"] <= 1


def test_a_killed_gobgpd_comes_back_over_its_stale_socket(speaker: Agent) -> None:
    speaker.start()
    before = speaker.wait_running("gobgpd")["gobgpd"]["pid"]
    path = speaker.run_dir / "gobgpd" / "gobgpd.sock"
    assert wait_until(path.exists)
    os.kill(speaker.pid_of("gobgpd"), signal.SIGKILL)
    assert wait_until(lambda: speaker.table()["gobgpd"]["pid"] not in (0, before))
    speaker.wait_running("gobgpd")
    assert speaker.table()["gobgpd"]["restarts"] == 1
    probe = socket.socket(socket.AF_UNIX)
    assert wait_until(lambda: probe.connect_ex(str(path)) == 0)
    probe.close()


def test_a_missing_gobgpd_is_named_and_found_later(agent: Agent) -> None:
    tools = agent.folder / "bin"
    tools.mkdir()
    for name in ("sh", "ip", "unshare", "setpriv"):
        (tools / name).symlink_to(shutil.which(name) or "")
    agent.environment["PATH"] = str(tools)
    agent.programs = [program for program in all_programs() if program.name == "gobgpd"]
    agent.script("router", GOOD)
    agent.start()
    agent.wait_running("router")
    assert "gobgpd: no such program on PATH: gobgpd needs it" in agent.log
    agent.wait_log(
        "gobgpd: failed at its start (exit status 127: gobgpd: no such program on PATH: BGP needs gobgpd to be"
    )
    shutil.copy("/usr/bin/gobgpd", tools / "gobgpd")
    agent.wait_running("gobgpd", "router")


# -- health and status -----------------------------------------------------------------------------------------------


@pytest.fixture
def healthy_agent(agent: Agent) -> Agent:
    """The real health worker, and one worker that sends heartbeats until it is told to stop."""
    beating = f"""
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from kube_router.ipc.channels import HeartbeatSender
        from kube_router.ipc.messages import Component, Heartbeat, Session, SourceState
        sender = HeartbeatSender()
        while True:
            now = time.time()
            source = SourceState(source="manifests /m", in_sync=True, degraded=("x.yaml:3: not a mapping",))
            session = Session(address="10.0.0.2", asn=64512, type="internal", state="established", received=3)
            component = Component(name="RouteSyncController", period=60.0, last_success=now)
            sender.send(Heartbeat(
                worker="router", pid=os.getpid(), started=now, sent=now, last_sync=now, in_sync=True, source=source,
                privileges="uid=0 caps=net_admin", sessions=(session,), components=(component,),
                counts={{"host_routes_synced": 4.0}}, warnings=("node n2 has no IPv6 address",),
            ))
            time.sleep(0.1)
    """
    command = (sys.executable, "-P", str(agent.folder / "router.py"))
    agent.script("router", beating, command=command)
    agent.programs = [*(agent.programs or []), next(p for p in all_programs() if p.name == "health")]
    agent.settings = with_settings(agent, health_port=20244, metrics_port=8080, unbuilt_workers=("proxy",))
    return agent


FETCH = """
import sys, urllib.request, urllib.error
try: answer = urllib.request.urlopen(sys.argv[1], timeout=5)
except urllib.error.HTTPError as error: answer = error
print(answer.status, answer.read().decode(), end="")
"""


def fetch(agent: Agent, url: str) -> tuple[int, str]:
    """(status, body) from inside of the agent's network namespace; (0, reason) without an answer."""
    done = agent.run(sys.executable, "-I", "-c", FETCH, url)
    return (int(done.stdout[:3]), done.stdout[4:]) if done.returncode == 0 else (0, done.stderr)


def test_healthz_metrics_and_status(healthy_agent: Agent) -> None:
    agent = healthy_agent
    agent.start()
    agent.wait_running("router", "health")
    assert wait_until(lambda: "x.yaml" in fetch(agent, "http://[::1]:20244/healthz")[1]), agent.log
    assert fetch(agent, "http://127.0.0.1:20244/healthz") == (
        200,
        "OK\nmanifests /m: x.yaml:3: not a mapping\nrouter: node n2 has no IPv6 address\n",
    )
    code, text = fetch(agent, "http://127.0.0.1:8080/metrics")
    assert code == 200
    assert "\nkube_router_host_routes_synced 4\n" in text
    assert '\nkube_router_worker_restarts_total{worker="router"} 0\n' in text
    shown = agent.ctl("status")
    assert shown.returncode == 0, (shown.stdout, shown.stderr)
    for wanted in (
        "healthy",
        "router",
        "RUNNING",
        "uid=0 caps=net_admin",
        "10.0.0.2",
        "established",
        "Not built yet: proxy",
    ):
        assert wanted in shown.stdout
    found = json.loads(agent.ctl("status", "-o", "json").stdout)
    assert found["healthy"] is True
    router = next(worker for worker in found["workers"] if worker["name"] == "router")
    assert (router["state"], router["restarts"], router["pid"]) == ("RUNNING", 0, agent.table()["router"]["pid"])
    assert router["last_sync_age"] < 5
    assert found["sessions"][0]["received"] == 3
    assert found["unbuilt_workers"] == ["proxy"]
    assert found["warnings"] == ["router: node n2 has no IPv6 address"]


def test_a_worker_that_hangs_makes_the_agent_unhealthy_after_a_bound(healthy_agent: Agent) -> None:
    agent = healthy_agent
    agent.start()
    agent.wait_running("router", "health")
    assert wait_until(lambda: agent.ctl("status").returncode == 0)
    os.kill(agent.pid_of("router"), signal.SIGSTOP)
    assert wait_until(lambda: fetch(agent, "http://127.0.0.1:20244/healthz")[0] == 500, 40)
    body = fetch(agent, "http://127.0.0.1:20244/healthz")[1]
    assert body.startswith("Unhealthy\nrouter: no heartbeat for ")
    assert agent.ctl("status").returncode == 1
    os.kill(agent.pid_of("router"), signal.SIGCONT)
    assert wait_until(lambda: fetch(agent, "http://127.0.0.1:20244/healthz")[0] == 200)
    agent.wait_log("health  healthy again")


def test_status_works_without_health_and_says_when_there_is_no_agent(healthy_agent: Agent) -> None:
    agent = healthy_agent
    agent.start()
    agent.wait_running("router", "health")
    assert wait_until(lambda: agent.ctl("status").returncode == 0)
    os.kill(agent.pid_of("health"), signal.SIGSTOP)
    shown = agent.ctl("status", "--timeout", "0.3", "-o", "json")
    assert shown.returncode == 1
    found = json.loads(shown.stdout)
    assert found["healthy"] is False
    assert any("no answer within 0.3 s" in reason for reason in found["reasons"])
    states = {worker["name"]: (worker["state"], worker["last_sync_age"]) for worker in found["workers"]}
    assert states == {"router": ("RUNNING", None), "health": ("RUNNING", None)}
    assert "NOT HEALTHY" in agent.ctl("status", "--timeout", "0.3").stdout
    elsewhere = agent.run(
        sys.executable, "-P", "-m", "kube_router.supervisor.ctl", "--run-dir", "/nonexistent", "status"
    )
    assert elsewhere.returncode == 2
    assert elsewhere.stderr.startswith("kube-routerctl: no agent runs with --run-dir=/nonexistent")
    agent.kill()
    alone = subprocess.run(
        [sys.executable, "-P", "-m", "kube_router.supervisor.ctl", "--run-dir", str(agent.run_dir), "status"],
        text=True,
        capture_output=True,
    )
    assert alone.returncode == 2
    assert alone.stderr.count("\n") == 1


def test_a_health_port_that_is_taken_is_told_and_costs_no_restart(healthy_agent: Agent) -> None:
    agent = healthy_agent
    agent.script("cni", "import socket\ns = socket.create_server(('0.0.0.0', 20244))\n" + GOOD)
    assert agent.programs is not None
    agent.programs.reverse()
    agent.start()
    agent.wait_running("router", "health", "cni")
    agent.wait_log(
        "ERROR health  --health-addr=, --health-port=20244: cannot listen: Address already in use; trying again"
    )
    os.kill(agent.pid_of("cni"), signal.SIGSTOP)
    assert agent.table()["health"]["restarts"] == 0
    assert agent.run(*SUPERVISORCTL, "stop", "cni").returncode == 0
    assert wait_until(lambda: fetch(agent, "http://127.0.0.1:20244/healthz")[0] == 200)
    assert agent.table()["health"]["restarts"] == 0


def test_a_flood_of_clients_stops_neither_heartbeats_nor_the_probe(healthy_agent: Agent) -> None:
    agent = healthy_agent
    flood = """
        import socket
        kept = []
        def more():
            try: kept.append(socket.create_connection(("127.0.0.1", 20244), timeout=1))
            except OSError: time.sleep(0.01)
        say("flood")
        while True:
            more()
            if len(kept) > 500: kept.pop(0).close()
    """
    agent.script("cni", flood)
    agent.start()
    agent.wait_running("router", "health", "cni")
    agent.wait_log("cni  flood")
    for _ in range(5):
        assert wait_until(lambda: fetch(agent, "http://127.0.0.1:20244/healthz")[0] == 200, 10)
        time.sleep(0.5)
    router = next(w for w in json.loads(agent.ctl("status", "-o", "json").stdout)["workers"] if w["name"] == "router")
    assert router["last_sync_age"] < 5


NODE = """
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDRs: [10.244.1.0/24, "fd00:244:1::/64"]}
status: {addresses: [{type: InternalIP, address: 127.0.0.1}, {type: InternalIP, address: "::1"}]}
"""


def test_the_whole_agent_works_with_its_least_privileges(agent: Agent) -> None:
    """All real workers: the users differ, the sockets between them must let all pass, and the disk must be writable."""
    manifests = agent.folder / "manifests"
    manifests.mkdir()
    (manifests / "node.yaml").write_text(NODE)
    cni = agent.folder / "net.d" / "10-kuberouter.conflist"
    cni.parent.mkdir()
    plugin = {"type": "bridge", "bridge": "kube-bridge", "ipam": {"type": "host-local"}}
    cni.write_text(json.dumps({"cniVersion": "1.0.0", "name": "n", "plugins": [plugin]}))
    agent.settings = with_settings(
        agent,
        manifests=str(manifests),
        cni_conf_file=str(cni),
        node_name="n1",
        enable_ipv6=True,
        enable_overlay=False,
        run_firewall=False,
        run_service_proxy=False,
        health_port=20244,
    )
    agent.open_to_others()
    agent.start()
    agent.wait_running("watcher", "gobgpd", "router", "cni", "health")

    def workers() -> dict[str, dict[str, Any]]:
        text = agent.ctl("status", "-o", "json").stdout
        return {worker["name"]: worker for worker in json.loads(text)["workers"]} if text else {}

    def synced() -> bool:
        found = workers()
        return all(found.get(name, {}).get("last_sync_age") is not None for name in ("watcher", "router", "cni"))

    assert wait_until(synced, 30), (agent.ctl("status").stdout, agent.log)
    privileges = {name: worker["privileges"] for name, worker in workers().items() if name != "gobgpd"}
    assert privileges == {
        "watcher": "uid=65532 caps=none no_new_privs=1",
        "router": "uid=0 caps=kill,net_admin,net_raw no_new_privs=1",
        "cni": "uid=0 caps=net_admin,sys_module no_new_privs=1",
        "health": "uid=65532 caps=none no_new_privs=1",
    }
    assert "10.244.1.0/24" in cni.read_text()
    assert fetch(agent, "http://127.0.0.1:20244/healthz")[0] == 200
    assert wait_until(lambda: list((agent.folder / "state" / "watcher").iterdir())), "no snapshot on disk"
    pid = workers()["watcher"]["pid"]
    os.kill(agent.pid_of("watcher"), signal.SIGKILL)
    assert wait_until(lambda: workers().get("watcher", {}).get("pid") not in (None, 0, pid) and synced()), agent.log
    assert agent.stop()[0] == 0
