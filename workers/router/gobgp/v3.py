"""gobgpd 3.x: service and package ``apipb``; prefixes and attributes travel packed, as ``google.protobuf.Any``.

Pure: messages only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kube_router.workers.model import IPAddress, IPNetwork
from kube_router.workers.router.gobgp import gobgp_v3_pb2

_URL = "type.googleapis.com/apipb."
_PREFIX = _URL + "IPAddressPrefix"
_NEXT_HOP = _URL + "NextHopAttribute"
_MP_REACH = _URL + "MpReachNLRIAttribute"
_MULTI_PROTOCOL = _URL + "MultiProtocolCapability"
_GRACEFUL_RESTART = _URL + "GracefulRestartCapability"


class DialectV3:
    """What is particular to generation 3."""

    generation = 3
    service = "apipb.GobgpApi"
    messages: Any = gobgp_v3_pb2

    def nlri(self, network: IPNetwork) -> Any:
        """The prefix as it stands in a path."""
        return self._pack(
            self.messages.IPAddressPrefix(prefix=str(network.network_address), prefix_len=network.prefixlen)
        )

    def attributes(self, network: IPNetwork, next_hop: IPAddress) -> list[Any]:
        """ORIGIN IGP and the next hop: NEXT_HOP for IPv4, MP_REACH_NLRI for IPv6 (RFC 4760)."""
        packed = [self._pack(self.messages.OriginAttribute(origin=0))]
        if network.version == 4:
            packed.append(self._pack(self.messages.NextHopAttribute(next_hop=str(next_hop))))
        else:
            reach = self.messages.MpReachNLRIAttribute(
                family=self.messages.Family(afi=2, safi=1), next_hops=[str(next_hop)], nlris=[self.nlri(network)]
            )
            packed.append(self._pack(reach))
        return packed

    def prefix_of(self, path: Any) -> str | None:
        """The prefix of a unicast path as ``address/length``; None for any other kind of path."""
        packed = path.nlri
        if packed.type_url != _PREFIX:
            return None
        prefix = self.messages.IPAddressPrefix.FromString(packed.value)
        return f"{prefix.prefix}/{prefix.prefix_len}"

    def next_hop_of(self, path: Any) -> str | None:
        """NEXT_HOP, else the first (global) next hop of MP_REACH_NLRI; None if the path has neither."""
        for packed in path.pattrs:
            if packed.type_url == _NEXT_HOP:
                return str(self.messages.NextHopAttribute.FromString(packed.value).next_hop)
            if packed.type_url == _MP_REACH:
                hops = self.messages.MpReachNLRIAttribute.FromString(packed.value).next_hops
                return str(hops[0]) if hops else None
        return None

    def capabilities(self, peer: Any) -> Iterator[tuple[str, Any]]:
        """What the peer has offered in its OPEN, as far as it matters: (name, message)."""
        for packed in peer.state.remote_cap:
            if packed.type_url == _MULTI_PROTOCOL:
                yield "multi_protocol", self.messages.MultiProtocolCapability.FromString(packed.value)
            elif packed.type_url == _GRACEFUL_RESTART:
                yield "graceful_restart", self.messages.GracefulRestartCapability.FromString(packed.value)

    def _pack(self, message: Any) -> Any:
        return self.messages.Packed(
            type_url="type.googleapis.com/" + message.DESCRIPTOR.full_name, value=message.SerializeToString()
        )
