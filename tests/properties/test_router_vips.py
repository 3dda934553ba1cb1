"""Law 3 for VIPs: after any order of events the table is what a judge without memory says of the cluster."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from support import vips as support

from kube_router.ipc.messages import Endpoint, EndpointSlice, IngressAddress, Service
from kube_router.ipc.replica import Changes
from kube_router.workers.router.views import views
from kube_router.workers.router.vips import VipTable
from kube_router.workers.settings import Settings

NAMES = ("web", "db", "log")
IPS = {
    "cluster": ("10.96.0.1", "10.96.0.2", "fd00:96::1"),
    "external": ("192.0.2.1", "192.0.2.2", "2001:db8:e::1", "203.0.113.1", "10.96.0.1"),
    "balancer": ("198.51.100.1", "2001:db8:b::1", "192.0.2.1"),
}
FLAG = st.sampled_from(("true", "T", "0", "yes", ""))
POLICY = st.sampled_from(("Cluster", "Local"))
CONDITION = st.sampled_from((None, True, False))


def some(*values: str) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(values), max_size=3, unique=True).map(tuple)


notes = st.dictionaries(
    st.sampled_from(
        [support.PREFIX + name for name in ("advertise.clusterip", "advertise.externalip", "advertise.loadbalancerip")]
    ),
    FLAG,
)
more_annotations = st.dictionaries(
    st.sampled_from([support.PREFIX + "local", support.PREFIX + "skiplbips"]), st.sampled_from(("true", "True", ""))
)
services = st.builds(
    lambda name, notes, more, entries, **fields: Service(
        name=name, namespace="shop", annotations={**notes, **more}, ingress=tuple(entries), **fields
    ),
    name=st.sampled_from(NAMES),
    notes=notes,
    more=more_annotations,
    type=st.sampled_from(("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")),
    cluster_ips=st.one_of(some(*IPS["cluster"]), st.just(("None",))),
    external_ips=some(*IPS["external"]),
    entries=st.lists(
        st.builds(
            IngressAddress, ip=st.sampled_from((*IPS["balancer"], "")), ip_mode=st.sampled_from(("", "VIP", "Proxy"))
        ),
        max_size=2,
    ),
    internal_traffic_policy=POLICY,
    external_traffic_policy=st.sampled_from(("", "Cluster", "Local")),
)
endpoints = st.builds(
    Endpoint,
    addresses=some("10.244.1.5", "10.0.0.1", "10.0.0.2", "fd00:1::5", "2001:db8::1"),
    ready=CONDITION,
    terminating=CONDITION,
    node_name=st.sampled_from((None, "a", "b")),
)
slices = st.builds(
    EndpointSlice,
    name=st.sampled_from(("one", "two", "three", "four")),
    namespace=st.just("shop"),
    service=st.sampled_from((*NAMES, "unknown", "")),
    address_type=st.sampled_from(("IPv4", "IPv4", "IPv6", "FQDN")),
    annotations=st.sampled_from(({}, {}, {}, {support.LEADER: ""})),
    endpoints=st.lists(endpoints, max_size=3).map(tuple),
)
KEYS = [("services", f"shop/{name}") for name in NAMES] + [
    ("endpointslices", f"shop/{name}") for name in ("one", "two", "three", "four")
]
put = st.one_of(services, slices).map(
    lambda item: ("services" if isinstance(item, Service) else "endpointslices", item.key, item)
)
gone = st.sampled_from(KEYS).map(lambda pair: (*pair, None))
again = st.sampled_from(KEYS).map(lambda pair: (*pair, "as it is"))
moved = st.sampled_from((support.OWN_ADDRESSES, ("10.0.0.2",), ())).map(lambda ips: ("own", "", ips))
batches = st.lists(st.lists(st.one_of(put, put, put, gone, again, moved), min_size=1, max_size=4), max_size=12)
configs = st.builds(
    support.settings,
    advertise_cluster_ip=st.booleans(),
    advertise_external_ip=st.booleans(),
    advertise_loadbalancer_ip=st.booleans(),
    strict_external_ip_validation=st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(config=configs, events=batches)
def test_any_order_of_events_ends_in_what_the_cluster_says(config: Settings, events: list[Any]) -> None:
    table = VipTable(config)
    cluster: dict[str, dict[str, Any]] = {"services": {}, "endpointslices": {}}
    own = support.OWN_ADDRESSES
    table.update(support.facts(own), {}, {}, None)
    for batch in events:
        changes: dict[str, dict[str, Any]] = {}
        for kind, key, item in batch:
            if kind == "own":
                own = item
                continue
            before = cluster[kind].get(key)
            if item is None:
                cluster[kind].pop(key, None)
            elif item != "as it is":
                cluster[kind][key] = item
            changes.setdefault(kind, {})[key] = (before, cluster[kind].get(key))
        told: Changes = changes  # type: ignore[assignment]
        before_vips = table.vips
        after = table.update(support.facts(own), cluster["services"], cluster["endpointslices"], told)
        wanted = support.judged(config, own, cluster["services"].values(), cluster["endpointslices"].values())
        assert after == wanted
        assert (after is before_vips) == (wanted == before_vips)
    fresh = VipTable(config)
    assert fresh.update(support.facts(own), cluster["services"], cluster["endpointslices"], None) == table.vips
    assert fresh.lines == table.lines
    seen: dict[Any, dict[str, Any]] = {
        kind: {key: view(item) for key, item in cluster[kind].items()} for kind, view in views(config).items()
    }
    little = VipTable(config)
    assert little.update(support.facts(own), seen["services"], seen["endpointslices"], None) == table.vips
    assert little.lines == table.lines
