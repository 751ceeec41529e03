"""Critical layers of fine-tuning, by restoring layers to the base and by freezing all others."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm import tqdm

from ..figures import save_figure, styled
from ..trials.engine import Engine, InProcess
from ..trials.runner import Runner
from ..trials.store import Store
from ..tuner.base_model import base_parameters
from ..tuner.names import block_of, kind_of


@dataclass(frozen=True)
class CriticalLayers:
    """Parts of a fine-tuned model, ranked by the loss of score when they are restored to the base.

    Args:
        score: score of the fine-tuned model.
        parts: names of the parts, the most critical first.
        scores: score with each part restored to the base.
        weights: number of parameters of each part.
        cumulative_scores: scores with the last of `parts` restored, the last two, and so on.
        tolerance: fraction of the score that may be lost.
    """

    score: float
    parts: list[str]
    scores: list[float]
    weights: list[int]
    cumulative_scores: list[float]
    tolerance: float

    @property
    def restorable(self) -> list[str]:
        """Parts that can be restored together within the tolerance, the least critical ones."""
        least = self.score - self.tolerance * abs(self.score)
        count = 0
        for score in self.cumulative_scores:
            if score < least:
                break
            count += 1
        return self.parts[len(self.parts) - count :]

    @property
    def share(self) -> float:
        """Fraction of the compared parameters in the `restorable` parts."""
        size = dict(zip(self.parts, self.weights, strict=True))
        return sum(size[part] for part in self.restorable) / sum(self.weights)

    @property
    def layers_to_transform(self) -> list[int]:
        """Indices of the blocks that cannot be restored, for `IntrinsicConfig(layers_to_transform=…)`.

        Raises:
            ValueError: the parts are no blocks, all blocks can be restored, or the others belong to several stacks.
        """
        needed = [part for part in self.parts if part not in self.restorable and part.rpartition(".")[2].isdigit()]
        if len({part.rpartition(".")[0] for part in needed}) != 1:
            raise ValueError(
                f"layers_to_transform needs critical blocks of one stack, but they are {', '.join(needed) or 'none'}. "
                "Use critical_layers(by='layer'), a smaller tolerance, or target_modules."
            )
        return sorted(int(part.rpartition(".")[2]) for part in needed)

    def to_dict(self) -> dict[str, Any]:
        """Return all values for JSON."""
        return {**asdict(self), "restorable": self.restorable, "share": self.share}

    @styled
    def plot(self, path: str | os.PathLike) -> None:
        """Draw the loss of score for each restored part, the most critical one on top."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 1 + 0.3 * len(self.parts)))
        axis = figure.subplots()
        axis.barh(self.parts[::-1], [self.score - score for score in self.scores[::-1]])
        axis.set(xlabel=f"loss of score (of {self.score:.4f}) when restored to the base")
        save_figure(figure, path)

    def report(self) -> str:
        """Format a table in Markdown, the most critical part first."""
        lines = [
            "| restored to the base | weights | score | loss | score with all below it restored |",
            "|---|---|---|---|---|",
            f"| nothing | | {self.score:.4f} | | |",
        ]
        for i, part in enumerate(self.parts):
            lost, below = self.score - self.scores[i], self.cumulative_scores[len(self.parts) - 1 - i]
            lines.append(f"| {part} | {self.weights[i]} | {self.scores[i]:.4f} | {lost:.4f} | {below:.4f} |")
        summary = f"{self.share:.1%} of these parameters can be restored for at most {self.tolerance:.0%} of the score"
        return "\n".join([*lines, "", f"{summary}: {', '.join(self.restorable) or 'none'}."])


