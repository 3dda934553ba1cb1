"""nftables tables as a whole: is one there, and away with it.

Touches the kernel: one nfnetlink question, and the ``nft`` program to delete, which happens about never. What is inside
of a table is the business of who makes it.
"""

from __future__ import annotations

import errno
import struct

from kube_router.workers.kernel.iptables import run_program
from kube_router.workers.kernel.netlink import NETLINK_NETFILTER, NetlinkError, NetlinkSocket, text_attribute
from kube_router.workers.kernel.routes import AF
from kube_router.workers.model import Family

_GET_TABLE = 10 << 8 | 1
_TABLE_NAME = 1
_FAMILY_WORD = {Family.IPV4: "ip", Family.IPV6: "ip6"}


def has_table(family: Family, name: str) -> bool:
    """Whether a table of family ``ip`` or ``ip6`` exists; a kernel without nftables has none. Raises OSError."""
    netlink = NetlinkSocket(NETLINK_NETFILTER)
    try:
        netlink.query(_GET_TABLE, struct.pack("=BBH", AF[family], 0, 0) + text_attribute(_TABLE_NAME, name))
    except NetlinkError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        netlink.close()
    return True


def delete_table(family: Family, name: str) -> bool:
    """Delete a table with all that is in it; whether it was there. Raises OSError or `iptables.IptablesError`."""
    if not has_table(family, name):
        return False
    run_program(["nft", "delete", "table", _FAMILY_WORD[family], name])
    return True
