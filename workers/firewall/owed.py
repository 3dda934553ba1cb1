"""What a backend still owes: the changes of a sync that failed, joined with those that came since.

Pure. Joined changes say what the last of them said; where two contradict each other about a set as a whole, nobody
knows what the failed sync left behind, and everything is to be looked at.
"""

from __future__ import annotations

from kube_router.workers.firewall.rules import Changed, Member, SetKey
from kube_router.workers.model import Family

MembersByFamily = dict[Family, set[Member]]


def joined(first: Changed, then: Changed) -> Changed:
    """Both, ``then`` being the later one; neither is changed."""
    if first.everything or then.everything or not _compatible(first, then):
        return Changed(everything=True)
    made, gone = first.new_sets | then.new_sets, first.gone_sets | then.gone_sets
    whole = made | gone
    return Changed(
        policies=first.policies | then.policies,
        pods=first.pods | then.pods,
        new_sets=made,
        gone_sets=gone,
        added=_later(first.added, then.added, then.removed, whole),
        removed=_later(first.removed, then.removed, then.added, whole),
    )


def _compatible(first: Changed, then: Changed) -> bool:
    return not (first.new_sets & then.gone_sets or first.gone_sets & then.new_sets)


def _later(
    first: dict[SetKey, MembersByFamily],
    then: dict[SetKey, MembersByFamily],
    then_undone: dict[SetKey, MembersByFamily],
    whole: set[SetKey],
) -> dict[SetKey, MembersByFamily]:
    """Members that were added (or removed) last; those of sets that are new or gone as a whole are left out."""
    found: dict[SetKey, MembersByFamily] = {}
    for key in (first.keys() | then.keys()) - whole:
        for family in Family:
            before = first.get(key, {}).get(family, set())
            members = (before - then_undone.get(key, {}).get(family, set())) | then.get(key, {}).get(family, set())
            if members:
                found.setdefault(key, {})[family] = members
    return found
