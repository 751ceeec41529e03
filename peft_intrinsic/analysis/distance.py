"""Distances between two sets of parameters, tensor by tensor."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..tuner.names import block_of, kind_of
from .heat_map import heat_map
from .reading import Reader, Source, offsets, prefix

CHUNK = 2**20
"""Weights of both sides that are held in float64 at a time."""

STD = 0.02
"""Of the random initialisations of the baseline: BERT's."""


@dataclass
class Sums:
    """What is added up over weights. From these all distances follow, of one tensor or of several.

    Args:
        entries, units: weights, and output units (rows).
        changed: entries that differ by more than the threshold.
        absolute: Σ|Δ|, with Δ = tuned − base.
        squared: ΣΔ².
        base, tuned: Σu² and Σv² of both sides.
        across: ΣΔ(u + v), which is Σv² − Σu² without cancellation.
    """

    entries: int = 0
    units: int = 0
    changed: int = 0
    absolute: float = 0.0
    squared: float = 0.0
    base: float = 0.0
    tuned: float = 0.0
    across: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def l1(self) -> float:
        """Σ|Δ|."""
        return self.absolute

    @property
    def l1_per_unit(self) -> float:
        """Mean Σ|Δ| of an output unit."""
        return self.absolute / max(self.units, 1)

    @property
    def l2_relative(self) -> float:
        """‖Δ‖ / ‖base‖; NaN where the base is zero and the other is not."""
        return math.sqrt(self.squared / self.base) if self.base else math.nan if self.squared else 0.0

    @property
    def angular(self) -> float:
        """arccos(cos) / π: 0 is the same direction, 1 the opposite. NaN where one side alone is zero.

        By the chord between the unit vectors, which for near vectors keeps the digits that arccos loses.
        """
        if not self.base or not self.tuned:
            return math.nan if self.base != self.tuned else 0.0
        u, v = math.sqrt(self.base), math.sqrt(self.tuned)
        chord = math.sqrt(max(self.squared - (self.across / (u + v)) ** 2, 0.0) / (u * v))
        return 2 * math.asin(min(chord / 2, 1.0)) / math.pi

    @property
    def changed_share(self) -> float:
        """Share of entries that differ by more than the threshold."""
        return self.changed / max(self.entries, 1)


MEASURES = ("l1", "l1_per_unit", "l2_relative", "angular", "changed_share")


def compared(base: torch.Tensor, tuned: torch.Tensor, threshold: float) -> Sums:
    """The sums of one tensor, a piece at a time in float64."""
    total = Sums(units=base.shape[0] if base.dim() > 1 else base.numel())
    for u, v in zip(base.reshape(-1).split(CHUNK), tuned.reshape(-1).split(CHUNK), strict=True):
        u, v = u.detach().cpu().double(), v.detach().cpu().double()
        delta = v - u
        total += Sums(
            u.numel(),
            0,
            int((delta.abs() > threshold).sum()),
            *(float(x) for x in (delta.abs().sum(), delta @ delta, u @ u, v @ v, delta @ (u + v))),
        )
    return total


