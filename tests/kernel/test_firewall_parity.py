"""Law 7 in the kernel: both families hold the same pods, set by set, after a cold start and after changes."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable

import pytest
from support.namespaces import Namespace, namespaces
from support.podfirewall import BACKENDS, Standing
from support.policyworld import BOTH, NODE, pod, pods, policy, port, rule, select

from kube_router.ipc.messages import ContainerPort, Projection
from kube_router.ipc.messages import Namespace as KubeNamespace
from kube_router.workers.firewall.backend import Backend
from kube_router.workers.firewall.names import LOCAL_PODS, NFT_TABLES, ipset_name, set_name
from kube_router.workers.firewall.rules import BlockSet, Frame
from kube_router.workers.model import Family

POLICIES = (
    policy("x/in", select(app="web"), ingress=[rule(pods(app="client"), ports=[port("http"), port(80)])]),
    policy("x/out", select(app="web"), egress=[rule(pods(app="client"), ports=[port("http")]), rule(pods(app="db"))]),
)


def http(number: int) -> list[ContainerPort]:
    return [ContainerPort("http", number, "TCP")]


def cluster(*more: Projection) -> list[Projection]:
    local = [pod(f"x/web{n}", n, ports=http(8000 + n % 2), app="web") for n in range(1, 21)]
    remote = [pod(f"x/client{n}", n, "n2", ports=http(9000), app="client") for n in range(21, 61)]
    return [KubeNamespace(name="x"), *local, *remote, *POLICIES, *more]


def members(namespace: Namespace, backend: str, name: str, family: Family) -> set[tuple[int, str]]:
    """(number of the pod, what stands beside its address) of a set in the kernel; KeyError if it is not there."""
    if backend == "nftables":
        kind = "ip" if family is Family.IPV4 else "ip6"
        listed = json.loads(namespace.run(f"nft -j list set {kind} {NFT_TABLES[family]} {name}"))
        elements = next(item["set"].get("elem", []) for item in listed["nftables"] if "set" in item)
        texts = []
        for element in elements:
            value = element["elem"]["val"] if isinstance(element, dict) and "elem" in element else element
            address, *rest = value["concat"] if isinstance(value, dict) else [value]
            texts.append((address, ":".join(map(str, rest))))
    else:
        listed = namespace.run(f"ipset list {ipset_name(name, family)}").partition("Members:\n")[2]
        texts = [tuple(line.split()[0].partition(",")[::2]) for line in listed.splitlines()]
    return {(int(ipaddress.ip_address(address)) & 0xFF, rest) for address, rest in texts}


@pytest.mark.parametrize("name", BACKENDS)
def test_every_set_holds_the_same_pods_in_both_families(name: str) -> None:
    make: Callable[[], Backend] = BACKENDS[name]
    with namespaces() as (namespace,):
        standing = Standing(NODE, namespace, make)
        try:
            for objects in (
                cluster(),
                cluster(pod("x/db", 99, "n2", app="db"), pod("x/web21", 88, ports=http(8000), app="web")),
                [item for item in cluster() if item.key not in ("x/client30", "x/web3")],
            ):
                assert standing.apply(objects, Frame(families=BOTH)).failures == ()
                sets = [key for key in standing.engine.ruleset.members if not isinstance(key, BlockSet)]
                assert len(sets) == 4
                found = {
                    family: {
                        LOCAL_PODS: members(namespace, name, LOCAL_PODS, family),
                        **{str(key): members(namespace, name, set_name(key, family), family) for key in sets},
                    }
                    for family in BOTH
                }
                assert found[Family.IPV4] == found[Family.IPV6]
                assert sum(map(len, found[Family.IPV4].values())) > 100
        finally:
            standing.close()
