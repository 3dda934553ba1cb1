"""A virtual machine with a Debian kernel, for tests of what the kernel of this machine may lack; host and guest side.

virtme-ng boots the newest installed Debian kernel over this machine's own root file system, which the guest sees
read-only with a layer in memory above it: same Python, same sources, same paths. pytest on the host collects
`tests/vm` and hands the chosen tests to a pytest in the guest (one boot for all of them), which sends its reports back
line by line. The host shows them as its own. A test whose report does not come has failed.

``make vm-shell`` opens a shell in such a machine.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
CONSOLE = ROOT / "build" / "vm-console.log"
"""What the kernel, the boot and the guest's pytest wrote in the last run."""

MARK = "kube_router_vm"
"""On the kernel's command line of the guest: this is one."""
REPORTS_TO = "KUBE_ROUTER_VM_REPORTS_TO"
"""In the guest's environment: the file descriptor that takes the reports."""

BOOT_SECONDS = 240.0
QUIET_SECONDS = 180.0
"""How long a guest may be silent: it says when a test begins and when it is done. A quiet machine boots in 15 s."""
ALL_SECONDS = 1200
"""After this a guest ends by itself, whatever became of the host's side."""
_TAIL = 25
_HOST_FILES = "-fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"
_HOST_FILES += " -device virtio-9p-pci,fsdev=host,mount_tag=host"
_CACHED_ROOT = """
mkdir /run/root && mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=500000 host /run/root || exit 1
for folder in etc tmp; do
    mkdir -p /run/layer/$folder/upper /run/layer/$folder/work
    layers=lowerdir=/run/root/$folder,upperdir=/run/layer/$folder/upper,workdir=/run/layer/$folder/work
    mount -t overlay -o xino=off,$layers overlay /run/root/$folder || exit 1
done
for folder in dev proc sys run; do mount --rbind /$folder /run/root/$folder; done
exec chroot /run/root sh -c
"""
"""virtme-ng's own view of the host's files caches nothing: every start of a program reads it anew. This one is several
times as fast; what is on the host does not change while tests run.
"""
_NOT_FOR_THIS = (
    "kvm,kvm_amd,kvm_intel,ahci,sr_mod,cdrom,psmouse,pcspkr,i2c_i801,lpc_ich,iTCO_wdt,powernow_k8,virtio_net"
)


class VmError(Exception):
    """The machine cannot be started, died or hangs; the text says which and shows its last words."""


def in_guest() -> bool:
    """Whether this process runs in such a machine."""
    return MARK in Path("/proc/cmdline").read_text().split()


def modprobe(*names: str) -> None:
    """Load kernel modules; raises AssertionError naming the one that this kernel does not have."""
    for name in names:
        done = subprocess.run(["modprobe", name], capture_output=True, text=True)
        assert done.returncode == 0, f"kernel {os.uname().release}: module {name}: {done.stderr.strip()}"


def newest_kernel(boot: Path = Path("/boot"), modules: Path = Path("/lib/modules")) -> Path:
    """The newest Debian kernel that is here with its modules, no cloud or real-time one; raises VmError."""
    found = [
        path
        for path in boot.glob("vmlinuz-*-amd64")
        if not re.search("-(cloud|rt)-", path.name)
        and (modules / path.name.removeprefix("vmlinuz-") / "modules.dep").exists()
    ]
    if not found:
        raise VmError(f"no {boot}/vmlinuz-*-amd64 with {modules}/VERSION/modules.dep: install linux-image-amd64")
    return max(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def command(script: str) -> list[str]:
    """The command that boots the machine for a shell script, or for an interactive shell if that is empty."""
    folder = Path(sys.executable).parent
    vng = shutil.which("vng", path=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}")
    if vng is None:
        raise VmError("vng is not there: install the Python package virtme-ng (pip install '.[test]')")
    if shutil.which("qemu-system-x86_64") is None:
        raise VmError("qemu-system-x86_64 is not there: install the Debian package qemu-system-x86")
    # Never KVM: where the host is a virtual machine itself, its guests may hang. 9p: needs no daemon beside qemu.
    options = ["--disable-kvm", "--force-9p", "--cpus", "2", "--memory", "2G", "--user", "root", "--verbose"]
    options += ["--cwd", str(ROOT), "--append", MARK, "--append", f"module_blacklist={_NOT_FOR_THIS}"]
    options.append(f"--qemu-opts={_HOST_FILES}")
    return [vng, *options, "--run", str(newest_kernel()), *(["--", script] if script else [])]


def environment() -> Mapping[str, str]:
    """What the guest's processes get: the host's Python and sources."""
    taken = {name: os.environ[name] for name in ("PYTHONPATH", "CI") if name in os.environ}
    path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return taken | {"PATH": path, "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/root"}


def exports(names: Mapping[str, str]) -> str:
    """The environment as words of a shell."""
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in names.items())


