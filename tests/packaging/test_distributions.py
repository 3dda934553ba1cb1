"""What is published: sdist and wheel hold what they should and nothing else, and the wheel works as installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.pythons import Installed, interpreters

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("_fast", "ipc", "supervisor", "workers")


def source_files(root: Path, *patterns: str) -> set[str]:
    """Paths below ``root`` of the sources that match, without generated ones."""
    found = {path for folder in FOLDERS for pattern in patterns for path in (root / folder).rglob(pattern)}
    return {str(path.relative_to(root)) for path in found if not path.stem.endswith("_pb2")}


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of an installed environment with nothing of ours around it."""
    clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONSAFEPATH": "1", **environment}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True, timeout=120)


def test_the_running_python_is_among_the_tested() -> None:
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in {found.version for found in interpreters()}


def test_sdist_holds_the_sources_and_nothing_built(sources: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert source_files(sources, "*.py", "*.pyx", "*.pyi", "*.proto") <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    junk = [
        name
        for name in names
        if name.endswith((".c", ".so", "_pb2.py", "_pb2.pyi")) or name.startswith(("tests", "build", "deploy"))
    ]
    assert junk == []


def test_wheel_holds_modules_extensions_stubs_and_protobuf_modules(sources: Path, installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        names = set(archive.namelist())
    ours = {name.removeprefix("kube_router/") for name in names if name.startswith("kube_router/")}
    assert source_files(sources, "*.py", "*.pyi") <= ours
    assert {f"{folder}/py.typed" for folder in FOLDERS} <= ours
    tag = f"cpython-{installed.interpreter.version.replace('.', '')}-"
    extensions = {Path(name).name.partition(".")[0] for name in ours if name.endswith(".so") and tag in name}
    assert extensions == {Path(name).stem for name in source_files(ROOT, "*.pyx")}
    assert len([name for name in ours if name.endswith(".so")]) == len(extensions)
    generated = {name for name in ours if name.endswith("_pb2.py")}
    assert generated == {f"{name.removesuffix('.proto')}_pb2.py" for name in source_files(sources, "*.proto")}
    assert not [name for name in ours if name.endswith((".c", ".pyx"))]
    assert not [name for name in names if name.split("/")[0] in {"tests", "deploy", "build", *FOLDERS}]
    assert not [name for name in names if "deleted_long_ago" in name]
    assert not [name for name in names if name == "kube_router/__init__.py"], "kube_router is a namespace package"


def test_wheel_metadata(installed: Installed) -> None:
    (info,) = installed.packages.glob("kube_router-*.dist-info")
    metadata = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    scripts = (info / "entry_points.txt").read_text()
    assert "kube-router = kube_router.supervisor.cli:main" in scripts
    assert "kube-routerctl = kube_router.supervisor.ctl:main" in scripts
    assert list((info / "licenses").glob("LICENSE"))


def test_commands_answer(installed: Installed, tmp_path: Path) -> None:
    version = run(installed.bin / "kube-router", "--version", cwd=tmp_path)
    assert version.returncode == 0, version.stderr
    assert "version 0.1.0" in version.stdout + version.stderr
    helped = run(installed.bin / "kube-router", "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    assert "--enable-overlay" in helped.stdout + helped.stderr
    status = run(installed.bin / "kube-routerctl", "--help", cwd=tmp_path)
    assert status.returncode == 0, status.stderr
    assert "status" in status.stdout + status.stderr


IMPORT_ALL = """
import importlib, pathlib, sys
packages = pathlib.Path(sys.argv[1])
modules = sorted((packages / "kube_router").rglob("*.py")) + sorted((packages / "kube_router/_fast").glob("*.so"))
for path in modules:
    parts = path.relative_to(packages).parts
    name = ".".join(parts[:-1] + (parts[-1].partition(".")[0],)).removesuffix(".__init__")
    if not name.endswith("__main__"):
        assert pathlib.Path(importlib.import_module(name).__file__).is_relative_to(packages), name
        print(name)
"""


def test_every_module_imports_with_the_declared_requirements(installed: Installed, tmp_path: Path) -> None:
    done = run(installed.bin / "python", "-c", IMPORT_ALL, installed.packages, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert {f"kube_router._fast.{Path(name).stem}" for name in source_files(ROOT, "*.pyx")} <= imported
    assert "kube_router.supervisor.cli" in imported


def test_requirements_agree(installed: Installed, tmp_path: Path) -> None:
    done = run(installed.bin / "python", "-m", "pip", "check", cwd=tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", sorted(Path(name).stem for name in source_files(ROOT, "*.pyx")))
def test_a_missing_extension_is_an_error_at_start(installed: Installed, tmp_path: Path, module: str) -> None:
    """No slow twin steps in: the worker that needs ``_fast`` ends at once and says which module it misses."""
    (extension,) = (installed.packages / "kube_router" / "_fast").glob(f"{module}.*.so")
    aside = tmp_path / extension.name
    shutil.move(extension, aside)
    try:
        done = run(installed.bin / "python", "-m", "kube_router.workers.router", cwd=tmp_path)
    finally:
        shutil.move(aside, extension)
    assert done.returncode != 0
    assert "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr
    assert module in done.stderr.splitlines()[-1]


def test_our_supervisor_does_not_hide_the_one_we_run_under(installed: Installed, tmp_path: Path) -> None:
    """The repository root as working directory is harmless with the safe path that agents and tests set."""
    code = "import supervisor, kube_router.supervisor as ours; print(supervisor.__file__); print(ours.__file__)"
    done = run(installed.bin / "python", "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [Path(line).is_relative_to(installed.packages) for line in done.stdout.split()] == [True, True]
    assert os.access(installed.bin / "supervisord", os.X_OK)
