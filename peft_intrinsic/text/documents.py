"""Documents for adapters of language models, and the bits per token of a model in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .checks import SHOWN
from .labeled import AdapterTexts
from .options import TextOptions
from .tasks import IGNORED, load_task
from .training import LanguageTraining, check_positions

SAMPLE = 10_000
"""Documents to measure a model on, where there are more: as many as Lotfi et al. (2023) sample."""


class DocumentTraining(LanguageTraining):
    """Language modeling of documents one by one, each from its first token to `max_length`.

    The tokenizer's token for the beginning of a text, or else for its end, comes first. Where it has neither, the first
    token of the text is never predicted.
    """

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """Tokens before and after every text."""
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        end = [] if last is None else [last]
        return end if first is None else [first], end

    def tokenize(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        before, after = self.frame
        texts = self.tokenizer(rows[self.task.columns[0]], add_special_tokens=False)["input_ids"]
        return {"input_ids": [(before + ids + after)[: self.options.max_length] for ids in texts]}

    def build_collator(self) -> Any:
        return collate


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad documents at the right, where a causal model does not see the padding. It is masked, and not predicted."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    pad = partial(pad_sequence, batch_first=True)
    return {
        "input_ids": pad(ids),
        "attention_mask": pad([torch.ones_like(document) for document in ids]),
        "labels": pad(ids, padding_value=IGNORED),
    }


class Documents(AdapterTexts):
    """Documents, and the base model of a language model of them.

    Args:
        model: Name or folder of the base model.
        train, eval: CSV, TSV, JSON lines or Parquet files; without `eval` the training data are used.
        column: Column of the text.
        alphas: Weights of the uniform distribution that is mixed with the model's.
        batch: Documents in a batch.
        max_length: Tokens of a document that are read. The others are cut off.
        sample: Number of training documents to measure a model on. None is all of them, or `SAMPLE` if there are more.

    Raises:
        ValueError: The files do not hold such data, a document has no token to predict, the sample is larger than the
            training data, or the model has too few positions or tokens.
    """

    training: DocumentTraining

    def __init__(
        self,
        model: str,
        train: str,
        eval: str | None,
        column: str,
        alphas: Sequence[float],
        batch: int = 32,
        max_length: int = 128,
        sample: int | None = None,
    ) -> None:
        sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
        arguments = {**sizes, "train_sampling_strategy": "group_by_length"}
        files: Any = {"train": train, "eval": eval or train, "columns": (column,), "label": None}
        options = TextOptions(model, **files, task_type="CAUSAL_LM", max_length=max_length, arguments=arguments)
        self.task = load_task(options)
        self.training = DocumentTraining(options, self.task)
        self.data, self.base = self.training.data, self.training.load_base()
        check_positions(options, self.base)
        self.alphas, self.batch = tuple(alphas), batch
        self.vocabulary: int = self.base.get_output_embeddings().weight.shape[0]
        self._check_tokens({"train": train, "eval": eval or train})
        count = len(self.data["train"])
        self.sample = min(SAMPLE, count) if sample is None else sample
        if not 1 <= self.sample <= count:
            raise ValueError(f"sample (--sample) = {sample}: {train} has {count} documents. Use 1 to {count}.")

    def _check_tokens(self, paths: Mapping[str, str]) -> None:
        before, after = self.training.frame
        for split, path in paths.items():
            documents = self.data[split]["input_ids"]
            empty = [i for i, ids in enumerate(documents, 1) if len(ids) < 2 or ids == before + after]
            if empty:
                more = f" and {len(empty) - SHOWN} more" if len(empty) > SHOWN else ""
                raise ValueError(
                    f"{path}, row{'s' * (len(empty) > 1)} {', '.join(map(str, empty[:SHOWN]))}{more}: no token of the "
                    f"document can be predicted, in max_length (--max-length) = {self.training.options.max_length} "
                    "tokens. Leave empty documents out."
                )
            if (greatest := max(map(max, documents))) >= self.vocabulary:
                raise ValueError(
                    f"{path}: the tokenizer has a token {greatest}, and the vocabulary of the model {self.vocabulary} "
                    "tokens. Use the model with its own tokenizer."
                )

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "task_type": "CAUSAL_LM", "sample": self.sample, "alphas": list(self.alphas)}

    @cached_property
    def untrained(self) -> list[float]:
        """Mean loss of the base model on the sampled documents, for each of `alphas`."""
        return self.measure(self.base, ["train"])["risks"]

    def choose_sample(self) -> np.ndarray:
        """Choose training documents uniformly, without replacement. They are the same for every adapter and machine.

        Returns:
            `int[sample]`, ascending.
        """
        keys = np.random.Philox(key=0).random_raw(len(self.data["train"]))
        return np.sort(np.argsort(keys, kind="stable")[: self.sample])

    def measure(self, model: Any, splits: Sequence[str]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if "train" in splits:
            result["risks"] = self.compute_bits(model, "train", self.choose_sample()).mean(0).tolist()
        if "eval" in splits:
            bits = self.compute_bits(model, "eval")
            result |= {"test_risks": bits.mean(0).tolist(), "test_n": len(bits)}
        return result

    @torch.no_grad()
    def compute_bits(self, model: Any, split: str, indexes: np.ndarray | None = None) -> np.ndarray:
        """Compute the bits per token of documents of a split, by default all: mean of −log2((1 − alpha)·p + alpha/V).

        Returns:
            `float64[documents, alphas]`.
        """
        data = self.data[split]
        indexes = np.arange(len(data)) if indexes is None else indexes
        order = np.argsort([len(ids) for ids in data[indexes]["input_ids"]], kind="stable")  # to pad less
        home = next(model.parameters()).device
        device = torch.accelerator.current_accelerator(check_available=True) or home
        model.eval().to(device)
        bits = np.empty((len(indexes), len(self.alphas)))
        for at in np.array_split(order, -(-len(order) // self.batch)):
            batch = {name: value.to(device) for name, value in collate([data[int(i)] for i in indexes[at]]).items()}
            labels, scored = batch.pop("labels")[:, 1:], batch["attention_mask"][:, 1:].bool()
            logits = model(**batch).logits[:, :-1].float()
            targets = labels.clamp_min(0)[..., None]
            p = (logits.gather(-1, targets)[..., 0] - logits.logsumexp(-1)).double().exp()
            for column, alpha in enumerate(self.alphas):
                losses = -torch.log2((1 - alpha) * p + alpha / self.vocabulary)
                bits[at, column] = ((losses * scored).sum(1) / scored.sum(1)).cpu()
        model.to(home)
        return bits
