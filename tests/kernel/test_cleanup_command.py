"""``kube-router --cleanup-config`` as a real process in its own network namespace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.namespaces import Namespace

FOREIGN = """set -e
ip link add foreign type bridge
ip link set foreign up
ip link add port type veth peer name port2
ip link set port master foreign
ip link set port up
ip addr add 10.9.0.1/24 dev foreign
ip addr add fd09::1/64 dev foreign nodad
ip route add 10.8.0.0/24 via 10.9.0.2
ip -6 route add fd08::/64 via fd09::2
ip route add default via 10.9.0.2
ip -6 route add default via fd09::2
ip route add 10.6.0.0/24 via 10.9.0.2 proto 18
ip -6 route add fd06::/64 via fd09::2 proto bird
ip route add 10.6.1.0/24 via 10.9.0.2 proto 17 table 99
ip -6 route add fd06:1::/64 via fd09::2 proto 17 table 99
ip rule add from 10.6.0.0/16 lookup 99
ip -6 rule add from fd06::/16 lookup 99
ipset create foreign hash:net
ipset add foreign 10.6.0.0/16
ipset create inet6:foreign hash:net family inet6
ipset create kube-router-svip hash:ip
iptables -A FORWARD -i foreign -j ACCEPT
ip6tables -A FORWARD -i foreign -j ACCEPT
iptables -A FORWARD -i kube-bridge -m comment --comment "not theirs" -j ACCEPT
iptables -t nat -A POSTROUTING -m set --match-set foreign src -j MASQUERADE
ip6tables -t nat -A POSTROUTING -s fd06::/16 -j MASQUERADE
iptables -t mangle -A PREROUTING -i foreign -j MARK --set-mark 7
nft add table inet foreign
nft add chain inet foreign in { type filter hook input priority 0 \\; }
"""
PODS, NODES = "kube-router-pod-subnets", "kube-router-node-ips"
OURS = f"""set -e
ip link add kube-bridge type bridge
ip link set kube-bridge up
ip route add 10.7.0.0/24 via 10.9.0.2 proto 17
ip -6 route add fd07::/64 via fd09::2 proto 17
ipset create {PODS} hash:net timeout 0
ipset create {NODES} hash:ip timeout 0
ipset create inet6:{PODS} hash:net timeout 0 family inet6
ipset create inet6:{NODES} hash:ip timeout 0 family inet6
iptables -t nat -A POSTROUTING -m set --match-set {PODS} src -m set ! --match-set {PODS} dst -j MASQUERADE
ip6tables -t nat -A POSTROUTING -m set --match-set inet6:{PODS} src -m set ! --match-set inet6:{PODS} dst \\
  -m set ! --match-set inet6:{NODES} dst -j MASQUERADE --random-fully
"""
"""As upstream leaves it behind too, with two of the forms that its masquerade rule has had."""
ACCEPTS = """set -e
{0} -I FORWARD -i kube-bridge -m comment --comment "allow outbound traffic from pods" -j ACCEPT
{0} -I FORWARD -o kube-bridge -m comment --comment "allow inbound traffic to pods" -j ACCEPT
{0} -I FORWARD -o foreign -m comment --comment \
  "allow outbound node port traffic on node interface with which node ip is associated" -j ACCEPT
"""


def clean(netns: Namespace, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "kube_router.supervisor.cli", "--cleanup-config", *arguments]
    return subprocess.run(
        ["ip", "netns", "exec", netns.name, *command], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )


def state(netns: Namespace) -> dict[str, str]:
    """Everything, as text; only counters, and link-local routes, which come by themselves, are left out."""
    commands = {
        "links": "ip -br link | awk '{print $1}'",
        "addresses": "ip -o address | sed '/fe80/d'",
        "rules": "ip rule; ip -6 rule",
        "routes": "ip route show table all",
        "routes6": "ip -6 route show table all | sed '/fe80/d;/ff00/d;/^local/d;/^anycast/d'",
        "sets": "ipset save",
        "iptables": "iptables-save | sed '/^#/d;s/ \\[.*//'",
        "ip6tables": "ip6tables-save | sed '/^#/d;s/ \\[.*//'",
        "nftables": "nft list table inet foreign 2>/dev/null",
    }
    return {name: netns.run(command, check=False) for name, command in commands.items()}


def test_ours_goes_and_foreign_state_stays(netns: Namespace, tmp_path: Path) -> None:
    netns.run(FOREIGN)
    before = state(netns)
    netns.run(OURS)
    for program in ("iptables", "ip6tables"):
        netns.run(ACCEPTS.format(program))
    made = state(netns)
    assert all(made[part] != before[part] for part in ("links", "routes", "routes6", "sets", "iptables", "ip6tables"))
    result = clean(netns, f"--state-dir={tmp_path}", "--overlay-type=foo")
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert 'ignored while cleaning up: --overlay-type="foo"' in result.stdout
    for worker in ("router", "cni"):
        assert f"clean-up of {worker}: done" in result.stdout
    assert state(netns) == before


def test_a_second_clean_up_has_nothing_to_do(netns: Namespace, tmp_path: Path) -> None:
    before = state(netns)
    for _ in range(2):
        result = clean(netns, f"--state-dir={tmp_path}")
        assert (result.returncode, result.stderr) == (0, ""), result.stdout
        assert "ERROR" not in result.stdout
    assert state(netns) == before
