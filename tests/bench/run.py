"""``make bench``: run every benchmark (or one, by id) and write the results as JSON.

Each result is ``{id, what, value, unit, goal, met, baseline: {name, value}, ratio, shape}``. ``goal`` is an upper bound
in ``unit``; ``ratio`` is value / baseline, measured in the same run; ``shape`` tells the size of the input and how
often it was measured. A missed goal is written as missed; the exit status tells only whether
the benchmarks could be run.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "deploy")]


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the value is compared with, measured in the same run."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Result:
    """One figure."""

    id: str
    what: str
    value: float
    unit: str
    goal: float
    baseline: Baseline | None
    shape: str

    def as_json(self) -> dict[str, object]:
        """The documented JSON form."""
        ratio = float(f"{self.value / self.baseline.value:.3g}") if self.baseline and self.baseline.value else None
        return {**asdict(self), "value": round(self.value, 4), "met": self.value <= self.goal, "ratio": ratio}


Benchmark = Callable[[], Iterator[Result]]


def median_of(measure: Callable[[], float], runs: int = 5) -> float:
    """Median of some runs, with the garbage collected before each."""
    values = []
    for _ in range(runs):
        gc.collect()
        values.append(measure())
    return statistics.median(values)


def benchmarks(long: bool) -> dict[tuple[str, ...], Benchmark]:
    """All benchmarks by what their ids begin with; imported late, each pays for its own imports."""
    import bench_agent
    import bench_fast
    import bench_firewall
    import bench_firewall_engine
    import bench_firewall_packet
    import bench_firewall_worker
    import bench_ipc
    import bench_proxy_nft
    import bench_router
    import bench_routes
    import bench_watcher

    return {
        ("fast",): bench_fast.run,
        ("ipc",): bench_ipc.run,
        ("routes",): bench_routes.run,
        ("router.learned", "router.moved", "router.withdrawn"): bench_router.learned,
        ("router.join", "router.vip.cpu"): bench_router.join,
        ("router.vip.5k",): bench_router.vips,
        ("router.vip.added", "router.vip.withdrawn", "router.memory", "router.restart"): bench_router.large,
        ("watcher",): bench_watcher.run,
        ("agent",): bench_agent.run,
        ("firewall.set",): bench_firewall.sets,
        ("firewall.event",): bench_firewall.events,
        ("firewall.cold", "firewall.restart", "firewall.idle"): bench_firewall.cold,
        ("firewall.wire", "firewall.churn", "firewall.memory"): functools.partial(
            bench_firewall_worker.run, 60.0 if long else 15.0
        ),
        ("firewall.engine",): bench_firewall_engine.run,
        ("firewall.packet",): bench_firewall_packet.run,
        ("proxy.nft.cold", "proxy.nft.event", "proxy.nft.idle", "proxy.nft.restart"): bench_proxy_nft.run,
        ("proxy.nft.chains",): bench_proxy_nft.against_chains,
        ("proxy.nft.memory",): bench_proxy_nft.memory,
    }


def asked_for(identity: str, only: str) -> bool:
    """Whether ``only`` (an id, or the beginning of ids up to a dot; empty is all) asks for a figure or its group."""
    return not only or f"{identity}.".startswith(f"{only}.") or f"{only}.".startswith(f"{identity}.")


def main() -> int:
    """Run, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--only", default="", help="an id, or its beginning up to a dot")
    parser.add_argument("--long", action="store_true", help="churn for 60 s instead of 15")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("bench: needs root (network namespaces)", file=sys.stderr)
        return 1
    results, failed = [], 0
    for prefixes, run in benchmarks(arguments.long).items():
        if not any(asked_for(prefix, arguments.only) for prefix in prefixes):
            continue
        try:
            for result in run():
                if asked_for(result.id, arguments.only):
                    results.append(result.as_json())
                    print_line(results[-1])
        except Exception:  # noqa: BLE001
            failed += 1
            traceback.print_exc()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    missed = [str(result["id"]) for result in results if not result["met"]]
    print(f"\n{len(results)} figures in {arguments.out}; goals missed: {', '.join(missed) or 'none'}")
    return 1 if failed or not results else 0


def print_line(result: dict[str, object]) -> None:
    """One line on the terminal."""
    baseline = result["baseline"]
    compared = (
        f", {result['ratio']} of {baseline['name']} ({baseline['value']:.4g})" if isinstance(baseline, dict) else ""
    )
    mark = "ok    " if result["met"] else "MISSED"
    print(f"{mark} {result['id']}: {result['value']} {result['unit']} (goal {result['goal']}){compared}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