@dataclass
class Distances:
    """Distances of every tensor, by name; and of two random initialisations of the same shapes.

    Args:
        tensors: of each parameter.
        random: of each matrix, between two normal draws with BERT's deviation of 0.02.
        threshold: above which an entry counts as changed.
        ignored: parameters that only one side has.
    """

    threshold: float
    tensors: dict[str, Sums] = field(default_factory=dict)
    random: dict[str, Sums] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    @property
    def total(self) -> Sums:
        """Of all parameters together."""
        return sum(self.tensors.values(), Sums())

    def by(self, what: str) -> dict[str, tuple[Sums, Sums]]:
        """Distances, and those of the random initialisations, for each `"layer"` or each `"kind"` within layers."""
        label = {"layer": lambda name: block_of(name) or "rest", "kind": kind_of}[what]
        result: dict[str, tuple[Sums, Sums]] = {}
        for name, sums in self.tensors.items():
            before = result.get(label(name), (Sums(), Sums()))
            result[label(name)] = before[0] + sums, before[1] + self.random.get(name, Sums())
        return result

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON has them: null for what is not defined."""

        def told(sums: Sums) -> dict[str, Any]:
            found = {name: getattr(sums, name) for name in MEASURES}
            return {"entries": sums.entries} | {n: None if math.isnan(v) else v for n, v in found.items()}

        parts = {what: {name: told(found) for name, (found, _) in self.by(what).items()} for what in ("layer", "kind")}
        tensors = {name: told(sums) for name, sums in self.tensors.items()}
        random = told(sum(self.random.values(), Sums()))
        return {
            "threshold": self.threshold,
            "total": told(self.total),
            "random": random,
            **parts,
            "tensor": tensors,
        }

    def report(self) -> str:
        """Markdown: a table by layer and one by kind, the random initialisations beside."""
        head = ["weights", "L1", "L1 per unit", "L2 / base", "angular", f"moved > {self.threshold:g}"]
        lines: list[str] = []
        for what in ("layer", "kind"):
            lines += [f"| {what} | {' | '.join(head)} | random: L1 per unit | angular |", "|---" * 9 + "|"]
            for name, (sums, random) in {
                **self.by(what),
                "all": (self.total, sum(self.random.values(), Sums())),
            }.items():
                figures = [*(getattr(sums, m) for m in MEASURES), random.l1_per_unit, random.angular]
                cells = (
                    [f"{v:.4g}" for v in figures] if random.entries else [*(f"{v:.4g}" for v in figures[:5]), "", ""]
                )
                lines.append(f"| {name} | {sums.entries} | {' | '.join(cells)} |")
            lines.append("")
        if self.ignored:
            lines += [f"Left out, as only one side has them: {', '.join(self.ignored)}.", ""]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike, measure: str = "angular") -> None:
        """A heat map: a row for each layer, a column for each kind of module."""
        cells: dict[tuple[str, str], Sums] = {}
        for name, sums in self.tensors.items():
            place = block_of(name) or "rest", kind_of(name)
            cells[place] = cells.get(place, Sums()) + sums
        heat_map({place: getattr(sums, measure) for place, sums in cells.items()}, measure.replace("_", " "), path)


def parameter_distance(base: Source, tuned: Source, threshold: float = 1e-3, ignore_missing: bool = False) -> Distances:
    """How far two sets of parameters are apart (Radiya-Dixit and Wang 2020, section 3: L1 and angular distance).

    Args:
        base, tuned: models, state dicts, safetensors files or folders of them; read tensor by tensor. A `PeftModel` as
            `tuned` counts with the offsets of its active adapters, `base` being its base model or the same weights.
        threshold: above which an entry counts as changed.
        ignore_missing: leave out parameters that only one side has, such as a head's. An encoder's names may lack the
            prefix that they have in the model with a head.

    Raises:
        ValueError: they do not have the same floating-point parameters in the same shapes, a value is not finite, a
            file cannot be read, the threshold is negative, or an adapter's method does not tell its offset.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must not be negative, got {threshold!r}.")
    before, after = Reader(base), Reader(tuned)
    into, back = (prefix(before, after), prefix(after, before)) if ignore_missing else ("", "")
    names = {name: (into + name).removeprefix(back) for name in before.shapes}  # of the base's parameters in the tuned
    left = sorted({*names.values()} ^ {*after.shapes})
    unlike = [
        name for name, other in names.items() if after.shapes.get(other, before.shapes[name]) != before.shapes[name]
    ]
    if unlike or (left and not ignore_missing) or len(left) == len({*names.values()} | {*after.shapes}):
        first = (unlike or left)[0]
        shapes = [before.shapes.get(first, "absent"), after.shapes.get(names.get(first, first), "absent")]
        raise ValueError(
            f"{before.told} and {after.told} differ in {len(unlike) + len(left)} parameters: {first} is {shapes[0]} in "
            f"the one and {shapes[1]} in the other. Compare models of one class and size, or pass "
            "ignore_missing=True (--ignore-missing)."
        )
    moved: dict[str, torch.Tensor] = {}
    for name, offset in offsets(tuned) if isinstance(tuned, PeftModel) else ():
        name = after.first.get(name, name)
        moved[name] = moved[name] + offset if name in moved else offset
    if lost := sorted(set(moved) - set(after.shapes)):
        raise ValueError(f"{lost[0]} is moved by the adapter, but its base has none. Compare the merged model.")
    generator = torch.Generator().manual_seed(0)
    result = Distances(threshold, ignored=left)
    for own, name in names.items():
        if name not in after.shapes:
            continue
        shape, end = before.shapes[own], after[name]
        if name in moved:
            end = end.cpu().double() + moved[name].detach().cpu().double().reshape(shape)
        result.tensors[name] = found = compared(before[own], end, threshold)
        if not math.isfinite(found.squared):
            raise ValueError(f"{name} holds NaN or infinite values in {before.told} or {after.told}.")
        if len(shape) > 1:
            result.random[name] = Sums(units=shape[0])
            for start in range(0, found.entries, CHUNK):
                size = min(CHUNK, found.entries - start)
                u, v = (STD * torch.randn(1, size, generator=generator) for _ in range(2))
                result.random[name] += replace(compared(u, v, threshold), units=0)
    return result


def write_report(found: Distances, folder: str | os.PathLike) -> None:
    """distance.json, distance.md and distance.png."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "distance.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    (folder / "distance.md").write_text(found.report(), encoding="utf-8")
    found.plot(folder / "distance.png")
