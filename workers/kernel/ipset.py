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
from collections.abc import Callable

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
from kube_router.workers.rulefacts import DEFAULT_MOST, Members, SetName, SetPlan, SetSpec

_SUBSYSTEM = 6 << 8
_CREATE, _DESTROY, _SWAP, _LIST, _ADD, _DEL, _TYPE = 2, 3, 6, 7, 9, 10, 13
_PROTOCOL_VERSION = 6
"""Understood by every kernel since 2.6.39; version 7 adds nothing that is used here."""
_PROTOCOL, _SETNAME, _TYPENAME, _REVISION, _FAMILY, _FLAGS, _DATA, _ADT, _LINENO = range(1, 10)
_SETNAME2 = _TYPENAME
_PORT_FROM, _PORT_TO, _TIMEOUT, _HASHSIZE, _MAXELEM, _ELEMENTS = 4, 5, 6, 18, 19, 24
_FLAG_LIST_SETNAME, _FLAG_LIST_HEADER = 2, 4
_NLA_F_NET_BYTEORDER = 0x4000
_DEFAULT_BUCKETS = 1024
"""Of a new set's hash; the kernel doubles it, and hashes all members again, whenever a bucket is full."""
_REFERENCED, _FULL = 4100, 4352

_WORDS = {
    4097: "the kernel speaks another ipset protocol",
    4098: "the kernel has no such set type",
    4099: "the kernel has no room for another set",
    _REFERENCED: "something still refers to it",
    4103: "a member is there already, or is not there",
    4104: "a prefix length is not allowed",
    _FULL: "it is full",
}
"""Errors of ipset's own (``enum ipset_errno``; 4352 is IPSET_ERR_HASH_FULL)."""


class SetError(Exception):
    """A set cannot be read or changed; the text names it."""


class SetFull(SetError):
    """A set has no room for what is to be added."""


