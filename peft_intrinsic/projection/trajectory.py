"""P learnt from the trajectory of a fine-tuning (Zhang, Liu, Shao 2023, arXiv 2305.17446, section 3)."""

from __future__ import annotations

import math

import torch

from .base import Shapes, Spec, TensorProjection
from .dense import DenseTensor
from .subspace import Subspace

UNIT = 64
"""What θ is counted in under `fan_in`, in typical lengths of the trajectory: docs/trajectory.md."""


@torch.inference_mode(False)
def build_trajectory(spec: Spec, shapes: Shapes) -> dict[str, TensorProjection]:
    """The directions of a subspace file, the leading ones of every group.

    Under `isometric` a group's columns of P are orthonormal, as in the paper. Under `fan_in` all columns of a group
    have the root mean square length of its snapshots along the first direction, times `UNIT`.

    Raises:
        ValueError: d does not fit the subspace.
    """
    if spec.subspace is None:
        raise ValueError("projection='trajectory' needs subspace, the file that fit_subspace wrote.")
    subspace = Subspace(spec.subspace)
    result: dict[str, TensorProjection] = {}
    for group, start, count in subspace.windows(spec.d, shapes):
        size = 1.0 if spec.scale == "isometric" else UNIT * group.singular_values[0] / math.sqrt(subspace.snapshots)
        for name in group.parameters:
            if name not in shapes:  # trained in full
                continue
            part = subspace.directions(name, count)
            matrix = (part.mT if shapes[name].transposed else part).reshape(count, -1).T
            result[name] = DenseTensor(
                shapes[name].rows, shapes[name].cols, (matrix * (size * spec.factor)).contiguous(), start
            )
    return result
