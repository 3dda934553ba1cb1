"""Route reflectors (RFC 4456): which node has which role, and which pairs of nodes hold a session.

Pure: facts of Nodes in, decisions out. Both ends of a pair come to the same answer, as both look at all Nodes.

=============== ================================================================================
pair            session
=============== ================================================================================
server, any     yes; a client has the server of its own cluster id
client, client  no: the servers pass routes on
client, plain   no: a node without role speaks to the servers
plain, plain    yes
=============== ================================================================================

A server reflects for every node that is no server, with or without role: so a node that becomes a client has all routes
from the servers before it drops its other sessions, and its sessions with them go on.

A client whose cluster id no server has peers with every server, as in kube-router, which never compares ids: a typing
error costs sessions, not reachability.
"""

from __future__ import annotations

from collections.abc import Iterable

from kube_router.workers.nodefacts import NodeFacts, Reflection


class Reflectors:
    """The roles of all nodes."""

    def __init__(self, nodes: Iterable[NodeFacts]) -> None:
        self._served = {
            node.reflection.cluster_id for node in nodes if node.reflection is not None and node.reflection.server
        }

    @property
    def served(self) -> bool:
        """Whether there is any server."""
        return bool(self._served)

    def paired(self, one: NodeFacts, other: NodeFacts) -> bool:
        """Whether the two hold a session with each other."""
        first, second = one.reflection, other.reflection
        if first is None or first.server:
            first, second = second, first
        # Now the first one is the client, if there is any.
        if first is None or first.server:
            return True
        if second is None or not second.server:
            return False
        return self._lost(first) or first.cluster_id == second.cluster_id

    def _lost(self, client: Reflection) -> bool:
        return not client.cluster_id or client.cluster_id not in self._served
