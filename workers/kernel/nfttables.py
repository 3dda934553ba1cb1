"""nftables tables as a whole: is one there, and away with it.

Touches the kernel: nfnetlink messages, so neither the ``nft`` program nor its library is needed. What is inside of a
table is the business of who makes it.
"""

from __future__ import annotations

import errno
import struct

from kube_router.workers.kernel.netlink import (
    NETLINK_NETFILTER,
    NetlinkError,
    NetlinkSocket,
    Request,
    text_attribute,
)
from kube_router.workers.kernel.routes import AF
from kube_router.workers.model import Family

_NFTABLES = 10
_GETTABLE, _DELTABLE = 1, 2
_TABLE_NAME = 1


def has_table(family: Family, name: str) -> bool:
    """Whether a table of family ``ip`` or ``ip6`` exists; a kernel without nftables has none. Raises OSError."""
    netlink = NetlinkSocket(NETLINK_NETFILTER)
    try:
        netlink.query(
            _NFTABLES << 8 | _GETTABLE, struct.pack("=BBH", AF[family], 0, 0) + text_attribute(_TABLE_NAME, name)
        )
    except NetlinkError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        netlink.close()
    return True


def delete_table(family: Family, name: str) -> bool:
    """Delete a table with all that is in it; whether it was there. Raises OSError."""
    if not has_table(family, name):
        return False
    netlink = NetlinkSocket(NETLINK_NETFILTER)
    try:
        errors = netlink.transaction(_NFTABLES, [Request(_NFTABLES << 8 | _DELTABLE, 0, _named(family, name))])
    finally:
        netlink.close()
    for error in errors.values():
        if error.errno != errno.ENOENT:
            raise error
    return not errors


def _named(family: Family, name: str) -> bytes:
    return struct.pack("=BBH", AF[family], 0, 0) + text_attribute(_TABLE_NAME, name)
