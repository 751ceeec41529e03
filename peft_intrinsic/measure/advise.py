"""The smallest LoRA rank, and the smallest d, that reach a fraction of full fine-tuning: two measurements."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..text.methods import build_config, count_trained
from ..text.training import load_without_weights
from ..trials.engine import Engine, get_versions
from ..trials.store import check_folder, write_whole
from .analysis import Result
from .measure_text import prepare
from .report import describe_target, format_answer, name_task

METHODS = {"rank": "lora-rank", "d": "default"}
"""What is chosen, and the method that is measured for it."""


@dataclass(frozen=True)
class Advice:
    """Advice on the size of an adapter.

    Args:
        results: Results of the measurements by what they choose, `rank` and `d`. Both have the same target.
        parameters: Numbers of trainable parameters at the chosen rank, head included, and at the chosen d; None where
            none reaches the target.
    """

    results: Mapping[str, Result]
    parameters: Mapping[str, int | None]

    @property
    def trials(self) -> list[dict[str, Any]]:
        """All trials; those of full fine-tuning belong to both measurements, and count once."""
        rank, d = (self.results[name].trials for name in METHODS)
        return [*rank, *(trial for trial in d if trial not in rank)]

    def to_dict(self) -> dict[str, Any]:
        """Convert to a mapping for JSON."""
        first = self.results["rank"]
        chosen = {
            name: {
                "value": result.d,
                "interval": result.interval if result.seeds > 1 else None,
                "text": format_answer(result, result.answer),
                "parameters": self.parameters[name],
                "measured": [point.d for point in result.points],
                "stopped": result.stopped,
            }
            for name, result in self.results.items()
        }
        return {
            "task": name_task(first),
            "metric": first.settings["metric"],
            "share": first.share,
            "relative_to": first.relative_to,
            "full": first.baseline.level,
            "full_scores": first.baseline.scores,
            "target": first.target,
            **chosen,
            "cost": {"trials": len(self.trials), "seconds": sum(trial["seconds"] for trial in self.trials)},
            "versions": get_versions(),
        }

    def report(self) -> str:
        """Return the advice in plain words."""
        first, seconds = self.results["rank"], self.to_dict()["cost"]["seconds"]
        goal = f"reaches {first.share:g} of the {first.relative_to} of full fine-tuning"
        lines = [
            self._describe("rank", "LoRA rank", "--ranks", goal),
            self._describe("d", "d of IntrinsicConfig", "--dims", goal),
            f"The measurement took {len(self.trials)} trials and {seconds / 60:.1f} minutes of training: "
            f"{describe_target(first)}.",
        ]
        return "\n".join(lines) + "\n"

    def _describe(self, name: str, title: str, option: str, goal: str) -> str:
        result = self.results[name]
        value, interval = format_answer(result, result.answer)
        if result.d is None:
            beyond = result.ends[1] == result.dims[1]
            remedy = f"Try larger ones ({option})" if beyond else "Larger ones need more trials (--trials, --minutes)"
            return f"No measured {title} up to {result.ends[1]} {goal} ({interval}). {remedy}."
        size = f"{self.parameters[name]} trainable parameters"
        end = f" No smaller {name} was measured." if value.startswith("≤") else ""
        return f"The smallest {title} that {goal} is {result.d} ({interval}), with {size}.{end}"


def advise(
    options: Mapping[str, Any],
    ranks: Sequence[int],
    out: str | os.PathLike,
    plan: Mapping[str, Any],
    launcher: str | None = None,
    engine: Callable[[], Engine] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Advice | None:
    """Measure the smallest LoRA rank, then the smallest d, and write `advice.json` and `advice.md` into `out`.

    Each measurement has a folder of its own in `out`, `rank` and `d`, and the same call resumes. Full fine-tuning runs
    once.

    Args:
        options: Options of `TextOptions`, without a method.
        ranks: Ranks to choose from, ascending.
        out: Folder of both measurements.
        plan: Options of `measure_intrinsic_dimension` for both plans; its `dims` are the d to choose from. Each
            measurement has half of its `minutes`.
        launcher, engine, overwrite: See `measure_text`.
        dry_run: Print the plans, run nothing, and return None.

    Raises:
        ValueError, RuntimeError, OSError, ImportError: See `measure_text`.

    Example:
        ```python
        options = {"model": "bert-base-uncased", "task": "glue/mrpc"}
        plan = {"dims": grid(64, 16384, 9), "learning_rates": "auto"}
        print(advise(options, [1, 2, 4, 8, 16, 32, 64], "runs/advice", plan).report())
        ```
    """
    if len(ranks) < 2 or ranks[0] < 1 or sorted(set(ranks)) != list(ranks):
        raise ValueError(f"ranks={list(ranks)} (--ranks) must be ascending whole numbers from 1 on, at least two.")
    if plan.get("minutes") is not None:
        plan = {**plan, "minutes": plan["minutes"] / 2}
    dims: dict[str, dict[str, Any]] = {"rank": {"dims": tuple(ranks)}, "d": {}}
    measurements = {
        name: prepare({**options, "method": method}, {**plan, **dims[name]}, launcher)
        for name, method in METHODS.items()
    }
    for name, measurement in measurements.items():
        if not overwrite:
            check_folder(Path(out, name), measurement.settings)
        if dry_run:
            print(f"{measurement.describe()}\nin {Path(out, name)}")
    if dry_run:
        return None
    rank = measurements["rank"].run(Path(out, "rank"), engine, overwrite)
    full = [trial for trial in rank.trials if trial["d"] is None]
    second = measurements["d"].with_target_of(rank)
    results = {"rank": rank, "d": second.run(Path(out, "d"), engine, overwrite, full)}
    chosen = measurements["rank"].options
    base = load_without_weights(chosen.model, chosen.task_type, **measurements["rank"].task.head_options())
    trained = rank.d and count_trained(build_config(chosen.method, rank.d, 0, base, chosen.task_type), base)
    advice = Advice(results, {"rank": trained, "d": results["d"].d})
    write_whole(Path(out, "advice.json"), json.dumps(advice.to_dict(), indent=1) + "\n")
    write_whole(Path(out, "advice.md"), advice.report())
    return advice
