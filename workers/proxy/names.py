"""The proxy's names: keys of annotations and labels, and what it calls its own in the kernel.

Pure: constants. kube-router's annotations are a contract with operators, the others are Kubernetes' own.
"""

from __future__ import annotations

from kube_router.workers.model import Family
from kube_router.workers.nodefacts import ANNOTATION_PREFIX

SERVICE = ANNOTATION_PREFIX + "service."
DSR = SERVICE + "dsr"
SCHEDULER = SERVICE + "scheduler"
SCHEDULER_FLAGS = SERVICE + "schedflags"
HAIRPIN = SERVICE + "hairpin"
HAIRPIN_EXTERNAL = SERVICE + "hairpin.externalips"
SKIP_LOADBALANCER_IPS = SERVICE + "skiplbips"
SERVICE_LOCAL = SERVICE + "local"

PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
OUR_PROXY_NAME = "kube-router"
ZONE_LABEL = "topology.kubernetes.io/zone"

NFT_TABLES = {Family.IPV4: "kube-router-proxy-ipv4", Family.IPV6: "kube-router-proxy-ipv6"}
"""nftables tables of the families ``ip`` and ``ip6``."""
