"""What to write to table filter: the difference between the chains that are there and those that should be.

Pure: values in, parts of a `ChainPlan` out. Chains are compared by their digests (`_fast.rulehash`): their texts are
large and mostly alike, and are made for what is written only. Ours are the chains of our names (`removal.py`); in the
built-in chains, the rules with the comment of our jumps.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from kube_router._fast.rulehash import rule_set_hash
from kube_router.workers.firewall.names import (
    COMMON_CHAIN,
    DEFAULT_CHAIN,
    DISPATCH_PREFIX,
    POLICY_PREFIX,
    TAIL_CHAIN,
    TOP_CHAINS,
)
from kube_router.workers.firewall.removal import is_our_chain
from kube_router.workers.firewall.ruletext import Rules
from kube_router.workers.firewall.topchains import jump_rule
from kube_router.workers.rulefacts import ChainPlan, RuleStep, RuleText

Digest = bytes
EMPTY: Digest = rule_set_hash(())

_FIXED = frozenset({*TOP_CHAINS.values(), DEFAULT_CHAIN, COMMON_CHAIN, TAIL_CHAIN})
_MAY_BE_EMPTY = (POLICY_PREFIX, DISPATCH_PREFIX)
_JUMP = re.compile(r'-m comment --comment "kube-router netpol - [A-Z2-7]{16}" -j KUBE-ROUTER-(?:INPUT|FORWARD|OUTPUT)')


def digest_of(rules: Rules) -> Digest:
    """What a chain is compared by."""
    return rule_set_hash(rules)


def to_write(actual: Mapping[str, Digest], desired: Mapping[str, Digest], *, hold: bool) -> list[str]:
    """The chains that are to be made or made anew.

    ``hold``: only those that do not exist, or were emptied although they never are empty.
    """
    differing = [chain for chain, digest in desired.items() if actual.get(chain) != digest]
    return [chain for chain in differing if may_write(chain, actual, hold)]


def may_write(chain: str, actual: Mapping[str, Digest], hold: bool) -> bool:
    """Whether a chain that differs may be written; see `to_write`."""
    if not hold or chain not in actual:
        return True
    return actual[chain] == EMPTY and (chain in _FIXED or not chain.startswith(_MAY_BE_EMPTY))


def to_remove(actual: Iterable[str], desired: Container[str], *, hold: bool) -> list[str]:
    """The chains of ours that nothing will refer to."""
    return [] if hold else [chain for chain in actual if is_our_chain(chain) and chain not in desired]


def jump_steps(hooks: Mapping[str, Sequence[RuleText]], *, hold: bool) -> tuple[RuleStep, ...]:
    """Steps that leave our jump at position 1 of each built-in chain, and no other rule of ours there.

    What others have there stays, in its order. All steps of a restore happen at once, so that a jump that is moved is
    never missing. ``hold``: a jump is put first, none is taken away.
    """
    steps: list[RuleStep] = []
    for hook in TOP_CHAINS:
        rules, jump = hooks.get(hook, ()), jump_rule(hook)
        ours = [text for text in rules if is_our_jump(text)]
        first = bool(rules) and rules[0] == jump
        if first and (hold or len(ours) == 1):
            continue
        # A deletion takes the first rule of its text: whichever it is, none of ours is left in the end.
        if not hold:
            steps += [RuleStep("delete", hook, text) for text in ours]
        steps.append(RuleStep("insert", hook, jump))
    return tuple(steps)


def is_our_jump(text: RuleText) -> bool:
    """Whether a rule of a built-in chain is one of our jumps, in its place or not."""
    return _JUMP.fullmatch(text) is not None


def plan_lines(plan: ChainPlan) -> Iterator[str]:
    """The plan for people: a line for every rule, chain or step, each with its family."""
    for chain, rules in plan.write.items():
        yield f"{plan.family}: write chain {chain} ({len(rules)} rules)"
        yield from (f"{plan.family}: -A {chain} {text}" for text in rules)
    yield from (f"{plan.family}: {step}" for step in plan.steps)
    yield from (f"{plan.family}: remove chain {chain}" for chain in plan.remove)


def describe(chain: str, actual: Rules | None, desired: Rules) -> str:
    """What differs in a chain, in one line: the first rule that is missing and the first that is too many."""
    if actual is None:
        return f"chain {chain} was gone"
    missing = [text for text in desired if text not in actual]
    surplus = [text for text in actual if text not in desired]
    words = [f"{len(missing)} rules missing, first: {missing[0]}"] if missing else []
    words += [f"{len(surplus)} rules too many, first: {surplus[0]}"] if surplus else []
    return f"chain {chain}: " + ("; ".join(words) or "its rules were in another order, or there more than once")
