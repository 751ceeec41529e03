"""Studies of Aghajanyan et al. (2020): many measurements, one table and one plot."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from ..trials.store import write_whole
from .analysis import NothingToMeasure, Result
from .evidence import TUNING, collapsed
from .measure_text import measure_prepared, prepare
from .report import save, task, told

KINDS: dict[str, str] = {
    "checkpoints": "d90 over the checkpoints of one pretraining (section 5.1)",
    "models": "d90 against the number of parameters (section 5.2)",
    "methods": "d90 by several methods (Table 1)",
    "gap": "d90 against the relative generalization gap (section 5.3)",
}


def study(
    kind: str,
    models: Sequence[str],
    methods: Sequence[str],
    options: Mapping[str, Any],
    question: Mapping[str, Any],
    out: str | os.PathLike,
    tell: Callable[[str], None] = print,
    **run: Any,
) -> list[dict[str, Any]]:
    """Measure each model by each method; write `study.json`, `.md`, `.csv`, and the plot, into `out`.

    Every measurement has a folder of its own in `out`: the same call goes on where it stopped, and models can be added.
    All are checked before the first begins. Full fine-tuning is measured once per model; where it is no better than the
    majority class, the study notes so and goes on.

    Args:
        kind: a key of `KINDS`.
        models: names or folders.
        methods: keys of `METHODS`.
        options, question: of `prepare`, without model and method.
        tell: is given a line per measurement.
        run: of `measure_prepared`.

    Returns:
        Per measurement: name, x (place on the axis), parameters, method, answers (by definition of the target: d,
        interval), baseline, train, eval, gap, why_not. Nothing with `dry_run`.
    """
    if len(methods) > 1 and kind != "methods":
        raise ValueError(f"--method {','.join(methods)}: study {kind} has one. Use 'study methods' for several.")
    rows: list[dict[str, Any]] = []
    out = Path(out)
    places = [(place, model, method) for place, model in enumerate(models) for method in methods]
    shared = {**options, "train_score": kind == "gap"}
    ready = [prepare({**shared, "model": model, "method": method}, question) for _, model, method in places]
    folders = [out / re.sub(r"[^\w.-]+", "_", f"{model} {method}".strip("./")) for _, model, method in places]
    for one, folder in zip(ready, folders, strict=True):
        one.check(folder, run.get("launcher"), run.get("overwrite", False))
    full: dict[str, list[Mapping[str, Any]]] = {}
    for (place, model, method), one, folder in zip(places, ready, folders, strict=True):
        name = f"{model} {method}"
        parameters = _parameters(model)
        row: dict[str, Any] = {"name": name, "parameters": parameters, "method": method}
        why_not = next((known["why_not"] for known in rows if "why_not" in known and known["model"] == model), None)
        try:
            if why_not:  # full fine-tuning is the same by either method
                raise NothingToMeasure(why_not)
            result = measure_prepared(one, folder, **run, known=full.get(model, ()))
            if result is None:
                continue
            full[model] = [trial for trial in result.trials if trial["d"] is None]
            row |= _found(result)
        except NothingToMeasure as error:
            row["why_not"] = str(error)
        row["model"] = model
        x = {"checkpoints": _step(model, place), "models": parameters, "gap": row.get("gap")}
        row["x"] = x.get(kind, len(rows))
        rows.append(row)
        write_whole(out / "study.json", json.dumps({"kind": kind, "rows": rows}, indent=1))
        write_whole(out / "study.md", _markdown(kind, rows))
        write_whole(out / "study.csv", _table(rows))
        _plot(kind, rows, out)
        tell("  ".join(cell for cell in _cells(row) if cell))
    return rows


def _found(result: Result) -> dict[str, Any]:
    answers = {
        of: {"d": answer.d, "interval": answer.interval, "told": told(result, answer)}
        for of, answer in result.answers.items()
    }
    found = {"answers": answers, "relative_to": result.relative_to, "share": result.name, "seeds": result.seeds}
    found["ends"] = result.ends
    return {**found, "task": task(result), "baseline": result.baseline.level, **_gap(result)}


def _parameters(model: str) -> int:
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.from_pretrained(model)).num_parameters()


def _step(model: str, place: int) -> int:
    """The number that a checkpoint's name ends with, or else its place."""
    number = re.search(r"(\d+)\D*$", Path(model).name)
    return int(number[1]) if number else place


