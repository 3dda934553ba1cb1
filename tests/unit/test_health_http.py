"""The HTTP server of the health worker, over real sockets on loopback; its turns are made by hand."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator

import pytest

from kube_router.workers.health import http
from kube_router.workers.health.http import Listening, Page, Server

OK = {"/healthz": lambda: Page(200, "OK\n")}


class Clock:
    """The time that the server is told."""

    now = 0.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["127.0.0.1", "::1", "[::1]", "", "0.0.0.0", "::"])
def address(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address.strip("[]"), 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def server(clock: Clock) -> Iterator[Server]:
    made = Server([Listening("health", "127.0.0.1", free_port(), OK)])
    made.turn(set(), clock.now)
    yield made
    made.close()


def port_of(server: Server) -> int:
    return server._listenings[0].port


def connect(server: Server) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port_of(server)), timeout=5)
    client.settimeout(5)
    return client


def turn(server: Server, clock: Clock, times: int = 4) -> None:
    """Turn while there is input."""
    for _ in range(times):
        ready = select.select(server.descriptors(), [], [], 0.01)[0]
        server.turn(set(ready), clock.now)


def ask(server: Server, clock: Clock, request: bytes) -> bytes:
    with connect(server) as client:
        client.sendall(request)
        turn(server, clock)
        answer = b""
        while data := client.recv(65536):
            answer += data
    return answer


def test_every_form_of_address_is_listened_on(address: str, clock: Clock) -> None:
    port = free_port("::" if ":" in address else "0.0.0.0")
    server = Server([Listening("health", address, port, OK)])
    server.turn(set(), clock.now)
    assert server.troubles == ()
    wildcard = address in ("", "0.0.0.0", "::")
    targets = ["127.0.0.1", "::1"] if wildcard else [address.strip("[]")]
    for target in targets:
        with socket.create_connection((target, port), timeout=5) as client:
            client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            turn(server, clock)
            assert client.recv(1000).endswith(b"\r\n\r\nOK\n")
    if not wildcard:
        other = "127.0.0.1" if ":" in address else "::1"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other, port), timeout=5)
    server.close()


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "FOO"])
def test_any_method_is_answered(server: Server, clock: Clock, method: str) -> None:
    answer = ask(server, clock, f"{method} /healthz?verbose HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Length: 3\r\n" in answer
    assert answer.endswith(b"\r\n\r\nOK\n")


def test_head_has_no_body(server: Server, clock: Clock) -> None:
    assert ask(server, clock, b"HEAD /healthz HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /nope HTTP/1.1\r\n\r\n", b"404"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /healthz/ HTTP/1.1\r\n\r\n", b"404"),
        (b"\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", b"400"),
        (b"GET healthz HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /healthz extra HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 9000, b"400"),
    ],
)
def test_bad_requests_are_told_so(server: Server, clock: Clock, request_bytes: bytes, status: bytes) -> None:
    assert ask(server, clock, request_bytes).split()[1] == status


def test_a_request_may_come_in_pieces(server: Server, clock: Clock) -> None:
    with connect(server) as client:
        for byte in b"GET /healthz HTTP/1.1\r\n\r\n":
            client.sendall(bytes([byte]))
            turn(server, clock, 1)
        turn(server, clock)
        assert b"200 OK" in client.recv(1000)


def test_a_slow_client_is_dropped_after_five_seconds_and_delays_no_one(server: Server, clock: Clock) -> None:
    with connect(server) as slow:
        slow.sendall(b"GET /hea")
        turn(server, clock)
        clock.now = 4.9
        assert b"200 OK" in ask(server, clock, b"GET /healthz HTTP/1.1\r\n\r\n")
        slow.sendall(b"l")  # a byte now and then buys no time
        clock.now = 5.1
        turn(server, clock)
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(100) == b""
    assert server.wait(clock.now) <= http.RETRY_SECONDS


def test_a_client_that_does_not_read_its_answer_is_dropped(clock: Clock) -> None:
    big = {"/metrics": lambda: Page(200, "x" * (64 << 20))}
    server = Server([Listening("metrics", "127.0.0.1", free_port(), big)])
    server.turn(set(), clock.now)
    with connect(server) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        turn(server, clock)
        assert server.wait(clock.now) == http.WRITE_RETRY_SECONDS
        clock.now = 5.1
        turn(server, clock)
        assert len(server.descriptors()) == 1
        assert server.wait(clock.now) > 1
    server.close()


def test_a_long_answer_arrives_whole(clock: Clock) -> None:
    big = {"/metrics": lambda: Page(200, "x" * (8 << 20))}
    server = Server([Listening("metrics", "127.0.0.1", free_port(), big)])
    server.turn(set(), clock.now)
    with connect(server) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        turn(server, clock)
        client.settimeout(0.01)
        received = 0
        for _ in range(100_000):
            try:
                data = client.recv(1 << 20)
            except TimeoutError:
                server.turn(set(), clock.now)
                continue
            if not data:
                break
            received += len(data)
    assert received > 8 << 20
    server.close()


def test_a_flood_of_connections_leaves_room_for_the_next(server: Server, clock: Clock) -> None:
    flood = []
    for _ in range(3 * http.MOST_CONNECTIONS):
        flood.append(connect(server))
        turn(server, clock, 1)
    assert len(server.descriptors()) <= http.MOST_CONNECTIONS + 1
    assert b"200 OK" in ask(server, clock, b"GET /healthz HTTP/1.1\r\n\r\n")
    for client in flood:
        client.close()


def test_a_port_in_use_is_told_once_and_taken_when_it_is_free(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        server = Server([Listening("health", "127.0.0.1", port, OK)])
        for clock.now in (0.0, 0.5, 2.1, 4.2):
            server.turn(set(), clock.now)
        wanted = f"--health-addr=127.0.0.1, --health-port={port}: cannot listen: Address already in use"
        assert server.troubles == (wanted,)
        assert [record.getMessage() for record in caplog.records] == [f"{wanted}; trying again every 2 s"]
    clock.now = 6.3
    server.turn(set(), clock.now)
    assert server.troubles == ()
    assert b"200 OK" in ask(server, clock, b"GET /healthz HTTP/1.1\r\n\r\n")
    server.close()


def test_an_address_that_is_not_ours_is_told(clock: Clock) -> None:
    server = Server([Listening("metrics", "192.0.2.1", 8080, OK)])
    server.turn(set(), clock.now)
    assert server.troubles == (
        "--metrics-addr=192.0.2.1, --metrics-port=8080: cannot listen: Cannot assign requested address",
    )
    server.close()


def test_a_privileged_port_names_the_reason() -> None:
    denied = PermissionError(13, "Permission denied")
    assert http.reason(denied, 80) == "ports below 1024 need root, which the health worker is not"
    assert http.reason(denied, 8080) == "Permission denied"


def test_the_server_never_waits_longer_than_it_may(server: Server, clock: Clock) -> None:
    assert server.wait(clock.now) == http.RETRY_SECONDS
    with connect(server):
        turn(server, clock)
        clock.now = 4.0
        assert server.wait(clock.now) == pytest.approx(1.0)
