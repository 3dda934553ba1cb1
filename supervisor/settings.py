"""From a parsed command line to the settings of an agent: every value checked, every fault one line.

Pure: what the machine knows (environment, host name, the passwords file's content) comes in as `Surroundings`. All
faults are found in one go, each naming flag, value and rule; a flag at fault keeps its default, so that a clean-up can
go on in spite of it. No fault ever shows a password.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import msgspec

from kube_router.supervisor import rules
from kube_router.supervisor.flags import FLAGS
from kube_router.supervisor.govalues import quote
from kube_router.supervisor.pflag import HIDDEN, Parsed, Value
from kube_router.supervisor.programs import unbuilt_programs
from kube_router.workers.model import Family, parse_network
from kube_router.workers.settings import Secrets, Settings

NOT_SETTINGS = frozenset(("help", "version", "cleanup-config", "peer-router-passwords"))
"""Flags that are not fields of `Settings`: what they ask is done at once, or secret."""
CLIENT_FLAGS = frozenset(("kubeconfig", "master", "manifests"))
"""Flags that say where the cluster's state comes from; upstream reports a fault of theirs by other words."""
PATH_FLAGS = frozenset(("kubeconfig", "manifests", "peer-router-passwords-file", "run-dir", "state-dir", "flags-file"))
"""Flags whose relative paths count from the agent's working directory (workers have another one)."""
RANGE_FLAGS = ("service-cluster-ip-range", "service-external-ip-range", "loadbalancer-ip-range")
GRACEFUL_FLAGS = frozenset(("bgp-graceful-restart-time", "bgp-graceful-restart-deferral-time"))
CNI_CONF_VARIABLE = "KUBE_ROUTER_CNI_CONF_FILE"
NODE_NAME_VARIABLE = "NODE_NAME"
POD_NAME_VARIABLE, POD_NAMESPACE_VARIABLE = "POD_NAME", "POD_NAMESPACE"
LONGEST_PASSWORD = 80
"""Bytes of a TCP-MD5 key (tcp(7), TCP_MD5SIG_MAXKEYLEN)."""
_BASE64 = re.compile(r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
_URL_CREDENTIALS = re.compile(r"^([A-Za-z0-9+.-]*://)?.*@", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: ``key`` is the flag (with its dashes) or the environment variable, ``rule`` what it must be.

    ``where``: in front of it all, ``FILE:LINE: `` for a flag of the flags file.
    """

    key: str
    value: str
    rule: str
    where: str = ""

    @property
    def of_client(self) -> bool:
        """Whether it is about the source of the cluster's state."""
        return self.key.removeprefix("--") in CLIENT_FLAGS

    def __str__(self) -> str:
        shown = self.value if self.value == HIDDEN else quote(self.value)
        return f"{self.where}{self.key}={shown}: {self.rule}"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the machine contributes; ``passwords_file`` is the file's content, None if there is none to read;
    ``namespace_file`` that of the service account's, empty without one.
    """

    environment: Mapping[str, str]
    host_name: str
    working_directory: str
    passwords_file: str | None = None
    namespace_file: str = ""


@dataclass(frozen=True, slots=True)
class Resolution:
    """The settings, what is wrong with them, and remarks worth a log line."""

    settings: Settings
    secrets: Secrets
    problems: tuple[Problem, ...]
    remarks: tuple[str, ...]


def resolve(parsed: Parsed, surroundings: Surroundings) -> Resolution:
    """Check every value and build the settings. They are to be used only if there are no problems, or to clean up."""
    resolver = _Resolver(parsed, surroundings)
    resolver.check_each_flag()
    resolver.check_families()
    resolver.check_source()
    resolver.check_bgp()
    resolver.check_addresses_in_use()
    resolver.find_names()
    resolver.check_loadbalancer()
    secrets = Secrets(peer_router_passwords=resolver.passwords())
    settings = msgspec.convert(resolver.fields, Settings)
    unbuilt = tuple(program.name for program in unbuilt_programs(settings))
    settings = msgspec.structs.replace(settings, unbuilt_workers=unbuilt)
    return Resolution(settings, secrets, tuple(resolver.problems), tuple(resolver.remarks))


def field_name(flag_name: str) -> str:
    """The field of `Settings` for a flag."""
    return flag_name.replace("-", "_")


def shown_value(parsed: Parsed, flag_name: str) -> str:
    """A flag's value as the operator gave it, or its default, as text for messages."""
    if parsed.given(flag_name):
        text = parsed.texts[flag_name]
        return _URL_CREDENTIALS.sub(rf"\1{HIDDEN}@", text) if flag_name == "master" else text
    return next(flag.default for flag in FLAGS if flag.name == flag_name)


@dataclass(slots=True)
class _Resolver:
    parsed: Parsed
    surroundings: Surroundings
    fields: dict[str, object] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def problem(self, flag_name: str, rule: str) -> None:
        self.problems.append(Problem(f"--{flag_name}", shown_value(self.parsed, flag_name), rule))

    def value(self, flag_name: str) -> Value:
        return self.parsed.values[flag_name]

    def items(self, flag_name: str) -> Sequence[str | int]:
        value = self.value(flag_name)
        assert isinstance(value, tuple)
        return value

    def check_each_flag(self) -> None:
        """Take every flag's value by its own rule into `fields`."""
        for flag in FLAGS:
            if flag.name in NOT_SETTINGS:
                continue
            given = self.absolute(flag.name)
            rule = rules.RULES.get(flag.name, rules.any_value)
            try:
                self.fields[field_name(flag.name)] = rule(given)
            except ValueError as error:
                default = rule(flag.default_value())
                self.fields[field_name(flag.name)] = default
                # as upstream, the times of a graceful restart that is off are not looked at
                if flag.name not in GRACEFUL_FLAGS or self.value("bgp-graceful-restart"):
                    self.problem(flag.name, str(error))

    def absolute(self, flag_name: str) -> Value:
        """The value, a relative path of `PATH_FLAGS` joined to the working directory."""
        value = self.value(flag_name)
        if flag_name in PATH_FLAGS and isinstance(value, str) and value:
            return str(PurePosixPath(self.surroundings.working_directory, value))
        return value

    def families(self) -> frozenset[Family]:
        flags = {Family.IPV4: "enable-ipv4", Family.IPV6: "enable-ipv6"}
        return frozenset(family for family, flag_name in flags.items() if self.value(flag_name))

    def check_families(self) -> None:
        """At least one family; every range of an enabled family. The untouched default gives way."""
        families = self.families()
        if not families:
            self.problem("enable-ipv4", "must be true unless --enable-ipv6 is")
            return
        if Family.IPV4 not in families and not self.parsed.given("service-cluster-ip-range"):
            self.fields["service_cluster_ip_range"] = ()
            self.remarks.append(
                "--service-cluster-ip-range is not given and its default is IPv4, which is off: "
                "no range of cluster IPs is known"
            )
        for flag_name in RANGE_FLAGS:
            networks = self.fields[field_name(flag_name)]
            assert isinstance(networks, tuple)
            for text in networks:
                family = Family(parse_network(text).version)
                if family not in families:
                    self.problem(flag_name, f"{text} is {family}, and --enable-ipv{family.value} is false")

    def check_source(self) -> None:
        """Manifests or an API server, not both."""
        if self.value("manifests"):
            for flag_name in ("kubeconfig", "master"):
                if self.value(flag_name):
                    rule = f"must not be given together with --{flag_name}: the cluster's state has one source"
                    self.problem("manifests", rule)
        elif self.parsed.given("manifests"):
            self.problem("manifests", "must name a directory")
        if self.fields["run_dir"] == self.fields["state_dir"]:
            self.problem("state-dir", "must not be the --run-dir too")

    def check_bgp(self) -> None:
        """The cluster's ASN, where it counts, and one item a peer in every list about peers."""
        asn = self.value("cluster-asn")
        assert isinstance(asn, int)
        if self.value("nodes-full-mesh") and asn != 0 and not rules.in_ranges(asn, rules.PRIVATE_ASNS):
            text = rules.range_text(rules.PRIVATE_ASNS)
            self.problem("cluster-asn", f"must be a private AS number from {text}, or 0 for 64512")
            self.fields["cluster_asn"] = 0
        peers = self.items("peer-router-ips")
        if len(set(peers)) != len(peers):
            self.problem("peer-router-ips", "must name every peer once")
        if len(self.items("peer-router-asns")) != len(peers):
            rule = f"must hold one item for each of the {len(peers)} --peer-router-ips"
            self.problem("peer-router-asns", f"{rule}, not {len(self.items('peer-router-asns'))}")
        if len(self.items("peer-router-ports")) not in (0, len(peers)):
            rule = f"must hold none or one item for each of the {len(peers)} --peer-router-ips"
            self.problem("peer-router-ports", f"{rule}, not {len(self.items('peer-router-ports'))}")

    def check_addresses_in_use(self) -> None:
        """The health and the metrics server do not take each other's port."""
        port = self.value("metrics-port")
        if port and port == self.value("health-port"):
            addresses = {self.fields["health_addr"], self.fields["metrics_addr"]}
            if len(addresses) == 1 or addresses & {"", "0.0.0.0", "::"}:
                self.problem("metrics-port", "must differ from --health-port, or be on another address")

    def find_names(self) -> None:
        """The node's name and the CNI file."""
        environment = self.surroundings.environment
        name = self.fields["hostname_override"]
        if not name:
            variable = environment.get(NODE_NAME_VARIABLE, "")
            key, name = (
                (NODE_NAME_VARIABLE, variable) if variable else ("hostname", self.surroundings.host_name.lower())
            )
            try:
                rules.node_name(name)
            except ValueError as error:
                self.problems.append(Problem(key, name, f"{error}; --hostname-override overrides it"))
        if not name:
            self.problem("hostname-override", f"must be given: neither {NODE_NAME_VARIABLE} nor the host name is set")
        self.fields["node_name"] = name
        cni_conf_file = environment.get(CNI_CONF_VARIABLE, "")
        if cni_conf_file and not PurePosixPath(cni_conf_file).is_absolute():
            self.problems.append(Problem(CNI_CONF_VARIABLE, cni_conf_file, "must be an absolute path"))
        elif cni_conf_file:
            self.fields["cni_conf_file"] = cni_conf_file

    def check_loadbalancer(self) -> None:
        """The allocator writes to the API, and contends for a Lease under its pod's name."""
        environment = self.surroundings.environment
        self.fields["pod_name"] = environment.get(POD_NAME_VARIABLE, "")
        namespace = environment.get(POD_NAMESPACE_VARIABLE, "") or self.surroundings.namespace_file.strip()
        self.fields["pod_namespace"] = namespace
        if not self.fields["run_loadbalancer"]:
            return
        if self.value("manifests"):
            self.fields["run_loadbalancer"] = False
            self.remarks.append("--run-loadbalancer has no effect with --manifests: there is no API server to write to")
            return
        for key, value in ((POD_NAME_VARIABLE, self.fields["pod_name"]), (POD_NAMESPACE_VARIABLE, namespace)):
            if not value or not rules.is_dns_subdomain(str(value)):
                rule = "must be set to the agent's own pod by the downward API, for --run-loadbalancer"
                self.problems.append(Problem(key, str(value), rule))

    def passwords(self) -> tuple[str, ...]:
        """The peers' passwords, decoded: from the flag, else from the file."""
        flag_name = "peer-router-passwords"
        items = [str(item) for item in self.items(flag_name)]
        if not items and self.value("peer-router-passwords-file"):
            flag_name = "peer-router-passwords-file"
            if self.surroundings.passwords_file is None:
                self.problem(flag_name, "must be a readable text file")
                return ()
            items = self.surroundings.passwords_file.split(",")
        peers = len(self.items("peer-router-ips"))
        if (items or flag_name.endswith("-file")) and len(items) != peers:
            self.problem(
                flag_name, f"must hold none or one item for each of the {peers} --peer-router-ips, not {len(items)}"
            )
            return ()
        try:
            return tuple(decode_passwords(items))
        except ValueError as error:
            self.problem(flag_name, str(error))
            return ()


def decode_passwords(items: Sequence[str]) -> Iterator[str]:
    """Each item from standard base64, blanks around it forgiven; an empty item is no password.

    Raises ValueError with the item's number and the rule, never with what it holds.
    """
    for number, item in enumerate(items, 1):
        encoded = item.strip().replace("\n", "").replace("\r", "")
        try:
            if not _BASE64.fullmatch(encoded):  # b64decode lets surplus padding through
                raise ValueError
            key = base64.b64decode(encoded)
            password = key.decode()
        except ValueError:
            raise ValueError(f"item {number} must be text in standard base64") from None
        if len(key) > LONGEST_PASSWORD:
            raise ValueError(f"item {number} must be at most {LONGEST_PASSWORD} bytes before base64")
        if "\0" in password:
            raise ValueError(f"item {number} must hold no zero byte")
        yield password
