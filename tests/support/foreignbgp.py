"""Routers of other makes in network namespaces: FRR, BIRD and ExaBGP, and what each of them was told.

Starts processes, each with a folder of its own for sockets and configuration; everything is ended here, by process id.
All speak on the port of ``support.gobgpd`` and dial: gobgpd 3.x takes up to ten seconds for it, they take one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from support.gobgpd import PORT
from support.namespaces import Namespace

NODE_ASN = 64512


@dataclass(frozen=True)
class Held:
    """A route as a peer has it."""

    next_hop: str
    as_path: tuple[int, ...] = (NODE_ASN,)
    communities: frozenset[str] = frozenset()
    large: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Place:
    """Where a router lives, who it is, which nodes it peers with, and what it announces (prefix → next hop)."""

    namespace: Namespace
    folder: Path
    address: str
    asn: int
    nodes: Mapping[str, str]
    """Address of a node's end by the node's name."""
    announced: Mapping[str, str]


def is_v6(text: str) -> bool:
    """The family of an address or prefix."""
    return ":" in text


class _Program:
    """A process that is ended with the test."""

    def __init__(self, place: Place, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.place = place
        self.log = place.folder / "log"
        with self.log.open("w") as log:
            self._process = place.namespace.start(
                list(arguments), stdout=log, stderr=log, env={**os.environ, **(environment or {})}
            )

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _appears(path: Path, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


class Foreign(Protocol):
    """A router of another make."""

    def established(self, node: str) -> bool:
        """Whether the session with ``node`` is up."""

    def held(self, node: str) -> dict[str, Held]:
        """What it has from ``node``, by prefix."""

    def close(self) -> None:
        """End it."""


class Bird:
    """BIRD 2."""

    def __init__(self, place: Place) -> None:
        self.place = place
        place.folder.mkdir(parents=True)
        self._socket = place.folder / "bird.ctl"
        configuration = place.folder / "bird.conf"
        configuration.write_text(self._configuration())
        self._program = _Program(place, ["bird", "-f", "-c", str(configuration), "-s", str(self._socket)])
        try:
            _appears(self._socket)
        except BaseException:
            self.close()
            raise

    def _configuration(self) -> str:
        place = self.place
        static = "".join(
            f"protocol static own{version} {{ {version}; {routes} }}\n"
            for version, routes in (
                ("ipv4", "".join(f"route {item} blackhole; " for item in place.announced if not is_v6(item))),
                ("ipv6", "".join(f"route {item} blackhole; " for item in place.announced if is_v6(item))),
            )
        )
        timers = "connect delay time 1; connect retry time 1; error wait time 1, 1; startup hold time 30;"
        channels = "".join(
            f"{version} {{ import all; export where source = RTS_STATIC; }}; " for version in ("ipv4", "ipv6")
        )
        sessions = "".join(
            f"protocol bgp {name} {{ local {place.address} port {PORT} as {place.asn};"
            f" neighbor {address} port {PORT} as {NODE_ASN}; {timers} {channels}}}\n"
            for name, address in place.nodes.items()
        )
        return f"log stderr all;\nrouter id 10.0.0.13;\nprotocol device {{}}\n{static}{sessions}"

    def _ask(self, question: str) -> str:
        return subprocess.run(
            ["birdc", "-s", str(self._socket), question], capture_output=True, text=True, check=True
        ).stdout

    def established(self, node: str) -> bool:
        """Whether the session with ``node`` is up."""
        return "Established" in self._ask(f"show protocols {node}")

    def held(self, node: str) -> dict[str, Held]:
        """What it has from ``node``."""
        found: dict[str, dict[str, str]] = {}
        current: dict[str, str] = {}
        for line in self._ask(f"show route all protocol {node}").splitlines():
            if line[:1].isalnum() and "/" in line.split()[0]:
                current = found.setdefault(line.split()[0], {})
            elif line.startswith("\tBGP."):
                key, _, value = line.strip().partition(":")
                current[key.removeprefix("BGP.")] = value.strip()
        return {
            prefix: Held(
                next_hop=attributes["next_hop"].split()[0],
                as_path=tuple(map(int, attributes["as_path"].split())),
                communities=frozenset(_tuples(attributes.get("community", ""))),
                large=frozenset(_tuples(attributes.get("large_community", ""))),
            )
            for prefix, attributes in found.items()
        }

    def close(self) -> None:
        """End it."""
        self._program.close()


def _tuples(text: str) -> list[str]:
    """``(1,2) (3,4)`` as ``1:2`` and ``3:4``."""
    return [
        item.replace(" ", "").replace(",", ":") for item in text.replace(") (", ")(").strip("()").split(")(") if item
    ]


class Frr:
    """FRR's zebra and bgpd; bgpd leaves the kernel alone."""

    LIBRARY = Path("/usr/lib/frr")

    def __init__(self, place: Place) -> None:
        self.place = place
        place.folder.mkdir(parents=True)
        # They run as their own user, who cannot reach the folder of a test.
        self._own = Path(tempfile.mkdtemp(prefix="krt-frr-"))
        shutil.chown(self._own, "frr", "frr")
        for name, text in (("bgpd", self._configuration()), ("zebra", "")):
            file = self._own / f"{name}.conf"
            file.write_text(text)
            file.chmod(0o644)
        zebra = self._own / "zserv.api"
        common = ["--vty_socket", str(self._own), "-z", str(zebra), "-P", "0"]
        self._programs = [self._start("zebra", common)]
        try:
            _appears(zebra)
            self._programs.append(self._start("bgpd", [*common, "-n", "-p", str(PORT)]))
            _appears(self._own / "bgpd.vty")
        except BaseException:
            self.close()
            raise

    def _start(self, name: str, arguments: Sequence[str]) -> _Program:
        files = ["-f", str(self._own / f"{name}.conf"), "-i", str(self._own / f"{name}.pid")]
        return _Program(self.place, [str(self.LIBRARY / name), *files, *arguments])

    def _configuration(self) -> str:
        place = self.place
        lines = [f"router bgp {place.asn}", "bgp router-id 10.0.0.12", "no bgp ebgp-requires-policy"]
        lines += ["no bgp default ipv4-unicast", "no bgp network import-check", "timers bgp 10 30"]
        for address in place.nodes.values():
            lines += [f"neighbor {address} remote-as {NODE_ASN}", f"neighbor {address} port {PORT}"]
            lines += [f"neighbor {address} timers connect 1"]
        for version in ("ipv4", "ipv6"):
            lines += [f"address-family {version} unicast"]
            lines += [f"network {item}" for item in place.announced if is_v6(item) == (version == "ipv6")]
            for address in place.nodes.values():
                lines += [f"neighbor {address} activate", f"neighbor {address} soft-reconfiguration inbound"]
            lines += ["exit-address-family"]
        return "\n".join(lines) + "\n"

    def _ask(self, question: str) -> Any:
        command = ["vtysh", "--vty_socket", str(self._own), "-c", question]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout or "{}")

    def established(self, node: str) -> bool:
        """Whether the session with ``node`` is up."""
        address = self.place.nodes[node]
        return bool(self._ask(f"show bgp neighbors {address} json")[address]["bgpState"] == "Established")

    def held(self, node: str) -> dict[str, Held]:
        """What it has from ``node``."""
        address = self.place.nodes[node]
        found = {}
        for version in ("ipv4", "ipv6"):
            table = self._ask(f"show bgp {version} unicast json detail")
            for prefix, paths in table.get("routes", {}).items():
                for path in paths if isinstance(paths, list) else paths["paths"]:
                    if path.get("peer", {}).get("peerId") == address:
                        found[prefix] = _held_by_frr(path)
        return found

    def close(self) -> None:
        """End both."""
        for program in reversed(self._programs):
            program.close()
        shutil.rmtree(self._own)


