"""The rendered supervisord.conf: golden texts, what supervisord itself reads from them, and what cannot be said."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from supervisor.options import ServerOptions

from kube_router.supervisor import conf, gobgpd
from kube_router.supervisor.conf import Facts, admin_hosts, privileges, render
from kube_router.supervisor.programs import PROGRAMS, Program, unbuilt_programs, wanted_programs
from kube_router.workers.settings import Settings

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FACTS = Facts(
    python="/usr/bin/python3",
    setpriv="/usr/bin/setpriv",
    gobgpd="/usr/bin/gobgpd",
    listener="/usr/lib/kube_router/supervisor/listener.py",
    capabilities=frozenset(
        ("net_admin", "net_raw", "net_bind_service", "sys_module", "kill", "setuid", "setgid", "setpcap")
    ),
)
CONTAINER = replace(FACTS, capabilities=FACTS.capabilities - {"sys_module"}, as_root=frozenset({"watcher", "gobgpd"}))
BARE = replace(FACTS, capabilities=frozenset({"net_admin"}), may_bound=False, may_switch=False)
CASES = {
    "default": (Settings(), FACTS),
    "graceful": (
        Settings(bgp_graceful_restart=True, gobgp_admin_address="fd00::1", v=2, log_format="json", enable_cni=False),
        CONTAINER,
    ),
    "no-router": (Settings(run_router=False, run_dir="/run/100%;x"), BARE),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    """KUBE_ROUTER_WRITE_GOLDEN=1 writes the files anew; look at the difference before you keep it."""
    settings, facts = CASES[name]
    text = render(settings, facts)
    path = GOLDEN / f"supervisord-{name}.conf"
    if os.environ.get("KUBE_ROUTER_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def read_by_supervisord(text: str, folder: Path) -> ServerOptions:
    """What supervisord makes of a configuration."""
    path = folder / "supervisord.conf"
    path.write_text(text)
    options = ServerOptions()
    options.realize(["-n", "-c", str(path)])
    return options


def test_supervisord_reads_what_was_meant(tmp_path: Path) -> None:
    """Percent signs, blanks and quotes survive; every program has the values that stopping in time depends on."""
    run_dir = tmp_path / "a b%c'd"
    (run_dir / "ipc").mkdir(parents=True)
    (run_dir / "gobgpd").mkdir()
    (run_dir / "log").mkdir()
    settings = Settings(run_dir=str(run_dir), bgp_graceful_restart=True)
    odd = Program("odd", (), True, command=("/bin/echo", "100%", "it's", "a b"))
    options = read_by_supervisord(render(settings, FACTS, [*wanted_programs(settings), odd]), tmp_path)
    groups = {group.name: group.process_configs[0] for group in options.process_group_configs}
    assert sorted(groups) == [
        "cni",
        "firewall",
        "gobgpd",
        "health",
        "listener",
        "odd",
        "proxy",
        "router",
        "watcher",
    ]
    assert shlex.split(groups["odd"].command)[-4:] == ["/bin/echo", "100%", "it's", "a b"]
    for name, process in groups.items():
        assert process.directory == str(run_dir / ("gobgpd" if name == "gobgpd" else "ipc"))
        assert process.stopwaitsecs <= 5
        assert process.autorestart is not False
        if name != "listener":
            assert process.stdout_logfile == str(run_dir / "log" / f"{name}.log")
        if name != "listener":
            assert process.stdout_events_enabled
            assert process.environment == {"PYTHONSAFEPATH": "1"}
            assert process.startretries == 0, "the listener does the retries"
    assert groups["gobgpd"].stopsignal.name == "SIGKILL"
    assert groups["router"].stopsignal.name == "SIGTERM"


def test_programs_start_in_the_order_of_the_table_and_gobgpd_stops_after_the_router(tmp_path: Path) -> None:
    run_dir = tmp_path
    for name in ("ipc", "gobgpd", "log"):
        (run_dir / name).mkdir()
    options = read_by_supervisord(render(Settings(run_dir=str(run_dir)), FACTS), tmp_path)
    names = [group.name for group in sorted(options.process_group_configs)]
    assert names == ["listener", "watcher", "gobgpd", "router", "cni", "firewall", "proxy", "health"]


@pytest.mark.parametrize("run_dir", ["/run/a ;b", "/run/a #b", "/run/a\nb", "/run/a\r"])
def test_a_path_that_the_file_cannot_hold_is_refused(run_dir: str) -> None:
    with pytest.raises(ValueError, match=r"cannot stand in supervisord\.conf"):
        render(Settings(run_dir=run_dir), FACTS)


@pytest.mark.parametrize(
    ("flags", "wanted", "unbuilt"),
    [
        ({}, ["watcher", "gobgpd", "router", "cni", "firewall", "proxy", "health"], []),
        ({"enable_cni": False}, ["watcher", "gobgpd", "router", "firewall", "proxy", "health"], []),
        ({"run_router": False, "enable_cni": True}, ["watcher", "firewall", "proxy", "health"], []),
        ({"run_router": False, "run_firewall": False}, ["watcher", "proxy", "health"], []),
        ({"run_firewall": False, "run_service_proxy": False}, ["watcher", "gobgpd", "router", "cni", "health"], []),
        (
            {"run_router": False, "run_service_proxy": False, "run_loadbalancer": True},
            ["watcher", "firewall", "loadbalancer", "health"],
            [],
        ),
    ],
)
def test_flags_choose_the_programs(flags: dict[str, bool], wanted: list[str], unbuilt: list[str]) -> None:
    settings = Settings(**flags)  # type: ignore[arg-type]
    assert [program.name for program in wanted_programs(settings)] == wanted
    assert [program.name for program in unbuilt_programs(settings)] == unbuilt


def program(name: str) -> Program:
    return next(each for each in PROGRAMS if each.name == name)


def test_privileges_are_the_least_that_the_agent_can_give() -> None:
    router = privileges(program("router"), FACTS)
    assert "--bounding-set=-all,+net_admin,+net_raw,+kill" in router
    assert "--inh-caps=-all" in router
    assert not any(option.startswith("--reuid") for option in router)
    assert "--groups=65532" in router
    assert "--bounding-set=-all,+net_admin,+net_raw" in privileges(program("firewall"), FACTS)
    health = privileges(program("health"), FACTS)
    assert {"--bounding-set=-all", "--reuid=65532", "--regid=65532", "--clear-groups", "--no-new-privs"} <= set(health)
    speaker = privileges(program("gobgpd"), FACTS)
    assert "--ambient-caps=-all,+net_bind_service" in speaker
    assert speaker[speaker.index("--pdeathsig") + 1] == "KILL"


def test_privileges_that_the_agent_lacks_are_not_asked_for() -> None:
    assert "--bounding-set=-all,+net_admin" in privileges(program("cni"), CONTAINER)
    assert "--bounding-set=-all,+net_admin,+sys_module" in privileges(program("cni"), FACTS)
    for each in PROGRAMS:
        bare = privileges(each, BARE)
        assert not any(option.startswith(("--bounding-set", "--reuid", "--groups", "--clear")) for option in bare)
        assert "--no-new-privs" in bare


@pytest.mark.parametrize(
    ("address", "port", "hosts"),
    [
        ("", 50051, ("127.0.0.1:50051",)),
        ("not-an-address", 50051, ("127.0.0.1:50051",)),
        ("127.0.0.1", 50051, ("127.0.0.1:50051",)),
        ("127.0.0.2", 1, ("127.0.0.2:1",)),
        ("::1", 50051, ("[::1]:50051",)),
        ("[::1]", 50051, ("[::1]:50051",)),
        ("0.0.0.0", 50051, ("0.0.0.0:50051",)),
        ("::", 50051, ("[::]:50051",)),
        ("10.1.2.3", 50051, ("10.1.2.3:50051", "127.0.0.1:50051")),
        ("fd00::1", 50051, ("[fd00::1]:50051", "127.0.0.1:50051")),
        ("10.1.2.3", 0, ()),
    ],
)
def test_admin_hosts_as_upstream(address: str, port: int, hosts: tuple[str, ...]) -> None:
    assert admin_hosts(address, port) == hosts


def test_speaker_gets_no_admin_listener_with_port_0() -> None:
    command = conf.speaker_command(Settings(gobgp_admin_port=0), FACTS)
    assert not any(word.startswith("--admin") for word in command)


def test_gobgpd_flags_differ_by_version() -> None:
    old = gobgpd.speaker_arguments("gobgpd", ["unix://x", "127.0.0.1:1"], "info", "--pprof-disable")
    assert old == ["gobgpd", "--api-hosts=unix://x,127.0.0.1:1", "--pprof-disable", "-l", "info"]
    new = gobgpd.speaker_arguments("gobgpd", ["unix://x"], "debug", "--pprof-disable\n--metrics-path=")
    assert new[-1] == "--metrics-path="
