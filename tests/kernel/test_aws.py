"""AWS's source/destination check with AWS's own library, against a fake of the two endpoints that it asks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fakeaws import ACCESS, SECRET, TOKEN, FakeAws, fake_aws

from kube_router.ipc.messages import Node
from kube_router.workers.kernel.child import Child
from kube_router.workers.model import Outcome
from kube_router.workers.router import aws, ec2
from kube_router.workers.router.aws import SourceDestCheck
from kube_router.workers.settings import Settings

INSTANCE = "i-0123456789abcdef0"
NODE = Node(name="a", provider_id=f"aws:///eu-central-9a/{INSTANCE}")
CALL = {"Action": "ModifyInstanceAttribute", "InstanceId": INSTANCE, "SourceDestCheck.Value": "false"}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAws]:
    with fake_aws() as found:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


def made(calls: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{key: value for key, value in call.items() if key != "Version"} for call in calls]


def finished(check: SourceDestCheck, node: Node = NODE, now: float = 100.0) -> Outcome:
    """Look until no child runs."""
    deadline = time.monotonic() + 30
    while check.look(node, now).retry_after == aws.LOOK_SECONDS:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return check.look(node, now)


def test_the_own_instance_is_asked_for_once_and_nothing_waits(fake: FakeAws) -> None:
    fake.hang = 1.0
    imported = "botocore" in sys.modules
    check = SourceDestCheck(Settings())
    began = time.monotonic()
    looked = check.look(NODE, 100.0)
    assert time.monotonic() - began < 0.9, "the worker waited for AWS"
    assert looked == Outcome(retry_after=aws.LOOK_SECONDS)
    assert finished(check) == Outcome()
    assert made(fake.calls) == [CALL]
    assert check.look(NODE, 1e6) == Outcome()
    assert made(fake.calls) == [CALL]
    (call,) = (item for item in fake.asked if item.fields)
    assert "/eu-central-9/ec2/aws4_request" in call.headers["Authorization"]
    assert ("botocore" in sys.modules) == imported, "the library is in the worker's memory"


def test_without_the_right_it_is_told_once_and_left(fake: FakeAws) -> None:
    fake.errors = ["UnauthorizedOperation"] * 9
    check = SourceDestCheck(Settings())
    outcome = finished(check)
    assert outcome.warnings == (
        f"node a: spec.providerID aws:///eu-central-9a/{INSTANCE}: the source/destination check stays on until someone "
        "turns it off: EC2 answers UnauthorizedOperation: the node's role needs ec2:ModifyInstanceAttribute on its own "
        "instance; not tried again",
    )
    assert outcome.retry_after is None
    assert check.look(NODE, 1e6) == outcome
    assert made(fake.calls) == [CALL]


def test_five_tries_with_growing_pauses_and_no_secret_in_the_answer(fake: FakeAws) -> None:
    fake.errors = ["RequestLimitExceeded"] * 4
    pauses: list[float] = []
    assert ec2.attempt(INSTANCE, pauses.append) == {"state": "done", "text": "eu-central-9"}
    assert pauses == [1.0, 2.0, 4.0, 8.0]
    fake.errors = ["InternalError"] * 9
    answer = ec2.attempt(INSTANCE, pauses.append)
    assert answer == {
        "state": "failed",
        "text": "5 tries, at last: EC2 in eu-central-9 answers InternalError for ModifyInstanceAttribute of "
        + INSTANCE,
    }
    assert len(fake.calls) == 10
    assert not any(word in str(answer) for word in (SECRET, ACCESS, TOKEN))


def test_what_failed_is_tried_again_with_the_next_period(fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "Child", quick_child)
    fake.errors = ["InternalError"] * 5
    check = SourceDestCheck(Settings(routes_sync_period=300.0))
    outcome = finished(check)
    assert "could not be turned off: 5 tries, at last: EC2 in eu-central-9 answers InternalError" in outcome.warnings[0]
    assert outcome.retry_after == 300.0
    assert finished(check, now=399.0).warnings and len(fake.calls) == 5
    assert finished(check, now=400.0) == Outcome()
    assert len(fake.calls) == 6


def quick_child(command: tuple[str, ...], seconds: float) -> Child:
    """The same program with pauses of nothing."""
    code = f"import sys; from kube_router.workers.router import ec2; sys.argv[1:] = [{command[-1]!r}]\n"
    return Child((sys.executable, "-P", "-c", f"{code}ec2.FIRST_PAUSE_SECONDS = 0.0\nec2.main()"), seconds)


@pytest.mark.parametrize(
    ("tokens", "old_version", "disabled", "works"),
    [
        (True, False, "", True),
        (False, True, "", True),
        (False, False, "", False),
        (False, True, "true", False),
        (True, True, "true", True),
    ],
)
def test_both_versions_of_the_metadata_service(
    fake: FakeAws, monkeypatch: pytest.MonkeyPatch, tokens: bool, old_version: bool, disabled: str, works: bool
) -> None:
    fake.tokens, fake.old_version = tokens, old_version
    monkeypatch.setenv("AWS_EC2_METADATA_V1_DISABLED", disabled)
    if works:
        assert ec2.region() == "eu-central-9"
        return
    with pytest.raises(ec2.Failed) as caught:
        ec2.region()
    assert fake.url in str(caught.value)


def test_the_environment_names_the_region_without_the_metadata_service(
    fake: FakeAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert ec2.region() == "us-west-2"
    assert fake.asked == []


def test_nobody_answers(fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = "http://127.0.0.1:9"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", closed)
    answer = ec2.attempt(INSTANCE, lambda _: None)
    assert answer["state"] == "failed" and f"{closed}/latest/meta-data/placement/region" in answer["text"]
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "NoCredentialsError" in ec2.attempt(INSTANCE, lambda _: None)["text"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL_EC2", closed)
    text = ec2.attempt(INSTANCE, lambda _: None)["text"]
    assert "EndpointConnectionError" in text and closed in text and SECRET not in text


@pytest.mark.parametrize(
    ("provider", "flags"),
    [
        ("", {}),
        ("gce://project/zone/name", {}),
        ("kind://docker/kind/worker", {}),
        (NODE.provider_id, {"disable_source_dest_check": False}),
    ],
)
def test_other_nodes_start_nothing(monkeypatch: pytest.MonkeyPatch, provider: str, flags: dict[str, Any]) -> None:
    monkeypatch.setattr(aws, "Child", None)
    check = SourceDestCheck(Settings(**flags))
    assert check.look(Node(name="a", provider_id=provider), 0.0) == Outcome()


@pytest.mark.parametrize(
    "provider", ["aws:///eu-central-9a/fargate-ip-10-0-0-1", "aws://", f"aws:///x/{INSTANCE};reboot"]
)
def test_a_provider_id_that_names_no_instance(monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    monkeypatch.setattr(aws, "Child", None)
    (warning,) = SourceDestCheck(Settings()).look(Node(name="a", provider_id=provider), 0.0).warnings
    assert warning.startswith(f"node a: spec.providerID {provider}: names no EC2 instance")


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "Child", None)
    monkeypatch.setattr(aws, "LIBRARY", "no_such_library")
    outcome = SourceDestCheck(Settings()).look(NODE, 0.0)
    assert outcome == Outcome(
        warnings=(
            f"node a: spec.providerID aws:///eu-central-9a/{INSTANCE}: no_such_library is not installed (pip install "
            "'kube-router[aws]'), so --disable-source-dest-check has no effect",
        )
    )


def test_a_child_that_hangs_or_says_nonsense_is_a_failure(fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, said in (("import time; time.sleep(60)", "no answer within"), ("print('x'); exit(3)", "with status 3")):
        monkeypatch.setattr(aws, "Child", lambda _c, _s, code=code: Child((sys.executable, "-c", code), 0.3))
        assert said in finished(SourceDestCheck(Settings())).warnings[0]


def test_closing_ends_the_child(fake: FakeAws) -> None:
    fake.hang = 5.0
    check = SourceDestCheck(Settings())
    check.look(NODE, 0.0)
    child: Any = check._child
    check.close()
    assert child._process.returncode == -signal.SIGKILL


def test_the_program_by_itself(fake: FakeAws, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "kube_router.workers.router.ec2", INSTANCE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"state": "done", "text": "eu-central-9"}
