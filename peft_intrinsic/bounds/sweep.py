"""The cheapest certificate of a task: adapters of several d, packed with several numbers of levels."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import get_peft_model

from ..codec import PRIORS, Packed, adapter_from_string, adapter_to_string
from ..codec.quantize import check_levels
from ..trials.store import Store, write_whole
from ..tuner.base_model import base_digest
from .certificate import Certificate
from .certify import certificate, digest, errors, message_bits, write
from .texts import PackedTexts


def sweep(
    texts: PackedTexts,
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
    """Train an adapter for each d, pack it with each number of levels, and certify every one.

    A finished one is a row of `trials.jsonl` in `out`, its packed adapter included, so a killed sweep goes on, and may
    be widened. The least bound of all rows there is written as `best.pia` with its certificate, in which every row
    counts as tried.

    Args:
        texts: task and base model.
        dims, levels: to try; every combination is charged.
        out: folder.
        steps: of training.
        tuning_steps: of fine-tuning as rounded, for each number of levels.
        learning_rate: of training; of fine-tuning as rounded a tenth of it.
        seed: of the projection and of training.
        delta: the probability that the bound fails.
        eval: whether `texts` have data of their own for evaluation. Rows that were scored on others are scored again.
        num_tried: combinations of anything else tried before, by which the number of rows is multiplied.

    Raises:
        ValueError: a number of levels or a d that cannot be had, before anything is trained; or `out` holds a sweep of
            another base model, or of other settings.

    Returns:
        For each row of the folder, by d and levels: d, levels, bytes, the body's bits with a table and with a prior
        fixed beforehand (the adapter has the fewer), and the certificate.
    """
    for count in levels:
        check_levels(count)
    reinitialized: list[str] = []
    for d in dims:
        model: Any = get_peft_model(texts.base, texts.adapter(d, seed))  # raises before hours are spent
        reinitialized = model.peft_config[model.active_adapter].reinitialized or []
        model.unload()
    settings = {
        "base_model": base_digest(texts.base, reinitialized).hex(),
        "training_data": digest(texts.task.data["train"]),
        "max_length": texts.max_length,
        **{"steps": steps, "tuning_steps": tuning_steps, "learning_rate": learning_rate, "seed": seed},
        "arguments": {name: texts.arguments[name] for name in ("per_device_train_batch_size",)},
    }
    test_data = digest(texts.task.data["eval"]) if eval else None
    with Store(out, settings) as store:
        for d in dims:
            left = [count for count in levels if store.key({"d": d, "levels": count}) not in store.rows]
            if left:
                for count, data in trained(texts, d, left, steps, tuning_steps, learning_rate, seed).items():
                    found = certificate(data, texts, 1, delta, eval)
                    counts = {"errors": found.errors, "test_errors": found.test_errors, "test_n": found.test_n}
                    row = {**counts, "test_data": test_data, "adapter": adapter_to_string(data)}
                    store.add({"d": d, "levels": count}, row)
        rows = sorted(store.rows.values(), key=lambda row: (row["d"], row["levels"]))
    num_tried *= len(rows)
    told = [_told(row, texts, num_tried, delta, test_data) for row in rows]
    best = min(range(len(told)), key=lambda i: told[i]["certificate"]["bound"])
    data = adapter_from_string(rows[best]["adapter"])
    write(Path(out, "best.pia"), data, Certificate.from_dict(told[best]["certificate"]), texts)
    write_whole(
        Path(out, "sweep.json"), json.dumps({"settings": settings, "num_tried": num_tried, "rows": told}, indent=1)
    )
    return told


def trained(
    texts: PackedTexts, d: int, levels: Sequence[int], steps: int, tuning_steps: int, learning_rate: float, seed: int
) -> dict[int, bytes]:
    """One adapter, packed with each number of levels."""
    model: Any = get_peft_model(texts.base, texts.adapter(d, seed))
    try:
        texts.train(model, steps, learning_rate, seed)
        return {count: texts.packed(model, count, tuning_steps, learning_rate, seed) for count in levels}
    finally:
        model.unload()


def _told(
    row: dict[str, Any], texts: PackedTexts, num_tried: int, delta: float, test_data: str | None
) -> dict[str, Any]:
    data = adapter_from_string(row["adapter"])
    packed = Packed.from_bytes(data)
    unseen: tuple[int | None, int | None] = None, None
    if test_data is not None:
        known = row.get("test_data") == test_data  # rows of earlier versions do not say
        unseen = row["test_errors"] if known else errors(data, texts, ["eval"])[0], len(texts.data["eval"])
    counts = (row["errors"], message_bits(data), num_tried, delta, texts.majority(), *unseen)
    return {
        **{"d": row["d"], "levels": row["levels"], "bytes": len(data)},
        **{"table_bits": 8 * len(packed.body([0])), "prior_bits": 8 * len(packed.body(range(1, PRIORS + 1)))},
        "certificate": Certificate(len(texts.data["train"]), *counts).to_dict(),
    }
