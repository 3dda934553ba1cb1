"""UDP ports at which the kernel unpacks tunnel packets (FoU with GUE header), over generic netlink.

Touches the kernel: family ``fou`` (``include/uapi/linux/fou.h``), whose module nothing loads by itself. A port knows no
owner: which ones are ours, the caller remembers. IPv4 and IPv6 are separate sockets with the same number.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable

from kube_router.workers.kernel.netlink import (
    NLM_F_DUMP,
    NetlinkError,
    NetlinkSocket,
    Request,
    attribute,
    attribute_map,
    text_attribute,
)
from kube_router.workers.kernel.sysctl import load_module
from kube_router.workers.model import Family
from kube_router.workers.tunnelfacts import FouPort

_NETLINK_GENERIC = 16
_CONTROLLER, _GET_FAMILY = 16, 3
_CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 1, 2
_ADD, _DELETE, _GET = 1, 2, 3
_PORT, _AF, _TYPE = 1, 2, 4
_PEER_PORT, _IFINDEX = 10, 11
_GUE = 2
_VERSION = 1
_HEADER = struct.Struct("=BBH")
_AF_OF = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_FAMILY = {int(number): family for family, number in _AF_OF.items()}
MODULES = {Family.IPV4: "fou", Family.IPV6: "fou6"}
"""What each family needs; ``fou6`` brings sending only, and ``fou`` with it."""


class FouDriver:
    """Observes, opens and closes ports. The kernel may lack FoU: then `available` is False and there are no ports."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(_NETLINK_GENERIC)
        self._family = 0

    @property
    def writes(self) -> int:
        """Requests sent so far that change something."""
        return self._netlink.writes

    def close(self) -> None:
        """Close the socket; the ports stay open."""
        self._netlink.close()

    def available(self) -> bool:
        """Whether the kernel has FoU, loaded or built in. Raises OSError for anything but its absence."""
        if not self._family:
            payload = _HEADER.pack(_GET_FAMILY, 1, 0) + text_attribute(_CTRL_ATTR_FAMILY_NAME, "fou")
            try:
                answer = self._netlink.query(_CONTROLLER, payload)
            except NetlinkError as error:
                if error.errno == errno.ENOENT:
                    return False
                raise
            found = attribute_map(answer.payload, _HEADER.size).get(_CTRL_ATTR_FAMILY_ID)
            self._family = 0 if found is None else int(struct.unpack("=H", found)[0])
        return bool(self._family)

    def observe(self) -> frozenset[FouPort]:
        """All open ports, ours or not, without those that are bound to a peer or a device."""
        if not self.available():
            return frozenset()
        found = set()
        for message in self._netlink.dump(self._family, _HEADER.pack(_GET, _VERSION, 0), NLM_F_DUMP):
            data = attribute_map(message.payload, _HEADER.size)
            family = _FAMILY.get(_number(data.get(_AF)))
            if family is not None and not _number(data.get(_PEER_PORT)) and not _number(data.get(_IFINDEX)):
                found.add(
                    FouPort(family, int.from_bytes(data.get(_PORT, b""), "big"), _number(data.get(_TYPE)) == _GUE)
                )
        return frozenset(found)

    def open(self, ports: Iterable[FouPort]) -> dict[FouPort, NetlinkError]:
        """Open ports; each that the kernel refused, with its error. One that is open already with GUE is no error."""
        failed = self._each(_ADD, ports)
        there = self.observe() if failed else frozenset()
        return {port: error for port, error in failed.items() if port not in there}

    def shut(self, ports: Iterable[FouPort]) -> dict[FouPort, NetlinkError]:
        """Close ports; each that the kernel refused, with its error. One that is not open is no error."""
        failed = self._each(_DELETE, ports)
        return {port: error for port, error in failed.items() if error.errno not in (errno.ENOENT, errno.EINVAL)}

    def _each(self, command: int, ports: Iterable[FouPort]) -> dict[FouPort, NetlinkError]:
        wanted = tuple(ports)
        if not wanted:
            return {}
        if not self.available():
            missing = NetlinkError(errno.ENOENT, "the kernel has no FoU (module fou)")
            return dict.fromkeys(wanted, missing) if command == _ADD else {}
        requests = [Request(self._family, 0, _HEADER.pack(command, _VERSION, 0) + _port(port)) for port in wanted]
        return {wanted[index]: error for index, error in self._netlink.batch(requests).items()}


def load_fou(families: Iterable[Family]) -> str | None:
    """Load the modules; why that failed, in one line, or None."""
    problems = [problem for family in families if (problem := load_module(MODULES[family]))]
    return problems[0] if problems else None


def _port(port: FouPort) -> bytes:
    # No inner protocol: GUE names it packet by packet, and newer kernels refuse a zero.
    return (
        attribute(_PORT, struct.pack("!H", port.port))
        + attribute(_AF, bytes((_AF_OF[port.family],)))
        + attribute(_TYPE, bytes((_GUE,)))
    )


def _number(value: memoryview | None) -> int:
    """A byte as a number; of the wider attributes only whether they are zero is asked."""
    return 0 if value is None else int.from_bytes(value, "big")
