"""P learned from a training trajectory (Zhang, Liu, Shao 2023, arXiv 2305.17446, section 3)."""

from __future__ import annotations

import math

import torch

from .base import Shapes, Spec, TensorProjection
from .dense import DenseTensor
from .subspace import Subspace

THETA_SCALE = 64
"""Scale of θ under `fan_in`, relative to the root mean square length of the snapshots: docs/trajectory.md."""


@torch.inference_mode(False)
def build_trajectory(spec: Spec, shapes: Shapes) -> dict[str, TensorProjection]:
    """Build projections from the leading directions of every group of a subspace file.

    Under `isometric` the columns of P of a group are orthonormal, as in the paper. Under `fan_in` they have the root
    mean square length of the group's snapshots along the first direction, times `THETA_SCALE`.

    Raises:
        ValueError: no file is named, or d does not fit the subspace.
    """
    if spec.subspace is None:
        raise ValueError("projection='trajectory' needs subspace=, the path of a file that fit_subspace wrote.")
    subspace = Subspace(spec.subspace)
    result: dict[str, TensorProjection] = {}
    for group, start, count in subspace.allocate(spec.d, shapes):
        length = group.singular_values[0] / math.sqrt(subspace.snapshots)
        size = spec.factor * (THETA_SCALE * length if spec.scale == "fan_in" else 1.0)
        for name in group.parameters:
            if name not in shapes:  # trained fully
                continue
            part, shape = subspace.directions(name, count), shapes[name]
            matrix = (part.mT if shape.transposed else part).reshape(count, -1).T * size
            result[name] = DenseTensor(shape.rows, shape.cols, matrix.contiguous(), start)
    return result
