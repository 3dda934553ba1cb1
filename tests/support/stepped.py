"""The real drivers of the iptables backend, with a hand on every single step that writes to the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kube_router.workers.kernel.chains import ChainDriver
from kube_router.workers.kernel.ipset import SetDriver
from kube_router.workers.kernel.iptables import IptablesError, Programs
from kube_router.workers.kernel.netlink import Request
from kube_router.workers.model import Family
from kube_router.workers.rulefacts import ChainPlan, SetName


class Killed(BaseException):
    """The process ends here; nothing of its own can hold it up."""


class SteppedChains(ChainDriver):
    """``before`` is called before each restore; the families' restores are steps of their own."""

    def __init__(self, programs: Programs, before: Callable[[], None]) -> None:
        super().__init__(programs)
        self._before = before

    def apply(self, plans: Iterable[ChainPlan]) -> dict[Family, IptablesError]:
        errors: dict[Family, IptablesError] = {}
        for plan in plans:
            if plan:
                self._before()
                errors |= super().apply([plan])
        return errors


class SteppedSets(SetDriver):
    """``before`` is called before each message that makes, fills, swaps, empties or destroys a set."""

    def __init__(self, before: Callable[[], None]) -> None:
        super().__init__()
        self._before = before

    def _change(self, request: Request, name: SetName) -> None:
        self._before()
        super()._change(request, name)
