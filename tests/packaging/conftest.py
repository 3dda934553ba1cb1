"""Fixtures of the packaging tier: a copy of the sources, the sdist made of it, a wheel and a venv a Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pythons import Installed, Interpreter, interpreters

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("_fast", "ipc", "supervisor", "workers")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
STALE = "build/lib/kube_router/workers/deleted_long_ago.py"


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a command, return its stdout; on failure the test shows all that it said."""
    # Byte-compiling the requirements would take longer than all the rest; pip's own builds inherit the choice.
    environment = {**os.environ, "PIP_COMPILE": "0"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's sources beside the junk of earlier builds: generated C, foreign binaries, a stale build/lib."""
    target = tmp_path_factory.mktemp("sources")
    for folder in FOLDERS:
        junk = shutil.ignore_patterns("__pycache__", "*.so", "*.c", "*_pb2.py*")
        shutil.copytree(ROOT / folder, target / folder, ignore=junk)
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    (target / "tests").mkdir()
    (target / "tests" / "test_nothing.py").write_text("")
    (target / "_fast" / "old.c").write_text("#error left over\n")
    (target / "_fast" / "ipset.cpython-39-x86_64-linux-gnu.so").write_bytes(b"\x7fELF left over")
    (target / "workers" / "router" / "gobgp" / "gobgp_v2_pb2.py").write_text("raise ImportError('left over')\n")
    (target / STALE).parent.mkdir(parents=True)
    (target / STALE).write_text("raise ImportError('left over')\n")
    return target


@pytest.fixture(scope="session")
def sdist(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built by ``python -m build``."""
    target = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-P", "-m", "build", "--sdist", "--outdir", target, sources)
    (made,) = target.glob("*.tar.gz")
    return made


@pytest.fixture(scope="session", params=interpreters(), ids=lambda interpreter: interpreter.version)
def installed(
    request: pytest.FixtureRequest, sdist: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installed]:
    """The wheel that one Python makes of the sdist, installed by that Python into a clean environment."""
    interpreter: Interpreter = request.param
    target = tmp_path_factory.mktemp(f"python{interpreter.version}")
    run(interpreter.path, "-m", "venv", target / "venv")
    pip = (target / "venv/bin/python", "-P", "-m", "pip", "--disable-pip-version-check", "--no-input")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", target, sdist)
    (wheel,) = target.glob("*.whl")
    run(*pip, "install", wheel)
    (packages,) = (target / "venv" / "lib").glob("python3*/site-packages")
    yield Installed(interpreter, wheel, target / "venv" / "bin", packages)
    shutil.rmtree(target / "venv")
