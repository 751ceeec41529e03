"""`report.json`, `report.md`, `curve.csv` and the plot of a measurement."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from ..trials.store import write_whole
from .analysis import Answer, Result
from .curve import TINY
from .evidence import TUNING, collapsed

FORMATS = "png", "svg", "pdf"
ALONE = " (one seed, so its spread is not in the interval)"
WIDER = 10
"""By how much a proposed grid goes beyond one that the target lies outside of."""


def told(result: Result, answer: Answer) -> tuple[str, str]:
    """d and its interval in words: ≤ the grid's least, > the greatest that was measured."""
    first, last = (_end(result, d) for d in answer.interval)
    interval = f"90 % interval [{first}, {last}]" if result.seeds > 1 else "interval unknown with one seed"
    least = result.points[0].fit
    known = answer.d is not None and least is not None and least < answer.target - TINY  # and so not less
    return str(answer.d) if known else _end(result, answer.d), interval


def _end(result: Result, d: int | None) -> str:
    low, high = result.ends
    return f"> {high}" if d is None else f"≤ {low}" if d <= low else str(d)


def summary(result: Result) -> str:
    """One line."""
    d, interval = told(result, result.answers[result.relative_to])
    line = f"{result.name} {d if d[0] in '≤>' else f'= {d}'}, {interval}; {result.stopped}"
    if result.majority is not None and result.target <= result.majority:
        line += f"; the target, {result.target:.4f}, is no better than the majority class: use relative_to='gain' "
        line += "(--relative-to gain)"
    return line


def score_and_target(result: Result) -> str:
    """The score of full fine-tuning, and what is to be reached. One line."""
    seeds = f"{result.center} of {many}" if (many := len(result.baseline.scores)) > 1 else "one"
    full = f"full fine-tuning scores {result.baseline.level:.4f} ({seeds} seed{'s' * (many > 1)})"
    return f"{full}, the target is {result.target:.4f} ({result.share:g} of the {result.relative_to})"


def advice(result: Result, weights: int | None = None) -> str:
    """Which grid to try where d lies outside of the one that was measured; empty where it does not.

    Args:
        result: of a measurement.
        weights: of the model: the most that d can be.
    """
    low, high, points = result.dims
    sign = told(result, result.answers[result.relative_to])[0][0]
    if sign not in "≤>":
        return ""
    end, beyond, grid_end = (result.ends[1], "above", high) if sign == ">" else (result.ends[0], "below", low)
    if end != grid_end:
        return f"No d {beyond} {end} was measured. Allow more trials or minutes (--trials, --minutes)."
    if sign == ">" and high == weights:
        return f"The target is not reached with all {high} weights. Train longer, or take a lower --target."
    if sign == "≤" and low == 1:
        return "The target is reached with a single parameter, so there is no smaller d to try."
    first = max(low // WIDER, 1) if sign == "≤" else low
    last = min(high * WIDER, weights or high * WIDER) if sign == ">" else high
    many = 1 + round((points - 1) * math.log(last / first) / math.log(high / low))
    limit = " (at most as many as the model has weights)" if sign == ">" and weights is None else ""
    return f"d lies outside the grid. Try a wider one: --dims {first},{last},{many}{limit}"


def title(result: Result) -> str:
    """Model, task and method, as far as the settings name them."""
    model, method = _named(result, "model"), _named(result, "method")
    return ", ".join(filter(None, (Path(model).name, task(result), method)))


def task(result: Result) -> str:
    """What was learnt: a task of GLUE, a dataset, or the file of the training data."""
    return next(filter(None, (_named(result, name) for name in ("task", "dataset", "train"))), "")


def _named(result: Result, name: str) -> str:
    return str(result.settings.get(name) or "").partition(", sha256")[0]


def markdown(result: Result) -> str:
    """The report as text."""
    base = result.baseline
    scores = ", ".join(f"{score:.4f}" for score in base.scores)
    kind = "median of those that did not collapse" if result.center == "median" else "mean"
    alone = ALONE if result.seeds > 1 else " (one seed)"
    failed = sum(point.collapsed for point in result.points)
    runs = sum(point.seeds for point in result.points)
    lines = [
        f"# {summary(result)}",
        "",
        title(result),
        "",
        *([f"{outside}", ""] if (outside := advice(result)) else []),
        "| target | score | d | 90 % interval | |",
        "|---|---|---|---|---|",
    ]
    for of, answer in result.answers.items():
        d, interval = told(result, answer)
        first, last = (_end(result, d) for d in answer.tie or (None, None))
        tie = f"a tie: within one held-out example from {first} to {last}" if answer.tie else ""
        target = f"{result.share:g} of the {of}"
        lines.append(f"| {target} | {answer.target:.4f} | {d} | {_bare(interval)} | {tie} |")
    lines += [
        "",
        "| | |",
        "|---|---|",
        f"| full fine-tuning, by seed | {scores} |",
        f"| its {kind} | {base.level:.4f}{alone if len(base.scores) == 1 else ''} |",
        f"| collapsed: full fine-tuning, subspace | {base.collapsed}, {failed} of {runs} |",
        f"| majority class | {'unknown' if result.majority is None else f'{result.majority:.4f}'} |",
        *([] if result.untrained is None else [f"| before training | {result.untrained:.4f} |"]),
        f"| learning rate of full fine-tuning | {_rate(base.learning_rate)} |",
        *([f"| best rate at the edge of those tried | {_edges(result)} |"] if result.edges else []),
        f"| held-out examples | {_examples(result)} |",
        f"| versions | {', '.join(f'{name} {version}' for name, version in result.versions.items())} |",
        "",
        "| d | monotone fit | learning rate | scores by seed | collapsed |",
        "|---|---|---|---|---|",
    ]
    for point in result.points:
        fit = "" if point.fit is None else f"{point.fit:.4f}"
        scores = ", ".join(f"{score:.4f}" for score in point.scores)
        lines.append(f"| {point.d} | {fit} | {_rate(point.learning_rate)} | {scores} | {point.collapsed or ''} |")
    return "\n".join(lines) + "\n"


def _bare(interval: str) -> str:
    return interval.removeprefix("90 % ").removeprefix("interval ")


def _rate(rate: float | None) -> str:
    return "fixed by the fit" if rate is None else f"{rate:g}"


def _edges(result: Result) -> str:
    where = ", ".join("full fine-tuning" if d is None else f"d = {d}" for d in result.edges)
    return f"{where}: try lower or higher ones, or 'auto' (--learning-rates, --full-learning-rates)"


def _examples(result: Result) -> str:
    if result.seeds == 1:
        return "unknown" if result.examples is None else f"{result.examples}"
    if result.examples is None:
        return "unknown to the interval, which leaves their sampling out"
    return f"{result.examples}; the interval includes their sampling"


def table(result: Result) -> str:
    """Every trial as CSV, for other programs."""
    names = ["d", "seed", "learning_rate", "score", "seconds", "process"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "d": "full" if row["d"] is None else row["d"]} for row in result.trials)
    return text.getvalue()


