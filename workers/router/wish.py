"""What a given gobgpd can be asked for: the desired state, less what this host or this daemon cannot do.

Touches sockets, to see on which addresses this host can listen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kube_router.ipc.messages import Node
from kube_router.workers.nodefacts import NodeFacts
from kube_router.workers.router.bgpstate import BgpState
from kube_router.workers.router.desired import DesiredBgp, desired_bgp, listen_addresses
from kube_router.workers.router.gobgp import process
from kube_router.workers.router.neighbors import without_bfd
from kube_router.workers.router.vips import Vips
from kube_router.workers.settings import Secrets, Settings


def wished(
    generation: int,
    node: Node,
    own: NodeFacts,
    nodes: Sequence[NodeFacts],
    settings: Settings,
    secrets: Secrets,
    actual: BgpState,
    vips: Vips,
    *,
    patient: bool = False,
) -> DesiredBgp:
    """The desired state for a daemon of this ``generation``.

    ``patient``: the node is coming up, and its addresses will be there in a moment. Until then BGP is not started: a
    StartBgp that fails at its second address leaves the first one occupied.
    """
    running = actual.speaker.listen_addresses if actual.speaker is not None else frozenset()
    unbindable = process.unbindable(listen_addresses(node, own, settings.families, []), running)
    desired = desired_bgp(node, own, nodes, settings, secrets, actual, vips, unbindable=unbindable)
    if unbindable and patient and actual.speaker is None:
        desired = replace(desired, state=replace(desired.state, speaker=None))
    if generation == 3:
        state, problems = without_bfd(desired.state, "gobgpd 3")
        desired = replace(desired, state=state, problems=(*desired.problems, *problems))
    return desired
