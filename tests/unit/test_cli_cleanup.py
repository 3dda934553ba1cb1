"""The order and the failures of a clean-up; what the workers remove is tested with the workers."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable

import pytest

from kube_router.supervisor import cleanup
from kube_router.supervisor.programs import PROGRAMS
from kube_router.workers.model import Failure
from kube_router.workers.settings import Settings


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Settings], list[Failure]]], str]:
    """Makes a worker package that has a clean-up."""

    def make(name: str, function: Callable[[Settings], list[Failure]]) -> str:
        package, module = f"kube_router.workers.{name}", f"kube_router.workers.{name}.cleanup"
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        holder = types.ModuleType(module)
        holder.cleanup = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module, holder)
        return name

    return make


def fail(settings: Settings) -> list[Failure]:
    raise RuntimeError("broken")


def test_every_built_worker_that_leaves_state_has_a_clean_up() -> None:
    names = [program.name for program in PROGRAMS if program.built and program.leaves_state]
    assert {"router", "cni"} <= set(names)
    assert all(callable(cleanup.load_cleanup(name)) for name in names)


def test_the_last_started_is_cleaned_first_and_failures_stop_nobody(
    worker: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    order = []

    def one(settings: Settings) -> list[Failure]:
        order.append("one")
        return []

    def two(settings: Settings) -> list[Failure]:
        order.append("two")
        return [Failure("ipset", "set x: in use")]

    names = [worker("one", one), worker("broken", fail), worker("two", two)]
    caplog.set_level(logging.INFO)
    assert cleanup.run_cleanups(names, Settings()) == 0
    assert order == ["two", "one"]
    assert "clean-up of two: ipset: set x: in use" in caplog.messages
    assert "clean-up of two: 1 step failed" in caplog.messages
    assert "clean-up of one: done" in caplog.messages
    assert "clean-up of broken failed with an unexpected error: broken" in caplog.messages


def test_it_fails_only_if_nothing_could_be_done(worker: Callable[..., str]) -> None:
    assert cleanup.run_cleanups([worker("broken", fail)], Settings()) == 1
    assert cleanup.run_cleanups([worker("broken", fail), worker("fine", lambda settings: [])], Settings()) == 0
    assert cleanup.run_cleanups(["is_not_there"], Settings()) == 1
    assert cleanup.run_cleanups([], Settings()) == 0


def test_both_families_are_cleaned_whatever_the_flags_say(
    worker: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Settings] = []

    def note(settings: Settings) -> list[Failure]:
        seen.append(settings)
        return []

    for program in PROGRAMS:
        worker(program.name, note)
    assert cleanup.cleanup(Settings(enable_ipv4=False, enable_ipv6=False, use_nftables_for_netpol=True)) == 0
    assert len(seen) == sum(program.built and program.leaves_state for program in PROGRAMS)
    assert all(settings.enable_ipv4 and settings.enable_ipv6 and settings.use_nftables_for_netpol for settings in seen)
