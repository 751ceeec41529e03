"""Which coordinates of θ each tensor gets, and how it is cut into tiles to hold them. Integers only."""

from __future__ import annotations

import heapq
from typing import NamedTuple

from .base import PARTS, Shape, Shapes

ROWS = 16384
"""R: tensors with more rows are cut into chunks of this height, each with its own signs and permutations."""

Window = tuple[int, int]
"""First coordinate of θ, and how many."""


class Tiling(NamedTuple):
    """How a tensor is cut: row chunks of `height`, column blocks of n columns, and `depth` slots in each tile.

    A slot is one Fastfood block, which mixes one window of θ.
    """

    height: int
    chunks: int
    blocks: int
    depth: int

    def weights(self, shape: Shape, n: int) -> list[int]:
        """How many weights each slot moves, in the order of chunk, block and depth."""
        heights = [min(self.height, shape.rows - c * self.height) for c in range(self.chunks)]
        widths = [min(n, shape.cols - b * n) for b in range(self.blocks)]
        return [height * width for height in heights for width in widths for _ in range(self.depth)]


def tiling(shape: Shape, count: int, n: int) -> Tiling:
    """The coarsest cut that leaves room for `count` coordinates: n in a slot, as many as weights in a tile."""
    height = min(ROWS, shape.rows, n * shape.size // count)
    whole = max(1, shape.cols // n)  # a narrow last block has room for little
    depth = -(-count * height // (shape.rows * n * whole))
    return Tiling(height, -(-shape.rows // height), -(-shape.cols // n), min(n, depth))


def shares(d: int, shapes: Shapes) -> dict[str, Window]:
    """A window of θ for each tensor, in the order of the sorted names: equal parts, and `PARTS` of them for a head.

    No tensor gets more than it has weights; the others share the rest. Where there are more tensors than coordinates,
    neighbours have the same one.

    Raises:
        ValueError: there are fewer weights than coordinates.
    """
    names = sorted(shapes)
    if d > (total := sum(shapes[name].size for name in names)):
        raise ValueError(f"d={d} is more than the {total} weights that are moved. Use d={total} at most.")
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
    result, reached = {}, 0  # in units of 1 / total
    for name in names:
        start = reached // total
        reached += shapes[name].size * total if name in full else rest * PARTS[shapes[name].kind]
        result[name] = start, max(1, reached // total - start)
    return result


def own_windows(share: Window, weights: list[int], n: int) -> list[Window]:
    """The window of each slot of a tensor: its share in ⌈count/n⌉ slices, each moving about as many weights."""
    start, count = share
    slices, total, before = -(-count // n), sum(weights), 0
    k, result = -1, []
    for slot, weight in enumerate(weights):
        # None is passed over, and there are slots left for those to come.
        k = max(min(slices * before // total, k + 1), slices - len(weights) + slot)
        low = k * count // slices
        result.append((start + low, (k + 1) * count // slices - low))
        before += weight
    return result


def global_windows(d: int, weights: dict[str, list[int]], n: int) -> dict[str, list[Window]]:
    """The windows of all slots where θ is cut into ⌈d/n⌉ slices for the whole model.

    In the order of the sorted names, each slot gets the slice that moves the fewest weights so far.
    """
    slices = -(-d // n)
    windows = [(k * d // slices, (k + 1) * d // slices - k * d // slices) for k in range(slices)]
    load = [(0, k) for k in range(slices)]
    result: dict[str, list[Window]] = {}
    for name in sorted(weights):
        result[name] = []
        for weight in weights[name]:
            moved, k = heapq.heappop(load)
            heapq.heappush(load, (moved + weight, k))
            result[name].append(windows[k])
    return result
