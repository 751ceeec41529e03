"""Train a torch module on scikit-learn's handwritten digits with d parameters, in a plain training loop.

python examples/custom_module.py --d 300
"""

from __future__ import annotations

import argparse

import torch
from collapse import report_collapse
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import nn

from peft_intrinsic import IntrinsicConfig


def network() -> nn.Module:
    """Build the network. Its random start is part of the adapter's base, so it has a fixed seed."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=300)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--out", default="runs/digits")
    args = parser.parse_args()

    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1297], order[1297:]

    model = get_peft_model(network(), IntrinsicConfig(d=args.d))
    model.print_trainable_parameters()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    for step in range(args.steps):
        batch = train[torch.randint(len(train), (64,), generator=torch.Generator().manual_seed(step))]
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def predicted(network: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return network(x[held_out]).argmax(-1)

    def accuracy(network: nn.Module) -> float:
        return (predicted(network) == y[held_out]).float().mean().item()

    report_collapse(predicted(model), y[held_out], args.lr)
    model.save_pretrained(args.out)
    reloaded = PeftModel.from_pretrained(network(), args.out)
    before, after, again = accuracy(network()), accuracy(model), accuracy(reloaded)
    print(f"accuracy {before:.4f} -> {after:.4f} with d={args.d}, reloaded {again:.4f}")


if __name__ == "__main__":
    main()
