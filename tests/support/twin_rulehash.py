"""Plain-Python twin of `kube_router._fast.rulehash`: the oracle, written against hashlib."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence


def rule_set_hash(rules: Sequence[str]) -> bytes:
    """As `kube_router._fast.rulehash.rule_set_hash`."""
    digest = hashlib.blake2b(digest_size=16)
    for rule in rules:
        text = rule.encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.digest()


def rule_set_hashes(chains: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """As `kube_router._fast.rulehash.rule_set_hashes`."""
    return {chain: rule_set_hash(rules) for chain, rules in chains.items()}
