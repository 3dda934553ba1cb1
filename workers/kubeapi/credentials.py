"""How to reach the API server and as whom: kubeconfig, in-cluster service account, ``--master``.

Touches files (and runs an exec plugin if the kubeconfig names one), through the ``kubernetes`` package. Nothing here
keeps a secret longer than it must: inline keys reach OpenSSL through a private folder that lives for one call.

========== ======== ===========================================================================================
kubeconfig master   result (as upstream)
========== ======== ===========================================================================================
set        any      the file; ``master`` replaces its server
""         set      in-cluster token and CA; the server is ``master``
""         ""       in-cluster configuration
========== ======== ===========================================================================================
"""

from __future__ import annotations

import datetime
import os
import ssl
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from kubernetes.client import Configuration
from kubernetes.config import ConfigException, kube_config
from kubernetes.config.incluster_config import InClusterConfigLoader

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
EXPIRY_SKEW_SECONDS = 120.0
"""Credentials are renewed so long before they expire."""


class BadAccess(Exception):
    """No way to the API server can be made up from files and flags; the text is one line without secrets."""


@dataclass(frozen=True, slots=True)
class Access:
    """One way to the API server. ``signature`` changes when a file it was made from changes; ``expires`` Unix time."""

    server: str
    tls: ssl.SSLContext | None
    server_name: str | None
    authorization: str | None = field(repr=False)
    proxy: str | None = None
    expires: float | None = None
    files: tuple[str, ...] = ()
    signature: tuple[object, ...] = ()

    @property
    def fresh(self) -> bool:
        """Whether no file has changed and nothing is about to expire."""
        if self.expires is not None and time.time() > self.expires - EXPIRY_SKEW_SECONDS:
            return False
        return signature_of(self.files) == self.signature


def signature_of(files: Iterable[str]) -> tuple[object, ...]:
    """What changes when one of the files does; links are followed, as token mounts are swapped by a link."""
    marks: list[object] = []
    for name in files:
        try:
            status = os.stat(name)
            marks.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError as error:
            marks.append(error.errno)
    return tuple(marks)


def load_access(kubeconfig: str, master: str, service_account: Path = SERVICE_ACCOUNT) -> Access:
    """Read everything anew; raises `BadAccess`."""
    if master and urlsplit(master).scheme not in ("http", "https"):
        raise BadAccess(f"--master {master!r}: not an http:// or https:// address")
    if kubeconfig:
        return _from_kubeconfig(kubeconfig, master)
    return _in_cluster(master, service_account)


def _in_cluster(master: str, folder: Path) -> Access:
    token, authority = folder / "token", folder / "ca.crt"
    environment = dict(os.environ)
    if master:  # any values: the address that they make is replaced
        environment.update(KUBERNETES_SERVICE_HOST="master", KUBERNETES_SERVICE_PORT="443")
    elif not environment.get("KUBERNETES_SERVICE_HOST") or not environment.get("KUBERNETES_SERVICE_PORT"):
        raise BadAccess("no --kubeconfig, no --master, and not in a pod: KUBERNETES_SERVICE_HOST and _PORT not set")
    files = (str(token), str(authority))
    signature = signature_of(files)
    configuration = Configuration()
    try:
        InClusterConfigLoader(str(token), str(authority), try_refresh_token=False, environ=environment).load_and_set(
            configuration
        )
        return _access(configuration, master, None, files, signature)
    except (ConfigException, OSError, ssl.SSLError, ValueError) as error:
        raise BadAccess(f"in-cluster configuration in {folder}: {_without_values(error)}") from None


