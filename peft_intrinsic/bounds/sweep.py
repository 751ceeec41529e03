"""Searches the lowest bound for a task: adapters of several d, packed with several numbers of levels."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import get_peft_model

from ..codec import PRIORS, adapter_from_string, adapter_to_string, read_packed
from ..codec.quantize import check_levels
from ..figures import save_figure, scale_counts, styled
from ..trials.store import Store, write_whole
from ..tuner.base_model import base_digest
from .certify import (
    AnyTexts,
    build_certificate,
    check_num_tried,
    compute_digest,
    count_message_bits,
    measure_packed,
    parse_certificate,
    write_certified,
)
from .texts import pack_rounded


def sweep(
    texts: AnyTexts,
    dims: Sequence[int],
    levels: Sequence[int],
    out: str | os.PathLike,
    steps: int = 1000,
    tuning_steps: int = 0,
    learning_rate: float = 2e-4,
    seed: int = 0,
    delta: float = 0.05,
    eval: bool = False,
    num_tried: int = 1,
) -> list[dict[str, Any]]:
    """Train an adapter for each d, pack it with each number of levels, and certify each packed adapter.

    `trials.jsonl` in `out` stores each finished one with its bytes, so that an interrupted sweep resumes and a finished
    one can be extended. The lowest bound of all rows is written as `best.pia` with its certificate, in which every row
    counts as tried.

    Args:
        texts: task and base model.
        dims: values of d.
        levels: numbers of values that θ is rounded to.
        out: folder of the results.
        steps: training steps.
        tuning_steps: steps of quantization-aware training for each number of levels.
        learning_rate: learning rate of training; a tenth of it is used in quantization-aware training.
        seed: seed of the projection and of training.
        delta: probability that the bound fails.
        eval: whether the evaluation split is test data. Rows that were scored on other data are scored again.
        num_tried: number of combinations tried elsewhere, which multiplies the number of rows.

    Returns:
        A row for each packed adapter in the folder, by d and levels: d, levels, bytes, bits of the body with a table
        and with a fixed prior (the file has the smaller), and the certificate.

    Raises:
        ValueError: a value of `levels` or `dims` is not possible (before training starts), or `out` holds a sweep of
            another base model or with other settings, or its certificate counts more as tried.
    """
    for count in levels:
        check_levels(count)
    reinitialized: list[str] = []
    for d in dims:
        model: Any = get_peft_model(texts.base, texts.build_config(d, seed))  # raises before training
        reinitialized = model.peft_config[model.active_adapter].reinitialized or []
        model.unload()
    settings = {
        "base_model": base_digest(texts.base, reinitialized).hex(),
        "training_data": compute_digest(texts.task.data["train"]),
        **texts.settings,
        **{"steps": steps, "tuning_steps": tuning_steps, "learning_rate": learning_rate, "seed": seed},
        "arguments": {name: texts.training.arguments[name] for name in ("per_device_train_batch_size",)},
    }
    test_data = compute_digest(texts.task.data["eval"]) if eval else None
    with Store(out, settings) as store:
        for d in dims:
            missing = [count for count in levels if store.key({"d": d, "levels": count}) not in store.rows]
            if missing:
                for count, data in train_and_pack(texts, d, missing, steps, tuning_steps, learning_rate, seed).items():
                    row = measure_packed(data, texts, ["train", "eval"] if eval else ["train"])
                    row |= {"test_data": test_data, "adapter": adapter_to_string(data)}
                    store.add({"d": d, "levels": count}, row)
        rows = sorted(store.rows.values(), key=lambda row: (row["d"], row["levels"]))
    adapters = [adapter_from_string(row["adapter"]) for row in rows]
    check_num_tried([Path(out, "best.pia")], adapters, texts, num_tried, len(rows))
    total = num_tried * len(rows)
    results = [_certify_row(row, texts, total, delta, test_data) for row in rows]
    best = min(range(len(results)), key=lambda i: results[i]["certificate"]["bound"])
    write_certified(Path(out, "best.pia"), adapters[best], parse_certificate(results[best]["certificate"]), texts)
    content = {"settings": settings, "num_tried": total, "rows": results}
    write_whole(Path(out, "sweep.json"), json.dumps(content, indent=1))
    return results


def train_and_pack(
    texts: AnyTexts, d: int, levels: Sequence[int], steps: int, tuning_steps: int, learning_rate: float, seed: int
) -> dict[int, bytes]:
    """Train an adapter, and pack it with each number of levels."""
    model: Any = get_peft_model(texts.base, texts.build_config(d, seed))
    try:
        texts.train(model, steps, learning_rate, seed)
        return {count: pack_rounded(texts, model, count, tuning_steps, learning_rate, seed) for count in levels}
    finally:
        model.unload()


def _certify_row(
    row: dict[str, Any], texts: AnyTexts, num_tried: int, delta: float, test_data: str | None
) -> dict[str, Any]:
    data = adapter_from_string(row["adapter"])
    packed = read_packed(data)
    is_scored = row.get("test_data") == test_data  # rows of earlier versions lack it
    measured = row if is_scored else {name: row[name] for name in row if not name.startswith("test_")}
    if test_data is not None and not is_scored:
        measured |= measure_packed(data, texts, ["eval"])
    certificate = build_certificate(texts, measured, count_message_bits(data), num_tried, delta)
    weights = {"table_bits": [0], "prior_bits": range(1, PRIORS + 1)}
    return {
        **{"d": row["d"], "levels": row["levels"], "bytes": len(data)},
        **{name: 8 * len(packed.encode_body(allowed)) for name, allowed in weights.items()},
        "certificate": certificate.to_dict(),
    }


@styled
def plot_sweep(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot bound and error: against d for the lowest bound of each d, and against bytes for all.

    The error is that of training, that of test data if there are any, and that of the majority class. For language
    models the loss replaces it, and the bound of the base model that of the majority class.

    Args:
        rows: result of `sweep`.
        path: file of the figure; its ending is the format.
    """
    from matplotlib.figure import Figure

    dims = sorted({row["d"] for row in rows})
    best = [min((row for row in rows if row["d"] == d), key=lambda row: row["certificate"]["bound"]) for d in dims]
    is_language = "vocabulary" in rows[0]["certificate"]
    error = "loss" if is_language else "error"
    figure = Figure(figsize=(9, 3.5))
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, shown, name, style in ((left, best, "d", "o-"), (right, rows, "bytes", "o")):
        x, certificates = [row[name] for row in shown], [row["certificate"] for row in shown]
        axis.plot(x, [values["bound"] for values in certificates], style, label="bound")
        axis.plot(x, [values["risk"] for values in certificates], style, label=f"training {error}")
        if all(values["test_n"] for values in certificates):
            tested = [
                values["test_risk"] if is_language else values["test_errors"] / values["test_n"]
                for values in certificates
            ]
            axis.plot(x, tested, style, label=f"test {error}")
        first = certificates[0]
        level = first["untrained_bound"] if is_language else first["majority"] / first["n"]
        label = "bound of the base model" if is_language else "majority class"
        axis.axhline(level, color="gray", linestyle=":", label=label)
        axis.set(xlabel="trainable parameters (d)" if name == "d" else "bytes of the packed adapter")
    scale_counts(left)
    left.set(ylabel="bits per token" if is_language else "error", ylim=(0, None))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, path)
