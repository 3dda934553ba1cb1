"""The lab's example of network policy: a server, who asks it, the policies, and who may ask while which of them stands.

Pure: data. `policydemo` plays it, the end-to-end tests do too.

``shop/server`` runs on node1. ``shop/web1`` sits beside it and ``shop/web3`` on another segment; both may be let in.
``other/visitor1`` and ``other/visitor2`` carry the same label in another namespace, and must never profit from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lab.topology import LabPod

HTTP, ADMIN = 8080, 9090

SERVER = LabPod("shop", "server", "node1", {"app": "server"}, {"http": HTTP, "admin": ADMIN})
WEB1 = LabPod("shop", "web1", "node1", {"app": "web"})
WEB3 = LabPod("shop", "web3", "node3", {"app": "web"})
VISITOR1 = LabPod("other", "visitor1", "node1", {"app": "web"})
VISITOR2 = LabPod("other", "visitor2", "node2", {"app": "web"})
PODS = (SERVER, WEB1, WEB3, VISITOR1, VISITOR2)


@dataclass(frozen=True, slots=True)
class Question:
    """Whether the server answers ``source``, a network namespace of the lab, on ``port``."""

    source: str
    text: str
    port: int


def _question(pod: LabPod, port: int) -> Question:
    return Question(pod.short, f"{pod.key} on {pod.node}, port {port}", port)


FROM_NODE = Question("node1", f"node1 itself, port {HTTP}", HTTP)
WANTED = tuple(_question(pod, HTTP) for pod in (WEB1, WEB3))
"""What the shop lives by."""
UNWANTED = (*(_question(pod, ADMIN) for pod in (WEB1, WEB3)), *(_question(pod, HTTP) for pod in (VISITOR1, VISITOR2)))
QUESTIONS = (*WANTED, *UNWANTED, FROM_NODE)


def _policy(name: str, spec: Mapping[str, object]) -> dict[str, object]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": SERVER.namespace, "name": name},
        "spec": dict(spec),
    }


def _labelled(pod: LabPod) -> dict[str, object]:
    return {"podSelector": {"matchLabels": dict(pod.labels)}}


def _on_http() -> dict[str, object]:
    return {"ports": [{"protocol": "TCP", "port": "http"}]}


DENY_ALL = _policy("deny-all", {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})
"""No pod of the shop may be asked, none may ask."""
WEB_TO_SERVER: dict[str, object] = {
    "apiVersion": "v1",
    "kind": "List",
    "items": [
        _policy(
            "server-answers-web",
            {**_labelled(SERVER), "policyTypes": ["Ingress"], "ingress": [{"from": [_labelled(WEB1)], **_on_http()}]},
        ),
        _policy(
            "web-asks-server",
            {**_labelled(WEB1), "policyTypes": ["Egress"], "egress": [{"to": [_labelled(SERVER)], **_on_http()}]},
        ),
    ],
}
"""The way from the web pods to the server's port ``http``: one half for each end of it."""
MANIFESTS: Mapping[str, Mapping[str, object]] = {"policy-deny-all": DENY_ALL, "policy-web-to-server": WEB_TO_SERVER}


@dataclass(frozen=True, slots=True)
class Stage:
    """Which of `MANIFESTS` stand, and the questions that get an answer then; all others must get none."""

    title: str
    manifests: tuple[str, ...]
    allowed: tuple[Question, ...]


STAGES = (
    Stage("no policy", (), QUESTIONS),
    Stage("deny-all", ("policy-deny-all",), (FROM_NODE,)),
    Stage("+ web-to-server", ("policy-deny-all", "policy-web-to-server"), (*WANTED, FROM_NODE)),
    Stage("both removed", (), QUESTIONS),
)
GUARDED = STAGES[2]
"""The stage in which there is something to lose and something to let through."""
