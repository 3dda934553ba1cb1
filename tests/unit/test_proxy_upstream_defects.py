"""The known ways in which Go kube-router's proxy errs (D1 …), each by its recipe and by ours; those without a kernel.

D14 (no endpoint leaks to the default route) and D19 (node ports of the second family) are in the packet tests.
"""

from __future__ import annotations

import msgspec
from support.proxyworld import NODE, OTHER_NODE, SETTINGS, Objects, balanced, endpoint, node, pods, service, slices

from kube_router.ipc.messages import Endpoint, EndpointPort
from kube_router.workers.model import Family
from kube_router.workers.proxy.engine import Engine
from kube_router.workers.proxy.healthports import answer
from kube_router.workers.proxy.model import Frontend, HealthCheck


def engine_of(*objects: object, **flags: object) -> Engine:
    made = Engine(msgspec.structs.replace(SETTINGS, **flags))
    made.update(Objects().put(node(), *objects).cluster(), None)  # type: ignore[arg-type]
    return made


def served(engine: Engine, address: str) -> set[str]:
    family = Family.IPV6 if ":" in address else Family.IPV4
    return {item.address for item in engine.table.endpoints(Frontend(family, address, "tcp", 80), inside=True)}


def test_d1_services_whose_joined_names_are_equal_stay_apart() -> None:
    joined = {f"{namespace}-{name}-http" for namespace, name in (("a", "b-c"), ("a-b", "c"))}
    assert len(joined) == 1, "upstream's key"
    engine = engine_of(
        service("b-c", 1, namespace="a"),
        service("c", 2, namespace="a-b"),
        *slices("b-c", pods(1), namespace="a"),
        *slices("c", pods(2), namespace="a-b"),
    )
    assert (served(engine, "10.96.0.1"), served(engine, "10.96.0.2")) == ({"10.1.0.1"}, {"10.1.0.2"})


def test_d3_who_terminates_gets_nothing_new_while_others_are_ready() -> None:
    leaving = pods(1, ready=False, serving=True, terminating=True)
    assert any(item.serving for item in leaving), "enough for upstream"
    engine = engine_of(service("web", 1), *slices("web", [*leaving, *pods(2)]))
    assert served(engine, "10.96.0.1") == {"10.1.0.2"}


def test_d16_an_endpoint_without_conditions_is_ready() -> None:
    bare = Endpoint(addresses=("10.1.0.1",), node_name=NODE)
    assert not (bare.ready or bare.serving), "ignored by upstream"
    assert served(engine_of(service("web", 1), *slices("web", [bare])), "10.96.0.1") == {"10.1.0.1"}


def test_d17_a_slice_without_a_port_number_or_a_service_without_policies_ends_no_process() -> None:
    item = service("web", 1, internal_traffic_policy="", external_traffic_policy="")
    engine = engine_of(item, *slices("web", pods(1), EndpointPort(port=None), EndpointPort(name="http", port=8080)))
    assert served(engine, "10.96.0.1") == {"10.1.0.1"}
    assert [problem.reason for _, problem in engine.problems()] == ["InvalidEndpointSlice"] * 2


def test_d18_a_family_that_is_off_is_not_served() -> None:
    engine = engine_of(service("web", 1), *slices("web", pods(1)), enable_ipv6=False)
    assert {frontend.family for frontend in engine.table.frontends} == {Family.IPV4}


def test_d23_two_hundred_endpoints_are_two_hundred() -> None:
    local = [endpoint(f"10.1.0.{number}") for number in range(1, 201)]
    assert (200 + 128) % 256 - 128 < 0, "an int8 of upstream"
    item = balanced("web", 1, external_traffic_policy="Local", health_check_node_port=31000)
    engine = engine_of(item, *slices("web", [*local, endpoint("10.1.1.1", OTHER_NODE)]))
    assert engine.table.health == {31000: HealthCheck("shop/web", 200)}
    said = answer(b"GET /healthz HTTP/1.1\r\n\r\n", engine.table.health[31000], healthy=True)
    assert said.startswith(b"HTTP/1.1 200") and said.endswith(b"200 Service Endpoints found\n")
