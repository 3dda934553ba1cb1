from collections.abc import Iterable
from typing import Literal

Kind = Literal["address", "address,port", "port"]
"""What a member is: of hash:ip and hash:net; of hash:ip,port; of bitmap:port."""

def pack_members(members: Iterable[str], family: int, kind: Kind = "address") -> bytes:
    """Pack members of one family (4 or 6) and kind: addresses and CIDRs; ``10.0.0.1,tcp:80``; ports.

    Host bits are cleared, repeated members kept once. A protocol is ``tcp``, ``udp``, ``sctp`` or a number. ValueError
    names the first item that is no such member (no netmask, zone, leading zero); nothing is skipped.
    """

def unpack_members(packed: bytes, family: int, kind: Kind = "address") -> list[str]:
    """The members as text in packed order: ``10.0.0.1``, ``10.1.0.0/16``; a full-length prefix is left out."""

def diff_members(actual: bytes, desired: bytes, family: int, kind: Kind = "address") -> tuple[bytes, bytes]:
    """``(to_add, to_delete)``, both packed, that turn ``actual`` into ``desired``.

    ValueError when one of them is not packed for family and kind: length, prefix length or order.
    """

def adt_payloads(
    packed: bytes, family: int, with_cidr: bool, max_bytes: int = 60000, kind: Kind = "address"
) -> list[bytes]:
    """The members as complete ``IPSET_ATTR_ADT`` attributes (header included) of at most ``max_bytes`` bytes each.

    To be sent after IPSET_ATTR_PROTOCOL, IPSET_ATTR_SETNAME and IPSET_ATTR_LINENO (the kernel demands the last one
    beside an ADT) in IPSET_CMD_ADD or IPSET_CMD_DEL. Each holds one IPSET_ATTR_DATA a member: IPSET_ATTR_IP with the
    address in network order and, if ``with_cidr`` (hash:net), IPSET_ATTR_CIDR; or what its kind of member asks for.
    Entries carry no timeout: the set's own default holds. No member, no payload.

    ValueError for ``max_bytes`` above 65535, the most that an attribute can be, or too small for one entry; for a
    prefix in a set without prefixes, which the kernel would spread into single addresses; and for prefix length 0,
    which hash:net refuses (``0.0.0.0/0`` has to be given as ``0.0.0.0/1`` and ``128.0.0.0/1``).
    """

def parse_adt(messages: Iterable[bytes], family: int, kind: Kind = "address") -> bytes:
    """Pack the members found in the ``IPSET_ATTR_ADT`` attributes (headers included) of IPSET_CMD_LIST replies.

    Timeouts, counters and comments are passed by. An entry flagged ``nomatch`` is not a member and is left out.
    ValueError for an attribute that is cut off, of another type, or of the other family, and for an entry that lacks a
    part of the member.
    """
