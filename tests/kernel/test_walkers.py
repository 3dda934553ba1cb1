"""The walkers against the real kernel: the same rules, real packets there, walked packets here, the same fate.

Each rule set is loaded by the real programs and walked in the words in which they print it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.iptables_walk import IptablesWalk
from support.nft_walk import NftWalk
from support.podnet import PodNet, podnet
from support.probes import Flow
from support.walk import Walked, WirePacket

from kube_router.workers.model import Family

PROGRAMS = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}
Walk = Callable[[WirePacket], Walked]


@pytest.fixture(scope="module")
def standing() -> Iterator[PodNet]:
    with podnet("abc", "x") as net:
        yield net


@pytest.fixture
def net(standing: PodNet) -> Iterator[PodNet]:
    standing.flush()
    yield standing
    standing.flush()


def flows(net: PodNet, family: Family) -> list[Flow]:
    """Everything through node n1: bridged, routed, to it and from it, on several ports."""
    pairs = [
        (one, two) for one in ("a", "b", "c", "client", "x", "n1") for two in ("a", "b", "c", "x", "n1") if one != two
    ]
    return [
        Flow(net[one].of(family), net[two].of(family), protocol, port)
        for one, two in pairs
        for protocol, ports in {"tcp": (80, 8080, 8081), "udp": (80, 8080), "sctp": (80, 8080), "icmp": (0,)}.items()
        for port in ports
    ]


def disagreements(net: PodNet, family: Family, walk: Walk) -> tuple[list[str], int]:
    """Flows whose real fate differs from the walked one, and how many were blocked."""
    wanted = flows(net, family)
    walked: dict[Flow, bool] = {}
    told: dict[Flow, str] = {}
    for flow in wanted:
        crossing = net.crossing(flow, "n1")
        assert crossing is not None
        fates = [walk(packet) for packet in crossing]
        walked[flow] = all(fate.allowed for fate in fates)
        told[flow] = "; ".join(map(str, fates))
    answers = net.probes.try_all(wanted)
    wrong = [flow for flow in wanted if (answers[flow] == "open") != walked[flow]]
    if wrong:  # a busy machine answers late
        again = net.probes.try_all(wrong, 1.5)
        wrong = [flow for flow in wrong if (again[flow] == "open") != walked[flow]]
    return [f"{flow} is {answers[flow]}: {told[flow]}" for flow in wrong], list(walked.values()).count(False)


SETS = """
create one hash:ip timeout 0 family {inet}
add one {a}
create many hash:net timeout 0 family {inet}
add many {net_a}
add many {client}
create triples hash:ip,port timeout 0 family {inet}
add triples {b},tcp:80
add triples {b},udp:8080
add triples {c},sctp:80
add triples {node},tcp:8080
create empty hash:ip timeout 0 family {inet}
create ports bitmap:port range 0-65535
add ports 80
add ports 8081
"""

RULES = {
    "goto-returns-to-the-caller-s-caller": """
        :OUTER - [0:0]
        :INNER - [0:0]
        :LEAF - [0:0]
        -A {hook} -j OUTER
        -A {hook} -p tcp --dport 8080 -j DROP
        -A OUTER -j INNER
        -A OUTER -p udp --dport 80 -j DROP
        -A INNER -p tcp -g LEAF
        -A INNER -p udp --dport 8080 -g LEAF
        -A INNER -p sctp --dport 80 -j DROP
        -A INNER -j RETURN
        -A INNER -j DROP
        -A LEAF -p tcp --dport 80 -j RETURN
        -A LEAF -p tcp --dport 8081 -j REJECT
        -A LEAF -d {b} -j DROP
    """,
    "goto-in-a-built-in-chain-ends-in-its-policy": """
        :{hook} DROP [0:0]
        :LEAF - [0:0]
        -A {hook} -p tcp -g LEAF
        -A {hook} -p udp --dport 80 -j RETURN
        -A {hook} -j ACCEPT
        -A LEAF -p tcp --dport 80 -j ACCEPT
    """,
    "marks": """
        :SETS - [0:0]
        -A {hook} -j MARK --set-xmark 0x30000/0x30000
        -A {hook} -j MARK --set-xmark 0x0/0x10000
        -A {hook} -m mark ! --mark 0x20000/0x30000 -j DROP
        -A {hook} -p tcp -j SETS
        -A {hook} -m mark --mark 0x10000/0x10000 -j ACCEPT
        -A {hook} -p udp -j MARK --set-xmark 0x20001/0x20001
        -A {hook} -m mark --mark 0x20001/0x20001 -j ACCEPT
        -A {hook} -j REJECT
        -A SETS -p tcp --dport 80 -j MARK --set-xmark 0x10000/0x10000
        -A SETS -m comment --comment "odd \\"words\\" 'here'" {refused} {log}
        -A SETS {refused} -j REJECT
    """,
    "sets": """
        -A {hook} -m set --match-set one src -m set ! --match-set many dst -j DROP
        -A {hook} -m set --match-set triples dst,dst -j ACCEPT
        -A {hook} -m set --match-set empty src -j DROP
        -A {hook} -m set ! --match-set empty dst -p tcp -m set --match-set many src -j REJECT
        -A {hook} -p udp --dport 80:8080 -d {c} -j DROP
        -A {hook} -p sctp -d {c} -j DROP
    """,
    "node-ports": """
        -A {hook} -p tcp -m addrtype --dst-type LOCAL -m set --match-set ports dst -j ACCEPT
        -A {hook} -p udp -m set --match-set ports dst -j ACCEPT
        -A {hook} -p sctp -m set --match-set ports dst -j DROP
        -A {hook} -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 8080,9000:9100 -j REJECT
        -A {hook} -m addrtype --src-type LOCAL -d {b} -j DROP
        -A {hook} -p udp -m addrtype ! --dst-type LOCAL -j DROP
    """,
    "icmp": """
        -A {hook} -p {icmp} --{icmp_option}-type echo-request -s {a} -j DROP
        -A {hook} -p {icmp} --{icmp_option}-type echo-reply -s {b} -j DROP
        -A {hook} -p udp -s {c} -j DROP
    """,
    "bridged": """
        -A {hook} -m physdev --physdev-is-bridged -p tcp -j DROP
        -A {hook} ! -s {a} ! -d {a} -p udp -j REJECT
    """,
}


HOOKS = ("INPUT", "FORWARD", "OUTPUT")


def words(net: PodNet, family: Family) -> dict[str, str]:
    """What stands for the braces of rules and sets."""
    six = family is Family.IPV6
    return {
        "inet": "inet6" if six else "inet",
        "node": "fd00:244:1::1" if six else "10.244.1.1",
        "net_a": "fd00:244:1::8/125" if six else "10.244.1.8/30",
        "refused": "-m mark ! --mark 0x10000/0x10000",
        "log": "-j NFLOG --nflog-group 100 -m limit --limit 10/minute --limit-burst 10",
        "icmp": "ipv6-icmp" if six else "icmp",
        "icmp_option": "icmpv6" if six else "icmp",
        **{name: net[name].of(family) for name in ("a", "b", "c", "client")},
    }


def rendered(net: PodNet, family: Family, rules: str) -> str:
    """A rule set for ``iptables-restore``, the same in all three hooks; answers, and neighbours, come through."""
    given = words(net, family)
    lines = [line.strip() for line in rules.strip().splitlines()]
    keep = ["-A {hook} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"]
    if family is Family.IPV6:
        keep += [f"-A {{hook}} -p ipv6-icmp --icmpv6-type {number} -j ACCEPT" for number in (135, 136)]
    heads = [line for line in lines if line.startswith(":")]
    ordered = heads + keep + [line for line in lines if not line.startswith(":")]
    spread = [line.format(hook=hook, **given) for line in ordered for hook in HOOKS]
    return "\n".join(["*filter", *dict.fromkeys(spread), "COMMIT", ""])


def load_iptables(net: PodNet, family: Family, kind: str, rules: str) -> IptablesWalk:
    """Load one rule set on node n1 and read it back into a walker."""
    node = net["n1"].namespace
    node.run("ipset restore", stdin=SETS.format(**words(net, family)))
    program = f"{PROGRAMS[family]}-{kind}"
    node.run(f"{program}-restore", stdin=rendered(net, family, rules))
    return IptablesWalk(family, node.run(f"{program}-save -t filter"), node.run("ipset save"))


@pytest.mark.parametrize("family", list(Family), ids=str)
@pytest.mark.parametrize("kind", ["nft", "legacy"])
@pytest.mark.parametrize("name", RULES)
def test_iptables_rules_do_to_packets_what_the_walker_says(net: PodNet, name: str, kind: str, family: Family) -> None:
    walker = load_iptables(net, family, kind, RULES[name])
    wrong, blocked = disagreements(net, family, walker.walk)
    assert wrong == []
    assert 0 < blocked < len(flows(net, family)), "a rule set that blocks nothing, or everything, proves nothing"


NFT_SETS = """
    set one {{ type {addr}; elements = {{ {a} }} }}
    set many {{ type {addr}; flags interval; elements = {{ {net_a}, {client} }} }}
    set triples {{ type {addr} . inet_proto . inet_service; elements = {{
        {b} . tcp . 80, {b} . udp . 8080, {c} . sctp . 80, {node} . tcp . 8080 }} }}
    set itself {{ type {addr} . {addr}; elements = {{ {a} . {b}, {c} . {c} }} }}
    set ports {{ type inet_service; elements = {{ 80, 8081 }} }}
    set empty {{ type {addr}; }}
