"""The Kubernetes source against a server that misbehaves: every fault ends in the right state, and nothing is lost.

The server is in this process (`support.faultserver`); connections, TLS and threads are real.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.apiserver import CertificateAuthority
from support.faultserver import (
    Act,
    FaultServer,
    Object,
    Request,
    answer_body,
    answer_status,
    cut_body,
    hang_up,
    open_and_stay_silent,
    status,
    stay_silent,
    stream,
)
from support.follower import Follower

from kube_router.ipc.messages import KINDS, Kind, Node
from kube_router.workers.kubeapi.apiserver import ApiServer
from kube_router.workers.kubeapi.credentials import Credentials, load_access
from kube_router.workers.watcher.kubernetesapi import KubernetesSource
from kube_router.workers.watcher.listwatch import Tuning
from kube_router.workers.watcher.source import Alive, Listed

NODES: tuple[Kind, ...] = ("nodes",)
QUICK = Tuning(answer=1.0, idle=1.0, shortest_watch=60, longest_watch=61, backoff_first=0.05, backoff_most=0.2)
PAGED = Tuning(
    answer=1.0, idle=1.0, shortest_watch=60, longest_watch=61, backoff_first=0.05, backoff_most=0.2, streaming=False
)


def node(name: str, address: str = "192.0.2.1", **annotations: str) -> Object:
    return {
        "metadata": {"name": name, "uid": f"uid-{name}", "annotations": annotations or None},
        "spec": {"podCIDRs": None},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    }


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        running.put("nodes", node("a"), node("b"), node("c"))
        yield running


def kubeconfig(path: Path, url: str, user: object = None, cluster: object = None) -> Path:
    path.write_text(
        json.dumps(
            {
                "current-context": "x",
                "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
                "clusters": [{"name": "x", "cluster": {"server": url, **(cluster or {})}}],  # type: ignore[dict-item]
                "users": [{"name": "x", "user": user if user is not None else {"token": "t"}}],
            }
        )
    )
    return path


@pytest.fixture
def follow(server: FaultServer, tmp_path: Path) -> Iterator[Callable[..., Follower]]:
    """A function that starts a follower of the server's nodes (or other kinds)."""
    running: list[Follower] = []

    def start(tuning: Tuning = QUICK, kinds: tuple[Kind, ...] = NODES, user: object = None) -> Follower:
        path = kubeconfig(tmp_path / "kubeconfig", server.url, user)
        api = ApiServer(Credentials(lambda: load_access(str(path), "")))
        follower = Follower(KubernetesSource(api, "test", kinds, tuning), kinds)
        running.append(follower.__enter__())
        return follower

    yield start
    for follower in running:
        follower.__exit__()


def names(follower: Follower) -> list[str]:
    return sorted(follower.objects("nodes"))


def until_watching(follower: Follower) -> None:
    """Wait until all kinds are listed and their watches are open: only then is hanging up on them a lost watch."""
    follower.until_listed()
    follower.until(lambda: all(follower.count(Alive, kind) for kind in follower.store.kinds))


# --- rightly answered


@pytest.mark.parametrize("tuning", [QUICK, PAGED], ids=["streaming", "paged"])
def test_put_and_delete_arrive(server: FaultServer, follow: Callable[..., Follower], tuning: Tuning) -> None:
    follower = follow(tuning)
    follower.until_listed()
    assert names(follower) == ["a", "b", "c"]
    server.put("nodes", node("d"), node("a", "2001:db8::1"))
    server.delete("nodes", "b")
    follower.until(lambda: names(follower) == ["a", "c", "d"])
    item = follower.objects("nodes")["a"]
    assert isinstance(item, Node)
    assert [entry.address for entry in item.addresses] == ["2001:db8::1"]
    assert follower.count(Listed, "nodes") == 1
    assert not follower.seen


@pytest.mark.parametrize(
    "refusal",
    [
        answer_status(422, "Invalid", "sendInitialEvents is forbidden for watch unless the feature is enabled"),
        answer_status(400, "BadRequest", "resourceVersionMatch is forbidden for watch"),
        stream(
            json.dumps({"type": "ERROR", "object": status(500, "InternalError", "RequestWatchProgress")}).encode()
            + b"\n"
        ),
    ],
    ids=["422", "400", "error event"],
)
def test_server_without_streaming_lists_is_listed_in_pages(
    server: FaultServer, follow: Callable[..., Follower], refusal: Act
) -> None:
    server.streaming = False
    server.fail("watch", refusal)
    follower = follow()
    follower.until_listed()
    assert names(follower) == ["a", "b", "c"]
    assert server.asked("list")[0].query["limit"] == "500"
    until_watching(follower)
    server.compact()
    server.drop_connections()
    follower.until(lambda: len(server.asked("list")) == 2)
    assert [seen for seen in server.asked("watch") if "sendInitialEvents" in seen.query][1:] == [], "asked once only"
    assert not follower.seen


