"""The tables of random clusters, read back from the kernel and run packet by packet, do what the judge says.

Engine, layout, elements and the kernel's memory of them share nothing with the judge but the API objects.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.namespaces import Namespace
from support.nft_machine import Fate, Packet, Table, fates, table_of
from support.proxynode import ProxyNode
from support.proxyworld import (
    LOCAL_POD,
    NODE_ADDRESS,
    Objects,
    judged,
    questions,
    random_change,
    random_objects,
)

from kube_router.ipc.messages import Service
from kube_router.workers.kernel.nftbatch import TableDriver
from kube_router.workers.model import Family
from kube_router.workers.proxy import nftlayout
from kube_router.workers.proxy.names import NFT_TABLES
from kube_router.workers.proxy.selection import Asked
from kube_router.workers.serviceips import ServiceIps

FROM_OUTSIDE = ("prerouting", "postrouting")
FROM_NODE = ("output", "postrouting")


@pytest.fixture
def world(netns: Namespace) -> Iterator[ProxyNode]:
    with netns.enter():
        made = ProxyNode(netns)
        made.start()
        yield made
        made.backend.close()


def read(family: Family) -> Table:
    """A table as the kernel holds it."""
    driver = TableDriver()
    try:
        standing = driver.look(family, NFT_TABLES[family])
        assert standing is not None
        shapes = [shape for shape in nftlayout.shapes(family).values() if not shape.remembers]
        sets = [(shape, list(driver.elements(family, NFT_TABLES[family], shape))) for shape in shapes]
        remembers = [(shape, []) for shape in nftlayout.shapes(family).values() if shape.remembers]
        return table_of(family, standing.chains, [*sets, *remembers])
    finally:
        driver.close()


def own_addresses(objects: Objects, ips: ServiceIps) -> set[str]:
    """Virtual addresses at which some Service is served, but for those of nodes."""
    found: set[str] = set()
    for asked in questions(objects):
        if judged(objects, asked).served:
            found.add(asked.destination)
    return found - {*NODE_ADDRESS.values(), "192.168.0.2", "fd00:aa::2"}


def check(table: Table, objects: Objects, asked: Asked, virtual: set[str], source: str, way: tuple[str, ...]) -> None:
    found = fates(table, lambda: Packet(source, asked.destination, asked.protocol, asked.port, way))
    said = judged(objects, asked)
    note = f"{asked} on {way}: {found}"
    if not said.served:
        if asked.destination in virtual:
            assert {fate.verdict for fate in found} == {"reject"}, note
        else:
            assert found == {Fate("pass", (asked.destination, asked.port), False, source, False)}, note
    elif said.refused_silently:
        assert {fate.verdict for fate in found} == {"drop"}, note
    elif not said.targets:
        assert {fate.verdict for fate in found} == {"reject"}, note
    else:
        assert {fate.verdict for fate in found} == {"pass"}, note
        assert all(fate.translated for fate in found), note
        assert {fate.target for fate in found} == said.targets, note
        for fate in found:
            check_source(asked, fate, source)


def check_source(asked: Asked, fate: Fate, source: str) -> None:
    """Who is outside gets the node's address where another node answers; nobody else's source is touched."""
    family = Family.IPV6 if ":" in source else Family.IPV4
    pods = ("10.1.0.", "fd00:1::")
    if fate.target[0] == source:
        assert fate.source == asked.destination
    elif source.startswith(pods) or fate.target[0].startswith(pods):
        assert fate.source == source
    else:
        assert fate.source == NODE_ADDRESS[family]


def check_everything(world: ProxyNode) -> None:
    objects = world.objects
    tables = {family: read(family) for family in Family}
    virtual = own_addresses(objects, ServiceIps(world.settings))
    for asked in questions(objects):
        family = Family.IPV6 if ":" in asked.destination else Family.IPV4
        check(tables[family], objects, asked, virtual, asked.source, FROM_OUTSIDE)
        if asked.inside:
            said = judged(objects, asked)
            from_node = Asked(NODE_ADDRESS[family], asked.destination, asked.protocol, asked.port, inside=True)
            if judged(objects, from_node) == said:
                check(tables[family], objects, from_node, virtual, from_node.source, FROM_NODE)


WITHIN = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@WITHIN
@given(objects=random_objects(), data=st.data())
def test_the_kernels_tables_do_what_the_judge_says(world: ProxyNode, objects: Objects, data: st.DataObject) -> None:
    """Each example is a change of the one before: the kernel never starts anew."""
    world.objects.items = dict(objects.items)
    done = world.sync()
    assert not done.failures and not done.repaired
    check_everything(world)
    more = data.draw(st.lists(random_change(objects), min_size=1, max_size=4))
    assert not world.sync(*more).failures
    check_everything(world)
    assert world.restart().writes == 0


def test_a_pod_that_is_chosen_by_itself_is_seen_from_the_service(world: ProxyNode) -> None:
    from support.proxyworld import pods, service, slices

    world.sync(service("web", 1), *slices("web", pods(9)))
    for family in Family:
        address = {Family.IPV4: "10.96.0.1", Family.IPV6: "fd00:96::1"}[family]
        pod = LOCAL_POD[family]
        found = fates(read(family), lambda a=address, p=pod: Packet(p, a, "tcp", 80, FROM_OUTSIDE))
        assert found == {Fate("pass", (pod, 8080), True, address, False)}


def test_pings_of_virtual_addresses_are_answered_here(world: ProxyNode) -> None:
    world.sync(Service(name="web", namespace="a", cluster_ips=("10.96.0.1",), ports=()))
    found = fates(read(Family.IPV4), lambda: Packet("10.1.0.9", "10.96.0.1", "icmp", 0, FROM_OUTSIDE))
    assert {fate.redirected for fate in found} == {False}, "a Service without a port has no address that is served"
