"""The flags of ``kube-router``: the 79 of upstream v2.11 with their types and defaults, and those of our own.

Pure: a table. The names, types and defaults are a contract with every manifest that exists; the help is in our words.
"""

from __future__ import annotations

from collections.abc import Sequence

from kube_router.supervisor.pflag import Flag, Kind, Parsed, parse, usage_text

PROGRAM = "kube-router"


def _flag(name: str, kind: Kind, default: str, usage: str, *, shorthand: str = "", secret: bool = False) -> Flag:
    return Flag(name, kind, default, usage, shorthand, secret)


_PROCESS = (
    _flag("run-router", "bool", "true", "Route pod traffic: BGP peering, kernel routes, tunnels, pod egress."),
    _flag("run-firewall", "bool", "true", "Enforce NetworkPolicies."),
    _flag("run-service-proxy", "bool", "true", "Forward traffic of Services to their endpoints."),
    _flag("run-loadbalancer", "bool", "false", "Give addresses to Services of type LoadBalancer."),
    _flag("kubeconfig", "string", "", "File that says how to reach the API server; empty: the pod's service account."),
    _flag("master", "string", "", "URL of the API server; replaces the one that --kubeconfig names."),
    _flag("hostname-override", "string", "", "Name of this node's Node object; empty: $NODE_NAME, then the host name."),
    _flag("enable-ipv4", "bool", "true", "Work for IPv4."),
    _flag("enable-ipv6", "bool", "false", "Work for IPv6."),
    _flag("cache-sync-timeout", "duration", "1m0s", "How long the first list of the cluster's objects may take."),
    _flag("health-addr", "string", "", "Address that /healthz is served on; empty: all addresses."),
    _flag("health-port", "uint16", "20244", "TCP port that /healthz is served on; 0: not served."),
    _flag("metrics-addr", "string", "", "Address that the metrics are served on; empty: all addresses."),
    _flag("metrics-port", "uint16", "0", "TCP port that the metrics are served on; 0: not served."),
    _flag("metrics-path", "string", "/metrics", "HTTP path of the metrics."),
    _flag("enable-pprof", "bool", "false", "Serve profiles of the agent for debugging."),
    _flag(
        "cleanup-config", "bool", "false", "Remove what kube-router made on this host (rules, sets, routes), and exit."
    ),
    _flag("v", "string", "0", "Log level: 0 informs, 1 and above debugs.", shorthand="v"),
    _flag("version", "bool", "false", "Print the version and exit.", shorthand="V"),
    _flag("help", "bool", "false", "Print this help and exit.", shorthand="h"),
)

