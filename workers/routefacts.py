"""Route facts: the routes of the main table as frozen values, what is there and what is to be done.

Pure: types only. `kernel/routes.py` observes and applies them; the router's pure core decides them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, NewType

Prefix = NewType("Prefix", str)
"""A destination in canonical CIDR text, as ``str(ipaddress.ip_network(...))`` gives it: ``10.1.0.0/24``."""


class Route(NamedTuple):
    """A unicast route of ours without metric: by a ``gateway`` (canonical address) or through a tunnel ``device``.

    ``source`` is the preferred source address; ``mtu`` and ``advmss`` in bytes, 0 for none. A route of ours that some
    other hand altered (several next hops, another device) equals nothing that we want, so it is replaced.
    """

    gateway: str
    device: str = ""
    source: str = ""
    mtu: int = 0
    advmss: int = 0

    @property
    def way(self) -> str:
        """Where it leads, in `ip route`'s words."""
        return f"dev {self.device}" if self.device else f"via {self.gateway or '?'}"

    def __str__(self) -> str:
        words = [self.way, *([f"src {self.source}"] if self.source else []), "proto 17"]
        words += [f"mtu {self.mtu}"] if self.mtu else []
        words += [f"advmss {self.advmss}"] if self.advmss else []
        return " ".join(words)


class Stray(NamedTuple):
    """A route of our protocol that no plan of ours makes: with a metric, or a second one for the same prefix."""

    prefix: Prefix
    metric: int
    gateway: str


@dataclass(frozen=True, slots=True)
class ActualRoutes:
    """What the main table holds. ``foreign``: the prefixes where somebody else has a route, of whatever metric."""

    ours: Mapping[Prefix, Route] = field(default_factory=dict)
    strays: tuple[Stray, ...] = ()
    foreign: frozenset[Prefix] = frozenset()


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """Steps in their order: ``add`` never replaces anything, ``replace`` takes the place of a route of ours."""

    add: tuple[tuple[Prefix, Route], ...] = ()
    replace: tuple[tuple[Prefix, Route], ...] = ()
    delete: tuple[Prefix, ...] = ()
    strays: tuple[Stray, ...] = ()

    def __len__(self) -> int:
        return len(self.add) + len(self.replace) + len(self.delete) + len(self.strays)

    def __str__(self) -> str:
        lines = [f"route add {prefix} {route}" for prefix, route in self.add]
        lines += [f"route replace {prefix} {route}" for prefix, route in self.replace]
        lines += [f"route delete {prefix} proto 17" for prefix in self.delete]
        lines += [f"route delete {stray.prefix} metric {stray.metric} proto 17" for stray in self.strays]
        return "\n".join(lines)
