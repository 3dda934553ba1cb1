"""The policy rules ``from <pod CIDR> lookup 77`` over rtnetlink.

Touches the kernel. Seen here are only rules of exactly that form: a source, table 77, and no other condition. The mark
of ours is their protocol, 17, which kernels since 4.17 keep. The kernel picks the priority of a rule that names none:
the one before the second rule that there is.
"""

from __future__ import annotations

import errno
import socket
import struct

from kube_router.workers.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_CREATE,
    Message,
    NetlinkError,
    NetlinkSocket,
    Request,
    attribute,
    attribute_map,
)
from kube_router.workers.kernel.routes import AF, address_text
from kube_router.workers.tunnelfacts import OVERLAY_TABLE, PodRule, PodRulePlan

RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
_SRC, _PRIORITY, _SUPPRESS_PREFIXLEN, _TABLE, _PADDING, _PROTOCOL = 2, 6, 14, 15, 18, 21
_HARMLESS = {_SRC, _PRIORITY, _TABLE, _PADDING, _PROTOCOL}
"""Attributes that set no further condition; `_SUPPRESS_PREFIXLEN`, which is always there, is judged by its value."""
_TO_TABLE = 1
_HEADER = struct.Struct("=BBBBBBBBI")
"""struct fib_rule_hdr: family, destination and source length, tos, table, two reserved bytes, action, flags."""
_U32 = struct.Struct("=I")
_FAMILY = {int(number): family for family, number in AF.items()}


class PodRuleDriver:
    """Observes and applies the rules through one socket; `portid` marks the events that its own writes cause."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_ROUTE)
        self.portid = self._netlink.portid

    @property
    def writes(self) -> int:
        """Requests sent so far that change something."""
        return self._netlink.writes

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def observe(self) -> tuple[PodRule, ...]:
        """Rules of our form of both families, whoever made them, in the kernel's order; one may be there twice."""
        found = []
        for family, number in AF.items():
            try:
                messages = self._netlink.dump(RTM_GETRULE, _HEADER.pack(number, 0, 0, 0, 0, 0, 0, 0, 0))
            except NetlinkError as error:
                if error.errno in (
                    errno.EAFNOSUPPORT,
                    errno.EOPNOTSUPP,
                ):  # a kernel without policy rules of this family
                    continue
                raise
            rules = (decode_rule(message) for message in messages if message.type == RTM_NEWRULE)
            found += [rule for rule in rules if rule is not None and rule.family == family]
        return tuple(found)

    def apply(self, plan: PodRulePlan) -> dict[PodRule, NetlinkError]:
        """Execute the steps in their order; each refused rule with its error. A missing rule is deleted already."""
        # Without NLM_F_EXCL: a rule of somebody else's protocol does not stand for ours.
        steps = [*((rule, _request(RTM_NEWRULE, NLM_F_CREATE, rule)) for rule in plan.add)]
        additions = len(steps)
        steps += [(rule, _request(RTM_DELRULE, 0, rule)) for rule in plan.delete]
        errors = self._netlink.batch([request for _, request in steps])
        return {
            steps[index][0]: error
            for index, error in errors.items()
            if index < additions or error.errno not in (errno.ENOENT, errno.ESRCH)
        }


def _request(kind: int, flags: int, rule: PodRule) -> Request:
    address, _, length = rule.source.partition("/")
    number = AF[rule.family]
    payload = _HEADER.pack(number, 0, int(length), 0, OVERLAY_TABLE, 0, 0, _TO_TABLE, 0)
    if int(length):
        payload += attribute(_SRC, socket.inet_pton(number, address))
    if rule.priority:
        payload += attribute(_PRIORITY, _U32.pack(rule.priority))
    payload += attribute(_TABLE, _U32.pack(OVERLAY_TABLE)) + attribute(_PROTOCOL, bytes((rule.protocol,)))
    return Request(kind, flags, payload)


def decode_rule(message: Message) -> PodRule | None:
    """A rule of our form out of an RTM_NEWRULE or RTM_DELRULE; None for every other rule and message."""
    if message.type not in (RTM_NEWRULE, RTM_DELRULE) or len(message.payload) < _HEADER.size:
        return None
    number, to_length, length, tos, table, _, _, action, flags = _HEADER.unpack_from(message.payload)
    family = _FAMILY.get(number)
    found = attribute_map(message.payload, _HEADER.size)
    if _TABLE in found:
        (table,) = _U32.unpack(found[_TABLE])
    if family is None or (to_length, tos, table, action, flags) != (0, 0, OVERLAY_TABLE, _TO_TABLE, 0):
        return None
    suppress = found.get(_SUPPRESS_PREFIXLEN)
    if (suppress is not None and bytes(suppress) != b"\xff" * 4) or found.keys() - _HARMLESS - {_SUPPRESS_PREFIXLEN}:
        return None
    source = found.get(_SRC, memoryview(bytes(family.bits // 8)))
    protocol = found.get(_PROTOCOL)
    return PodRule(
        source=f"{address_text(family, source)}/{length}",
        protocol=protocol[0] if protocol is not None else 0,
        priority=_U32.unpack(found[_PRIORITY])[0] if _PRIORITY in found else 0,
    )
