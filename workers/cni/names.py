"""What the cni worker calls its things on the host, and the words its failures are counted under.

Pure: constants.
"""

from __future__ import annotations

BRIDGE = "kube-bridge"
"""The bridge that pods are connected to; the name is upstream's, firewalls and manifests rely on it."""

STATE_FOLDER = "cni"
"""Below the state directory, 0700."""
STATE_FILE = "ranges.json"
"""In `STATE_FOLDER`: which ranges in the configuration file were put there by this worker."""

BRIDGE_MODULE = "br_netfilter"
CALL_IPTABLES = "net/bridge/bridge-nf-call-iptables"
CALL_IP6TABLES = "net/bridge/bridge-nf-call-ip6tables"
DISABLE_IPV6 = "net/ipv6/conf/all/disable_ipv6"
FORWARD_IPV4 = "net/ipv4/ip_forward"
FORWARD_IPV6 = "net/ipv6/conf/all/forwarding"

PHASE_NODE = "node"
PHASE_FILE = "cni-file"
PHASE_BRIDGE = "bridge"
PHASE_SYSCTL = "sysctl"
