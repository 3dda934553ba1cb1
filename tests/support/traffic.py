"""Traffic that goes on while something is done to the nodes: every flow again and again, and what went wrong with it.

Touches the kernel. The flows are tried by a thread of their own, to which the `Probes` belong for that time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType

from support.probes import Answer, Flow, Link, Probes


class Traffic:
    """New connections that must be open, others that must stay closed, and connections that must go on.

    ``lost`` and ``leaked`` hold flows with what they answered: an open one that was closed once, a closed one that was
    open once. ``broken``: links that carried no data any more. ``rounds``: how often all of it was tried.
    """

    def __init__(self, probes: Probes, expected: Mapping[Flow, bool], links: Mapping[str, Link] | None = None) -> None:
        self.probes, self.expected, self.links = probes, expected, dict(links or {})
        self.lost: list[tuple[Flow, Answer]] = []
        self.leaked: list[tuple[Flow, Answer]] = []
        self.broken: list[str] = []
        self.rounds = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic")

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def wrong(self) -> list[str]:
        """All that went wrong, a line each."""
        told = [f"lost {flow}: {answer}" for flow, answer in self.lost]
        told += [f"leaked {flow}: {answer}" for flow, answer in self.leaked]
        return told + [f"broken {name}" for name in self.broken]

    def _run(self) -> None:
        closed = [flow for flow, opened in self.expected.items() if not opened]
        opened = [flow for flow, wanted in self.expected.items() if wanted]
        while True:
            last = self._stop.is_set()
            # Apart: the open ones answer at once, so that nobody waits for them, and a busy machine has patience.
            answers = self.probes.try_all(opened, 2.0)
            self.lost += [(flow, answer) for flow, answer in answers.items() if answer != "open"]
            answers = self.probes.try_all(closed, 0.05)
            self.leaked += [(flow, answer) for flow, answer in answers.items() if answer == "open"]
            for name, link in list(self.links.items()):
                if not link.say(2.0):
                    self.broken.append(name)
                    del self.links[name]
            self.rounds += 1
            if last:
                return