def test_a_streaming_list_that_never_ends_is_given_up(server: FaultServer, follow: Callable[..., Follower]) -> None:
    server.fail("watch", open_and_stay_silent)
    follower = follow()
    follower.until_listed()
    assert names(follower) == ["a", "b", "c"]


def test_a_streaming_list_that_breaks_is_never_half_told(server: FaultServer, follow: Callable[..., Follower]) -> None:
    def half(request: Request) -> None:
        request.start_stream()
        request.send_event("ADDED", server.snapshot("nodes")[1][0])
        request.hang_up()

    server.fail("watch", half, times=3)
    follower = follow()
    follower.until_listed()
    assert [sorted(item.key for item in step.put) for step in follower.steps] == [["a", "b", "c"]]


def test_pages_are_followed_to_the_end(server: FaultServer, follow: Callable[..., Follower]) -> None:
    server.put("nodes", *(node(f"n{number}") for number in range(1203)))
    follower = follow(PAGED)
    follower.until_listed()
    assert len(names(follower)) == 1206
    assert len(server.asked("list")) == 3


def test_continue_token_that_expires_leads_to_a_whole_list(
    server: FaultServer, follow: Callable[..., Follower]
) -> None:
    server.put("nodes", *(node(f"n{number}") for number in range(700)))

    def compact_then_answer(request: Request) -> None:
        request.honest()
        server.compact()

    server.fail("list", compact_then_answer)
    follower = follow(PAGED)
    follower.until_listed()
    assert len(names(follower)) == 703
    assert follower.count(Listed, "nodes") == 1
    assert not follower.seen


def test_watch_goes_on_from_bookmarks(server: FaultServer, follow: Callable[..., Follower]) -> None:
    follower = follow(PAGED)
    until_watching(follower)
    before = len(follower.news)
    server.bookmark()
    follower.until(lambda: len(follower.news) > before)
    server.oldest = server.version  # only the bookmark's version is still known
    server.drop_connections()
    follower.until(lambda: len(server.asked("watch")) == 2)
    server.put("nodes", node("d"))
    follower.until(lambda: "d" in names(follower))
    assert len(server.asked("list")) == 1


def test_all_watches_ask_for_bookmarks_and_an_end(server: FaultServer, follow: Callable[..., Follower]) -> None:
    follower = follow(Tuning())
    follower.until_listed()
    query = server.asked("watch")[0].query
    assert query["allowWatchBookmarks"] == "true"
    assert 300 <= int(query["timeoutSeconds"]) <= 600


def test_watch_that_ends_in_time_is_renewed_without_a_word(
    server: FaultServer, follow: Callable[..., Follower]
) -> None:
    follower = follow(Tuning(shortest_watch=1, longest_watch=1, backoff_first=0.05))
    follower.until_listed()
    follower.until(lambda: len(server.asked("watch")) >= 3)
    server.put("nodes", node("d"))
    follower.until(lambda: "d" in names(follower))
    assert not follower.seen


# --- faults of a list


LIST_FAULTS: dict[str, tuple[Act, str]] = {
    "no word": (hang_up, "connection broken off"),
    "silence": (stay_silent, "silent for 1 s"),
    "500": (answer_status(500, "InternalError", "etcd\nis away"), "list nodes: 500 InternalError: etcd is away"),
    "429": (answer_status(429, "TooManyRequests", "slow down", Retry_After="0"), "429 TooManyRequests: slow down"),
    "403": (
        answer_status(403, "Forbidden", 'nodes is forbidden: User "u" cannot list resource "nodes"'),
        'list nodes: 403 Forbidden: nodes is forbidden: User "u" cannot list resource "nodes"',
    ),
    "not a Status": (answer_body(b"<html>bad gateway</html>", "text/html", 502), "list nodes: 502"),
    "garbage": (answer_body(b"\x00\xff garbage"), "the answer is not what was asked for"),
    "other JSON": (answer_body(b'{"hello": "world"}'), "the answer is not what was asked for"),
    "no items": (answer_body(b'{"kind":"NodeList","metadata":{"resourceVersion":"1"}}'), "missing required field"),
    "other list": (answer_body(b'{"kind":"PodList","metadata":{"resourceVersion":"1"},"items":[]}'), "is not NodeList"),
    "no version": (answer_body(b'{"kind":"NodeList","metadata":{"resourceVersion":""},"items":[]}'), "NodeList"),
    "no name": (
        answer_body(b'{"kind":"NodeList","metadata":{"resourceVersion":"1"},"items":[{"metadata":{}}]}'),
        "without a name",
    ),
    "wrong field": (
        answer_body(b'{"kind":"NodeList","metadata":{"resourceVersion":"1"},"items":[{"metadata":{"name":7}}]}'),
        "$.items[0].metadata.name",
    ),
    "deep": (answer_body(b'{"kind":' + b"[" * 100_000), "the answer is not what was asked for"),
    "Content-Type": (answer_body(b"{}", "text/html; charset=utf-8"), "'text/html; charset=utf-8' is not application"),
    "redirect": (answer_body(b"", "text/html", 302), "list nodes: 302"),
    "cut": (cut_body(100), "connection broken off"),
}


