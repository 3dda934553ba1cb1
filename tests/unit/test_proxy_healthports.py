"""What is said at health check ports, kube-router's way and kube-proxy's; and the servers, on real sockets."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator

import pytest

from kube_router.workers.proxy.healthports import HealthPorts, answer
from kube_router.workers.proxy.model import HealthCheck

TEXT, JSON = "", "Accept: application/json\r\n"


def asked(
    path: str = "/healthz", accept: str = TEXT, count: int = 2, *, healthy: bool = True, verb: str = "GET"
) -> str:
    request = f"{verb} {path} HTTP/1.1\r\nHost: n1\r\n{accept}\r\n".encode()
    return answer(request, HealthCheck("shop/web", count), healthy=healthy).decode()


@pytest.mark.parametrize(
    ("path", "count", "status", "text"),
    [
        ("/healthz", 2, "200 OK", "2 Service Endpoints found\n"),
        ("/healthz?x=1", 300, "200 OK", "300 Service Endpoints found\n"),
        ("/healthz", 0, "503 Service Unavailable", "No Service Endpoints Found\n"),
        ("/", 2, "404 Not Found", "404 page not found\n"),
    ],
)
def test_text_is_kube_routers(path: str, count: int, status: str, text: str) -> None:
    said = asked(path, count=count)
    assert said.startswith(f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\n")
    assert said.partition("\r\n\r\n")[2] == text


@pytest.mark.parametrize(
    ("count", "healthy", "status"), [(2, True, "200 OK"), (0, True, "503 Service"), (2, False, "503 Service")]
)
def test_json_is_kube_proxys_at_any_path(count: int, healthy: bool, status: str) -> None:
    said = asked("/", JSON, count, healthy=healthy)
    head, _, body = said.partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status}")
    assert {
        "Content-Type: application/json",
        "X-Content-Type-Options: nosniff",
        f"X-Load-Balancing-Endpoint-Weight: {count}",
    } < {*head.split("\r\n")}
    assert json.loads(body) == {
        "service": {"namespace": "shop", "name": "web"},
        "localEndpoints": count,
        "serviceProxyHealthy": healthy,
    }


def test_other_requests() -> None:
    assert asked(verb="HEAD").endswith("\r\n\r\n")
    assert asked(verb="POST").startswith("HTTP/1.1 405 ")
    assert answer(b"hello\r\n\r\n", HealthCheck("a/b", 1), healthy=True).startswith(b"HTTP/1.1 400 ")


@pytest.fixture
def ports() -> Iterator[HealthPorts]:
    made = HealthPorts()
    yield made
    made.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def fetched(port: int, host: str = "127.0.0.1") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    connection.request("GET", "/healthz")
    response = connection.getresponse()
    return response.status, response.read()


def test_a_port_is_served_in_both_families_follows_its_service_and_goes(ports: HealthPorts) -> None:
    port = free_port()
    assert ports.serve({port: HealthCheck("shop/web", 130)}, healthy=True) == ()
    for host in ("127.0.0.1", "::1"):
        assert fetched(port, host) == (200, b"130 Service Endpoints found\n")
    ports.serve({port: HealthCheck("shop/other", 0)}, healthy=True)
    assert fetched(port) == (503, b"No Service Endpoints Found\n")
    ports.serve({}, healthy=True)
    with socket.create_server(("127.0.0.1", 0)):
        for _ in range(200):
            try:
                fetched(port)
            except ConnectionError:
                break
        else:
            pytest.fail("the port is still served")


def test_a_port_that_somebody_has_is_a_failure_that_is_tried_again(ports: HealthPorts) -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        failures = ports.serve({port: HealthCheck("shop/web", 1)}, healthy=True)
        text = f"health-port: service shop/web: spec.healthCheckNodePort: {port}: "
        assert [str(failure).startswith(text) for failure in failures] == [True]
    assert ports.serve({port: HealthCheck("shop/web", 1)}, healthy=True) == ()
    assert fetched(port)[0] == 200


def test_a_client_that_says_nothing_stops_nobody(ports: HealthPorts) -> None:
    port = free_port()
    ports.serve({port: HealthCheck("shop/web", 1)}, healthy=True)
    with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(b"GET /heal")
        assert fetched(port)[0] == 200
        half.sendall(b"thz HTTP/1.1\r\n\r\n")
        assert half.recv(100).startswith(b"HTTP/1.1 200 OK")
