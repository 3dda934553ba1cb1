"""A real kube-apiserver with its etcd on loopback: for tests, the lab and benchmarks.

Both are started as children with everything in one folder, and stopped by their process. The binaries are found in the
folder that ``KUBE_ROUTER_TOOLS`` names (default ``~/.cache/kube-router-tools``) and on the PATH.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ADMIN_TOKEN = "admin-token-for-tests"
START_SECONDS = 90.0


def tool(name: str) -> str:
    """Path of a binary; raises FileNotFoundError with what to do."""
    folder = Path(os.environ.get("KUBE_ROUTER_TOOLS", "~/.cache/kube-router-tools")).expanduser()
    found = shutil.which(name, path=f"{folder}:{os.environ.get('PATH', '')}")
    if found is None:
        raise FileNotFoundError(f"{name}: not in {folder} (KUBE_ROUTER_TOOLS) and not on the PATH")
    return found


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class CertificateAuthority:
    """A CA made with openssl; `issue` gives (certificate, key) paths."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.certificate, self.key = folder, folder / f"{name}.crt", folder / f"{name}.key"
        self._openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
                      "-subj", f"/CN=test {name}", "-keyout", self.key, "-out", self.certificate)  # fmt: skip

    def issue(
        self, name: str, subject: str, *, addresses: Iterable[str] = (), not_before: str = "", not_after: str = ""
    ) -> tuple[Path, Path]:
        """A certificate for servers and clients; ``not_before``/``not_after`` as ``YYYYMMDDHHMMSSZ``."""
        key, request, certificate = (self.folder / f"{name}.{suffix}" for suffix in ("key", "csr", "crt"))
        self._openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                      "-subj", subject, "-keyout", key, "-out", request)  # fmt: skip
        alternatives = ",".join(
            f"IP:{text}" if text[0].isdigit() or ":" in text else f"DNS:{text}" for text in addresses
        )
        extensions = self.folder / f"{name}.ext"
        lines = ["extendedKeyUsage=serverAuth,clientAuth", f"subjectAltName={alternatives}" if alternatives else ""]
        extensions.write_text("\n".join(["[x]", *lines, ""]))
        dates = ["-startdate", not_before, "-enddate", not_after] if not_before else ["-days", "30"]
        database = self.folder / f"{name}.db"
        database.mkdir()
        (database / "index").write_text("")
        config = database / "config"
        config.write_text(
            f"[ca]\ndefault_ca=d\n[d]\ndatabase={database}/index\nnew_certs_dir={database}\nrand_serial=yes\n"
            "default_md=sha256\npolicy=p\n[p]\ncommonName=supplied\norganizationName=optional\n"
        )
        self._openssl("ca", "-batch", "-notext", "-config", config, "-cert", self.certificate, "-keyfile", self.key,
                      "-in", request, "-out", certificate, "-extfile", extensions, "-extensions", "x",
                      *dates)  # fmt: skip
        return certificate, key

    @staticmethod
    def _openssl(*arguments: object) -> None:
        command = ["openssl", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


class ApiServer:
    """etcd and kube-apiserver. `start` waits until both are ready; `stop` keeps the data, a new `start` goes on.

    ``url`` is an https address on loopback. `request` acts as an administrator. ``tokens``: token -> (user, groups).
    """

    def __init__(
        self,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        tokens: Mapping[str, tuple[str, tuple[str, ...]]] | None = None,
        flags: Iterable[str] = (),
    ) -> None:
        self.folder, self.host = folder, host
        self.tokens = {ADMIN_TOKEN: ("admin", ("system:masters",)), **(tokens or {})}
        self.flags = tuple(flags)
        folder.mkdir(parents=True, exist_ok=True)
        self.authority = CertificateAuthority(folder / "pki")
        self._certificate = self.authority.issue("server", "/CN=kube-apiserver", addresses=[host, "localhost"])
        self._account_certificate, self._account_key = self.authority.issue("accounts", "/CN=service-accounts")
        self.port, self.etcd_port, self._etcd_peer_port = free_port(host), free_port(), free_port()
        self._etcd: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"https://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def __enter__(self) -> ApiServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- processes

    def start(self) -> None:
        """Start what does not run; raises RuntimeError with the end of the log when it does not come up."""
        if self._etcd is None:
            self._start_etcd()
        self.start_server()

    def stop(self) -> None:
        """Stop both; the data stay."""
        self.stop_server()
        self._etcd = self._end(self._etcd)

    def start_server(self) -> None:
        """Start kube-apiserver alone."""
        if self._server is not None:
            return
        tokens = self.folder / "tokens.csv"
        tokens.write_text("".join(
            f'{token},{user},{user},"{",".join(groups)}"\n' for token, (user, groups) in self.tokens.items()
        ))  # fmt: skip
        tokens.chmod(0o600)
        self._server = self._spawn("kube-apiserver", self._server_flags(tokens))
        self._wait_until_ready()

    def stop_server(self, *, kill: bool = False) -> None:
        """Stop kube-apiserver alone; etcd keeps running."""
        self._server = self._end(self._server, kill=kill)

    def _start_etcd(self) -> None:
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self._etcd_peer_port}"
        self._etcd = self._spawn("etcd", [
            "--data-dir", str(self.folder / "etcd"), "--unsafe-no-fsync", "--listen-client-urls", client,
            "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", f"default={peer}", "--quota-backend-bytes", str(2 << 30),
        ])  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.etcd_port), 1):
                return
            self._check_alive("etcd", self._etcd, deadline)

    def _server_flags(self, tokens: Path) -> list[str]:
        certificate, key = self._certificate
        return [
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--bind-address={self.host}",
            f"--advertise-address={self.host}",
            f"--secure-port={self.port}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            f"--client-ca-file={self.authority.certificate}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            "--anonymous-auth=false",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._account_certificate}",
            f"--service-account-signing-key-file={self._account_key}",
            "--service-cluster-ip-range="
            + ("fd00:10:96::/108" if ":" in self.host else "10.96.0.0/16,fd00:10:96::/108"),
            "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition",
            "--allow-privileged=true",
            "--endpoint-reconciler-type=none",
            "--profiling=false",
            "--shutdown-delay-duration=0s",
            *self.flags,
        ]

    def _spawn(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen([tool(name), *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.request("GET", "/readyz", check=False)[0] == 200:
                    return
            self._check_alive("kube-apiserver", self._server, deadline)

    def _check_alive(self, name: str, process: subprocess.Popen[bytes] | None, deadline: float) -> None:
        if process is None or process.poll() is not None or time.monotonic() > deadline:
            text = (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]
            self.stop()
            raise RuntimeError(f"{name} did not come up:\n{text}")
        time.sleep(0.05)

    @staticmethod
    def _end(process: subprocess.Popen[bytes] | None, *, kill: bool = False) -> None:
        if process is None or process.poll() is not None:
            return
        process.kill() if kill else process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # --- requests

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str = ADMIN_TOKEN,
        content_type: str = "application/json",
        check: bool = True,
    ) -> tuple[int, Any]:
        """(status, decoded answer); raises RuntimeError for a status of 400 and above if ``check``."""
        with contextlib.closing(self.connect()) as connection:
            return self.request_on(connection, method, path, body, token=token, content_type=content_type, check=check)

    def connect(self) -> http.client.HTTPSConnection:
        """A connection to use with `request_on` for many requests."""
        tls = ssl.create_default_context(cafile=str(self.authority.certificate))
        return http.client.HTTPSConnection(self.host, self.port, timeout=30, context=tls)

    @staticmethod
    def request_on(
        connection: http.client.HTTPSConnection,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str = ADMIN_TOKEN,
        content_type: str = "application/json",
        check: bool = True,
    ) -> tuple[int, Any]:
        """As `request`, on a connection that stays open."""
        headers = {"Authorization": f"Bearer {token}", "Content-Type": content_type, "Accept": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        data = response.read()
        if check and response.status >= 400:
            raise RuntimeError(f"{method} {path}: {response.status} {data[:500].decode(errors='replace')}")
        try:
            return response.status, json.loads(data)
        except ValueError:
            return response.status, data

    def apply(self, *objects: dict[str, Any]) -> None:
        """Create objects, or replace them; a ``status`` is written too."""
        with contextlib.closing(self.connect()) as connection:
            for item in objects:
                self._apply(connection, item)

    def _apply(self, connection: http.client.HTTPSConnection, item: dict[str, Any]) -> None:
        collection = collection_path(item)
        path = f"{collection}/{item['metadata']['name']}"
        status, answer = self.request_on(connection, "POST", collection, item, check=False)
        if status == 409:
            body = {**item, "metadata": {**item["metadata"]}}
            body["metadata"].pop("resourceVersion", None)
            merge = "application/merge-patch+json"
            status, answer = self.request_on(connection, "PATCH", path, body, content_type=merge, check=False)
        if status >= 400:
            raise RuntimeError(f"{item['kind']} {item['metadata']['name']}: {status} {answer}")
        if "status" in item:
            body = {"status": item["status"]}
            merge = "application/merge-patch+json"
            self.request_on(connection, "PATCH", f"{path}/status", body, content_type=merge)

    def delete(self, item: dict[str, Any]) -> None:
        """Delete an object at once."""
        path = f"{collection_path(item)}/{item['metadata']['name']}"
        self.request("DELETE", path, {"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0})

    def allow(self, user: str, rules: Iterable[Mapping[str, Any]]) -> None:
        """Give ``user`` (and nobody else) RBAC ``rules`` over the whole cluster."""
        meta = {"name": f"test-{user}"}
        group = "rbac.authorization.k8s.io"
        self.apply(
            {"apiVersion": f"{group}/v1", "kind": "ClusterRole", "metadata": meta, "rules": list(rules)},
            {
                "apiVersion": f"{group}/v1",
                "kind": "ClusterRoleBinding",
                "metadata": meta,
                "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": meta["name"]},
                "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
            },
        )

    def compact(self) -> None:
        """Let etcd forget all versions but the newest: older watches and continue tokens then get 410."""
        self._etcd_call("/v3/kv/compaction", {"revision": self._etcd_revision(), "physical": True})

    def seed(self, objects: Iterable[dict[str, Any]]) -> None:
        """Write complete objects straight into etcd, many at a time: for thousands of them. Nothing is validated."""
        batch: list[dict[str, Any]] = []
        for item in objects:
            batch.append({"requestPut": {"key": _base64(_etcd_key(item)), "value": _base64(json.dumps(item))}})
            if len(batch) == ETCD_OPERATIONS:
                self._etcd_call("/v3/kv/txn", {"success": batch})
                batch = []
        if batch:
            self._etcd_call("/v3/kv/txn", {"success": batch})

    def _etcd_revision(self) -> str:
        answer = self._etcd_call("/v3/kv/range", {"key": _base64("x")})
        return str(answer["header"]["revision"])

    def _etcd_call(self, path: str, body: object) -> Any:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.etcd_port, timeout=30)) as connection:
            connection.request("POST", path, json.dumps(body))
            response = connection.getresponse()
            data = response.read()
            if response.status != 200:
                raise RuntimeError(f"etcd {path}: {response.status} {data!r}")
            return json.loads(data)

    def write_kubeconfig(self, path: Path, user: Mapping[str, Any] | None = None, server: str | None = None) -> Path:
        """A kubeconfig with ``user`` as its user entry (default: the administrator's token)."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [
                {
                    "name": "test",
                    "cluster": {
                        "server": server or self.url,
                        "certificate-authority-data": base64.b64encode(
                            self.authority.certificate.read_bytes()
                        ).decode(),
                    },
                }
            ],
            "users": [{"name": "test", "user": dict(user) if user is not None else {"token": ADMIN_TOKEN}}],
        }
        path.write_text(json.dumps(config))
        path.chmod(0o600)
        return path


RESOURCE_NAMES = {"NetworkPolicy": "networkpolicies"}
ETCD_FOLDERS = {"Node": "minions", "Service": "services/specs"}
"""Where etcd holds a kind, if not under its resource's name."""
ETCD_OPERATIONS = 100
"""etcd's default bound for one transaction is 128."""


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _etcd_key(item: Mapping[str, Any]) -> str:
    folder = ETCD_FOLDERS.get(item["kind"], collection_path(item).rsplit("/", 1)[-1])
    meta = item["metadata"]
    return "/".join(["/registry", folder, *([meta["namespace"]] if "namespace" in meta else []), meta["name"]])


def collection_path(item: Mapping[str, Any]) -> str:
    """Path of the collection that an object belongs to."""
    version = item["apiVersion"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    name = RESOURCE_NAMES.get(item["kind"], item["kind"].lower() + "s")
    namespace = item["metadata"].get("namespace")
    return f"{root}/namespaces/{namespace}/{name}" if namespace else f"{root}/{name}"


AGENT_TOKEN, PARTIAL_TOKEN = "agent-token", "partial-token"
AGENT_TOKENS: dict[str, tuple[str, tuple[str, ...]]] = {
    AGENT_TOKEN: ("agent", ("nodes",)),
    PARTIAL_TOKEN: ("partial", ()),
}

READ = [
    {"apiGroups": [""], "resources": ["nodes", "namespaces", "services"], "verbs": ["list", "watch"]},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["list", "watch"]},
]
READ_PODS = {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}
ALLOCATE = [
    {"apiGroups": [""], "resources": ["services"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["services/status"], "verbs": ["update"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]},
]
"""What ``--run-loadbalancer`` needs on top."""
WRITE_EVENTS = {"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch", "get"]}


def grant_agents(server: ApiServer) -> None:
    """``agent`` may do what the agent needs; ``partial`` may not read pods."""
    server.allow("agent", [*READ, READ_PODS, WRITE_EVENTS, *ALLOCATE])
    server.allow("partial", READ)
