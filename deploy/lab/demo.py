"""The demo: build the lab, ping everything, kill every worker under traffic, try network policy, print one table.

Touches the kernel through `Lab`. Exit status 0 only if every line of the table is as it should be.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from lab import network
from lab.cluster import Lab, wait_until
from lab.pings import SteadyPing, matrix
from lab.policydemo import network_policy
from lab.report import Line, Progress, print_lines
from lab.topology import EXTERNAL_HOSTS, NODES

KILLED_WORKERS = ("watcher", "cni", "router", "firewall", "health")


def run_demo(lab: Lab) -> list[Line]:
    """All steps; returns the table."""
    progress = Progress()
    lines: list[Line] = []
    lab.up(progress)
    progress("waiting until every agent is in sync and every BGP session is established")
    for node in NODES:
        good = wait_until(lambda name=node.name: lab.ready(name), 40)  # type: ignore[misc]
        sessions = lab.status(node.name).get("sessions", [])
        seen = f"{sum(s['state'] == 'established' for s in sessions)} of {len(sessions)} sessions"
        lines.append(
            Line(f"{node.name}: agent in sync, BGP established", "4 of 4 sessions", seen, good and len(sessions) == 4)
        )
        progress(f"  {node.name}: {seen} established")
    progress("connecting one pod a node through the bridge and host-local plugins")
    for node in NODES:
        pod = lab.add_pod(node.name)
        lines.append(
            Line(f"{pod.name}: addresses by CNI", "IPv4 and IPv6", " ".join(pod.addresses), len(pod.addresses) == 2)
        )
    lines += external_learns(lab, progress)
    lines += connectivity(lab, progress)
    lines += kill_workers(lab, progress)
    lines += network_policy(lab, progress)
    return lines


def external_learns(lab: Lab, progress: Callable[[str], None]) -> list[Line]:
    """The router behind the fabric must hold exactly the pods' CIDRs of the cluster's prefixes."""
    progress("asking the external router for the pod routes it has learned")
    wanted = {cidr for node in NODES for cidr in node.pod_cidrs}

    def learned() -> set[str]:
        text = network.bird_routes(lab.namespaces, "external", lab.folder / "external")
        return {word for word in text.split() if word.startswith(("10.244.", "fd00:244:"))}

    wait_until(lambda: learned() == wanted, 15)
    seen = learned()
    return [
        Line("external router: pod CIDRs learned by BGP", f"{len(wanted)}", f"{len(seen & wanted)}", seen == wanted)
    ]


def connectivity(lab: Lab, progress: Callable[[str], None]) -> list[Line]:
    """Every pod to every pod and to the external host."""
    progress("pinging from every pod to every pod and to the external host")
    lines = []
    cells = matrix(lab)
    for source in lab.pods:
        for family in ("IPv4", "IPv6"):
            mine = [cell for cell in cells if cell.source == source and cell.family == family]
            missed = [cell.target for cell in mine if not cell.ok]
            seen = f"{len(mine) - len(missed)}" + (f" (not {', '.join(missed)})" if missed else "")
            lines.append(
                Line(f"{source}: {family} destinations reached", f"{len(mine)}", seen, not missed and bool(mine))
            )
    return lines


def kill_workers(lab: Lab, progress: Callable[[str], None]) -> list[Line]:
    """SIGKILL each worker of node1 while pods of all nodes are pinged from node1's pod at 100 Hz."""
    source, *others = lab.pods.values()
    targets = [(pod.name, address) for pod in others for address in pod.addresses]
    targets += [("external", host) for host in EXTERNAL_HOSTS]
    pings = [SteadyPing(lab, source.name, target, address) for target, address in targets]
    lines = []
    time.sleep(0.5)
    for name in KILLED_WORKERS:
        before = int(lab.workers(source.node).get(name, {}).get("pid") or 0)
        progress(f"kill -9 of {source.node}'s {name} under traffic")
        if before:
            os.kill(before, signal.SIGKILL)
        began = time.monotonic()
        ok = wait_until(lambda name=name, before=before: lab.restarted(source.node, name, before), 15)  # type: ignore[misc]
        lines.append(
            Line(
                f"{name} killed: back and in sync", "yes", f"after {time.monotonic() - began:.1f} s" if ok else "no", ok
            )
        )
    time.sleep(0.5)
    for ping in pings:
        sent, lost = ping.stop()
        text = f"{ping.family} packets lost, {ping.source} to {ping.target}"
        lines.append(Line(text, "0", f"{lost} of {sent}", lost == 0 and sent > 100))
    return lines


def main() -> int:
    """Run the demo and leave nothing behind, also after Ctrl-C."""
    lab = Lab(f"demo{os.getpid()}")
    lines: list[Line] = []
    trouble = ""
    try:
        lines = run_demo(lab)
    except network.LabError as error:
        trouble = str(error)
    except KeyboardInterrupt:
        trouble = "interrupted"
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        bad = not lines or not all(line.ok for line in lines)
        if bad or trouble:
            show_logs(lab)
        lab.down()
    if lines:
        print_lines(lines)
    bad_lines = sum(not line.ok for line in lines)
    if trouble:
        print(f"\ndemo: {trouble}", file=sys.stderr)
    else:
        print("\ndemo:", f"{bad_lines} lines are not as they should be" if bad_lines else "everything as it should be")
    return 1 if trouble or bad_lines or not lines else 0


def show_logs(lab: Lab) -> None:
    """The last lines of each agent, so that a failed demo explains itself."""
    for node in NODES:
        log = lab.log_file(node.name)
        if log.exists():
            print(f"\n--- last log lines of {node.name}")
            print("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
