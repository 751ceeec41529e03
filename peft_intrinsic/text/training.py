"""Training on text with transformers' Trainer, and trials of it."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import DatasetDict
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ..trials.store import write_whole
from ..tuner.label_head import load_tokenizer
from .methods import METHODS, build_config, get_step
from .options import TextOptions, check_arguments, complete_arguments
from .tasks import IGNORED, Task, load_task


class TextTraining:
    """The tokenized data of a task, its base model, and Trainers for both: classes of, or a number for, texts.

    `tokens` is a file name, without suffix, for the tokenized data; None keeps them in memory.

    Raises:
        ValueError: A split is shorter than a single block of a language model.
    """

    loader: ClassVar[Any] = AutoModelForSequenceClassification
    best_metric: ClassVar[str] = "score"
    tokenizer_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, options: TextOptions, task: Task, tokens: str | None = None) -> None:
        self.options, self.task = options, task
        self.correct: np.ndarray | None = None  # predictions of the last evaluation
        self.arguments = complete_arguments(options.arguments, self.best_metric if options.patience else None)
        self.tokenizer = load_tokenizer(options.model, **self.tokenizer_options)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.index = {label: i for i, label in enumerate(task.classes)}
        self.data: DatasetDict = task.data.map(
            self.tokenize,
            batched=True,
            remove_columns=task.data["train"].column_names,
            cache_file_names=tokens and {split: f"{tokens}-{split}.arrow" for split in task.data},
            keep_in_memory=tokens is None,
        )
        if not all(map(len, self.data.values())):
            raise ValueError(
                f"max_length (--max-length) = {options.max_length} leaves a split without a single whole block of text."
            )

    def load_base(self, labels: int | None = None) -> Any:
        """Load the base model as its checkpoint is, in float32, with so many labels; None for those of the task."""
        head = self.task.head_options(labels)
        count = head.get("num_labels") or len(head.get("id2label", ())) or None
        base = load_with_head(self.loader, self.options.model, count, dtype="float32", **head)
        base.config.pad_token_id = self.tokenizer.pad_token_id
        return base

    def initialize_head(self, base: Any) -> Any:
        """Initialize a new head as adapters do, so that full fine-tuning starts where they start."""
        config = build_config("did", 1000, 0, base, self.task.task_type, "subspace")  # θ is zero
        return get_peft_model(base, config).merge_and_unload()

    def tokenize(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Tokenize rows of text, and encode their labels."""
        labels = [float(v) if self.task.regression else self.index[v] for v in rows[str(self.task.label)]]
        texts = [rows[column] for column in self.task.columns]
        return {**self.tokenizer(*texts, truncation=True, max_length=self.options.max_length), "labels": labels}

    def build_collator(self) -> Any:
        """Build the function that makes batches."""
        return DataCollatorWithPadding(self.tokenizer)

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """Score the Trainer's predictions; NaN if they are not finite. Notes which of them are correct."""
        self.correct = None
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits  # encoder-decoders return states too
        if not np.isfinite(logits).all():
            return {"score": math.nan}
        predictions = logits.squeeze(-1) if self.task.regression else logits.argmax(-1)
        labels = prediction.label_ids[0] if isinstance(prediction.label_ids, tuple) else prediction.label_ids
        if self.task.metric == "accuracy" and labels.ndim == 1:
            self.correct = labels == predictions
        return {"score": self.task.score(labels, predictions)}

    def build_trainer(self, model: Any, folder: str, arguments: Mapping[str, Any]) -> Trainer:
        """Build a Trainer of the task, with checkpoints in `folder` and further `TrainingArguments`."""
        complete = TrainingArguments(**{"output_dir": folder, **self.arguments, **arguments})
        complete._n_gpu = min(complete.n_gpu, 1)  # no DataParallel, which multiplies the batch: --launch is for several
        trainer = Trainer(
            model=model,
            args=complete,
            train_dataset=self.data["train"],
            eval_dataset=self.data["eval"],
            data_collator=self.build_collator(),
            compute_metrics=self.compute_metrics if self.best_metric == "score" else None,
            callbacks=[EarlyStoppingCallback(self.options.patience)] if self.options.patience else [],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def evaluate(self, trainer: Trainer, split: str) -> float:
        """Score a split by the task's metric; higher is better. Its examples have one order in all trials."""
        trainer.args.train_sampling_strategy = "random"  # grouped by length, they would have one for each seed
        scores = trainer.evaluate(self.data[split])
        return scores["eval_score"] if self.best_metric == "score" else -scores["eval_loss"]


class TokenTraining(TextTraining):
    """Classes of words. The label of a word is that of its first token."""

    loader = AutoModelForTokenClassification
    tokenizer_options: ClassVar[dict[str, Any]] = {"add_prefix_space": True}  # byte-level: a word begins with a space

    def __init__(self, options: TextOptions, task: Task, tokens: str | None = None) -> None:
        super().__init__(options, task, tokens)
        for split, rows in self.data.items():
            words = [len(labels) for labels in task.data[split][str(task.label)]]
            read = [sum(label != IGNORED for label in labels) for labels in rows["labels"]]
            full = [len(ids) >= options.max_length for ids in rows["input_ids"]]
            if cut := sum(all_ - some for all_, some, is_full in zip(words, read, full, strict=True) if is_full):
                raise ValueError(
                    f"max_length (--max-length) = {options.max_length} cuts off {cut} of {sum(words)} words of the "
                    f"{split} data, which would not be scored. Pass more, or divide the longest rows."
                )

    def tokenize(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        words, labels = rows[self.task.columns[0]], rows[str(self.task.label)]
        tokens = self.tokenizer(words, truncation=True, max_length=self.options.max_length, is_split_into_words=True)
        encoded = [
            [
                IGNORED if word is None or word == before else self.index[row[word]]
                for before, word in pairwise([None, *tokens.word_ids(i)])
            ]
            for i, row in enumerate(labels)
        ]
        return {**tokens, "labels": encoded}

    def build_collator(self) -> Any:
        return DataCollatorForTokenClassification(self.tokenizer)


class LanguageTraining(TextTraining):
    """Language modeling: concatenated texts in blocks of equal length. The score is the negative loss, in nats."""

    loader = AutoModelForCausalLM
    best_metric = "loss"

    def tokenize(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        texts = self.tokenizer(rows[self.task.columns[0]], add_special_tokens=False)["input_ids"]
        stream = np.concatenate([np.array(ids + end, dtype=np.int64) for ids in texts])
        length = self.options.max_length
        blocks = stream[: len(stream) // length * length].reshape(-1, length).tolist()
        return {"input_ids": blocks, "labels": blocks}

    def build_collator(self) -> Any:
        return default_data_collator


TRAININGS: dict[str, type[TextTraining]] = {
    "SEQ_CLS": TextTraining,
    "TOKEN_CLS": TokenTraining,
    "CAUSAL_LM": LanguageTraining,
}


class TextFit:
    """`fit(d, seed, learning_rate)` for `measure_intrinsic_dimension`.

    The first trial loads data and base model, once per process. A trial attaches an adapter and detaches it again. Full
    fine-tuning, and LoRA with a trained head, train a copy, with the same weights and the same new head. `d=0` trains
    nothing.

    Args:
        options: Model, task, method, training.
        task: The task of the options if it is loaded.
        folder: Folder for tokenized data, and for a log of each trial; None stores neither.

    Example:
        ```python
        fit = TextFit(TextOptions("sentence-transformers/all-MiniLM-L6-v2", train="train.csv", eval="dev.csv"))
        measure_intrinsic_dimension(fit, learning_rates="auto", majority=fit.task.score_majority())
        ```
    """

    def __init__(self, options: TextOptions, task: Task | None = None, folder: str | os.PathLike | None = None) -> None:
        self.options, self.folder = options, None if folder is None else Path(folder).resolve()
        if task is not None:
            self.task = task

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "folder": self.folder}  # another process loads its own

    @cached_property
    def task(self) -> Task:
        """The task of the options."""
        return load_task(self.options)

    @cached_property
    def training(self) -> TextTraining:
        """Tokenized data, and Trainers."""
        tokens = None
        if self.folder:
            for name in ("tokens", "logs"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            tokens = str(self.folder / "tokens" / self.options.tokens_name)
        return TRAININGS[self.task.task_type](self.options, self.task, tokens)

    @cached_property
    def base(self) -> Any:
        """The base model, with a new head as adapters initialize it."""
        return self.training.initialize_head(self.training.load_base())

    def __call__(self, d: int | None, seed: int, learning_rate: float | None = None) -> dict[str, Any]:
        """Train once. Returns `score`, `correct` where known, and `train_score` on request."""
        model = self.base
        if d is None:
            model = copy.deepcopy(model).requires_grad_(True)  # detaching an adapter leaves the base frozen
        elif d:
            set_seed(seed)  # some methods initialize from the global generator
            if self.options.method == "lora-rank":
                model = copy.deepcopy(model)  # PEFT's unload leaves the trained head in the base
            model = get_peft_model(model, build_config(self.options.method, d, seed, model, self.task.task_type))
        name = f"d={'full' if d is None else d} seed={seed} lr={learning_rate}"
        try:
            return self._run(model, name, {"seed": seed, "learning_rate": learning_rate} if d != 0 else {})
        finally:
            if d:
                model.unload()

    def _run(self, model: Any, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Train if there are arguments for it, and score."""
        training = self.training
        training.correct = None
        with tempfile.TemporaryDirectory() as folder:
            trainer = training.build_trainer(model, folder, {**arguments, "run_name": name})
            if arguments:
                trainer.train()
            result: dict[str, Any] = {"score": training.evaluate(trainer, "eval")}
            result |= {} if training.correct is None else {"correct": training.correct.tolist()}
            if self.options.train_score:
                result["train_score"] = training.evaluate(trainer, "train")
            if self.folder and trainer.is_world_process_zero():
                lines = [json.dumps(entry) + "\n" for entry in trainer.state.log_history]
                write_whole(self.folder / "logs" / f"{name}.jsonl".replace(" ", ","), "".join(lines))
        return result


def load_with_head(loader: Any, model: str, labels: int | None, option: str = "--model", **more: Any) -> Any:
    """Load a base model whose head has so many labels, if known; `option` names it in the error.

    Raises:
        ValueError: The checkpoint has a head with another number of labels.
    """
    try:
        return loader.from_pretrained(model, **more)
    except RuntimeError as error:
        found = AutoConfig.from_pretrained(model, local_files_only=True).num_labels
        if labels in (None, found) or "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{option} {model}: its head has {found} labels, the data or the adapter {labels}. Pass a base model with "
            f"{labels} labels or without a head."
        ) from error


def load_without_weights(model: str, task_type: str, **head: Any) -> Any:
    """Load a model on the meta device. `head` are options of its configuration, see `Task.head_options`."""
    with torch.device("meta"):
        return TRAININGS[task_type].loader.from_config(AutoConfig.from_pretrained(model, **head))


def select_dims(options: TextOptions, dims: Sequence[int]) -> tuple[int, ...]:
    """Select the d of a grid that a method supports for a model. Needs no weights, and so little time.

    LoRA and TinyLoRA have multiples of a smallest d: the multiple below each d of the grid, so that one grid serves
    several methods.

    Raises:
        ValueError: The greatest d exceeds the number of weights, the method supports fewer than two d or not this
            model, the inputs are longer than the model's positions, or a `TrainingArguments` is invalid.
    """
    training = TRAININGS[options.task_type]
    check_arguments(complete_arguments(options.arguments, training.best_metric if options.patience else None))
    base = load_without_weights(options.model, options.task_type)
    check_positions(options, base)
    if dims[-1] > base.num_parameters():
        raise ValueError(f"dims (--dims): {options.model} has {base.num_parameters()} weights, fewer than {dims[-1]}.")
    if options.method not in METHODS:
        raise ValueError(f"method={options.method!r} (--method) is unknown. Known are {', '.join(METHODS)}.")
    try:
        step = get_step(options.method, base)
        supported = tuple(sorted({d // step * step for d in dims if d >= step}))
        if len(supported) < 2:
            raise ValueError(f"d must be a multiple of {step}, and the grid must hold two or more")
        get_peft_model(base, build_config(options.method, supported[0], 0, base, options.task_type))
    except ValueError as error:
        raise ValueError(
            f"dims (--dims) of method={options.method!r} (--method) for {options.model} ({base.config.model_type}): "
            f"{str(error).rstrip('.')}."
        ) from None
    return supported


def check_positions(options: TextOptions, base: Any) -> None:
    """Check whether a model, which may be on the meta device, has a position for each token of an input.

    Raises:
        ValueError: It has fewer.
    """
    positions = count_positions(base)
    if positions is not None and options.max_length > positions:
        raise ValueError(
            f"max_length (--max-length) = {options.max_length}: {options.model} has {positions} positions. Use fewer."
        )


def count_positions(base: Any) -> int | None:
    """Count the positions for tokens. Those of RoBERTa and its descendants begin after the padding's."""
    count = getattr(base.config, "max_position_embeddings", None)
    for name, module in base.named_modules():
        padding = getattr(module, "padding_idx", None) if name.endswith("position_embeddings") else None
        if count is not None and padding is not None:
            return count - padding - 1
    return count
