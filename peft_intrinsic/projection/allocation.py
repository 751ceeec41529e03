"""Allocation of the coordinates of θ to tensors and their tiles, in integers."""

from __future__ import annotations

import heapq
from typing import NamedTuple

from .base import PARTS, Shape, Shapes

ROWS = 16384
"""R: tensors with more rows are cut into chunks of this height, each with its own signs and permutations."""

Slice = tuple[int, int]
"""First coordinate of θ, and the number of coordinates."""


class Tiling(NamedTuple):
    """The tiles of a tensor: row chunks of `height`, column blocks of n columns, and `depth` slots in each tile.

    A slot is one Fastfood block, which mixes one slice of θ.
    """

    height: int
    chunks: int
    blocks: int
    depth: int

    def weights(self, shape: Shape, n: int) -> list[int]:
        """Numbers of weights that the slots affect, in the order of chunk, block and depth."""
        heights = [min(self.height, shape.rows - c * self.height) for c in range(self.chunks)]
        widths = [min(n, shape.cols - b * n) for b in range(self.blocks)]
        return [height * width for height in heights for width in widths for _ in range(self.depth)]


def make_tiling(shape: Shape, count: int, n: int) -> Tiling:
    """Cut a tensor into the largest tiles that hold `count` coordinates: n per slot, at most one per weight."""
    height = min(ROWS, shape.rows, n * shape.size // count)
    whole = max(1, shape.cols // n)  # a narrow last block holds few coordinates
    depth = -(-count * height // (shape.rows * n * whole))
    return Tiling(height, -(-shape.rows // height), -(-shape.cols // n), min(n, depth))


def allocate(d: int, shapes: Shapes) -> dict[str, Slice]:
    """Allocate consecutive coordinates of θ to the tensors, in the order of the sorted names.

    Tensors get equal parts, a head `PARTS["head"]` of them, and none more than its number of weights. If there are more
    tensors than coordinates, adjacent tensors have a coordinate in common.

    Raises:
        ValueError: d exceeds the number of weights.
    """
    names = sorted(shapes)
    if d > (total := sum(shapes[name].size for name in names)):
        raise ValueError(f"d={d} exceeds the {total} weights of the adapted parameters. Use d ≤ {total}.")
    full: set[str] = set()
    while True:
        rest = d - sum(shapes[name].size for name in full)
        total = sum(PARTS[shapes[name].kind] for name in names if name not in full) or 1
        over = {
            name for name in names if name not in full and shapes[name].size * total < rest * PARTS[shapes[name].kind]
        }
        if not over:
            break
        full |= over
    result, reached = {}, 0  # multiples of 1 / total
    for name in names:
        start = reached // total
        reached += shapes[name].size * total if name in full else rest * PARTS[shapes[name].kind]
        result[name] = start, max(1, reached // total - start)
    return result


def slice_tensor(coordinates: Slice, weights: list[int], n: int) -> list[Slice]:
    """Cut a tensor's coordinates into ⌈count/n⌉ slices that affect about equally many weights, one for each slot."""
    start, count = coordinates
    slices, total, before = -(-count // n), sum(weights), 0
    k, result = -1, []
    for slot, weight in enumerate(weights):
        # No slice is left out: the next one follows, and enough slots remain for all others.
        k = max(min(slices * before // total, k + 1), slices - len(weights) + slot)
        low = k * count // slices
        result.append((start + low, (k + 1) * count // slices - low))
        before += weight
    return result


def slice_model(d: int, weights: dict[str, list[int]], n: int) -> dict[str, list[Slice]]:
    """Cut θ into ⌈d/n⌉ slices for the whole model, and assign one to each slot.

    In the order of the sorted names, each slot gets the slice that affects the fewest weights so far.
    """
    slices = -(-d // n)
    cuts = [k * d // slices for k in range(slices + 1)]
    load = [(0, k) for k in range(slices)]
    result: dict[str, list[Slice]] = {}
    for name in sorted(weights):
        result[name] = []
        for weight in weights[name]:
            affected, k = heapq.heappop(load)
            heapq.heappush(load, (affected + weight, k))
            result[name].append((cuts[k], cuts[k + 1] - cuts[k]))
    return result
