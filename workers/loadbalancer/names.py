"""Names that the allocator shares with the cluster's objects; kube-router's are a contract with operators.

Pure: constants only.
"""

from __future__ import annotations

from kube_router.workers.nodefacts import ANNOTATION_PREFIX

LEASE = "kube-router-lballoc"
"""The Lease that the agents contend for, in their namespace; kube-router's name, so old and new exclude each other."""

CLASS = "kube-router"
DEFAULT_CLASSES = (None, "", "default")
"""``spec.loadBalancerClass`` of Services that are served too with ``--loadbalancer-default-class``."""

REQUESTED = ANNOTATION_PREFIX + "loadbalancer-ip"
"""Ours: the wanted address, or one of each family, separated by commas; it wins over ``spec.loadBalancerIP``."""

CONDITION = ANNOTATION_PREFIX + "AddressAllocated"
"""Type of the condition in a Service's status."""