"""
NFT_RULES = {
    "goto-and-return": """
        chain leaf {{
            tcp dport 80 counter return
            tcp dport 8081 reject
            {ip} daddr {b} drop
        }}
        chain inner {{
            meta l4proto tcp counter goto leaf
            udp dport 8080 goto leaf
            sctp dport 80 drop
            return
            drop
        }}
        chain outer {{
            jump inner
            udp dport 80 drop
        }}
        chain base {{
            {hook} policy accept;
            {keep}
            jump outer comment "here"
            tcp dport 8080 drop
        }}
    """,
    "goto-in-a-base-chain-ends-in-its-policy": """
        chain leaf {{
            tcp dport 80 accept
        }}
        chain base {{
            {hook} policy drop;
            {keep}
            meta l4proto tcp goto leaf
            udp dport 80 return
            accept
        }}
    """,
    "marks": """
        chain check {{
            tcp dport 80 meta mark set meta mark | 0x10000
            meta mark & 0x10000 == 0x0 limit rate 10/minute burst 10 packets log group 100
            meta mark & 0x10000 == 0x0 counter reject
        }}
        chain base {{
            {hook} policy accept;
            {keep}
            meta mark set meta mark | 0x30000
            meta mark set meta mark & 0xfffeffff
            meta mark & 0x30000 != 0x20000 drop
            meta l4proto tcp jump check
            meta mark & 0x10000 == 0x10000 accept
            meta l4proto udp meta mark set meta mark | 0x1
            meta mark 0x20001 accept
            reject
        }}
    """,
    "sets": """
        chain base {{
            {hook} policy accept;
            {keep}
            {ip} saddr @one {ip} daddr != @many drop
            {ip} daddr . meta l4proto . th dport @triples accept
            {ip} saddr @empty drop
            {ip} daddr != @empty meta l4proto tcp {ip} saddr @many reject
            {ip} saddr . {ip} daddr @itself meta l4proto udp drop
            udp dport 8080-8081 {ip} daddr {c} drop
            meta l4proto {{ sctp, tcp }} {ip} daddr {c} drop
        }}
    """,
    "ports-and-local-addresses": """
        chain base {{
            {hook} policy accept;
            {keep}
            fib daddr type local tcp dport @ports accept
            udp dport @ports accept
            sctp dport @ports drop
            fib daddr type local tcp dport {{ 8080, 9000-9100 }} reject
            fib saddr type local {ip} daddr {b} drop
            fib daddr type != local meta l4proto udp drop
            tcp dport != 80 drop
        }}
    """,
    "icmp": """
        chain base {{
            {hook} policy accept;
            {icmp_type} type echo-request {ip} saddr {a} drop
            {icmp_type} type echo-reply {ip} saddr {b} drop
            ct state established,related counter packets 0 bytes 0 accept
            ct state != new drop
            ct state new meta l4proto udp {ip} saddr {c} drop
        }}
    """,
    "verdict-maps": """
        chain to-b {{
            tcp dport 80 return
            meta l4proto {{ tcp, udp }} drop
        }}
        chain to-c {{
            meta l4proto sctp reject
        }}
        map by {{ type {addr} : verdict; elements = {{ {b} comment "dev/b" : jump to-b, {c} : goto to-c }} }}
        chain base {{
            {hook} policy accept;
            {keep}
            {ip} daddr vmap @by
            tcp dport 80 {ip} daddr {b} drop
            udp dport 80 drop
        }}
    """,
}


def load_nft(net: PodNet, family: Family, rules: str, hook: str) -> NftWalk:
    """Load one rule set on node n1, in one hook, and read it back into a walker."""
    ip = "ip6" if family is Family.IPV6 else "ip"
    given = words(net, family) | {
        "ip": ip,
        "addr": "ipv6_addr" if family is Family.IPV6 else "ipv4_addr",
        "icmp_type": "icmpv6" if family is Family.IPV6 else "icmp",
        "hook": f"type filter hook {hook.lower()} priority filter;",
        "keep": "ct state established,related accept",
    }
    if family is Family.IPV6:
        given["keep"] += "\nicmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"
    body = (NFT_SETS + rules).format(**given)
    node = net["n1"].namespace
    node.run("nft -f -", stdin=f"table {ip} test {{\n{body}\n}}\n")
    return NftWalk(node.run(f"nft list table {ip} test"))


@pytest.mark.parametrize("family", list(Family), ids=str)
@pytest.mark.parametrize("name", NFT_RULES)
def test_nft_rules_do_to_packets_what_the_walker_says(net: PodNet, name: str, family: Family) -> None:
    for hook in ("FORWARD", "INPUT", "OUTPUT") if "local" in name else ("FORWARD",):
        walker = load_nft(net, family, NFT_RULES[name], hook)
        wrong, blocked = disagreements(net, family, walker.walk)
        assert wrong == []
        assert 0 < blocked < len(flows(net, family)), "a rule set that blocks nothing, or everything, proves nothing"
        net.flush()


@pytest.mark.parametrize("family", list(Family), ids=str)
def test_the_comparison_sees_one_wrong_rule(net: PodNet, family: Family) -> None:
    walker = load_iptables(net, family, "nft", RULES["sets"])
    net["n1"].namespace.run(f"{PROGRAMS[family]}-nft -I FORWARD -p sctp -d {net['b'].of(family)} --dport 80 -j DROP")
    wrong, _ = disagreements(net, family, walker.walk)
    assert len(wrong) == 4  # from a, c, client and x


@pytest.mark.parametrize("family", list(Family), ids=str)
def test_the_comparison_of_nft_sees_one_wrong_element(net: PodNet, family: Family) -> None:
    walker = load_nft(net, family, NFT_RULES["sets"], "FORWARD")
    ip = "ip6" if family is Family.IPV6 else "ip"
    net["n1"].namespace.run(f"nft delete element {ip} test triples {{ {net['b'].of(family)} . tcp . 80 }}")
    wrong, _ = disagreements(net, family, walker.walk)
    assert len(wrong) in (2, 3)  # the sources in the set that the next rules reject
    assert all(f" -> {net['b'].of(family)} tcp 80 is refused" in line or " is silent" in line for line in wrong)
