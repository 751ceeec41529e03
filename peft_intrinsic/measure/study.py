"""Studies of Aghajanyan et al. (2020): several measurements, one table and one plot."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from ..figures import scale_counts, styled
from ..text.methods import TITLES
from ..trials.engine import Engine
from ..trials.runner import Row
from ..trials.store import check_folder, write_whole
from .analysis import NothingToMeasure, Result, TooFewTrials
from .evidence import TUNING, is_collapsed
from .measure_text import prepare
from .report import format_answer, name_task, save_formats

Kind = Literal["checkpoints", "models", "methods", "gap"]

KINDS: dict[str, str] = {
    "checkpoints": "d90 over the checkpoints of one pretraining (section 5.1)",
    "models": "d90 against the number of parameters (section 5.2)",
    "methods": "d90 by several methods (Table 1)",
    "gap": "d90 against the relative generalization gap (section 5.3)",
}
"""Titles of the studies by kind, with sections of Aghajanyan et al. (2020)."""


def study(
    kind: Kind,
    models: Sequence[str],
    methods: Sequence[str],
    options: Mapping[str, Any],
    plan: Mapping[str, Any],
    out: str | os.PathLike,
    launcher: str | None = None,
    engine: Callable[[], Engine] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[dict[str, Any]]:
    """Measure each model by each method; write `study.json`, `.md`, `.csv`, and the plot, into `out`.

    Every measurement has its own folder in `out`: the same call resumes, and models can be added. All are checked
    before the first runs. Full fine-tuning is measured once per model. If it is no better than the majority-class
    baseline, or the budget of a measurement is spent before any d is measured, the study notes so and continues.

    Args:
        kind: A key of `KINDS`.
        models: Names or folders of models.
        methods: Keys of `METHODS`.
        options, plan, launcher: See `prepare`; the options without model and method.
        out: Folder of the study.
        engine, overwrite: See `TextMeasurement.run`.
        dry_run: Print the plans, run nothing, and return an empty list.

    Returns:
        Per measurement: name, x (coordinate in the plot), parameters, method, answers (by definition of the target: d,
        interval), baseline, train, eval, gap, why_not.

    Raises:
        ValueError, RuntimeError, OSError, ImportError: See `prepare`, `TextMeasurement.run`.
    """
    if len(methods) > 1 and kind != "methods":
        raise ValueError(f"--method {','.join(methods)}: study {kind} has one. Use 'study methods' for several.")
    rows: list[dict[str, Any]] = []
    out, runs = Path(out), []
    for i, model in enumerate(models):
        for method in methods:
            chosen = {**options, "model": model, "method": method, "train_score": kind == "gap"}
            folder = out / re.sub(r"[^\w.-]+", "_", f"{model} {method}".strip("./"))
            runs.append((i, prepare(chosen, plan, launcher), folder))
    folder, count = Counter(folder for *_, folder in runs).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"{count} measurements have the folder {folder}, since the names of their models are alike: "
            f"{', '.join(models)}. Rename a model's folder, or name each model once."
        )
    for _, measurement, folder in runs:
        if not overwrite:
            check_folder(folder, measurement.settings)
        if dry_run:
            print(f"{measurement.describe()}\nin {folder}")
    first: dict[str, Result] = {}
    useless: dict[str, str] = {}  # models whose full fine-tuning leaves nothing to measure, by any method
    for i, measurement, folder in [] if dry_run else runs:
        model, method = measurement.options.model, measurement.options.method
        row: dict[str, Any] = {"name": f"{model} {method}", "parameters": _count_parameters(model), "method": method}
        try:
            if model in useless:
                raise NothingToMeasure(useless[model])
            known: list[Row] = []
            if model in first:  # full fine-tuning is measured once
                measurement = measurement.with_target_of(first[model])
                known = [trial for trial in first[model].trials if trial["d"] is None]
            result = measurement.run(folder, engine, overwrite, known=known)
            first.setdefault(model, result)
            row |= _describe_result(result)
        except NothingToMeasure as error:
            row["why_not"] = useless[model] = str(error)
        except TooFewTrials as error:
            row["why_not"] = str(error)
        row["model"] = model
        x = {"checkpoints": _get_step(model, i), "models": row["parameters"], "gap": row.get("gap")}
        row["x"] = x.get(kind, len(rows))
        rows.append(row)
        write_whole(out / "study.json", json.dumps({"kind": kind, "rows": rows}, indent=1))
        write_whole(out / "study.md", _format_markdown(kind, rows))
        write_whole(out / "study.csv", _format_csv(rows))
        plot_study(kind, rows, out)
        print("  ".join(cell for cell in _format_cells(row) if cell))
    return rows


def _describe_result(result: Result) -> dict[str, Any]:
    answers = {
        name: {"d": answer.d, "interval": answer.interval, "text": format_answer(result, answer)}
        for name, answer in result.answers.items()
    }
    described = {"answers": answers, "relative_to": result.relative_to, "share": result.name, "seeds": result.seeds}
    described |= {"ends": result.ends, "task": name_task(result), "baseline": result.baseline.level}
    return {**described, **_compute_gap(result)}


def _count_parameters(model: str) -> int:
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.from_pretrained(model)).num_parameters()


def _get_step(model: str, index: int) -> int:
    """Get the number that a checkpoint's name ends with, or else its index."""
    number = re.search(r"(\d+)\D*$", Path(model).name)
    return int(number[1]) if number else index


