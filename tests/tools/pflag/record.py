"""Record what pflag itself makes of many command lines: ``go build -o ORACLE . && python -P record.py ORACLE``.

Writes ``tests/golden/pflag.json``, which the unit tests compare the project's own reading with. Run it again when the
flag table changes. The cases are drawn from a fixed seed, so that a run without a change writes the same file.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from kube_router.supervisor.flags import FLAGS

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "pflag.json"
DURATION_UNITS = ["s", "m", "h", "ms", "ns", "us", "µs", "μs", "d", "", "S", " "]
WORDS = [
    *("--", "-", "", "x", "3", "false", "-v", "-v3", "-v=3", "-v=", "-v=-1", "-hV", "-Vh", "-h=false", "-hv3", "-hvV"),
    *("-hx", "-z", "-'", '-"', "-=", "--=x", "---x", "--nope", "--nope=1", "--v=3", "--v", "--help", "--help=0"),
    *("--version=0", "--run-router", "--run-router=false", "--run-router=maybe", "--run-router=", "--run-router=T"),
    *("--peer-router-ips=1.2.3.4", "--peer-router-ips", "fd00::1, 2.3.4.5", '--peer-router-ips="1.1.1.1"', "1.2.3"),
    *("--peer-router-ips=", "--peer-router-ips=1.2.3.4,", "--peer-router-ips=::ffff:1.2.3.4", "fe80::1%eth0"),
    *("--peer-router-asns=1,2", "--peer-router-asns", "--peer-router-asns=", "--peer-router-asns=0x1", "01,1_0"),
    *("--service-cluster-ip-range", "fd00::/108", "a,b", "--excluded-cidrs=", "--excluded-cidrs=a,b", 'a,"b,c"'),
    *("--bgp-port=0x1f", "--bgp-port=0b1_0", "--bgp-port", "010", "08", "-1", "--bgp-port=4294967296"),
    *("--health-port=65536", "--peer-router-multihop-ttl=256", "--cluster-asn=18446744073709551616"),
    *("--routes-sync-period=1d", "--routes-sync-period", "1m30s", "--routes-sync-period=0", "-1.5h"),
    *("--router-id", "a'b\"c\\", "--router-id=\n\t\x01", "--master=a=b", "--master=", "--kubeconfig=\u00e9\u2028"),
]


def word(draw: random.Random, alphabet: str, longest: int) -> str:
    return "".join(draw.choice(alphabet) for _ in range(draw.randint(0, longest)))


def value_case(draw: random.Random) -> list[str]:
    """One flag with a value near what its kind accepts."""
    kind = draw.choice(["duration", "number", "uints", "strings", "bool"])
    if kind == "duration":
        parts = [
            word(draw, "0123456789", draw.choice([1, 3, 20]))
            + draw.choice(["", "."])
            + word(draw, "0123456789", draw.choice([0, 3, 20]))
            + draw.choice(DURATION_UNITS)
            for _ in range(draw.randint(0, 3))
        ]
        return ["--routes-sync-period=" + draw.choice(["", "", "-", "+"]) + "".join(parts)]
    if kind == "number":
        name = draw.choice(["peer-router-multihop-ttl", "health-port", "bgp-port", "cluster-asn"])
        prefix = draw.choice(["", "", "0x", "0o", "0b", "0X", "0", "-"])
        return [f"--{name}=" + prefix + word(draw, "0123456789abf_", draw.choice([2, 4, 9, 21]))]
    if kind == "uints":
        return ["--peer-router-asns=" + ",".join(word(draw, "0123456789_x ", 4) for _ in range(draw.randint(1, 3)))]
    if kind == "strings":
        return ["--excluded-cidrs=" + word(draw, 'ab,"\n\ré ', 9)]
    return ["--run-router=" + word(draw, "tTrRuUeE01fF", 4)]


def main(oracle: str) -> None:
    draw = random.Random(20)
    cases = [[item] for item in WORDS]
    cases += [[draw.choice(WORDS) for _ in range(draw.randint(2, 4))] for _ in range(200)]
    cases += [value_case(draw) for _ in range(350)]
    flags = [
        {
            "name": flag.name,
            "shorthand": flag.shorthand,
            "kind": flag.kind,
            "default": flag.default,
            "usage": flag.usage,
        }
        for flag in FLAGS
    ]
    question = json.dumps({"flags": flags, "cases": cases})
    answer = json.loads(subprocess.run([oracle], input=question, capture_output=True, text=True, check=True).stdout)
    rows = [json.dumps({"arguments": case, **result}) for case, result in zip(cases, answer["results"], strict=True)]
    usage = json.dumps(answer["usage"].splitlines(), indent=1)
    GOLDEN.write_text('{"usage": ' + usage + ',\n"cases": [\n' + ",\n".join(rows) + "\n]}\n")


if __name__ == "__main__":
    main(sys.argv[1])
