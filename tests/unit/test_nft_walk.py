"""The walker of nftables rules: it leads packets as netfilter does, and refuses all that it cannot vouch for."""

from __future__ import annotations

import pytest
from support.nft_walk import NftWalk
from support.walk import Walked, WalkError, WirePacket

SETS = """
    set one { type ipv4_addr; comment "netpol set"; elements = { 10.0.0.1 } }
    set nets { type ipv4_addr
        flags interval
        elements = { 10.0.0.0/9, 10.200.0.0-10.200.0.5,
                     11.0.0.0/8 } }
    set named { type ipv4_addr . inet_proto . inet_service
        elements = { 10.0.0.2 . tcp . 80 } }
    set itself { type ipv4_addr . ipv4_addr; elements = { 10.0.0.1 . 10.0.0.2 } }
    set ports { type inet_service; elements = { 80 } }
    set none { type ipv4_addr; }
    map by { type ipv4_addr : verdict; elements = { 10.0.0.2 comment "dev/b, of dev" : jump x, 10.0.0.3 : goto y } }
"""


def table(*rules: str, x: str = "", y: str = "") -> str:
    """A base chain with some rules and policy drop, chains x and y."""
    body = "\n".join(rules)
    return f"""
table ip test {{
    comment "rules for test"
{SETS}
    chain x {{
        comment "netpol x"
        {x}
    }}

    chain y {{
        {y}
    }}

    chain base {{
        comment "top"
        type filter hook forward priority filter; policy drop;
        {body}
    }}
}}
"""


