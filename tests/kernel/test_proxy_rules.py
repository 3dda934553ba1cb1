"""Every rule of the proxy's tables: the kernel gives back its bytes, and ``nft`` lists it in our words.

So what stands can be compared by its bytes; and people, and other programs that list all tables, can read them.
"""

from __future__ import annotations

import re

import pytest
from support.namespaces import Namespace

from kube_router.workers.kernel.nftbatch import Batch, TableDriver
from kube_router.workers.model import Family
from kube_router.workers.proxy import nftlayout as layout
from kube_router.workers.proxy.model import ProxyFrame
from kube_router.workers.proxy.nftlayout import Layout, Made, Pick, Remember, WordedChain

KIND = {Family.IPV4: "ip", Family.IPV6: "ip6"}
SOURCE = {Family.IPV4: bytes([192, 168, 0, 1]), Family.IPV6: bytes.fromhex("fd0000aa" + "0" * 23 + "1")}
EVERY: list[Made] = [
    Pick("turn", 1),
    Pick("turn", 5, 3),
    Pick("turn", 5, 3, sticky=True, inside=True),
    Pick("turn", 2, node_port=True, inside=True),
    Pick("source", 251, sticky=True),
    Pick("source-port", 1021, node_port=True, inside=True),
    Remember(1),
    Remember(86400),
    Remember(3723),
]
FRAMES = [
    ProxyFrame(families=tuple(Family)),
    ProxyFrame(families=tuple(Family), node_ports_on=None),
    ProxyFrame(families=tuple(Family), masquerade_all=True),
]


def chains(family: Family, frame: ProxyFrame, *, known: bool) -> dict[str, WordedChain]:
    made = Layout(family)
    return made.fixed(frame, SOURCE[family] if known else None) | {each.chain: made.made(each) for each in EVERY}


@pytest.mark.parametrize("family", list(Family), ids=str)
@pytest.mark.parametrize("frame", FRAMES, ids=["node address", "any address", "masquerade all"])
@pytest.mark.parametrize("known", [True, False], ids=["known source", "no source"])
def test_a_rule_comes_back_as_it_was_written_and_reads_as_it_says(
    netns: Namespace, family: Family, frame: ProxyFrame, known: bool
) -> None:
    wanted = chains(family, frame, known=known)
    with netns.enter():
        driver = TableDriver()
        batch = Batch(family, "t")
        batch.add_table("test")
        for shape in layout.shapes(family).values():
            batch.add_set(shape)
        for chain in wanted.values():
            batch.add_chain(chain.coded)
        for chain in wanted.values():
            batch.add_rules(chain.coded)
        driver.commit(batch)
        standing = driver.look(family, "t")
        driver.close()
    assert standing is not None
    assert standing.chains == {name: chain.coded for name, chain in wanted.items()}
    assert all(standing.fits(shape) for shape in layout.shapes(family).values())
    text = netns.run(f"nft -s list table {KIND[family]} t")
    for name, chain in wanted.items():
        body = re.search(rf"\tchain {name} \{{\n(.*?)\t\}}\n", text, re.DOTALL)
        assert body is not None
        listed = [line.strip() for line in body[1].splitlines() if not line.strip().startswith("type ")]
        assert listed == [rule.words for rule in chain.rules], name
