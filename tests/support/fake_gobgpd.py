"""A gobgpd without BGP: the gRPC interface of either generation on a unix socket, the daemon's rules, no sessions.

Touches one socket; a thread pool answers. It does what a real daemon does with what it is given, as far as our code
relies on it (``tests/contract/test_gobgp_contract.py`` holds both to it), and what no real one can be made to do:
calls that are refused, slow or never answered, and learned routes of any nonsense.
"""

from __future__ import annotations

import ipaddress
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from kube_router.workers.model import Family
from kube_router.workers.router.gobgp.convert import Dialect, family_message
from kube_router.workers.router.gobgp.v3 import DialectV3
from kube_router.workers.router.gobgp.v4 import DialectV4

NOT_STARTED = "bgp server hasn't started yet"


class Refused(Exception):
    """What the daemon answers instead of doing what it was asked."""


@dataclass
class Fault:
    """What happens to calls of one method: a ``delay`` in seconds, then ``text`` as an error unless that is empty.

    ``times``: so many calls, then it is over; -1 for good.
    """

    text: str = ""
    delay: float = 0.0
    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    times: int = -1


@dataclass
class _State:
    """What the daemon holds."""

    speaker: Any = None
    peers: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Any] = field(default_factory=dict)
    learned: dict[str, Any] = field(default_factory=dict)
    sets: dict[tuple[int, str], Any] = field(default_factory=dict)
    policies: dict[str, Any] = field(default_factory=dict)
    assignments: dict[int, Any] = field(default_factory=dict)


