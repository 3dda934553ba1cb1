"""The client of one gobgpd: observe its state, apply a plan to it, open a watch, end it.

Touches gobgpd's private unix socket (gRPC). Both generations of the interface are spoken; which one is found out on
connect. Threads: a client may be used by one thread, beside the watch thread that it feeds.
"""

from __future__ import annotations

import os

# grpcio reads these when it is imported. No fork support: it would install fork handlers and keep its threads awake.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from kube_router.workers.model import Failure, Family
from kube_router.workers.router import names
from kube_router.workers.router.bgpstate import CLOSED, FRESH, BgpState, Neighbor, Speaker
from kube_router.workers.router.gobgp import convert, neighbors, process
from kube_router.workers.router.gobgp.convert import Dialect
from kube_router.workers.router.gobgp.v3 import DialectV3
from kube_router.workers.router.gobgp.v4 import DialectV4
from kube_router.workers.router.plan import (
    AddNeighbor,
    AddPath,
    Assign,
    ChangeSet,
    JudgeAgain,
    Plan,
    RemoveNeighbor,
    RemovePath,
    ReplaceDaemon,
    ReplaceNeighbor,
    Retract,
    SendAgain,
    SetPolicies,
    StartSpeaker,
    Step,
    UpdateNeighbor,
    headline,
    phase,
)
from kube_router.workers.router.sessionbook import PeerReport

