"""gobgpd 4.x: service ``api.GoBgpService``; prefixes and attributes are typed messages.

Pure: messages only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kube_router.workers.model import IPAddress, IPNetwork
from kube_router.workers.router.gobgp import gobgp_v4_pb2


class DialectV4:
    """What is particular to generation 4."""

    generation = 4
    service = "api.GoBgpService"
    messages: Any = gobgp_v4_pb2

    def nlri(self, network: IPNetwork) -> Any:
        """The prefix as it stands in a path."""
        prefix = self.messages.IPAddressPrefix(prefix=str(network.network_address), prefix_len=network.prefixlen)
        return self.messages.Nlri(prefix=prefix)

    def attributes(self, network: IPNetwork, next_hop: IPAddress) -> list[Any]:
        """ORIGIN IGP and the next hop: NEXT_HOP for IPv4, MP_REACH_NLRI for IPv6 (RFC 4760)."""
        origin = self.messages.Attribute(origin=self.messages.OriginAttribute(origin=0))
        if network.version == 4:
            hop = self.messages.NextHopAttribute(next_hop=str(next_hop))
            return [origin, self.messages.Attribute(next_hop=hop)]
        reach = self.messages.MpReachNLRIAttribute(
            family=self.messages.Family(afi=2, safi=1), next_hops=[str(next_hop)], nlris=[self.nlri(network)]
        )
        return [origin, self.messages.Attribute(mp_reach=reach)]

    def prefix_of(self, path: Any) -> str | None:
        """The prefix of a unicast path as ``address/length``; None for any other kind of path."""
        if path.nlri.WhichOneof("kind") != "prefix":
            return None
        prefix = path.nlri.prefix
        return f"{prefix.prefix}/{prefix.prefix_len}"

    def next_hop_of(self, path: Any) -> str | None:
        """NEXT_HOP, else the first (global) next hop of MP_REACH_NLRI; None if the path has neither."""
        for attribute in path.pattrs:
            kind = attribute.WhichOneof("kind")
            if kind == "next_hop":
                return str(attribute.next_hop.next_hop)
            if kind == "mp_reach":
                hops = attribute.mp_reach.next_hops
                return str(hops[0]) if hops else None
        return None

    def capabilities(self, peer: Any) -> Iterator[tuple[str, Any]]:
        """What the peer has offered in its OPEN, as far as it matters: (name, message)."""
        for capability in peer.state.remote_cap:
            kind = capability.WhichOneof("kind")
            if kind is not None:
                yield kind, getattr(capability, kind)
