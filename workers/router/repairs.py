"""What somebody else took away from the router's kernel state or altered, and was put back.

Pure: gathers until it is taken. Each kind is one line in the log however much of it vanished, and a counter
(``kube_router_controller_repairs{what=…}``).
"""

from __future__ import annotations

COUNTER = "controller_repairs"


class Repairs:
    """Things put back since the last `take`, by kind: ``route``, ``ipset``, ``rule``, ``pod-rule``, ``tunnel``."""

    def __init__(self) -> None:
        self._done: dict[str, list[str]] = {}

    def add(self, what: str, *names: str) -> None:
        """These were there once, were found missing or changed, and are there again."""
        self._done.setdefault(what, []).extend(names)

    def take(self) -> tuple[dict[str, float], list[str]]:
        """(counters, a line for each kind)."""
        done, self._done = self._done, {}
        counters = {f'{COUNTER}{{what="{what}"}}': float(len(names)) for what, names in done.items() if names}
        return counters, [_line(what, names) for what, names in done.items() if names]


def _line(what: str, names: list[str]) -> str:
    if len(names) == 1:
        return f"put back what somebody else took or changed: {what} {names[0]}"
    return f"put back what somebody else took or changed: {len(names)} {what}s, first {names[0]}"