def _held_by_frr(path: Any) -> Held:
    hops = [hop["ip"] for hop in path["nexthops"] if hop.get("scope") != "link-local"]
    return Held(
        next_hop=hops[0],
        as_path=tuple(map(int, path["aspath"]["string"].split())),
        communities=frozenset(_canonical(item) for item in path.get("community", {}).get("string", "").split()),
        large=frozenset(path.get("largeCommunity", {}).get("string", "").split()),
    )


FRR_NAMES = {"no-export": "65535:65281", "no-advertise": "65535:65282", "blackhole": "65535:666"}


def _canonical(community: str) -> str:
    return FRR_NAMES.get(community, community)


class ExaBgp:
    """ExaBGP, which writes down every update that it ever receives."""

    def __init__(self, place: Place) -> None:
        self.place = place
        place.folder.mkdir(parents=True)
        self._record = place.folder / "updates.json"
        self._record.touch()
        configuration = place.folder / "exabgp.conf"
        configuration.write_text(self._configuration())
        settings = {"tcp.bind": place.address, "tcp.port": str(PORT), "daemon.user": "root", "api.cli": "false"}
        environment = {f"exabgp.{key}": value for key, value in settings.items()}
        self._program = _Program(place, ["exabgp", str(configuration)], environment)

    def _configuration(self) -> str:
        place = self.place
        static = " ".join(f"route {prefix} next-hop {hop};" for prefix, hop in place.announced.items())
        parts = [f'process record {{ run /bin/sh -c "cat >>{self._record} && :"; encoder json; }}']
        for address in place.nodes.values():
            who = f"router-id 10.0.0.11; local-address {place.address}; local-as {place.asn}; peer-as {NODE_ASN};"
            families = "family { ipv4 unicast; ipv6 unicast; }"
            api = "api { processes [ record ]; neighbor-changes; receive { parsed; update; } }"
            parts.append(f"neighbor {address} {{ {who} connect {PORT}; {families} static {{ {static} }} {api} }}")
        return "\n".join(parts).replace("; ", ";\n").replace("{ ", "{\n").replace("} ", "}\n")

    def messages(self, node: str) -> list[Any]:
        """All that ever came from ``node``, in order."""
        address = self.place.nodes[node]
        lines = self._record.read_text().splitlines()
        parsed = [json.loads(line) for line in lines if line.endswith("}")]
        return [message for message in parsed if message.get("neighbor", {}).get("address", {}).get("peer") == address]

    def established(self, node: str) -> bool:
        """Whether the session with ``node`` is up."""
        states = [message["neighbor"].get("state") for message in self.messages(node) if message["type"] == "state"]
        return bool(states) and states[-1] == "up"

    def held(self, node: str) -> dict[str, Held]:
        """What it has from ``node``, by what it was told."""
        found: dict[str, Held] = {}
        for message in self.messages(node):
            if message["type"] == "state" and message["neighbor"]["state"] != "up":
                found.clear()
            elif message["type"] == "update":
                found.update(announced := _announced(message))
                for prefix in _withdrawn(message) - announced.keys():
                    found.pop(prefix, None)
        return found

    def ever(self, node: str, since: int = 0) -> set[str]:
        """Every prefix that ``node`` ever announced, from that message on."""
        return {prefix for message in self.messages(node)[since:] for prefix in _announced(message)}

    def close(self) -> None:
        """End it."""
        self._program.close()


def _update(message: Any) -> Any:
    return message["neighbor"].get("message", {}).get("update", {}) if message["type"] == "update" else {}


def _announced(message: Any) -> dict[str, Held]:
    update = _update(message)
    attributes = update.get("attribute", {})
    return {
        item["nlri"]: Held(
            next_hop=hop,
            as_path=tuple(attributes.get("as-path", ())),
            communities=frozenset(f"{high}:{low}" for high, low in attributes.get("community", ())),
            large=frozenset(":".join(map(str, parts)) for parts in attributes.get("large-community", ())),
        )
        for routes in update.get("announce", {}).values()
        for hop, items in routes.items()
        for item in items
        if "nlri" in item
    }


def _withdrawn(message: Any) -> set[str]:
    return {item["nlri"] for items in _update(message).get("withdraw", {}).values() for item in items}
