"""Any history of Services: no address is held twice, none is taken away, and what is there is never decided again."""

from __future__ import annotations

from ipaddress import ip_network

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kube_router.ipc.messages import IngressAddress, Service
from kube_router.workers.loadbalancer.desired import Ledger, decide, held_addresses, is_served, wanted_families
from kube_router.workers.loadbalancer.pool import pools
from kube_router.workers.model import Family

RANGES = [ip_network(text) for text in ("192.0.2.0/29", "192.0.2.16/31", "2001:db8::/126")]
FAMILIES = st.sampled_from([("IPv4",), ("IPv6",), ("IPv4", "IPv6"), ("IPv6", "IPv4")])
REQUESTS = st.sampled_from(["", "192.0.2.3", "192.0.2.17", "2001:db8::2", "192.0.2.0", "junk"])


@st.composite
def steps(draw: st.DrawFn) -> tuple[str, Service | None]:
    """A Service that is there from now on, or (None) gone."""
    name = draw(st.sampled_from("abcdefgh"))
    if draw(st.integers(0, 4)) == 0:
        return f"ns/{name}", None
    families = draw(FAMILIES)
    policy = draw(st.sampled_from(["RequireDualStack", "PreferDualStack"])) if len(families) == 2 else "SingleStack"
    return f"ns/{name}", Service(
        name=name,
        namespace="ns",
        uid=name,
        type=draw(st.sampled_from(["LoadBalancer", "LoadBalancer", "LoadBalancer", "ClusterIP"])),
        load_balancer_class=draw(st.sampled_from([None, "kube-router", "other"])),
        ip_families=families,
        ip_family_policy=policy,
        load_balancer_ip=draw(REQUESTS),
        external_ips=draw(st.sampled_from([(), (), ("192.0.2.2",)])),
    )


def with_addresses(service: Service, texts: tuple[str, ...]) -> Service:
    entries = tuple(IngressAddress(ip=text) for text in texts)
    return msgspec.structs.replace(service, ingress=entries)


@given(st.lists(steps(), max_size=40))
def test_any_history(history: list[tuple[str, Service | None]]) -> None:
    cluster: dict[str, Service] = {}
    ledger = Ledger()
    found = pools(RANGES, Family)
    for key, changed in history:
        if changed is None or changed.type != "LoadBalancer":
            cluster.pop(key, None)  # the API server empties the status of a Service that is none any more
        if changed is not None:
            before = cluster.get(key)
            cluster[key] = with_addresses(changed, tuple(entry.ip for entry in before.ingress) if before else ())
        ledger.record(key, held_addresses(cluster[key]) if key in cluster else ())
        for service in list(cluster.values()):
            decision = decide(service, found, ledger, default_class=True)
            if not decision.served:
                continue
            if decision.changed:
                held = {entry.ip for entry in service.ingress}
                given_now = set(map(str, decision.addresses))
                wanted = wanted_families(service, Family)
                kept = {text for text in held if (Family.IPV6 if ":" in text else Family.IPV4) in wanted}
                assert kept <= given_now or service.load_balancer_ip in given_now, "an address was taken away"
                for address in decision.addresses:
                    assert address in found[Family(address.version)]
                    assert not ledger.others(address, service.key) or str(address) in held
                cluster[service.key] = with_addresses(service, tuple(map(str, decision.addresses)))
                ledger.record(service.key, held_addresses(cluster[service.key]))
            again = decide(cluster[service.key], found, ledger, default_class=True)
            assert not again.changed, "decided twice"
            if decision.ok and service.ip_family_policy != "PreferDualStack":
                assert len(again.addresses) == len(wanted_families(service, Family))
        holders = [entry.ip for service in cluster.values() if is_served(service, True) for entry in service.ingress]
        external = [text for service in cluster.values() for text in service.external_ips]
        assert len(holders) == len(set(holders)), "two Services share an address"
        assert not external or set(holders) & set(external) <= {"192.0.2.2"}
