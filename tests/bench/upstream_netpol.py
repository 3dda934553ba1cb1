"""The named baseline of the firewall's benchmarks: one sync as kube-router 2.11 does it, with the same kernel tools.

Its algorithm, not its code: every policy of the cluster becomes sets and a chain whose name holds the time, every local
pod a chain; all sets are written anew and swapped by ``ipset restore``; the filter table is saved, lines that mention a
chain of the last sync are searched for and dropped, and the whole table is restored. It is the same after any change.

`tables` is pure; `Upstream` runs the programs in the network namespace of the calling thread.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

from kube_router.ipc.messages import Key, Namespace, NetworkPolicy, Pod, PolicyPeer, PolicyPort, PolicyRule, Projection
from kube_router.workers.firewall.selectors import matches, selector
from kube_router.workers.model import Family

ALLOWED, PASSED = "0x10000/0x10000", "0x20000/0x20000"
TOP = {"INPUT": "KUBE-ROUTER-INPUT", "FORWARD": "KUBE-ROUTER-FORWARD", "OUTPUT": "KUBE-ROUTER-OUTPUT"}
DEFAULT, COMMON, TAIL = "KUBE-NWPLCY-DEFAULT", "KUBE-NWPLCY-COMMON", "KUBE-NWPLCY-TAIL"
POLICY_PREFIX, POD_PREFIX = "KUBE-NWPLCY-", "KUBE-POD-FW-"
HEADS = {
    Family.IPV4: ("-d 10.96.0.0/12 -j RETURN",),
    Family.IPV6: (),
}
NODE_PORTS = tuple(
    f"-p {protocol} -m addrtype --dst-type LOCAL -m multiport --dports 30000:32767 -j RETURN"
    for protocol in ("tcp", "udp", "sctp")
)
ICMP = {
    Family.IPV4: ("icmp", "icmp-type", ("echo-request", "destination-unreachable", "time-exceeded")),
    Family.IPV6: (
        "ipv6-icmp",
        "icmpv6-type",
        (
            "echo-request",
            "destination-unreachable",
            "time-exceeded",
            "neighbor-solicitation",
            "neighbor-advertisement",
            "echo-reply",
        ),
    ),
}
LAST = (
    f'-m comment --comment "rule to explicitly handle traffic for network policies ACCEPT/REJECT decision" -j {TAIL}',
    f'-m comment --comment "rule to explicitly ACCEPT traffic that comply to network policies" -m mark --mark {PASSED} '
    "-j ACCEPT",
)
Objects = Mapping[str, Mapping[Key, Projection]]


def hashed(*parts: object) -> str:
    """16 characters of base32(SHA-256) over the parts, as they stand one after the other."""
    return base64.b32encode(hashlib.sha256("".join(map(str, parts)).encode()).digest()).decode()[:16]


def temporary_name(options: str) -> str:
    """The set that is filled before it is swapped, by its options."""
    return "TMP-" + base64.b32encode(hashlib.sha1(f"tmp:{options}".encode()).digest()[:10]).decode()


@dataclass(slots=True)
class Tables:
    """What one family comes to: sets (name → type and entries), chains and rule lines in their order."""

    family: Family
    sets: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    policy_chains: list[str] = field(default_factory=list)
    policy_lines: list[str] = field(default_factory=list)
    pod_chains: list[tuple[str, list[str]]] = field(default_factory=list)

    def name(self, name: str) -> str:
        return f"inet6:{name}" if self.family is Family.IPV6 else name

    def set(self, name: str, kind: str, entries: Iterable[str]) -> str:
        """Declare a set; its name in the kernel."""
        full = self.name(name)
        split = (entry.partition(" ") for entry in entries)
        self.sets[full] = (kind, [f"{member} timeout 0{space}{nomatch}" for member, space, nomatch in split])
        return full


class Model:
    """The cluster as upstream indexes it: pods by namespace, and nothing else."""

    def __init__(self, found: Objects) -> None:
        self.namespaces = cast("Mapping[Key, Namespace]", found["namespaces"])
        self.policies = cast("Mapping[Key, NetworkPolicy]", found["networkpolicies"])
        self.pods: dict[str, list[Pod]] = {}
        for item in cast("Mapping[Key, Pod]", found["pods"]).values():
            if item.ips and not item.host_network and item.phase not in ("Succeeded", "Failed", "Completed"):
                self.pods.setdefault(item.namespace, []).append(item)

    def local(self, node: str) -> list[Pod]:
        """Pods of a node: all are looked through."""
        return [item for items in self.pods.values() for item in items if item.node_name == node]

    def targets(self, policy: NetworkPolicy) -> list[Pod]:
        chosen = selector(policy.pod_selector)
        return [item for item in self.pods.get(policy.namespace, ()) if matches(chosen, item.labels)]

    def peers(self, policy: NetworkPolicy, peers: Iterable[PolicyPeer]) -> list[Pod]:
        return [item for peer in peers if peer.ip_block is None for item in self._peer(policy, peer)]

    def _peer(self, policy: NetworkPolicy, peer: PolicyPeer) -> Iterator[Pod]:
        names: Iterable[str] = (policy.namespace,)
        if peer.namespace_selector is not None:
            wanted = selector(peer.namespace_selector)
            names = [name for name, item in self.namespaces.items() if matches(wanted, item.labels)]
        chosen = selector(peer.pod_selector) if peer.pod_selector is not None else ()
        for name in names:
            for item in self.pods.get(name, ()):
                if matches(chosen, item.labels):
                    yield item


def first_address(pod: Pod, family: Family) -> str | None:
    """Of a family; upstream looks at no other."""
    return next((text for text in pod.ips if (":" in text) == (family is Family.IPV6)), None)


def first_addresses(pods: Iterable[Pod], family: Family) -> list[str]:
    found = (first_address(item, family) for item in pods)
    return list(dict.fromkeys(text for text in found if text is not None))


def tables(found: Objects, node: str, version: str, families: Iterable[Family] = Family) -> dict[Family, Tables]:
    """Sets, chains and rules of all families for one node."""
    model = Model(found)
    targets = {key: model.targets(policy) for key, policy in model.policies.items()}
    selected = {key: {item.key for item in items} for key, items in targets.items()}
    built = {}
    for family in families:
        made = built[family] = Tables(family)
        for key, policy in model.policies.items():
            _policy(made, model, policy, targets[key], version)
        for item in model.local(node):
            _pod(made, model, item, selected, version)
    return built


def _types(policy: NetworkPolicy) -> tuple[bool, bool]:
    types = policy.policy_types or ("Ingress",)
    return "Ingress" in types, "Egress" in types


def _policy(made: Tables, model: Model, policy: NetworkPolicy, targets: list[Pod], version: str) -> None:
    ingress, egress = _types(policy)
    identity = (policy.namespace, policy.name)
    chain = policy_chain(policy, version, made.family)
    made.policy_chains.append(chain)
    own = first_addresses(targets, made.family)
    if ingress:
        match = f"--match-set {made.set(f'KUBE-DST-{hashed(*identity, made.family)}', 'hash:ip', own)} dst"
        for number, rule in enumerate(policy.ingress or ()):
            made.policy_lines += _rule(made, model, policy, rule, (chain, match, "ingress", number, targets))
    if egress:
        match = f"--match-set {made.set(f'KUBE-SRC-{hashed(*identity, made.family)}', 'hash:ip', own)} src"
        for number, rule in enumerate(policy.egress or ()):
            made.policy_lines += _rule(made, model, policy, rule, (chain, match, "egress", number, targets))


def policy_chain(policy: NetworkPolicy, version: str, family: Family) -> str:
    return POLICY_PREFIX + hashed(policy.namespace, policy.name, version, family)


def _rule(
    made: Tables, model: Model, policy: NetworkPolicy, rule: PolicyRule, where: tuple[str, str, str, int, list[Pod]]
) -> Iterator[str]:
    """Two lines for each pair of a peer and a port."""
    chain, own, direction, number, targets = where
    ingress = direction == "ingress"
    identity = (policy.namespace, policy.name, f"{direction}rule", number)
    prefix, side = ("KUBE-SRC-", "src") if ingress else ("KUBE-DST-", "dst")
    peers: list[tuple[str, str]] = []
    pods = model.peers(policy, rule.peers or ())
    if not rule.peers:
        peers.append(("any", ""))
    if pods:
        entries = first_addresses(pods, made.family)
        name = made.set(prefix + hashed(*identity, made.family, "pod"), "hash:ip", entries)
        peers.append(("pods", f"-m set --match-set {name} {side} "))
    if blocks := list(_blocks(rule.peers or (), made.family)):
        name = made.set(prefix + hashed(*identity, made.family, "ipblock"), "hash:net", blocks)
        peers.append(("cidr", f"-m set --match-set {name} {side} "))
    numeric = [port for port in rule.ports or () if not isinstance(port.port, str)]
    named = _named(rule.ports or (), targets if ingress else pods)
    for kind, match in peers:
        ahead = f'-A {chain} -m comment --comment "{policy.key} {direction} {kind}" '
        sets = f"{match}-m set {own} " if ingress else f"-m set {own} {match}"
        for port in numeric:
            yield from _pair(f"{ahead}{sets}{_port(port)}")
        for index, ((protocol, value), holders) in enumerate(named.items()):
            entries = first_addresses(holders, made.family)
            full = ("KUBE-DST-", *identity[:3], f"{number}{index}", made.family, "namedport")
            name = made.set(full[0] + hashed(*full[1:]), "hash:ip", entries)
            yield from _pair(
                f"{ahead}{match if ingress else ''}-m set --match-set {name} dst -p {protocol} --dport {value} "
            )
        if not numeric and not named:
            yield from _pair(f"{ahead}{sets}")


def _pair(line: str) -> tuple[str, str]:
    return f"{line}-j MARK --set-xmark {ALLOWED}", f"{line}-m mark --mark {ALLOWED} -j RETURN"


def _port(port: PolicyPort) -> str:
    if port.port is None:
        return f"-p {port.protocol} "
    last = f":{port.end_port}" if port.end_port is not None else ""
    return f"-p {port.protocol} --dport {port.port}{last} "


def _named(ports: Iterable[PolicyPort], pods: Iterable[Pod]) -> dict[tuple[str, int], list[Pod]]:
    names = {(port.port, port.protocol) for port in ports if isinstance(port.port, str)}
    found: dict[tuple[str, int], list[Pod]] = {}
    for item in pods if names else ():
        for port in item.ports:
            if (port.name, port.protocol) in names:
                found.setdefault((port.protocol, port.port), []).append(item)
    return found


def _blocks(peers: Iterable[PolicyPeer], family: Family) -> Iterator[str]:
    everything = {"0.0.0.0/0": ("0.0.0.0/1", "128.0.0.0/1"), "::/0": ("2000::/3", "fd00::/8")}
    for peer in peers:
        if peer.ip_block is None or (":" in peer.ip_block.cidr) != (family is Family.IPV6):
            continue
        yield from everything.get(peer.ip_block.cidr, (peer.ip_block.cidr,))
        for text in peer.ip_block.excepted:
            for part in everything.get(text, (text,)):
                yield f"{part} nomatch"


def _pod(made: Tables, model: Model, pod: Pod, selected: Mapping[Key, set[Key]], version: str) -> None:
    address = first_address(pod, made.family)
    if address is None:
        return
    chain = POD_PREFIX + hashed(pod.namespace, pod.name, version)
    add = f"-A {chain}"
    lines = [
        f'{add} -m comment --comment "common netpol rules" -j {COMMON}',
        f'{add} -m comment --comment "from local node" -m addrtype --src-type LOCAL -d {address} -j ACCEPT',
    ]
    covered = [False, False]
    jumps = []
    for key, policy in model.policies.items():
        if pod.key not in selected[key]:
            continue
        ingress, egress = _types(policy)
        covered = [covered[0] or ingress, covered[1] or egress]
        match = "" if ingress and egress else f"-d {address} " if ingress else f"-s {address} "
        target = policy_chain(policy, version, made.family)
        jumps.append(f'{add} {match}-m comment --comment "{key} policy" -j {target}')
    if not covered[1]:
        lines.append(f'{add} -s {address} -m comment --comment "default egress" -j {DEFAULT}')
    if not covered[0]:
        lines.append(f'{add} -d {address} -m comment --comment "default ingress" -j {DEFAULT}')
    refused = f"-m mark ! --mark {ALLOWED}"
    lines += jumps
    lines += [
        f'{add} -m comment --comment "{pod.key} log-drop" {refused} -m limit --limit 10/min --limit-burst 10 '
        "-j NFLOG --nflog-group 100",
        f'{add} -m comment --comment "{pod.key} reject" {refused} -j REJECT',
        f"{add} -j MARK --set-xmark 0x0/0x10000",
        f'{add} -m comment --comment "set netpol-ok mark" -j MARK --set-xmark {PASSED}',
    ]
    made.pod_chains.append((chain, [*lines, *_into(pod, address, chain)]))


def _into(pod: Pod, address: str, chain: str) -> Iterator[str]:
    """The seven jumps into a pod's chain."""
    bridged = "-m physdev --physdev-is-bridged "
    inward = f'-m comment --comment "{pod.key} in" -d {address} -j {chain}'
    outward = f'-m comment --comment "{pod.key} out" -s {address} -j {chain}'
    yield f"-A {TOP['FORWARD']} {inward}"
    yield f"-A {TOP['OUTPUT']} {inward}"
    yield f"-A {TOP['FORWARD']} {bridged}{inward}"
    for top in TOP.values():
        yield f"-A {top} {outward}"
    yield f"-A {TOP['FORWARD']} {bridged}{outward}"


