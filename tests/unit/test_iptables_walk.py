"""The walker of iptables rules: it leads packets as netfilter does, and refuses all that it cannot vouch for."""

from __future__ import annotations

import pytest
from support.iptables_walk import IptablesWalk, parse_sets, tokens
from support.walk import Walked, WalkError, WirePacket

from kube_router.workers.model import Family

SETS = "\n".join(
    [
        "create one hash:ip family inet hashsize 1024 maxelem 65536 timeout 0 bucketsize 12 initval 0x1",
        "add one 10.0.0.1 timeout 0",
        "create nets hash:net timeout 0",
        "add nets 10.0.0.0/8",
        "create named hash:ip,port timeout 0",
        "add named 10.0.0.2,tcp:80",
        "create ports bitmap:port range 0-65535",
        "add ports 30080",
        "create inet6:one hash:ip timeout 0 family inet6",
        "add inet6:one fd00::1",
    ]
)


def table(*lines: str) -> str:
    """Chains X and Y and some rules."""
    return "\n".join(["*filter", ":FORWARD DROP [0:0]", ":X - [0:0]", ":Y - [0:0]", *lines, "COMMIT"])


def walk(*lines: str, family: Family = Family.IPV4, **packet: object) -> Walked:
    """Lead a packet from 10.0.0.1 to 10.0.0.2, or the same in IPv6, through FORWARD, whose policy is DROP."""
    base = "fd00::" if family is Family.IPV6 else "10.0.0."
    given = {"hook": "FORWARD", "source": f"{base}1", "destination": f"{base}2", "port": 80, **packet}
    return IptablesWalk(family, table(*lines), SETS).walk(WirePacket(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "packet", "matches"),
    [
        ("-s 10.0.0.1/32", {}, True),
        ("! -s 10.0.0.1/32", {}, False),
        ("-d 10.0.0.0/30", {}, True),
        ("-p tcp -m tcp --dport 80", {}, True),
        ("-p tcp -m tcp --dport 80", {"protocol": "udp"}, False),
        ("-p sctp --dport 79:81", {"protocol": "sctp"}, True),
        ("-p tcp ! --dport 80", {}, False),
        ("-p tcp -m multiport --dports 1,70:90", {}, True),
        ("-p tcp -m multiport --dports 1,81:90", {}, False),
        ("-m set --match-set one src", {}, True),
        ("-m set ! --match-set one src", {}, False),
        ("-m set --match-set one dst", {}, False),
        ("-m set --match-set nets dst", {"destination": "11.0.0.1"}, False),
        ("-m set --match-set named dst,dst", {}, True),
        ("-m set --match-set named dst,dst", {"protocol": "udp"}, False),
        ("-m set --match-set named dst,dst", {"port": 81}, False),
        ("-m set --match-set ports dst", {"port": 30080}, True),
        ("-m set --match-set ports dst", {"port": 30080, "protocol": "sctp"}, False),
        ("-m addrtype --src-type LOCAL", {"source_local": True}, True),
        ("-m addrtype ! --dst-type LOCAL", {}, True),
        ("-m mark --mark 0x10000/0x10000", {"mark": 0x30001}, True),
        ("-m mark ! --mark 0x10000/0x10000", {"mark": 0x30001}, False),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", {"state": "RELATED"}, True),
        ("-m conntrack --ctstate INVALID", {}, False),
        ("-p icmp -m icmp --icmp-type 8", {"protocol": "icmp", "icmp": 8}, True),
        ("-p icmp --icmp-type time-exceeded", {"protocol": "icmp", "icmp": 3}, False),
        ("-m physdev --physdev-is-bridged", {"bridged": True}, True),
        ('-m comment --comment "two words \\"quoted\\""', {}, True),
    ],
)
def test_every_match_holds_when_it_should_and_only_then(rule: str, packet: dict[str, object], matches: bool) -> None:
    walked = walk(f"-A FORWARD {rule} -j ACCEPT", **packet)
    assert walked.allowed is matches
    assert len(walked.path) == matches


def test_icmp_of_ipv6_and_its_sets() -> None:
    rule = "-A FORWARD -p ipv6-icmp -m icmp6 --icmpv6-type 128 -m set --match-set inet6:one src -j ACCEPT"
    assert walk(rule, family=Family.IPV6, protocol="ipv6-icmp", icmp=128).allowed
    assert not walk(rule, family=Family.IPV6, protocol="ipv6-icmp", icmp=129).allowed


@pytest.mark.parametrize(
    ("rules", "verdict"),
    [
        (["-A FORWARD -j X", "-A FORWARD -j ACCEPT", "-A X -j RETURN", "-A X -j DROP"], "ACCEPT"),
        (["-A FORWARD -j X", "-A FORWARD -j ACCEPT", "-A X -j Y", "-A X -j REJECT"], "REJECT"),
        # A goto leaves nothing behind in its chain: at its end the packet is back where that chain was called.
        (["-A FORWARD -j X", "-A FORWARD -j ACCEPT", "-A X -g Y", "-A X -j REJECT"], "ACCEPT"),
        (["-A FORWARD -j X", "-A FORWARD -j ACCEPT", "-A X -g Y", "-A X -j REJECT", "-A Y -j RETURN"], "ACCEPT"),
        (["-A FORWARD -g X", "-A FORWARD -j ACCEPT"], "DROP"),
        (["-A FORWARD -j RETURN", "-A FORWARD -j ACCEPT"], "DROP"),
        (["-A FORWARD -j NFLOG --nflog-group 100", "-A FORWARD -j REJECT"], "REJECT"),
    ],
)
def test_chains_lead_where_the_kernel_leads(rules: list[str], verdict: str) -> None:
    assert walk(*rules).verdict == verdict