class FakeGobgpd:
    """One daemon; a context manager that listens on ``path``."""

    def __init__(self, path: Path, generation: int) -> None:
        self.dialect: Dialect = DialectV3() if generation == 3 else DialectV4()
        self.faults: dict[str, Fault] = {}
        self.calls: list[str] = []
        self._messages = self.dialect.messages
        self._state = _State()
        self._lock = threading.RLock()
        self._watchers: list[queue.SimpleQueue[Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._ended = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", -1)])
        self._server.add_generic_rpc_handlers((self._handler(),))
        self._server.add_insecure_port(f"unix:{path}")
        self._server.start()

    def __enter__(self) -> FakeGobgpd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Die: every stream breaks."""
        self._ended.set()
        for watcher in self._watchers:
            watcher.put(None)
        self._server.stop(0).wait(5)

    def learn(self, prefix: str, next_hop: str | None, neighbor: str = "10.0.0.9") -> None:
        """A best path from a peer, or its withdrawal; the texts go out as they are, sense or nonsense."""
        path = self._learned_path(prefix, next_hop or "0.0.0.0", neighbor)
        with self._lock:
            if next_hop is None:
                self._state.learned.pop(prefix, None)
                path.is_withdraw = True
            else:
                self._state.learned[prefix] = path
            self._tell_table([path])

    def _learned_path(self, prefix: str, next_hop: str, neighbor: str) -> Any:
        network = ipaddress.ip_network("fd00::/64" if ":" in prefix else "10.0.0.0/8")
        attributes = self.dialect.attributes(network, ipaddress.ip_address("fd00::1" if ":" in prefix else "10.0.0.1"))
        path = self._messages.Path(
            nlri=self.dialect.nlri(network), pattrs=attributes, family=family_message(self.dialect, _family(prefix))
        )
        path.neighbor_ip = neighbor
        address, _, length = prefix.partition("/")
        text = self._messages.IPAddressPrefix(prefix=address, prefix_len=int(length or 0))
        hop = self._messages.NextHopAttribute(next_hop=next_hop)
        if self.dialect.generation == 3:
            path.nlri.value = text.SerializeToString()
            del path.pattrs[1:]
            path.pattrs.add(type_url="type.googleapis.com/apipb.NextHopAttribute", value=hop.SerializeToString())
        else:
            path.nlri.prefix.CopyFrom(text)
            del path.pattrs[1:]
            path.pattrs.add().next_hop.CopyFrom(hop)
        return path

    def _handler(self) -> Any:
        empty = self._messages.Empty
        unary = {
            "GetBgp": (self._messages.Empty, self._get_bgp),
            "StartBgp": (self._messages.StartBgpRequest, self._start),
            "AddPeer": (self._messages.PeerRequest, self._add_peer),
            "UpdatePeer": (self._messages.PeerRequest, self._update_peer),
            "DeletePeer": (self._messages.DeletePeerRequest, self._delete_peer),
            "EnablePeer": (self._messages.EnablePeerRequest, self._known_peer),
            "ResetPeer": (self._messages.ResetPeerRequest, self._known_peer),
            "SetPolicies": (self._messages.SetPoliciesRequest, self._set_policies),
            "SetPolicyAssignment": (self._messages.SetPolicyAssignmentRequest, self._assign),
            "AddDefinedSet": (self._messages.AddDefinedSetRequest, self._add_set),
            "DeleteDefinedSet": (self._messages.DeleteDefinedSetRequest, self._delete_set),
        }
        streams = {
            "ListPeer": (self._messages.ListPeerRequest, self._list_peers),
            "ListPath": (self._messages.ListPathRequest, self._list_paths),
            "ListDefinedSet": (self._messages.ListDefinedSetRequest, self._list_sets),
            "ListPolicy": (self._messages.ListPolicyRequest, self._list_policies),
            "ListPolicyAssignment": (self._messages.ListPolicyAssignmentRequest, self._list_assignments),
        }
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(self._answer(name, work), request.FromString, _packed)
            for name, (request, work) in unary.items()
        }
        handlers |= {
            name: grpc.unary_stream_rpc_method_handler(self._replies(name, work), request.FromString, _packed)
            for name, (request, work) in streams.items()
        }
        handlers["WatchEvent"] = grpc.unary_stream_rpc_method_handler(
            self._watch, self._messages.WatchEventRequest.FromString, _packed
        )
        handlers["AddPathStream"] = grpc.stream_unary_rpc_method_handler(
            self._answer("AddPathStream", self._add_paths), self._messages.AddPathStreamRequest.FromString, _packed
        )
        self._empty = empty()
        return grpc.method_handlers_generic_handler(self.dialect.service, handlers)

    def _answer(self, name: str, work: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        def answered(request: Any, context: Any) -> Any:
            self._suffer(name, context)
            try:
                with self._lock:
                    return work(request) or self._empty
            except Refused as error:
                context.abort(grpc.StatusCode.UNKNOWN, str(error))

        return answered

    def _replies(self, name: str, work: Callable[[Any], Iterator[Any]]) -> Callable[[Any, Any], Iterator[Any]]:
        def answered(request: Any, context: Any) -> Iterator[Any]:
            self._suffer(name, context)
            with self._lock:
                found = list(work(request))
            yield from found

        return answered

    def _suffer(self, name: str, context: Any) -> None:
        self.calls.append(name)
        fault = self.faults.get(name)
        if fault is None or fault.times == 0:
            return
        fault.times -= 1
        self._ended.wait(fault.delay)
        if fault.text:
            context.abort(fault.code, fault.text)

    def _get_bgp(self, _: Any) -> Any:
        return self._messages.GetBgpResponse(**{"global": self._state.speaker} if self._state.speaker else {})

    def _start(self, request: Any) -> None:
        if self._state.speaker is not None:
            raise Refused("listen tcp: bind: address already in use")
        wanted = getattr(request, "global")
        for address in wanted.listen_addresses:
            _parsed(address)
        accept = self._messages.ROUTE_ACCEPT
        self._state = _State(speaker=wanted)
        for direction in (self._messages.POLICY_IMPORT, self._messages.POLICY_EXPORT):
            self._state.assignments[direction] = self._messages.PolicyAssignment(
                name="global", direction=direction, default_action=accept
            )

    def _started(self) -> None:
        if self._state.speaker is None:
            raise Refused(NOT_STARTED)

    def _add_peer(self, request: Any) -> None:
        self._started()
        address = request.peer.conf.neighbor_address
        _parsed(address)
        if address in self._state.peers:
            raise Refused(f"can't overwrite the existing peer: {address}")
        self._state.peers[address] = peer = self._messages.Peer()
        peer.CopyFrom(request.peer)
        self._settle(peer)
        self._tell_peer(peer, self._messages.PEER_STATE)

    def _settle(self, peer: Any) -> None:
        """Fill in what the daemon fills in."""
        peer.state.neighbor_address = peer.conf.neighbor_address
        peer.state.session_state = peer.state.session_state or 3
        peer.state.admin_state = self._messages.ADMIN_UP
        peer.timers.config.hold_time = peer.timers.config.hold_time or 90

    def _update_peer(self, request: Any) -> None:
        address = request.peer.conf.neighbor_address
        if address not in self._state.peers:
            raise Refused(f"Neighbor that has {address} doesn't exist.")
        self._state.peers[address].CopyFrom(request.peer)
        self._settle(self._state.peers[address])

    def _delete_peer(self, request: Any) -> None:
        if self._state.peers.pop(request.address, None) is None:
            raise Refused(f"Can't delete a peer configuration for {request.address}")

    def _known_peer(self, request: Any) -> None:
        if request.address not in self._state.peers:
            raise Refused(f"Neighbor that has {request.address} doesn't exist.")

    def _list_peers(self, request: Any) -> Iterator[Any]:
        for address, peer in self._state.peers.items():
            if request.address in ("", address):
                yield self._messages.ListPeerResponse(peer=peer)

    def _add_paths(self, requests: Iterator[Any]) -> None:
        self._started()
        for request in requests:
            for path in request.paths:
                if not path.is_withdraw and not self.dialect.next_hop_of(path):
                    raise Refused("nexthop not found")
                prefix = str(ipaddress.ip_network(self.dialect.prefix_of(path) or "", strict=False))
                known = self._state.paths.get(prefix)
                path.neighbor_ip = "<nil>" if self.dialect.generation == 3 else ""
                if path.is_withdraw:
                    self._state.paths.pop(prefix, None)
                else:
                    self._state.paths[prefix] = path
                same = known is not None and self.dialect.next_hop_of(known) == self.dialect.next_hop_of(path)
                self._tell_table([] if same and not path.is_withdraw else [path])

    def _list_paths(self, request: Any) -> Iterator[Any]:
        for prefix, path in {**self._state.learned, **self._state.paths}.items():
            if path.family.afi == request.family.afi:
                yield self._messages.ListPathResponse(
                    destination=self._messages.Destination(prefix=prefix, paths=[path])
                )

    def _set_policies(self, request: Any) -> None:
        sets = {(item.defined_type, item.name): self._normal(item) for item in request.defined_sets}
        self._state.sets = sets
        self._state.policies = {policy.name: policy for policy in request.policies}
        for assignment in self._state.assignments.values():
            if any(policy.name not in self._state.policies for policy in assignment.policies):
                # The daemon's own way: with the name gone, everything is let through.
                del assignment.policies[:]
                assignment.default_action = self._messages.ROUTE_ACCEPT

    def _normal(self, item: Any) -> Any:
        """A set as it reads back: prefixes masked, neighbours as prefixes."""
        found = self._messages.DefinedSet(defined_type=item.defined_type, name=item.name)
        for prefix in item.prefixes:
            entry = found.prefixes.add()
            entry.CopyFrom(prefix)
            entry.ip_prefix = str(_parsed(prefix.ip_prefix))
        found.list.extend(str(_parsed(text)) for text in item.list)
        return found

    def _add_set(self, request: Any) -> None:
        given = self._normal(request.defined_set)
        known = self._state.sets.setdefault((given.defined_type, given.name), given)
        if known is not given:
            known.prefixes.extend(each for each in given.prefixes if each not in known.prefixes)
            known.list.extend(given.list)

    def _delete_set(self, request: Any) -> None:
        given = self._normal(request.defined_set)
        known = self._state.sets.get((given.defined_type, given.name))
        if known is None:
            raise Refused(f"not found defined-set: {given.name}")
        kept = [each for each in known.prefixes if each not in given.prefixes]
        del known.prefixes[:]
        known.prefixes.extend(kept)

    def _list_sets(self, request: Any) -> Iterator[Any]:
        for (kind, _), item in sorted(self._state.sets.items()):
            if kind == request.defined_type:
                yield self._messages.ListDefinedSetResponse(defined_set=item)

    def _list_policies(self, _: Any) -> Iterator[Any]:
        for policy in self._state.policies.values():
            yield self._messages.ListPolicyResponse(policy=policy)

    def _assign(self, request: Any) -> None:
        self._started()
        wanted = request.assignment
        for policy in wanted.policies:
            if policy.name not in self._state.policies:
                raise Refused(f"not found policy {policy.name}")
        self._state.assignments[wanted.direction] = wanted

    def _list_assignments(self, request: Any) -> Iterator[Any]:
        if request.direction in self._state.assignments:
            yield self._messages.ListPolicyAssignmentResponse(assignment=self._state.assignments[request.direction])

    def _watch(self, request: Any, context: Any) -> Iterator[Any]:
        self._suffer("WatchEvent", context)
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with self._lock:
            for peer in self._state.peers.values():
                events.put(self._peer_event(peer, self._messages.PEER_INIT))
            events.put(self._peer_event(self._messages.Peer(), self._messages.PEER_END_OF_INIT))
            table = [*self._state.learned.values(), *self._state.paths.values()]
            events.put(self._messages.WatchEventResponse(table=self._messages.TableEvent(paths=table)))
            self._watchers.append(events)
        context.add_callback(lambda: events.put(None))
        while (event := events.get()) is not None:
            yield event
        if self._ended.is_set():
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    def _peer_event(self, peer: Any, kind: int) -> Any:
        return self._messages.WatchEventResponse(peer=self._messages.PeerEvent(type=kind, peer=peer))

    def _tell_peer(self, peer: Any, kind: int) -> None:
        for watcher in self._watchers:
            watcher.put(self._peer_event(peer, kind))

    def _tell_table(self, paths: list[Any]) -> None:
        for watcher in self._watchers:
            watcher.put(self._messages.WatchEventResponse(table=self._messages.TableEvent(paths=paths)))


def _packed(message: Any) -> bytes:
    return message.SerializeToString()  # type: ignore[no-any-return]


def _parsed(text: str) -> Any:
    try:
        return ipaddress.ip_network(text, strict=False) if "/" in text else ipaddress.ip_address(text)
    except ValueError:
        raise Refused(f"invalid address or prefix: {text}") from None


def _family(prefix: str) -> Family:
    return Family.IPV6 if ":" in prefix else Family.IPV4