def _compute_gap(result: Result) -> dict[str, float]:
    """Compute the generalization gap of the runs that did not collapse at d90, or at the next measured d.

    It is the training score minus the held-out score, relative to what the latter lacks to the best; for a loss, the
    difference.
    """
    above = [point for point in result.points if result.d is not None and point.d >= result.d]
    at = (above[0].d, above[0].learning_rate) if above else None
    rows = [
        row
        for row in result.trials
        if (row["d"], row["learning_rate"]) == at
        and row["seed"] != TUNING
        and row.get("train_score") is not None
        and not is_collapsed(row["score"], result.floor)
    ]
    if not rows:
        return {}
    train, held_out = (float(np.mean([row[name] for row in rows])) for name in ("train_score", "score"))
    left = 1.0 if result.settings["metric"] == "loss" else max(result.settings.get("best", 1.0) - held_out, 1e-9)
    return {"train": train, "eval": held_out, "gap": (train - held_out) / left}


def _format_cells(row: Mapping[str, Any]) -> list[str]:
    start = [row["name"], f"{row['parameters']:,}"]
    if "why_not" in row:
        return [*start, "", row["why_not"], "", ""]
    answers = [row["answers"][name]["text"] if name in row["answers"] else ("", "") for name in ("score", "gain")]
    by = [f"{d} {interval.removeprefix('90 % interval ')}" for d, interval in answers]
    return [*start, f"{row['baseline']:.4f}", *by, f"{row['gap']:.4f}" if "gap" in row else ""]


def _format_markdown(kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    share = next((row["share"] for row in rows if "share" in row), "d90")
    lines = [
        f"# {KINDS[kind].replace('d90', share)}",
        "",
        f"| model, method | parameters | full fine-tuning | {share} by score [90 %] | by gain | gap at {share} |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(_format_cells(row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _format_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "method", "parameters", "full fine-tuning", "by", "d", "low", "high"])
    for row in rows:
        for name, answer in row.get("answers", {}).items():
            start = [row["model"], row["method"], row["parameters"], row["baseline"]]
            writer.writerow([*start, name, answer["d"], *answer["interval"]])
    return text.getvalue()


@styled
def plot_study(kind: str, rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Plot intervals as horizontal lines, a row for each measurement; open ones end in an arrow."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if "answers" in row]  # without a gap if d90 is outside the grid
    measured = sorted(measured, key=lambda row: (row["x"] is not None, row["x"] or 0), reverse=True)
    figure = Figure(figsize=(6.5, 1.5 + 0.4 * len(measured)))
    axes = figure.subplots()
    for y, row in enumerate(measured):
        answer = row["answers"][row["relative_to"]]
        least, most = row["ends"]
        low, high = (most if end is None else end for end in answer["interval"])
        if row["seeds"] > 1:
            axes.plot([low, high], [y, y], color="black")
            for at, mark, is_open in ((low, "<", low <= least), (high, ">", answer["interval"][1] is None)):
                axes.plot(at, y, mark if is_open else "|", color="black")
        if answer["d"] is not None:
            axes.plot(answer["d"], y, "o", color="black")
    note = {"models": "parameters", "checkpoints": "step", "gap": "gap"}.get(kind)
    labels = []
    for row in measured:
        x = f"{row['x']:.3g}" if row["x"] is not None else "unknown"
        labels.append(f"{Path(row['model']).name}, {TITLES[row['method']]}" + (f"\n{note} {x}" if note else ""))
    axes.set_yticks(range(len(measured)), labels)
    share = rows[0].get("share", "d90")
    scale_counts(axes)
    axes.set(xlabel=f"{share}, 90 % interval", ylim=(-0.6, max(len(measured), 1) - 0.4))
    axes.set_title(", ".join(dict.fromkeys(row["task"] for row in measured)))
    axes.grid(axis="y", visible=False)
    save_formats(figure, out, "study")