def walk(*rules: str, x: str = "", y: str = "", **packet: object) -> Walked:
    """Lead a packet from 10.0.0.1 to 10.0.0.2 TCP 80 through the table."""
    given = {"hook": "FORWARD", "source": "10.0.0.1", "destination": "10.0.0.2", "port": 80, **packet}
    return NftWalk(table(*rules, x=x, y=y)).walk(WirePacket(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("match", "packet", "holds"),
    [
        ("ip saddr 10.0.0.1", {}, True),
        ("ip saddr != 10.0.0.0/24", {}, False),
        ("ip saddr @one", {}, True),
        ("ip daddr @one", {}, False),
        ("ip daddr != @one", {}, True),
        ("ip daddr @nets", {}, True),
        ("ip daddr @nets", {"destination": "10.200.0.6"}, False),
        ("ip saddr . ip daddr @itself", {}, True),
        ("ip daddr . meta l4proto . th dport @named", {}, True),
        ("ip daddr . meta l4proto . th dport @named", {"protocol": "udp"}, False),
        ("tcp dport 80", {}, True),
        ("tcp dport 80", {"protocol": "udp"}, False),
        ("tcp dport != 80", {"protocol": "udp"}, False),
        ("sctp dport 79-81", {"protocol": "sctp"}, True),
        ("tcp dport { 1, 70-90 }", {}, True),
        ("tcp dport @ports", {"port": 81}, False),
        ("meta l4proto udp", {}, False),
        ("meta l4proto { tcp, udp }", {}, True),
        ("icmp type echo-request", {"protocol": "icmp", "icmp": 8}, True),
        ("icmp type echo-request", {"port": 8, "icmp": 8}, False),
        ("ct state established,related", {}, False),
        ("ct state established,related", {"state": "RELATED"}, True),
        ("fib saddr type local", {"source_local": True}, True),
        ("fib daddr type != local", {}, True),
        ("meta mark & 0x00010000 == 0x00010000", {"mark": 0x30001}, True),
        ("meta mark & 0x00010000 != 0x00010000", {"mark": 0x30001}, False),
        ("meta mark 0x00000005", {"mark": 5}, True),
    ],
)
def test_every_match_holds_when_it_should_and_only_then(match: str, packet: dict[str, object], holds: bool) -> None:
    assert walk(f'{match} counter packets 3 bytes 180 accept comment "dev/a words"', **packet).allowed is holds


@pytest.mark.parametrize(
    ("rules", "x", "y", "verdict"),
    [
        (["jump x", "accept"], "return", "", "ACCEPT"),
        (["jump x", "accept"], "jump y\nreject", "", "REJECT"),
        (["jump x", "accept"], "goto y\nreject", "", "ACCEPT"),
        (["jump x", "accept"], "goto y\nreject", "return", "ACCEPT"),
        (["goto x", "accept"], "", "", "DROP"),
        (["return", "accept"], "", "", "DROP"),
        (["ip daddr vmap @by", "accept"], "tcp dport 80 reject", "", "REJECT"),
        (["ip daddr vmap @by", "accept"], "tcp dport 81 reject", "", "ACCEPT"),
        (["ip saddr vmap @by", "accept"], "reject", "reject", "ACCEPT"),
        (["meta mark set meta mark | 0x10000 goto x"], "meta mark & 0x10000 == 0x10000 accept", "", "ACCEPT"),
    ],
)
def test_chains_and_maps_lead_where_the_kernel_leads(rules: list[str], x: str, y: str, verdict: str) -> None:
    assert walk(*rules, x=x, y=y).verdict == verdict


def test_a_goto_of_a_map_leaves_nothing_behind() -> None:
    assert walk("ip daddr vmap @by", "accept", destination="10.0.0.3").verdict == "DROP"


def test_marks_paths_and_logs_are_told() -> None:
    refused = "meta mark & 0x00010000 == 0x00000000"
    rules = [
        "meta mark set meta mark & 0xfffcffff",
        "meta mark set meta mark | 0x00020000",
        f"{refused} limit rate 10/minute burst 10 packets log group 100",
        f"{refused} counter reject",
    ]
    walked = walk(*rules, mark=0x30001)
    assert (walked.verdict, walked.mark, walked.logged, walked.looked) == ("REJECT", 0x20001, True, 4)
    assert walked.path[-1] == f"{refused} counter reject"


def test_a_hook_without_a_chain_accepts() -> None:
    assert NftWalk(table()).walk(WirePacket("INPUT", "10.0.0.1", "10.0.0.2")).allowed


@pytest.mark.parametrize(
    "rule",
    [
        "jump missing",
        "goto base",
        "ip saddr @missing accept",
        "ip saddr @ports accept",
        "ip saddr @named accept",
        "ip saddr @by accept",
        "ip saddr vmap @one",
        "ip6 saddr fd00::1 accept",
        "ip saddr fd00::1 accept",
        "ip saddr . ip daddr 10.0.0.1 accept",
        "th dport 80 accept",
        "tcp dport 90-80 accept",
        "tcp dport http accept",
        "tcp sport 80 accept",
        "icmpv6 type echo-request accept",
        "icmp type 77 accept",
        "ct state untracked accept",
        "ct mark 1 accept",
        "fib daddr type unicast accept",
        "iifname eth0 accept",
        "limit rate 1/second accept",
        "accept drop",
        "accept counter",
        "queue",
        'comment "first" accept',
        f'accept comment "{"x" * 128}"',
        "meta mark set ct mark",
        'log prefix "x"',
        "dnat to 10.0.0.1",
    ],
)
def test_what_it_does_not_know_and_what_the_kernel_refuses_is_an_error(rule: str) -> None:
    with pytest.raises(WalkError):
        walk(rule)


@pytest.mark.parametrize(
    "line",
    [
        "set one { type ipv4_addr; }",
        "set s { }",
        "set s { type ipv6_addr; }",
        "set s { type ipv4_addr; timeout 5s; }",
        "set s { type ipv4_addr; flags timeout; }",
        "set s { type ipv4_addr; elements = { 10.0.0.0/8 } }",
        "set s { type ipv4_addr; elements = { 10.0.0.1, 10.0.0.1 } }",
        "set s { type ipv4_addr; elements = { 10.0.0.1 . tcp } }",
        "set s { type ipv4_addr; elements = { 10.0.0.1 timeout 5s } }",
        "set s { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 10.1.0.0/16 } }",
        "set s { type inet_service; elements = { 65536 } }",
        "map s { type ipv4_addr : mark; }",
        "map s { type ipv4_addr : verdict; elements = { 10.0.0.1 : accept } }",
        "map s { type ipv4_addr : verdict; elements = { 10.0.0.1 : jump missing } } chain z { ip saddr vmap @s; }",
        "chain z { jump z; }",
        "chain z { type nat hook forward priority 0; policy accept; }",
        "chain z { type filter hook prerouting priority 0; policy accept; }",
        "flowtable f { }",
    ],
)
def test_sets_and_chains_that_the_kernel_refuses_are_an_error(line: str) -> None:
    with pytest.raises(WalkError):
        NftWalk(f"table ip test {{\n{SETS}\nchain x {{ }}\nchain y {{ }}\n{line}\n}}")


def test_two_base_chains_of_one_hook_are_no_question_for_one_walk() -> None:
    chains = "".join(f"chain {name} {{ type filter hook input priority 0; policy accept; }}\n" for name in "ab")
    with pytest.raises(WalkError):
        NftWalk(f"table ip test {{\n{chains}}}").walk(WirePacket("INPUT", "10.0.0.1", "10.0.0.2"))


def test_chains_nest_fifteen_deep_and_no_deeper() -> None:
    def nested(depth: int) -> str:
        chains = [f"chain c{number} {{ jump c{number + 1} }}\n" for number in range(1, depth)]
        base = "chain base { type filter hook input priority 0; policy accept; jump c1; }\n"
        return f"table ip test {{\n{''.join(chains)}chain c{depth} {{ }}\n{base}}}"

    NftWalk(nested(15))
    with pytest.raises(WalkError, match="nested"):
        NftWalk(nested(16))
