"""What the rules of advertisement say of one Service: which of its addresses BGP may announce, and from which nodes.

Pure: a Service and the settings in, `ServiceVips` out; endpoints are not looked at.

============ ================================== =============================================== ====================
kind         addresses                          asked for by flag, or by annotation             only nodes with an
                                                ``kube-router.io/service.…``                    own endpoint when
============ ================================== =============================================== ====================
cluster      ``spec.clusterIPs``                ``--advertise-cluster-ip``, advertise.clusterip internalTrafficPolicy
external     ``spec.externalIPs``               ``--advertise-external-ip``,                    externalTrafficPolicy
                                                advertise.externalip                            or service.local
loadbalancer ``status.loadBalancer.ingress``    ``--advertise-loadbalancer-ip``,                as external
                                                advertise.loadbalancerip; not with skiplbips
============ ================================== =============================================== ====================

An annotation decides over the flag, in both directions. A value that is no boolean counts as false, as in kube-router:
what is announced by mistake draws traffic, what is not announced is missed and found in the warning. Headless Services
and ExternalNames have nothing to announce. Addresses pass `ServiceIps` first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kube_router.ipc.messages import Service
from kube_router.workers.nodefacts import Problem
from kube_router.workers.router import names
from kube_router.workers.serviceips import ServiceAddresses, ServiceIps, is_served
from kube_router.workers.settings import Settings

LOCAL = "Local"
TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
"""What Go's ``strconv.ParseBool`` takes."""
INVALID_ANNOTATION = "InvalidServiceAnnotation"


@dataclass(frozen=True, slots=True)
class ServiceVips:
    """Addresses in canonical text: announced by every node, and only by nodes with an own ready endpoint.

    An address of which both is true, by two of its kinds, is in ``everywhere`` alone.
    """

    everywhere: frozenset[str] = frozenset()
    local: frozenset[str] = frozenset()
    problems: tuple[Problem, ...] = ()


NOTHING = ServiceVips()


class VipRules:
    """The rules, made once from the settings."""

    def __init__(self, settings: Settings) -> None:
        ips = ServiceIps(settings)
        kinds: tuple[tuple[str, bool, Callable[[Service], ServiceAddresses]], ...] = (
            (names.ADVERTISE_CLUSTER_IP, settings.advertise_cluster_ip, ips.cluster),
            (names.ADVERTISE_EXTERNAL_IP, settings.advertise_external_ip, ips.external),
            (names.ADVERTISE_LOADBALANCER_IP, settings.advertise_loadbalancer_ip, ips.load_balancer),
        )
        self._kinds = kinds
        self._any_flag = any(flag for _, flag, _ in kinds)

    def of(self, service: Service) -> ServiceVips:
        """What ``service`` asks for."""
        if not (self._any_flag or service.annotations) or not is_served(service):
            return NOTHING
        problems: list[Problem] = []
        external_local = service.external_traffic_policy == LOCAL or _service_local(service, problems)
        everywhere: set[str] = set()
        local: set[str] = set()
        for annotation, flag, addresses in self._kinds:
            if not _asked(service, annotation, flag, problems):
                continue
            if annotation == names.ADVERTISE_LOADBALANCER_IP and names.SKIP_LOADBALANCER_IPS in service.annotations:
                continue
            found = addresses(service)
            problems += found.problems
            internal = annotation == names.ADVERTISE_CLUSTER_IP
            only_local = service.internal_traffic_policy == LOCAL if internal else external_local
            (local if only_local else everywhere).update(found.accepted)
        if not (everywhere or local or problems):
            return NOTHING
        return ServiceVips(frozenset(everywhere), frozenset(local - everywhere), tuple(problems))


def _asked(service: Service, annotation: str, flag: bool, problems: list[Problem]) -> bool:
    value = service.annotations.get(annotation)
    if value is None:
        return flag
    if value not in TRUE and value not in FALSE:
        text = f"service {service.key}: annotation {annotation}: {value!r} is not true or false; it counts as false"
        problems.append(Problem(INVALID_ANNOTATION, text))
    return value in TRUE


def _service_local(service: Service, problems: list[Problem]) -> bool:
    """``service.local``: only the word "true" counts, as in kube-router."""
    value = service.annotations.get(names.SERVICE_LOCAL, "false")
    if value != "true" and value not in FALSE:
        rule = "only 'true' has an effect"
        text = f"service {service.key}: annotation {names.SERVICE_LOCAL}: {value!r}: {rule}"
        problems.append(Problem(INVALID_ANNOTATION, text))
    return value == "true"
