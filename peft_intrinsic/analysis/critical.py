"""Which layers a fine-tuning needs: putting them back to the base, and freezing all others."""

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

from ..trials.engine import Engine, InProcess
from ..trials.runner import Runner
from ..trials.store import Store
from ..tuner.base_model import base_places
from ..tuner.names import block_of, kind_of


@dataclass(frozen=True)
class CriticalLayers:
    """What each part of a fine-tuned model is worth.

    Args:
        score: of the fine-tuned model.
        parts: names of the parts, the most critical first.
        scores: of the fine-tuned model with each part put back to the base.
        weights: parameters of each part.
        cumulative_scores: scores with the least critical parts restored, one more at a time, from the end of `parts`.
        tolerance: share of the score that may be lost.
    """

    score: float
    parts: list[str]
    scores: list[float]
    weights: list[int]
    cumulative_scores: list[float]
    tolerance: float

    @property
    def restorable(self) -> list[str]:
        """The parts that can stay at the base together, within the tolerance."""
        least = self.score - self.tolerance * abs(self.score)
        count = 0
        for score in self.cumulative_scores:
            if score < least:
                break
            count += 1
        return self.parts[len(self.parts) - count :]

    @property
    def share(self) -> float:
        """Which share of the compared parameters these hold."""
        size = dict(zip(self.parts, self.weights, strict=True))
        return sum(size[part] for part in self.restorable) / sum(self.weights)

    @property
    def layers_to_transform(self) -> list[int]:
        """Indexes of the blocks that have to move, for `IntrinsicConfig(layers_to_transform=…)`.

        Raises:
            ValueError: the parts are no blocks, no block has to move (an empty list would mean all of them), or the
                blocks are of several stacks.
        """
        moved = [part for part in self.parts if part not in self.restorable and part.rpartition(".")[2].isdigit()]
        stacks = {part.rpartition(".")[0] for part in moved}
        if len(stacks) != 1:
            told = ", ".join(moved) or "none"
            raise ValueError(
                f"layers_to_transform needs blocks of one stack that have to move; these are {told}. Use "
                "critical_layers(by='layer'), a smaller tolerance, or target_modules."
            )
        return sorted(int(part.rpartition(".")[2]) for part in moved)

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON has them."""
        return {**asdict(self), "restorable": self.restorable, "share": self.share}

    def plot(self, path: str | os.PathLike) -> None:
        """What the score loses with each part put back to the base, the most critical part on top."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 1 + 0.3 * len(self.parts)), layout="constrained")
        axis = figure.subplots()
        axis.barh(self.parts[::-1], [self.score - score for score in self.scores[::-1]], color="black")
        axis.set(xlabel=f"lost of {self.score:.4f} when put back to the base")
        figure.savefig(path, dpi=150)

    def report(self) -> str:
        """Markdown: a row for each part, the most critical first."""
        lines = [
            "| put back to the base | weights | score | lost | with all below it |",
            "|---|---|---|---|---|",
            f"| nothing | | {self.score:.4f} | | |",
        ]
        for i, part in enumerate(self.parts):
            lost, below = self.score - self.scores[i], self.cumulative_scores[len(self.parts) - 1 - i]
            lines.append(f"| {part} | {self.weights[i]} | {self.scores[i]:.4f} | {lost:.4f} | {below:.4f} |")
        summary = (
            f"{self.share:.1%} of these parameters can stay at the base for at most {self.tolerance:.0%} of the score"
        )
        return "\n".join([*lines, "", f"{summary}: {', '.join(self.restorable) or 'none'}."])


