"""Any cluster after any other: what a standing backend left in the kernel is read back, and packets walk through it.

Unlike `tests/properties/test_firewall_verdicts.py` this is all of a backend: its incremental steps, its sets, and its
texts as the kernel's own tools print them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.firewall_strategies import frames, object_lists, state_of, tried
from support.iptables_walk import IptablesWalk
from support.namespaces import Namespace, namespaces
from support.nft_walk import NftWalk
from support.podfirewall import BACKENDS, Standing
from support.podnet import flush
from support.policyworld import BOTH, NODE

from kube_router.ipc.messages import Projection
from kube_router.workers.firewall.backend import Backend
from kube_router.workers.firewall.names import NFT_TABLES
from kube_router.workers.firewall.rules import Frame
from kube_router.workers.firewall.verdict import evaluate
from kube_router.workers.model import Family

Table = IptablesWalk | NftWalk
PROGRAMS = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}
KIND = {Family.IPV4: "ip", Family.IPV6: "ip6"}


@dataclass
class Node:
    """A node's namespace, which one backend after the other has to itself."""

    namespace: Namespace
    name: str
    make: Callable[[], Backend]

    def tables(self) -> dict[Family, Table]:
        """What stands in the kernel."""
        if self.name == "nftables":
            return {
                family: NftWalk(self.namespace.run(f"nft list table {KIND[family]} {NFT_TABLES[family]}"))
                for family in BOTH
            }
        kind = self.name.removeprefix("iptables-")
        sets = self.namespace.run("ipset save")
        return {
            family: IptablesWalk(family, self.namespace.run(f"{PROGRAMS[family]}-{kind}-save -t filter"), sets)
            for family in BOTH
        }


@pytest.fixture(scope="module", params=BACKENDS)
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    with namespaces() as (namespace,):
        yield Node(namespace, request.param, BACKENDS[request.param])


@given(
    clusters=st.lists(st.tuples(object_lists(), frames), min_size=1, max_size=3),
    seed=st.integers(0, 2**32),
)
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take minutes
)
def test_what_stands_in_the_kernel_does_what_the_judge_says(
    node: Node, clusters: list[tuple[tuple[Projection, ...], Frame]], seed: int
) -> None:
    standing = Standing(NODE, node.namespace, node.make)
    try:
        for objects, frame in clusters:
            synced = standing.apply(objects, frame)
            assert (synced.failures, synced.failed) == ((), {})
        state, tables = state_of(*clusters[-1]), node.tables()
        for each in tried(seed, 200):
            walked, verdict = tables[each.packet.family].walk(each.wire), evaluate(state, each.packet)
            assert walked.allowed == verdict.allowed, f"{each.packet}: {walked}; {verdict}"
        # Somebody without a memory finds nothing to do; and nothing is left of all this for nobody.
        again = Standing(NODE, node.namespace, node.make)
        try:
            assert again.apply(*clusters[-1]).writes == 0
        finally:
            again.close()
    finally:
        standing.close()
        flush(node.namespace)