def _from_kubeconfig(path: str, master: str) -> Access:
    if not os.path.isfile(path):
        raise BadAccess(f"--kubeconfig {path}: no such file")
    configuration = Configuration()
    files: tuple[str, ...] = (path,)
    signature = signature_of(files)
    try:
        with tempfile.TemporaryDirectory(prefix="kube-router-") as folder:
            # The package remembers the names of the files it made; those of an earlier call are gone.
            kube_config._temp_files.clear()
            merged = kube_config.KubeConfigMerger(path)
            loader = kube_config.KubeConfigLoader(merged.config, config_base_path=None, temp_file_path=folder)
            user, cluster = _plain(loader._user), _plain(loader._cluster)
            files += tuple(_referenced_files(path, user, cluster))
            signature = signature_of(files)
            loader.load_and_set(configuration)
            if "exec" in user and not (configuration.api_key or configuration.cert_file):
                raise BadAccess(f"--kubeconfig {path}: exec plugin {_command(user)!r} gave no credentials")
            return _access(configuration, master, _expiry(loader), files, signature)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise BadAccess(f"--kubeconfig {path}{where}: {getattr(error, 'problem', None) or 'not YAML'}") from None
    except (ConfigException, OSError, ssl.SSLError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadAccess(f"--kubeconfig {path}: {_without_values(error)}") from None


def _access(
    configuration: Any, master: str, expires: float | None, files: tuple[str, ...], signature: tuple[object, ...]
) -> Access:
    server = (master or configuration.host).rstrip("/")
    if not urlsplit(server).hostname:
        raise ValueError(f"server {server!r} is not an address")
    tls = None
    if server.startswith("https:"):
        tls = ssl.create_default_context(cafile=configuration.ssl_ca_cert or None)
        if not configuration.verify_ssl:
            tls.check_hostname = False
            tls.verify_mode = ssl.CERT_NONE
        if configuration.cert_file:
            tls.load_cert_chain(configuration.cert_file, configuration.key_file or None)
    keys = configuration.api_key
    authorization = keys.get("BearerToken") or keys.get("authorization")
    return Access(
        server=server,
        tls=tls,
        server_name=configuration.tls_server_name or None,
        authorization=authorization.strip() if authorization else None,
        proxy=configuration.proxy or None,
        expires=expires,
        files=files,
        signature=signature,
    )


def _plain(node: Any) -> dict[str, Any]:
    value = getattr(node, "value", node)
    return value if isinstance(value, dict) else {}


def _referenced_files(path: str, user: dict[str, Any], cluster: dict[str, Any]) -> list[str]:
    """The files that a kubeconfig points at, relative to itself."""
    named = [user.get(key) for key in ("tokenFile", "client-certificate", "client-key")]
    named.append(cluster.get("certificate-authority"))
    base = os.path.dirname(os.path.abspath(path))
    return [os.path.join(base, name) for name in named if isinstance(name, str) and name]


def _command(user: dict[str, Any]) -> str:
    plugin = user.get("exec")
    return str(plugin.get("command", "")) if isinstance(plugin, dict) else ""


def _expiry(loader: Any) -> float | None:
    expiry = loader.__dict__.get("expiry")
    return expiry.timestamp() if isinstance(expiry, datetime.datetime) else None


def _without_values(error: Exception) -> str:
    """An error's reason. The package's own texts quote whole users, tokens included, behind " in "."""
    if isinstance(error, ssl.SSLError):
        return f"certificate, key or CA cannot be loaded: {error.reason or 'not PEM'}"
    if isinstance(error, OSError):
        return f"{error.filename or 'file'}: {error.strerror or type(error).__name__}"
    if isinstance(error, ConfigException):
        return str(error).split(" in ", 1)[0]
    return str(error) if type(error) is ValueError else f"malformed ({type(error).__name__})"


class Credentials:
    """The current `Access`, loaded again when its files change, when it is about to expire, or when it was refused."""

    def __init__(self, load: Callable[[], Access]) -> None:
        self._load = load
        self._access: Access | None = None
        self._refused = False

    def current(self) -> Access:
        """The access to use now; raises `BadAccess`. Not thread-safe: the caller holds a lock."""
        if self._access is None or self._refused or not self._access.fresh:
            self._access = self._load()
            self._refused = False
        return self._access

    def refused(self, access: Access) -> None:
        """The server answered 401 to ``access``."""
        if access is self._access:
            self._refused = True
