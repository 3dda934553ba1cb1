"""The Kubernetes source against a real kube-apiserver: what it lists, sees, survives."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.apiserver import AGENT_TOKEN, AGENT_TOKENS, PARTIAL_TOKEN, ApiServer, grant_agents
from support.follower import Follower

from kube_router.ipc.messages import (
    ContainerPort,
    EndpointSlice,
    Namespace,
    NetworkPolicy,
    Node,
    NodeAddress,
    Notice,
    Pod,
    Service,
)
from kube_router.workers.kubeapi.apiserver import ApiServer as WatcherApiServer
from kube_router.workers.kubeapi.credentials import Credentials, load_access
from kube_router.workers.watcher.events import ApiSink
from kube_router.workers.watcher.kubernetesapi import EventPoster
from kube_router.workers.watcher.listwatch import Tuning
from kube_router.workers.watcher.source import Feed, Listed

QUICK = Tuning(backoff_first=0.1, backoff_most=1.0)
Object = dict[str, Any]
Follow = Callable[..., Follower]


def node(name: str, **more: Any) -> Object:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, **more}}


def pod(namespace: str, name: str, phase: str = "Running") -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "labels": {"app": "web"}},
        "spec": {
            "nodeName": "n1",
            "containers": [
                {"name": "c", "image": "i", "ports": [{"name": "http", "containerPort": 8080}, {"containerPort": 9}]}
            ],
        },
        "status": {
            "phase": phase,
            "hostIP": "192.0.2.1",
            "podIP": "10.1.0.5",
            "podIPs": [{"ip": "10.1.0.5"}, {"ip": "fd00:1::5"}],
        },
    }


def namespace(name: str) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {"team": "a"}}}


def service(namespace: str, name: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": namespace, "name": name, "annotations": {"kube-router.io/service.dsr": "tunnel"}},
        "spec": {
            "selector": {"app": "web"},
            "ipFamilyPolicy": "RequireDualStack",
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
            "sessionAffinity": "ClientIP",
        },
    }


def endpoint_slice(namespace: str, name: str) -> Object:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"namespace": namespace, "name": name, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv6",
        "endpoints": [{"addresses": ["fd00:1::5"], "conditions": {"ready": True}, "nodeName": "n1"}],
        "ports": [{"name": "http", "port": 8080}],
    }


def policy(namespace: str, name: str) -> Object:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "podSelector": {},
            "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.9.0.0/16"]}}]}, {}],
            "policyTypes": ["Ingress"],
        },
    }


def test_all_six_kinds_are_listed_and_followed(apiserver: ApiServer, follow: Follow) -> None:
    apiserver.apply(
        {
            **node("six-1", annotations={"kube-router.io/node.asn": "64512", "other/annotation": "x"}),
            "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd00:1::/64"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "2001:db8::1"}]},
        },
        namespace("six"),
        pod("six", "p"),
        pod("six", "finished"),
        service("six", "web"),
        endpoint_slice("six", "web-1"),
        policy("six", "allow"),
    )
    apiserver.apply(pod("six", "finished", phase="Succeeded"))
    follower = follow(apiserver)
    follower.until_listed()
    assert not follower.seen

    found = follower.objects("nodes")["six-1"]
    assert isinstance(found, Node)
    assert found.annotations == {"kube-router.io/node.asn": "64512"}
    assert found.addresses == (NodeAddress("InternalIP", "2001:db8::1"),)
    assert found.pod_cidrs == ("10.1.0.0/24", "fd00:1::/64")
    assert found.uid
    team = follower.objects("namespaces")["six"]
    assert isinstance(team, Namespace)
    assert team.labels["team"] == "a"
    web = follower.objects("pods")["six/p"]
    assert isinstance(web, Pod)
    assert web.ips == ("10.1.0.5", "fd00:1::5")
    assert web.host_ips == ("192.0.2.1",)
    assert web.ports == (ContainerPort("http", 8080, "TCP"),)
    assert "six/finished" not in follower.objects("pods")
    clients = follower.objects("services")["six/web"]
    assert isinstance(clients, Service)
    assert [":" in address for address in clients.cluster_ips] == [False, True]
    assert clients.ports[0].target_port == "http"
    assert clients.affinity_timeout == 10800
    assert clients.annotations == {"kube-router.io/service.dsr": "tunnel"}
    part = follower.objects("endpointslices")["six/web-1"]
    assert isinstance(part, EndpointSlice)
    assert (part.service, part.address_type, part.endpoints[0].addresses) == ("web", "IPv6", ("fd00:1::5",))
    rules = follower.objects("networkpolicies")["six/allow"]
    assert isinstance(rules, NetworkPolicy)
    assert rules.ingress is not None
    assert rules.ingress[0].peers is not None
    assert rules.ingress[0].peers[0].ip_block is not None
    assert rules.ingress[0].peers[0].ip_block.excepted == ("10.9.0.0/16",)
    assert rules.ingress[1].peers is None
    assert rules.egress is None

    apiserver.apply(pod("six", "p", phase="Failed"))
    follower.until(lambda: "six/p" not in follower.objects("pods"))
    for item in (service("six", "web"), endpoint_slice("six", "web-1"), policy("six", "allow"), node("six-1")):
        apiserver.delete(item)
    follower.until(lambda: "six/web" not in follower.objects("services"))
    follower.until(lambda: "six/web-1" not in follower.objects("endpointslices"))
    follower.until(lambda: "six/allow" not in follower.objects("networkpolicies"))
    follower.until(lambda: "six-1" not in follower.objects("nodes"))


def test_thousands_are_listed_in_pages(apiserver: ApiServer, follow: Follow) -> None:
    apiserver.seed(node(f"many-{number:04}", uid=f"u{number}") for number in range(2100))
    follower = follow(apiserver, ("nodes",), tuning=Tuning(streaming=False))
    follower.until_listed()
    assert sum(key.startswith("many-") for key in follower.objects("nodes")) == 2100
    assert follower.count(Listed, "nodes") == 1
    apiserver.apply(node("many-0000", labels={"new": "label"}), node("many-new"))
    follower.until(lambda: "many-new" in follower.objects("nodes"))
    found = follower.objects("nodes")["many-0000"]
    assert isinstance(found, Node)
    assert found.labels == {"new": "label"}
    assert len(follower.steps) <= 3, "a change is told alone"


def test_kubelet_status_updates_are_not_told(apiserver: ApiServer, follow: Follow) -> None:
    apiserver.apply(node("quiet"))
    follower = follow(apiserver, ("nodes",))
    follower.until_listed()
    told = len(follower.steps)
    condition = {"type": "Ready", "status": "True", "lastHeartbeatTime": "2026-01-01T00:00:00Z"}
    apiserver.apply({**node("quiet"), "status": {"conditions": [condition]}})
    apiserver.apply(node("quiet-end"))
    follower.until(lambda: "quiet-end" in follower.objects("nodes"))
    assert [item.key for step in follower.steps[told:] for item in step.put] == ["quiet-end"]


def test_forbidden_kind_is_named_and_the_others_go_on(apiserver: ApiServer, follow: Follow) -> None:
    follower = follow(apiserver, ("pods", "namespaces"), user={"token": PARTIAL_TOKEN}, tuning=QUICK)
    follower.until(lambda: "pods" in follower.troubles and "namespaces" in follower.store.listed)
    text = follower.troubles["pods"]
    assert text.startswith(f"Kubernetes API {apiserver.url}: ")
    assert "403 Forbidden" in text
    assert 'User "partial" cannot' in text
    assert 'resource "pods"' in text
    assert PARTIAL_TOKEN not in text
    apiserver.apply(namespace("still-followed"))
    follower.until(lambda: "still-followed" in follower.objects("namespaces"))


def test_client_certificate(apiserver: ApiServer, follow: Follow) -> None:
    certificate, key = apiserver.authority.issue("agent-client", "/O=nodes/CN=agent")
    data = {
        "client-certificate-data": base64.b64encode(certificate.read_bytes()).decode(),
        "client-key-data": base64.b64encode(key.read_bytes()).decode(),
    }
    for user in (data, {"client-certificate": str(certificate), "client-key": str(key)}):
        follower = follow(apiserver, ("namespaces",), user=user)
        follower.until_listed()
        assert "kube-system" in follower.objects("namespaces")


def test_exec_plugin(apiserver: ApiServer, follow: Follow, tmp_path: Path) -> None:
    plugin = tmp_path / "plugin"
    plugin.write_text(
        "#!/bin/sh\n"
        'printf \'{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential",'
        '"status":{"token":"%s"}}\' "$TOKEN"\n'
    )
    plugin.chmod(0o755)
    user = {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": "./plugin",
            "env": [{"name": "TOKEN", "value": AGENT_TOKEN}],
        }
    }
    follower = follow(apiserver, ("namespaces",), user=user)
    follower.until_listed()


def test_wrong_token_file_recovers_when_it_is_mended(apiserver: ApiServer, follow: Follow, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("wrong-token")
    follower = follow(apiserver, ("namespaces",), user={"tokenFile": "token"}, tuning=QUICK)
    follower.until(lambda: "401 Unauthorized" in follower.troubles.get("namespaces", ""))
    token.write_text(AGENT_TOKEN)
    follower.until_listed()
    follower.until(lambda: not follower.troubles)


def test_in_cluster_credentials_with_master(apiserver: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(AGENT_TOKEN + "\n")
    (tmp_path / "ca.crt").write_bytes(apiserver.authority.certificate.read_bytes())
    api = WatcherApiServer(Credentials(lambda: load_access("", apiserver.url, tmp_path)))
    response = api.open("GET", "/api/v1/namespaces/", {"limit": "1"})
    assert response.status == 200
    response.close()


# --- a server that is stopped


@pytest.fixture(scope="module")
def own_apiserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A server of this module's own, to stop and start."""
    flags = ["--etcd-compaction-interval=0", "--default-watch-cache-size=100"]
    with ApiServer(tmp_path_factory.mktemp("own-apiserver"), tokens=AGENT_TOKENS, flags=flags) as server:
        grant_agents(server)
        yield server


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_server_restart_deletes_nothing(own_apiserver: ApiServer, follow: Follow, kill: bool) -> None:
    names = [f"restart-{str(kill).lower()}-{number}" for number in range(20)]
    own_apiserver.apply(*map(node, names))
    follower = follow(own_apiserver, ("nodes", "namespaces"), tuning=QUICK)
    follower.until_listed()
    told = len(follower.steps)
    own_apiserver.stop_server(kill=kill)
    refused = dict.fromkeys(("nodes", "namespaces"), f"Kubernetes API {own_apiserver.url}: connection refused")
    try:
        # A killed server's streams end by a reset first; the next try is refused.
        follower.until(lambda: dict(follower.troubles) == refused)
        assert names[0] in follower.objects("nodes")
    finally:
        own_apiserver.start_server()
    own_apiserver.apply(node(f"after-{str(kill).lower()}"))
    follower.until(lambda: f"after-{str(kill).lower()}" in follower.objects("nodes") and not follower.troubles)
    assert follower.gone == []
    assert [item.key for step in follower.steps[told:] for item in step.put] == [f"after-{str(kill).lower()}"]


