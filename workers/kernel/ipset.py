"""Sets of addresses and networks (ipset), over nfnetlink; no ``ipset`` program.

Touches the kernel. Ours are the sets whose names a caller gives; no other set is ever listed, changed or destroyed,
and a set of such a name that has another type or family is a conflict, left as it is. Thousands of members go in one
message (`_fast.ipset`). Messages after ``include/uapi/linux/netfilter/ipset/ip_set.h``.

The kernel sends no events for sets; `count` is the cheap look (a few microseconds for small sets) that notices when
somebody flushed, destroyed or filled one. A foreign exchange of one member for another is found by the next `observe`.
"""

from __future__ import annotations

import errno
import struct

from kube_router._fast.ipset import adt_payloads, parse_adt
from kube_router.workers.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    NetlinkError,
    NetlinkSocket,
    Overflow,
    Request,
    attribute,
    attribute_map,
    attributes,
    nested,
    text_attribute,
    text_of,
)
from kube_router.workers.kernel.routes import AF
from kube_router.workers.model import Family
from kube_router.workers.rulefacts import Members, SetPlan, SetSpec

_SUBSYSTEM = 6 << 8
_CREATE, _DESTROY, _LIST, _ADD, _DEL, _TYPE = 2, 3, 7, 9, 10, 13
_PROTOCOL_VERSION = 6
"""Understood by every kernel since 2.6.39; version 7 adds nothing that is used here."""
_PROTOCOL, _SETNAME, _TYPENAME, _REVISION, _FAMILY, _FLAGS, _DATA, _ADT, _LINENO = range(1, 10)
_TIMEOUT, _MAXELEM, _ELEMENTS = 6, 19, 24
_FLAG_LIST_HEADER = 4
_NLA_F_NET_BYTEORDER = 0x4000
_DEFAULT_MAXELEM = 65536

_WORDS = {
    4097: "the kernel speaks another ipset protocol",
    4098: "the kernel has no such set type",
    4099: "the kernel has no room for another set",
    4100: "something still refers to it",
    4103: "a member is there already, or is not there",
    4104: "a prefix length is not allowed",
    4352: "it is full",
}
"""Errors of ipset's own (``enum ipset_errno``; 4352 is IPSET_ERR_HASH_FULL)."""


class SetError(Exception):
    """A set cannot be read or changed; the text names it."""