@pytest.mark.parametrize("fault", LIST_FAULTS)
def test_bad_list_changes_nothing_and_is_repeated(
    server: FaultServer, follow: Callable[..., Follower], fault: str
) -> None:
    act, text = LIST_FAULTS[fault]
    follower = follow(PAGED)
    until_watching(follower)
    server.fail("list", act, times=2)
    server.put("nodes", node("d"))
    follower.until(lambda: "d" in names(follower))
    server.delete("nodes", "a")
    server.compact()
    server.drop_connections()
    follower.until(lambda: any(text in line for line in follower.seen))
    follower.until(lambda: not follower.troubles and names(follower) == ["b", "c", "d"])
    assert follower.gone == ["a"]
    assert all("\n" not in line and len(line) < 500 for line in follower.seen)


# --- faults of a watch


def _event(kind: str, item: Object) -> bytes:
    return json.dumps({"type": kind, "object": item}).encode() + b"\n"


NEXT = {**node("z"), "metadata": {"name": "z", "resourceVersion": "5000"}}
WATCH_FAULTS: dict[str, Act] = {
    "no word": hang_up,
    "silence": stay_silent,
    "silence after the head": open_and_stay_silent,
    "500": answer_status(500, "InternalError", "away"),
    "503": answer_status(503, "ServiceUnavailable", "away", Retry_After="0"),
    "cut at once": stream(b""),
    "cut within an event": stream(_event("ADDED", NEXT)[:50]),
    "ended within an event": stream(_event("ADDED", NEXT)[:50], end=True),
    "ended at once": stream(b"", end=True),
    "garbage": stream(b"garbage\n"),
    "binary": stream(bytes(range(256)) + b"\n"),
    "no event": stream(b'{"a": 1}\n'),
    "unknown type": stream(_event("RENAMED", NEXT)),
    "no name": stream(_event("ADDED", {"metadata": {"resourceVersion": "5000"}})),
    "wrong field": stream(_event("ADDED", {"metadata": {"name": "z", "labels": {"a": 1}}})),
    "Content-Type": stream(_event("ADDED", NEXT), content_type="text/plain"),
    "error event": stream(_event("ERROR", status(500, "InternalError", "etcd is away"))),
    "good then garbage": stream(_event("ADDED", {**NEXT, "metadata": {"name": "b"}}) + b"garbage\n"),
}


@pytest.mark.parametrize("fault", WATCH_FAULTS)
def test_bad_watch_loses_nothing(server: FaultServer, follow: Callable[..., Follower], fault: str) -> None:
    follower = follow(PAGED)
    until_watching(follower)
    server.fail("watch", WATCH_FAULTS[fault], times=3)
    server.drop_connections()
    follower.until(lambda: len(server.asked("watch")) >= 4)
    server.delete("nodes", "a")
    server.put("nodes", node("d"))
    follower.until(lambda: names(follower) == ["b", "c", "d"] and not follower.troubles)
    assert len(server.asked("list")) == 1, "a broken watch is no reason to list again"
    assert follower.gone == ["a"]


def test_events_while_the_watch_is_down_are_not_lost(server: FaultServer, follow: Callable[..., Follower]) -> None:
    follower = follow(PAGED)
    until_watching(follower)
    server.fail("watch", answer_status(500, "InternalError", "away"), times=5)
    server.drop_connections()
    follower.until(lambda: bool(follower.troubles))
    server.put("nodes", node("d"), node("e"))
    server.delete("nodes", "e")
    follower.until(lambda: names(follower) == ["a", "b", "c", "d"] and not follower.troubles)


