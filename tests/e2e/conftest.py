"""Fixtures of the end-to-end tier: a standing lab of three nodes, made of network namespaces."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from lab import network
from lab.cluster import CNI_PLUGIN_DIRS, Lab, wait_until
from lab.connections import close_shop, open_shop
from lab.topology import NODES
from support.gotools import tools_dir

BACKEND: dict[str, tuple[str, ...]] = {"debian": (), "current": ("--use-nftables-for-netpol",)}
"""Flags that choose the firewall's backend: each runs on one of the two labs."""


@pytest.fixture(scope="module", params=["debian", "current"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab in which every agent is in sync and one pod runs on each node.

    Once with Debian's gobgpd 3.10 and CNI plugins, policies in iptables; once with the current gobgpd 4 and plugins,
    policies in nftables.
    """
    current = request.param == "current"
    made = Lab(
        f"e2e{os.getpid()}{request.param[0]}",
        gobgpd_dir=tools_dir() if current else None,
        plugin_dirs=(tools_dir(),) if current else CNI_PLUGIN_DIRS,
        extra_flags=BACKEND[request.param],
    )
    try:
        made.up(lambda text: None)
        for node in NODES:
            assert wait_until(lambda name=node.name: made.ready(name), 60), explain(made, node.name)
            made.add_pod(node.name)
        yield made
    except network.LabError as error:
        pytest.fail(str(error))
    finally:
        made.down()


@pytest.fixture
def shop_lab(lab: Lab) -> Iterator[Lab]:
    """The lab with the pods and the server of `lab.shop`; the policies are the test's to post."""
    try:
        open_shop(lab)
        yield lab
    finally:
        close_shop(lab)


def explain(lab: Lab, node: str) -> str:
    """Status and last log lines of a node, for a failed assertion."""
    log = lab.log_file(node).read_text(errors="replace") if lab.log_file(node).exists() else ""
    return f"{node}: {lab.status(node)}\n" + "\n".join(log.splitlines()[-40:])
