"""Any cluster, any policies, any packets: the judge, the rules of iptables and those of nftables say the same.

The three share nothing but the objects: the judge reads NetworkPolicy, the walkers read the text of rules.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.firewall_strategies import frames, object_lists, state_of, tried
from support.firewall_walks import iptables_walk, nft_walk, ruleset_of
from support.policyworld import BOTH

from kube_router.ipc.messages import Projection
from kube_router.workers.firewall.names import ALLOWED, PASSED
from kube_router.workers.firewall.rules import Frame
from kube_router.workers.firewall.verdict import evaluate

OURS = ALLOWED | PASSED


@given(objects=object_lists(), frame=frames, seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_both_backends_do_what_the_judge_says(objects: tuple[Projection, ...], frame: Frame, seed: int) -> None:
    state, ruleset = state_of(objects, frame), ruleset_of(objects)
    tables = {family: (iptables_walk(ruleset, frame, family), nft_walk(ruleset, frame, family)) for family in BOTH}
    for each in tried(seed, 150):
        verdict = evaluate(state, each.packet)
        for table in tables[each.packet.family]:
            walked = table.walk(each.wire)
            assert walked.allowed == verdict.allowed, f"{each.packet}: {type(table).__name__} {walked}; {verdict}"
            assert walked.mark & ~OURS == each.wire.mark & ~OURS, "other bits of the mark belong to others"
