"""Cuts open connections that a change of policies or pods has forbidden (``--netpol-recheck-established``).

Touches the kernel: conntrack, and the node's own addresses. A connection is cut by taking its conntrack entry away;
its next packet meets the rules as a first one. What could not be looked at is owed, and looked at the next time.
"""

from __future__ import annotations

import logging

from kube_router.workers.firewall.recheck import Judge, concerned
from kube_router.workers.firewall.rules import Changed, Frame, Ruleset
from kube_router.workers.kernel.conntrack import ConntrackDriver
from kube_router.workers.kernel.links import LinkDriver
from kube_router.workers.kernel.netlink import Overflow
from kube_router.workers.model import Failure, Family, Outcome

log = logging.getLogger(__name__)

PHASE = "conntrack"
CUT = "policy_connections_cut"
CUTS_LOGGED = 20


class Established:
    """Acts on the network namespace of the thread that makes it; raises OSError when that has no conntrack."""

    def __init__(self) -> None:
        self._conntrack, self._links = ConntrackDriver(), LinkDriver()
        self._owed: frozenset[str] = frozenset()

    def close(self) -> None:
        """Close the sockets."""
        self._conntrack.close()
        self._links.close()

    def note(self, ruleset: Ruleset, changed: Changed) -> None:
        """Remember whose flows a change concerns, until `cut`."""
        self._owed |= concerned(ruleset, changed)

    def cut(self, ruleset: Ruleset, frame: Frame) -> Outcome:
        """Cut what is now forbidden among the flows of all that was noted; the ruleset must stand in the kernel."""
        if not self._owed:
            return Outcome()
        try:
            judge = Judge(ruleset, frame, self._node_addresses())
            doomed = [
                each
                for family in frame.families
                for each in judge.forbidden(self._conntrack.flows_of(family, self._of(family)))
            ]
            cut = self._conntrack.delete(flow for flow, _ in doomed)
        except (OSError, Overflow) as error:
            text = f"open connections cannot be rechecked: {error or 'answers were lost'}"
            return Outcome(failures=(Failure(PHASE, text),))
        self._owed = frozenset()
        for flow, refusal in doomed[:CUTS_LOGGED]:
            log.info("cut: %s, forbidden by %s", flow, refusal)
        if len(doomed) > CUTS_LOGGED:
            log.info("cut: %d more", len(doomed) - CUTS_LOGGED)
        return Outcome(writes=cut, counters={CUT: float(cut)})

    def _of(self, family: Family) -> list[str]:
        return [address for address in self._owed if (":" in address) == (family is Family.IPV6)]

    def _node_addresses(self) -> frozenset[str]:
        links = self._links.observe().links
        return frozenset(str(each.ip) for link in links for each in link.addresses)