def restore_script(sets: Mapping[str, tuple[str, list[str]]], options: Mapping[str, str]) -> str:
    """Input for ``ipset restore -exist``: every set filled beside and swapped. ``options``: of those that exist."""
    lines: list[str] = []
    used: dict[str, None] = {}
    for name, (kind, entries) in sorted(sets.items()):
        family = " family inet6" if name.startswith("inet6:") else ""
        how = options.get(name, f"{kind} timeout 0{family}")
        temporary = temporary_name(how)
        if temporary not in used:
            used[temporary] = None
            lines += [f"create {temporary} {how}", f"flush {temporary}"]
        lines += [f"add {temporary} {entry}" for entry in entries]
        lines += [f"create {name} {how}", f"swap {temporary} {name}", f"flush {temporary}"]
    lines += [f"destroy {name}" for name in sorted(used)]
    return "\n".join([*lines, ""])


class Upstream:
    """The state that upstream keeps between syncs: none but the kernel's."""

    def __init__(self, node: str, families: tuple[Family, ...] = tuple(Family)) -> None:
        self._node, self._families = node, families
        self.programs = 0
        self.in_programs = 0.0

    def sync(self, found: Objects) -> float:
        """One full sync; seconds. `programs` and `in_programs` tell how many were run and the seconds in them."""
        self.programs, self.in_programs = 0, 0.0
        began = time.perf_counter()
        version = str(time.time_ns())
        for family in self._families:
            self._ensure(family)
        saved = {family: self._run([_tool(family, "-save"), "-t", "filter"]) for family in self._families}
        buffers = {family: bytearray(text.encode()) for family, text in saved.items()}
        built = tables(found, self._node, version, self._families)
        for family, made in built.items():
            self._sets(family, made)
            _rewrite(buffers[family], made)
        self._restore(built, buffers)
        self._destroy_stale(built)
        return time.perf_counter() - began

    def _run(self, arguments: list[str], stdin: str = "", *, check: bool = True) -> str:
        began = time.perf_counter()
        done = subprocess.run(arguments, input=stdin, capture_output=True, text=True, check=False)
        self.programs += 1
        self.in_programs += time.perf_counter() - began
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()[:500]}")
        return done.stdout if not done.returncode else ""

    def _ensure(self, family: Family) -> None:
        """The chains that stay and their rules: a program for each look, and for each change."""
        tool = _tool(family)
        for builtin, chain in TOP.items():
            self._ensure_chain(tool, chain)
            jump = f'-m comment --comment "kube-router netpol - {hashed(builtin, chain)}" -j {chain}'
            self._ensure_rule(tool, builtin, jump, insert=True)
            self._run([tool, "-w", "-S", builtin])
        for rule in (*HEADS[family], *NODE_PORTS):
            self._ensure_rule(tool, TOP["INPUT"], rule)
            self._run([tool, "-w", "-S", TOP["INPUT"]])
        self._ensure_chain(tool, DEFAULT)
        self._ensure_rule(tool, DEFAULT, f"-j MARK --set-xmark {ALLOWED}")
        self._ensure_chain(tool, COMMON)
        protocol, option, types = ICMP[family]
        self._ensure_rule(tool, COMMON, "-m conntrack --ctstate INVALID -j DROP")
        self._ensure_rule(tool, COMMON, "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT")
        for kind in types:
            self._ensure_rule(tool, COMMON, f"-p {protocol} --{option} {kind} -j ACCEPT")
        self._ensure_chain(tool, TAIL)
        self._ensure_rule(tool, TAIL, f"-m mark --mark {PASSED} -j ACCEPT")

    def _ensure_chain(self, tool: str, chain: str) -> None:
        if not self._run([tool, "-w", "-S", chain, "1"], check=False):
            self._run([tool, "-w", "-N", chain], check=False)

    def _ensure_rule(self, tool: str, chain: str, rule: str, *, insert: bool = False) -> None:
        command = f"{tool} -w -C {chain} {rule}"
        if self._status(command):
            self._run(["sh", "-c", f"{tool} -w {'-I' if insert else '-A'} {chain} {rule}"])

    def _status(self, command: str) -> int:
        began = time.perf_counter()
        done = subprocess.run(["sh", "-c", f"exec {command}"], capture_output=True, check=False)
        self.programs += 1
        self.in_programs += time.perf_counter() - began
        return done.returncode

    def _sets(self, family: Family, made: Tables) -> None:
        """``ipset save`` of the whole host, then all sets of this family anew."""
        options = {}
        for line in self._run(["ipset", "save"]).splitlines():
            if line.startswith("create "):
                _, name, rest = line.split(" ", 2)
                if name.startswith("inet6:") == (family is Family.IPV6):
                    words = rest.split(" ")
                    if "initval" in words:
                        at = words.index("initval")
                        del words[at : at + 2]
                    options[name] = " ".join(words)
        self._run(["ipset", "restore", "-exist"], restore_script(made.sets, options))

    def _restore(self, built: Mapping[Family, Tables], buffers: Mapping[Family, bytearray]) -> None:
        """Drop what mentions a chain of an earlier sync, a look for each name in each line; then the whole table."""
        stale: list[str] = []
        for family, made in built.items():
            tool = _tool(family)
            active = {*made.policy_chains, *(chain for chain, _ in made.pod_chains), DEFAULT, COMMON, TAIL}
            chains = [line[3:] for line in self._run([tool, "-w", "-S"]).splitlines() if line.startswith("-N ")]
            stale += [name for name in chains if name.startswith((POLICY_PREFIX, POD_PREFIX)) and name not in active]
            lines = [line for line in buffers[family].decode().split("\n") if not _mentions(line, stale)]
            declared = [line for line in lines if line.startswith(":")]
            rules = [line for line in lines if line.startswith("-")]
            text = "\n".join(["*filter", *declared, *rules, "COMMIT", ""])
            self._run([_tool(family, "-restore"), "--wait", "-T", "filter"], text)

    def _destroy_stale(self, built: Mapping[Family, Tables]) -> None:
        active = {name for made in built.values() for name in made.sets}
        for line in self._run(["ipset", "save"]).splitlines():
            if line.startswith("create "):
                name = line.split(" ", 2)[1]
                if name.removeprefix("inet6:").startswith(("KUBE-SRC-", "KUBE-DST-")) and name not in active:
                    self._run(["ipset", "destroy", name])


def _tool(family: Family, action: str = "") -> str:
    return f"{'iptables' if family is Family.IPV4 else 'ip6tables'}-nft{action}"


def _mentions(line: str, names: list[str]) -> bool:
    for name in names:  # noqa: SIM110 - a generator would cost more than the look, and upstream pays none
        if name in line:
            return True
    return False


def _rewrite(buffer: bytearray, made: Tables) -> None:
    """Add policy chains and rules, then pod chains; the whole buffer is searched and written again on the way."""
    head = "".join(f":{chain} - [0:0]\n" for chain in made.policy_chains)
    buffer += (head + "\n".join(made.policy_lines) + "\n").encode()
    for chain, lines in made.pod_chains:
        buffer += f":{chain} - [0:0]\n".encode()
        for line in lines:
            if "NFLOG" in line and line.encode() in bytes(buffer):
                continue
            buffer += line.encode() + b"\n"
    for line in LAST:
        for top in TOP.values():
            kept = [text for text in buffer.decode().split("\n") if text and text != f"-A {top} {line}"]
            buffer[:] = "\n".join([*kept, f"-A {top} {line}", ""]).encode()
