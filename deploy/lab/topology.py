"""The lab's plan: nodes, segments, routers, addresses, pods, and the texts made from it (manifests, agent flags, BIRD).

Pure: data and rendering; ``network.py`` builds it.

::

    node1 10.10.1.11 --+
                       +-- segment A -- fabric (AS 64600) -- segment B --- node3 10.10.2.13
    node2 10.10.1.12 --+                   |
                                        uplink
                                           |
                                    external (AS 64700), which announces 198.51.100.0/24 and 2001:db8:100::/48

``fabric`` routes between the segments and peers with every node by eBGP; ``external`` hears of pods only through it.
The three ways to configure an external peer are all in use: node1 by flags, node2 by ``peer.*`` annotations, node3 by
``kube-router.io/peers``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from pathlib import Path

Interface = IPv4Interface | IPv6Interface

CLUSTER_ASN = 64512
FABRIC_ASN = 64600
EXTERNAL_ASN = 64700
EXTERNAL_PREFIXES = ("198.51.100.0/24", "2001:db8:100::/48")
EXTERNAL_HOSTS = ("198.51.100.1", "2001:db8:100::1")


@dataclass(frozen=True, slots=True)
class Segment:
    """An Ethernet segment; ``fabric`` are the router's addresses on it, one a family."""

    name: str
    fabric: tuple[Interface, Interface]


@dataclass(frozen=True, slots=True)
class LabNode:
    """A Kubernetes node: its segment, its addresses and pod CIDRs, IPv4 first."""

    name: str
    segment: Segment
    addresses: tuple[Interface, Interface]
    pod_cidrs: tuple[str, str]


@dataclass(frozen=True, slots=True)
class LabPod:
    """A pod as it is asked for: its object's namespace and name, its node, its labels, its named TCP ports."""

    namespace: str
    name: str
    node: str
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    @property
    def short(self) -> str:
        """Its name in the lab: of its network namespace and in `Lab.pods`."""
        return self.name if self.namespace == "default" else f"{self.namespace}-{self.name}"


def _pair(v4: str, v6: str) -> tuple[Interface, Interface]:
    return ip_interface(v4), ip_interface(v6)


SEGMENT_A = Segment("seg-a", _pair("10.10.1.1/24", "fd10:1::1/64"))
SEGMENT_B = Segment("seg-b", _pair("10.10.2.1/24", "fd10:2::1/64"))
SEGMENTS = (SEGMENT_A, SEGMENT_B)
UPLINK_FABRIC = _pair("10.10.9.1/30", "fd10:9::1/64")
UPLINK_EXTERNAL = _pair("10.10.9.2/30", "fd10:9::2/64")

NODES = (
    LabNode("node1", SEGMENT_A, _pair("10.10.1.11/24", "fd10:1::11/64"), ("10.244.1.0/24", "fd00:244:1::/64")),
    LabNode("node2", SEGMENT_A, _pair("10.10.1.12/24", "fd10:1::12/64"), ("10.244.2.0/24", "fd00:244:2::/64")),
    LabNode("node3", SEGMENT_B, _pair("10.10.2.13/24", "fd10:2::13/64"), ("10.244.3.0/24", "fd00:244:3::/64")),
)


def node_manifest(node: LabNode) -> dict[str, object]:
    """The Node object of ``node``, as a manifest (JSON is YAML)."""
    annotations = {}
    peers = [str(address.ip) for address in node.segment.fabric]
    if node.name == "node2":
        annotations = {
            "kube-router.io/peer.ips": ",".join(peers),
            "kube-router.io/peer.asns": ",".join(str(FABRIC_ASN) for _ in peers),
            "kube-router.io/peer.localips": ",".join(str(address.ip) for address in node.addresses),
        }
    if node.name == "node3":
        lines = [
            f"- remoteip: {peer}\n  remoteasn: {FABRIC_ASN}\n  localip: {local.ip}\n"
            for peer, local in zip(peers, node.addresses, strict=True)
        ]
        annotations = {"kube-router.io/peers": "".join(lines)}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name, "annotations": annotations},
        "spec": {"podCIDR": node.pod_cidrs[0], "podCIDRs": list(node.pod_cidrs)},
        "status": {
            "addresses": [
                *({"type": "InternalIP", "address": str(address.ip)} for address in node.addresses),
                {"type": "Hostname", "address": node.name},
            ]
        },
    }


