"""`report.json`, `report.md`, `curve.csv` and the plot of a measurement."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from ..figures import save_figure, scale_counts, styled
from ..text.methods import TITLES
from ..trials.store import write_whole
from .analysis import Answer, Result
from .curve import TINY
from .evidence import TUNING, is_collapsed

FORMATS = "png", "svg", "pdf"
WIDER = 10
"""Factor, rounded to whole steps, by which a suggested grid extends one that the target lies outside of."""


def format_answer(result: Result, answer: Answer) -> tuple[str, str]:
    """Format d and its interval: `≤` the least d of the grid, `>` the greatest that was measured."""
    first, last = (_format_end(result, d) for d in answer.interval)
    interval = f"90 % interval [{first}, {last}]" if result.seeds > 1 else "interval unknown with one seed"
    lowest = result.points[0].fit
    exact = answer.d is not None and lowest is not None and lowest < answer.target - TINY
    return str(answer.d) if exact else _format_end(result, answer.d), interval


def _format_end(result: Result, d: int | None) -> str:
    low, high = result.ends
    return f"> {high}" if d is None else f"≤ {low}" if d <= low else str(d)


def summarize(result: Result) -> str:
    """Summarize a result in one line: d, its interval, why the search ended."""
    d, interval = format_answer(result, result.answer)
    line = f"{result.name} {d if d[0] in '≤>' else f'= {d}'}, {interval}; {result.stopped}"
    if result.majority is not None and result.target <= result.majority:
        line += f"; the target, {result.target:.4f}, is no better than the majority class: use relative_to='gain' "
        line += "(--relative-to gain)"
    return line


def describe_target(result: Result) -> str:
    """Describe the score of full fine-tuning, the target and the collapsed runs, if any, in one line."""
    count = len(result.baseline.scores)
    seeds = f"{result.center} of {count} seeds" if count > 1 else "one seed"
    full = f"full fine-tuning scores {result.baseline.level:.4f} ({seeds})"
    line = f"{full}, the target is {result.target:.4f} ({result.share:g} of the {result.relative_to})"
    base, (collapsed, runs) = result.baseline.collapsed, _count_collapsed(result)
    if base or collapsed:
        line += f"; collapsed runs: {base} of full fine-tuning, {collapsed} of {runs} in the subspace"
    return line


def _count_collapsed(result: Result) -> tuple[int, int]:
    """Count the collapsed runs in the subspace, and all of them."""
    return sum(point.collapsed for point in result.points), sum(point.seeds for point in result.points)


def suggest_grid(result: Result, weights: int | None = None) -> str:
    """Suggest a grid if d lies outside of the measured one. Empty if it does not.

    Args:
        result: Result of a measurement.
        weights: Number of the model's weights, which d cannot exceed.
    """
    low, high, points = result.dims
    sign = format_answer(result, result.answer)[0][0]
    if sign not in "≤>":
        return ""
    end, beyond, grid_end = (result.ends[1], "above", high) if sign == ">" else (result.ends[0], "below", low)
    if end != grid_end:
        return f"No d {beyond} {end} was measured. Measure with more trials or minutes (measure --trials, --minutes)."
    if sign == ">" and high == weights:
        return f"The target is not reached with all {high} weights. Train longer, or use a lower --target."
    if sign == "≤" and low == 1:
        return "The target is reached at d = 1, and there is no smaller d to try."
    ratio = (high / low) ** (1 / (points - 1))
    factor = ratio ** max(round(math.log(WIDER, ratio)), 1)
    first = max(round(low / factor), 1) if sign == "≤" else low
    last = math.ceil(high * factor - 1e-6) if sign == ">" else high  # rounded up, the grid holds the old d
    last = min(last, weights or last)
    count = 1 + round(math.log(last / first, ratio))
    limit = " (at most as many as the model has weights)" if sign == ">" and weights is None else ""
    advice = ""
    if len({*_count_collapsed(result)}) == 1:
        advice = "All runs in the subspace collapsed: try other learning rates (--learning-rates) or more epochs "
        advice += "(--epochs) before a wider grid. "
    return f"{advice}d lies outside the grid. Measure a wider one: --dims {first},{last},{count}{limit}"


def format_title(result: Result) -> str:
    """Format model, task and method, as far as the settings name them."""
    model, method = _get_setting(result, "model"), _get_setting(result, "method")
    return ", ".join(filter(None, (Path(model).name, name_task(result), TITLES.get(method, method))))


def name_task(result: Result) -> str:
    """Name the GLUE task, the dataset, or the file of the training data."""
    return next(filter(None, (_get_setting(result, name) for name in ("task", "dataset", "train"))), "")


def _get_setting(result: Result, name: str) -> str:
    return str(result.settings.get(name) or "").partition(", sha256")[0]


def format_markdown(result: Result) -> str:
    """Format the report as Markdown."""
    base = result.baseline
    scores = ", ".join(f"{score:.4f}" for score in base.scores)
    kind = "median of those that did not collapse" if result.center == "median" else "mean"
    alone = " (one seed, so its spread is not in the interval)" if result.seeds > 1 else " (one seed)"
    collapsed = "{} of {}".format(*_count_collapsed(result))
    edges = ", ".join("full fine-tuning" if d is None else f"d = {d}" for d in result.edges)
    edges += ": try lower or higher ones, or 'auto' (--learning-rates, --full-learning-rates)"
    examples = "unknown" if result.examples is None else str(result.examples)
    if result.seeds > 1:
        without = result.examples is None
        examples += (
            f"{', so' if without else ';'} the interval {'does not include' if without else 'includes'} their sampling"
        )
    lines = [
        f"# {summarize(result)}",
        "",
        format_title(result),
        "",
        *([outside, ""] if (outside := suggest_grid(result)) else []),
        "| target | score | d | 90 % interval | |",
        "|---|---|---|---|---|",
    ]
    for name, answer in result.answers.items():
        d, interval = format_answer(result, answer)
        first, last = (_format_end(result, d) for d in answer.tie or (None, None))
        tie = f"a tie: within one held-out example from {first} to {last}" if answer.tie else ""
        interval = interval.removeprefix("90 % ").removeprefix("interval ")
        lines.append(f"| {result.share:g} of the {name} | {answer.target:.4f} | {d} | {interval} | {tie} |")
    lines += [
        "",
        "| | |",
        "|---|---|",
        f"| full fine-tuning, by seed | {scores} |",
        f"| its {kind} | {base.level:.4f}{alone if len(base.scores) == 1 else ''} |",
        f"| collapsed: full fine-tuning, subspace | {base.collapsed}, {collapsed} |",
        f"| majority class | {'unknown' if result.majority is None else f'{result.majority:.4f}'} |",
        *([] if result.untrained is None else [f"| before training | {result.untrained:.4f} |"]),
        f"| learning rate of full fine-tuning | {_format_rate(base.learning_rate)} |",
        *([f"| best learning rate at the edge of those tried | {edges} |"] if result.edges else []),
        f"| held-out examples | {examples} |",
        f"| versions | {', '.join(f'{name} {version}' for name, version in result.versions.items())} |",
        "",
        "| d | monotone fit | learning rate | scores by seed | collapsed |",
        "|---|---|---|---|---|",
    ]
    for point in result.points:
        fit = "" if point.fit is None else f"{point.fit:.4f}"
        scores = ", ".join(f"{score:.4f}" for score in point.scores)
        lines.append(
            f"| {point.d} | {fit} | {_format_rate(point.learning_rate)} | {scores} | {point.collapsed or ''} |"
        )
    return "\n".join(lines) + "\n"


def _format_rate(rate: float | None) -> str:
    return "fixed by the fit" if rate is None else f"{rate:g}"


def format_csv(result: Result) -> str:
    """Format every trial as CSV, for other programs."""
    names = ["d", "seed", "learning_rate", "score", "seconds", "process"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "d": "full" if row["d"] is None else row["d"]} for row in result.trials)
    return text.getvalue()


@styled
def plot_curve(result: Result, folder: Path, name: str) -> None:
    """Plot the score against d, as PNG, SVG and PDF.

    Runs are points, open if they collapsed. The monotone fit joins measured d. Full fine-tuning is a line, with its
    seeds at the right and their range as a band. d90 by either definition is a mark on its target, with its interval.

    Raises:
        ImportError: matplotlib is not installed. The extra `plot` installs it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5))
    axes = figure.subplots()
    rates = {point.d: point.learning_rate for point in result.points}
    floor = result.floor
    for row in result.trials:
        if row["d"] in rates and row["learning_rate"] == rates[row["d"]] and row["seed"] != TUNING:
            score = floor if row["score"] is None else row["score"]
            style = "none" if is_collapsed(row["score"], floor) else "full"
            if score is not None:
                axes.plot(row["d"], score, "o", color="0.35", fillstyle=style, markersize=3.5)
    fitted = [(point.d, point.fit) for point in result.points if point.fit is not None]
    axes.plot(*zip(*fitted, strict=True), color="black", linewidth=1, label="monotone fit")
    base, edge = result.baseline, result.ends[1]
    axes.axhline(base.level, color="black", linestyle=":", label="full fine-tuning, its seeds")
    axes.axhspan(min(base.scores), max(base.scores), color="0.9", zorder=0)
    axes.plot([edge * 1.25] * len(base.scores), base.scores, "_", color="black", clip_on=False)
    for color, (by, answer) in zip(("C1", "C0"), result.answers.items(), strict=False):
        d, interval = format_answer(result, answer)
        axes.axhline(answer.target, color=color, linestyle="--", linewidth=0.8)
        low, high = (end or edge * 1.2 for end in answer.interval)
        if result.seeds > 1:
            axes.plot([low, high], [answer.target] * 2, color=color, linewidth=4, alpha=0.35, solid_capstyle="butt")
        label = f"{result.name} by {by}: {d} {interval.removeprefix('90 % interval ')}"
        axes.plot(answer.d or edge * 1.2, answer.target, "D" if answer.d else ">", color=color, label=label)
    if floor is not None:
        text = "majority class" if result.majority is not None else "before training"
        axes.axhline(floor, color="0.6", linestyle="-.", linewidth=0.8, label=text)
    metric = _get_setting(result, "metric") or "score"
    scale_counts(axes)
    label = "rank" if _get_setting(result, "method") == "lora-rank" else "trainable parameters (d)"
    axes.set(xlabel=label, ylabel=metric, title=format_title(result))
    figure.legend(loc="outside lower center", ncols=2)
    save_formats(figure, folder, name)


def save_formats(figure: Any, folder: Path, name: str) -> None:
    """Save a figure in every format."""
    for suffix in FORMATS:
        data = io.BytesIO()
        save_figure(figure, data, suffix)
        write_whole(folder / f"{name}.{suffix}", data.getvalue())


def write_report(result: Result, folder: str | os.PathLike) -> None:
    """Write `report.json`, `report.md`, `curve.csv`, and `curve` as PNG, SVG and PDF.

    Args:
        result: Result of a measurement.
        folder: Folder of the report; created if missing.

    Raises:
        ImportError: matplotlib is not installed. The extra `plot` installs it.

    Example:
        ```python
        write_report(analyze("runs/mine", target=0.5), "runs/mine/half")
        ```
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", json.dumps(result.to_dict(), indent=1))
    write_whole(folder / "report.md", format_markdown(result))
    write_whole(folder / "curve.csv", format_csv(result))
    plot_curve(result, folder, "curve")
