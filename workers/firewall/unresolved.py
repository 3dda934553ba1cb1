"""Named ports that nobody has: what a policy asks for by a name that no pod calls a port of its own.

Pure. Such an entry allows nothing (S2), and nothing is broken: pods that have the port may come at any time. But it is
the way in which a misspelt name shows, so its policy is told about it as long as it lasts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet

from kube_router.ipc.messages import Key
from kube_router.workers.firewall.rules import Changed, Direction, Member, PolicyRules, PortSet, Ruleset


class Unresolved:
    """By policy in force, a line for each such name; looked for anew only where a change may have made or ended one."""

    def __init__(self) -> None:
        self.lines: Mapping[Key, tuple[str, ...]] = {}

    def update(self, ruleset: Ruleset, changed: Changed) -> None:
        """Bring the lines up to ``ruleset``; ``changed``: what differs from the ruleset of the last call."""
        if changed.everything or changed.policies or _ports(changed):
            empty = {
                key
                for key, members in ruleset.members.items()
                if isinstance(key, PortSet) and not any(map(_has_members, members.values()))
            }
            lines = {key: tuple(_lines_of(policy, empty)) for key, policy in ruleset.policies.items()} if empty else {}
            self.lines = {key: found for key, found in lines.items() if found}


def _ports(changed: Changed) -> bool:
    return any(isinstance(key, PortSet) for part in (changed.added, changed.removed) for key in part)


def _has_members(members: AbstractSet[Member]) -> bool:
    return next(iter(members), None) is not None  # `len` would count them all


def _lines_of(policy: PolicyRules, empty: set[PortSet]) -> Iterator[str]:
    found: dict[str, None] = {}
    for direction in Direction:
        for clause in policy.clauses(direction) or ():
            port = clause.port
            if isinstance(port, PortSet) and port in empty:
                who = "no pod of this node that it selects" if port.local_only else "no peer"
                where = f"networkpolicy {policy.key}: spec.{direction}[{clause.number}].ports"
                found[f"{where}: {who} has a {port.protocol} port named {port.port_name!r}; it allows nothing"] = None
    yield from found