class Machine:
    """One boot that runs a list of tests; their reports are waited for one by one."""

    def __init__(self, nodeids: Sequence[str]) -> None:
        # Imports are slow there: no plugins, and not the conftest.py of all tiers with its hypothesis.
        pytest = ["pytest", "-q", "-p", "no:cacheprovider", "--confcutdir", "tests/vm"]
        arguments = [sys.executable, "-P", "-m", *pytest, *nodeids]
        exported = exports({**environment(), REPORTS_TO: "3", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
        script = f"cd {ROOT} && exec env {exported} timeout -k 5 {ALL_SECONDS} {shlex.join(arguments)} 3>&1 1>&2"
        script = _CACHED_ROOT.strip() + " " + shlex.quote(script)
        # The kernel's command line is short, so the script goes by a file.
        CONSOLE.parent.mkdir(exist_ok=True)
        self._script = CONSOLE.with_suffix(".sh")
        self._script.write_text(script + "\n")
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL)
        self._reports: dict[str, list[dict[str, Any]]] = {}
        self._done: set[str] = set()
        self._began = ""
        self._broken: list[str] = []
        self._failure = ""
        words = command(f"sh {shlex.quote(str(self._script))}")
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # pipes: qemu would truncate files
            stderr=subprocess.PIPE,
            env={**os.environ, "PATH": f"{Path(words[0]).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
            start_new_session=True,
        )
        # Outlives us, and then ends the machine: the pipe that it reads has its other end in this process alone.
        guard = ["sh", "-c", 'read _; kill -s KILL -- "-$1"', "sh", str(self._process.pid)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        readers = ((self._read_reports, self._process.stdout), (self._read_console, self._process.stderr))
        self._threads = [threading.Thread(target=read, args=(stream,), daemon=True) for read, stream in readers]
        for thread in self._threads:
            thread.start()

    def reports(self, nodeid: str) -> list[dict[str, Any]]:
        """Wait for a test to be done; its reports as pytest serialises them. Raises VmError if it was not done."""
        while nodeid not in self._done:
            if self._failure:
                raise VmError(self._failure)
            self._wait()
        return self._reports.pop(nodeid, [])

    def close(self) -> None:
        """End the machine, if it has not ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.0 if self._failure else 20.0)
        self._guard.communicate(timeout=10.0)
        self._process.wait(10.0)
        for thread in self._threads:
            thread.join(5.0)

    def _wait(self) -> None:
        """Take the next event; what keeps all further tests from being done becomes the failure."""
        limit = QUIET_SECONDS if self._began else BOOT_SECONDS
        began = time.monotonic()
        try:
            event = self._events.get(timeout=limit)
        except queue.Empty:
            self._fail(f"nothing was heard for {time.monotonic() - began:.0f} s")
            return
        if event is None:
            self._fail("it ended")
        elif "begin" in event:
            self._began = event["begin"]
        elif "report" in event:
            self._reports.setdefault(event["report"]["nodeid"], []).append(event["report"])
        elif "end" in event:
            self._done.add(event["end"])
        elif "broken" in event:
            self._broken.append(event["broken"])

    def _fail(self, what: str) -> None:
        for thread in self._threads if what == "it ended" else ():
            thread.join(5.0)
        if self._broken:
            self._failure = "the guest could not collect its tests:\n" + "\n".join(self._broken)
            return
        when = "before any test began"
        if self._began:
            when = f"{'after' if self._began in self._done else 'in the middle of'} {self._began}"
        last = "\n".join(self._tail)
        self._failure = f"the virtual machine: {what} {when}. Its last words (all of them: {CONSOLE}):\n{last}"

    def _read_reports(self, stream: IO[bytes]) -> None:
        for line in stream:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    self._events.put(event)
                    continue
            self._tail.append(line.decode(errors="replace").rstrip())
        self._events.put(None)

    def _read_console(self, stream: IO[bytes]) -> None:
        with CONSOLE.open("wb") as console:
            for line in stream:
                console.write(line)
                console.flush()
                self._tail.append(line.decode(errors="replace").rstrip())


def shell() -> int:
    """Open a shell in a machine, on this terminal, with the environment of the tests."""
    print(f"In the guest, for the environment of the tests: export {exports(environment())}")
    words = command("")
    path = f"{Path(words[0]).parent}:{os.environ.get('PATH', '')}"
    return subprocess.run(words, env={**os.environ, "PATH": path}).returncode


if __name__ == "__main__":
    sys.exit(shell())
