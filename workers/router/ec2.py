"""A program: turn the source/destination check of one EC2 instance off. ``python -P -m …ec2 i-0123456789abcdef0``.

Speaks to two endpoints: the instance metadata service (the region; and for botocore, the credentials of the instance's
role) and EC2's API. Says how it went in one line of JSON: ``state`` is ``done``, ``denied`` or ``failed``. It does not
repeat what AWS says of a failed request beyond its error code: such texts may quote what was signed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

TRIES = 5
FIRST_PAUSE_SECONDS = 1.0
"""Between two tries; doubled each time."""
METADATA = {"ipv4": "http://169.254.169.254", "ipv6": "http://[fd00:ec2::254]"}
METADATA_SECONDS, CONNECT_SECONDS, READ_SECONDS = 2.0, 5.0, 10.0
TOKEN_PATH, REGION_PATH = "/latest/api/token", "/latest/meta-data/placement/region"
TOKEN_LIFE = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
DENIED = "UnauthorizedOperation"


class Failed(Exception):
    """One try came to nothing; the text says why. ``final``: another one would too."""

    def __init__(self, text: str, *, final: bool = False) -> None:
        super().__init__(text)
        self.final = final


def region() -> str:
    """The instance's region: from the environment, as AWS's tools have it, else from the metadata service."""
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return named or _from_metadata()


def _from_metadata() -> str:
    """By version 2 of the service, with a token; by version 1 where it gives none and that is allowed."""
    mode = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "ipv4").lower()
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or METADATA.get(mode, METADATA["ipv4"])
    base = base.rstrip("/")
    headers = {}
    try:
        headers["X-aws-ec2-metadata-token"] = _fetched(base + TOKEN_PATH, TOKEN_LIFE, "PUT")
    except Failed:
        if os.environ.get("AWS_EC2_METADATA_V1_DISABLED", "").lower() == "true":
            raise
    found = _fetched(base + REGION_PATH, headers, "GET").strip()
    if not found:
        raise Failed(f"{base}{REGION_PATH} is empty")
    return found


def _fetched(url: str, headers: dict[str, str], method: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(
            urllib.request.Request(url, headers=headers, method=method), timeout=METADATA_SECONDS
        ) as answer:
            return str(answer.read(4096).decode("ascii"))
    except (OSError, ValueError) as error:
        raise Failed(f"{url}: {error}") from error


def turn_off(instance: str) -> str:
    """One try; returns what was done. Raises `Failed`."""
    from botocore import exceptions, session
    from botocore.config import Config

    where = region()
    limits = Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries={"total_max_attempts": 1})
    try:
        client: Any = session.get_session().create_client("ec2", region_name=where, config=limits)
        client.modify_instance_attribute(InstanceId=instance, SourceDestCheck={"Value": False})
    except exceptions.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        if code == DENIED:
            rule = "the node's role needs ec2:ModifyInstanceAttribute on its own instance"
            raise Failed(f"EC2 answers {code}: {rule}", final=True) from error
        raise Failed(f"EC2 in {where} answers {code} for ModifyInstanceAttribute of {instance}") from error
    except (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.NoCredentialsError) as error:
        raise Failed(f"{type(error).__name__}: {error}") from error
    except exceptions.BotoCoreError as error:
        raise Failed(f"{type(error).__name__} from AWS's library") from error
    return where


def attempt(instance: str, pause: Callable[[float], object]) -> dict[str, str]:
    """Up to `TRIES` tries; the answer."""
    last = ""
    for number in range(TRIES):
        if number:
            pause(FIRST_PAUSE_SECONDS * 2 ** (number - 1))
        try:
            return {"state": "done", "text": turn_off(instance)}
        except Failed as error:
            last = str(error)
            if error.final:
                return {"state": "denied", "text": last}
    return {"state": "failed", "text": f"{TRIES} tries, at last: {last}"}


def main() -> None:
    """The program."""
    print(json.dumps(attempt(sys.argv[1], time.sleep)))


if __name__ == "__main__":
    main()
