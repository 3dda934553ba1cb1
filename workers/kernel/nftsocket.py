"""What the drivers of nftables share: a socket, its errors in one line, and the number of the rule set.

Touches the kernel: one nfnetlink socket, in the network namespace of the thread that makes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from kube_router.workers.kernel.monitor import nft_generation
from kube_router.workers.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket


class NftError(Exception):
    """The kernel refused something, or a command is none; one line of text.

    ``refused``: (index of the command, why) for every command that is at fault, as far as that is known.
    """

    def __init__(self, text: str, refused: Sequence[tuple[int, str]] = ()) -> None:
        super().__init__(text)
        self.refused = tuple(refused)


class NftSocket:
    """The socket of a driver. Raises OSError when it cannot be made."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_NETFILTER)

    @property
    def portid(self) -> int:
        """Its address, by which its own events are told from others'; see `monitor.TableListener`."""
        return self._netlink.portid

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def generation(self) -> int:
        """The number of the namespace's rule set: every transaction of anybody makes it another one."""
        try:
            return nft_generation(self._netlink)
        except OSError as error:
            raise NftError(f"nftables: {words(error)}") from error

    def stands_at(self, generation: int) -> int | None:
        """``generation``, if the rule set is there now, else None.

        Given the number that a worker's own transactions alone lead to: then nobody came between them.
        """
        with contextlib.suppress(NftError):
            if self.generation() == generation:
                return generation
        return None


def words(error: Exception) -> str:
    """What an error of the socket says; `Overflow` says nothing of its own."""
    return str(getattr(error, "strerror", None) or error or "answers were lost")
