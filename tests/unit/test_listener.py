"""The event listener's rules, with time and supervisord's texts given."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
from pathlib import Path

import pytest

from kube_router.supervisor import listener
from kube_router.supervisor.listener import Chunks, Lines, Process, Record, Stream, SupervisorLog
from kube_router.workers.logs import timestamp

LINE = "2026-01-01T00:00:00.000Z INFO  router  up"


def test_lines_are_put_together_from_chunks() -> None:
    lines = Lines()
    assert lines.feed("a\nb") == ["a"]
    assert lines.feed("c") == []
    assert lines.feed("\n\nd") == ["bc", ""]
    assert lines.flush() == ["d"]
    assert lines.flush() == []


def test_an_endless_line_is_cut() -> None:
    lines = Lines()
    cut = lines.feed("x" * (3 * listener.LONGEST_LINE + 5))
    assert [len(line) for line in cut] == [listener.LONGEST_LINE] * 3
    assert lines.flush() == ["x" * 5]


@pytest.mark.parametrize("text", ["café\n", "日本語 'quoted' \"both\"\n", "\\x41 stays\n", "𝄞\n"])
def test_characters_cut_between_two_chunks_survive(text: str) -> None:
    """supervisord shows a chunk that is no UTF-8 by its repr."""
    raw = text.encode()
    for cut in range(len(raw) + 1):
        chunks = Chunks()
        told = []
        for part in (raw[:cut], raw[cut:]):
            try:
                told.append(part.decode())
            except UnicodeDecodeError:
                told.append(f"Undecodable: {part!r}")
        assert "".join(chunks.feed(part) for part in told) == text


def test_bytes_that_are_no_text_come_out_escaped() -> None:
    assert Chunks().feed(f"Undecodable: {bytes([0xFF, 0x41])!r}") == "\\xffA"


@pytest.mark.parametrize(
    ("line", "as_json", "ours"),
    [
        (LINE, False, True),
        ("Traceback (most recent call last):", False, False),
        ("", False, False),
        ("x" * 30, False, False),
        ('{"time":"2026-01-01T00:00:00.000Z","level":"info"}', True, True),
        ('{"level":"info"}', True, False),
        (LINE, True, False),
    ],
)
def test_records_of_our_workers_are_recognised(line: str, as_json: bool, ours: bool) -> None:
    assert listener.is_record(line, as_json) is ours


@pytest.mark.parametrize(
    ("program", "line", "level", "message"),
    [
        ("gobgpd", '{"level":"info","msg":"gobgpd started","time":"x"}', "INFO", "gobgpd started"),
        ("gobgpd", '{"level":"warning","msg":"lost","Key":"10.0.0.1"}', "WARN", "lost Key=10.0.0.1"),
        ("gobgpd", '{"time":"x","level":"ERROR","msg":"bad","n":1}', "ERROR", "bad n=1"),
        ("gobgpd", '{"level":"info"', "INFO", '{"level":"info"'),
        ("gobgpd", "panic: oh", "INFO", "panic: oh"),
        ("router", "ModuleNotFoundError: No module named 'x'", "ERROR", "ModuleNotFoundError: No module named 'x'"),
        ("router", "{}", "ERROR", "{}"),
        ("router", "[1]", "ERROR", "[1]"),
    ],
)
def test_foreign_lines_get_level_and_message(program: str, line: str, level: str, message: str) -> None:
    assert listener.foreign_message(program, line) == (level, message)


def test_records_have_the_form_of_the_workers() -> None:
    now = 1767225600.0
    assert listener.record("WARN", "gobgpd", "é", False, now) == f"{timestamp(now)} WARN  gobgpd  é"
    fields = json.loads(listener.record("WARN", "gobgpd", 'a "b"\n', True, now))
    assert fields == {"time": timestamp(now), "level": "warn", "worker": "gobgpd", "message": 'a "b"\n'}
    assert listener.is_record(listener.record("INFO", "x", "y", False, now), False)


# -- what is known of the programs -----------------------------------------------------------------------------------


def log(text: str, level: str = "INFO") -> str:
    return f"2026-01-01 00:00:00,000 {level} {text}"


def test_starts_and_ends_are_taken_from_the_log() -> None:
    record = Record(["router"])
    assert record.log_line(log("spawned: 'router' with pid 12")) == ("INFO", "router: started as process 12")
    router = record.processes["router"]
    assert (router.pid, router.starts) == (12, 1)
    record.state("router", "RUNNING", 1.0, 100.0)
    told = record.log_line(log("exited: router (terminated by SIGKILL; not expected)", "WARN"))
    assert told == ("WARN", "router: ended: terminated by SIGKILL")
    assert (router.pid, router.reason) == (0, "terminated by SIGKILL")
    assert record.log_line(log("spawned: 'router' with pid 13")) == (
        "INFO",
        "router: started as process 13 (restart 1)",
    )
    assert router.as_dict()["restarts"] == 1


@pytest.mark.parametrize(
    "line",
    [
        "",
        "garbage",
        log("success: router entered RUNNING state"),
        log("spawned: 'stranger' with pid 1"),
        log("spawned: 'router' with pid x"),
        log("exited: stranger (exit status 1; not expected)", "WARN"),
        log("reaped unknown pid 7 (exit status 0)"),
        log("Server 'unix_http_server' running without any HTTP authentication checking", "CRIT"),
    ],
)
def test_other_lines_of_the_log_change_nothing(line: str) -> None:
    record = Record(["router"])
    before = record.processes["router"].as_dict()
    assert record.log_line(line) is None
    assert record.processes["router"].as_dict() == before


def test_errors_of_supervisord_are_told() -> None:
    told = Record([]).log_line(log("spawnerr: can't find command '/nowhere/setpriv'"))
    assert told == ("ERROR", "supervisord: spawnerr: can't find command '/nowhere/setpriv'")


def test_the_reason_of_a_crash_holds_the_last_words() -> None:
    record = Record(["router"])
    record.log_line(log("spawned: 'router' with pid 12"))
    record.processes["router"].last_words = "ImportError: no zmq"
    record.state("router", "STARTING", 0.0, 0.0)
    assert record.log_line(log("exited: router (exit status 1; not expected)", "WARN")) is None, "told with the retry"
    assert record.processes["router"].reason == "exit status 1: ImportError: no zmq"
    told = record.state("router", "FATAL", 5.0, 105.0)
    assert told == ("ERROR", "router: failed at its start (exit status 1: ImportError: no zmq); next try in 1 s")


def test_the_last_words_do_not_explain_a_signal_or_a_clean_end() -> None:
    for end in ("terminated by SIGTERM; not expected", "exit status 0; expected"):
        record = Record(["router"])
        record.processes["router"].last_words = "an old error"
        record.log_line(log(f"exited: router ({end})", "WARN"))
        assert record.processes["router"].reason == end.partition(";")[0]


def test_a_failing_program_is_tried_after_1_2_4_up_to_60_seconds() -> None:
    record = Record(["router"])
    now, delays = 0.0, []
    for _ in range(9):
        record.state("router", "FATAL", now, 0.0)
        delays.append(record.retry_at["router"] - now)
        assert record.due(now) == []
        now += delays[-1]
        assert record.due(now) == ["router"]
        record.state("router", "STARTING", now, 0.0)
        assert record.due(now) == []
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    record.state("router", "RUNNING", now, 0.0)
    record.state("router", "FATAL", now, 0.0)
    assert record.retry_at["router"] - now == 1, "it ran: the back-off begins again"


def test_a_program_stopped_by_hand_is_not_started_again() -> None:
    record = Record(["router"])
    record.state("router", "FATAL", 0.0, 0.0)
    record.state("router", "STOPPED", 0.5, 0.0)
    assert record.due(100.0) == []


def test_nothing_is_tried_again_at_the_end() -> None:
    record = Record(["router"])
    record.stopping = True
    assert record.state("router", "FATAL", 0.0, 0.0) is None
    assert record.due(100.0) == []


def test_a_new_listener_goes_on_from_what_was_written() -> None:
    process = Process("router")
    process.state, process.pid, process.starts, process.failures = "FATAL", 7, 4, 3
    process.reason, process.since = "exit status 1", 12.5
    again = Process("router")
    again.take(json.loads(json.dumps(process.as_dict())))
    assert again.as_dict() == process.as_dict()


def test_the_log_of_supervisord_is_read_on_and_followed_over_rotation(tmp_path: Path) -> None:
    path = tmp_path / "supervisord.log"
    reader = SupervisorLog(str(path))
    assert reader.lines() == []
    path.write_text("one\ntwo\nhal")
    assert reader.lines() == ["one", "two"]
    with path.open("a") as file:
        file.write("f\n")
    assert reader.lines() == ["half"]
    path.rename(tmp_path / "supervisord.log.1")
    path.write_text("new\n")
    assert reader.lines() == ["new"]


# -- the stream ------------------------------------------------------------------------------------------------------


def test_a_reader_that_stalls_costs_lines_and_never_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MOST_UNWRITTEN", 1000)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    stream = Stream(writer)
    for number in range(2000):
        stream.line(f"line {number:04d}")
    assert stream.pending
    text = b""
    os.set_blocking(reader, False)
    for _ in range(100):
        try:  # noqa: SIM105
            text += os.read(reader, 65536)
        except BlockingIOError:
            pass
        stream.write()
    stream.line("after")
    text += os.read(reader, 65536)
    lines = text.decode().splitlines()
    kept = [line for line in lines if line.startswith("line")]
    assert kept == [f"line {number:04d}" for number in range(len(kept))], "what is kept is whole and in order"
    assert len(kept) < 2000
    assert lines[-2].endswith(f"{2000 - len(kept)} log lines lost: nobody read the log stream")
    assert lines[-1] == "after"
    os.close(reader)
    os.close(writer)


def test_a_reader_that_is_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.close(reader)
    stream = Stream(writer)
    stream.line("x")
    assert not stream.pending
    os.close(writer)


def test_start_program_speaks_xml_rpc(tmp_path: Path) -> None:
    """Against a server that takes down what it is asked; that supervisord obeys is tested end to end."""
    path = str(tmp_path / "s")
    seen = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                seen.append(connection.recv(65536).decode())

        thread = threading.Thread(target=answer)
        thread.start()
        listener.start_program(path, "router")
        thread.join()
    head, _, body = seen[0].partition("\r\n\r\n")
    assert f"Content-Length: {len(body)}" in head
    assert "<methodName>supervisor.startProcess</methodName>" in body
    assert "<string>router</string>" in body