def namespace_manifest(name: str) -> dict[str, object]:
    """A Namespace object, with the label that an API server gives to each."""
    labels = {"kubernetes.io/metadata.name": name}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pod_manifest(pod: LabPod, addresses: Sequence[str]) -> dict[str, object]:
    """The Pod object as it stands when kubelet has told the pod's addresses; the first one is the primary one."""
    ports = [{"name": name, "containerPort": number} for name, number in pod.ports.items()]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": pod.namespace, "name": pod.name, "labels": dict(pod.labels)},
        "spec": {"nodeName": pod.node, "containers": [{"name": "main", "ports": ports}]},
        "status": {
            "phase": "Running",
            "podIP": addresses[0],
            "podIPs": [{"ip": address} for address in addresses],
            "hostIP": next(str(node.addresses[0].ip) for node in NODES if node.name == pod.node),
        },
    }


def agent_flags(node: LabNode) -> list[str]:
    """What the DaemonSet's ``args`` would be for this slice of the agent; only node1's external peers differ."""
    flags = [
        "--run-router=true",
        "--run-firewall=true",
        "--run-service-proxy=false",
        "--enable-cni=true",
        "--enable-ipv6=true",
        "--enable-overlay=false",
        f"--cluster-asn={CLUSTER_ASN}",
        "--service-cluster-ip-range=10.96.0.0/12",
        "--service-cluster-ip-range=fd00:10:96::/112",
        "--metrics-port=20241",
        f"--hostname-override={node.name}",
    ]
    if node.name == "node1":
        peers = [str(address.ip) for address in node.segment.fabric]
        flags += [
            f"--peer-router-ips={','.join(peers)}",
            f"--peer-router-asns={','.join(str(FABRIC_ASN) for _ in peers)}",
        ]
    return flags


def conflist(data_dir: Path) -> str:
    """The CNI configuration as the shipped ConfigMap has it, without ranges: the agent puts them in."""
    return (
        json.dumps(
            {
                "cniVersion": "0.3.1",
                "name": "mynet",
                "plugins": [
                    {
                        "name": "kubernetes",
                        "type": "bridge",
                        "bridge": "kube-bridge",
                        "isDefaultGateway": True,
                        "hairpinMode": True,
                        "ipam": {"type": "host-local", "dataDir": str(data_dir)},
                    }
                ],
            },
            indent=2,
        )
        + "\n"
    )


def fabric_bird() -> str:
    """BIRD 2 configuration of the router between the segments."""
    sessions = [
        _bird_session(f"{node.name}_v{address.version}", address, CLUSTER_ASN, FABRIC_ASN, passive=True)
        for node in NODES
        for address in node.addresses
    ]
    sessions += [_bird_session(f"external_v{a.version}", a, EXTERNAL_ASN, FABRIC_ASN) for a in UPLINK_EXTERNAL]
    return _bird_head(UPLINK_FABRIC[0]) + "".join(sessions)


def external_bird() -> str:
    """BIRD 2 configuration of the external router."""
    statics = "".join(
        f"protocol static own_v{version} {{ ipv{version}; route {prefix} blackhole; }}\n"
        for version, prefix in zip((4, 6), EXTERNAL_PREFIXES, strict=True)
    )
    sessions = [_bird_session(f"fabric_v{a.version}", a, FABRIC_ASN, EXTERNAL_ASN) for a in UPLINK_FABRIC]
    return _bird_head(UPLINK_EXTERNAL[0]) + statics + "".join(sessions)


def _bird_head(router_id: Interface) -> str:
    return (
        f"router id {router_id.ip};\n"
        "protocol device { scan time 1; }\n"
        "protocol direct { ipv4; ipv6; }\n"
        "protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; }\n"
        "protocol kernel { ipv6 { import none; export where source = RTS_BGP; }; }\n"
    )


def _bird_session(name: str, neighbor: Interface, remote_asn: int, local_asn: int, passive: bool = False) -> str:
    # RTS_DEVICE routes (the segments themselves) are announced to nobody but the other router.
    export = "all" if remote_asn in (FABRIC_ASN, EXTERNAL_ASN) else "where source = RTS_BGP || source = RTS_STATIC"
    return (
        f"protocol bgp {name} {{\n"
        f"  local as {local_asn}; neighbor {neighbor.ip} as {remote_asn};\n"
        f"  {'passive; ' if passive else ''}connect retry time 2; error wait time 1, 3; connect delay time 1;\n"
        f"  ipv{neighbor.version} {{ import all; export {export}; next hop self; }};\n"
        "}\n"
    )
