"""Network namespaces for tests: made with a name of this process's own, entered by a thread, deleted exactly.

Touches the kernel: ``ip netns`` and setns(2); needs root. Nothing here changes the namespace that the tests started in.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count(1)


def setns(descriptor: int) -> None:
    """Move the calling thread into the network namespace behind ``descriptor``; raises OSError."""
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")


@dataclass(frozen=True)
class Namespace:
    """A named network namespace; loopback is up."""

    name: str
    deleted: list[bool] = field(default_factory=list, compare=False, repr=False)

    @property
    def path(self) -> str:
        """The file that ``setns`` and CNI plugins take."""
        return f"/run/netns/{self.name}"

    def run(self, command: str, *, stdin: str | None = None, check: bool = True) -> str:
        """Run a shell command inside and return its standard output; raises AssertionError with its standard error."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, "sh", "-c", command], input=stdin, capture_output=True, text=True
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{self.name}: {command!r} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def start(self, arguments: list[str], **options: object) -> subprocess.Popen[str]:
        """Start a process inside, in text mode; the caller ends it."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *arguments], text=True, **options)  # type: ignore[call-overload,no-any-return]

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """The calling thread is inside for the duration of the block."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        inside = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(inside)
            try:
                yield
            finally:
                setns(before)
        finally:
            os.close(inside)
            os.close(before)

    def delete(self) -> None:
        """Delete it, once; processes still inside keep it alive until they end."""
        if not self.deleted:
            self.deleted.append(True)
            subprocess.run(["ip", "netns", "delete", self.name], check=True)


def create() -> Namespace:
    """A new namespace ``krt-<pid>-<n>`` with loopback up."""
    namespace = Namespace(f"krt-{os.getpid()}-{next(_numbers)}")
    subprocess.run(["ip", "netns", "add", namespace.name], check=True)
    namespace.run("ip link set lo up")
    return namespace


def create_all(count: int) -> list[Namespace]:
    """As many new namespaces by two processes: where starting one takes long."""
    made = [Namespace(f"krt-{os.getpid()}-{next(_numbers)}") for _ in range(count)]
    commands = [*(f"netns add {one.name}" for one in made)]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)
    for namespace in made:
        with namespace.enter():
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    return made


@contextlib.contextmanager
def namespaces(count: int = 1) -> Iterator[tuple[Namespace, ...]]:
    """``count`` new namespaces, deleted at the end of the block whatever happens in it."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            namespace = create()
            stack.callback(namespace.delete)
            made.append(namespace)
        yield tuple(made)


def veth(
    left: Namespace,
    left_name: str,
    right: Namespace,
    right_name: str,
    *,
    left_addresses: tuple[str, ...] = (),
    right_addresses: tuple[str, ...] = (),
) -> None:
    """A veth pair between two namespaces, both ends up, with addresses (``10.0.0.1/24``); IPv6 without DAD delay.

    Both ends are created inside the two namespaces: nothing appears in the namespace of the caller.
    """
    left.run(f"ip link add {left_name} type veth peer name {right_name} netns {right.name}")
    for namespace, name, addresses in ((left, left_name, left_addresses), (right, right_name, right_addresses)):
        namespace.run(f"sysctl -qw net.ipv6.conf.{name}.accept_dad=0")
        for address in addresses:
            namespace.run(f"ip address add {address} dev {name}" + (" nodad" if ":" in address else ""))
        namespace.run(f"ip link set {name} up")
