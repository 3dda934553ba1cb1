"""``kube-router --cleanup-config`` as a real process in its own network namespace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.namespaces import Namespace

FOREIGN = """
ip link add foreign type bridge && ip link set foreign up
ip addr add 10.9.0.1/24 dev foreign && ip addr add fd09::1/64 dev foreign nodad
ip route add 10.8.0.0/24 via 10.9.0.2 && ip -6 route add fd08::/64 via fd09::2
iptables -A FORWARD -i foreign -j ACCEPT && ip6tables -A FORWARD -i foreign -j ACCEPT
"""
OURS = """
ip link add kube-bridge type bridge && ip link set kube-bridge up
ip route add 10.7.0.0/24 via 10.9.0.2 proto 17 && ip -6 route add fd07::/64 via fd09::2 proto 17
"""


def clean(netns: Namespace, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "kube_router.supervisor.cli", "--cleanup-config", *arguments]
    return subprocess.run(
        ["ip", "netns", "exec", netns.name, *command], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )


def state(netns: Namespace) -> dict[str, str]:
    commands = {
        "links": "ip -br link | awk '{print $1}'",
        "routes": "ip route",
        "routes6": "ip -6 route show table main | sed '/fe80/d'",
        "rules": "iptables-save | sed '/^#/d'",
        "rules6": "ip6tables-save | sed '/^#/d'",
    }
    return {name: netns.run(command) for name, command in commands.items()}


def test_ours_goes_and_foreign_state_stays(netns: Namespace, tmp_path: Path) -> None:
    netns.run(FOREIGN)
    before = state(netns)
    netns.run(OURS)
    assert "kube-bridge" in state(netns)["links"]
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