_ROUTER = (
    _flag("advertise-cluster-ip", "bool", "false", "Advertise the cluster IPs of Services to BGP peers."),
    _flag("advertise-external-ip", "bool", "false", "Advertise the external IPs of Services to BGP peers."),
    _flag("advertise-loadbalancer-ip", "bool", "false", "Advertise the load-balancer IPs of Services to BGP peers."),
    _flag("advertise-pod-cidr", "bool", "true", "Advertise this node's pod CIDRs to external BGP peers."),
    _flag("enable-ibgp", "bool", "true", "Peer with the other nodes and advertise the pod CIDRs to them."),
    _flag(
        "nodes-full-mesh", "bool", "true", "Peer with every node, all in one ASN; else each Node's node.asn decides."
    ),
    _flag("cluster-asn", "uint", "0", "ASN of the nodes with --nodes-full-mesh; 0: 64512."),
    _flag("peer-router-ips", "ipSlice", "", "Addresses of the external BGP peers of all nodes."),
    _flag("peer-router-asns", "uints", "", "ASNs of the external peers, one each."),
    _flag("peer-router-ports", "uints", "", "TCP ports of the external peers, one each or none; none: 179."),
    _flag(
        "peer-router-passwords",
        "strings",
        "",
        "TCP-MD5 passwords of the external peers in base64, one each or none; an empty item is no password.",
        secret=True,
    ),
    _flag("peer-router-passwords-file", "string", "", "File with the value of --peer-router-passwords."),
    _flag("peer-router-multihop-ttl", "uint8", "0", "TTL of packets to external peers further than one hop: 2 to 255."),
    _flag("bgp-port", "uint32", "179", "TCP port that BGP listens on and that nodes are peered at."),
    _flag("bgp-holdtime", "duration", "1m30s", "BGP hold time offered to external peers: 3s to 18h12m15s."),
    _flag("bgp-graceful-restart", "bool", "false", "Let peers keep our routes while BGP restarts (RFC 4724)."),
    _flag("bgp-graceful-restart-time", "duration", "1m30s", "How long peers keep the routes: at most 4095s."),
    _flag(
        "bgp-graceful-restart-deferral-time",
        "duration",
        "6m0s",
        "How long a restarted speaker waits for its peers before it selects routes: at most 18h.",
    ),
    _flag("router-id", "string", "", "BGP router ID, an IPv4 address or 'generate'; empty: the node's IPv4 address."),
    _flag("override-nexthop", "bool", "false", "Be the next hop of every route advertised to external peers."),
    _flag("gobgp-admin-address", "string", "127.0.0.1", "Address of gobgpd's administration port."),
    _flag("gobgp-admin-port", "uint16", "50051", "TCP port of gobgpd's administration (gRPC); 0: none."),
    _flag("enable-bfd", "bool", "false", "Watch the external peers given by flags with BFD."),
    _flag("bfd-port", "uint32", "3784", "UDP port of BFD."),
    _flag("bfd-detection-multiplier", "uint32", "3", "Lost BFD packets after which a peer is down: 1 to 255."),
    _flag("bfd-desired-min-tx-interval", "uint32", "1000", "Wanted interval of sent BFD packets in milliseconds."),
    _flag("bfd-required-min-rx-interval", "uint32", "1000", "Least interval of received BFD packets in milliseconds."),
    _flag(
        "enable-cni",
        "bool",
        "true",
        "Keep the pod CIDRs and the MTU in the CNI configuration file; needs --run-router.",
    ),
    _flag("auto-mtu", "bool", "true", "Set the MTU of kube-bridge and of pods after the node's interface."),
    _flag("enable-overlay", "bool", "true", "Tunnel pod traffic to nodes of other subnets."),
    _flag(
        "overlay-type",
        "string",
        "subnet",
        "Which nodes are reached by tunnels: 'subnet' (other subnets) or 'full' (all).",
    ),
    _flag("overlay-encap", "string", "ipip", "Encapsulation of tunnels: 'ipip' or 'fou' (foo over UDP)."),
    _flag("overlay-encap-port", "uint16", "5555", "UDP port of 'fou' tunnels: 1024 to 65535."),
    _flag("enable-pod-egress", "bool", "true", "Masquerade traffic of pods that leaves the cluster."),
    _flag("disable-source-dest-check", "bool", "true", "Turn off the source/destination check of AWS instances."),
    _flag(
        "routes-sync-period", "duration", "5m0s", "Interval of the router's full check: 1m, 90s, ... Must be above 0."
    ),
    _flag(
        "injected-routes-sync-period", "duration", "1m0s", "Interval of the check of kernel routes. Must be above 0."
    ),
)

_PROXY = (
    _flag("ipvs-sync-period", "duration", "5m0s", "Interval of the service proxy's full check. Must be above 0."),
    _flag("ipvs-permit-all", "bool", "true", "Reject traffic to service addresses at ports that no Service has."),
    _flag("ipvs-graceful-termination", "bool", "false", "Let connections of ending endpoints drain."),
    _flag("ipvs-graceful-period", "duration", "30s", "How long they drain if the pod does not say."),
    _flag("masquerade-all", "bool", "false", "Masquerade all traffic to cluster IPs and node ports."),
    _flag("hairpin-mode", "bool", "false", "Let every pod reach itself through its Services."),
    _flag("nodeport-bindon-all-ip", "bool", "false", "Serve node ports on all addresses of the node."),
    _flag("excluded-cidrs", "strings", "", "CIDRs whose IPVS services are not ours and are left alone."),
    _flag(
        "runtime-endpoint", "string", "", "Container runtime's socket, unix:///...; needed for direct server return."
    ),
    _flag("service-tcp-timeout", "duration", "0s", "IPVS timeout of TCP sessions; 0s: as it is."),
    _flag("service-tcpfin-timeout", "duration", "0s", "IPVS timeout of TCP sessions after FIN; 0s: as it is."),
    _flag("service-udp-timeout", "duration", "0s", "IPVS timeout of UDP; 0s: as it is."),
)