@pytest.mark.parametrize("how", ["error event", "status", "unknown version"])
def test_410_lists_again_and_tells_only_the_difference(
    server: FaultServer, follow: Callable[..., Follower], how: str
) -> None:
    follower = follow(PAGED)
    until_watching(follower)
    if how == "status":
        server.fail("watch", answer_status(410, "Expired", "too old resource version"))
    elif how == "unknown version":
        body = status(504, "Timeout", "Too large resource version", causes=[{"reason": "ResourceVersionTooLarge"}])
        server.fail("watch", answer_body(json.dumps(body).encode(), code=504))
    else:
        server.compact()
    server.fail("list", answer_status(500, "InternalError", "away"), times=2)
    server.drop_connections()
    follower.until(lambda: bool(follower.troubles))
    assert names(follower) == ["a", "b", "c"], "nothing is forgotten while listing again"
    server.delete("nodes", "b")
    server.put("nodes", node("d"))
    follower.until(lambda: names(follower) == ["a", "c", "d"])
    assert follower.gone == ["b"]
    assert sum(len(step.put) for step in follower.steps) == 4, "a, b and c are not told again"


@pytest.mark.parametrize("kind", KINDS)
def test_error_event_is_understood_for_every_kind(
    server: FaultServer, follow: Callable[..., Follower], kind: Kind
) -> None:
    server.fail("watch", stream(_event("ERROR", status(500, "InternalError", "etcd is away"))), kind=kind)
    follower = follow(QUICK, kinds=(kind,))
    until_watching(follower)
    server.fail("watch", stream(_event("ERROR", status(500, "InternalError", "etcd is away"))), kind=kind)
    server.drop_connections()
    follower.until(lambda: any(f"watch {kind}: 500 InternalError: etcd is away" in text for text in follower.seen))
    follower.until(lambda: not follower.troubles)


@pytest.mark.parametrize("size", [1, 2, 7, 1024])
def test_chunks_may_end_anywhere(server: FaultServer, follow: Callable[..., Follower], size: int) -> None:
    server.chunk_bytes = size
    follower = follow()
    follower.until_listed()
    server.put("nodes", node("d", "2001:db8::d"), node("ü-no", "192.0.2.9"))
    follower.until(lambda: names(follower) == ["a", "b", "c", "d", "ü-no"])
    assert not follower.seen


def test_idle_watch_is_replaced_without_complaint(server: FaultServer, follow: Callable[..., Follower]) -> None:
    tuning = Tuning(answer=2.0, idle=0.5, shortest_watch=60, longest_watch=61, backoff_first=0.05, streaming=False)
    follower = follow(tuning)
    follower.until_listed()
    follower.until(lambda: len(server.asked("watch")) >= 3)
    assert not follower.seen
    assert len(server.asked("list")) == 1


def test_slow_consumer_holds_the_server_back(server: FaultServer, follow: Callable[..., Follower]) -> None:
    follower = follow()
    follower.until_listed()
    held = follower.feed._queue.maxsize
    for number in range(3 * held):
        server.put("nodes", node("a", f"192.0.2.{number % 250}"))
        time.sleep(0.001)
    time.sleep(0.5)
    assert follower.feed._queue.qsize() <= held
    server.put("nodes", node("last"))
    follower.until(lambda: "last" in names(follower))


# --- credentials


def test_401_reads_a_rotated_token_file_at_once(
    server: FaultServer, follow: Callable[..., Follower], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("old\n")
    server.token = "old"
    follower = follow(PAGED, user={"tokenFile": "token"})
    follower.until_listed()
    server.token = "new"
    token.write_text("new\n")
    server.drop_connections()
    server.put("nodes", node("d"))
    follower.until(lambda: "d" in names(follower))
    assert server.requests[-1].authorization == "Bearer new"
    assert not follower.seen


def test_401_for_good_is_one_line_without_the_token(
    server: FaultServer, follow: Callable[..., Follower], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("s3cret")
    server.token = "other"
    follower = follow(PAGED, user={"tokenFile": "token"})
    follower.until(lambda: "401 Unauthorized" in follower.troubles.get("nodes", ""))
    assert "s3cret" not in "".join(follower.seen)
    (tmp_path / "token").write_text("other")
    follower.until_listed()


def test_exec_plugin_gives_the_token_and_is_asked_again_after_401(
    server: FaultServer, follow: Callable[..., Follower], tmp_path: Path
) -> None:
    plugin = tmp_path / "plugin"
    plugin.write_text(
        "#!/bin/sh\necho run >>runs\n"
        'printf \'{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential",'
        '"status":{"token":"%s"}}\' "$(cat plugin-token)"\n'
    )
    plugin.chmod(0o755)
    (tmp_path / "plugin-token").write_text("one")
    server.token = "one"
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin), "args": []}}
    follower = follow(PAGED, user=user)
    follower.until_listed()
    assert (tmp_path / "runs").read_text().count("run") == 1
    server.token = "two"
    (tmp_path / "plugin-token").write_text("two")
    server.drop_connections()
    server.put("nodes", node("d"))
    follower.until(lambda: "d" in names(follower))
    assert (tmp_path / "runs").read_text().count("run") == 2


