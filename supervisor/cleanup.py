"""``--cleanup-config``: every built worker takes back what it made on this host.

Touches the kernel, but only through the workers' own clean-ups, each of which removes what it recognises as ours and
nothing else. No API server and no running agent is needed. Both address families are always cleaned. A failing step is
logged and the others go on.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from typing import cast

import msgspec

from kube_router.supervisor.programs import PROGRAMS
from kube_router.workers.model import Failure
from kube_router.workers.settings import Settings

log = logging.getLogger(__name__)

WorkerCleanup = Callable[[Settings], list[Failure]]


def cleanup(settings: Settings) -> int:
    """Clean up after every built worker; 0 unless nothing at all could be done."""
    both = msgspec.structs.replace(settings, enable_ipv4=True, enable_ipv6=True)
    return run_cleanups([program.name for program in PROGRAMS if program.built and program.leaves_state], both)


def run_cleanups(workers: Iterable[str], settings: Settings) -> int:
    """Run the clean-up of each named worker, last started first."""
    done = broken = 0
    for worker in reversed(list(workers)):
        try:
            failures = load_cleanup(worker)(settings)
        except Exception as error:  # one worker's bug must not keep the others' state on the host
            log.exception("clean-up of %s failed with an unexpected error: %s", worker, error)
            broken += 1
            continue
        done += 1
        for failure in failures:
            log.error("clean-up of %s: %s", worker, failure)
        steps = "1 step" if len(failures) == 1 else f"{len(failures)} steps"
        log.info("clean-up of %s: %s", worker, f"{steps} failed" if failures else "done")
    return 1 if broken and not done else 0


def load_cleanup(worker: str) -> WorkerCleanup:
    """The clean-up of a worker, imported only now: it brings the worker's drivers with it."""
    module = importlib.import_module(f"kube_router.workers.{worker}.cleanup")
    return cast(WorkerCleanup, module.cleanup)
