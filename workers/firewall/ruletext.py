"""Parts of iptables rules, in exactly the words of ``iptables-save``.

Pure. Both kinds of iptables (nft and legacy) print these rules alike. What is written in those words is printed back
byte for byte, so that what stands in the kernel is compared with what should stand there by a look at the bytes.
"""

from __future__ import annotations

import re

from kube_router.workers.firewall.dispatch import prefix_text
from kube_router.workers.firewall.names import ALLOWED
from kube_router.workers.model import Family, IPNetwork
from kube_router.workers.rulefacts import RuleText

Rules = tuple[RuleText, ...]

_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
REJECT = {
    Family.IPV4: "-j REJECT --reject-with icmp-port-unreachable",
    Family.IPV6: "-j REJECT --reject-with icmp6-port-unreachable",
}
NOT_ALLOWED = f"-m mark ! --mark {ALLOWED:#x}/{ALLOWED:#x}"


def rule(*parts: str) -> RuleText:
    """A rule of its parts; empty ones are left out."""
    return RuleText(" ".join(part for part in parts if part))


def quoted(text: str) -> str:
    """An option's value as the programs write it (xtables_save_string)."""
    if _PLAIN.fullmatch(text):
        return text
    escaped = re.sub(r"([\"\\'])", r"\\\1", text)
    return f'"{escaped}"'


def commented(text: str) -> str:
    """The match that carries a comment."""
    return f"-m comment --comment {quoted(text)}"


def set_mark(bits: int, mask: int) -> str:
    """Give the bits under ``mask`` these values; all others stay."""
    return f"-j MARK --set-xmark {bits:#x}/{mask:#x}"


def clear(bits: int) -> RuleText:
    """Our mark bits say nothing when they come from somebody else (S13)."""
    return rule(set_mark(0, bits))


def network(option: str, value: IPNetwork) -> str:
    """Source (``-s``) or destination (``-d``); the whole family is no condition, and is not printed."""
    if value.prefixlen == 0:
        return ""
    text = prefix_text(Family(value.version), int(value.network_address), value.prefixlen)
    return f"{option} {text}/{value.prefixlen}"
