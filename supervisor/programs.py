"""The programs of an agent: their names, the flags that ask for them, what each may do, and whether they are built yet.

Pure: a table and questions to it. A program that is not built is named once at start and in ``status``; it is never
started. To add a worker, write its package and set ``built`` here.
"""

from __future__ import annotations

from dataclasses import dataclass

from kube_router.workers.settings import Settings

ROOT = 0
WORKER_USER = 65532
"""User and group of the workers without privileges (the "nonroot" of distroless images); group of ``ipc/``."""
SPEAKER_USER = 65533
"""User and group of gobgpd: another than the workers', which may thus neither signal it nor reach its socket."""

RELOADER = "reload"
"""The program that follows the flags file and the passwords file, where there are any."""


@dataclass(frozen=True, slots=True)
class Program:
    """One program under supervisord.

    ``enabled_by`` are the fields of `Settings` that must all be set; empty means: always. (As upstream, the CNI file
    belongs to the router: ``--enable-cni`` alone, on a firewall-only agent, touches nothing.) With ``any_of`` one of
    those fields must be set too. ``leaves_state``: it leaves state on the host when it stops, so its package has a
    module ``cleanup``. ``folder``: the top-level folder that its code is in.

    ``user`` and ``capabilities`` are all that it may have; ``helpful`` are capabilities that it uses if the agent has
    them and can do without. ``tools`` are commands that it runs. ``command`` replaces the worker's package.
    """

    name: str
    enabled_by: tuple[str, ...]
    built: bool
    leaves_state: bool = True
    user: int = ROOT
    capabilities: tuple[str, ...] = ()
    helpful: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    folder: str = "workers"

    def enabled(self, settings: Settings) -> bool:
        """Whether the settings ask for this program."""
        wanted = all(getattr(settings, field) for field in self.enabled_by)
        return wanted and (not self.any_of or any(getattr(settings, field) for field in self.any_of))


PROGRAMS: tuple[Program, ...] = (
    Program("watcher", (), built=True, leaves_state=False, user=WORKER_USER),
    Program(
        "gobgpd",
        ("run_router",),
        built=True,
        leaves_state=False,
        user=SPEAKER_USER,
        capabilities=("net_bind_service",),
        tools=("gobgpd",),
    ),
    # It ends gobgpd, another user's process, when that must begin anew.
    Program("router", ("run_router",), built=True, capabilities=("net_admin", "net_raw", "kill"), tools=("iptables",)),
    Program("cni", ("run_router", "enable_cni"), built=True, capabilities=("net_admin",), helpful=("sys_module",)),
    # iptables only for one of its backends, which says so itself when it is missing.
    Program("firewall", ("run_firewall",), built=True, capabilities=("net_admin", "net_raw")),
    Program("proxy", ("run_service_proxy",), built=True, capabilities=("net_admin", "net_raw")),
    Program("loadbalancer", ("run_loadbalancer",), built=True, leaves_state=False, user=WORKER_USER),
    Program("health", (), built=True, leaves_state=False, user=WORKER_USER),
    Program(
        RELOADER,
        (),
        built=True,
        leaves_state=False,
        any_of=("flags_file", "peer_router_passwords_file"),
        folder="supervisor",
    ),
)
"""In start order; they are stopped in the reverse one."""


def wanted_programs(settings: Settings) -> tuple[Program, ...]:
    """The programs to run: asked for and built."""
    return tuple(program for program in PROGRAMS if program.built and program.enabled(settings))


def unbuilt_programs(settings: Settings) -> tuple[Program, ...]:
    """The programs that the settings ask for and that are not built yet."""
    return tuple(program for program in PROGRAMS if not program.built and program.enabled(settings))
