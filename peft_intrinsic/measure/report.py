"""`report.json`, `report.md` and `curve.png` of a measurement."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from .measure import Result
from .store import write_whole


def name(result: Result) -> str:
    """`d90` for a share of 0.9."""
    return f"d{round(100 * result.share)}"


def summary(result: Result) -> str:
    """One line."""
    low, high = (end if end is not None else "beyond the grid" for end in result.interval)
    found = result.d if result.d is not None else f"above {result.points[-1][0]}"
    return f"{name(result)} = {found}, 90 % interval [{low}, {high}]; {result.stopped} after {result.trials} trials"


def markdown(result: Result) -> str:
    """The report as text."""
    baseline = ", ".join(f"{score:.4f}" for score in result.baseline)
    lines = [
        f"# {summary(result)}",
        "",
        "| | |",
        "|---|---|",
        f"| full fine-tuning, by seed | {baseline} |",
        f"| its mean | {np.mean(result.baseline):.4f} |",
        f"| target | {result.target:.4f} ({result.share:g} of the {result.of}) |",
        f"| majority class | {'unknown' if result.majority is None else f'{result.majority:.4f}'} |",
        f"| learning rates (full, subspace) | {result.learning_rates or 'fixed by the fit'} |",
        f"| peft_intrinsic | {result.version} |",
        "",
        "| d | monotone fit | scores by seed |",
        "|---|---|---|",
    ]
    for d, fit, scores in result.points:
        lines.append(f"| {d} | {fit:.4f} | {', '.join(f'{score:.4f}' for score in scores)} |")
    return "\n".join(lines) + "\n"


def plot(result: Result, path: str | os.PathLike) -> None:
    """Score against d: seeds as points, the monotone fit, target and full fine-tuning as lines, the interval as a band.

    Raises:
        ImportError: matplotlib is missing; `pip install peft_intrinsic[plot]`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    dims = [d for d, _, _ in result.points]
    edge = dims[-1] * 1.15
    low, high = (end if end is not None else edge for end in result.interval)
    axes.axvspan(low, max(high, low * 1.01), color="0.85", label="90 % interval")
    for d, _, scores in result.points:
        axes.plot([d] * len(scores), scores, "o", color="0.35", markersize=3)
    axes.plot(dims, [fit for _, fit, _ in result.points], color="black", label="monotone fit")
    axes.axhline(float(np.mean(result.baseline)), color="black", linestyle=":", label="full fine-tuning")
    axes.axhline(result.target, color="black", linestyle="--", label=f"{result.share:.0%} of the {result.of}")
    if result.majority is not None:
        axes.axhline(result.majority, color="0.6", linestyle="-.", label="majority class")
    if result.d is not None:
        axes.axvline(result.d, color="black", linewidth=0.8)
        axes.annotate(
            f"{name(result)} = {result.d}", (result.d, axes.get_ylim()[0]), (4, 4), textcoords="offset points"
        )
    axes.set(xscale="log", xlabel="d, trained numbers", ylabel="score")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def write_report(result: Result, folder: str | os.PathLike) -> None:
    """Write `report.json`, `report.md` and `curve.png` into a folder that exists."""
    folder = Path(folder)
    write_whole(folder / "report.json", json.dumps(result.to_dict(), indent=1))
    write_whole(folder / "report.md", markdown(result))
    plot(result, folder / "curve.png")
