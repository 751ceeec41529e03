"""The command train."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..measure.evidence import collapsed, describe_collapse
from ..text.arguments import check_arguments, checked
from ..text.baselines import logistic_regression
from ..text.options import TextOptions
from ..text.tasks import Task, load_task
from ..text.training import text_fit
from ..tuner import IntrinsicConfig
from ..tuner.names import KEYWORDS
from .inputs import ADAPTER_FILES, adapter_size, training_arguments

SCORES = "scores.json"


REPLACED = (*ADAPTER_FILES, "README.md", SCORES, "adapter.pia", "adapter.certificate.json")
"""Files of a former adapter, which `--overwrite` removes."""


def train(args: argparse.Namespace) -> None:
    """Train an adapter, print its score beside the baselines, and save both.

    Raises:
        ValueError: the folder is in use, or another option cannot work.
    """
    folder = Path(args.out)
    if folder.exists() and not args.overwrite and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"--out {folder} is in use. Name a new folder, or replace its adapter with --overwrite.")
    config, options = _adapter_config(args), _text_options(args)
    check_arguments(checked(options.arguments))
    fit = text_fit(options, load_task(options))
    base = fit.loaded(args.model)
    majority = fit.task.majority()
    scores, sizes = {} if majority is None else {"majority": majority}, {"after": f"d = {config.d}"}
    if _is_encoder(base) and fit.task.classes and fit.task.task_type == "SEQ_CLS":
        predicted, weights = logistic_regression(base.base_model, fit.collator(), fit.data["train"], fit.data["eval"])
        scores["logistic_regression"] = fit.task.score(fit.task.numbers("eval"), predicted)
        sizes["logistic_regression"] = f"{weights} weights"
    model: Any = get_peft_model(base, config)
    scores["before"] = fit.run(model, "before", None)["score"]
    scores["after"] = fit.run(model, "train", {"learning_rate": args.lr, "seed": args.seed})["score"]
    _print_scores(scores, sizes, fit.task, args.lr)
    _save(model, scores, fit, args)
    print(f"{folder}: d = {config.d}, {adapter_size(folder)} bytes, with {SCORES}")


def _print_scores(scores: Mapping[str, float], sizes: Mapping[str, str], task: Task, learning_rate: float) -> None:
    print(f"{task.metric} on {len(task.data['eval'])} held-out examples")
    for name, score in scores.items():
        size = f" ({sizes[name]})" if name in sizes else ""
        print(f"  {name.replace('_', ' ') + size:<36}{task.sign * score:.4f}")
    baseline, named = ("majority", "majority class") if "majority" in scores else ("before", "untrained model")
    if collapsed(scores["after"], scores[baseline]):
        after, least = (task.sign * scores[name] for name in ("after", baseline))
        print(describe_collapse(after, least, learning_rate, task.metric, named))


def _save(model: Any, scores: Mapping[str, float], fit: Any, args: argparse.Namespace) -> None:
    """Save the adapter and its scores; a former adapter is replaced when all is written."""
    settings = {name: getattr(args, name) for name in ("model", "d", "said", "seed", "epochs", "batch")}
    report = {
        "metric": fit.task.metric,
        **{name: fit.task.sign * score for name, score in scores.items()},
        **settings,
        "learning_rate": args.lr,
        "examples": {split: len(rows) for split, rows in fit.data.items()},
        "labels": [fit.task.name(label) for label in fit.task.classes],
    }
    folder = Path(args.out)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        Path(saved, SCORES).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        for name in REPLACED:
            (folder / name).unlink(missing_ok=True)
        for file in Path(saved).iterdir():
            shutil.copy(file, folder)


def _text_options(args: argparse.Namespace) -> TextOptions:
    names = ("model", "task", "train", "eval", "dataset", "label", "metric", "task_type", "max_length")
    given = {name: getattr(args, name) for name in names}
    arguments = {**training_arguments(args), "disable_tqdm": False}
    return TextOptions(**given, columns=tuple(args.text), arguments=arguments)


def _adapter_config(args: argparse.Namespace) -> IntrinsicConfig:
    """The configuration of the adapter; a single name is a list too, unless it is a keyword."""
    modules = args.target_modules
    if modules and modules[0] in (*KEYWORDS, "all-linear"):
        modules = ",".join(modules)
    return IntrinsicConfig(d=args.d, said=args.said, seed=args.seed, target_modules=modules, task_type=args.task_type)


def _is_encoder(model: Any) -> bool:
    """Whether a model encodes texts for classification, as BERT does."""
    config = model.config
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