def _gap(result: Result) -> dict[str, float]:
    """Scores on training and held-out data at d90, or the next d that was measured, of runs that did not collapse;
    their gap over what is left to the best (of a loss, the gap)."""
    above = [point for point in result.points if result.d is not None and point.d >= result.d]
    where = (above[0].d, above[0].learning_rate) if above else None
    rows = [
        row
        for row in result.trials
        if (row["d"], row["learning_rate"]) == where
        and row["seed"] != TUNING
        and row.get("train_score") is not None
        and not collapsed(row["score"], result.least)
    ]
    if not rows:
        return {}
    train, held_out = (float(np.mean([row[name] for row in rows])) for name in ("train_score", "score"))
    left = 1.0 if result.settings["metric"] == "loss" else max(result.settings.get("best", 1.0) - held_out, 1e-9)
    return {"train": train, "eval": held_out, "gap": (train - held_out) / left}


def _cells(row: Mapping[str, Any]) -> list[str]:
    start = [row["name"], f"{row['parameters']:,}"]
    if "why_not" in row:
        return [*start, "", row["why_not"], "", ""]
    by = [f"{d} {interval.removeprefix('90 % interval ')}" for d, interval in map(_words, ("score", "gain"), [row] * 2)]
    return [*start, f"{row['baseline']:.4f}", *by, f"{row['gap']:.4f}" if "gap" in row else ""]


def _words(of: str, row: Mapping[str, Any]) -> tuple[str, str]:
    return row["answers"][of]["told"] if of in row["answers"] else ("", "")


def _markdown(kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    share = next((row["share"] for row in rows if "share" in row), "d90")
    lines = [
        f"# {KINDS[kind].replace('d90', share)}",
        "",
        f"| model, method | parameters | full fine-tuning | {share} by score [90 %] | by gain | gap at {share} |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(_cells(row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "method", "parameters", "full fine-tuning", "by", "d", "low", "high"])
    for row in rows:
        for of, answer in row.get("answers", {}).items():
            start = [row["model"], row["method"], row["parameters"], row["baseline"]]
            writer.writerow([*start, of, answer["d"], *answer["interval"]])
    return text.getvalue()


def _plot(kind: str, rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Intervals as horizontal lines, a row for each measurement; an arrow where one is open."""
    from matplotlib.figure import Figure

    found = [row for row in rows if "answers" in row and row["x"] is not None]
    found = sorted(found, key=lambda row: row["x"], reverse=True)
    figure = Figure(figsize=(6.5, 1.5 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(found):
        answer = row["answers"][row["relative_to"]]
        least, most = row["ends"]
        low, high = (most if end is None else end for end in answer["interval"])
        if row["seeds"] > 1:
            axes.plot([low, high], [place, place], color="black")
            for at, mark, is_open in ((low, "<", low <= least), (high, ">", answer["interval"][1] is None)):
                axes.plot(at, place, mark if is_open else "|", color="black")
        if answer["d"] is not None:
            axes.plot(answer["d"], place, "o", color="black")
    note = {"models": "parameters", "checkpoints": "step", "gap": "gap"}.get(kind)
    labels = [
        f"{Path(row['model']).name}, {row['method']}" + (f"\n{note} {row['x']:.3g}" if note else "") for row in found
    ]
    axes.set_yticks(range(len(found)), labels)
    share = rows[0].get("share", "d90")
    axes.set(xscale="log", xlabel=f"{share}, 90 % interval", ylim=(-0.6, max(len(found), 1) - 0.4))
    axes.set_title(", ".join(dict.fromkeys(row["task"] for row in found)))
    axes.grid(axis="x", alpha=0.3)
    save(figure, out, "study")
