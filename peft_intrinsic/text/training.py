"""Training on text with transformers' Trainer, and trials of it."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
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
    AutoTokenizer,
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
from .methods import METHODS, build_config, get_step
from .options import TextOptions, check_arguments, complete_arguments
from .tasks import IGNORED, Task, load_task


class TextTraining:
    """The tokenized data of a task, its base model, and Trainers for both: classes of, or a number for, texts.

    Args:
        model: Name or folder of a pretrained encoder or decoder.
        task: What to learn.
        max_length: Tokens of an input.
        patience: Evaluations without a better score after which training stops; None trains to the end.
        arguments: `TrainingArguments` of every Trainer.
        tokens: File name, without suffix, for the tokenized data; None keeps them in memory.

    Raises:
        ValueError: A split is shorter than a single block of a language model.
    """

    loader: ClassVar[Any] = AutoModelForSequenceClassification
    best_metric: ClassVar[str] = "score"
    tokenizer_options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        model: str,
        task: Task,
        max_length: int = 128,
        patience: int | None = None,
        arguments: Mapping[str, Any] | None = None,
        tokens: str | None = None,
    ) -> None:
        self.model, self.task, self.max_length, self.patience = model, task, max_length, patience
        self.correct: np.ndarray | None = None  # correct predictions of the last evaluation
        self.arguments = complete_arguments(arguments or {}, self.best_metric if patience else None)
        self.tokenizer = AutoTokenizer.from_pretrained(model, **self.tokenizer_options)
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
                f"max_length (--max-length) = {max_length} leaves a split without a single whole block of text."
            )

    def load_base(self, labels: int | None = None) -> Any:
        """Load the base model as its checkpoint is, in float32.

        Args:
            labels: Number of labels of the head; None for those of the task.
        """
        base = self.loader.from_pretrained(self.model, dtype="float32", **self.task.head_options(labels))
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
        return {**self.tokenizer(*texts, truncation=True, max_length=self.max_length), "labels": labels}

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
        """Build a Trainer of the task.

        Args:
            model: The model to train or to evaluate.
            folder: Folder of checkpoints.
            arguments: Further `TrainingArguments`.
        """
        complete = TrainingArguments(**{"output_dir": folder, **self.arguments, **arguments})
        complete._n_gpu = min(complete.n_gpu, 1)  # no DataParallel, which multiplies the batch: --launch is for several
        trainer = Trainer(
            model=model,
            args=complete,
            train_dataset=self.data["train"],
            eval_dataset=self.data["eval"],
            data_collator=self.build_collator(),
            compute_metrics=self.compute_metrics if self.best_metric == "score" else None,
            callbacks=[EarlyStoppingCallback(self.patience)] if self.patience else [],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def evaluate(self, trainer: Trainer, split: str) -> float:
        """Score a split by the task's metric; higher is better."""
        scores = trainer.evaluate(self.data[split])
        return scores["eval_score"] if self.best_metric == "score" else -scores["eval_loss"]


