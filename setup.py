"""Build of the kube_router distribution: flat folders become subpackages, .pyx are compiled, gobgpd's protos too.

The repository's top-level folders are the subpackages of the namespace package ``kube_router`` (PEP 420), so that the
tree reads as the design does. Raw ``.pyx`` sources are given to setuptools, which runs Cython itself: ``cythonize()``
would replace them by generated C and drop them from the source distribution.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_py import build_py

FOLDERS = ("_fast", "ipc", "supervisor", "workers")
PROTO_FOLDER = Path("workers/router/gobgp")


def subpackages(folder: str) -> list[str]:
    """Dotted names of ``folder`` and of every folder below it that holds a Python module."""
    found = [f"kube_router.{folder}"]
    for path in sorted(Path(folder).rglob("*")):
        if path.is_dir() and path.name != "__pycache__" and any(path.glob("*.py")):
            found.append("kube_router." + ".".join(path.parts))
    return found


def compile_protos(target: Path) -> list[Path]:
    """Compile every ``.proto`` of gobgpd's interface into ``target`` and return the modules written."""
    from grpc_tools import protoc  # a build requirement only: nothing imports it at run time

    target.mkdir(parents=True, exist_ok=True)
    written = []
    for proto in sorted(PROTO_FOLDER.glob("*.proto")):
        status = protoc.main(
            ["protoc", f"-I{PROTO_FOLDER}", f"--python_out={target}", f"--pyi_out={target}", str(proto)]
        )
        if status != 0:
            raise SystemExit(f"protoc failed on {proto} with status {status}")
        written += [target / f"{proto.stem}_pb2.py", target / f"{proto.stem}_pb2.pyi"]
    return written


class BuildPyWithProtos(build_py):
    """``build_py`` that also generates the protobuf modules next to the client that uses them."""

    def run(self) -> None:
        super().run()
        target = PROTO_FOLDER if self.editable_mode else Path(self.build_lib) / "kube_router" / PROTO_FOLDER
        self._generated = compile_protos(target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *map(str, getattr(self, "_generated", []))]


class GenerateProtos(Command):
    """``setup.py protos``: the protobuf modules in the source tree, for linters and type checkers."""

    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        """Nothing to set."""

    def finalize_options(self) -> None:
        """Nothing to check."""

    def run(self) -> None:
        """Generate them."""
        compile_protos(PROTO_FOLDER)


def extensions() -> list[Extension]:
    """One extension for each Cython module of ``_fast``."""
    return [
        Extension(f"kube_router._fast.{source.stem}", [str(source)], extra_compile_args=["-O2"])
        for source in sorted(Path("_fast").glob("*.pyx"))
    ]


PACKAGES = [package for folder in FOLDERS for package in subpackages(folder)]
OPTIONS: dict[str, Any] = {
    "packages": PACKAGES,
    "package_dir": {f"kube_router.{folder}": folder for folder in FOLDERS},
    "package_data": {
        **{f"kube_router.{folder}": ["*.pyi", "py.typed"] for folder in FOLDERS},
        "kube_router.workers.router.gobgp": ["*.proto"],
    },
    "include_package_data": False,
    "ext_modules": extensions(),
    "cmdclass": {"build_py": BuildPyWithProtos, "protos": GenerateProtos},
    "zip_safe": False,
}

if __name__ == "__main__":
    setup(**OPTIONS)
