"""The host's half of `tests/vm`: whatever becomes of the machine, a test that did not run has failed and says why."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import vm
from support.vm import Machine, VmError, newest_kernel

ROOT = Path(__file__).resolve().parents[2]
FIRST = "tests/vm/test_x.py::test_first"
SECOND = "tests/vm/test_x.py::test_second"
REPORT = '{"report": {"nodeid": "%s", "when": "call"}}'
Play = Callable[[str], Machine]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Play:
    """A machine whose guest is a shell script: what it prints are the events."""
    monkeypatch.setattr(vm, "CONSOLE", tmp_path / "build" / "console.log")

    def start(script: str) -> Machine:
        monkeypatch.setattr(vm, "command", lambda _: ["/bin/sh", "-c", script])
        return Machine([FIRST, SECOND])

    return start


def says(*events: str) -> str:
    return "; ".join(f"echo '{event}'" for event in events)


DONE = (f'{{"begin": "{FIRST}"}}', REPORT % FIRST, f'{{"end": "{FIRST}"}}')


def test_reports_are_handed_over_and_the_machine_ends(play: Play) -> None:
    machine = play(f"echo noise; {says(*DONE)}; echo boot >&2; exit 3")
    assert [one["when"] for one in machine.reports(FIRST)] == ["call"]
    machine.close()
    assert vm.CONSOLE.read_text() == "boot\n"


def test_a_machine_that_dies_fails_the_test_that_ran_and_all_after_it(play: Play) -> None:
    machine = play(f'{says(*DONE)}; echo \'{{"begin": "{SECOND}"}}\'; echo "Kernel panic - not syncing" >&2')
    assert machine.reports(FIRST)
    for nodeid in (SECOND, "tests/vm/test_x.py::test_third"):
        with pytest.raises(VmError, match=rf"it ended in the middle of {SECOND}(.|\n)*Kernel panic"):
            machine.reports(nodeid)
    machine.close()


def test_a_machine_that_hangs_is_given_up_and_ended(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = play(f"{says(*DONE)}; sleep 1000")
    assert machine.reports(FIRST)
    monkeypatch.setattr(vm, "QUIET_SECONDS", 0.1)
    with pytest.raises(VmError, match=rf"nothing was heard for 0 s after {FIRST}"):
        machine.reports(SECOND)
    machine.close()
    assert machine._process.returncode == -9


def test_a_machine_does_not_outlive_a_host_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal, sys\n"
        "from support import vm\n"
        f"vm.CONSOLE = pathlib.Path({str(tmp_path)!r}, 'build', 'console.log')\n"
        "vm.command = lambda _: ['/bin/sh', '-c', 'sleep 1000 & echo $! >&2; wait']\n"
        "machine = vm.Machine([])\n"
        "while not vm.CONSOLE.exists() or not vm.CONSOLE.read_text(): pass\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-P", "-c", script], env=environment, timeout=60)
    child = int((tmp_path / "build" / "console.log").read_text())
    assert eventually(lambda: not Path(f"/proc/{child}/cmdline").exists())


def eventually(done: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)
    return done()


def test_a_machine_that_does_not_boot_says_so(play: Play) -> None:
    machine = play("echo no such kernel >&2; exit 1")
    with pytest.raises(VmError, match=r"it ended before any test began(.|\n)*no such kernel"):
        machine.reports(FIRST)
    machine.close()


def test_tests_that_cannot_be_collected_in_the_guest_say_why(play: Play) -> None:
    machine = play(says('{"broken": "ImportError: no module named nowhere"}'))
    with pytest.raises(VmError, match=r"could not collect its tests:\nImportError"):
        machine.reports(FIRST)
    machine.close()


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (["6.1.0-9-amd64", "6.1.0-56-amd64", "6.1.0-60-cloud-amd64", "6.1.0-60-rt-amd64"], "6.1.0-56-amd64"),
        (["6.1.0-56-amd64", "6.12.73+deb13-amd64"], "6.12.73+deb13-amd64"),
    ],
)
def test_the_newest_kernel_with_modules_is_taken(tmp_path: Path, there: list[str], chosen: str) -> None:
    for version in [*there, "9.9.9-amd64"]:
        (tmp_path / f"vmlinuz-{version}").touch()
    for version in there:
        (tmp_path / version).mkdir()
        (tmp_path / version / "modules.dep").touch()
    assert newest_kernel(tmp_path, tmp_path).name == f"vmlinuz-{chosen}"


def test_without_a_kernel_it_is_said_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(VmError, match="install linux-image-amd64"):
        newest_kernel(tmp_path, tmp_path)


def test_without_qemu_every_test_fails_and_says_what_to_install(tmp_path: Path) -> None:
    arguments = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/vm/test_vm_itself.py"]
    done = subprocess.run(
        arguments, cwd=ROOT, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "7 failed" in done.stdout
    assert "install the Debian package qemu-system-x86" in done.stdout
    assert "passed" not in done.stdout
