"""Li et al. (2018, section 3): the intrinsic dimension of a task hardly changes while the network grows.

    python benchmarks/digits_width.py [--widths 64,128,256] [--out benchmarks/results/digits]

Their MNIST experiment with scikit-learn's digits (8 × 8 pixels, 1,297 for training, 500 for testing). A fully connected
network with two hidden layers starts from fixed random weights, and all of them are trained through d parameters. The
score is accuracy. Learning rates of full training and of the subspace are "auto".

Writes a folder per width (trials, report, plot) and prints a table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.measure import grid, measure_intrinsic_dimension, write_report
from peft_intrinsic.text.methods import PAPER

STEPS, BATCH = 400, 128


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def data() -> list[torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 8 - 1, y, test_size=500, stratify=y, random_state=0)
    return [torch.tensor(part, dtype=torch.float32 if part.ndim == 2 else torch.long) for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="64,128,256")
    parser.add_argument("--out", default="benchmarks/results/digits")
    args = parser.parse_args()
    train_x, test_x, train_y, test_y = data()
    rows = []
    for width in map(int, args.widths.split(",")):

        def fit(d: int | None, seed: int, rate: float, width: int = width) -> float:
            model = network(width)
            if d is not None:
                model = get_peft_model(model, IntrinsicConfig(d=d, seed=seed, head="keep", **PAPER))
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(parameters, lr=rate)
            generator = torch.Generator().manual_seed(seed)
            for _ in range(STEPS):
                batch = torch.randint(len(train_x), (BATCH,), generator=generator)
                nn.functional.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                return float((model(test_x).argmax(1) == test_y).float().mean())

        folder = Path(args.out, str(width))
        result = measure_intrinsic_dimension(
            fit,
            grid(10, 2000, 48),
            majority=float((test_y == test_y.mode().values).float().mean()),
            learning_rates=("auto", "auto"),
            out=folder,
            settings={"width": width, "steps": STEPS, "batch": BATCH},
        )
        write_report(result, folder)
        weights = sum(p.numel() for p in network(width).parameters())
        low, high = result.interval
        rows.append(f"| {width} | {weights} | {result.baseline.level:.3f} | {result.d} | [{low}, {high}] |")
    print("| width | weights | full training | d90 | 90 % interval |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
