"""A task whose d90 is known: the first of the grid at 100 or above."""

from __future__ import annotations

from peft_intrinsic.measure import grid

DIMS = grid(10, 1000, 20)


def step(d, seed, *rate) -> float:
    return 0.8 if d is None or d >= 100 else 0.4
