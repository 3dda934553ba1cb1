"""The Cython modules against their plain-Python twins."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterator

from run import Baseline, Result, median_of
from support import twin_ipset, twin_rulehash, twin_tunnelname

from kube_router._fast import ipset, rulehash, tunnelname

MEMBERS = 100_000


def seconds(work: Callable[[], object]) -> Callable[[], float]:
    """A measurement of one call."""

    def measure() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return measure


def run() -> Iterator[Result]:
    """Packing, diffing and encoding of a big set; rule and tunnel hashes."""
    v4 = [f"{ipaddress.IPv4Address(0x0A000000 + 3 * i)}/32" for i in range(MEMBERS)]
    changed = [*v4[100:], *(f"192.168.{i}.0/24" for i in range(100))]

    def bulk(module: object) -> Callable[[], object]:
        def work() -> object:
            actual = module.pack_members(v4, 4)  # type: ignore[attr-defined]
            desired = module.pack_members(changed, 4)  # type: ignore[attr-defined]
            add, delete = module.diff_members(actual, desired, 4)  # type: ignore[attr-defined]
            assert len(add) == len(delete) == 500
            return module.adt_payloads(desired, 4, True)  # type: ignore[attr-defined]

        return work

    slow = median_of(seconds(bulk(twin_ipset)), 3)
    fast = median_of(seconds(bulk(ipset)))
    shape = f"{MEMBERS} members packed twice, 100 changed, all encoded; median"
    yield Result(
        "fast.ipset",
        "pack, diff and encode ipset members",
        fast * 1000,
        "ms",
        150.0,
        Baseline("twin", slow * 1000),
        shape,
    )

    chains = {
        f"KUBE-POD-FW-{i}": [
            f"-A KUBE-POD-FW-{i} -s 10.0.{i % 250}.{j}/32 -m comment --comment rule{j} -j ACCEPT" for j in range(10)
        ]
        for i in range(5000)
    }
    slow = median_of(seconds(lambda: twin_rulehash.rule_set_hashes(chains)), 3)
    fast = median_of(seconds(lambda: rulehash.rule_set_hashes(chains)))
    yield Result(
        "fast.rulehash",
        "hash the rules of 5,000 chains",
        fast * 1000,
        "ms",
        60.0,
        Baseline("twin", slow * 1000),
        "50,000 rules, median",
    )

    hops = [str(ipaddress.IPv6Address((0xFD00 << 112) + i)) for i in range(10_000)]
    slow = median_of(seconds(lambda: [twin_tunnelname.tunnel_name(hop) for hop in hops]), 3)
    fast = median_of(seconds(lambda: [tunnelname.tunnel_name(hop) for hop in hops]))
    yield Result(
        "fast.tunnelname",
        "names of 10,000 tunnels",
        fast * 1000,
        "ms",
        30.0,
        Baseline("twin", slow * 1000),
        "IPv6 next hops, median",
    )