_FIREWALL = (
    _flag("iptables-sync-period", "duration", "5m0s", "Interval of the firewall's full check. Must be above 0."),
    _flag("service-node-port-range", "string", "30000-32767", "Node ports, FIRST-LAST or FIRST:LAST."),
    _flag("netpol-default-deny", "bool", "false", "Reject traffic of local pods that are not yet programmed."),
    _flag("use-nftables-for-netpol", "bool", "false", "Enforce NetworkPolicies with nftables, not iptables and ipset."),
)

_RANGES = (
    _flag("service-cluster-ip-range", "strings", "10.96.0.0/12", "CIDRs of cluster IPs, one or two."),
    _flag("service-external-ip-range", "strings", "", "CIDRs that external IPs of Services must be in."),
    _flag("loadbalancer-ip-range", "strings", "", "CIDRs that load-balancer IPs are taken from and must be in."),
    _flag(
        "strict-external-ip-validation", "bool", "true", "Ignore external and load-balancer IPs outside their ranges."
    ),
)

_LOADBALANCER = (
    _flag("loadbalancer-default-class", "bool", "true", "Serve also Services without a loadBalancerClass."),
    _flag("loadbalancer-sync-period", "duration", "1m0s", "Interval of the allocator's full check. Must be above 0."),
)

UPSTREAM_FLAGS: tuple[Flag, ...] = (
    *_PROCESS,
    *_ROUTER,
    *_PROXY,
    *_FIREWALL,
    *_RANGES,
    *_LOADBALANCER,
)
"""What a manifest for kube-router v2.11 may say."""

OWN_FLAGS: tuple[Flag, ...] = (
    _flag("manifests", "string", "", "Directory of manifests to take the cluster's state from, without an API server."),
    _flag("run-dir", "string", "/run/kube-router", "Directory of sockets and generated files; one for each agent."),
    _flag("state-dir", "string", "/var/lib/kube-router", "Directory of what outlives a restart."),
    _flag("log-format", "string", "text", "Form of log lines: 'text' or 'json'."),
    _flag(
        "netpol-recheck-established",
        "bool",
        "false",
        "Cut open connections of pods that a changed NetworkPolicy forbids.",
    ),
    _flag(
        "service-proxy-backend",
        "string",
        "auto",
        "How Services are translated: 'auto', 'ipvs' or 'nftables'; 'auto' takes what the kernel has.",
    ),
    _flag(
        "flags-file",
        "string",
        "",
        "File with flags, one a line, followed while the agent runs; the command line wins over it.",
    ),
    _flag(
        "overlay-encap-accept-ports",
        "uints",
        "",
        "UDP ports on which 'fou' traffic is taken too: for a change of --overlay-encap-port without loss.",
    ),
    _flag("bgp-max-prefixes", "uint32", "50000", "Most prefixes of one family taken from one BGP peer; 0: any number."),
    _flag(
        "bgp-accept-covering-prefixes",
        "bool",
        "false",
        "Take learned prefixes that cover the node's addresses, its pod CIDRs or the ranges of Services.",
    ),
    _flag(
        "bgp-long-lived-graceful-restart-time",
        "duration",
        "0s",
        "How long peers keep our routes, as a last choice, beyond --bgp-graceful-restart-time (RFC 9494); 0s: not.",
    ),
)
"""What upstream does not have."""

FLAGS: tuple[Flag, ...] = (*UPSTREAM_FLAGS, *OWN_FLAGS)


def parse_arguments(arguments: Sequence[str]) -> Parsed:
    """Read the arguments of ``kube-router``, without the program's name; raises `pflag.FlagError`."""
    return parse(FLAGS, arguments)


def help_text(program: str = PROGRAM) -> str:
    """What ``--help`` prints."""
    return f"Usage of {program}:\n{usage_text(FLAGS)}"
