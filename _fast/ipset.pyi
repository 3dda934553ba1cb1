from collections.abc import Iterable

def pack_members(members: Iterable[str], family: int) -> bytes:
    """Pack addresses and CIDRs of one family (4 or 6).

    Host bits are cleared, repeated members kept once. ValueError names the first item that is no address or CIDR of the
    family (no netmask, zone, leading zero); nothing is skipped.
    """

def unpack_members(packed: bytes, family: int) -> list[str]:
    """The members as text in packed order: ``10.0.0.1``, ``10.1.0.0/16``; a full-length prefix is left out."""

def diff_members(actual: bytes, desired: bytes, family: int) -> tuple[bytes, bytes]:
    """``(to_add, to_delete)``, both packed, that turn ``actual`` into ``desired``.

    ValueError when one of them is not packed for the family: length, prefix length or order.
    """

def adt_payloads(packed: bytes, family: int, with_cidr: bool, max_bytes: int = 60000) -> list[bytes]:
    """The members as complete ``IPSET_ATTR_ADT`` attributes (header included) of at most ``max_bytes`` bytes each.

    To be sent after IPSET_ATTR_PROTOCOL, IPSET_ATTR_SETNAME and IPSET_ATTR_LINENO (the kernel demands the last one
    beside an ADT) in IPSET_CMD_ADD or IPSET_CMD_DEL. Each holds one IPSET_ATTR_DATA a member: IPSET_ATTR_IP with the
    address in network order and, if ``with_cidr`` (hash:net), IPSET_ATTR_CIDR. Entries carry no timeout: the set's own
    default holds. No member, no payload.

    ValueError for ``max_bytes`` above 65535, the most that an attribute can be, or too small for one entry; for a
    prefix in a set without prefixes, which the kernel would spread into single addresses; and for prefix length 0,
    which hash:net refuses (``0.0.0.0/0`` has to be given as ``0.0.0.0/1`` and ``128.0.0.0/1``).
    """

def parse_adt(messages: Iterable[bytes], family: int) -> bytes:
    """Pack the members found in the ``IPSET_ATTR_ADT`` attributes (headers included) of IPSET_CMD_LIST replies.

    Timeouts, counters and comments are passed by. An entry flagged ``nomatch`` is not a member and is left out.
    ValueError for an attribute that is cut off, of another type, or of the other family.
    """
