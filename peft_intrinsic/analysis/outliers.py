"""Outlier dimensions: the few weights that fine-tuning changes most (Zhang, Liu, Shao 2023, section 4.4)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..trajectory.fit import group_names
from ..tuner.base_model import base_parameters
from ..tuner.layer import IntrinsicLayer
from ..tuner.names import block_of, kind_of
from .heat_map import heat_map


@dataclass(frozen=True)
class Outliers:
    """Weights whose learned offset is at least k standard deviations from the mean of their layer.

    Args:
        k: threshold in standard deviations.
        indices: flat indices of these weights in ascending order, `int64[...]`, by the parameter's name.
        shapes: shape of each parameter, by name.
    """

    k: float
    indices: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]

    def __len__(self) -> int:
        return sum(map(len, self.indices.values()))

    def rows(self) -> list[dict[str, Any]]:
        """Make a row for each parameter: layer, kind (its name within the layer), numbers of weights and outliers."""
        return [
            {
                "layer": layer,
                "kind": kind_of(name),
                "weights": int(np.prod(self.shapes[name])),
                "outliers": len(self.indices[name]),
            }
            for layer, names in group_names(list(self.indices), "layer").items()
            for name in names
        ]

    def report(self, top: int = 10) -> str:
        """Format tables in Markdown: outliers by layer, and the `top` kinds of parameters with the most, as table 4."""
        rows = self.rows()
        weights = sum(row["weights"] for row in rows)
        lines = [f"{len(self)} of {weights} weights ({len(self) / weights:.2%}) changed beyond {self.k:g} σ.", ""]
        for by in ("layer", "kind"):
            lines += [f"| {by} | outliers | fraction of its weights |", "|---|---|---|"]
            totals = []
            for name in dict.fromkeys(row[by] for row in rows):
                own = [row for row in rows if row[by] == name]
                totals.append((name, sum(row["outliers"] for row in own), sum(row["weights"] for row in own)))
            if by == "kind":
                totals = sorted(totals, key=lambda item: -item[1])[:top]
            lines += [f"| {name} | {count} | {count / size:.2%} |" for name, count, size in totals]
            lines.append("")
        return "\n".join(lines)

    def random(self, seed: int = 0) -> Outliers:
        """Sample as many weights of each layer at random, the paper's baseline."""
        generator = np.random.default_rng(seed)
        indices = {}
        for names in group_names(list(self.indices), "layer").values():
            sizes = [int(np.prod(self.shapes[name])) for name in names]
            count = sum(len(self.indices[name]) for name in names)
            sample = np.sort(generator.choice(sum(sizes), count, replace=False))
            ends = np.cumsum(sizes)
            for name, end, size in zip(names, ends, sizes, strict=True):
                indices[name] = sample[(sample >= end - size) & (sample < end)] - (end - size)
        return Outliers(self.k, indices, self.shapes)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the fraction of outliers as a heat map of layers and kinds of parameters."""
        percent = {(row["layer"], row["kind"]): 100 * row["outliers"] / row["weights"] for row in self.rows()}
        heat_map(percent, f"weights beyond {self.k:g} σ, %", path)


@torch.no_grad()
def find_outliers(update: Any, k: float = 3.0, adapter: str = "default") -> Outliers:
    """Find the weights whose offset is at least k standard deviations from the mean offset of their layer.

    Args:
        update: model with an intrinsic adapter; or offsets by parameter name, for example of full fine-tuning.
        k: threshold in standard deviations, above 0. The paper uses 3.
        adapter: name of the model's adapter.

    Raises:
        ValueError: k is not above 0, the model has no such adapter, or the offsets of a layer are equal or not finite.

    Example:
        print(find_outliers(model).report())
    """
    if not k > 0:
        raise ValueError(f"k={k!r} is not above 0. Use 3, as the paper does.")
    offsets = update if isinstance(update, Mapping) else _compute_offsets(update, adapter)
    indices: dict[str, np.ndarray] = {}
    for layer, names in group_names(list(offsets), "layer").items():
        flat = torch.cat([offsets[name].detach().reshape(-1).cpu().double() for name in names])
        deviation = flat.std(unbiased=False)
        if not torch.isfinite(deviation) or not deviation:
            raise ValueError(f"The offsets of {layer} are all equal or not finite. Train the adapter first.")
        far = (flat - flat.mean()).abs() >= k * deviation
        for name, part in zip(names, far.split([offsets[name].numel() for name in names]), strict=True):
            indices[name] = part.nonzero().squeeze(1).numpy()
    return Outliers(k, indices, {name: tuple(offset.shape) for name, offset in offsets.items()})


def _compute_offsets(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    offsets = {
        offset.name: layer.get_delta_weight(adapter, own)
        for layer in model.modules()
        if isinstance(layer, IntrinsicLayer)
        for own, offset in layer.offsets.get(adapter, {}).items()
        if block_of(offset.name)
    }
    if not offsets:
        raise ValueError(f"The model has no adapter={adapter!r} on numbered blocks. Name one of its adapters.")
    return offsets


@torch.no_grad()
def disable_outliers(model: nn.Module, outliers: Outliers) -> None:
    """Set weights of a model to zero in place: the paper's ablation, before full fine-tuning.

    Args:
        model: pretrained model without adapters.
        outliers: weights to set to zero. `outliers.random()` gives a baseline.

    Raises:
        ValueError: the model lacks a parameter, or has it in another shape.
    """
    parameters: dict[str, Any] = {n: module._parameters[own] for n, (module, own) in base_parameters(model).items()}
    for name, shape in outliers.shapes.items():
        if name not in parameters or tuple(parameters[name].shape) != shape:
            raise ValueError(f"The model has no parameter {name} of shape {shape}. Load the one that was fine-tuned.")
    for name, index in outliers.indices.items():
        if len(index):
            parameters[name].view(-1)[torch.from_numpy(index).to(parameters[name].device)] = 0