class TokenTraining(TextTraining):
    """Classes of words. The label of a word is that of its first token."""

    loader = AutoModelForTokenClassification
    tokenizer_options: ClassVar[dict[str, Any]] = {"add_prefix_space": True}  # byte-level: a word begins with a space

    def tokenize(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        words, labels = rows[self.task.columns[0]], rows[str(self.task.label)]
        tokens = self.tokenizer(words, truncation=True, max_length=self.max_length, is_split_into_words=True)
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
        blocks = stream[: len(stream) // self.max_length * self.max_length].reshape(-1, self.max_length).tolist()
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

    Data and base model are loaded once: a trial attaches an adapter and detaches it again. Full fine-tuning trains a
    copy, with the same weights and the same new head. `d=0` trains nothing.

    Args:
        model: Name or folder of a pretrained encoder or decoder.
        task: What to learn.
        method: What is trained, a key of `METHODS`.
        train_score: Score the training data too.
        logs: Folder for the log of each trial, as JSON lines; None stores no logs.
        training: Options of `TextTraining`.

    Example:
        ```python
        task = load_files("train.csv", "dev.csv", ["text"])
        fit = TextFit("sentence-transformers/all-MiniLM-L6-v2", task, arguments={"num_train_epochs": 3})
        measure_intrinsic_dimension(fit, learning_rates="auto", majority=task.score_majority())
        ```
    """

    def __init__(
        self,
        model: str,
        task: Task,
        method: str = "did",
        train_score: bool = False,
        logs: str | None = None,
        **training: Any,
    ) -> None:
        self.training = TRAININGS[task.task_type](model, task, **training)
        self.task, self.method, self.train_score, self.logs = task, method, train_score, logs
        self.base = self.training.initialize_head(self.training.load_base())

    def __call__(self, d: int | None, seed: int, learning_rate: float | None = None) -> dict[str, Any]:
        model: Any = self.base
        if d is None:
            model = copy.deepcopy(self.base).requires_grad_(True)  # detaching an adapter leaves the base frozen
        elif d:
            set_seed(seed)  # some methods initialize from the global generator
            model = get_peft_model(self.base, build_config(self.method, d, seed, self.base, self.task.task_type))
        name = f"d={'full' if d is None else d} seed={seed} lr={learning_rate}"
        try:
            return self._run(model, name, {"seed": seed, "learning_rate": learning_rate} if d != 0 else {})
        finally:
            if d:
                model.unload()

    def _run(self, model: Any, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Train if there are arguments for it, and score: `score`, `correct` (correct predictions), `train_score`."""
        training = self.training
        training.correct = None
        with tempfile.TemporaryDirectory() as folder:
            trainer = training.build_trainer(model, folder, {**arguments, "run_name": name})
            if arguments:
                trainer.train()
            result: dict[str, Any] = {"score": training.evaluate(trainer, "eval")}
            result |= {} if training.correct is None else {"correct": training.correct.tolist()}
            if self.train_score:
                result["train_score"] = training.evaluate(trainer, "train")
            if self.logs and trainer.is_world_process_zero():
                lines = [json.dumps(entry) + "\n" for entry in trainer.state.log_history]
                write_whole(Path(self.logs, f"{name}.jsonl".replace(" ", ",")), "".join(lines))
        return result


def load_without_weights(model: str, task_type: str) -> Any:
    """Load a model on the meta device."""
    with torch.device("meta"):
        return TRAININGS[task_type].loader.from_config(AutoConfig.from_pretrained(model))


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
    positions = _count_positions(base)
    if positions is not None and options.max_length > positions:
        raise ValueError(
            f"max_length (--max-length) = {options.max_length}: {options.model} has {positions} positions. Use fewer."
        )
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


def _count_positions(base: Any) -> int | None:
    """Count the positions for tokens. Those of RoBERTa and its descendants begin after the padding's."""
    count = getattr(base.config, "max_position_embeddings", None)
    for name, module in base.named_modules():
        padding = getattr(module, "padding_idx", None) if name.endswith("position_embeddings") else None
        if count is not None and padding is not None:
            return count - padding - 1
    return count


def text_fit(options: TextOptions, task: Task | None = None, folder: str | os.PathLike | None = None) -> TextFit:
    """Build the fit of text options.

    Args:
        options: Model, task, method, training.
        task: The task of the options if it is loaded.
        folder: Folder for tokenized data and logs; None stores neither.

    Raises:
        ValueError, OSError: The options do not fit the data or the model.
    """
    task = task or load_task(options)
    files: dict[str, str] = {}
    if folder is not None:
        for name in ("tokens", "logs"):
            Path(folder, name).mkdir(parents=True, exist_ok=True)
        files = {"tokens": str(Path(folder, "tokens", options.tokens_name)), "logs": str(Path(folder, "logs"))}
    names = ("method", "max_length", "patience", "arguments", "train_score")
    return TextFit(options.model, task, **files, **{name: getattr(options, name) for name in names})  # type: ignore[arg-type]
