"""The search for d90 on simulated curves whose d90 is known: coverage of its interval, width, trials.

    python benchmarks/simulations.py [--curves 500] [--kind NAME ...] [--out FILE.json]

Rows of other kinds with as many curves stay in the file.

A curve is a logistic function of log d between two scores; a trial adds Gaussian noise, full fine-tuning lies a little
above the curve's end. The grid is the paper's, of 64 points; a sweep of it with three seeds is 192 trials.

logistic: only that.  noise grows: with d, fourfold.  shelf: 0.002 below the target over two decades.
mrpc: low, flat curves, and full fine-tuning that varies by 0.026, as for MRPC.  collapse: a tenth of the runs in the
subspace have the score of the majority class.  collapse both: and of full fine-tuning.  dip: scores fall at large d.
rate falls: the best learning rate falls as d^-0.3; three learning rates a factor of 4 apart are tried.  rate falls,
auto: the same with learning_rates="auto", which starts a factor of 20 too low.  rates alike: a learning rate that is
off by a factor of 4 loses only 0.01, half of the standard deviation of a run, by 16 it loses 0.04; "auto".
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peft_intrinsic.measure.curve import grid
from peft_intrinsic.measure.evidence import TUNING, Evidence
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
    """One simulated task.

    Args:
        kind: A kind of the module's docstring.
        number: Seed of the curve and of its noise.
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

    def compute_mean(self, d: int) -> float:
        """Compute the mean score at d, at the best learning rate."""
        x = math.log(d)
        if self.kind == "shelf":
            low, high = 0.9 * self.full - 0.002, self.full
            first = self.start + (low - self.start) * _step((x - self.center) / 0.4)
            return first + (high - low) * _step((x - self.center - 4) / 0.4)
        fallen = max(0.0, x - self.top) if self.kind == "dip" else 0.0
        return self.start + (self.end - self.start) * _step((x - self.center) / self.width) - 0.12 * fallen

    def compute_loss(self, d: int, rate: float | None) -> float:
        """Compute the loss of score at a learning rate that is not the best."""
        if rate is None:
            return 0.0
        best = self.level * 2e-4 * (d / 10_000) ** -0.3
        return min((0.01 if self.kind == "rates alike" else 0.03) * math.log(rate / best, 4) ** 2, 0.2)

    def score(self, d: int | None, rate: float | None) -> float:
        """Simulate the score of one trial."""
        fraction = 0.1 if self.kind.startswith("collapse") else 0.0
        if d is None:
            collapsed = self.rng.random() < fraction * (self.kind == "collapse both")
            return MAJORITY if collapsed else self.full + self.full_noise * self.rng.normal()
        grows = 0.5 + 1.5 * math.log(d / 100) / math.log(10_000) if self.kind == "noise grows" else 1.0
        score = self.compute_mean(d) - self.compute_loss(d, rate) + grows * self.noise * self.rng.normal()
        return MAJORITY if self.rng.random() < fraction else score

    def find_d90(self) -> int:
        """Find the index of d90 in the grid, at the best of the learning rates that are tried."""
        for i, d in enumerate(GRID):
            loss = 0.0
            if self.kind.startswith("rate"):
                tried = RATES if self.kind == "rate falls" else [2e-4 * 4.0**k for k in range(-6, 7)]
                loss = min(self.compute_loss(d, rate) for rate in tried)
            if self.compute_mean(d) - loss >= 0.9 * self.full:
                return i
        return len(GRID)


def _step(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def simulate(kind: str, number: int) -> dict[str, float]:
    """Run one search. Returns how it did."""
    task = Simulated(kind, number)
    auto = ("auto", "auto")
    rates = {"rate falls": ((1e-5, 4e-5, 1.6e-4), RATES), "rate falls, auto": auto, "rates alike": auto}.get(kind)

    def run(trials):
        return [{"score": task.score(d, rate if rates and d else None)} for d, _, rate in trials]

    evidence = Evidence(Plan(GRID, learning_rates=rates, majority=MAJORITY))
    Search(run, evidence).run()
    curve, d90 = evidence.build_curve(), task.find_d90()
    low, high = curve.estimate_interval()
    return {
        "covered": low <= d90 <= high,
        "steps": high - low,
        "wrongly not reached": low == len(GRID) > d90,
        "off by": abs(curve.find_index() - d90),
        "trials": len(evidence.trials),
        "full fine-tuning": sum(d is None for d, _, _ in evidence.trials),
        "rates": sum(seed == TUNING for _, seed, _ in evidence.trials),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=int, default=500)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table: dict[str, dict[str, float]] = {}
    for kind in args.kind:
        rows = [simulate(kind, number) for number in range(args.curves)]
        table[kind] = {name: round(float(np.mean([row[name] for row in rows])), 3) for name in rows[0]}
        if len(table) == 1:
            print("| curves | " + " | ".join(rows[0]) + " |", "|---" * (len(rows[0]) + 1) + "|", sep="\n")
        print(f"| {kind} | " + " | ".join(f"{value:g}" for value in table[kind].values()) + " |", flush=True)
    if args.out:
        sizes = {"curves": args.curves, "grid": len(GRID)}
        before = json.loads(args.out.read_text()) if args.out.exists() else {}
        stored = before["table"] if before.get("curves") == args.curves else {}
        args.out.write_text(json.dumps({**sizes, "table": {**stored, **table}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
