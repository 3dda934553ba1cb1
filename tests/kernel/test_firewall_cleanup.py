"""Clean-up of the firewall on the real kernel: ours goes, in both families and of both kinds; the rest is as before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.namespaces import Namespace

from kube_router.workers.firewall.cleanup import Leftovers, cleanup
from kube_router.workers.model import Family
from kube_router.workers.settings import Settings

KINDS = ("nft", "legacy")
PROGRAMS = tuple(f"{program}-{kind}" for kind in KINDS for program in ("iptables", "ip6tables"))
FOREIGN = "\n".join(
    f"""
{program} -P FORWARD DROP && {program} -P OUTPUT ACCEPT
{program} -N DOCKER-USER && {program} -A FORWARD -j DOCKER-USER && {program} -A DOCKER-USER -j RETURN
{program} -N KUBE-POD-FW-mine && {program} -A INPUT -j KUBE-POD-FW-mine
{program} -A INPUT -p tcp --dport 22 -m comment --comment 'he said "-j KUBE-NWPLCY-TAIL"' -j ACCEPT
"""
    for program in PROGRAMS
)
FOREIGN += """
ipset create blocklist hash:net && ipset add blocklist 192.0.2.0/24
ipset create inet6:KUBE-SRC-mine hash:ip family inet6 && ipset add inet6:KUBE-SRC-mine fd00::1
iptables-nft -A INPUT -m set --match-set blocklist src -j DROP
nft add table ip foreign && nft add chain ip foreign input '{ type filter hook input priority 0; }'
nft add table ip6 kube-router-filter-ipv4
"""
POD, POLICY, SET = "KUBE-POD-FW-GGLEU3V6G7XQKE6V", "KUBE-NWPLCY-DBBP4RDLGJXFAO2C", "KUBE-SRC-C2EUPKL23CCP4COF"


def ours(program: str) -> str:
    prefix = "inet6:" if program.startswith("ip6") else ""
    tops = " && ".join(
        f"{program} -N KUBE-ROUTER-{hook} && {program} -I {hook} 1 "
        f"-m comment --comment 'kube-router netpol - X' -j KUBE-ROUTER-{hook}"
        for hook in ("INPUT", "FORWARD", "OUTPUT")
    )
    return f"""
{tops}
for chain in {POD} {POLICY} KUBE-NWPLCY-DEFAULT KUBE-NWPLCY-COMMON KUBE-NWPLCY-TAIL; do {program} -N $chain; done
{program} -A KUBE-ROUTER-FORWARD -j {POD} && {program} -A {POD} -j {POLICY}
{program} -A {POLICY} -m set --match-set {prefix}{SET} src -g KUBE-NWPLCY-DEFAULT
{program} -A KUBE-NWPLCY-TAIL -m set ! --match-set {prefix}kube-router-local-pods src -j REJECT
{program} -A KUBE-ROUTER-FORWARD -j KUBE-NWPLCY-TAIL
"""


SETS = f"""
ipset create {SET} hash:ip timeout 0 && ipset add {SET} 10.0.0.1
ipset create inet6:{SET} hash:ip family inet6 timeout 0
ipset create kube-router-local-pods hash:ip timeout 0
ipset create inet6:kube-router-local-pods hash:ip family inet6 timeout 0
ipset create kube-router-node-ports-tcp bitmap:port range 0-65535
"""
TABLES = "nft add table ip kube-router-filter-ipv4; nft add table ip6 kube-router-filter-ipv6"
OURS = SETS + "".join(map(ours, PROGRAMS)) + TABLES


@pytest.fixture
def node(netns: Namespace) -> Iterator[Namespace]:
    netns.run(FOREIGN)
    with netns.enter():
        yield netns


def state(netns: Namespace) -> dict[str, str]:
    commands = {f"{program}-save": f"{program}-save | sed '/^#/d'" for program in PROGRAMS}
    commands |= {"ipset": "ipset save", "nft": "nft list ruleset"}
    return {name: netns.run(command) for name, command in commands.items()}


def chains(netns: Namespace, program: str) -> str:
    return netns.run(f"{program}-save -t filter | grep '^:KUBE' | grep -v mine", check=False)


def sets(netns: Namespace) -> set[str]:
    return set(netns.run("ipset list -n").split()) - {"blocklist", "inet6:KUBE-SRC-mine"}


def tables(netns: Namespace) -> set[str]:
    listed = netns.run("nft list tables | grep kube-router").splitlines()
    return {line.removeprefix("table ") for line in listed} - {"ip6 kube-router-filter-ipv4"}


def test_ours_goes_and_everything_else_is_byte_for_byte_as_before(node: Namespace) -> None:
    before = state(node)
    node.run(OURS)
    assert all(chains(node, program) for program in PROGRAMS)
    assert (len(sets(node)), len(tables(node))) == (5, 2)
    assert cleanup(Settings()) == []
    assert state(node) == before


def test_a_second_cleanup_has_nothing_to_do(node: Namespace) -> None:
    before = state(node)
    assert cleanup(Settings()) == []
    assert cleanup(Settings()) == []
    assert state(node) == before


def test_what_foreign_rules_use_stays_and_is_told_and_the_rest_goes(node: Namespace) -> None:
    node.run(OURS)
    node.run("iptables-nft -A DOCKER-USER -j KUBE-NWPLCY-TAIL")
    node.run("ip6tables-nft -A DOCKER-USER -m set --match-set inet6:kube-router-local-pods src -j ACCEPT")
    told = [str(failure) for failure in cleanup(Settings())]
    assert sorted(told) == [
        "ipset: ipset inet6:kube-router-local-pods: destroy: something still refers to it",
        "iptables: iptables-nft: chain KUBE-NWPLCY-TAIL: a rule of chain DOCKER-USER that is not ours jumps to it; "
        "it stays, empty",
    ]
    assert chains(node, "iptables-nft") == ":KUBE-NWPLCY-TAIL - [0:0]\n"
    assert "KUBE-NWPLCY-TAIL" not in node.run("iptables-nft-save | grep -- '^-A KUBE' || true")
    assert sets(node) == {"inet6:kube-router-local-pods"}
    assert not any(chains(node, program) for program in PROGRAMS[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_leftovers_of_another_kind_backend_and_family(node: Namespace, kind: str) -> None:
    node.run(OURS)
    removed = Leftovers((Family.IPV4,), kind).remove()  # type: ignore[arg-type]
    assert (removed.failures, removed.kept) == ((), ())
    assert [program for program in PROGRAMS if chains(node, program)] == [f"iptables-{kind}"]
    assert sets(node) == {SET, "kube-router-local-pods", "kube-router-node-ports-tcp"}
    assert tables(node) == set()


def test_leftovers_for_nftables(node: Namespace) -> None:
    node.run(OURS)
    removed = Leftovers((Family.IPV6,), None).remove()
    assert (removed.failures, removed.kept) == ((), ())
    assert not any(chains(node, program) for program in PROGRAMS)
    assert sets(node) == set()
    assert tables(node) == {"ip6 kube-router-filter-ipv6"}
