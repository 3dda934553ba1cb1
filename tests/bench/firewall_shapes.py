"""Clusters of a given size with network policies, and what happens in them: the same at every call.

Pure: projections only. For benchmarks and for whoever needs a big cluster. One node, `NODE`, is the one looked from.

The policies of a namespace are what people write: one that denies all, one that allows DNS, and for every app one that
lets in another app; of ten, five say more: from the namespaces of a team by a named port, from networks with excepts,
both directions with the world outside, from the monitoring in all namespaces.
"""

from __future__ import annotations

import ipaddress
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import msgspec

from kube_router.ipc.messages import (
    ContainerPort,
    IpBlock,
    Key,
    Kind,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    Node,
    NodeAddress,
    Pod,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Projection,
    Service,
    ServicePort,
    SourceState,
)
from kube_router.ipc.replica import Changes, Cluster

NODE = "node-0"
PODS_A_NODE = 110
TEAMS = 50
METRICS_PORT = 9100
SPREAD = 7919
"""A prime that is no factor of any number of pods: the local ones are of all namespaces and apps."""
IDLE = "idle"
"""Value of the label ``app`` that no policy asks for."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a cluster; ``local``: pods on `NODE`."""

    pods: int
    namespaces: int
    local: int
    policies: int

    def __str__(self) -> str:
        return (
            f"{self.pods:,} pods in {self.namespaces} namespaces, {self.local} local, {self.policies:,} policies, "
            "dual-stack"
        )

    @property
    def apps(self) -> int:
        """Different apps in a namespace."""
        return max(1, min(20, self.pods // self.namespaces // 5))


LARGE = Shape(pods=10_000, namespaces=100, local=110, policies=2_000)
MIDDLE = Shape(pods=1_000, namespaces=20, local=110, policies=200)
SMALL = Shape(pods=60, namespaces=4, local=20, policies=20)

Objects = dict[Kind, dict[Key, Projection]]


def objects(shape: Shape) -> Objects:
    """Everything in a cluster of this shape, by kind and key."""
    kinds: dict[Kind, list[Projection]] = {
        "nodes": [_node(number) for number in range(_nodes(shape))],
        "namespaces": [_namespace(number) for number in range(shape.namespaces)],
        "pods": list(_pods(shape)),
        "networkpolicies": [
            _policy(shape, number % shape.namespaces, number // shape.namespaces) for number in range(shape.policies)
        ],
        "services": [_service(number) for number in range(shape.namespaces)],
    }
    return {kind: {item.key: item for item in items} for kind, items in kinds.items()}


def cluster(found: Mapping[Kind, Mapping[Key, Projection]], *, in_sync: bool = True) -> Cluster:
    """A view of objects, which is not to be kept while they change."""
    return Cluster(SourceState(source="bench", in_sync=in_sync, stale=not in_sync), found)


def apply(found: Objects, changes: Changes) -> None:
    """Let the changes happen."""
    for kind, by_key in changes.items():
        for key, (_, new) in by_key.items():
            if new is None:
                del found[kind][key]
            else:
                found[kind][key] = new


def change(found: Objects, kind: Kind, key: Key, new: Projection | None) -> Changes:
    """The change of one object; it has not happened yet."""
    return {kind: {key: (found[kind].get(key), new)}}


def namespace_name(number: int) -> str:
    return f"team-{number % TEAMS}-{number}"


def _namespace(number: int) -> Namespace:
    name = namespace_name(number)
    return Namespace(
        name=name, uid=_uid(1, number), labels={"kubernetes.io/metadata.name": name, "team": f"team-{number % TEAMS}"}
    )


def _nodes(shape: Shape) -> int:
    return 1 + -(-(shape.pods - shape.local) // PODS_A_NODE)


def _node(number: int) -> Node:
    return Node(
        name=f"node-{number}",
        uid=_uid(2, number),
        addresses=(
            NodeAddress("InternalIP", f"192.168.0.{number + 1}"),
            NodeAddress("InternalIP", f"fd00:1::{number + 1:x}"),
        ),
        pod_cidr=f"10.244.{number}.0/24",
        pod_cidrs=(f"10.244.{number}.0/24", f"fd00:10:244:{number:x}::/64"),
    )


def addresses(node: int, number: int) -> tuple[str, str]:
    """Of pod ``number`` on a node, out of its pod networks; numbers above 253 go on in a range of their own."""
    if number < 253:
        return f"10.244.{node}.{number + 2}", f"fd00:10:244:{node:x}::{number + 2:x}"
    return str(ipaddress.IPv4Address((10 << 24) + number)), f"fd00:11::{number:x}"


def _pods(shape: Shape) -> Iterator[Pod]:
    on_node: dict[int, int] = {}
    remote = itertools.count()
    for number in range(shape.pods):
        local = number * SPREAD % shape.pods < shape.local
        node = 0 if local else 1 + next(remote) // PODS_A_NODE
        on_node[node] = on_node.get(node, -1) + 1
        yield pod(shape, number, node, addresses(node, on_node[node]))


def pod(shape: Shape, number: int, node: int, ips: tuple[str, ...]) -> Pod:
    """Pod ``number``; its namespace and app follow from the number."""
    of_namespace, index = number % shape.namespaces, number // shape.namespaces
    app = index % shape.apps
    return Pod(
        name=f"app-{app}-6f7c9d{number:04x}",
        namespace=namespace_name(of_namespace),
        uid=_uid(3, number),
        labels={
            "app": f"app-{app}",
            "tier": ("frontend", "backend", "storage")[app % 3],
            "pod-template-hash": f"6f7c9d{app:04x}",
        },
        node_name=f"node-{node}",
        phase="Running",
        ips=ips,
        host_ips=(f"192.168.0.{node + 1}",),
        ports=(ContainerPort("http", 8080 + app % 2), ContainerPort("metrics", METRICS_PORT)),
    )


def _service(number: int) -> Service:
    return Service(
        name="web",
        namespace=namespace_name(number),
        uid=_uid(4, number),
        type="NodePort",
        selector={"app": "app-0"},
        cluster_ips=(f"10.96.0.{number + 1}",),
        ports=(ServicePort(name="http", port=80, target_port="http", node_port=30000 + number),),
    )


def _uid(kind: int, number: int) -> str:
    return f"0000000{kind}-0000-4000-8000-{number:012d}"


def labelled(**labels: str) -> LabelSelector:
    return LabelSelector(match_labels=labels)


def _policy(shape: Shape, of_namespace: int, index: int) -> NetworkPolicy:
    if index == 0:
        return policy(of_namespace, "deny-all", LabelSelector(), ingress=(), egress=())
    if index == 1:
        resolver = PolicyPeer(
            namespace_selector=LabelSelector(match_labels={"kubernetes.io/metadata.name": namespace_name(0)}),
            pod_selector=labelled(app="app-0"),
        )
        ports = (PolicyPort(protocol="UDP", port=53), PolicyPort(protocol="TCP", port=53))
        return policy(of_namespace, "allow-dns", LabelSelector(), egress=(PolicyRule(peers=(resolver,), ports=ports),))
    app = (index - 2) % shape.apps
    ingress, egress = _rules(of_namespace, app, shape.apps)
    return policy(of_namespace, f"app-{app}-{index}", labelled(app=f"app-{app}"), ingress=ingress, egress=egress)


def _rules(
    of_namespace: int, app: int, apps: int
) -> tuple[tuple[PolicyRule, ...] | None, tuple[PolicyRule, ...] | None]:
    """Ingress and egress of the policy of one app."""
    neighbour = PolicyPeer(pod_selector=labelled(app=f"app-{(app + 1) % apps}"))
    first = PolicyRule(peers=(neighbour,), ports=(PolicyPort(port=8080), PolicyPort(port=8443)))
    kind = (of_namespace + app) % 10
    if kind == 1:
        team = PolicyPeer(namespace_selector=labelled(team=f"team-{of_namespace % TEAMS}"))
        return (first, PolicyRule(peers=(team,), ports=(PolicyPort(port="http"),))), None
    if kind in (2, 3):
        block = IpBlock(cidr="172.16.0.0/12", excepted=(f"172.16.{of_namespace}.0/24", f"172.17.{app}.0/24"))
        block6 = IpBlock(cidr="fd12::/16", excepted=(f"fd12:{of_namespace:x}::/32",))
        peers = (
            PolicyPeer(ip_block=block),
            PolicyPeer(ip_block=block6),
            PolicyPeer(pod_selector=labelled(tier="frontend")),
        )
        return (first, PolicyRule(peers=peers, ports=(PolicyPort(port=9000, end_port=9010),))), None
    if kind == 4:
        outside = (
            PolicyPeer(ip_block=IpBlock(cidr="0.0.0.0/0", excepted=("10.0.0.0/8", "192.168.0.0/16"))),
            PolicyPeer(ip_block=IpBlock(cidr="::/0", excepted=("fd00::/8",))),
        )
        store = PolicyPeer(pod_selector=labelled(tier="storage"))
        return (first,), (
            PolicyRule(peers=(store,), ports=(PolicyPort(port=5432),)),
            PolicyRule(peers=outside, ports=(PolicyPort(port=443),)),
        )
    if kind != 5:
        return (first,), None
    monitor = PolicyPeer(namespace_selector=LabelSelector(), pod_selector=labelled(app="app-1"))
    return (first, PolicyRule(peers=(monitor,), ports=(PolicyPort(port=METRICS_PORT),))), None


def policy(
    of_namespace: int,
    name: str,
    target: LabelSelector,
    *,
    ingress: tuple[PolicyRule, ...] | None = None,
    egress: tuple[PolicyRule, ...] | None = None,
) -> NetworkPolicy:
    """A policy as the API server would complete it."""
    types = (("Ingress",) if ingress is not None else ()) + (("Egress",) if egress is not None else ())
    return NetworkPolicy(
        name=name,
        namespace=namespace_name(of_namespace),
        uid=f"policy-{of_namespace}-{name}",
        pod_selector=target,
        policy_types=types,
        ingress=ingress,
        egress=egress,
    )


def pods_of(found: Objects) -> dict[Key, Pod]:
    return cast("dict[Key, Pod]", found["pods"])


def local_pods(found: Objects) -> list[Pod]:
    """The pods of `NODE`, by key."""
    return sorted((item for item in pods_of(found).values() if item.node_name == NODE), key=lambda item: item.key)


def member_events(found: Objects, shape: Shape, count: int) -> Iterator[Changes]:
    """One remote pod at a time becomes a peer of a local pod by a label, or is a peer no more, or is new, or is gone.

    Each of them changes a set that a rule of this node asks for. The caller applies each before asking for the next.
    """
    hosts = itertools.cycle(_peer_labels(found, shape))
    for number in range(-(-count // 4)):
        namespace, app = next(hosts)
        of_namespace = int(namespace.rpartition("-")[2])
        was = next(item for item in pods_of(found).values() if item.namespace == namespace and _may_become(item, app))
        now = msgspec.structs.replace(was, labels={**was.labels, "app": app})
        yield change(found, "pods", was.key, now)
        yield change(found, "pods", was.key, was)
        new = msgspec.structs.replace(
            pod(shape, of_namespace, 1, addresses(1, 1000 + number)), name=f"new-{number}", labels={"app": app}
        )
        yield change(found, "pods", new.key, new)
        yield change(found, "pods", new.key, None)


def _may_become(item: Pod, app: str) -> bool:
    return item.node_name != NODE and item.labels["app"] != app


def _peer_labels(found: Objects, shape: Shape) -> list[tuple[str, str]]:
    """(namespace, app) of the peers of local pods, by the first rule of their app's policy."""
    apps = {
        (item.namespace, item.pod_selector.match_labels.get("app", ""))
        for item in cast("dict[Key, NetworkPolicy]", found["networkpolicies"]).values()
    }
    wanted = dict.fromkeys(
        (item.namespace, f"app-{(int(item.labels['app'][4:]) + 1) % shape.apps}")
        for item in local_pods(found)
        if (item.namespace, item.labels["app"]) in apps
    )
    return list(wanted)


def policy_events(found: Objects, count: int) -> Iterator[tuple[NetworkPolicy, Changes]]:
    """New policies, each for one local pod's app, with a set, a port set and a block that nobody else has."""
    for number, item in zip(range(count), itertools.cycle(local_pods(found)), strict=False):
        of_namespace = int(item.namespace.rpartition("-")[2])
        peers = (
            PolicyPeer(pod_selector=LabelSelector(match_labels={"app": "app-0", "tier": "frontend"})),
            PolicyPeer(pod_selector=labelled(round=str(number))),
        )
        block = PolicyPeer(ip_block=IpBlock(cidr=f"100.64.{number % 256}.0/24"))
        rules = (
            PolicyRule(peers=peers, ports=(PolicyPort(port=7000 + number), PolicyPort(port="http"))),
            PolicyRule(peers=(block,), ports=(PolicyPort(port=443),)),
        )
        new = policy(of_namespace, f"new-{number}", labelled(app=item.labels["app"]), ingress=rules)
        yield new, change(found, "networkpolicies", new.key, new)


def wide_policy(found: Objects) -> NetworkPolicy:
    """A policy of a local pod that lets in every pod there is, and lets out to all by a named port."""
    chosen = local_pods(found)[0]
    everybody = PolicyPeer(namespace_selector=LabelSelector())
    return policy(
        int(chosen.namespace.rpartition("-")[2]),
        "wide",
        labelled(app=chosen.labels["app"]),
        ingress=(PolicyRule(peers=(everybody,)),),
        egress=(PolicyRule(peers=(everybody,), ports=(PolicyPort(port="http"),)),),
    )


def churn_events(found: Objects, shape: Shape, seed: int = 1) -> Iterator[Changes]:
    """Pods of the whole cluster come, go, and change a label, without end; the caller applies each."""
    chance = random.Random(seed)
    keys = list(found["pods"])
    for number in itertools.count():
        kind = chance.randrange(4)
        if kind == 0:
            node = chance.randrange(1, 1 + -(-shape.pods // PODS_A_NODE))
            made = pod(shape, chance.randrange(shape.pods), node, addresses(node, 1_000_000 * seed + number))
            new = msgspec.structs.replace(made, name=f"churn-{seed}-{number}")
            keys.append(new.key)
            yield change(found, "pods", new.key, new)
            continue
        at = chance.randrange(len(keys))
        old = pods_of(found)[keys[at]]
        if kind == 1:
            keys[at] = keys[-1]
            del keys[-1]
            yield change(found, "pods", old.key, None)
            continue
        apps = [*(f"app-{app}" for app in range(shape.apps)), IDLE]
        now = msgspec.structs.replace(old, labels={**old.labels, "app": chance.choice(apps), "round": str(number)})
        yield change(found, "pods", old.key, now)


def crowded(shape: Shape, policies_a_pod: int) -> Objects:
    """Only `NODE`: each local pod is taken by its own ``policies_a_pod`` policies of one rule each."""
    found = objects(replace(shape, pods=shape.local, policies=0))
    for item in local_pods(found):
        of_namespace = int(item.namespace.rpartition("-")[2])
        own = msgspec.structs.replace(item, labels={**item.labels, "own": item.name})
        found["pods"][own.key] = own
        for number in range(policies_a_pod):
            peer = PolicyPeer(pod_selector=labelled(app=f"app-{number}"))
            rule = PolicyRule(peers=(peer,), ports=(PolicyPort(port=6000 + number),))
            new = policy(
                of_namespace, f"{item.name}-{number}", labelled(own=item.name), ingress=(rule,), egress=(rule,)
            )
            found["networkpolicies"][new.key] = new
    return found
