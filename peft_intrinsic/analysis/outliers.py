"""Outlier dimensions: the few weights that a fine-tuning moves far (Zhang, Liu, Shao 2023, section 4.4)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..trajectory.fit import group_names
from ..tuner.base_model import base_places
from ..tuner.layer import IntrinsicLayer
from ..tuner.names import block_of, kind_of
from .heat_map import heat_map


@dataclass(frozen=True)
class Outliers:
    """Weights whose learnt offset is further than k standard deviations from the mean of their layer.

    Args:
        k: the threshold.
        places: of each parameter, flat indexes in ascending order, `int64[...]`.
        shapes: of the parameters.
    """

    k: float
    places: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]

    def __len__(self) -> int:
        return sum(map(len, self.places.values()))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each parameter: layer, kind (its name within the layer), weights, outliers."""
        return [
            {
                "layer": layer,
                "kind": kind_of(name),
                "weights": int(np.prod(self.shapes[name])),
                "outliers": len(self.places[name]),
            }
            for layer, names in group_names(list(self.places), "layer").items()
            for name in names
        ]

    def report(self, top: int = 10) -> str:
        """Markdown: outliers of each layer, and the kinds of modules with the most, as the paper's table 4."""
        rows = self.rows()
        weights = sum(row["weights"] for row in rows)
        lines = [f"{len(self)} of {weights} weights ({len(self) / weights:.2%}) moved beyond {self.k:g} σ.", ""]
        for by in ("layer", "kind"):
            lines += [f"| {by} | outliers | share of its weights |", "|---|---|---|"]
            found = []
            for value in dict.fromkeys(row[by] for row in rows):
                mine = [row for row in rows if row[by] == value]
                found.append((value, sum(r["outliers"] for r in mine), sum(r["weights"] for r in mine)))
            if by == "kind":
                found = sorted(found, key=lambda item: -item[1])[:top]
            lines += [f"| {value} | {count} | {count / size:.2%} |" for value, count, size in found]
            lines.append("")
        return "\n".join(lines)

    def random(self, seed: int = 0) -> Outliers:
        """As many weights of each layer, drawn at random: what the paper compares with."""
        generator = np.random.default_rng(seed)
        places = {}
        for names in group_names(list(self.places), "layer").values():
            sizes = [int(np.prod(self.shapes[name])) for name in names]
            count = sum(len(self.places[name]) for name in names)
            drawn = np.sort(generator.choice(sum(sizes), count, replace=False))
            ends = np.cumsum(sizes)
            for name, end, size in zip(names, ends, sizes, strict=True):
                places[name] = drawn[(drawn >= end - size) & (drawn < end)] - (end - size)
        return Outliers(self.k, places, self.shapes)

    def plot(self, path: str | os.PathLike) -> None:
        """Share of outliers, a row for each layer and a column for each kind of module."""
        shares = {(row["layer"], row["kind"]): 100 * row["outliers"] / row["weights"] for row in self.rows()}
        heat_map(shares, f"weights beyond {self.k:g} σ, %", path)


@torch.no_grad()
def find_outliers(update: Any, k: float = 3.0, adapter: str = "default") -> Outliers:
    """Weights whose offset lies k standard deviations or more from the mean offset of their layer.

    Args:
        update: a model with an intrinsic adapter; or offsets by the parameters' names, such as a full fine-tuning's.
        k: the threshold, above 0. The paper's is 3.
        adapter: which one of the model.

    Raises:
        ValueError: k is not above 0, the model has no such adapter, or nothing has moved.
    """
    if not k > 0:
        raise ValueError(f"k must be above 0, got {k!r}. The paper's is 3.")
    offsets = update if isinstance(update, Mapping) else _offsets(update, adapter)
    places: dict[str, np.ndarray] = {}
    for layer, names in group_names(list(offsets), "layer").items():
        flat = torch.cat([offsets[name].detach().reshape(-1).cpu().double() for name in names])
        deviation = flat.std(unbiased=False)
        if not torch.isfinite(deviation) or not deviation:
            raise ValueError(f"The offsets of {layer} are all equal or not finite. Train the adapter first.")
        far = (flat - flat.mean()).abs() >= k * deviation
        for name, part in zip(names, far.split([offsets[name].numel() for name in names]), strict=True):
            places[name] = part.nonzero().squeeze(1).numpy()
    return Outliers(k, places, {name: tuple(offset.shape) for name, offset in offsets.items()})


def _offsets(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    found = {
        offset.name: layer.get_delta_weight(adapter, own)
        for layer in model.modules()
        if isinstance(layer, IntrinsicLayer)
        for own, offset in layer.offsets.get(adapter, {}).items()
    }
    found = {name: offset for name, offset in found.items() if block_of(name)}
    if not found:
        raise ValueError(f"The model has no adapter {adapter!r} that moves numbered blocks. Name one that does.")
    return found


@torch.no_grad()
def disable_outliers(model: nn.Module, outliers: Outliers) -> None:
    """Set weights of a model to zero, in place: the paper's ablation, before a full fine-tuning.

    Args:
        model: the pretrained model, without adapters.
        outliers: as found, or `outliers.random()` to compare.

    Raises:
        ValueError: the model has other parameters.
    """
    places = base_places(model)
    for name, shape in outliers.shapes.items():
        if name not in places or tuple(places[name][0]._parameters[places[name][1]].shape) != shape:  # type: ignore[union-attr]
            raise ValueError(f"The model has no parameter {name} of shape {shape}. Load the one that was fine-tuned.")
    for name, index in outliers.places.items():
        module, own = places[name]
        parameter: Any = module._parameters[own]
        if len(index):
            parameter.view(-1)[torch.from_numpy(index).to(parameter.device)] = 0
