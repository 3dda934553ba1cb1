"""Atomic replacement of files and hearing of their changes, on a real file system; the cni worker's use of both."""

from __future__ import annotations

import errno
import ipaddress
import os
import resource
import select
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kube_router.workers.cni.host import MOST_CONF_BYTES, Host
from kube_router.workers.cni.plan import Plan, RecordRanges, WriteConf
from kube_router.workers.kernel.files import read_file, replace_file
from kube_router.workers.kernel.filewatch import FileWatch
from kube_router.workers.linkfacts import Links


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.d" / "10-kuberouter.conflist"


@pytest.fixture
def folder(file: Path) -> Path:
    file.parent.mkdir()
    return file.parent


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- replacing


def test_a_new_file_has_the_mode_that_was_asked_for_whatever_the_umask(folder: Path, file: Path) -> None:
    before = os.umask(0o077)
    try:
        assert replace_file(str(file), b"new")
    finally:
        os.umask(before)
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (b"new", 0o644)


def test_mode_and_owner_of_an_old_file_are_kept(folder: Path, file: Path) -> None:
    file.write_bytes(b"old")
    file.chmod(0o600)
    os.chown(file, 12345, 54321)
    replace_file(str(file), b"new")
    after = file.stat()
    assert (stat.S_IMODE(after.st_mode), after.st_uid, after.st_gid) == (0o600, 12345, 54321)


def test_the_same_content_is_not_written(folder: Path, file: Path) -> None:
    file.write_bytes(b"same")
    before = file.stat()
    assert replace_file(str(file), b"same") is False
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_reader_keeps_the_whole_old_file(folder: Path, file: Path) -> None:
    file.write_bytes(b"old")
    with file.open("rb") as reader:
        replace_file(str(file), b"newer")
        assert reader.read() == b"old"


