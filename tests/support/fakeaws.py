"""The two HTTP endpoints that an EC2 instance asks: its metadata service and EC2's query API, on loopback.

Remembers every request. What it answers is set by attributes, at any time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

TOKEN = "TOKEN-OF-THE-METADATA-SERVICE"
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
ACCESS = "AKIAIOSFODNN7EXAMPLE"
CREDENTIALS = f"""{{"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "{ACCESS}", "SecretAccessKey": "{SECRET}",
"Token": "SESSION-TOKEN", "Expiration": "2099-01-01T00:00:00Z", "LastUpdated": "2026-01-01T00:00:00Z"}}"""


@dataclass(slots=True)
class Asked:
    """One request: method, path, and the fields of a query call."""

    method: str
    path: str
    fields: dict[str, str]
    headers: dict[str, str]


@dataclass
class FakeAws:
    """``errors``: EC2's error code for each next call, "" or nothing more: success. ``tokens``: version 2 is offered.

    ``hang``: seconds before EC2 answers.
    """

    url: str = ""
    errors: list[str] = field(default_factory=list)
    tokens: bool = True
    old_version: bool = True
    hang: float = 0.0
    asked: list[Asked] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What leads AWS's library here."""
        return {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.url,
            "AWS_ENDPOINT_URL_EC2": self.url,
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_CONFIG_FILE": "/nonexistent",
        }

    @property
    def calls(self) -> list[dict[str, str]]:
        """The fields of EC2's calls, in order."""
        return [item.fields for item in self.asked if item.fields]

    def metadata(self, handler: BaseHTTPRequestHandler) -> tuple[int, str]:
        """Status and body for the metadata service."""
        path = urlsplit(handler.path).path
        if path == "/latest/api/token":
            return (200, TOKEN) if handler.command == "PUT" and self.tokens else (405, "")
        token = handler.headers.get("X-aws-ec2-metadata-token")
        if token not in ((TOKEN,) if not self.old_version else (TOKEN, None)):
            return 401, ""
        match path:
            case "/latest/meta-data/placement/region":
                return 200, "eu-central-9"
            case "/latest/meta-data/iam/security-credentials/":
                return 200, "node-role"
            case "/latest/meta-data/iam/security-credentials/node-role":
                return 200, CREDENTIALS
        return 404, ""

    def api(self) -> tuple[int, str]:
        """Status and body for EC2."""
        time.sleep(self.hang)
        code = self.errors.pop(0) if self.errors else ""
        if not code:
            return 200, "<ModifyInstanceAttributeResponse><return>true</return></ModifyInstanceAttributeResponse>"
        quoted = f"You are not authorized. Encoded authorization failure message: {SECRET}"
        body = f"<Errors><Error><Code>{code}</Code><Message>{quoted}</Message></Error></Errors>"
        return 403 if code == "UnauthorizedOperation" else 503, f"<Response>{body}<RequestID>1</RequestID></Response>"


@contextmanager
def fake_aws() -> Iterator[FakeAws]:
    """Both endpoints on one port of loopback."""
    fake = FakeAws()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            fields = {key: value[0] for key, value in parse_qs(self.rfile.read(length).decode()).items()}
            fake.asked.append(Asked(self.command, self.path, fields, dict(self.headers)))
            status, body = fake.api() if fields else fake.metadata(self)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = do_POST = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
