from collections.abc import Mapping, Sequence

def rule_set_hash(rules: Sequence[str]) -> bytes:
    """Digest (16 bytes) of the rules of one chain, in order.

    Equal for equal lists, on every machine and in every process; different for lists that differ in any rule or in
    their order, up to a collision of 128-bit BLAKE2b. TypeError for anything but str; UnicodeEncodeError for text that
    has no UTF-8 form.
    """

def rule_set_hashes(chains: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """`rule_set_hash` of every chain, by the chain's name; the name itself is not part of the digest."""
