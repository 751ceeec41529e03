"""The command train."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..measure.evidence import is_collapsed
from ..text.baselines import describe_collapse, logistic_regression
from ..text.options import TextOptions, check_arguments, complete_arguments
from ..text.tasks import Task, load_task
from ..text.training import TRAININGS, check_positions, load_without_weights
from ..tuner import IntrinsicConfig
from ..tuner.names import KEYWORDS, is_named
from ..tuner.targets import adaptable_parameters
from .inputs import (
    SCORES,
    build_text_options,
    count_adapter_bytes,
    prepare_adapter_folder,
    replace_adapter,
)


def train(args: argparse.Namespace) -> None:
    """Train an adapter, print its score beside the baselines, and save both."""
    if not (math.isfinite(args.lr) and args.lr > 0):
        raise ValueError(f"--learning-rate {args.lr:g} is no learning rate. Pass a number above 0, such as 2e-4.")
    if args.seed >= 2**32:
        raise ValueError(f"--seed {args.seed} exceeds what numpy takes. Use a seed below 2**32.")
    folder = Path(args.out)
    prepare_adapter_folder(folder, args.overwrite)
    config = _build_config(args)
    options = TextOptions(args.model, **build_text_options(args, {"disable_tqdm": False}))
    check_arguments(complete_arguments(options.arguments))
    task = load_task(options)
    shapes = load_without_weights(args.model, args.task_type)
    check_positions(options, shapes)
    _check_targets(config, shapes)
    training = TRAININGS[task.task_type](options, task)
    data, base = training.data, training.load_base()
    majority = task.score_majority()
    scores, sizes = {} if majority is None else {"majority": majority}, {"after": f"d = {config.d}"}
    if _is_encoder(base) and task.classes and task.task_type == "SEQ_CLS":
        predicted, weights = logistic_regression(
            base.base_model, training.build_collator(), data["train"], data["eval"]
        )
        scores["logistic_regression"] = task.score(task.encode_labels("eval"), predicted)
        sizes["logistic_regression"] = f"{weights} weights"
    model: Any = get_peft_model(base, config)
    with tempfile.TemporaryDirectory() as checkpoints:
        trainer = training.build_trainer(model, checkpoints, {"learning_rate": args.lr, "seed": args.seed})
        scores["before"] = training.evaluate(trainer, "eval")
        trainer.train()
        scores["after"] = training.evaluate(trainer, "eval")
    _print_scores(scores, sizes, task, args.lr)
    _save(model, scores, task, args)
    size = f"weights and configuration {count_adapter_bytes(folder)} bytes"
    print(f"{folder}: d = {config.d}, {size}, with {SCORES}")


def _print_scores(scores: Mapping[str, float], sizes: Mapping[str, str], task: Task, learning_rate: float) -> None:
    print(f"{task.metric} on {len(task.data['eval'])} held-out examples")
    for name, score in scores.items():
        size = f" ({sizes[name]})" if name in sizes else ""
        print(f"  {name.replace('_', ' ') + size:<36}{task.sign * score:.4f}")
    baseline, named = ("majority", "majority class") if "majority" in scores else ("before", "untrained model")
    if is_collapsed(scores["after"], scores[baseline]):
        after, least = (task.sign * scores[name] for name in ("after", baseline))
        print(describe_collapse(after, least, learning_rate, task.metric, named))


def _save(model: Any, scores: Mapping[str, float], task: Task, args: argparse.Namespace) -> None:
    """Save the adapter and its scores; a former adapter is replaced when all is written."""
    settings = {name: getattr(args, name) for name in ("model", "d", "said", "seed", "epochs", "batch", "max_length")}
    report = {
        "metric": task.metric,
        **{name: task.sign * score for name, score in scores.items()},
        **settings,
        "learning_rate": args.lr,
        "examples": {split: len(rows) for split, rows in task.data.items()},
        "labels": [task.name_class(label) for label in task.classes],
    }

    def write(saved: Path) -> None:
        model.save_pretrained(saved)
        card, count = saved / "README.md", len(task.classes)
        names = f"id2label={dict(enumerate(report['labels']))}"  # the adapter stores their number only
        card.write_text(card.read_text("utf-8").replace(f"num_labels={count})", f"{names})"), encoding="utf-8")
        (saved / SCORES).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    replace_adapter(Path(args.out), write)


def _build_config(args: argparse.Namespace) -> IntrinsicConfig:
    """The configuration of the adapter; a single name is a list too, unless it is a keyword."""
    modules = args.target_modules
    if modules and len(modules) == 1 and modules[0] in (*KEYWORDS, "all-linear"):
        (modules,) = modules
    return IntrinsicConfig(d=args.d, said=args.said, seed=args.seed, target_modules=modules, task_type=args.task_type)


def _check_targets(config: IntrinsicConfig, base: Any) -> None:
    """Check that each name of a list is that of a module. The tuner ignores one that is not, as LoRA does."""
    modules = {key for key, _, _ in adaptable_parameters(base, config)}
    listed = () if isinstance(config.target_modules, str) else config.target_modules or ()
    if unknown := [name for name in sorted(listed) if not any(is_named([name], key) for key in modules)]:
        known = ", ".join(sorted({key.rpartition(".")[2] for key in modules}))
        raise ValueError(
            f"--target-modules {','.join(unknown)} matches no module with parameters of its own. Name some of {known}."
        )


def _is_encoder(model: Any) -> bool:
    """Whether a model encodes texts for classification, as BERT does."""
    config = model.config
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