def test_exec_plugin_that_fails_is_named(follow: Callable[..., Follower]) -> None:
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "/bin/false", "args": []}}
    follower = follow(PAGED, user=user)
    follower.until(lambda: "exec plugin '/bin/false' gave no credentials" in follower.troubles.get("nodes", ""))


# --- several kinds


def test_one_forbidden_kind_does_not_hold_up_the_others(server: FaultServer, follow: Callable[..., Follower]) -> None:
    server.put("pods", {"metadata": {"name": "p", "namespace": "d"}, "status": {"podIP": "10.1.0.1"}})
    server.streaming = False
    message = 'pods is forbidden: User "u" cannot list resource "pods"'
    server.fail("list", answer_status(403, "Forbidden", message), kind="pods", times=10_000)
    follower = follow(QUICK, kinds=("nodes", "pods"))
    follower.until(lambda: "nodes" in follower.store.listed and "pods" in follower.troubles)
    assert follower.troubles.keys() == {"pods"}
    assert message in follower.troubles["pods"]
    server.put("nodes", node("d"))
    follower.until(lambda: "d" in names(follower))
    assert not follower.store.complete


# --- TLS and reachability


@pytest.mark.parametrize(
    ("dates", "text"),
    [
        ({"not_before": "20400101000000Z", "not_after": "20410101000000Z"}, "certificate is not yet valid"),
        ({"not_before": "20200101000000Z", "not_after": "20210101000000Z"}, "certificate has expired"),
        ({}, "unable to get local issuer certificate"),
    ],
    ids=["not yet valid", "expired", "unknown CA"],
)
def test_tls_trouble_is_one_clear_line(tmp_path: Path, dates: dict[str, str], text: str) -> None:
    authority = CertificateAuthority(tmp_path / "pki")
    certificate, key = authority.issue("server", "/CN=server", addresses=["127.0.0.1"], **dates)
    trusted = authority if dates else CertificateAuthority(tmp_path / "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with FaultServer(tls=context) as server:
        cluster = {"certificate-authority": str(trusted.certificate)}
        path = kubeconfig(tmp_path / "kubeconfig", server.url, cluster=cluster)
        source = KubernetesSource(ApiServer(Credentials(lambda: load_access(str(path), ""))), "test", NODES, QUICK)
        with Follower(source, NODES) as follower:
            follower.until(lambda: "nodes" in follower.troubles)
            assert follower.troubles["nodes"] == f"Kubernetes API {server.url}: TLS certificate refused: {text}"


def test_unreachable_server_is_one_clear_line_and_found_when_it_comes(tmp_path: Path) -> None:
    with FaultServer() as first:
        port = first.port
    path = kubeconfig(tmp_path / "kubeconfig", f"http://127.0.0.1:{port}")
    source = KubernetesSource(ApiServer(Credentials(lambda: load_access(str(path), ""))), "test", NODES, QUICK)
    with Follower(source, NODES) as follower:
        follower.until(lambda: "nodes" in follower.troubles)
        assert follower.troubles["nodes"] == f"Kubernetes API http://127.0.0.1:{port}: connection refused"
        with FaultServer(port=port) as second:
            second.put("nodes", node("a"))
            follower.until(lambda: follower.store.complete and not follower.troubles)


def test_stop_ends_threads_that_wait_for_the_server(server: FaultServer, follow: Callable[..., Follower]) -> None:
    follower = follow(Tuning(), kinds=("nodes", "pods"))
    follower.until_listed()
    server.fail("watch", stay_silent, kind="pods")
    server.drop_connections()
    follower.until(lambda: len(server.asked("watch", "pods")) >= 2)
    threads = [thread for thread in threading.enumerate() if thread.name in ("nodes", "pods")]
    assert len(threads) == 2
    began = time.monotonic()
    follower.feed.stopping.set()
    follower.source.stop()
    assert time.monotonic() - began < 2.0
