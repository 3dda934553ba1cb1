"""The programs of an agent: their names, the flags that ask for them, and whether they are built yet.

Pure: a table and two questions to it. A program that is not built is named once at start and in ``status``; it is never
started. To add a worker, write its package and set ``built`` here.
"""

from __future__ import annotations

from dataclasses import dataclass

from kube_router.workers.settings import Settings


@dataclass(frozen=True, slots=True)
class Program:
    """One program under supervisord.

    ``enabled_by`` are the fields of `Settings` that must all be true; empty means: always. (As upstream, the CNI file
    belongs to the router: ``--enable-cni`` alone, on a firewall-only agent, touches nothing.) ``leaves_state``:
    it leaves state on the host when it stops, so its package has a module ``cleanup``.
    """

    name: str
    enabled_by: tuple[str, ...]
    built: bool
    leaves_state: bool = True

    def enabled(self, settings: Settings) -> bool:
        """Whether the settings ask for this program."""
        return all(getattr(settings, field) for field in self.enabled_by)


PROGRAMS: tuple[Program, ...] = (
    Program("watcher", (), built=True, leaves_state=False),
    Program("gobgpd", ("run_router",), built=True, leaves_state=False),
    Program("router", ("run_router",), built=True),
    Program("cni", ("run_router", "enable_cni"), built=True),
    Program("firewall", ("run_firewall",), built=False),
    Program("proxy", ("run_service_proxy",), built=False),
    Program("loadbalancer", ("run_loadbalancer",), built=False),
    Program("health", (), built=True, leaves_state=False),
)
"""In start order."""


def wanted_programs(settings: Settings) -> tuple[Program, ...]:
    """The programs to run: asked for and built."""
    return tuple(program for program in PROGRAMS if program.built and program.enabled(settings))


def unbuilt_programs(settings: Settings) -> tuple[Program, ...]:
    """The programs that the settings ask for and that are not built yet."""
    return tuple(program for program in PROGRAMS if not program.built and program.enabled(settings))
