"""The source/destination check of an AWS instance: off, so that it may forward what its pods send and get.

Touches nothing but a child process: AWS's library takes some 30 MB and seconds, and a call may hang. The worker only
starts ``ec2.py`` and later reads its answer.

Only the own instance is asked for: each node cares for itself. A node whose role may not do it (UnauthorizedOperation)
says so once and leaves it until the worker starts again. Any other trouble is tried again with each
``--routes-sync-period``, after the child's own tries.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sys

from kube_router.ipc.messages import Node
from kube_router.workers.kernel.child import Child, Ended
from kube_router.workers.model import Outcome
from kube_router.workers.settings import Settings

log = logging.getLogger(__name__)

FLAG = "--disable-source-dest-check"
LIBRARY = "botocore"
INSTANCE = re.compile(r"i-[0-9a-f]{8,32}")
CHILD_SECONDS = 180.0
"""Five tries with their pauses and all time limits take less."""
LOOK_SECONDS = 0.5


class SourceDestCheck:
    """Turns the check off once, for the instance that the own Node names."""

    def __init__(self, settings: Settings) -> None:
        self._wanted = settings.disable_source_dest_check
        self._period = settings.routes_sync_period
        self._command = (sys.executable, "-P", "-m", "kube_router.workers.router.ec2")
        self._provider: str | None = None
        self._child: Child | None = None
        self._next_at: float | None = None
        self._warning = ""

    def look(self, node: Node, now: float) -> Outcome:
        """Do the next step, if any. Never waits; ``now`` in monotonic seconds."""
        if not self._wanted or not node.provider_id.startswith("aws"):
            self._forget()
            return Outcome()
        if node.provider_id != self._provider:
            self._forget()
            self._provider, self._next_at = node.provider_id, now
        if self._child is not None and (ended := self._child.ended()) is not None:
            self._child = None
            self._take(node, ended, now)
        if self._child is None and self._next_at is not None and now >= self._next_at:
            self._start(node)
        waiting = LOOK_SECONDS if self._child is not None else None
        if waiting is None and self._next_at is not None:
            waiting = max(LOOK_SECONDS, self._next_at - now)
        return Outcome(warnings=(self._warning,) if self._warning else (), retry_after=waiting)

    def close(self) -> None:
        """Leave AWS alone."""
        self._forget()

    def _forget(self) -> None:
        if self._child is not None:
            self._child.kill()
        self._child = self._provider = self._next_at = None
        self._warning = ""

    def _start(self, node: Node) -> None:
        self._next_at = None
        instance = node.provider_id.rpartition("/")[2]
        if not INSTANCE.fullmatch(instance):
            self._warn(node, "names no EC2 instance; the source/destination check stays as it is")
        elif importlib.util.find_spec(LIBRARY) is None:
            self._warn(node, f"{LIBRARY} is not installed (pip install 'kube-router[aws]'), so {FLAG} has no effect")
        else:
            try:
                self._child = Child((*self._command, instance), CHILD_SECONDS)
            except OSError as error:
                self._warn(
                    node, f"cannot run {self._command[-1]}: {error}; the source/destination check stays as it is"
                )

    def _take(self, node: Node, ended: Ended, now: float) -> None:
        state, text = _answer(ended)
        if state == "done":
            self._warning = ""
            log.info("node %s: %s: source/destination check is off (%s)", node.name, node.provider_id, text)
        elif state == "denied":
            self._warn(
                node, f"the source/destination check stays on until someone turns it off: {text}; not tried again"
            )
        else:
            self._next_at = now + self._period
            self._warn(node, f"the source/destination check could not be turned off: {text}; tried again later")

    def _warn(self, node: Node, text: str) -> None:
        self._warning = f"node {node.name}: spec.providerID {node.provider_id}: {text}"


def _answer(ended: Ended) -> tuple[str, str]:
    """State and text of the child's one line of JSON; whatever else it did is a failure."""
    if ended.late:
        return "failed", f"no answer within {CHILD_SECONDS:.0f} s"
    try:
        answer = json.loads(ended.output)
        return str(answer["state"]), str(answer["text"])
    except (ValueError, TypeError, KeyError):
        return "failed", f"the child ended with status {ended.status} and no answer"
