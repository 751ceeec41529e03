"""`report.json`, `report.md` and `curve.png` of a measurement."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from .measure import Result
from .store import REPORTS, write_whole


def summary(result: Result) -> str:
    """One line."""
    low, high = (end if end is not None else "beyond the grid" for end in result.interval)
    found = result.d if result.d is not None else f"above {result.points[-1][0]}"
    trials = sum(len(scores) for _, _, scores in result.points)
    interval = f"90 % interval [{low}, {high}]" if result.seeds > 1 else "interval unknown with one seed"
    told = f"{result.name} = {found}, {interval}; {result.stopped} after {trials} trials"
    if result.majority is not None and result.target <= result.majority:
        told += f"; the target, {result.target:.4f}, is no better than the majority class: use of='gain' (--of gain)"
    return told


def markdown(result: Result) -> str:
    """The report as text."""
    baseline = ", ".join(f"{score:.4f}" for score in result.baseline)
    rates = [rate or "scores given" for rate in result.learning_rates or ()]
    lines = [
        f"# {summary(result)}",
        "",
        "| | |",
        "|---|---|",
        f"| full fine-tuning, by seed | {baseline} |",
        f"| its mean | {np.mean(result.baseline):.4f} |",
        f"| target | {result.target:.4f} ({result.share:g} of the {result.of}) |",
        f"| majority class | {'unknown' if result.majority is None else f'{result.majority:.4f}'} |",
        *([f"| diverged trials, counted as the trivial answer | {result.diverged} |"] if result.diverged else []),
        *([] if result.untrained is None else [f"| before training | {result.untrained:.4f} |"]),
        f"| learning rates (full, subspace) | {', '.join(map(str, rates)) or 'fixed by the fit'} |",
        f"| versions | {', '.join(f'{name} {version}' for name, version in result.versions.items())} |",
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
    axes.axvspan(low, max(high, low * 1.01), color="0.85", label="90 % interval" if result.seeds > 1 else "bracket")
    for d, _, scores in result.points:
        axes.plot([d] * len(scores), scores, "o", color="0.35", markersize=3)
    axes.plot(dims, [fit for _, fit, _ in result.points], color="black", label="monotone fit")
    axes.axhline(float(np.mean(result.baseline)), color="black", linestyle=":", label="full fine-tuning")
    axes.axhline(result.target, color="black", linestyle="--", label=f"{result.share:.0%} of the {result.of}")
    for level, label in ((result.majority, "majority class"), (result.untrained, "before training")):
        if level is not None:
            axes.axhline(level, color="0.6", linestyle="-.", label=label)
    if result.d is not None:
        axes.axvline(result.d, color="black", linewidth=0.8)
        axes.annotate(f"{result.name} = {result.d}", (result.d, axes.get_ylim()[0]), (4, 4), textcoords="offset points")
    metric = str(result.settings.get("metric", "score")).partition(", sha256")[0]
    axes.set(xscale="log", xlabel="d, trained numbers", ylabel=metric)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def write_report(result: Result, folder: str | os.PathLike) -> None:
    """Write `report.json`, `report.md` and `curve.png` into a folder that exists."""
    folder = Path(folder)
    data, text, picture = (folder / name for name in REPORTS)
    write_whole(data, json.dumps(result.to_dict(), indent=1))
    write_whole(text, markdown(result))
    plot(result, picture)