def test_marks_are_set_under_their_mask() -> None:
    rules = ["-A FORWARD -j MARK --set-xmark 0x10000/0x10000", "-A FORWARD -j MARK --set-xmark 0x0/0x20000"]
    assert walk(*rules, mark=0x20005).mark == 0x10005
    assert walk("-A FORWARD -j MARK --set-mark 0x20000/0x30000", mark=0x10001).mark == 0x20001


def test_the_path_tells_the_rules_that_matched_and_how_many_were_looked_at() -> None:
    walked = walk("-A FORWARD -p udp -j DROP", "-A FORWARD -j X", "-A X -p tcp -j NFLOG", "-A X -j ACCEPT")
    assert walked.path == ("-A FORWARD -j X", "-A X -p tcp -j NFLOG", "-A X -j ACCEPT")
    assert (walked.looked, walked.logged) == (4, True)


@pytest.mark.parametrize(
    "rule",
    [
        "-A FORWARD -j MISSING",
        "-A FORWARD -g MISSING",
        "-A FORWARD -j INPUT",
        "-A MISSING -j ACCEPT",
        "-A X -j X",
        "-A FORWARD -m set --match-set missing src -j ACCEPT",
        "-A FORWARD -m set --match-set one src,dst -j ACCEPT",
        "-A FORWARD -m set --match-set named dst -j ACCEPT",
        "-A FORWARD -m set --match-set inet6:one src -j ACCEPT",
        "-A FORWARD --match-set one src -j ACCEPT",
        "-A FORWARD -m recent --set -j ACCEPT",
        "-A FORWARD --dport 80 -j ACCEPT",
        "-A FORWARD -p icmp --dport 80 -j ACCEPT",
        "-A FORWARD -p tcp --dport 81:80 -j ACCEPT",
        "-A FORWARD -p tcp --dport 65536 -j ACCEPT",
        "-A FORWARD -p tcp --sport 80 -j ACCEPT",
        "-A FORWARD -p tcp -m multiport --dports " + ",".join(map(str, range(16))) + " -j ACCEPT",
        "-A FORWARD -p udp -m tcp --dport 1 -j ACCEPT",
        "-A FORWARD -i eth0 -j ACCEPT",
        "-A FORWARD -s fd00::1/128 -j ACCEPT",
        "-A FORWARD -s 10.0.0.1/8 -j ACCEPT",
        "-A FORWARD -p ipv6-icmp --icmpv6-type 128 -j ACCEPT",
        "-A FORWARD -m limit --limit 10/min -j ACCEPT",
        "-A FORWARD -m addrtype --src-type UNICAST -j ACCEPT",
        "-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT",
        "-A FORWARD ! -j ACCEPT",
        "-A FORWARD -j MARK --or-mark 1",
        "-A FORWARD -j LOG",
        "-A FORWARD -j REJECT --reject-with icmp6-port-unreachable",
        "-A FORWARD -j ACCEPT -j DROP",
        f'-A FORWARD -m comment --comment "{"x" * 256}" -j ACCEPT',
        '-A FORWARD -m comment --comment "open -j ACCEPT',
        "-N CHAIN",
        ":X - [0:0]",
        ":THIS-NAME-HAS-MORE-THAN-28-BYTES - [0:0]",
        "COMMIT",
    ],
)
def test_what_it_does_not_know_and_what_the_kernel_refuses_is_an_error(rule: str) -> None:
    with pytest.raises(WalkError):
        walk(rule)


def test_chains_nest_fifteen_deep_and_no_deeper() -> None:
    def nested(depth: int) -> str:
        names = [f"C{number}" for number in range(depth)]
        rules = [f"-A {one} -j {two}" for one, two in zip(["INPUT", *names], names, strict=False)]
        return "\n".join(["*filter", *(f":{name} - [0:0]" for name in names), *rules, "COMMIT"])

    IptablesWalk(Family.IPV4, nested(15))
    with pytest.raises(WalkError, match="nested"):
        IptablesWalk(Family.IPV4, nested(16))


@pytest.mark.parametrize(
    "lines",
    [
        "create s hash:mac",
        "create s hash:ip timeout 10",
        "create s bitmap:port range 1-5",
        "create s hash:ip counters",
        "create s hash:ip\ncreate s hash:ip",
        "add s 10.0.0.1",
        "create s hash:net\nadd s 0.0.0.0/0",
        "create s hash:net\nadd s 10.0.0.1/8",
        "create s hash:net\nadd s 10.0.0.0/8 nomatch",
        "create s hash:ip\nadd s 10.0.0.0/8",
        "create s hash:ip\nadd s fd00::1",
        "create s hash:ip,port\nadd s 10.0.0.1",
        "create s hash:ip,port\nadd s 10.0.0.1,dccp:8",
        "create s hash:ip,port family inet6\nadd s 10.0.0.1,tcp:8",
        "create s hash:ip maxelem 1\nadd s 10.0.0.1\nadd s 10.0.0.2",
        f"create {'s' * 32} hash:ip",
        "flush s",
    ],
)
def test_sets_that_the_kernel_refuses_are_an_error(lines: str) -> None:
    with pytest.raises((WalkError, ValueError)):
        parse_sets(lines)


def test_quoting_is_that_of_iptables_save() -> None:
    assert tokens(r'-A X -m comment --comment "a \"b\" \\ \'c\'" -j Y') == [
        *["-A", "X", "-m", "comment", "--comment"],
        "a \"b\" \\ 'c'",
        "-j",
        "Y",
    ]


def test_a_packet_of_the_other_family_is_no_question_for_a_table() -> None:
    with pytest.raises(WalkError):
        IptablesWalk(Family.IPV4, "").walk(WirePacket("INPUT", "fd00::1", "fd00::2"))
