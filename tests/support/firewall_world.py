"""A small cluster with policies, and the frame around it: what the tests of both backends program.

Pure. One policy denies; the other has a clause of every kind, in both families.
"""

from __future__ import annotations

from support.policyworld import BOTH, block, pod, pods, policy, port, rule
from support.policyworld import select as labels

from kube_router.ipc.messages import NetworkPolicy, Pod
from kube_router.workers.firewall.rules import Frame
from kube_router.workers.model import parse_network

FRAME = Frame(
    families=BOTH,
    cluster_ranges=(parse_network("10.96.0.0/12"), parse_network("fd00:96::/108")),
    external_ranges=(parse_network("192.0.2.7/32"), parse_network("2001:db8::7/128")),
    load_balancer_ranges=(parse_network("198.51.100.0/24"), parse_network("2001:db8:5::/64")),
    node_ports=frozenset({("tcp", 30080), ("udp", 30053), ("sctp", 30036)}),
    pod_cidrs=(parse_network("10.0.0.0/24"), parse_network("fd00::/64")),
    default_deny=True,
)
WEB = pod("a/web", 1, ports={"http": 8080}, app="web")
DATABASE = pod("a/db", 2, app="db")
OTHER = pod("b/other", 3, app="other")
REMOTE = pod("a/remote", 9, node="n2", app="db")
DENY = policy("a/deny", labels(app="db"), ingress=[])
ALLOW = policy(
    "a/allow",
    labels(app="web"),
    ingress=[
        rule(
            pods(app="db"),
            block("10.0.0.0/8", "10.1.0.0/16"),
            block("fd00::/8", "fd00:1::/32"),
            ports=[port("http"), port(80), port(90, 99), port(53, protocol="UDP"), port(protocol="SCTP")],
        ),
        rule(block("0.0.0.0/0"), block("::/0"), ports=[port(443)]),
    ],
    egress=[rule(pods(app="db")), rule(ports=[port(53, protocol="UDP")])],
)
WORLD: tuple[Pod | NetworkPolicy, ...] = (WEB, DATABASE, OTHER, REMOTE, DENY, ALLOW)
