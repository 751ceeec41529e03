"""Distance between two sets of parameters, tensor by tensor."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from ..tuner.names import block_of, kind_of
from .heat_map import heat_map
from .reading import Reader, Source, find_prefix, iterate_offsets

CHUNK = 2**20
"""Number of weights of each side that are in float64 at a time."""

STD = 0.02
"""Standard deviation of the random initializations for comparison, as in BERT."""


@dataclass
class Sums:
    """Sums over the weights u of the base and v of the tuned model, from which all distances follow. They can be added.

    Args:
        entries, rows: numbers of weights and of output units.
        changed: number of entries that differ by more than the threshold.
        l1: Σ|Δ|, with Δ = v − u.
        squared: ΣΔ².
        base, tuned: Σu² and Σv².
        across: ΣΔ(u + v), which is Σv² − Σu² without cancellation.
    """

    entries: int = 0
    rows: int = 0
    changed: int = 0
    l1: float = 0.0
    squared: float = 0.0
    base: float = 0.0
    tuned: float = 0.0
    across: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def l1_per_unit(self) -> float:
        """Mean of Σ|Δ| over output units."""
        return self.l1 / max(self.rows, 1)

    @property
    def l2_relative(self) -> float:
        """‖Δ‖ / ‖u‖, or NaN if u alone is zero."""
        return math.sqrt(self.squared / self.base) if self.base else math.nan if self.squared else 0.0

    @property
    def angular(self) -> float:
        """Angle / π: 0 is the same direction, 1 the opposite one, and NaN if one side alone is zero.

        It is computed from the chord between the unit vectors, which preserves the digits of small angles.
        """
        if not self.base or not self.tuned:
            return math.nan if self.base != self.tuned else 0.0
        u, v = math.sqrt(self.base), math.sqrt(self.tuned)
        chord = math.sqrt(max(self.squared - (self.across / (u + v)) ** 2, 0.0) / (u * v))
        return 2 * math.asin(min(chord / 2, 1.0)) / math.pi

    @property
    def changed_share(self) -> float:
        """Fraction of entries that differ by more than the threshold."""
        return self.changed / max(self.entries, 1)


MEASURES = {
    "l1": "L1 distance",
    "l1_per_unit": "L1 distance per output unit",
    "l2_relative": "L2 distance / base",
    "angular": "angular distance",
    "changed_share": "fraction of changed entries",
}


def compare(base: torch.Tensor, tuned: torch.Tensor, threshold: float) -> Sums:
    """Compute the sums of one tensor, a piece at a time in float64."""
    total = Sums(rows=base.shape[0] if base.dim() > 1 else base.numel())
    for u, v in zip(base.reshape(-1).split(CHUNK), tuned.reshape(-1).split(CHUNK), strict=True):
        u, v = u.detach().cpu().double(), v.detach().cpu().double()
        delta = v - u
        sums = map(float, (delta.abs().sum(), delta @ delta, u @ u, v @ v, delta @ (u + v)))
        total += Sums(u.numel(), 0, int((delta.abs() > threshold).sum()), *sums)
    return total


@dataclass
class Distances:
    """Distances of all parameters, beside those of two random initializations of the same shapes.

    Args:
        threshold: difference above which an entry counts as changed.
        tensors: sums of each parameter, by name.
        random: sums of two normal initializations of each matrix, standard deviation 0.02, by name.
        ignored: names of parameters that only one side has.
    """

    threshold: float
    tensors: dict[str, Sums] = field(default_factory=dict)
    random: dict[str, Sums] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    @property
    def total(self) -> Sums:
        """Sums over all parameters."""
        return sum(self.tensors.values(), Sums())

    def by(self, what: Literal["layer", "kind"]) -> dict[str, tuple[Sums, Sums]]:
        """Add up the sums, and those of the random initializations, for each layer or each kind of parameter."""
        label = {"layer": lambda name: block_of(name) or "rest", "kind": kind_of}[what]
        result: dict[str, tuple[Sums, Sums]] = {}
        for name, sums in self.tensors.items():
            before = result.get(label(name), (Sums(), Sums()))
            result[label(name)] = before[0] + sums, before[1] + self.random.get(name, Sums())
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return all values for JSON, with None for undefined ones."""

        def to_row(sums: Sums) -> dict[str, Any]:
            values = {name: getattr(sums, name) for name in MEASURES}
            return {"entries": sums.entries} | {n: None if math.isnan(v) else v for n, v in values.items()}

        return {
            "threshold": self.threshold,
            "total": to_row(self.total),
            "random": to_row(sum(self.random.values(), Sums())),
            "layer": {name: to_row(sums) for name, (sums, _) in self.by("layer").items()},
            "kind": {name: to_row(sums) for name, (sums, _) in self.by("kind").items()},
            "tensor": {name: to_row(sums) for name, sums in self.tensors.items()},
        }

    def report(self) -> str:
        """Format tables in Markdown by layer and by kind, with the random initializations for comparison."""
        head = f"weights | L1 | L1 per unit | L2 / base | angular | changed > {self.threshold:g}"
        total = {"all": (self.total, sum(self.random.values(), Sums()))}
        lines: list[str] = []
        for what, parts in {"layer": self.by("layer") | total, "kind": self.by("kind") | total}.items():
            lines += [f"| {what} | {head} | random: L1 per unit | angular |", "|---" * 9 + "|"]
            for name, (sums, random) in parts.items():
                values = [getattr(sums, measure) for measure in MEASURES]
                cells = ["-" if math.isnan(v) else f"{v:.4g}" for v in (*values, random.l1_per_unit, random.angular)]
                lines.append(
                    f"| {name} | {sums.entries} | {' | '.join(cells if random.entries else [*cells[:5], '', ''])} |"
                )
            lines.append("")
        if self.ignored:
            lines += [f"Left out, because only one side has them: {', '.join(self.ignored)}.", ""]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike, measure: str = "angular") -> None:
        """Draw one of `MEASURES` as a heat map of layers and kinds of parameters."""
        cells: dict[tuple[str, str], Sums] = {}
        for name, sums in self.tensors.items():
            cell = block_of(name) or "rest", kind_of(name)
            cells[cell] = cells.get(cell, Sums()) + sums
        heat_map({cell: getattr(sums, measure) for cell, sums in cells.items()}, MEASURES[measure], path)


