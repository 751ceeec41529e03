"""Measure d90 of a torch module in a plain training loop: a classifier of digits.

    python examples/measure.py [--ray] [--out runs/digits]

Needs the extra `measure` (in the clone: `pip install '.[measure]'`). --ray runs trials in parallel and needs `ray`. An
interrupted run resumes. Report and plot are written to the folder.
"""

from __future__ import annotations

import argparse

import torch
from peft import get_peft_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.measure import RayEngine, grid, measure_intrinsic_dimension, write_report


def fit(d: int | None, seed: int, learning_rate: float) -> float:
    """Train once, d parameters or (None) all weights, and return the accuracy on held-out digits."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 8 - 1, y, test_size=500, stratify=y, random_state=0)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    train_y, test_y = (torch.tensor(part) for part in parts[2:])
    torch.manual_seed(0)  # every trial starts from the same weights
    model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    if d is not None:
        model = get_peft_model(model, IntrinsicConfig(d=d, seed=seed, target_modules="all", projection="global"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        batch = torch.randint(len(train_x), (128,), generator=generator)
        nn.functional.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float((model(test_x).argmax(1) == test_y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--out", default="runs/digits")
    args = parser.parse_args()
    result = measure_intrinsic_dimension(
        fit,
        grid(10, 1000, 24),
        majority=0.1,
        learning_rates=([3e-3, 1e-2], [2e-4, 4e-4]),
        out=args.out,
        engine=RayEngine() if args.ray else None,
    )
    write_report(result, args.out)
    print(f"d90 = {result.d}, 90 % interval {result.interval}; report and plot in {args.out}")


if __name__ == "__main__":
    main()
