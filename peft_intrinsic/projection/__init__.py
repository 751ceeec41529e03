"""Fixed projections P from θ to the weights of a model. This package imports torch and numpy, but not PEFT."""

from collections.abc import Callable

from .base import Kind as Kind
from .base import Shape as Shape
from .base import Shapes as Shapes
from .base import Spec as Spec
from .base import TensorProjection as TensorProjection
from .base import ValueBias as ValueBias
from .dense import build_dense
from .fastfood import BLOCK_SIZE as BLOCK_SIZE
from .fastfood import FastfoodTensor as FastfoodTensor
from .fastfood import build_fastfood, build_global
from .randomness import ALGORITHM_VERSION as ALGORITHM_VERSION
from .trajectory import build_trajectory
from .value_bias import RankOneTensor as RankOneTensor
from .value_bias import build_value_bias

PROJECTIONS: dict[str, Callable[[Spec, Shapes], dict[str, TensorProjection]]] = {
    "fastfood": build_fastfood,
    "global": build_global,
    "dense": build_dense,
    "trajectory": build_trajectory,
    "value_bias": build_value_bias,
    "value_lora": build_value_bias,
}
"""Builders by the value of `IntrinsicConfig.projection`. Each returns the projection of every tensor, by its name."""

OF_VALUES = ("value_bias", "value_lora")
"""Projections that adapt the value projections of attention layers: their biases, or their weights by rank one."""
