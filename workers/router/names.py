"""Names that the router worker gives to objects outside of itself; kube-router's names are a contract with operators.

Pure: constants only. The kernel's names (routes, ip sets, rules) stand beside their drivers' users.
"""

from __future__ import annotations

from kube_router.workers.model import Family
from kube_router.workers.nodefacts import ANNOTATION_PREFIX

SOCKET = "gobgpd/gobgpd.sock"
"""gobgpd's private socket, relative to the run directory."""

GLOBAL_ASSIGNMENT = "global"
EXPORT_POLICY = "kube_router_export1"
IMPORT_POLICY = "kube_router_import1"
"""Constant: gobgpd keeps the assignment of a policy that is replaced under its own name, and opens up otherwise."""

POD_CIDR_SETS = {Family.IPV4: "podcidrdefinedset", Family.IPV6: "podcidrdefinedsetv6"}
SERVICE_VIP_SETS = {Family.IPV4: "servicevipsdefinedset", Family.IPV6: "servicevipsdefinedsetv6"}
DEFAULT_ROUTE_SETS = {Family.IPV4: "defaultroutedefinedset", Family.IPV6: "defaultroutedefinedsetv6"}
CUSTOM_REJECT_SETS = {Family.IPV4: "customimportrejectdefinedset", Family.IPV6: "customimportrejectdefinedsetv6"}
KNOWN_VIP_SETS = {Family.IPV4: "knownservicevipsdefinedset", Family.IPV6: "knownservicevipsdefinedsetv6"}
PROTECTED_SETS = {Family.IPV4: "protectedrangesdefinedset", Family.IPV6: "protectedrangesdefinedsetv6"}
COVERING_SETS = {Family.IPV4: "coveringprefixesdefinedset", Family.IPV6: "coveringprefixesdefinedsetv6"}
NODE_POD_CIDR_SETS = {Family.IPV4: "nodepodcidrsdefinedset", Family.IPV6: "nodepodcidrsdefinedsetv6"}
"""Ours: every Service's addresses, the ranges that nobody else may announce, all shorter prefixes that contain one of
those, and the pod CIDRs of the other nodes (on a route reflector)."""
IBGP_PEER_SETS = {Family.IPV4: "iBGPpeerset", Family.IPV6: "iBGPpeersetv6"}
EXTERNAL_PEER_SETS = {Family.IPV4: "externalpeerset", Family.IPV6: "externalpeersetv6"}
ALL_PEER_SETS = {Family.IPV4: "allpeerset", Family.IPV6: "allpeersetv6"}

LOCAL_ADDRESSES = ANNOTATION_PREFIX + "bgp-local-addresses"
PEERS = ANNOTATION_PREFIX + "peers"
PEER_IPS = ANNOTATION_PREFIX + "peer.ips"
PEER_ASNS = ANNOTATION_PREFIX + "peer.asns"
PEER_PORTS = ANNOTATION_PREFIX + "peer.ports"
PEER_PASSWORDS = ANNOTATION_PREFIX + "peer.passwords"
PEER_LOCAL_IPS = ANNOTATION_PREFIX + "peer.localips"

PREPEND_AS = ANNOTATION_PREFIX + "path-prepend.as"
PREPEND_REPEAT = ANNOTATION_PREFIX + "path-prepend.repeat-n"
COMMUNITIES = ANNOTATION_PREFIX + "node.bgp.communities"
LARGE_COMMUNITIES = ANNOTATION_PREFIX + "node.bgp.large-communities"
"""Ours: kube-router has no large communities (RFC 8092)."""
CUSTOM_IMPORT_REJECT = ANNOTATION_PREFIX + "node.bgp.customimportreject"

ADVERTISE_CLUSTER_IP = ANNOTATION_PREFIX + "service.advertise.clusterip"
ADVERTISE_EXTERNAL_IP = ANNOTATION_PREFIX + "service.advertise.externalip"
ADVERTISE_LOADBALANCER_IP = ANNOTATION_PREFIX + "service.advertise.loadbalancerip"
SERVICE_LOCAL = ANNOTATION_PREFIX + "service.local"
SKIP_LOADBALANCER_IPS = ANNOTATION_PREFIX + "service.skiplbips"