def test_compaction_while_the_server_was_away_tells_the_difference(own_apiserver: ApiServer, follow: Follow) -> None:
    own_apiserver.apply(node("compact-1"), node("compact-2"))
    follower = follow(own_apiserver, ("nodes",), tuning=QUICK)
    follower.until_listed()
    own_apiserver.stop_server()
    follower.until(lambda: bool(follower.troubles))
    # What happens meanwhile, as another API server of the same cluster would write it.
    own_apiserver.seed([node("compact-3", uid="u3")])
    own_apiserver.compact()
    own_apiserver.start_server()
    follower.until(lambda: "compact-3" in follower.objects("nodes"))
    own_apiserver.delete(node("compact-1"))
    follower.until(lambda: "compact-1" not in follower.objects("nodes"))
    assert follower.gone == ["compact-1"]


# --- Events


def test_notice_becomes_one_event_and_is_counted_up(apiserver: ApiServer, tmp_path: Path) -> None:
    apiserver.apply(node("event-node"))
    path = apiserver.write_kubeconfig(tmp_path / "kubeconfig", {"token": AGENT_TOKEN})
    notice = Notice(
        worker="router", kind="Node", name="event-node", uid="u-1", reason="BadPodCIDR", text="bad: 10.0/33"
    )

    def events() -> list[Object]:
        items: list[Object] = apiserver.request("GET", "/api/v1/namespaces/default/events")[1]["items"]
        return [item for item in items if item["involvedObject"]["name"] == "event-node"]

    def post(times: int) -> None:
        feed = Feed()
        api = WatcherApiServer(Credentials(lambda: load_access(str(path), "")))
        sink = ApiSink(EventPoster(api, "host-1"), feed)
        for _ in range(times):
            sink.post(notice)
        done = threading.Event()
        while sink._queue.unfinished_tasks and not done.wait(0.02):
            pass
        feed.stopping.set()

    post(times=3)
    [event] = events()
    assert (event["count"], event["type"], event["reason"]) == (1, "Warning", "BadPodCIDR")
    assert event["message"] == "bad: 10.0/33"
    assert event["source"] == {"component": "kube-router", "host": "host-1"}
    assert event["involvedObject"] == {"kind": "Node", "apiVersion": "v1", "name": "event-node", "uid": "u-1"}
    post(times=1)  # another agent process: finds the Event that is there
    [event] = events()
    assert event["count"] == 2


def test_forbidden_event_is_a_trouble_and_nothing_more(apiserver: ApiServer, tmp_path: Path) -> None:
    path = apiserver.write_kubeconfig(tmp_path / "kubeconfig", {"token": PARTIAL_TOKEN})
    feed = Feed()
    api = WatcherApiServer(Credentials(lambda: load_access(str(path), "")))
    sink = ApiSink(EventPoster(api, "host-1"), feed)
    sink.post(Notice(worker="router", kind="Node", name="x", reason="R", text="t"))
    wait = threading.Event()
    while not (news := feed.take()):
        wait.wait(0.02)
    feed.stopping.set()
    [trouble] = news
    assert "event about Node x not posted" in str(trouble)
    assert "403 Forbidden" in str(trouble)
