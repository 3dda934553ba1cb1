"""The linters can fail: a breach planted is found by ruff, by mypy and by each import contract."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("_fast", "ipc", "supervisor", "workers")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
SCRIPTS = Path(sys.executable).parent


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a linter in a copy of the tree, with nothing else around it."""
    clean = {"PATH": "/usr/bin:/bin", "PYTHONSAFEPATH": "1", "HOME": str(cwd), "COLUMNS": "200", **environment}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True, timeout=120)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources as `make lint` lays them out, with the real configuration."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "build" / "types" / "kube_router"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.c"))
    (package / "__init__.py").touch()
    return tmp_path


def lint_imports(tree: Path, contract: str) -> subprocess.CompletedProcess[str]:
    """Check one contract of the real configuration."""
    command = (SCRIPTS / "lint-imports", "--no-cache", "--no-logo", "--contract", contract)
    return run(*command, cwd=tree, PYTHONPATH=str(tree / "build" / "types"))


# contract -> the module that breaks it, and what it says to do so
BREACHES = {
    "folders": [("ipc/planted.py", "import kube_router.workers.model"), ("_fast/planted.py", "import kube_router.ipc")],
    "workers": [
        ("workers/cni/planted.py", "import kube_router.workers.router.names"),
        ("workers/kernel/planted.py", "import kube_router.workers.runtime"),
        ("workers/planted.py", "'''A shared module that no layer names.'''"),
    ],
    "pure": [
        *((f"workers/{worker}/desired.py", f"import {name}") for worker, name in (("cni", "os"), ("router", "socket"))),
        *(("workers/cni/plan.py", f"import {name}") for name in ("subprocess", "time", "random", "zmq", "pyroute2")),
        ("workers/router/plan.py", "import kube_router.workers.kernel.routes"),
        ("supervisor/conf.py", "import os"),
    ],
    "zmq": [("workers/router/planted.py", "import zmq"), ("supervisor/planted.py", "from zmq import Context")],
    "kubernetes": [("workers/cni/planted.py", "from kubernetes import client")],
    "grpc": [("workers/router/planted.py", "import grpc"), ("supervisor/planted.py", "import google.protobuf")],
    "aws": [("workers/router/aws.py", "import botocore"), ("workers/watcher/planted.py", "from boto3 import client")],
    "kernel": [
        ("workers/router/planted.py", "import subprocess"),
        ("workers/watcher/planted.py", "import pyroute2"),
        ("supervisor/planted.py", "import pyroute2"),
    ],
}


def test_every_contract_has_a_breach() -> None:
    assert {contract["id"] for contract in CONTRACTS} == set(BREACHES)


@pytest.mark.parametrize("contract", sorted(BREACHES))
def test_contract_is_kept(tree: Path, contract: str) -> None:
    done = lint_imports(tree, contract)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("contract", "module", "statement"),
    [(contract, *breach) for contract, breaches in sorted(BREACHES.items()) for breach in breaches],
)
def test_planted_import_breaks_the_contract(tree: Path, contract: str, module: str, statement: str) -> None:
    path = tree / "build" / "types" / "kube_router" / module
    existing = path.read_text() if path.exists() else '"""Planted."""\n'
    path.write_text(f"{existing}\n{statement}\n")
    done = lint_imports(tree, contract)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "0 kept, 1 broken" in done.stdout
    assert Path(module).stem in done.stdout


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ('"""Planted."""\n\nimport os\n', "F401"),
        ('"""Planted."""\n\nimport sys\nimport os\n\nprint(os, sys)\n', "I001"),
        ('"""Planted."""\n\nLONG = "' + "x" * 120 + '"\n', "E501"),
        ('"""Planted."""\n\n\ndef public() -> None:\n    pass\n', "D103"),
        ('"""Planted."""\n\ntry:\n    pass\nexcept Exception:\n    pass\n', "BLE001"),
        ('"""Planted."""\n\n\ndef _f(found: list[int] = []) -> None:\n    """Do nothing."""\n', "B006"),
        ('"""Planted."""\n\nimport subprocess\n\nsubprocess.run("true", shell=True, check=True)\n', "S602"),
    ],
)
def test_ruff_finds_a_planted_breach(tmp_path: Path, code: str, rule: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "workers").mkdir()
    clean = tmp_path / "workers" / "clean.py"
    clean.write_text('"""Nothing wrong here."""\n')
    command = (SCRIPTS / "ruff", "check", "--no-cache", "--output-format=concise", ".")
    assert run(*command, cwd=tmp_path).returncode == 0
    (tmp_path / "workers" / "planted.py").write_text(code)
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert rule in done.stdout


def test_ruff_finds_planted_bad_format(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "planted.py").write_text("x = {'a':1}\n")
    done = run(SCRIPTS / "ruff", "format", "--no-cache", "--check", ".", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "planted.py" in done.stdout


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("from kube_router._fast.ipset import pack_members\n\nx: str = pack_members([], 4)\n", "assignment"),
        ("from kube_router._fast.tunnelname import tunnel_name\n\ntunnel_name(1)\n", "arg-type"),
        ("def f(x):\n    return x\n", "no-untyped-def"),
        ("x = 1  # type: ignore\n", "unused-ignore"),
        ("import no_such_module_anywhere\n", "import-not-found"),
    ],
)
def test_mypy_finds_a_planted_breach(tmp_path: Path, code: str, error: str) -> None:
    """In a small tree: `_fast`, whose stubs are what is checked, and one worker."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "build" / "types" / "kube_router"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.c")
    shutil.copytree(ROOT / "_fast", package / "_fast", ignore=ignored)
    (package / "workers").mkdir()
    for init in (package / "__init__.py", package / "workers" / "__init__.py"):
        init.touch()
    command = (SCRIPTS / "mypy", "--cache-dir", tmp_path / "cache", "-p", "kube_router")
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    (package / "workers" / "planted.py").write_text(code)
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"[{error}]" in done.stdout
    assert "planted.py" in done.stdout