class SetDriver:
    """Observes and changes named sets through one socket."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_NETFILTER)
        self._revisions: dict[tuple[str, Family], int] = {}

    @property
    def writes(self) -> int:
        """Messages sent to change something."""
        return self._netlink.writes

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def observe(self, spec: SetSpec) -> Members | None:
        """The members of a set; None when it does not exist. Raises `SetError`, also for one that is not ``spec``'s."""
        messages = self._list(spec, header_only=False)
        if messages is None:
            return None
        found: list[bytes] = []
        for message in messages:
            for kind, value in attributes(message.payload, 4):
                if kind == _ADT:
                    found.append(attribute(_ADT | 0x8000, bytes(value)))
        try:
            return Members(spec.family, parse_adt(found, spec.family))
        except ValueError as error:
            raise SetError(f"ipset {spec.name}: cannot be read: {error}") from error

    def count(self, spec: SetSpec) -> int | None:
        """The number of members; None when the set does not exist. Raises `SetError` like `observe`."""
        for message in self._list(spec, header_only=True) or ():
            data = attribute_map(message.payload, 4).get(_DATA)
            if data is not None:
                return int.from_bytes(attribute_map(data)[_ELEMENTS], "big")
        return None

    def _list(self, spec: SetSpec, *, header_only: bool) -> list[Message] | None:
        payload = _header(spec)
        if header_only:
            payload += _number(_FLAGS, _FLAG_LIST_HEADER)
        try:
            messages = self._netlink.dump(_SUBSYSTEM | _LIST, payload)
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return None
            raise _set_error("list", spec, error) from error
        except (OSError, Overflow) as error:
            raise SetError(f"ipset {spec.name}: cannot be listed: {error or 'answers were lost'}") from error
        if not messages:
            return None
        _check(spec, messages[0])
        return messages

    def apply(self, plan: SetPlan) -> None:
        """Carry out the steps in order; stops at the first that fails. Raises `SetError`.

        After an error the members must be observed again: a message that failed in its middle was half done.
        """
        spec = plan.spec
        prefixes = spec.type == "hash:net"
        requests = [self._creation(spec)] if plan.create else []
        for command, members in ((_ADD, plan.add), (_DEL, plan.delete)):
            for payload in adt_payloads(members.packed, spec.family, prefixes):
                # Without NLM_F_EXCL the kernel passes over a member that is there (or gone) already.
                requests.append(Request(_SUBSYSTEM | command, 0, _header(spec) + _number(_LINENO, 1) + payload))
        for request in requests:
            self._change(request, spec)

    def destroy(self, spec: SetSpec) -> bool:
        """Destroy a set, if it is there; whether it was. Raises `SetError`, also while a rule refers to it."""
        if self._list(spec, header_only=True) is None:
            return False
        self._change(Request(_SUBSYSTEM | _DESTROY, 0, _header(spec)), spec)
        return True

    def _change(self, request: Request, spec: SetSpec) -> None:
        action = {_CREATE: "create", _DESTROY: "destroy", _ADD: "add", _DEL: "delete"}[request.type & 0xFF]
        try:
            error = self._netlink.batch([request]).get(0)
        except (OSError, Overflow) as failure:
            raise SetError(f"ipset {spec.name}: {action}: {failure or 'answers were lost'}") from failure
        if error is not None:
            raise _set_error(action, spec, error)

    def _creation(self, spec: SetSpec) -> Request:
        data = [_number(_TIMEOUT, 0)]
        if spec.max_members != _DEFAULT_MAXELEM:
            data.append(_number(_MAXELEM, spec.max_members))
        payload = (
            _header(spec)
            + text_attribute(_TYPENAME, spec.type)
            + attribute(_REVISION, bytes([self._revision(spec)]))
            + attribute(_FAMILY, bytes([AF[spec.family]]))
            + nested(_DATA, *data)
        )
        return Request(_SUBSYSTEM | _CREATE, NLM_F_CREATE | NLM_F_EXCL, payload)

    def _revision(self, spec: SetSpec) -> int:
        """The newest revision of the set type that this kernel has; asking loads its module."""
        key = (spec.type, spec.family)
        if key not in self._revisions:
            payload = (
                _nfgenmsg(spec.family)
                + attribute(_PROTOCOL, bytes([_PROTOCOL_VERSION]))
                + text_attribute(_TYPENAME, spec.type)
                + attribute(_FAMILY, bytes([AF[spec.family]]))
            )
            try:
                answer = self._netlink.query(_SUBSYSTEM | _TYPE, payload)
            except NetlinkError as error:
                raise _set_error(f"type {spec.type}", spec, error) from error
            self._revisions[key] = attribute_map(answer.payload, 4)[_REVISION][0]
        return self._revisions[key]


def _check(spec: SetSpec, message: Message) -> None:
    found = attribute_map(message.payload, 4)
    kind, family = text_of(found.get(_TYPENAME, b"")), bytes(found.get(_FAMILY, b"\0"))[0]
    if (kind, family) != (spec.type, AF[spec.family]):
        raise SetError(
            f"ipset {spec.name}: exists as {kind} of {'inet6' if family == AF[Family.IPV6] else 'inet'}, but must be "
            f"{spec.type} of {'inet6' if spec.family is Family.IPV6 else 'inet'}; it is left as it is"
        )


def _nfgenmsg(family: Family) -> bytes:
    return struct.pack("=BBH", AF[family], 0, 0)


def _header(spec: SetSpec) -> bytes:
    return (
        _nfgenmsg(spec.family) + attribute(_PROTOCOL, bytes([_PROTOCOL_VERSION])) + text_attribute(_SETNAME, spec.name)
    )


def _number(kind: int, value: int) -> bytes:
    return attribute(kind | _NLA_F_NET_BYTEORDER, struct.pack(">I", value))


def _set_error(action: str, spec: SetSpec, error: NetlinkError) -> SetError:
    return SetError(f"ipset {spec.name}: {action}: {_WORDS.get(error.errno or 0, error.strerror)}")