def test_a_symbolic_link_stays_and_its_target_is_replaced(folder: Path, file: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_bytes(b"old")
    file.symlink_to("../elsewhere")
    replace_file(str(file), b"new")
    assert file.is_symlink() and target.read_bytes() == b"new"
    assert names(tmp_path) == ["elsewhere", "net.d"] and names(folder) == [file.name]


def test_left_overs_of_a_crash_and_a_planted_link_do_no_harm(folder: Path, file: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (folder / f".{file.name}.kube-router-new").symlink_to(victim)
    replace_file(str(file), b"new")
    assert (file.read_bytes(), victim.read_bytes(), names(folder)) == (b"new", b"precious", [file.name])


def test_the_temporary_name_is_none_that_a_runtime_reads(folder: Path, file: Path) -> None:
    """libcni reads every file of the folder that ends in .conf, .conflist or .json."""
    with FileWatch(str(file.with_name(f".{file.name}.kube-router-new"))) as watch:
        replace_file(str(file), b"new")
        assert watch.drain()


def test_a_full_disk_changes_nothing_and_leaves_nothing(folder: Path, file: Path) -> None:
    file.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # EFBIG is what this process can bring about
    try:
        with pytest.raises(OSError, match="File too large") as refused:
            replace_file(str(file), b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused.value.errno == errno.EFBIG
    assert (file.read_bytes(), names(folder)) == (b"old", [file.name])


def test_no_folder_is_an_error(file: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_file(str(file), b"new")


# --- reading


def test_reading_is_bounded(folder: Path, file: Path) -> None:
    file.write_bytes(b"12345")
    assert read_file(str(file), 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_file(str(file), 4)


def test_what_is_no_file_is_an_error_and_never_waits(folder: Path, file: Path) -> None:
    os.mkfifo(file)
    for path in (file, folder):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            read_file(str(path), 5)


# --- hearing


@pytest.fixture
def watch(folder: Path, file: Path) -> Iterator[FileWatch]:
    file.write_bytes(b"old")
    with FileWatch(str(file)) as watch:
        yield watch


def heard(watch: FileWatch) -> bool:
    return bool(select.select([watch], [], [], 1.0)[0]) and watch.drain()


def test_writing_replacing_moving_and_deleting_are_heard(watch: FileWatch, folder: Path, file: Path) -> None:
    file.write_bytes(b"in place")
    assert heard(watch)
    replace_file(str(file), b"by rename")
    assert heard(watch)
    file.rename(folder / "away")
    assert heard(watch)
    file.symlink_to("away")
    assert heard(watch)
    file.unlink()
    assert heard(watch)


def test_others_and_half_written_files_are_not_heard(watch: FileWatch, folder: Path, file: Path) -> None:
    (folder / "99-loopback.conf").write_text("{}")
    file.unlink()
    assert heard(watch)
    with file.open("wb") as writer:
        writer.write(b"half")
        writer.flush()
        assert not watch.drain()
    assert heard(watch)


def test_the_target_of_a_link_is_heard(folder: Path, file: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_bytes(b"old")
    file.symlink_to(target)
    with FileWatch(str(file)) as watch:
        target.write_bytes(b"new")
        assert heard(watch)


def test_a_folder_that_comes_later_is_followed(file: Path) -> None:
    with FileWatch(str(file)) as watch:
        file.parent.mkdir()
        watch.follow()
        file.write_bytes(b"new")
        assert heard(watch)
        file.unlink()
        file.parent.rmdir()
        assert heard(watch)
        file.parent.mkdir()
        watch.follow()
        file.write_bytes(b"again")
        assert heard(watch)


# --- the worker's use


@pytest.fixture
def host(file: Path, tmp_path: Path) -> Iterator[Host]:
    host = Host(str(file), str(tmp_path / "state"))
    yield host
    host.close()


RANGES = (ipaddress.ip_network("10.0.0.0/24"), ipaddress.ip_network("fd00::/64"))


def conf_of(host: Host) -> tuple[str | None, str, object]:
    conf = host.observe(Links(), ()).conf
    assert conf is not None
    return conf.text, conf.error or "", conf.recorded


def test_record_and_file_are_read_back(host: Host, folder: Path, file: Path, tmp_path: Path) -> None:
    applied = host.apply(Plan((RecordRanges(str(file), RANGES), WriteConf(str(file), "{}", "test"))))
    assert (applied.writes, applied.failures) == (2, ())
    assert conf_of(host) == ("{}", "", RANGES)
    assert stat.S_IMODE((tmp_path / "state" / "cni").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version":2,"conf":"CONF","ranges":[]}',
        b'{"version":1,"conf":"/another/file","ranges":[]}',
        b'{"version":1,"conf":"CONF","ranges":["x"]}',
    ],
)
def test_a_record_that_is_not_for_this_file_is_none(host: Host, file: Path, tmp_path: Path, content: bytes) -> None:
    record = tmp_path / "state" / "cni" / "ranges.json"
    record.parent.mkdir(parents=True)
    record.write_bytes(content.replace(b"CONF", str(file).encode()))
    assert conf_of(host)[2] is None


def test_why_a_file_has_no_text(host: Host, folder: Path, file: Path) -> None:
    assert "does not exist" in conf_of(host)[1]
    file.write_bytes(b'{"name": "\xff"}')
    assert "not UTF-8 at byte 10" in conf_of(host)[1]
    file.write_bytes(b" " * (MOST_CONF_BYTES + 1))
    assert "larger than 1048576 bytes" in conf_of(host)[1]
    file.unlink()
    file.mkdir()
    assert "not a regular file" in conf_of(host)[1] or "directory" in conf_of(host)[1]
    assert conf_of(host)[0] is None


def test_without_a_record_the_file_is_not_written(host: Host, folder: Path, file: Path, tmp_path: Path) -> None:
    """Ranges that nobody knows for his own would stay for ever."""
    (tmp_path / "state").write_text("in the way of the folder")
    file.write_text("old")
    applied = host.apply(Plan((RecordRanges(str(file), RANGES), WriteConf(str(file), "new", "test"))))
    assert applied.writes == 0
    assert [failure.phase for failure in applied.failures] == ["cni-file"]
    assert str(file) in applied.failures[0].text and "10.0.0.0/24" in applied.failures[0].text
    assert file.read_text() == "old"