@torch.no_grad()
def critical_layers(
    base: nn.Module | Mapping[str, torch.Tensor],
    tuned: nn.Module,
    evaluate: Callable[[nn.Module], float],
    by: Literal["layer", "kind", "tensor"] = "layer",
    tolerance: float = 0.01,
) -> CriticalLayers:
    """Rank the parts of a fine-tuned model by the loss of score when each is restored to the base.

    Then the least critical parts are restored together, one more at a time. The model is unchanged afterwards
    (Radiya-Dixit and Wang 2020, section 4).

    Args:
        base: model before fine-tuning, or its parameters by name.
        tuned: model after full fine-tuning, without adapters.
        evaluate: function from a model to a finite score, higher is better.
        by: `"layer"` for numbered blocks (other parameters form parts by the first component of their name), `"kind"`
            for kinds of parameters across blocks, or `"tensor"` for single parameters.
        tolerance: fraction of the score that may be lost, from 0 to below 1.

    Raises:
        ValueError: the models differ in names or shapes, or are equal; a score is not finite; or an option is invalid.

    Example:
        critical = critical_layers(base, tuned, evaluate)
        config = IntrinsicConfig(target_modules="all", layers_to_transform=critical.layers_to_transform)
    """
    if by not in ("layer", "kind", "tensor"):
        raise ValueError(f"by={by!r} is not supported. Use 'layer', 'kind' or 'tensor'.")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r} is not in [0, 1). Use 0.01, for example.")
    if any(isinstance(module, BaseTunerLayer) for module in tuned.modules()):
        raise ValueError("tuned has adapters. Merge them first: critical_layers(base, model.merge_and_unload(), …).")
    before: Any = base
    if isinstance(base, nn.Module):
        before = {name: module._parameters[own] for name, (module, own) in base_parameters(base).items()}
    parameters: dict[str, Any] = {}
    for name, (module, own) in base_parameters(tuned).items():
        parameter = module._parameters[own]
        if not any(parameter is known for known in parameters.values()):  # tied parameters once
            parameters[name] = parameter
    unlike = [name for name in parameters if name not in before or before[name].shape != parameters[name].shape]
    if unlike:
        raise ValueError(
            f"base has no {unlike[0]} of shape {tuple(parameters[unlike[0]].shape)}, as tuned has. Pass its own base."
        )
    parts: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        if not torch.equal(parameter.cpu(), before[name].detach().cpu().to(parameter.dtype)):
            label = block_of(name) or name.partition(".")[0]
            parts.setdefault({"layer": label, "kind": kind_of(name), "tensor": name}[by], []).append(name)
    if not parts:
        raise ValueError("base and tuned are equal. Pass the model before fine-tuning as base.")

    def score_restored(names: Sequence[str]) -> float:
        """Compute the score with some parameters restored to the base."""
        trained = {name: parameters[name].detach().clone() for name in names}
        try:
            for name in names:
                parameters[name].copy_(before[name])
            score = float(evaluate(tuned))
        finally:
            for name, values in trained.items():
                parameters[name].copy_(values)
        if not math.isfinite(score):
            raise ValueError(
                f"evaluate returned {score} with {len(names)} parameters restored. It must return a finite score."
            )
        return score

    score = score_restored([])
    scores = {part: score_restored(names) for part, names in parts.items()}
    order = sorted(parts, key=lambda part: scores[part])
    together, restored = [], []
    for part in reversed(order):
        restored += parts[part]
        together.append(score_restored(restored) if len(restored) > len(parts[part]) else scores[part])
    weights = [sum(parameters[name].numel() for name in parts[part]) for part in order]
    return CriticalLayers(score, order, [scores[part] for part in order], weights, together, tolerance)


def frozen_sweep(
    fit: Callable[[list[str], int], float],
    order: Sequence[str],
    out: str | os.PathLike,
    seeds: int = 3,
    counts: Sequence[int] | None = None,
    engine: Engine | None = None,
) -> dict[int, list[float]]:
    """Fine-tune with all but the k most critical layers frozen, for several k.

    Trials are rows of `trials.jsonl` in `out`, so an interrupted sweep resumes.

    Args:
        fit: function from the names of the trained parts and a seed to a score.
        order: names of the parts, the most critical first: `CriticalLayers.parts`.
        out: folder of the trials.
        seeds: number of runs for each k.
        counts: values of k, from 0. None is all of them.
        engine: engine that runs the trials. None is this process.

    Returns:
        Scores for each k, one for each seed.

    Raises:
        ValueError: a count is not from 0 to the number of parts, or `out` holds a sweep of other parts.
    """
    counts = list(range(len(order) + 1)) if counts is None else list(counts)
    if bad := [k for k in counts if not isinstance(k, int) or not 0 <= k <= len(order)]:
        raise ValueError(f"counts={bad} are no integers from 0 to {len(order)}, the number of parts.")
    if seeds < 1:
        raise ValueError(f"seeds={seeds} is less than 1. Use at least one seed.")
    engine = engine or InProcess()
    trial = _Frozen(fit, list(order))
    try:
        with Store(out, {"order": list(order)}) as store, tqdm(total=len(counts) * seeds, unit="trial") as bar:
            runner = Runner(trial, store, engine, bar)
            rows = {k: runner.run([(k, seed, None) for seed in range(seeds)], finite=True) for k in counts}
            return {k: [row["score"] for row in rows[k]] for k in counts}
    finally:
        engine.close()


class _Frozen:
    """A fit whose d is the number of trained parts. A class, so that it can be pickled for workers."""

    def __init__(self, fit: Callable[[list[str], int], float], order: list[str]) -> None:
        self.fit, self.order = fit, order

    def __call__(self, k: int, seed: int) -> float:
        return self.fit(self.order[:k], seed)
