"""supervisord with a shorter turn: a program that ended is started again within a tenth of a second, not a whole one.

supervisord looks after its processes once a turn of its loop, and a turn lasts up to a second when nothing else wakes it:
the first start of all programs, each restart and each step of the shutdown wait for it. Nothing of supervisord is
changed but the time-out that it gives to its poller.

Run as ``python -P -m kube_router.supervisor.daemon -n -c FILE``; the command line is supervisord's.
"""

from __future__ import annotations

from typing import Any

from supervisor import supervisord
from supervisor.options import ServerOptions

TURN_SECONDS = 0.1


class BriskOptions(ServerOptions):  # type: ignore[misc]
    """supervisord's options, whose poller waits for `TURN_SECONDS` at the most."""

    def __init__(self) -> None:
        super().__init__()
        poll = self.poller.poll

        def brisk(timeout: float) -> Any:
            return poll(min(timeout, TURN_SECONDS))

        self.poller.poll = brisk


def main() -> None:
    """Become supervisord, for good."""
    supervisord.ServerOptions = BriskOptions
    supervisord.main()


if __name__ == "__main__":
    main()
