"""What gobgpd of each generation is sent for one set of policies, and that it reads back as the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from support.bgp import asking, node

from kube_router.workers.router import names
from kube_router.workers.router.bgpstate import LEARNED_INTERNAL, Attributes, Policies, PrefixRange, Statement
from kube_router.workers.router.gobgp import convert
from kube_router.workers.router.gobgp.v3 import DialectV3
from kube_router.workers.router.gobgp.v4 import DialectV4
from kube_router.workers.router.vips import Vips

GOLDEN = Path(__file__).parents[1] / "golden" / "router"
DIALECTS = [DialectV3(), DialectV4()]
ANNOTATIONS = {
    "rr.server": "1",
    "node.bgp.communities": "no-export,65000:1",
    "node.bgp.large-communities": "64512:1:2",
    "path-prepend.as": "65100",
    "path-prepend.repeat-n": "2",
    "node.bgp.customimportreject": "172.16.0.0/12,2001:db8:5::/48",
}
A = node("a", ["10.0.0.1", "2001:db8::1"], ["10.244.1.0/24", "fd00:1::/64"], ANNOTATIONS)
B = node("b", ["10.0.0.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:2::/64"], {"rr.client": "1"})
EVERYTHING = asking(
    A,
    B,
    vips=Vips(frozenset({"203.0.113.7"}), frozenset({"203.0.113.7", "2001:db8:99::7"})),
    override_nexthop=True,
    bgp_accept_covering_prefixes=True,
    peer_router_ips=("10.0.1.1", "2001:db8:1::1"),
    peer_router_asns=(65000, 65000),
).state.policies


def listed(message: Any) -> str:
    """A line for each set and each statement."""
    lines = [f"set {text_format.MessageToString(item, as_one_line=True)}" for item in message.defined_sets]
    for policy in message.policies:
        statements = (text_format.MessageToString(item, as_one_line=True) for item in policy.statements)
        lines += [f"policy {policy.name}", *statements]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda item: f"v{item.generation}")
def test_policies_are_sent_as_recorded_and_read_back_as_the_same(dialect: Any) -> None:
    message = convert.policies_message(dialect, EVERYTHING)
    assert listed(message) == (GOLDEN / f"policies-v{dialect.generation}.txt").read_text()
    prefix = [item for item in message.defined_sets if item.defined_type == dialect.messages.DEFINED_PREFIX]
    neighbor = [item for item in message.defined_sets if item.defined_type == dialect.messages.DEFINED_NEIGHBOR]
    assert convert.policies_of(dialect, prefix, neighbor, message.policies) == EVERYTHING


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda item: f"v{item.generation}")
def test_statements_of_somebody_else_never_read_as_ours(dialect: Any) -> None:
    ours = Statement("some", "peers", True, Attributes(communities=("1:1",)), LEARNED_INTERNAL)
    policies = Policies({"some": frozenset({PrefixRange("10.0.0.0/8", 8, 8)})}, {}, (ours,), ())

    def read(message: Any) -> tuple[Statement, ...]:
        return convert.policies_of(dialect, message.defined_sets, (), message.policies).export

    message = convert.policies_message(dialect, policies)
    assert read(message) == (ours,)
    (statement,) = next(item for item in message.policies if item.name == names.EXPORT_POLICY).statements
    changes = [
        lambda: setattr(statement.actions, "route_action", dialect.messages.ROUTE_NONE),
        lambda: setattr(statement.conditions, "route_type", dialect.messages.LEARNED_LOCAL),
        lambda: setattr(statement.actions.community, "type", dialect.messages.COMMUNITY_REPLACE),
        lambda: setattr(statement.conditions.prefix_set, "type", dialect.messages.MATCH_INVERT),
        lambda: setattr(statement.conditions.neighbor_set, "type", dialect.messages.MATCH_INVERT),
        lambda: setattr(statement, "name", "other"),
        lambda: statement.actions.community.communities.append("2:2"),
        lambda: setattr(statement.actions.as_prepend, "repeat", 1),
    ]
    kept = statement.SerializeToString()
    for change in changes:
        change()
        assert read(message) != (ours,)
        statement.ParseFromString(kept)
    assert read(message) == (ours,)