CALL_SECONDS = 5.0
"""How long one call may take before the daemon counts as stuck."""
PROBE_SECONDS = 2.0
CONNECT_SECONDS = 0.5
"""The same for a call that costs the daemon nothing, and for the first call of all."""
PATHS_TOGETHER = 1000
"""Paths in one call: gobgpd does nothing else meanwhile."""
CHANNEL_OPTIONS = (
    # The thread that iterates over a stream reads it itself: a third of the time for 10,000 single route events.
    ("SingleThreadedUnaryStream", 1),
    # A table of 100,000 routes comes in one message; the default limit is 4 MiB.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class GobgpError(Exception):
    """A call failed; the text is gobgpd's.

    ``gone``: the daemon is not there (or no longer). ``stuck``: it did not answer in time. ``unknown_service``: it
    does not offer this interface.
    """

    def __init__(self, text: str, *, gone: bool = False, stuck: bool = False, unknown_service: bool = False) -> None:
        super().__init__(text)
        self.gone, self.stuck, self.unknown_service = gone, stuck, unknown_service


def connect(path: Path) -> Client:
    """A client of the daemon that listens on ``path``; raises `GobgpError`, ``gone`` when nothing answers there."""
    if not path.exists():
        raise GobgpError(f"{path} does not exist", gone=True)
    channel = grpc.insecure_channel(f"unix:{path.absolute()}", options=CHANNEL_OPTIONS)
    dialects: tuple[Dialect, ...] = (DialectV3(), DialectV4())
    try:
        for dialect in dialects:
            client = Client(channel, dialect, path)
            try:
                client.ask(CONNECT_SECONDS)
            except GobgpError as error:
                if error.unknown_service:
                    continue
                raise
            return client
        raise GobgpError(f"{path} answers, but offers neither {dialects[0].service} nor {dialects[1].service}")
    except BaseException:
        channel.close()
        raise


class Client:
    """One gobgpd of a known generation."""

    def __init__(self, channel: grpc.Channel, dialect: Dialect, path: Path) -> None:
        self._channel, self.dialect, self._path = channel, dialect, path
        self._messages = dialect.messages

    @property
    def generation(self) -> int:
        """3 or 4."""
        return self.dialect.generation

    def close(self) -> None:
        """Close the channel; the daemon goes on as it is."""
        self._channel.close()

    def daemon_age(self) -> float:
        """Seconds since the daemon's process started; infinity when that cannot be told."""
        return process.age_seconds(self._path)

    def ask(self, seconds: float = PROBE_SECONDS) -> None:
        """Raise `GobgpError` if the daemon does not answer."""
        self._call("GetBgp", self._messages.Empty(), self._messages.GetBgpResponse, seconds)

    def speaker(self) -> Speaker | None:
        """What was given to StartBgp, None before."""
        reply = self._call("GetBgp", self._messages.Empty(), self._messages.GetBgpResponse)
        return convert.speaker_of(getattr(reply, "global"))

    def observe(self, paths: Mapping[str, str] | None = None) -> BgpState:
        """Everything that a plan compares; raises `GobgpError`.

        ``paths``: the paths that originate here, if they are known. Otherwise they are looked for in the whole table,
        which takes 100 µs a learned route.
        """
        speaker = self.speaker()
        if speaker is None:
            return FRESH
        return BgpState(
            speaker=speaker,
            policies=convert.policies_of(
                self.dialect,
                self._sets(self._messages.DEFINED_PREFIX),
                self._sets(self._messages.DEFINED_NEIGHBOR),
                [reply.policy for reply in self._list("ListPolicy", self._messages.ListPolicyRequest())],
            ),
            export=self._assignment("export"),
            import_=self._assignment("import"),
            paths=dict(self._local_paths() if paths is None else paths),
            neighbors={neighbor.address: neighbor for neighbor in map(neighbors.neighbor_of, self._peers())},
        )

    def peers(self, address: str = "", *, count_advertised: bool = False) -> tuple[PeerReport, ...]:
        """How the peers stand, or only the one of ``address``.

        20 µs a peer. ``count_advertised`` makes gobgpd put every path that it has through the export policy, 1.5 µs
        each for every session, while it does nothing else: for one peer at a time, and not often.
        """
        found = self._peers(address, count_advertised)
        return tuple(neighbors.report_of(self.dialect, peer, counted=count_advertised) for peer in found)

    def enable(self, address: str) -> None:
        """Let a session try again that gobgpd has ended because of its prefix limit; raises `GobgpError`."""
        self._call("EnablePeer", self._messages.EnablePeerRequest(address=address))

    def apply(self, plan: Plan) -> tuple[int, tuple[Failure, ...]]:
        """Do the steps in order; returns how many were done and what went wrong.

        A failed step does not stop unrelated ones, but nothing is originated and no peer is added under policies that
        could not be set. Raises `GobgpError` when the daemon dies or does not answer: there is no use in the rest.
        """
        done, failures = 0, list[Failure]()
        closed = False
        for group in _grouped(plan.steps):
            if closed and isinstance(group[0], (Assign, AddPath, Retract, AddNeighbor, ReplaceNeighbor, SendAgain)):
                continue
            refused = self._apply_group(group)
            done += len(group) - len(refused)
            failures += [Failure(phase(step), f"cannot {headline(step)}: {error}") for step, error in refused]
            if refused and isinstance(group[0], StartSpeaker | ReplaceDaemon):
                break
            closed = closed or bool(refused and isinstance(group[0], SetPolicies | ChangeSet | Assign))
        return done, tuple(failures)

    def _apply_group(self, group: Sequence[Step]) -> list[tuple[Step, GobgpError]]:
        """Do steps that may go together; what was refused, and why."""
        if len(group) > 1:
            try:
                self._stream_paths(group)
            except GobgpError as error:
                if error.gone or error.stuck:
                    raise
                # One of them spoils the rest of the stream: one by one, it spoils itself only.
            else:
                return []
        refused = []
        for step in group:
            try:
                self.apply_step(step)
            except GobgpError as error:
                if error.gone or error.stuck:
                    raise
                refused.append((step, error))
        return refused

    def apply_step(self, step: Step) -> None:
        """Do one step; raises `GobgpError`."""
        match step:
            case StartSpeaker(speaker):
                if taken := process.taken(speaker.listen_addresses, speaker.listen_port):
                    # Not left to gobgpd: it would keep the addresses before this one occupied, and stumble over itself.
                    raise GobgpError(f"listen {taken} port {speaker.listen_port}: address already in use")
                self._call("StartBgp", self._messages.StartBgpRequest(**{"global": self._speaker(speaker)}))
                self.apply_step(Assign("export", CLOSED))
            case ReplaceDaemon(silently=silently):
                try:
                    process.terminate(self._path, silently=silently)
                except OSError as error:
                    raise GobgpError(f"cannot end gobgpd: {error}") from error
            case SetPolicies(policies):
                self._call("SetPolicies", convert.policies_message(self.dialect, policies))
            case ChangeSet(name, add, remove):
                if add:
                    self._call("AddDefinedSet", convert.set_change(self.dialect, name, add, add=True))
                if remove:
                    self._call("DeleteDefinedSet", convert.set_change(self.dialect, name, remove, add=False))
            case Assign(direction, assignment):
                message = convert.assignment_message(self.dialect, direction, assignment)
                self._call("SetPolicyAssignment", self._messages.SetPolicyAssignmentRequest(assignment=message))
            case AddPath() | RemovePath():
                self._stream_paths((step,))
            case Retract():
                self._retract(step)
            case RemoveNeighbor(neighbor):
                self._delete_peer(neighbor)
            case ReplaceNeighbor(actual, desired):
                self._delete_peer(actual)
                self._add_peer(desired)
            case UpdateNeighbor(_, desired):
                self._update_peer(desired)
            case AddNeighbor(neighbor, restarting):
                self._add_peer(neighbor, restarting)
            case SendAgain(address):
                self._soft_reset(address, self._messages.RESET_OUT)
            case JudgeAgain(address):
                self._soft_reset(address, self._messages.RESET_IN)

    def watch(self) -> Any:
        """An open stream of WatchEvent: the best-path table first, then its changes, and the peers' states.

        Iterate over it in a thread of its own and quickly (gobgpd buffers for a slow reader without bound); ``cancel``
        ends it. Iteration raises ``grpc.RpcError`` when the daemon dies.
        """
        messages = self._messages
        request = messages.WatchEventRequest(
            peer=messages.WatchPeer(),
            table=messages.WatchTable(filters=[messages.WatchFilter(type=messages.FILTER_BEST, init=True)]),
        )
        return self._stream("WatchEvent", messages.WatchEventResponse)(request)

    def _speaker(self, speaker: Speaker) -> Any:
        return convert.speaker_message(self.dialect, speaker)

    def _sets(self, kind: int) -> Iterator[Any]:
        request = self._messages.ListDefinedSetRequest(defined_type=kind)
        return (reply.defined_set for reply in self._list("ListDefinedSet", request))

    def _assignment(self, direction: str) -> Any:
        messages = self._messages
        request = messages.ListPolicyAssignmentRequest(
            name=names.GLOBAL_ASSIGNMENT,
            direction=messages.POLICY_EXPORT if direction == "export" else messages.POLICY_IMPORT,
        )
        replies = list(self._list("ListPolicyAssignment", request))
        message = replies[0].assignment if replies else messages.PolicyAssignment()
        return convert.assignment_of(self.dialect, message)

    def _local_paths(self) -> Iterator[tuple[str, str]]:
        for family in Family:
            request = self._messages.ListPathRequest(
                table_type=self._messages.TABLE_GLOBAL, family=convert.family_message(self.dialect, family)
            )
            for reply in self._list("ListPath", request):
                for path in reply.destination.paths:
                    local = convert.local_path(self.dialect, path)
                    if local is not None:
                        yield local

    def _peers(self, address: str = "", count_advertised: bool = False) -> Iterator[Any]:
        request = self._messages.ListPeerRequest(address=address, enable_advertised=count_advertised)
        return (reply.peer for reply in self._list("ListPeer", request))

    def _stream_paths(self, steps: Iterable[Step]) -> None:
        """Originate and withdraw many paths in one call: 30 µs each instead of 450."""
        messages = self._messages
        request = messages.AddPathStreamRequest(
            table_type=messages.TABLE_GLOBAL,
            paths=[
                convert.path_message(self.dialect, step.prefix, step.next_hop, withdraw=isinstance(step, RemovePath))
                for step in steps
                if isinstance(step, AddPath | RemovePath)
            ],
        )
        call = self._channel.stream_unary(
            self._method("AddPathStream"),
            request_serializer=_serialize,
            response_deserializer=messages.Empty.FromString,
        )
        with _raising():
            call(iter((request,)), timeout=CALL_SECONDS, wait_for_ready=False)

    def _add_peer(self, neighbor: Neighbor, restarting: bool = False) -> None:
        message = neighbors.neighbor_message(self.dialect, neighbor, restarting=restarting)
        self._call("AddPeer", self._messages.PeerRequest(peer=message))

    def _update_peer(self, neighbor: Neighbor) -> None:
        """Change a peer without ending its session.

        UpdatePeer ends it when anything differs from what gobgpd holds, its own defaults included (which 3.x does not
        fill in here). So the peer goes back as it was read, fields unknown to us included, with the change in it.
        """
        for peer in tuple(self._peers(neighbor.address)):
            neighbors.set_live(self.dialect, peer, neighbor)
            self._call("UpdatePeer", self._messages.PeerRequest(peer=peer))

    def _delete_peer(self, neighbor: Neighbor) -> None:
        """Forget a peer.

        DeletePeer leaves a peer's TCP-MD5 key on the listening socket, and later sessions without password would time
        out; an update to an empty password takes it away first.
        """
        if neighbor.password:
            message = neighbors.neighbor_message(self.dialect, neighbor)
            message.conf.auth_password = ""
            self._call("UpdatePeer", self._messages.PeerRequest(peer=message))
        self._call("DeletePeer", self._messages.DeletePeerRequest(address=neighbor.address))

    def _retract(self, step: Retract) -> None:
        if self.generation >= 4:
            for address in step.addresses:
                self._soft_reset(address, self._messages.RESET_OUT)
            return
        if len(step.addresses) > len(step.learned) and step.paths:
            self._stream_paths([RemovePath(*path) for path in step.paths])
            self._stream_paths([AddPath(*path) for path in step.paths])
        for neighbor in step.learned:
            # A hard reset would do, but leaves the peer idle for 30 s.
            self._delete_peer(neighbor)
            self._add_peer(neighbor)

    def _soft_reset(self, address: str, direction: int) -> None:
        request = self._messages.ResetPeerRequest(address=address, soft=True, direction=direction)
        self._call("ResetPeer", request)

    def _method(self, name: str) -> str:
        return f"/{self.dialect.service}/{name}"

    def _call(self, name: str, request: Any, reply: Any = None, seconds: float | None = None) -> Any:
        call = self._channel.unary_unary(
            self._method(name),
            request_serializer=_serialize,
            response_deserializer=(reply or self._messages.Empty).FromString,
        )
        with _raising():
            return call(request, timeout=seconds or CALL_SECONDS)

    def _stream(self, name: str, reply: Any) -> Any:
        return self._channel.unary_stream(
            self._method(name), request_serializer=_serialize, response_deserializer=reply.FromString
        )

    def _list(self, name: str, request: Any) -> Iterator[Any]:
        """The replies as they come: a thousand of them at once would be megabytes."""
        stream = self._stream(name, getattr(self._messages, f"{name}Response"))
        with _raising():
            yield from stream(request, timeout=CALL_SECONDS)


@contextlib.contextmanager
def _raising() -> Iterator[None]:
    """Turn grpc's errors into `GobgpError`."""
    try:
        yield
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.Call) else None
        details = error.details() if isinstance(error, grpc.Call) else str(error)
        gone = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        stuck = code == grpc.StatusCode.DEADLINE_EXCEEDED
        if stuck:
            details = "it is there, but does not answer: stopped or overloaded; learned routes stay"
        unknown = code == grpc.StatusCode.UNIMPLEMENTED
        raise GobgpError(details or str(code), gone=gone, stuck=stuck, unknown_service=unknown) from error


def _grouped(steps: Iterable[Step]) -> Iterator[Sequence[Step]]:
    """The steps in their order; those that announce or withdraw paths together, as far as they follow each other."""
    group: list[Step] = []
    for step in steps:
        together = isinstance(step, AddPath | RemovePath)
        if group and (not together or type(step) is not type(group[0]) or len(group) == PATHS_TOGETHER):
            yield group
            group = []
        if together:
            group.append(step)
        else:
            yield (step,)
    if group:
        yield group


def _serialize(message: Any) -> bytes:
    return message.SerializeToString()  # type: ignore[no-any-return]