class SetReferenced(SetError):
    """A set cannot be destroyed, as a rule still refers to it."""


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
            return Members(spec.family, parse_adt(found, spec.family, spec.kind), spec.kind)
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
        payload = _header(spec.name, spec.family)
        if header_only:
            payload += _number(_FLAGS, _FLAG_LIST_HEADER)
        try:
            messages = self._netlink.dump(_SUBSYSTEM | _LIST, payload)
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return None
            raise _set_error("list", spec.name, error) from error
        except (OSError, Overflow) as error:
            raise SetError(f"ipset {spec.name}: cannot be listed: {error or 'answers were lost'}") from error
        if not messages:
            return None
        _check(spec, messages[0])
        return messages

    def names(self, ours: Callable[[str], bool]) -> frozenset[SetName]:
        """The names of all sets that ``ours`` takes, without a look into any set. Raises `SetError`."""
        payload = _nfgenmsg(0) + attribute(_PROTOCOL, bytes([_PROTOCOL_VERSION])) + _number(_FLAGS, _FLAG_LIST_SETNAME)
        try:
            messages = self._netlink.dump(_SUBSYSTEM | _LIST, payload)
        except (OSError, Overflow) as error:
            raise SetError(f"ipsets: their names cannot be listed: {error or 'answers were lost'}") from error
        found = (text_of(attribute_map(message.payload, 4).get(_SETNAME, b"")) for message in messages)
        return frozenset(SetName(name) for name in found if name and ours(name))

    def apply(self, plan: SetPlan) -> None:
        """Carry out the steps in order; stops at the first that fails. Raises `SetError`, `SetFull` when full.

        After an error the members must be observed again: a message that failed in its middle was half done.
        """
        if plan.create:
            self._change(self._creation(plan.spec, len(plan.add)), plan.spec.name)
        self.change(plan.spec, plan.add, plan.delete)

    def change(self, spec: SetSpec, add: Members, delete: Members) -> None:
        """Add and delete members of a set that is there: a message each, whatever the set holds. Raises like `apply`.

        A member that is there (or gone) already is no error.
        """
        prefixes = spec.type == "hash:net"
        for command, members in ((_ADD, add), (_DEL, delete)):
            for payload in adt_payloads(members.packed, spec.family, prefixes, kind=spec.kind):
                # Without NLM_F_EXCL the kernel passes over a member that is there (or gone) already.
                body = _header(spec.name, spec.family) + _number(_LINENO, 1) + payload
                self._change(Request(_SUBSYSTEM | command, 0, body), spec.name)

    def replace(self, spec: SetSpec, members: Members, spare: SetName) -> None:
        """Put a new set, made by ``spec`` and holding ``members``, in the place of the one that rules refer to.

        The exchange is one step of the kernel: no rule ever sees a set that is half full. ``spare`` is the name that
        the new set has until then and the old one from then until it is destroyed; a set of that name is ours.
        Raises `SetError`.
        """
        self.remove(spare)
        made = SetSpec(spare, spec.type, spec.family, spec.max_members)
        try:
            self._change(self._creation(made, len(members)), spare)
            self.change(made, members, spec.members())
            body = _header(spare, spec.family) + text_attribute(_SETNAME2, spec.name)
            self._change(Request(_SUBSYSTEM | _SWAP, 0, body), spec.name)
        finally:
            self.remove(spare)

    def destroy(self, spec: SetSpec) -> bool:
        """Destroy a set, if it is there; whether it was. Raises `SetError`, also while a rule refers to it."""
        if self._list(spec, header_only=True) is None:
            return False
        return self.remove(spec.name)

    def remove(self, name: SetName) -> bool:
        """Destroy a set of whatever type, if it is there; whether it was. Raises `SetReferenced` and `SetError`."""
        # Without NLM_F_EXCL newer kernels call the destruction of nothing a success.
        request = Request(_SUBSYSTEM | _DESTROY, NLM_F_EXCL, _header(name, Family.IPV4))
        try:
            self._change(request, name)
        except SetError as error:
            if isinstance(error.__cause__, NetlinkError) and error.__cause__.errno == errno.ENOENT:
                return False
            raise
        return True

    def _change(self, request: Request, name: SetName) -> None:
        action = {_CREATE: "create", _DESTROY: "destroy", _SWAP: "swap", _ADD: "add", _DEL: "delete"}[
            request.type & 0xFF
        ]
        try:
            error = self._netlink.batch([request]).get(0)
        except (OSError, Overflow) as failure:
            raise SetError(f"ipset {name}: {action}: {failure or 'answers were lost'}") from failure
        if error is not None:
            raise _set_error(action, name, error) from error

    def _creation(self, spec: SetSpec, members: int) -> Request:
        """``members``: how many it will soon hold; made that large, it need not be rebuilt again and again."""
        if spec.type == "bitmap:port":
            data = [_port(_PORT_FROM, 0), _port(_PORT_TO, 65535)]
        else:
            data = [_number(_TIMEOUT, 0)]
            if spec.max_members != DEFAULT_MOST:
                data.append(_number(_MAXELEM, spec.max_members))
            if members > 2 * _DEFAULT_BUCKETS:
                data.append(_number(_HASHSIZE, members // 2))
        payload = (
            _header(spec.name, spec.family)
            + text_attribute(_TYPENAME, spec.type)
            + attribute(_REVISION, bytes([self._revision(spec)]))
            + attribute(_FAMILY, bytes([_family(spec)]))
            + nested(_DATA, *data)
        )
        return Request(_SUBSYSTEM | _CREATE, NLM_F_CREATE | NLM_F_EXCL, payload)

    def _revision(self, spec: SetSpec) -> int:
        """The newest revision of the set type that this kernel has; asking loads its module."""
        key = (spec.type, spec.family)
        if key not in self._revisions:
            payload = (
                _nfgenmsg(AF[spec.family])
                + attribute(_PROTOCOL, bytes([_PROTOCOL_VERSION]))
                + text_attribute(_TYPENAME, spec.type)
                + attribute(_FAMILY, bytes([_family(spec)]))
            )
            try:
                answer = self._netlink.query(_SUBSYSTEM | _TYPE, payload)
            except NetlinkError as error:
                raise _set_error(f"type {spec.type}", spec.name, error) from error
            self._revisions[key] = attribute_map(answer.payload, 4)[_REVISION][0]
        return self._revisions[key]


def _check(spec: SetSpec, message: Message) -> None:
    found = attribute_map(message.payload, 4)
    kind, family = text_of(found.get(_TYPENAME, b"")), bytes(found.get(_FAMILY, b"\0"))[0]
    if (kind, family) != (spec.type, _family(spec)):
        raise SetError(
            f"ipset {spec.name}: exists as {kind} of {_FAMILY_WORDS.get(family, 'another family')}, but must be "
            f"{spec.type} of {_FAMILY_WORDS[_family(spec)]}; it is left as it is"
        )


_FAMILY_WORDS = {0: "any family", AF[Family.IPV4]: "inet", AF[Family.IPV6]: "inet6"}


def _family(spec: SetSpec) -> int:
    """The family number that the kernel has for a set: none for ports."""
    return 0 if spec.type == "bitmap:port" else AF[spec.family]


def _nfgenmsg(family: int) -> bytes:
    return struct.pack("=BBH", family, 0, 0)


def _header(name: SetName, family: Family) -> bytes:
    return _nfgenmsg(AF[family]) + attribute(_PROTOCOL, bytes([_PROTOCOL_VERSION])) + text_attribute(_SETNAME, name)


def _number(kind: int, value: int) -> bytes:
    return attribute(kind | _NLA_F_NET_BYTEORDER, struct.pack(">I", value))


def _port(kind: int, value: int) -> bytes:
    return attribute(kind | _NLA_F_NET_BYTEORDER, struct.pack(">H", value))


def _set_error(action: str, name: SetName, error: NetlinkError) -> SetError:
    made = {_FULL: SetFull, _REFERENCED: SetReferenced}.get(error.errno or 0, SetError)
    return made(f"ipset {name}: {action}: {_WORDS.get(error.errno or 0, error.strerror)}")
