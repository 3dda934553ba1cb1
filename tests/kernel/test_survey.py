"""What our drivers write, as another netlink library reads it."""

from __future__ import annotations

import json
import sys

from support.namespaces import Namespace

from kube_router.workers.kernel.routes import RouteDriver
from kube_router.workers.kernel.survey import SurveyedRoute, survey_routes
from kube_router.workers.routefacts import Prefix, Route, RoutePlan

ROUTES = {
    "10.244.1.0/24": "10.0.0.2",
    "10.244.2.0/25": "10.0.0.3",
    "fd00:244:1::/64": "fd00::2",
    "2001:db8::/32": "fd00::3",
}


def test_pyroute2_reads_the_routes_that_our_driver_wrote_and_no_others(netns: Namespace) -> None:
    netns.run("ip link add eth0 type veth peer name far && ip link set far up && ip link set eth0 up")
    netns.run("ip address add 10.0.0.1/24 dev eth0 && ip -6 address add fd00::1/64 dev eth0 nodad")
    netns.run("ip route add 192.0.2.0/24 via 10.0.0.9 && ip route add 198.51.100.0/24 via 10.0.0.9 proto 17 table 100")
    with netns.enter():
        driver = RouteDriver()
        try:
            applied = driver.apply(RoutePlan(add=tuple((Prefix(p), Route(g)) for p, g in ROUTES.items())))
        finally:
            driver.close()
        found = survey_routes()
    assert applied.failures == ()
    assert found == [
        SurveyedRoute("10.244.1.0/24", ("10.0.0.2",), "eth0"),
        SurveyedRoute("10.244.2.0/25", ("10.0.0.3",), "eth0"),
        SurveyedRoute("2001:db8::/32", ("fd00::3",), "eth0"),
        SurveyedRoute("fd00:244:1::/64", ("fd00::2",), "eth0"),
    ]


def test_an_empty_namespace_has_none(netns: Namespace) -> None:
    with netns.enter():
        assert survey_routes() == []


def test_the_command_prints_them_for_people_and_for_programs(netns: Namespace) -> None:
    command = f"{sys.executable} -P -m kube_router.supervisor.ctl routes"
    assert netns.run(command) == "PREFIX  VIA  LINK\n"
    netns.run("ip link add eth0 type veth peer name far && ip link set far up && ip link set eth0 up")
    netns.run("ip address add 10.0.0.1/24 dev eth0 && ip -6 address add fd00::1/64 dev eth0 nodad")
    netns.run("ip route add 10.244.1.0/24 via 10.0.0.2 proto 17; ip route add 10.9.0.0/16 via 10.0.0.2")
    netns.run("ip -6 route add fd00:244:1::/64 via fd00::2 proto 17")
    assert netns.run(command).splitlines() == [
        "PREFIX           VIA       LINK",
        "10.244.1.0/24    10.0.0.2  eth0",
        "fd00:244:1::/64  fd00::2   eth0",
    ]
    assert json.loads(netns.run(f"{command} -o json")) == [
        {"prefix": "10.244.1.0/24", "gateways": ["10.0.0.2"], "link": "eth0"},
        {"prefix": "fd00:244:1::/64", "gateways": ["fd00::2"], "link": "eth0"},
    ]
