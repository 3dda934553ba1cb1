"""A directory of manifests: the catalogue by hand, and the source on a real directory with real inotify."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.follower import Follower

from kube_router.ipc.messages import Kind, Node, Projection
from kube_router.workers.watcher.manifestfile import parse_manifest
from kube_router.workers.watcher.manifests import Catalogue, DirectoryWatch, ManifestSource

NODES: tuple[Kind, ...] = ("nodes",)
SOON = 2.0
"""Ten times the 200 ms in which a change must be seen; the look without a reason comes after 5 s."""


def node(name: str, provider: str = "") -> str:
    return f"apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{providerID: '{provider}'}}\n---\n"


def broken_node(name: str) -> str:
    return f"apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{providerID: 3}}\n---\n"


# --- the catalogue


def read(catalogue: Catalogue, name: str, text: str) -> None:
    catalogue.read(name, parse_manifest(text.encode()))


def cluster(catalogue: Catalogue) -> tuple[dict[str, Projection], tuple[str, ...]]:
    objects, errors = catalogue.cluster()
    return objects["nodes"], errors


def test_first_file_by_name_wins_whatever_is_read_first() -> None:
    for order in (("a.yaml", "b.yaml"), ("b.yaml", "a.yaml")):
        catalogue = Catalogue(NODES)
        for name in order:
            read(catalogue, name, node("n", name))
        objects, errors = cluster(catalogue)
        assert objects == {"n": Node(name="n", provider_id="a.yaml")}
        assert errors == ("b.yaml: Node n is also in a.yaml, which counts",)
        catalogue.removed("a.yaml")
        assert cluster(catalogue) == ({"n": Node(name="n", provider_id="b.yaml")}, ())


def test_twice_in_one_file_the_first_counts() -> None:
    catalogue = Catalogue(NODES)
    read(catalogue, "a.yaml", node("n", "1") + node("n", "2"))
    objects, errors = cluster(catalogue)
    assert objects == {"n": Node(name="n", provider_id="1")}
    assert errors == ("a.yaml: Node n twice in this file: the first one counts",)


def test_failed_file_keeps_its_last_content() -> None:
    catalogue = Catalogue(NODES)
    read(catalogue, "a.yaml", node("n"))
    catalogue.failed("a.yaml", "line 3: nonsense")
    assert cluster(catalogue) == ({"n": Node(name="n")}, ("a.yaml: line 3: nonsense",))
    read(catalogue, "a.yaml", node("m"))
    assert cluster(catalogue) == ({"m": Node(name="m")}, ())


def test_broken_object_keeps_its_last_form_and_hides_no_other() -> None:
    catalogue = Catalogue(NODES)
    read(catalogue, "a.yaml", node("n", "good") + node("m", "1"))
    read(catalogue, "a.yaml", broken_node("n") + node("m", "2") + broken_node("new"))
    objects, errors = cluster(catalogue)
    assert objects == {"n": Node(name="n", provider_id="good"), "m": Node(name="m", provider_id="2")}
    assert [line.partition(": $")[0] for line in errors] == ["a.yaml, line 1: Node n", "a.yaml, line 11: Node new"]
    read(catalogue, "a.yaml", node("m", "2"))
    assert cluster(catalogue) == ({"m": Node(name="m", provider_id="2")}, ())


def test_kinds_that_nobody_reads_cost_nothing_and_complain_of_nothing() -> None:
    catalogue = Catalogue(("pods",))
    read(catalogue, "a.yaml", node("n") + broken_node("m"))
    assert catalogue.cluster() == ({"pods": {}}, ())


def test_what_an_earlier_run_knew_stays_while_a_file_was_never_read() -> None:
    earlier = [("nodes", Node(name=name)) for name in ("in-good", "in-bad", "moved")]
    catalogue = Catalogue(NODES, earlier)  # type: ignore[arg-type]
    catalogue.failed("bad.yaml", "line 1: nonsense")
    read(catalogue, "good.yaml", node("in-good") + node("moved"))
    assert set(cluster(catalogue)[0]) == {"in-good", "in-bad", "moved"}
    read(catalogue, "good.yaml", node("in-good"))
    assert set(cluster(catalogue)[0]) == {"in-good", "in-bad"}, "a file that was read once decides on its objects"
    read(catalogue, "bad.yaml", node("else"))
    assert set(cluster(catalogue)[0]) == {"in-good", "else"}


def test_what_an_earlier_run_knew_goes_when_all_files_were_read() -> None:
    catalogue = Catalogue(NODES, [("nodes", Node(name="old"))])
    read(catalogue, "good.yaml", node("new"))
    assert set(cluster(catalogue)[0]) == {"new"}
    catalogue.failed("later.yaml", "line 1: nonsense")
    assert set(cluster(catalogue)[0]) == {"new"}


# --- the source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "manifests"
    made.mkdir()
    (made / "a.yaml").write_text(node("a"))
    return made


@pytest.fixture
def follower(folder: Path) -> Iterator[Follower]:
    with Follower(ManifestSource(folder, NODES), NODES) as running:
        running.until_listed()
        yield running


def names(follower: Follower) -> set[str]:
    return set(follower.objects("nodes"))


def provider(follower: Follower, name: str) -> str:
    item = follower.objects("nodes").get(name)
    return item.provider_id if isinstance(item, Node) else "-"


def atomic_write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


CHANGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "new file": (lambda folder: (folder / "b.yaml").write_text(node("b")), {"a", "b"}),
    "new .yml": (lambda folder: (folder / "b.yml").write_text(node("b")), {"a", "b"}),
    "new .json": (
        lambda folder: (folder / "b.json").write_text('{"apiVersion":"v1","kind":"Node","metadata":{"name":"b"}}'),
        {"a", "b"},
    ),
    "in place": (lambda folder: (folder / "a.yaml").write_text(node("c")), {"c"}),
    "appended": (lambda folder: (folder / "a.yaml").open("a").write(node("b")), {"a", "b"}),
    "atomic rename": (lambda folder: atomic_write(folder / "a.yaml", node("c")), {"c"}),
    "moved in": (lambda folder: atomic_write(folder / "b.yaml", node("b")), {"a", "b"}),
    "deleted": (lambda folder: (folder / "a.yaml").unlink(), set()),
    "moved out": (lambda folder: (folder / "a.yaml").rename(folder.parent / "a.yaml"), set()),
    "renamed": (lambda folder: (folder / "a.yaml").rename(folder / "z.yaml"), {"a"}),
    "renamed away": (lambda folder: (folder / "a.yaml").rename(folder / "a.yaml~"), set()),
    "emptied": (lambda folder: (folder / "a.yaml").write_text(""), set()),
    "hard link": (lambda folder: ((folder.parent / "x").write_text(node("b")), os.link(folder.parent / "x", folder / "b.yaml")), {"a", "b"}),  # noqa: E501
    "symbolic link": (lambda folder: ((folder.parent / "x").write_text(node("b")), (folder / "b.yaml").symlink_to("../x")), {"a", "b"}),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_seen_soon(follower: Follower, folder: Path, change: str) -> None:
    act, expected = CHANGES[change]
    act(folder)
    follower.until(lambda: names(follower) == expected, SOON)
    assert not follower.seen


def test_same_size_in_the_same_moment_is_seen(follower: Follower, folder: Path) -> None:
    for number in range(10):
        (folder / "a.yaml").write_text(node("a", str(number)))
        follower.until(lambda number=number: provider(follower, "a") == str(number), SOON)  # type: ignore[misc]


IGNORED = {
    "dotfile": lambda folder: (folder / ".hidden.yaml").write_text(node("b")),
    "backup": lambda folder: (folder / "b.yaml~").write_text(node("b")),
    "vim": lambda folder: (folder / ".a.yaml.swp").write_text("b0VIM"),
    "other suffix": lambda folder: (folder / "README.md").write_text(node("b")),
    "sub-directory": lambda folder: ((folder / "sub").mkdir(), (folder / "sub" / "b.yaml").write_text(node("b"))),
    "directory with the suffix": lambda folder: (folder / "dir.yaml").mkdir(),
}


@pytest.mark.parametrize("name", IGNORED)
def test_other_files_are_ignored(follower: Follower, folder: Path, name: str) -> None:
    IGNORED[name](folder)
    (folder / "end.yaml").write_text(node("end"))
    follower.until(lambda: "end" in names(follower), SOON)
    assert names(follower) == {"a", "end"}
    assert not follower.seen


def test_config_map_volume_is_followed(tmp_path: Path) -> None:
    folder = tmp_path / "mount"
    folder.mkdir()

    def version(stamp: str, files: dict[str, str]) -> None:
        """What kubelet does: a new directory, then ``..data`` swapped by rename, then the old one removed."""
        (folder / stamp).mkdir()
        for name, text in files.items():
            (folder / stamp / name).write_text(text)
        (folder / "..data_tmp").symlink_to(stamp)
        (folder / "..data_tmp").replace(folder / "..data")
        for name in files:
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(f"..data/{name}")
        for old in folder.glob("..20*"):
            if old.name != stamp:
                shutil.rmtree(old)

    version("..2026_1", {"a.yaml": node("a", "1")})
    with Follower(ManifestSource(folder, NODES), NODES) as follower:
        follower.until(lambda: provider(follower, "a") == "1")
        version("..2026_2", {"a.yaml": node("a", "2"), "b.yaml": node("b")})
        follower.until(lambda: provider(follower, "a") == "2" and "b" in names(follower), SOON)
        version("..2026_3", {"a.yaml": node("a", "3"), "b.yaml": node("b")})
        follower.until(lambda: provider(follower, "a") == "3", SOON)
        assert not follower.gone


def test_file_behind_another_link_is_looked_at_without_an_event(tmp_path: Path, folder: Path) -> None:
    target = tmp_path / "target"
    target.write_text(node("b", "1"))
    (folder / "b.yaml").symlink_to(target)
    with Follower(ManifestSource(folder, NODES), NODES) as follower:
        follower.until_listed()
        target.write_text(node("b", "22"))
        follower.until(lambda: provider(follower, "b") == "22")


def test_file_that_does_not_parse_keeps_its_content_and_names_the_line(follower: Follower, folder: Path) -> None:
    (folder / "a.yaml").write_text("apiVersion: v1\nkind: Node\nmetadata: {name: [\n")
    follower.until(lambda: bool(follower.troubles), SOON)
    [text] = follower.troubles.values()
    assert text.startswith("manifest a.yaml: line 4: ")
    assert names(follower) == {"a"}
    (folder / "b.yaml").write_text(node("b"))
    follower.until(lambda: names(follower) == {"a", "b"}, SOON)
    (folder / "a.yaml").write_text(node("a2"))
    follower.until(lambda: names(follower) == {"a2", "b"} and not follower.troubles, SOON)
    assert follower.gone == ["a"]


def test_bad_file_that_is_deleted_is_forgotten(follower: Follower, folder: Path) -> None:
    (folder / "a.yaml").write_text("{")
    follower.until(lambda: bool(follower.troubles), SOON)
    (folder / "a.yaml").unlink()
    follower.until(lambda: names(follower) == set() and not follower.troubles, SOON)


def test_huge_file_is_refused_without_reading_it_all(follower: Follower, folder: Path) -> None:
    with (folder / "b.yaml").open("wb") as file:
        file.truncate(100 << 20)
    follower.until(lambda: "manifest b.yaml: more than 16 MiB" in follower.troubles)
    (folder / "c.yaml").write_text(node("c"))
    follower.until(lambda: names(follower) == {"a", "c"}, SOON)


def test_dangling_link_and_pipe_are_troubles_and_hold_nothing_up(follower: Follower, folder: Path) -> None:
    (folder / "b.yaml").symlink_to("nowhere")
    os.mkfifo(folder / "c.yaml")
    follower.until(lambda: "manifest b.yaml: cannot be read: No such file or directory" in follower.troubles, SOON)
    (folder / "d.yaml").write_text(node("d"))
    follower.until(lambda: names(follower) == {"a", "d"}, SOON)


def test_half_written_file_is_waited_for(follower: Follower, folder: Path) -> None:
    with (folder / "b.yaml").open("w") as file:
        file.write("apiVersion: v1\nkind: Node\nmetadata: {name: ")
        file.flush()
        follower.watch_quietly(0.3)
        assert not follower.seen
        file.write("b}\n")
    follower.until(lambda: names(follower) == {"a", "b"}, SOON)
    assert not follower.seen


def test_directory_that_vanishes_deletes_nothing_and_is_found_again(follower: Follower, folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    follower.until(lambda: bool(follower.troubles), SOON)
    assert list(follower.troubles) == [f"manifests {folder}: No such file or directory: keeping what was read last"]
    assert names(follower) == {"a"}
    folder.mkdir()
    (folder / "b.yaml").write_text(node("b"))
    follower.until(lambda: names(follower) == {"b"} and not follower.troubles, SOON)
    (folder / "c.yaml").write_text(node("c"))
    follower.until(lambda: names(follower) == {"b", "c"}, SOON)


def test_missing_directory_is_no_empty_cluster(tmp_path: Path) -> None:
    folder = tmp_path / "late"
    with Follower(ManifestSource(folder, NODES), NODES) as follower:
        follower.until(lambda: bool(follower.troubles))
        assert not follower.store.listed
        folder.mkdir()
        follower.until_listed()
        assert names(follower) == set()


def test_no_inotify_means_polling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("kube_router.workers.watcher.manifests.INotify", refuse)
    with Follower(ManifestSource(folder, NODES), NODES) as follower:
        follower.until(lambda: bool(follower.troubles))
        assert list(follower.troubles) == [f"manifests {folder}: no inotify (Too many open files): polling instead"]
        (folder / "b.yaml").write_text(node("b"))
        follower.until(lambda: names(follower) == {"a", "b"}, SOON)


def test_many_quick_changes_end_in_the_last_state(follower: Follower, folder: Path) -> None:
    for number in range(300):
        atomic_write(folder / f"f{number % 7}.yaml", node(f"x{number}"))
    follower.until(lambda: names(follower) == {"a", *(f"x{number}" for number in range(293, 300))}, SOON)


def test_overflowing_queue_reads_all_again(folder: Path) -> None:
    watch = DirectoryWatch(folder)
    watch.ensure()
    assert watch._inotify is not None
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for number in range(limit + 100):
        (folder / f"n{number % 5}").touch()
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    watch.wait(wake)
    os.close(wake)
    assert watch._watching is None
    watch.ensure()
    assert watch._watching is not None
    watch.close()


def test_stop_ends_the_thread(folder: Path) -> None:
    source = ManifestSource(folder, NODES)
    with Follower(source, NODES) as follower:
        follower.until_listed()
        began = time.monotonic()
    assert time.monotonic() - began < 2.0
    assert not any(thread.name == "manifests" and thread is source._thread for thread in threading.enumerate())
