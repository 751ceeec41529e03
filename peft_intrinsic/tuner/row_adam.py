"""Adam for the rows of an adapter bank, of which a batch uses few."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class RowAdam(torch.optim.Optimizer):
    """AdamW with moments and a number of steps for each row, for sparse gradients as those of an `AdapterBank`.

    A row that no sample of the batch uses is left as it is, with its moments. So each adapter learns as under AdamW
    alone. `torch.optim.SparseAdam` counts the steps of all rows together: the first steps of a row that comes late are
    up to 6.6 times too long.

    Loshchilov and Hutter 2019 (arXiv 1711.05101).

    Args:
        params: parameters `[K, …]` with sparse gradients, such as `bank.parameters()`, or groups of them.
        lr: the learning rate.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decay of the weights of the rows in use, times the learning rate.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> optimizer = RowAdam(bank.parameters(), lr=2e-4)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise ValueError(f"{name}={value} must be at least 0.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must be from 0 to below 1.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows that have a gradient.

        Args:
            closure: computes the loss and its gradient again, as for every optimizer of torch.

        Raises:
            ValueError: a gradient is dense, or not finite. Nothing is updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [
            (group, p, _read(p.grad)) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        for group, p, (rows, gradient) in found:
            state, (first, second) = self.state[p], group["betas"]
            if not state:
                state["step"] = torch.zeros(len(p), device=p.device)
                state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] = state["step"].to(p.device)  # torch loads it to the CPU
            if added := len(p) - len(state["step"]):  # rows that were appended to the bank
                for name, value in state.items():
                    state[name] = torch.cat([value, value.new_zeros(added, *value.shape[1:])])
            step = state["step"][rows] + 1
            mean = state["mean"][rows].lerp(gradient, 1 - first)
            square = state["square"][rows].lerp(gradient.square(), 1 - second)
            state["step"][rows], state["mean"][rows], state["square"][rows] = step, mean, square
            step = step.view(-1, *[1] * (p.dim() - 1))
            change = mean / (1 - first**step) / ((square / (1 - second**step)).sqrt() + group["eps"])
            p[rows] -= group["lr"] * (change + group["weight_decay"] * p[rows])
        return loss


def _read(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a sparse gradient, `int[n]`, and their values, `[n, …]`."""
    if not gradient.is_sparse:
        raise ValueError("RowAdam updates rows with sparse gradients, but a gradient is dense. Use torch.optim.AdamW.")
    gradient = gradient.coalesce()
    rows, values = gradient.indices()[0], gradient.values()
    finite = values.flatten(1).isfinite().all(1)
    if not finite.all():
        raise ValueError(
            f"The gradients of rows {rows[~finite].tolist()} are not finite, so no row was updated. Look at their "
            "samples, or lower the learning rate. Clipping gradients spreads such values to all rows of the batch."
        )
    return rows, values