def plot(result: Result, folder: Path, name: str) -> None:
    """Score against d, as PNG, SVG and PDF.

    Runs are points, collapsed ones open; the monotone fit joins measured d; full fine-tuning is a line with its seeds
    at the right and their range as a band; d90 by either definition is a mark on its target, with its interval.

    Raises:
        ImportError: matplotlib is missing, which the extra `plot` installs.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    rates = {point.d: point.learning_rate for point in result.points}
    floor = result.least
    for row in result.trials:
        if row["d"] in rates and row["learning_rate"] == rates[row["d"]] and row["seed"] != TUNING:
            score = floor if row["score"] is None else row["score"]
            style = "none" if collapsed(row["score"], floor) else "full"
            if score is not None:
                axes.plot(row["d"], score, "o", color="0.35", fillstyle=style, markersize=3.5)
    fitted = [(point.d, point.fit) for point in result.points if point.fit is not None]
    axes.plot(*zip(*fitted, strict=True), color="black", linewidth=1, label="monotone fit")
    base, edge = result.baseline, result.ends[1]
    axes.axhline(base.level, color="black", linestyle=":", label="full fine-tuning, its seeds")
    axes.axhspan(min(base.scores), max(base.scores), color="0.9", zorder=0)
    axes.plot([edge * 1.25] * len(base.scores), base.scores, "_", color="black", clip_on=False)
    for color, (of, answer) in zip(("tab:red", "tab:blue"), result.answers.items(), strict=False):
        d, interval = told(result, answer)
        axes.axhline(answer.target, color=color, linestyle="--", linewidth=0.8)
        low, high = (end or edge * 1.2 for end in answer.interval)
        if result.seeds > 1:
            axes.plot([low, high], [answer.target] * 2, color=color, linewidth=4, alpha=0.35, solid_capstyle="butt")
        label = f"{result.name} by {of}: {d} {interval.removeprefix('90 % interval ')}"
        axes.plot(answer.d or edge * 1.2, answer.target, "D" if answer.d else ">", color=color, label=label)
    if floor is not None:
        text = "majority class" if result.majority is not None else "before training"
        axes.axhline(floor, color="0.6", linestyle="-.", linewidth=0.8, label=text)
    metric = str(result.settings.get("metric", "score")).partition(", sha256")[0]
    axes.set(xscale="log", xlabel="d, trained numbers", ylabel=metric, title=title(result))
    axes.legend(frameon=False, fontsize="small")
    save(figure, folder, name)


def save(figure: Any, folder: Path, name: str) -> None:
    """A figure in every format; the same figure gives the same bytes."""
    import matplotlib as mpl

    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    for ending in FORMATS:
        data = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": name}):
            figure.savefig(data, format=ending, dpi=150, metadata=undated.get(ending))
        write_whole(folder / f"{name}.{ending}", data.getvalue())


def write_report(result: Result, folder: str | os.PathLike) -> None:
    """Write `report.json`, `report.md`, `curve.csv`, and `curve` as PNG, SVG and PDF."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", json.dumps(result.to_dict(), indent=1))
    write_whole(folder / "report.md", markdown(result))
    write_whole(folder / "curve.csv", table(result))
    plot(result, folder, "curve")
