"""Service IPs: which addresses of a Service may be programmed and advertised, decided in one place for all workers.

Pure: a Service projection and the settings in, addresses in canonical text and `Problem`s out. Only addresses of the
enabled families count; the other family's are left out without a word. What does not parse, or is not an address that
one host can have (0.0.0.0, loopback, link-local, multicast), is a problem in every mode: not everything comes through
an API server that checks it.

With ``--strict-external-ip-validation`` an external IP, or a load balancer's, must be inside a range that the operator
gave to that kind (``--service-external-ip-range``, ``--loadbalancer-ip-range``) and outside of the cluster IPs
(``--service-cluster-ip-range``): anybody who may write a Service could otherwise draw traffic for any address.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kube_router.ipc.messages import Service
from kube_router.workers.model import Family, IPAddress, IPNetwork
from kube_router.workers.nodefacts import Problem, parse_address
from kube_router.workers.settings import Settings

HEADLESS = "None"
SERVED_TYPES = frozenset({"ClusterIP", "NodePort", "LoadBalancer"})
INVALID_SERVICE_IP = "InvalidServiceIP"
CLUSTER_IPS, EXTERNAL_IPS, INGRESS = "spec.clusterIPs", "spec.externalIPs", "status.loadBalancer.ingress"
CLUSTER_FLAG = "--service-cluster-ip-range"
EXTERNAL_FLAG = "--service-external-ip-range"
BALANCER_FLAG = "--loadbalancer-ip-range"
STRICT_FLAG = "--strict-external-ip-validation"


@dataclass(frozen=True, slots=True)
class ServiceAddresses:
    """Addresses of one kind of one Service: canonical, each once, in the order given; and what is wrong with others."""

    accepted: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


NONE = ServiceAddresses()


def is_served(service: Service) -> bool:
    """Whether a Service has addresses of its own: not headless, no ExternalName, with a cluster IP."""
    first = service.cluster_ips[0] if service.cluster_ips else ""
    return service.type in SERVED_TYPES and first not in ("", HEADLESS)


class ServiceIps:
    """The rules, made once from the settings; every method is a function of the Service alone."""

    def __init__(self, settings: Settings) -> None:
        self._families = settings.families
        self._strict = settings.strict_external_ip_validation
        self._cluster = tuple(map(ipaddress.ip_network, settings.service_cluster_ip_range))
        self._external = tuple(map(ipaddress.ip_network, settings.service_external_ip_range))
        self._balancer = tuple(map(ipaddress.ip_network, settings.loadbalancer_ip_range))

    def cluster(self, service: Service) -> ServiceAddresses:
        """The cluster IPs. They are the API server's own choice: no range is asked."""
        if not is_served(service):
            return NONE
        return self._judged(service, CLUSTER_IPS, service.cluster_ips, None)

    def external(self, service: Service) -> ServiceAddresses:
        """The external IPs that may be used."""
        if not service.external_ips or not is_served(service):
            return NONE
        return self._judged(service, EXTERNAL_IPS, service.external_ips, (EXTERNAL_FLAG, self._external))

    def load_balancer(self, service: Service) -> ServiceAddresses:
        """The load balancer's ingress IPs that may be used: no hostnames, and none that a proxy answers for.

        (``ipMode: Proxy``: the load balancer sends to the nodes' own addresses, and must not be bypassed.)
        """
        if service.type != "LoadBalancer" or not service.ingress or not is_served(service):
            return NONE
        values = [entry.ip for entry in service.ingress if entry.ip and entry.ip_mode in ("", "VIP")]
        judged = self._judged(service, INGRESS, values, (BALANCER_FLAG, self._balancer))
        unknown = tuple(
            _problem(service, INGRESS, entry.ip, f"has ipMode {entry.ip_mode!r}, which is not known; not used")
            for entry in service.ingress
            if entry.ip and entry.ip_mode not in ("", "VIP", "Proxy")
        )
        return ServiceAddresses(judged.accepted, (*judged.problems, *unknown)) if unknown else judged

    def _judged(
        self, service: Service, key: str, values: Iterable[str], allowed: tuple[str, Sequence[IPNetwork]] | None
    ) -> ServiceAddresses:
        """``allowed``: the flag that names the ranges, and the ranges; None: any address will do."""
        accepted: dict[str, None] = {}
        outside: dict[str, None] = {}
        problems: list[Problem] = []
        for value in dict.fromkeys(values):
            try:
                address = parse_address(value)
            except ValueError:
                problems.append(_problem(service, key, value, "is not an IP address"))
                continue
            if Family(address.version) not in self._families:
                continue
            if not _is_unicast(address):
                problems.append(_problem(service, key, value, "is not an address that a Service can have"))
            elif allowed is None or not self._strict:
                accepted[_text(value, address)] = None
            elif within := _around(address, self._cluster):
                problems.append(_problem(service, key, value, f"is a cluster IP ({CLUSTER_FLAG} {within}); not used"))
            elif _around(address, allowed[1]):
                accepted[_text(value, address)] = None
            else:
                outside[value] = None
        if outside and allowed is not None:
            problems.append(_outside(service, key, list(outside), *allowed))
        return ServiceAddresses(tuple(accepted), tuple(problems)) if accepted or problems else NONE


def _outside(service: Service, key: str, values: Sequence[str], flag: str, ranges: Sequence[IPNetwork]) -> Problem:
    """One line for all of them: a cluster whose operator gave no range at all has many."""
    text = ", ".join(map(repr, values))
    rule = f"outside of {flag} {','.join(map(str, ranges))}" if ranges else f"not used, as {flag} is not set"
    return Problem(INVALID_SERVICE_IP, f"service {service.key}: {key}: {text}: {rule} ({STRICT_FLAG})")


def _problem(service: Service, key: str, value: str, rule: str) -> Problem:
    return Problem(INVALID_SERVICE_IP, f"service {service.key}: {key}: {value!r} {rule}")


def _is_unicast(address: IPAddress) -> bool:
    """Whether a single host can be reached at it across links."""
    if address.is_unspecified or address.is_loopback or address.is_link_local or address.is_multicast:
        return False
    return not (isinstance(address, ipaddress.IPv4Address) and (int(address) >> 24 == 0 or int(address) >> 28 == 15))


def _around(address: IPAddress, ranges: Iterable[IPNetwork]) -> IPNetwork | None:
    return next((network for network in ranges if network.version == address.version and address in network), None)


def _text(value: str, address: IPAddress) -> str:
    """Canonical; the projection's own text where it is that already, which costs no memory."""
    canonical = str(address)
    return value if value == canonical else canonical
