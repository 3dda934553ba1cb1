"""The name of table 77 in ``rt_tables``: one real line, put in once, taken out exactly, and nothing else touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from kube_router.workers.kernel.rttables import FOLDERS, declare_table, forget_table

DEFAULT = "255\tlocal\n254\tmain\n253\tdefault\n0\tunspec\n#\n# local\n#\n#1\tinr.ruhep\n"


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    path = tmp_path / "etc/iproute2/rt_tables"
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize(
    "content",
    [
        DEFAULT,
        DEFAULT.rstrip("\n"),
        "",
        "78 kube-router-dsr\n",
        "# 77 kube-router\n",
        "177 main2 # 77 kube-router\n",
        "\xff odd bytes\n",
    ],
)
def test_the_line_is_added_once_and_taken_out_again(tmp_path: Path, etc: Path, content: str) -> None:
    etc.write_bytes(content.encode("latin-1"))
    etc.chmod(0o640)
    assert declare_table(str(tmp_path)) is None
    text = etc.read_bytes()
    assert text.decode("latin-1").splitlines()[-1] == "77 kube-router"
    assert text.startswith(content.encode("latin-1"))
    assert etc.stat().st_mode & 0o777 == 0o640
    before = etc.stat()
    assert declare_table(str(tmp_path)) is None
    assert etc.stat().st_ino == before.st_ino  # not written again
    assert forget_table(str(tmp_path)) is None
    kept = content if not content or content.endswith("\n") else content + "\n"
    assert etc.read_bytes() == kept.encode("latin-1")


@pytest.mark.parametrize("line", ["77 kube-router", "77\tkube-router", "0x4d kube-router", "  77  kube-router # ours"])
def test_a_line_that_is_there_is_enough(tmp_path: Path, etc: Path, line: str) -> None:
    etc.write_text(f"{DEFAULT}{line}\n")
    assert declare_table(str(tmp_path)) is None
    assert etc.read_text() == f"{DEFAULT}{line}\n"
    assert forget_table(str(tmp_path)) is None
    assert (line in etc.read_text()) == (line != "77 kube-router")  # only what we would have written


@pytest.mark.parametrize("line", ["77 other", "0x4d other", "78 kube-router"])
def test_a_conflict_is_told_and_left_alone(tmp_path: Path, etc: Path, line: str) -> None:
    etc.write_text(f"{DEFAULT}{line}\n")
    problem = declare_table(str(tmp_path))
    assert problem == (f"{etc}: '{line}' is in the way: table 77 is used all the same, without a name there")
    assert etc.read_text() == f"{DEFAULT}{line}\n"


@pytest.mark.parametrize("first", range(3))
def test_the_first_file_that_exists_is_taken(tmp_path: Path, first: int) -> None:
    paths = [tmp_path / folder.lstrip("/") / "rt_tables" for folder in FOLDERS]
    for path in paths:
        path.parent.mkdir(parents=True)
    for path in paths[first:]:
        path.write_text(DEFAULT)
    assert declare_table(str(tmp_path)) is None
    assert [path.exists() and "77 kube-router\n" in path.read_text() for path in paths] == [
        number == first for number in range(3)
    ]


def test_without_any_file_one_is_made_where_its_folder_is(tmp_path: Path) -> None:
    assert declare_table(str(tmp_path)) is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "etc/iproute2").mkdir(parents=True)
    assert declare_table(str(tmp_path)) is None
    assert (tmp_path / "etc/iproute2/rt_tables").read_text() == "77 kube-router\n"


def test_what_cannot_be_read_is_one_line(tmp_path: Path, etc: Path) -> None:
    etc.mkdir()
    for problem in (declare_table(str(tmp_path)), forget_table(str(tmp_path))):
        assert problem is not None
        assert str(etc) in problem
