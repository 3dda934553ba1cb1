"""What a lab node's kernel and log hold, as text that tests compare.

Touches the kernel: reads only.
"""

from __future__ import annotations

from lab.cluster import Lab


def output(lab: Lab, node: str, *command: str) -> str:
    """Output of a command on a node; it must succeed."""
    done = lab.on(node, command)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def pod_routes(lab: Lab, node: str) -> set[str]:
    """The node's kernel routes of protocol 17, both families, one line each without volatile parts."""
    lines = output(lab, node, "ip", "route", "show", "proto", "17") + output(
        lab, node, "ip", "-6", "route", "show", "proto", "17"
    )
    return {" ".join(line.split()) for line in lines.splitlines()}


def dataplane(lab: Lab, node: str) -> dict[str, str]:
    """Everything in a node's kernel that the agent makes, as text without counters."""
    return {
        "routes": "\n".join(sorted(pod_routes(lab, node))),
        "iptables": rules(output(lab, node, "iptables-save")),
        "ip6tables": rules(output(lab, node, "ip6tables-save")),
        "ipset": "\n".join(sorted(line for line in output(lab, node, "ipset", "save").splitlines())),
        "nftables": "".join(own_table(lab, node, family) for family in (4, 6)),
        "links": output(lab, node, "ip", "-br", "link"),
        "conflist": lab.conf_file(node).read_text(),
    }


def own_table(lab: Lab, node: str, family: int) -> str:
    """The firewall's own nftables table of a family (4 or 6), sorted and without counters; empty if there is none."""
    words = ("ip", "kube-router-filter-ipv4") if family == 4 else ("ip6", "kube-router-filter-ipv6")
    return "\n".join(sorted(lab.on(node, ["nft", "-s", "list", "table", *words]).stdout.splitlines()))


def rules(text: str) -> str:
    """The rules of an iptables-save text, sorted: without tables, counters, comments and positions."""
    return "\n".join(sorted(line for line in text.splitlines() if line.startswith("-A")))


def log_since(lab: Lab, node: str, mark: int) -> list[str]:
    """The agent's log lines behind the byte offset ``mark``."""
    with lab.log_file(node).open("rb") as log:
        log.seek(mark)
        return log.read().decode(errors="replace").splitlines()