@torch.no_grad()
def critical_layers(
    base: nn.Module | Mapping[str, torch.Tensor],
    tuned: nn.Module,
    evaluate: Callable[[nn.Module], float],
    by: Literal["layer", "kind", "tensor"] = "layer",
    tolerance: float = 0.01,
) -> CriticalLayers:
    """Put parts of a fine-tuned model back to its base, one by one, and see what the score loses.

    Then the least critical parts go back together, one more at a time. The model is as before afterwards.

    Args:
        base: the model before fine-tuning, or its parameters by name.
        tuned: after full fine-tuning, without adapters.
        evaluate: of a model; a finite number, higher is better.
        by: parts are numbered blocks (the rest is one part each by its first name), kinds of parameters across blocks,
            or single parameters.
        tolerance: share of the score that may be lost.

    Raises:
        ValueError: the models differ in names or shapes, nothing differs, or a score is not finite.
    """
    if by not in ("layer", "kind", "tensor"):
        raise ValueError(f"by must be 'layer', 'kind' or 'tensor', got {by!r}.")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be from 0 to below 1, got {tolerance!r}. Try 0.01.")
    if any(isinstance(module, BaseTunerLayer) for module in tuned.modules()):
        raise ValueError("tuned has adapters. Merge them first: critical_layers(base, model.merge_and_unload(), …).")
    places = base_places(tuned)
    before: dict[str, torch.Tensor]
    if isinstance(base, nn.Module):
        before = {name: module._parameters[own] for name, (module, own) in base_places(base).items()}  # type: ignore[misc]
    else:
        before = dict(base)
    parameters: dict[str, Any] = {}
    for name, (module, own) in places.items():
        parameter = module._parameters[own]
        if not any(parameter is known for known in parameters.values()):  # tied: once
            parameters[name] = parameter
    unlike = [name for name in parameters if name not in before or before[name].shape != parameters[name].shape]
    if unlike:
        raise ValueError(
            f"base has no {unlike[0]} in the shape {tuple(parameters[unlike[0]].shape)} of the tuned model."
        )
    parts: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        if not torch.equal(parameter.cpu(), before[name].detach().cpu().to(parameter.dtype)):
            label = block_of(name) or name.partition(".")[0]
            parts.setdefault({"layer": label, "kind": kind_of(name), "tensor": name}[by], []).append(name)
    if not parts:
        raise ValueError("base and tuned are equal: nothing was fine-tuned. Pass the model before training as base.")

    def scored(names: Sequence[str]) -> float:
        """The score with some parameters put back."""
        kept = {name: parameters[name].detach().clone() for name in names}
        try:
            for name in names:
                parameters[name].copy_(before[name])
            score = float(evaluate(tuned))
        finally:
            for name, values in kept.items():
                parameters[name].copy_(values)
        if not math.isfinite(score):
            raise ValueError(f"evaluate returned {score} with {len(names)} parameters put back to the base.")
        return score

    score = scored([])
    found = {part: scored(names) for part, names in parts.items()}
    order = sorted(parts, key=lambda part: found[part])
    together, back = [], []
    for part in reversed(order):
        back += parts[part]
        together.append(scored(back) if len(back) > len(parts[part]) else found[part])
    weights = [sum(parameters[name].numel() for name in parts[part]) for part in order]
    return CriticalLayers(score, order, [found[part] for part in order], weights, together, tolerance)


def frozen_sweep(
    fit: Callable[[list[str], int], float],
    order: Sequence[str],
    out: str | os.PathLike,
    seeds: int = 3,
    counts: Sequence[int] | None = None,
    engine: Engine | None = None,
) -> dict[int, list[float]]:
    """Fine-tune with all but the k most critical layers frozen, for several k.

    The trials run, are kept and are resumed by the engine that measures intrinsic dimensions.

    Args:
        fit: trains the named parts and nothing else, with a seed, and returns the score.
        order: parts, the most critical first: `CriticalLayers.parts`.
        out: folder. A finished trial is a row of `trials.jsonl`, so a killed sweep goes on.
        seeds: runs of each k.
        counts: which k, from 0; None is all of them.
        engine: where trials run; None is this process.

    Raises:
        ValueError: a count is not from 0 to the number of parts, or `out` holds a sweep of other parts.

    Returns:
        Scores of every k, a list with one for each seed.
    """
    counts = list(range(len(order) + 1)) if counts is None else list(counts)
    if bad := [k for k in counts if not isinstance(k, int) or not 0 <= k <= len(order)]:
        raise ValueError(f"counts={bad} are not whole numbers from 0 to {len(order)}, the number of parts.")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}.")
    engine = engine or InProcess()
    trial = _Frozen(fit, list(order))
    try:
        with Store(out, {"order": list(order)}) as store, tqdm(total=len(counts) * seeds, unit="trial") as bar:
            runner = Runner(trial, store, engine, bar)
            return {k: runner.finite([(k, seed, None) for seed in range(seeds)]) for k in counts}
    finally:
        engine.close()


class _Frozen:
    """A fit whose d is how many layers move. A class, so that workers can be sent it."""

    def __init__(self, fit: Callable[[list[str], int], float], order: list[str]) -> None:
        self.fit, self.order = fit, order

    def __call__(self, k: int, seed: int) -> float:
        return self.fit(self.order[:k], seed)
