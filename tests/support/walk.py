"""What the walkers share: a packet as netfilter sees it, what became of it, and what an address is looked up in.

Pure. A walker (`iptables_walk.py`, `nft_walk.py`) reads the text of real rules and leads a packet through them. It is a
checker: whatever it does not know, it refuses (`WalkError`) rather than passes over.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from kube_router.workers.model import Family

Hook = Literal["INPUT", "FORWARD", "OUTPUT"]
Verdict = Literal["ACCEPT", "DROP", "REJECT"]
HOOKS: tuple[Hook, ...] = ("INPUT", "FORWARD", "OUTPUT")
STATES = ("NEW", "ESTABLISHED", "RELATED", "INVALID")
PORT_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
NUMBERS = {**PORT_PROTOCOLS, "icmp": 1, "ipv6-icmp": 58, "gre": 47}
DEPTH = 16
"""Of nested chains: nftables refuses a base chain from which more lead downwards (``NFT_JUMP_STACK_SIZE``)."""


class WalkError(AssertionError):
    """Rules that the kernel would refuse, or that the walker does not know: no verdict can be trusted."""


@dataclass(frozen=True, slots=True)
class WirePacket:
    """A packet in one hook. ``icmp`` is the ICMP type; ``port`` the destination port of the three port protocols.

    ``source_local``/``destination_local``: whether the node owns the address. ``bridged``: it crosses the bridge at
    layer 2 and is shown to netfilter by br_netfilter.
    """

    hook: Hook
    source: str
    destination: str
    protocol: str = "tcp"
    port: int = 0
    icmp: int = 0
    state: str = "NEW"
    mark: int = 0
    source_local: bool = False
    destination_local: bool = False
    bridged: bool = False

    def __post_init__(self) -> None:
        if self.hook not in HOOKS or self.protocol not in NUMBERS or self.state not in STATES:
            raise WalkError(f"no such packet: {self}")
        for name in ("source", "destination"):  # compared as text, so there is one text of each
            object.__setattr__(self, name, str(ipaddress.ip_address(getattr(self, name))))

    @property
    def family(self) -> Family:
        """Of its addresses."""
        return Family.IPV6 if ":" in self.source else Family.IPV4

    def marked(self, mark: int) -> WirePacket:
        """The same packet with another mark."""
        return dataclasses.replace(self, mark=mark)


@dataclass(frozen=True, slots=True)
class Walked:
    """What became of a packet. ``path``: the rules that matched, in order; ``looked``: how many were compared."""

    verdict: Verdict
    mark: int
    path: tuple[str, ...]
    looked: int
    logged: bool = False

    @property
    def allowed(self) -> bool:
        """Whether the packet goes on."""
        return self.verdict == "ACCEPT"

    def __str__(self) -> str:
        return f"{self.verdict} mark {self.mark:#x} after {self.looked} rules\n  " + "\n  ".join(self.path)


class Networks:
    """Addresses and networks of one family; answers which holds an address, in a few look-ups."""

    def __init__(self, family: Family, texts: Iterable[str] = ()) -> None:
        self.family = family
        self._by_mask: dict[int, set[int]] = {}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> bool:
        """Add one; whether it is new. Raises `WalkError` for another family, host bits or what is no network."""
        try:
            network = ipaddress.ip_network(text)
        except ValueError as error:
            raise WalkError(f"{text!r}: {error}") from error
        if network.version != self.family:
            raise WalkError(f"{text!r} is not {self.family}")
        held = self._by_mask.setdefault(int(network.netmask), set())
        if (value := int(network.network_address)) in held:
            return False
        held.add(value)
        return True

    def __contains__(self, address: str) -> bool:
        value = int(ipaddress.ip_address(address))
        return any(value & mask in held for mask, held in self._by_mask.items())

    def __len__(self) -> int:
        return sum(map(len, self._by_mask.values()))


def depths(jumps: Mapping[str, AbstractSet[str]]) -> dict[str, int]:
    """How many chains deep the way down from each chain is at most; raises `WalkError` for a loop."""
    known: dict[str, int] = {}
    inside: set[str] = set()

    def depth(chain: str) -> int:
        if chain in inside:
            raise WalkError(f"chain {chain} leads back to itself")
        if chain not in known:
            inside.add(chain)
            known[chain] = max((1 + depth(target) for target in jumps[chain]), default=0)
            inside.discard(chain)
        return known[chain]

    for chain in jumps:
        depth(chain)
    return known
