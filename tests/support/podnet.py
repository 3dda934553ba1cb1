"""Pods as network namespaces: two nodes with a kube-bridge each, a client outside; dual-stack, all of it routed.

Touches the kernel. The first node stands in the middle: the client and the second node reach each other through it.

    a, b, c ... - kube-bridge n1 eth0 - eth0 n2 kube-bridge - x, y
                         eth1 - client

Pods of node n have 10.244.<n>.0/24 and fd00:244:<n>::/64, the nodes 10.0.0.<n> and fd00::<n>, the client 192.0.2.2 and
2001:db8::2 and what else a test gives it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from support.namespaces import Namespace, create, veth
from support.probes import Flow, Host, Probes
from support.walk import Hook, WirePacket

from kube_router.ipc.messages import ContainerPort, Pod

PORTS = (80, 8080, 8081)
CLIENT_ADDRESSES = (
    "192.0.2.2",
    "192.0.2.66",
    "198.51.100.2",
    "2001:db8::2",
    "2001:db8::66",
    "fc00:99::2",
    "64:ff9b::9",
)
"""Two beside each other and one far away; of IPv6 also a unique local one and one of a translation prefix."""
_BRIDGE = "net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1"
_NODE = (
    "net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 "
    "net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0 "
    # Rejections are counted here, and more than one a second is no attack.
    f"net.ipv4.icmp_ratelimit=0 net.ipv4.icmp_msgs_per_sec=1000000 net.ipv4.icmp_msgs_burst=100000 "
    f"net.ipv6.icmp.ratelimit=0 {_BRIDGE}"
)


@dataclass
class PodNet:
    """The network. ``hosts`` by name: n1, n2, client, and the pods by their letters."""

    hosts: dict[str, Host] = field(default_factory=dict)
    probes: Probes = field(init=False)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def node_of(self, name: str) -> str:
        """The node of a pod."""
        return "n1" if self.hosts[name].addresses[0].startswith("10.244.1.") else "n2"

    @property
    def pods(self) -> tuple[str, ...]:
        """Names of the pods."""
        return tuple(name for name in self.hosts if name not in ("n1", "n2", "client"))

    def pod(
        self,
        name: str,
        labels: Mapping[str, str] | None = None,
        *,
        namespace: str = "default",
        ports: Iterable[ContainerPort] = (),
        addresses: tuple[str, ...] | None = None,
    ) -> Pod:
        """The API object of a pod; its label ``pod`` is its name."""
        return Pod(
            name=name,
            namespace=namespace,
            uid=f"uid-{name}",
            labels={"pod": name, **(labels or {})},
            node_name=self.node_of(name),
            phase="Running",
            ips=self.hosts[name].addresses if addresses is None else addresses,
            ports=tuple(ports),
        )

    def crossing(self, flow: Flow, node: str) -> tuple[WirePacket, WirePacket] | None:
        """A flow's first packet and the answer to it as ``node``'s netfilter sees them; None if they do not pass it."""
        source, destination = self._owner(flow.source), self._owner(flow.destination)
        own = {name for name in self.pods if self.node_of(name) == node}
        if node == "n2" and not {source, destination} & (own | {node}):
            return None
        if node == "n1" and {source, destination} <= {"n2", *(set(self.pods) - own)}:
            return None
        bridged = {source, destination} <= own and flow.via is None
        kind = flow.protocol if flow.protocol != "icmp" else "ipv6-icmp" if ":" in flow.source else "icmp"
        request, reply = (128, 129) if ":" in flow.source else (8, 0)
        hooks: dict[str, tuple[Hook, Hook]] = {source: ("OUTPUT", "INPUT"), destination: ("INPUT", "OUTPUT")}
        there, back = hooks.get(node, ("FORWARD", "FORWARD"))
        here = self.hosts[node].addresses
        first = WirePacket(
            there,
            flow.source,
            flow.destination,
            kind,
            flow.port,
            request if flow.protocol == "icmp" else 0,
            source_local=flow.source in here,
            destination_local=flow.destination in here,
            bridged=bridged,
        )
        return first, dataclasses.replace(
            first,
            hook=back,
            source=flow.destination,
            destination=flow.source,
            port=0,
            icmp=reply if flow.protocol == "icmp" else 0,
            state="ESTABLISHED",
            source_local=first.destination_local,
            destination_local=first.source_local,
        )

    def _owner(self, address: str) -> str:
        return next(name for name, host in self.hosts.items() if address in host.addresses)

    def flush(self) -> None:
        """Nothing filters, translates or remembers any more on the nodes."""
        for name in ("n1", "n2"):
            flush(self.hosts[name].namespace)

    @contextlib.contextmanager
    def service(self, address: str, port: int, pod: str, target: int) -> Iterator[None]:
        """On both nodes a Service's address is translated to a pod's, before routing, as kube-proxy does it."""
        family = "ip6" if ":" in address else "ip"
        to = f"{self.hosts[pod].of(6 if family == 'ip6' else 4)}"
        to = f"[{to}]:{target}" if family == "ip6" else f"{to}:{target}"
        rules = "".join(f"{family} daddr {address} {kind} dport {port} dnat to {to}\n" for kind in ("tcp", "udp"))
        table = f"table {family} service {{\nchain pods {{\ntype nat hook prerouting priority dstnat;\n{rules}}}\n}}\n"
        with self.table(table, f"{family} service"):
            yield

    @contextlib.contextmanager
    def table(self, text: str, name: str) -> Iterator[None]:
        """A table of nftables on both nodes for the duration of the block."""
        nodes = [self.hosts[node].namespace for node in ("n1", "n2")]
        for node in nodes:
            node.run("nft -f -", stdin=text)
        try:
            yield
        finally:
            for node in nodes:
                node.run(f"nft delete table {name}; conntrack -F 2>/dev/null")


def flush(namespace: Namespace) -> None:
    """Every rule, set and tracked connection of a namespace goes."""
    namespace.run(
        "nft flush ruleset; for f in iptables ip6tables; do"
        " $f-legacy-save | sed -n 's/^\\*//p' | while read t; do"
        "   policies=$([ $t = filter ] && printf ':%s ACCEPT [0:0]\\n' INPUT FORWARD OUTPUT);"
        '   printf "*%s\\n%s\\nCOMMIT\\n" "$t" "$policies" | $f-legacy-restore; done;'
        # Rules of nft that named a set let go of it some time after they are gone.
        " done; for i in 1 2 3 4 5 6 7 8 9; do ipset destroy 2>/dev/null && break; sleep 0.05; done; ipset destroy;"
        " conntrack -F 2>/dev/null; true"
    )


def _node(number: int) -> Namespace:
    node = create()
    node.run(
        f"sysctl -qw {_NODE}; ip link add kube-bridge type bridge mcast_snooping 0;"
        "sysctl -qw net.ipv6.conf.kube-bridge.accept_dad=0;"
        f"ip address add 10.244.{number}.1/24 dev kube-bridge;"
        f"ip address add fd00:244:{number}::1/64 dev kube-bridge nodad;"
        "ip link set kube-bridge up"
    )
    return node


def _pod(node: Namespace, number: int, name: str, last: int, more: tuple[str, ...]) -> Host:
    pod = create()
    own = (f"10.244.{number}.{last}", f"fd00:244:{number}::{last:x}")
    lengths = {4: 24, 6: 64}
    veth(
        node,
        f"veth{name}",
        pod,
        "eth0",
        right_addresses=tuple(f"{item}/{lengths[6 if ':' in item else 4]}" for item in (*own, *more)),
    )
    node.run(f"ip link set veth{name} master kube-bridge")
    pod.run(
        f"ip route add default via 10.244.{number}.1 src {own[0]}; ip -6 route add default via fd00:244:{number}::1"
    )
    return Host(name, pod, (*own, *more))


def _wire(net: PodNet) -> None:
    one, two, client = (net[name].namespace for name in ("n1", "n2", "client"))
    veth(
        one,
        "eth0",
        two,
        "eth0",
        left_addresses=("10.0.0.1/24", "fd00::1/64"),
        right_addresses=("10.0.0.2/24", "fd00::2/64"),
    )
    lengths = {4: 24, 6: 64}
    veth(
        one,
        "eth1",
        client,
        "eth0",
        left_addresses=("192.0.2.1/24", "2001:db8::1/64"),
        right_addresses=tuple(f"{item}/{lengths[6 if ':' in item else 4]}" for item in CLIENT_ADDRESSES),
    )
    one.run(
        "ip route add 10.244.2.0/24 via 10.0.0.2; ip -6 route add fd00:244:2::/64 via fd00::2;"
        "ip route add 198.51.100.0/24 via 192.0.2.2; ip -6 route add fc00:99::/64 via 2001:db8::2;"
        "ip -6 route add 64:ff9b::/64 via 2001:db8::2"
    )
    two.run("ip route add default via 10.0.0.1; ip -6 route add default via fd00::1")
    client.run("ip route add default via 192.0.2.1; ip -6 route add default via 2001:db8::1")


SECOND_ADDRESSES = {"c": ("10.244.1.200", "fd00:244:1::200")}
"""Pod c has two addresses of each family."""


@contextlib.contextmanager
def podnet(first: str = "abcd", second: str = "xy") -> Iterator[PodNet]:
    """The network with a pod for each letter of ``first`` on node n1 and of ``second`` on node n2."""
    net = PodNet()
    with contextlib.ExitStack() as stack:

        def keep(host: Host) -> None:
            stack.callback(host.namespace.delete)
            net.hosts[host.name] = host

        for number in (1, 2):
            addresses = (f"10.0.0.{number}", f"fd00::{number}", f"10.244.{number}.1", f"fd00:244:{number}::1")
            keep(Host(f"n{number}", _node(number), addresses))
        keep(Host("client", create(), CLIENT_ADDRESSES))
        for number, letters in ((1, first), (2, second)):
            for index, letter in enumerate(letters):
                node = net[f"n{number}"].namespace
                keep(_pod(node, number, letter, 10 + index, SECOND_ADDRESSES.get(letter, ())))
        _wire(net)
        net.probes = Probes(net.hosts.values(), PORTS)
        stack.callback(net.probes.close)
        yield net
