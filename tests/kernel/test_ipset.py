"""The set driver on the real kernel: large sets, few messages, the largest networks."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

import pytest
from support.namespaces import Namespace

from kube_router.workers.kernel.ipset import SetDriver
from kube_router.workers.model import Family
from kube_router.workers.nodefacts import NodeFacts
from kube_router.workers.router.egress import desired_sets, set_specs
from kube_router.workers.rulefacts import Members, SetName, SetSpec, plan_set

COUNT = 100_000


@pytest.fixture
def inside(netns: Namespace) -> Iterator[Namespace]:
    with netns.enter():
        yield netns


@pytest.mark.parametrize("family", list(Family), ids=str)
def test_a_hundred_thousand_members_and_one_change(inside: Namespace, family: Family) -> None:
    base = ipaddress.ip_address("100.0.0.0" if family is Family.IPV4 else "fd00::")
    spec = SetSpec(SetName("large"), "hash:net", family, 1 << 17)
    texts = [f"{base + 4 * number}/{family.bits - 2}" for number in range(COUNT)]
    members = Members.of(family, texts)
    driver = SetDriver()
    driver.apply(plan_set(spec, None, members))
    assert inside.run("ipset -t list large | grep entries").split()[-1] == str(COUNT)
    assert driver.observe(spec) == members
    writes = driver.writes
    driver.apply(plan_set(spec, members, Members.of(family, texts[1:])))
    assert driver.writes == writes + 1
    assert driver.count(spec) == COUNT - 1


@pytest.mark.parametrize(("count", "buckets"), [(1, "1024"), (2048, "1024"), (40_000, "32768")])
def test_a_set_is_made_as_large_as_it_will_be(inside: Namespace, count: int, buckets: str) -> None:
    """The kernel takes the next power of two above half of the members; by itself it would stop at a smaller one."""
    base = ipaddress.ip_address("100.0.0.0")
    spec = SetSpec(SetName("sized"), "hash:ip", Family.IPV4)
    members = Members.of(Family.IPV4, [str(base + 3 * number) for number in range(count)])
    driver = SetDriver()
    driver.apply(plan_set(spec, None, members))
    assert f" hashsize {buckets} maxelem 65536 " in inside.run("ipset list -t sized")
    driver.replace(spec, members, SetName("spare"))
    assert f" hashsize {buckets} maxelem 65536 " in inside.run("ipset list -t sized")


@pytest.mark.parametrize("family", list(Family), ids=str)
def test_a_pod_cidr_of_the_whole_family_becomes_two_halves(inside: Namespace, family: Family) -> None:
    whole = ipaddress.ip_network("0.0.0.0/0" if family is Family.IPV4 else "::/0")
    node = NodeFacts("n1", "", whole[1], (whole[1],), (whole,), None, ())
    driver = SetDriver()
    for spec, texts in desired_sets(family, [node]).items():
        driver.apply(plan_set(spec, None, Members.of(family, texts)))
    halves = "0.0.0.0/1 128.0.0.0/1" if family is Family.IPV4 else "::/1 8000::/1"
    _, pods = set_specs(family)
    shown = inside.run(f"ipset list {pods.name} | grep timeout | grep -v Header").split()
    assert {word for word in shown if "/" in word} == set(halves.split())


def test_a_set_of_an_earlier_version_with_other_options_is_kept(inside: Namespace) -> None:
    """Another size, counters and a comment are options of the same type: nothing is made anew."""
    inside.run("ipset create kube-router-node-ips hash:ip timeout 0 counters comment maxelem 99")
    inside.run("ipset add kube-router-node-ips 10.0.0.1 comment here; ipset add kube-router-node-ips 10.0.0.9")
    spec, _ = set_specs(Family.IPV4)
    driver = SetDriver()
    driver.apply(plan_set(spec, driver.observe(spec), Members.of(Family.IPV4, ["10.0.0.1", "10.0.0.2"])))
    assert driver.observe(spec) == Members.of(Family.IPV4, ["10.0.0.1", "10.0.0.2"])
    assert "maxelem 99" in inside.run("ipset list kube-router-node-ips")
