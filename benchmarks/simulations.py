"""The search for d90 on simulated curves whose d90 is known: coverage of its interval, width, trials.

    python benchmarks/simulations.py [--curves 500] [--kind NAME ...] [--out FILE.json]

The file keeps the rows of other kinds with as many curves.

A curve is a logistic function of log d between two scores; a trial adds Gaussian noise, full fine-tuning lies a little
above the curve's end. The grid is the paper's, of 64 points; a sweep of it with three seeds is 192 trials.

logistic: no more than that.  noise grows: with d, fourfold.  shelf: two thousandths below the target over two decades.
mrpc: low, flat curves, and full fine-tuning that varies by .026, as MRPC's.  collapse: a tenth of the runs in the
subspace score as the majority class.  collapse both: and of full fine-tuning.  dip: scores fall again at large d.
rate falls: the best learning rate falls as d^-0.3; three rates a factor of 4 apart are tried.  rate falls, auto: the
same with rates="auto", which begins a factor of 20 too low.  rates alike: a rate a factor of 4 off loses .01 only, half
of what one run varies by, one 16 off .04; "auto".
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peft_intrinsic.measure.curve import grid
from peft_intrinsic.measure.evidence import TUNING
from peft_intrinsic.measure.plan import Plan
from peft_intrinsic.measure.search import Search

GRID = tuple(grid())
MAJORITY = 0.45
RATES = (5e-5, 2e-4, 8e-4)
KINDS = (
    *("logistic", "noise grows", "shelf", "mrpc", "collapse", "collapse both", "dip", "rate falls"),
    *("rate falls, auto", "rates alike"),
)


@dataclass
class Simulated:
    """One task: what training would score.

    Args:
        kind: see above.
        number: seed of the curve and of its noise.
    """

    kind: str
    number: int

    def __post_init__(self) -> None:
        self.rng = rng = np.random.default_rng([self.number, KINDS.index(self.kind)])
        self.center, self.width = rng.uniform(math.log(300), math.log(300_000)), rng.uniform(0.3, 1.5)
        self.start, self.end = rng.uniform(0.5, 0.7), rng.uniform(0.8, 0.95)
        self.noise = self.full_noise = rng.uniform(0.003, 0.02)
        self.full = self.end + 0.005
        self.top = self.center + rng.uniform(2, 4) * max(self.width, 0.5)
        self.level = 20.0 if self.kind == "rate falls, auto" else 1.0
        if self.kind == "mrpc":
            self.center, self.width = rng.uniform(math.log(1000), math.log(30_000)), 1.2
            self.start, self.end, self.full, self.noise, self.full_noise = 0.66, 0.76, 0.76, 0.0066, 0.026
        if self.kind == "rates alike":
            self.noise, self.full_noise = 0.02, 0.004

    def truth(self, d: int) -> float:
        """The mean score at d, by the best learning rate."""
        x = math.log(d)
        if self.kind == "shelf":
            low, high = 0.9 * self.full - 0.002, self.full
            first = self.start + (low - self.start) * _step((x - self.center) / 0.4)
            return first + (high - low) * _step((x - self.center - 4) / 0.4)
        fallen = max(0.0, x - self.top) if self.kind == "dip" else 0.0
        return self.start + (self.end - self.start) * _step((x - self.center) / self.width) - 0.12 * fallen

    def lost(self, d: int, rate: float | None) -> float:
        """By a rate that is not the best."""
        if rate is None:
            return 0.0
        best = self.level * 2e-4 * (d / 10_000) ** -0.3
        return min((0.01 if self.kind == "rates alike" else 0.03) * math.log(rate / best, 4) ** 2, 0.2)

    def score(self, d: int | None, rate: float | None) -> float:
        """Of one trial."""
        shared = 0.1 if self.kind.startswith("collapse") else 0.0
        if d is None:
            collapsed = self.rng.random() < shared * (self.kind == "collapse both")
            return MAJORITY if collapsed else self.full + self.full_noise * self.rng.normal()
        grows = 0.5 + 1.5 * math.log(d / 100) / math.log(10_000) if self.kind == "noise grows" else 1.0
        found = self.truth(d) - self.lost(d, rate) + grows * self.noise * self.rng.normal()
        return MAJORITY if self.rng.random() < shared else found

    def least(self) -> int:
        """Index of d90 in the grid: by the best rate of those that are tried."""
        for i, d in enumerate(GRID):
            lost = 0.0
            if self.kind.startswith("rate"):
                tried = RATES if self.kind == "rate falls" else [2e-4 * 4.0**k for k in range(-6, 7)]
                lost = min(self.lost(d, rate) for rate in tried)
            if self.truth(d) - lost >= 0.9 * self.full:
                return i
        return len(GRID)


def _step(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def searched(kind: str, number: int) -> dict[str, float]:
    """One search, and how it did."""
    task = Simulated(kind, number)
    auto = ("auto", "auto")
    rates = {"rate falls": ((1e-5, 4e-5, 1.6e-4), RATES), "rate falls, auto": auto, "rates alike": auto}.get(kind)

    def evaluate(wanted):
        return [task.score(d, rate if rates and d else None) for d, _, rate in wanted]

    search = Search(evaluate, Plan(GRID, learning_rates=rates), least=MAJORITY)
    search.run()
    curve, least = search.evidence.curve(), task.least()
    low, high = curve.interval()
    return {
        "covered": low <= least <= high,
        "steps": high - low,
        "wrongly not reached": low == len(GRID) > least,
        "off by": abs(curve.index() - least),
        "trials": len(search.found),
        "full fine-tuning": sum(d is None for d, _, _ in search.found),
        "rates": sum(seed == TUNING for _, seed, _ in search.found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=int, default=500)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table: dict[str, dict[str, float]] = {}
    for kind in args.kind:
        rows = [searched(kind, number) for number in range(args.curves)]
        table[kind] = {name: round(float(np.mean([row[name] for row in rows])), 3) for name in rows[0]}
        if len(table) == 1:
            print("| curves | " + " | ".join(rows[0]) + " |", "|---" * (len(rows[0]) + 1) + "|", sep="\n")
        print(f"| {kind} | " + " | ".join(f"{value:g}" for value in table[kind].values()) + " |", flush=True)
    if args.out:
        sizes = {"curves": args.curves, "grid": len(GRID)}
        before = json.loads(args.out.read_text()) if args.out.exists() else {}
        kept = before["table"] if before.get("curves") == args.curves else {}
        args.out.write_text(json.dumps({**sizes, "table": {**kept, **table}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
