"""A running agent whose flags and passwords change: just what must be restarted is, and bad content changes nothing."""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.topology import NODES, namespace_manifest, node_manifest
from support.agent import Agent, new_agent, status_fields, wait_until

from kube_router.supervisor.programs import SPEAKER_USER

FLAGS = ["--enable-ipv6", "--bgp-holdtime=60s", "--iptables-sync-period=2m"]
WORKERS = ("watcher", "gobgpd", "router", "cni", "firewall", "health", "reload")
SECRET, OTHER = "erstes-geheimnis", "zweites-geheimnis"


def encoded(password: str) -> str:
    return base64.b64encode(password.encode()).decode()


class Files:
    """A folder as kubelet makes it of a ConfigMap or a Secret: every update is one swap of the link ``..data``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        folder.mkdir()

    def write(self, **contents: str) -> None:
        """Replace all files at once."""
        old = self.folder / f"..version{self._number}"
        self._number += 1
        new = self.folder / f"..version{self._number}"
        new.mkdir()
        for name, text in contents.items():
            (new / name).write_text(text)
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        (self.folder / "..data_tmp").symlink_to(new.name)
        (self.folder / "..data_tmp").rename(self.folder / "..data")
        if old.exists():
            for path in old.iterdir():
                path.unlink()
            old.rmdir()


class Running:
    """The agent, its files, and what is compared."""

    def __init__(self, agent: Agent, files: Files) -> None:
        self.agent, self.files = agent, files
        self.mark = 0
        self.normal: dict[str, Any] = {}
        self.ended = False

    def write(self, *flags: str, passwords: str = encoded(SECRET)) -> None:
        """Give these flags, behind a comment."""
        self.mark = self.agent.log_path.stat().st_size if self.agent.log_path.exists() else 0
        self.files.write(flags="\n".join(["# of the test", *flags]) + "\n", passwords=passwords + "\n")

    def pids(self) -> dict[str, int]:
        return {name: item["pid"] for name, item in self.agent.table().items()}

    def lines(self, *words: str) -> list[str]:
        """The log lines since the last write that hold all words."""
        text = self.agent.log_path.read_bytes()[self.mark :].decode(errors="replace")
        return [line for line in text.splitlines() if all(word in line for word in words)]

    def said(self, *words: str) -> str:
        assert wait_until(lambda: self.lines(*words)), (words, self.agent.log[-3000:])
        return self.lines(*words)[0]

    def settings(self) -> dict[str, Any]:
        found = json.loads((self.agent.run_dir / "ipc" / "settings.json").read_text())
        assert isinstance(found, dict)
        return found

    def settled(self) -> bool:
        """Nothing is left to do, and everything runs."""
        path = self.agent.run_dir / "reload.json"
        pending = json.loads(path.read_text())["pending"] if path.exists() else []
        return not pending and all(item["state"] == "RUNNING" for item in self.agent.table().values())

    def restarted(self, before: dict[str, int]) -> set[str]:
        """Programs that run in another process than before, once all is done."""
        assert wait_until(self.settled, 20), (self.agent.table(), self.agent.log[-3000:])
        after = self.pids()
        return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}

    def status(self) -> dict[str, Any]:
        found = json.loads(self.agent.ctl("status", "-o", "json").stdout)
        assert isinstance(found, dict)
        return found

    def warnings(self) -> list[str]:
        return [line for line in self.status()["warnings"] if line.startswith("reload: ")]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("reload")
    manifests = folder / "manifests"
    manifests.mkdir()
    (manifests / "node1.yaml").write_text(json.dumps(node_manifest(NODES[0])))
    (manifests / "default.yaml").write_text(json.dumps(namespace_manifest("default")))
    files = Files(folder / "etc")
    with new_agent(folder) as agent:
        agent.environment["KUBE_ROUTER_CNI_CONF_FILE"] = str(folder / "cni.conflist")
        agent.arguments = [
            f"--flags-file={files.folder}/flags",
            f"--peer-router-passwords-file={files.folder}/passwords",
            f"--manifests={manifests}",
            f"--run-dir={agent.run_dir}",
            f"--state-dir={folder / 'state'}",
            "--hostname-override=node1",
            "--run-service-proxy=false",
            "--enable-overlay=false",
            "--peer-router-ips=192.0.2.1",
            "--peer-router-asns=64999",
            "--iptables-sync-period=3m",
            "--metrics-port=20241",
        ]
        found = Running(agent, files)
        found.write(*FLAGS)
        agent.open_to_others()
        agent.addresses = [str(address.ip) for address in NODES[0].addresses]
        agent.start()
        agent.wait_running(*WORKERS)
        found.normal = found.settings()
        yield found


@pytest.fixture(autouse=True)
def as_before(running: Running) -> Iterator[None]:
    """Every test begins and ends with `FLAGS`."""
    yield
    if running.ended:
        return
    running.write(*FLAGS)
    normal = lambda: running.settings() == running.normal and running.settled() and not running.warnings()  # noqa: E731
    assert wait_until(normal, 20), (running.settings(), running.agent.table(), running.agent.log[-3000:])
    assert not running.lines("Traceback")
    assert SECRET not in running.agent.log and encoded(SECRET) not in running.agent.log
    assert OTHER not in running.agent.log and encoded(OTHER) not in running.agent.log


def test_the_file_lies_under_the_command_line(running: Running) -> None:
    settings = running.settings()
    assert (settings["enable_ipv6"], settings["bgp_holdtime"], settings["iptables_sync_period"]) == (True, 60, 180)
    assert oct((running.agent.run_dir / "launch.json").stat().st_mode & 0o777) == "0o600"


def test_just_the_program_that_reads_a_changed_flag_is_restarted(running: Running) -> None:
    before = running.pids()
    running.write(*FLAGS, "--use-nftables-for-netpol")
    running.said("reload", "--use-nftables-for-netpol=false -> true", "restart firewall")
    assert running.restarted(before) == {"firewall"}
    assert running.settings()["use_nftables_for_netpol"] is True


def test_a_file_written_in_place_is_followed(running: Running) -> None:
    before = running.pids()
    running.mark = running.agent.log_path.stat().st_size
    (running.files.folder / "flags").write_text("\n".join([*FLAGS, "--injected-routes-sync-period=30s"]))
    running.said("--injected-routes-sync-period=60s -> 30s", "restart router")
    assert running.restarted(before) == {"router"}


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--bgp-port=0", ':5: --bgp-port="0": must be from 1 to 65535'),
        ("--no-such-flag=1", ":5: unknown flag: --no-such-flag"),
        ("--enable-ipv4=maybe", ':5: invalid argument "maybe" for "--enable-ipv4" flag'),
        ("--metrics-port=20241\n--health-port=20241", "--health-port"),
    ],
)
def test_bad_content_is_told_in_one_line_and_changes_nothing(running: Running, flag: str, told: str) -> None:
    before, settings = running.pids(), running.settings()
    running.write(*FLAGS, flag, "--bgp-holdtime=33s")
    line = running.said(told)
    assert "ERROR" in line and "the settings stay as they are" in line
    assert len(running.lines("reload", "--")) == 1, running.lines("reload")
    assert wait_until(lambda: len(running.warnings()) == 1) and told in running.warnings()[0]
    assert running.settings() == settings and running.pids() == before


def test_a_file_that_goes_leaves_the_settings(running: Running) -> None:
    before, settings = running.pids(), running.settings()
    running.mark = running.agent.log_path.stat().st_size
    (running.files.folder / "flags").unlink()
    running.said("--flags-file", "must be a readable text file: No such file or directory")
    assert running.settings() == settings and running.pids() == before


def test_a_worker_is_switched_off_and_on(running: Running) -> None:
    before = running.pids()
    running.write(*FLAGS, "--run-firewall=false")
    running.said("remove firewall, restart watcher")
    assert running.restarted(before) == {"firewall", "watcher"}
    assert "firewall" not in running.pids()
    assert "firewall" not in {worker["name"] for worker in running.status()["workers"]}
    before = running.pids()
    running.write(*FLAGS)
    running.said("restart watcher, add firewall")
    assert running.restarted(before) == {"firewall", "watcher"}
    assert running.pids()["firewall"]


def test_no_worker_at_all_is_refused(running: Running) -> None:
    before = running.pids()
    running.write(*FLAGS, "--run-firewall=false", "--run-router=false")
    running.said("no worker to run")
    assert running.pids() == before


def test_another_administration_port_replaces_gobgpd_and_nothing_else(running: Running) -> None:
    before = running.pids()
    running.write(*FLAGS, "--gobgp-admin-port=50099")
    line = running.said("WARN", "gobgpd is replaced")
    assert "127.0.0.1:50051" in line and "127.0.0.1:50099" in line
    assert running.restarted(before) == {"gobgpd"}
    listening = running.agent.run("ss", "-Hltn", "sport = :50099")
    assert wait_until(lambda: "50099" in running.agent.run("ss", "-Hltn").stdout), listening.stdout


def test_another_as_number_replaces_gobgpd_though_it_is_another_user(running: Running) -> None:
    assert wait_until(lambda: running.status()["sessions"], 20), "BGP does not run yet"
    before = running.pids()
    assert status_fields(running.agent.pid_of("gobgpd"))["Uid"][0] == str(SPEAKER_USER)
    running.write(*FLAGS, "--cluster-asn=64999")
    line = running.said("WARN", "router  ", "64999")
    assert "64512" in line
    assert wait_until(lambda: running.pids()["gobgpd"] not in (0, before["gobgpd"]), 10), running.agent.log[-3000:]
    assert running.restarted(before) == {"gobgpd", "router"}


def test_what_cannot_change_is_told_and_the_rest_is_taken(running: Running) -> None:
    before = running.pids()
    running.write(*FLAGS, "--log-format=json", "--routes-sync-period=90s")
    line = running.said('--log-format="json"')
    assert "flags:5: " in line and "restarted" in line
    assert running.restarted(before) == {"router"}
    assert running.settings()["log_format"] == "text"
    assert any("--log-format" in warning for warning in running.warnings())


def test_changed_passwords_reach_the_router_and_bad_ones_do_not(running: Running) -> None:
    secrets = running.agent.run_dir / "secrets.json"
    before = running.pids()
    running.write(*FLAGS, passwords="kein base64!")
    running.said("--peer-router-passwords-file", "item 1 must be text in standard base64")
    assert SECRET in secrets.read_text() and running.pids() == before
    running.write(*FLAGS, passwords=encoded(OTHER))
    running.said("passwords of BGP peers", "restart router")
    assert running.restarted(before) == {"router"}
    assert OTHER in secrets.read_text() and oct(secrets.stat().st_mode & 0o777) == "0o600"


def test_a_killed_follower_is_continued_by_the_next(running: Running) -> None:
    before = running.pids()
    os.kill(before["reload"], signal.SIGKILL)
    running.write(*FLAGS, "--netpol-default-deny")
    running.said("--netpol-default-deny=false -> true")
    assert running.restarted(before) == {"firewall", "reload"}


def test_what_was_begun_is_finished_by_the_next(running: Running) -> None:
    """The settings are written, and the process dies before it restarts anything."""
    before = running.pids()
    state = running.agent.run_dir / "reload.json"
    state.write_text(json.dumps({"pending": [["restart", "cni"]], "warnings": []}))
    os.kill(before["reload"], signal.SIGKILL)
    assert wait_until(lambda: running.pids().get("cni") not in (0, before["cni"]), 20)
    assert running.restarted(before) == {"cni", "reload"}


def test_graceful_restart_switched_on_later_decides_how_gobgpd_is_ended(running: Running) -> None:
    """Runs last: the agent does not come back. supervisord itself would still send the signal of the start."""
    running.write(*FLAGS, "--bgp-graceful-restart")
    running.said("--bgp-graceful-restart=false -> true", "restart router")
    assert wait_until(running.settled, 20)
    before = running.pids()
    assert running.agent.stop()[0] == 0
    assert "gobgpd: ended: terminated by SIGKILL" in running.agent.log, running.agent.log[-2000:]
    assert before["gobgpd"] and not Path(f"/proc/{before['gobgpd']}").exists()
    running.ended = True
