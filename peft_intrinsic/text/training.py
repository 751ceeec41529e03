"""Trials on text, trained with transformers' Trainer."""

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
from .arguments import check_arguments, checked
from .methods import METHODS, adapter, step
from .options import TextOptions, tokens_name
from .tasks import IGNORED, Task, load_task


class TextFit:
    """`fit(d, seed, learning_rate)` for `measure_intrinsic_dimension`: classes of, or a number for, one or two texts.

    The data are tokenised once, and the base model is loaded once: a trial attaches an adapter and takes it off again.
    Full fine-tuning starts from the same weights and the same fresh head, on a copy. `d=0` trains nothing.

    Args:
        model: name or folder of a pretrained encoder or decoder.
        task: what to learn.
        method: what is trained, a key of `METHODS`.
        max_length: tokens of an input.
        patience: evaluations without a better score after which a trial stops; None trains to the end.
        arguments: of `TrainingArguments`, for every trial.
        train_score: score the training data too.
        tokens: file name, without ending, for the tokenised data; None keeps them in memory.
        logs: folder for what each trial logs, a file of JSON lines; None keeps nothing.
    """

    loader: ClassVar[Any] = AutoModelForSequenceClassification
    best: ClassVar[str] = "score"
    tokenizer_options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        model: str,
        task: Task,
        method: str = "did",
        max_length: int = 128,
        patience: int | None = None,
        arguments: Mapping[str, Any] | None = None,
        train_score: bool = False,
        tokens: str | None = None,
        logs: str | None = None,
    ) -> None:
        self.task, self.method, self.patience, self.max_length, self.logs = task, method, patience, max_length, logs
        self.right: np.ndarray | None = None  # held-out examples of the last evaluation
        self.arguments = checked(arguments or {}, self.best if patience else None)
        self.train_score = train_score
        self.tokenizer = AutoTokenizer.from_pretrained(model, **self.tokenizer_options)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.index = {label: i for i, label in enumerate(task.classes)}
        self.data: DatasetDict = task.data.map(
            self.tokenise,
            batched=True,
            remove_columns=task.data["train"].column_names,
            cache_file_names=tokens and {split: f"{tokens}-{split}.arrow" for split in task.data},
            keep_in_memory=tokens is None,
        )
        self.base = self.settled(self.loaded(model))

    def loaded(self, model: str, labels: int | None = None) -> Any:
        """The base model, as its checkpoint is, with a head of so many labels, or those of the task."""
        base = self.loader.from_pretrained(model, dtype="float32", **self.task.head(labels))
        base.config.pad_token_id = self.tokenizer.pad_token_id
        return base

    def settled(self, base: Any) -> Any:
        """With its fresh head drawn as adapters draw it (θ is zero): full training starts there too."""
        return get_peft_model(base, adapter("did", 1000, 0, base, self.task.task_type, "subspace")).merge_and_unload()

    def tokenise(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Rows of text as rows of numbers."""
        labels = [float(v) if self.task.regression else self.index[v] for v in rows[str(self.task.label)]]
        texts = [rows[column] for column in self.task.columns]
        return {**self.tokenizer(*texts, truncation=True, max_length=self.max_length), "labels": labels}

    def collator(self) -> Any:
        """Makes batches."""
        return DataCollatorWithPadding(self.tokenizer)

    def scored(self, prediction: Any) -> dict[str, float]:
        """The metric, from the Trainer's predictions; NaN where they are not finite."""
        self.right = None
        found = prediction.predictions
        found = found[0] if isinstance(found, tuple) else found  # encoder-decoders return states too
        if not np.isfinite(found).all():
            return {"score": math.nan}
        answers = found.squeeze(-1) if self.task.regression else found.argmax(-1)
        labels = prediction.label_ids[0] if isinstance(prediction.label_ids, tuple) else prediction.label_ids
        if self.task.metric == "accuracy" and labels.ndim == 1:
            self.right = labels == answers
        return {"score": self.task.score(labels, answers)}

    def __call__(self, d: int | None, seed: int, learning_rate: float | None = None) -> dict[str, Any]:
        model: Any = self.base
        if d is None:
            model = copy.deepcopy(self.base).requires_grad_(True)  # detaching an adapter leaves the base frozen
        elif d:
            set_seed(seed)  # some methods draw their start from the global stream
            model = get_peft_model(self.base, adapter(self.method, d, seed, self.base, self.task.task_type))
        name = f"d={'full' if d is None else d} seed={seed} lr={learning_rate}"
        try:
            return self.run(model, name, {"seed": seed, "learning_rate": learning_rate} if d != 0 else None)
        finally:
            if d:
                model.unload()

    def trainer(self, model: Any, folder: str, trained: Mapping[str, Any], name: str = "") -> Trainer:
        """A Trainer for the task."""
        chosen = TrainingArguments(**{"output_dir": folder, "run_name": name, **self.arguments, **trained})
        chosen._n_gpu = min(chosen.n_gpu, 1)  # no DataParallel, which multiplies the batch: --launch is for several
        trainer = Trainer(
            model=model,
            args=chosen,
            train_dataset=self.data["train"],
            eval_dataset=self.data["eval"],
            data_collator=self.collator(),
            compute_metrics=self.scored if self.best == "score" else None,
            callbacks=[EarlyStoppingCallback(self.patience)] if self.patience else [],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def run(self, model: Any, name: str, trained: dict[str, Any] | None) -> dict[str, Any]:
        """Train, unless told no rate, and score; for its row, the score and which examples are right."""
        self.right = None
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(model, folder, trained or {}, name)
            if trained:
                trainer.train()
            found: dict[str, Any] = {"score": self.score(trainer.evaluate(self.data["eval"]))}
            found |= {} if self.right is None else {"correct": self.right.tolist()}
            if self.train_score:
                found["train_score"] = self.score(trainer.evaluate(self.data["train"]))
            if self.logs and trainer.is_world_process_zero():
                lines = [json.dumps(entry) + "\n" for entry in trainer.state.log_history]
                write_whole(Path(self.logs, f"{name}.jsonl".replace(" ", ",")), "".join(lines))
        return found

    def score(self, found: Mapping[str, float]) -> float:
        """The score, higher is better, from the Trainer's evaluation."""
        return found["eval_score"] if self.best == "score" else -found["eval_loss"]


class TokenFit(TextFit):
    """Classes of words: the label of a word is asked of its first token."""

    loader = AutoModelForTokenClassification
    tokenizer_options: ClassVar[dict[str, Any]] = {"add_prefix_space": True}  # byte-level: a word begins with a space

    def tokenise(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        words, labels = rows[self.task.columns[0]], rows[str(self.task.label)]
        found = self.tokenizer(words, truncation=True, max_length=self.max_length, is_split_into_words=True)
        placed = []
        for i, row in enumerate(labels):
            places = [None, *found.word_ids(i)]
            placed.append(
                [
                    IGNORED if place is None or place == before else self.index[row[place]]
                    for before, place in pairwise(places)
                ]
            )
        return {**found, "labels": placed}

    def collator(self) -> Any:
        return DataCollatorForTokenClassification(self.tokenizer)


class LanguageFit(TextFit):
    """The next token: texts are strung together and cut to equal length; the score is the negative loss, in nats."""

    loader = AutoModelForCausalLM
    best = "loss"

    def tokenise(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        texts = self.tokenizer(rows[self.task.columns[0]], add_special_tokens=False)["input_ids"]
        stream = np.concatenate([np.array(ids + end, dtype=np.int64) for ids in texts])
        blocks = stream[: len(stream) // self.max_length * self.max_length].reshape(-1, self.max_length).tolist()
        return {"input_ids": blocks, "labels": blocks}

    def collator(self) -> Any:
        return default_data_collator


FITS: dict[str, type[TextFit]] = {"SEQ_CLS": TextFit, "TOKEN_CLS": TokenFit, "CAUSAL_LM": LanguageFit}


def bare(model: str, task_type: str) -> Any:
    """The model without its weights."""
    with torch.device("meta"):
        return FITS[task_type].loader.from_config(AutoConfig.from_pretrained(model))


def check(options: TextOptions, dims: Sequence[int]) -> tuple[int, ...]:
    """Which of these d the model, loaded without its weights, can have: asked before hours are spent.

    LoRA and TinyLoRA come in steps: of a grid they have those below each d, so that one grid does for several methods.

    Raises:
        ValueError: the largest d exceeds the number of weights, the method can have fewer than two or does not know the
            model, the inputs are longer than the model's positions, or the arguments are not the Trainer's.
    """
    fit = FITS[options.task_type]
    check_arguments(checked(options.arguments, fit.best if options.patience else None))
    base = bare(options.model, options.task_type)
    places = _positions(base)
    if places is not None and options.max_length > places:
        raise ValueError(
            f"max_length (--max-length) = {options.max_length}: {options.model} has {places} positions. Take fewer."
        )
    if dims[-1] > base.num_parameters():
        raise ValueError(f"dims (--dims): {options.model} has {base.num_parameters()} weights, fewer than {dims[-1]}.")
    if options.method not in METHODS:
        raise ValueError(f"method={options.method!r} (--method) is unknown. Known are {', '.join(METHODS)}.")
    try:
        least = step(options.method, base)
        kept = tuple(sorted({d // least * least for d in dims if d >= least}))
        if len(kept) < 2:
            raise ValueError(f"it has multiples of {least} numbers, of which the grid must hold two or more")
        get_peft_model(base, adapter(options.method, kept[0], 0, base, options.task_type))
    except ValueError as error:
        raise ValueError(
            f"dims (--dims) of method={options.method!r} (--method) for {options.model} ({base.config.model_type}): "
            f"{str(error).rstrip('.')}."
        ) from None
    return kept


def _positions(base: Any) -> int | None:
    """How many tokens the model has positions for: RoBERTa's and its heirs begin after the padding's."""
    known = getattr(base.config, "max_position_embeddings", None)
    for name, module in base.named_modules():
        if (
            known is not None
            and name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return known - module.padding_idx - 1
    return known


def text_fit(options: TextOptions, task: Task | None = None, folder: str | os.PathLike | None = None) -> TextFit:
    """The fit that the options describe, of a task that is loaded; tokenised data and logs are kept in the folder."""
    task = task or load_task(options)
    kept: dict[str, str] = {}
    if folder is not None:
        for name in ("tokens", "logs"):
            Path(folder, name).mkdir(parents=True, exist_ok=True)
        kept = {"tokens": str(Path(folder, "tokens", tokens_name(options))), "logs": str(Path(folder, "logs"))}
    names = ("method", "max_length", "patience", "arguments", "train_score")
    shared: dict[str, Any] = {**kept, **{name: getattr(options, name) for name in names}}
    fit = FITS[task.task_type](options.model, task, **shared)
    if not all(map(len, fit.data.values())):
        raise ValueError(
            f"max_length (--max-length) = {options.max_length} leaves a split without a single whole block of text."
        )
    return fit