def parameter_distance(base: Source, tuned: Source, threshold: float = 1e-3, ignore_missing: bool = False) -> Distances:
    """Measure the distance between two sets of parameters (Radiya-Dixit and Wang 2020, section 3).

    Args:
        base: model, state dict, or path of a safetensors file or folder, which is read tensor by tensor.
        tuned: the same after fine-tuning. The active adapters of a `PeftModel` are included; `base` may be its base,
            unless the adapter changes it, as PEFT's `bias="all"` and PiSSA do: then pass a copy made before.
        threshold: difference above which an entry counts as changed.
        ignore_missing: leave out parameters that only one side has, such as a head's.

    An encoder's names may lack the prefix that they have in the model with a head.

    Raises:
        ValueError: their floating-point parameters differ in names or shapes, a value is not finite, a file cannot be
            read, the threshold is negative, or an adapter is merged.

    Example:
        print(parameter_distance("base", "tuned").report())
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold!r} is negative. Use 0 or more.")
    before, after = Reader(base), Reader(tuned)
    into, back = find_prefix(before, after), find_prefix(after, before)
    names = {name: (into + name).removeprefix(back) for name in before.shapes}  # names in tuned by those in base
    renamed = {names[name]: shape for name, shape in before.shapes.items()}
    left = sorted({*renamed} ^ {*after.shapes})
    unlike = [name for name, shape in renamed.items() if after.shapes.get(name, shape) != shape]
    fatal = unlike or len(left) == len({*renamed} | {*after.shapes})
    if fatal or (left and not ignore_missing):
        first = (unlike or left)[0]
        remedy = "" if fatal else "Leave them out with ignore_missing=True (--ignore-missing), as for a new head, or c"
        raise ValueError(
            f"{before.label} and {after.label} differ in {len(unlike) + len(left)} parameters: {first} is "
            f"{renamed.get(first, 'absent')} in the one and {after.shapes.get(first, 'absent')} in the other. "
            f"{remedy or 'C'}ompare models of one class and size."
        )
    offsets: dict[str, torch.Tensor] = {}
    for name, offset in iterate_offsets(tuned) if isinstance(tuned, PeftModel) else ():
        name = after.first.get(name, name)
        offsets[name] = offsets[name] + offset if name in offsets else offset
    if lost := sorted(set(offsets) - set(after.shapes)):
        raise ValueError(f"The adapter changes {lost[0]}, which its base lacks. Compare the merged model.")
    generator = torch.Generator().manual_seed(0)
    result = Distances(threshold, ignored=left)
    for own, name in names.items():
        if name not in after.shapes:
            continue
        shape, end = before.shapes[own], after[name]
        if name in offsets:
            end = end.cpu().double() + offsets[name].detach().cpu().double().reshape(shape)
        result.tensors[name] = sums = compare(before[own], end, threshold)
        if not math.isfinite(sums.squared):
            raise ValueError(f"{name} holds NaN or infinite values in {before.label} or {after.label}. Train it again.")
        if len(shape) > 1:
            result.random[name] = Sums(rows=shape[0])
            for start in range(0, sums.entries, CHUNK):
                size = min(CHUNK, sums.entries - start)
                u, v = (STD * torch.randn(1, size, generator=generator) for _ in range(2))
                result.random[name] += replace(compare(u, v, threshold), rows=0)
    return result


def write_report(distances: Distances, folder: str | os.PathLike) -> None:
    """Write distance.json, distance.md and distance.png to a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "distance.json").write_text(json.dumps(distances.to_dict(), indent=1) + "\n", encoding="utf-8")
    (folder / "distance.md").write_text(distances.report(), encoding="utf-8")
    distances.plot(folder / "distance.png")
