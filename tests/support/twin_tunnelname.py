"""Plain-Python twin of `kube_router._fast.tunnelname`: the oracle, written against hashlib."""

from __future__ import annotations

import hashlib


def tunnel_name(next_hop: str) -> str:
    """As `kube_router._fast.tunnelname.tunnel_name`."""
    return "tun-" + hashlib.sha256(next_hop.replace(".", "").replace(":", "").encode()).hexdigest()[:11]


def legacy_tunnel_name(next_hop: str) -> str:
    """As `kube_router._fast.tunnelname.legacy_tunnel_name`."""
    digits = "".join(character for character in next_hop if character != ".")
    return f"tun-{digits}" if len(digits) < 12 else f"tun{digits}"
