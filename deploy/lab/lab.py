"""``lab.py up | down | demo | on NODE COMMAND… | ask``: the lab's command line, called by the Makefile.

``up`` leaves the lab standing and prints what is worth trying; ``down`` removes exactly what ``up`` made. ``ask`` tells
who is answered by the shop's server at this moment.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from lab import demo, network, shop
from lab.cluster import Lab, wait_until
from lab.connections import SETTLE_SECONDS, open_shop, verdict_rows, verdicts
from lab.report import Progress, print_rows
from lab.topology import NODES

USAGE = "usage: lab.py up | down | demo | on NODE COMMAND [ARGUMENT ...] | ask"


def up() -> int:
    """Build the lab, wait until it works, connect one pod a node, open the shop, print some commands."""
    lab = Lab()
    progress = Progress()
    try:
        lab.up(progress)
        progress("waiting until every agent is in sync and every BGP session is established")
        for node in NODES:
            if not wait_until(lambda name=node.name: lab.ready(name), 40):  # type: ignore[misc]
                raise network.LabError(f"{node.name} is not in sync after 40 s; see {lab.log_file(node.name)}")
        for node in NODES:
            progress(f"{lab.add_pod(node.name).name}: {' '.join(lab.pods[node.name + '-pod1'].addresses)}")
        progress(f"starting {shop.SERVER.key} and the pods that may want to ask it")
        open_shop(lab)
        write_examples(lab)
    except (network.LabError, KeyboardInterrupt) as error:
        print(f"lab: {error or 'interrupted'}", file=sys.stderr)
        if lab.folder.exists() and "is there already" not in str(error):
            lab.down()
        return 1
    print_commands(lab)
    return 0


def write_examples(lab: Lab) -> None:
    """Policies to try, beside the manifest directory: nothing stands until it is copied there."""
    examples(lab).mkdir()
    for name, manifest in shop.MANIFESTS.items():
        (examples(lab) / f"{name}.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False))


def examples(lab: Lab) -> Path:
    """The folder of policies to try."""
    return lab.folder / "examples"


def print_commands(lab: Lab) -> None:
    """What is worth trying in a lab that stands."""
    this = f"{sys.executable} {Path(__file__)}"
    target = lab.pods["node3-pod1"].addresses[1]
    deny, allow = (f"{examples(lab)}/{name}.yaml" for name in shop.MANIFESTS)
    print("\nThe lab stands. Worth trying:\n")
    for text, command in (
        ("how the agent stands", f"{this} on node1 kube-routerctl status"),
        ("its processes, and restart one", f"{this} on node1 supervisorctl restart router"),
        ("a pod on the other segment", f"ip netns exec {lab.namespaces.full('node1-pod1')} ping -c 3 {target}"),
        ("what BGP holds", f"{this} on node1 gobgp global rib"),
        (f"who is answered by {shop.SERVER.key}", f"{this} ask"),
        ("the same under a policy that denies all", f"cp {deny} {lab.manifests}/ && {this} ask"),
        ("and with a way for the web pods", f"cp {allow} {lab.manifests}/ && {this} ask"),
        ("the log of all workers", f"tail -f {lab.log_file('node1')}"),
    ):
        print(f"  # {text}\n  {command}")
    print(
        "\nEdit a Node or a policy under", lab.manifests, "and watch it being followed. Remove all with: make lab-down"
    )


def down() -> int:
    """Remove the standing lab; fine when there is none."""
    Lab().down()
    return 0


def on(arguments: list[str]) -> int:  # noqa: RET503
    """Become a command on a node of the standing lab."""
    if len(arguments) < 2 or arguments[0] not in {node.name for node in NODES}:
        print(USAGE, file=sys.stderr)
        return 2
    lab = Lab()
    if not lab.run_dir(arguments[0]).exists():
        print("lab: no lab is standing; build one with: make lab-up", file=sys.stderr)
        return 1
    os.chdir(lab.run_dir(arguments[0]))
    command = lab.namespaces.command(arguments[0], arguments[1:])
    os.execvpe(command[0], command, lab.environment(arguments[0]))


def ask() -> int:
    """Print who is answered by the shop's server now."""
    lab = Lab()
    lab.find_pods()
    time.sleep(SETTLE_SECONDS)
    if shop.SERVER.short not in lab.pods:
        print("lab: no lab is standing; build one with: make lab-up", file=sys.stderr)
        return 1
    print_rows(verdict_rows([("now", verdicts(lab))]))
    return 0


def main(arguments: list[str]) -> int:
    """Dispatch; returns the exit status."""
    if os.geteuid() != 0:
        print("lab: needs root (network namespaces)", file=sys.stderr)
        return 1
    # SIGTERM (a CI that gives up) must clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    match arguments:
        case ["up"]:
            return up()
        case ["down"]:
            return down()
        case ["demo"]:
            return demo.main()
        case ["on", *rest]:
            return on(rest)
        case ["ask"]:
            return ask()
    print(USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
