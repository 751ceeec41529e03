"""Studies of Aghajanyan et al. (2020): many measurements, one table and one plot."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from .command import measure_text
from .curve import grid
from .measure import NothingToMeasure, Result
from .store import write_whole
from .text import check_dims

KINDS: dict[str, str] = {
    "checkpoints": "d90 over the checkpoints of one pretraining (section 5.1)",
    "models": "d90 against the number of parameters (section 5.2)",
    "methods": "DID against SAID (Table 1)",
    "gap": "d90 against the relative generalization gap (section 5.3)",
}


def study(
    kind: str,
    models: Sequence[str],
    options: Mapping[str, Any],
    out: str | os.PathLike,
    tell: Callable[[str], None] = print,
    **measure: Any,
) -> list[dict[str, Any]]:
    """Measure each model (with `"methods"` by DID and by SAID); write `study.json`, `study.md`, `study.png` into `out`.

    Every measurement has a folder of its own in `out`: the same call goes on where it stopped, and models can be added.
    Full fine-tuning is measured once per model; where it is no better than the majority class, the study notes so and
    goes on.

    Args:
        kind: a key of `KINDS`.
        models: names or folders.
        options, measure: of `measure_text`.
        tell: is given a line per measurement.

    Returns:
        Per measurement: name, x (place on the axis), parameters, d, interval, baseline, train, eval, gap, why_not.
    """
    rows: list[dict[str, Any]] = []
    out = Path(out)
    if kind == "methods":
        for model in models:  # DID's hours are lost if SAID asks for another grid
            check_dims({**options, "model": model, "said": True}, measure.get("dims") or grid())
    for place, model in enumerate(models):
        baseline: list[float] | None = None
        why_not: dict[str, str] = {}
        for said in (False, True) if kind == "methods" else (bool(options["said"]),):
            trials = {**options, "model": model, "said": said, "train_score": kind == "gap"}
            name = f"{model} {'SAID' if said else 'DID'}"
            row: dict[str, Any] = {"name": name, "parameters": _parameters(model)}
            try:
                if not why_not:  # full fine-tuning is the same by either method
                    folder = out / re.sub(r"[^\w.-]+", "_", name.strip("./"))
                    result = measure_text(trials, folder, **{"baseline": baseline, **measure})
                    baseline = result.baseline
                    row |= {"d": result.d, "interval": result.interval, "baseline": float(np.mean(result.baseline))}
                    row |= {"share": result.name, "seeds": result.seeds, "top": result.points[-1][0], **_gap(result)}
            except NothingToMeasure as error:
                why_not = {"why_not": str(error)}
            row |= why_not
            row["x"] = {"checkpoints": _step(model, place), "models": row["parameters"], "gap": row.get("gap")}.get(
                kind, len(rows)
            )
            rows.append(row)
            tell(_line(row))
            write_whole(out / "study.json", json.dumps({"kind": kind, "rows": rows}, indent=1))
            write_whole(out / "study.md", _markdown(kind, rows))
            _plot(kind, rows, out / "study.png")
    return rows


def _parameters(model: str) -> int:
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.from_pretrained(model)).num_parameters()


def _step(model: str, place: int) -> int:
    """The number that a checkpoint's name ends with, or else its place."""
    number = re.search(r"(\d+)\D*$", Path(model).name)
    return int(number[1]) if number else place


def _gap(result: Result) -> dict[str, float]:
    """Scores on training and held-out data at d90; their gap over what is left to the best (of a loss, the gap)."""
    rate = result.learning_rates and result.learning_rates[1]
    rows = [
        row
        for row in result.trials
        if (row["d"], row["learning_rate"]) == (result.d, rate) and None not in (row.get("train_score"), row["score"])
    ]
    if result.d is None or not rows:
        return {}
    train, held_out = (float(np.mean([row[name] for row in rows])) for name in ("train_score", "score"))
    left = 1.0 if result.settings["metric"] == "loss" else max(result.settings.get("best", 1.0) - held_out, 1e-9)
    return {"train": train, "eval": held_out, "gap": (train - held_out) / left}


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "why_not" in row:
        return [row["name"], f"{row['parameters']:,}", "", row["why_not"], "", ""]
    ends = ["beyond the grid" if end is None else str(end) for end in row["interval"]]
    d = f"above {row['top']}" if row["d"] is None else str(row["d"])
    gap = f"{row['gap']:.4f}" if "gap" in row else ""
    interval = f"[{ends[0]}, {ends[1]}]{' (bracket of one seed)' if row['seeds'] == 1 else ''}"
    return [row["name"], f"{row['parameters']:,}", f"{row['baseline']:.4f}", d, interval, gap]


def _line(row: Mapping[str, Any]) -> str:
    return "  ".join(cell for cell in _cells(row) if cell)


def _markdown(kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    share = next((row["share"] for row in rows if "share" in row), "d90")
    lines = [
        f"# {KINDS[kind].replace('d90', share)}",
        "",
        f"| model | parameters | full fine-tuning | {share} | 90 % interval | gap at {share} |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(_cells(row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _plot(kind: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    found = [row for row in rows if row.get("d") is not None and row["x"] is not None]
    for row in found:
        low, high = (row["top"] if end is None else end for end in row["interval"])
        axes.errorbar(row["x"], row["d"], [[row["d"] - low], [high - row["d"]]], fmt="o", color="black", capsize=3)
        if kind in ("models", "gap"):
            axes.annotate(Path(row["name"]).name, (row["x"], row["d"]), (5, 5), textcoords="offset points", fontsize=7)
    labels = {"checkpoints": "pretraining step", "models": "parameters", "gap": "relative generalization gap"}
    axes.set(yscale="log", ylabel=f"{rows[0].get('share', 'd90')}, 90 % interval", xlabel=labels.get(kind, ""))
    if kind == "methods":
        axes.set_xticks([row["x"] for row in found], [Path(row["name"]).name for row in found], rotation=20)
    if kind == "models":
        axes.set_xscale("log")
    figure.savefig(path, dpi=150)
