"""What both backends render for a rule set, as tables that packets can be walked through, without a kernel."""

from __future__ import annotations

from support.iptables_walk import IptablesWalk
from support.nft_walk import NftWalk
from support.podfirewall import IN_SYNC, tables
from support.policyworld import BOTH, NODE

from kube_router.ipc.messages import Projection
from kube_router.ipc.replica import Cluster
from kube_router.workers.firewall import names
from kube_router.workers.firewall.chains import ipset_of, render
from kube_router.workers.firewall.engine import Engine
from kube_router.workers.firewall.nftrender import element_text, frame_shapes, map_element, set_shape
from kube_router.workers.firewall.nftstate import (
    Refusals,
    fixed_chains,
    frame_elements,
    pod_layout,
    policy_chains,
)
from kube_router.workers.firewall.rules import BlockSet, Frame, PortSet, Ruleset
from kube_router.workers.firewall.topchains import jump_rule
from kube_router.workers.model import Family


def ruleset_of(objects: tuple[Projection, ...]) -> Ruleset:
    """What an engine without a past makes of some objects."""
    engine = Engine(NODE, BOTH)
    engine.update(Cluster(IN_SYNC, tables(objects)), None)
    return engine.ruleset


def iptables_walk(ruleset: Ruleset, frame: Frame, family: Family) -> IptablesWalk:
    """The chains of the iptables backend in table filter, with their sets."""
    return IptablesWalk(family, iptables_text(ruleset, frame, family), ipsets_text(ruleset, frame, family))


def iptables_text(ruleset: Ruleset, frame: Frame, family: Family) -> str:
    """Table filter, in the words of iptables-save."""
    chains = render(ruleset, frame, family)
    lines = ["*filter", *(f":{chain} - [0:0]" for chain in chains)]
    lines += [f"-A {hook} {jump_rule(hook)}" for hook in names.TOP_CHAINS]
    lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
    return "\n".join([*lines, "COMMIT"])


def ipsets_text(ruleset: Ruleset, frame: Frame, family: Family) -> str:
    """All sets, in the words of ipset save."""
    inet = "inet6" if family is Family.IPV6 else "inet"
    lines = []

    def made(name: str, kind: str, members: set[str]) -> None:
        lines.append(f"create {name} {kind} timeout 0 family {inet}")
        lines.extend(f"add {name} {member}" for member in sorted(members))

    for key, by_family in ruleset.members.items():
        if isinstance(key, BlockSet):
            if key.family is family:
                made(ipset_of(key, family), "hash:net", {half for text in key.prefixes for half in halves(text)})
        else:
            kind = "hash:ip,port" if isinstance(key, PortSet) else "hash:ip"
            made(ipset_of(key, family), kind, set(by_family.get(family, ())))
    local = {address for pod in ruleset.pods.values() for address in pod.addresses_of(family)}
    made(names.ipset_name(names.LOCAL_PODS, family), "hash:ip", local)
    for protocol, name in names.NODE_PORTS.items():
        lines.append(f"create {name} bitmap:port range 0-65535")
        lines += [f"add {name} {port}" for of, port in frame.node_ports if of == protocol]
    return "\n".join(lines)


def halves(network: str) -> tuple[str, ...]:
    """hash:net holds no network of length 0."""
    return {"0.0.0.0/0": ("0.0.0.0/1", "128.0.0.0/1"), "::/0": ("::/1", "8000::/1")}.get(network, (network,))


def nft_walk(ruleset: Ruleset, frame: Frame, family: Family) -> NftWalk:
    """The table of the nftables backend."""
    refused = Refusals()
    layout = pod_layout(ruleset, family)
    elements = frame_elements(frame, layout)
    for direction, name in names.POD_MAPS.items():
        elements[name] = {map_element(at, chain, pod) for at, (chain, pod) in layout.dispatch[direction].items()}
    shapes = {shape.name: shape for shape in frame_shapes(family)}
    for key, by_family in ruleset.members.items():
        if isinstance(key, BlockSet) and key.family is not family:
            continue
        name = names.set_name(key, family)
        shapes[name] = set_shape(key, name, family)
        members = key.prefixes if isinstance(key, BlockSet) else by_family.get(family, ())
        elements[name] = set(map(element_text, members))
    chains = fixed_chains(family, frame, refused)
    chains |= policy_chains(ruleset.policies.values(), family, lambda key: names.set_name(key, family), refused)
    chains |= layout.groups
    lines = [f"table {'ip6' if family is Family.IPV6 else 'ip'} {names.NFT_TABLES[family]} {{"]
    for name, shape in shapes.items():
        filled = f" elements = {{ {', '.join(sorted(elements[name]))} }}\n" if elements.get(name) else ""
        lines.append(f"{shape.word} {name} {str(shape).removesuffix('}')}\n{filled}}}")
    for chain in chains.values():
        rules = "\n".join(chain.rules)
        lines.append(f"chain {chain.name} {{\n{chain.header}\n{rules}\n}}")
    return NftWalk("\n".join([*lines, "}"]))
