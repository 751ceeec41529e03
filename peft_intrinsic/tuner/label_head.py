"""A new task head whose weight is computed from texts that name the labels (`head="labels"`).

Each row of the head's last linear layer is the input that this layer gets for the text of one label, less the mean over
the labels. So the head separates the labels before any training. The rows follow from the base model and the texts
alone: they are computed again when an adapter is loaded, and a sketch of them shows whether they are the same.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .base_model import evaluation_mode
from .config import IntrinsicConfig
from .head import LABEL_NOTE, Reinitialization
from .loading import parameter_at
from .sketch import check_sketch, compute_sketch, difference

LOGIT_SCALE = 2.0
"""Standard deviation of the head's logits for the labels' own texts."""

LIMITS = 1e-3, 0.1
"""Relative differences of sketches above which loading warns, and above which it raises an error.

Measured on all-MiniLM-L6-v2 for four sets of texts: 0.003 in float16, 0.012 to 0.023 in bfloat16, 0.011 to 0.034 with
weights rounded to 8 bits, 0.25 to 0.67 to 4 bits; 0.21 to 0.80 for texts with an article before them.
"""


class LabelHead(Reinitialization):
    """The start values of a new head whose rows are computed from the labels' texts.

    Args:
        tokenizer: of the base model; by default the one that is saved under the model's name.

    Attributes:
        texts: one text per label.
        sketch: `compute_sketch` of the rows.
        output: name of the weight of the head's last linear layer.

    Raises:
        ValueError: as `Reinitialization`; or the model has no new classification head, the texts do not fit it, there
            is no tokenizer, or the rows are not those of a loaded adapter.
    """

    texts: list[str]
    sketch: list[float]

    def __init__(
        self,
        model: nn.Module,
        config: IntrinsicConfig,
        attached: Mapping[str, IntrinsicConfig],
        tokenizer: Any = None,
    ) -> None:
        note = model.__dict__.get(LABEL_NOTE) if tokenizer is None else None
        self._config = config
        given = config.label_texts if config.label_texts is not None or note is None else note[1]
        self.texts = _label_names(model) if given is None else list(given)
        _check_texts(model, self.texts)
        super().__init__(model, config, attached)
        if (output := self._find_output(self.names)) is None:
            whole = f" and not in modules_to_save={config.full_modules}" if config.full_modules else ""
            raise ValueError(
                f"head='labels' needs a linear head for num_labels={len(self.texts)} that is missing from the "
                f"checkpoint{whole}, and {type(model).__name__} has none. Load the model with the class for "
                "classification, or pass head='subspace' to train the head that it has."
            )
        self.output, module = output, self._places[output][0]
        others = [other for other in attached.values() if output in (other.reinitialized or ())]
        if others:
            self.sketch = others[0].label_sketch or []
        elif output not in self.pending:  # the base was saved with these rows
            self.sketch = compute_sketch(parameter_at(self._places[output]))
        elif note and note[0] == output:
            if note[1] != self.texts:
                raise ValueError(
                    f"label_texts={reprlib.repr(self.texts)} are not the texts of init_head_from_labels, which are "
                    f"{reprlib.repr(note[1])}. Pass the same, or call init_head_from_labels again."
                )
            self._rows, self.sketch = parameter_at(self._places[output]).detach().cpu().clone(), note[2]
        else:
            with self._other_values():
                self._rows = compute_rows(model, module, tokenizer or _find_tokenizer(model), self.texts)
            self.sketch = compute_sketch(self._rows)
        check_sketch(config, "label_sketch", self.sketch, LIMITS, "The rows of the head from the labels' texts")

    def _find_output(self, names: Sequence[str]) -> str | None:
        """Name of the weight of the last linear layer with an output per label, among newly initialized parameters."""
        found = [
            name
            for name in self._places
            if name in names and isinstance(module := self._places[name][0], nn.Linear)
            if name.endswith("weight") and module.out_features == len(self.texts)
        ]
        return found[-1] if found else None

    @contextmanager
    def _other_values(self) -> Iterator[None]:
        """Within this context, the other newly initialized parameters have their start values."""
        names = [name for name in self.pending if name != self.output]
        before = {name: parameter_at(self._places[name]).detach().clone() for name in names}
        try:
            for name in names:
                parameter_at(self._places[name]).data.copy_(self._start(name))
            yield
        finally:
            for name, values in before.items():
                parameter_at(self._places[name]).data.copy_(values)

    def _start(self, name: str) -> torch.Tensor:
        parameter = parameter_at(self._places[name])
        if name == self.output:
            return self._rows.to(parameter.dtype)
        if name == self.output.removesuffix("weight") + "bias":
            return torch.zeros_like(parameter, device="cpu")
        return super()._start(name)

    def _has_start(self, name: str) -> bool:
        if name != self._find_output(self._config.reinitialized or ()):
            return super()._has_start(name)
        parameter = parameter_at(self._places[name])
        if parameter.is_meta or not (stored := self._config.label_sketch):
            return False
        return difference(stored, compute_sketch(parameter)) <= LIMITS[1]


def _label_names(model: Any) -> list[str]:
    """The labels' names in the model's configuration.

    Raises:
        ValueError: the labels have no names.
    """
    names = [str(name) for _, name in sorted((getattr(getattr(model, "config", None), "id2label", None) or {}).items())]
    if any(re.fullmatch(r"LABEL_\d+", name) for name in names) or not names:
        raise ValueError(
            f"label_texts=None, and the model's id2label={reprlib.repr(names)} has no names. Pass label_texts=[a text "
            "for each label], or load the base model with id2label={0: 'name', …}."
        )
    return [name.replace("_", " ") for name in names]


def _check_texts(model: Any, texts: Sequence[str]) -> None:
    """Raise ValueError if there is not one text for each of several labels."""
    labels = getattr(getattr(model, "config", None), "num_labels", 0)
    if labels != len(texts):
        raise ValueError(f"label_texts has {len(texts)} texts, and the model num_labels={labels}. Pass one per label.")
    if labels < 2:
        raise ValueError(f"head='labels' needs at least two labels, and the model has num_labels={labels}.")


def load_tokenizer(name: str, **options: Any) -> Any:
    """Load the tokenizer of a model.

    Raises:
        ValueError: there is none. transformers makes one without words for some models.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} has no tokenizer that can be loaded: {' '.join(str(error).split())}") from error
    if len(tokenizer) == len(tokenizer.all_special_ids):
        raise ValueError(f"{name} has no tokenizer. Save it there: AutoTokenizer.from_pretrained(…).save_pretrained().")
    return tokenizer


def _find_tokenizer(model: Any) -> Any:
    name = getattr(model, "name_or_path", "")
    try:
        return load_tokenizer(name)
    except Exception as error:
        raise ValueError(
            f"head='labels' needs the model's tokenizer, and there is none under its name {name!r}. Call "
            "peft_intrinsic.init_head_from_labels(model, tokenizer, label_texts) before the adapter is attached or "
            "loaded."
        ) from error


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Within this context, the model is in evaluation mode and without adapters. RNG states do not change."""
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if any(getattr(module, "merged", False) for module in adapted):
        raise ValueError("head='labels' needs the base model's weights. Call unmerge_adapter() first.")
    disabled = [module._disable_adapters for module in adapted]
    with torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda}):
        try:
            for layer in adapted:
                layer._disable_adapters = True
            with evaluation_mode(model):
                yield
        finally:
            for layer, value in zip(adapted, disabled, strict=True):
                layer._disable_adapters = value


@torch.no_grad()
def compute_rows(model: Any, layer: nn.Module, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Compute the rows of the head's last linear layer from the labels' texts.

    A decoder's head gets the last token of a text, a token classifier's head the mean over its tokens. Every text is
    run alone, so that its row does not depend on the others' lengths.

    Returns:
        `float32[labels, in_features]`, less the mean over the labels, scaled to `LOGIT_SCALE`.

    Raises:
        ValueError: two texts have the same tokens, one has none or too many, the model does not classify, or it is on
            the meta device.
    """
    encoded = [tokenizer(text, return_tensors="pt", return_special_tokens_mask=True) for text in texts]
    first: dict[tuple[int, ...], str] = {}
    for text, each in zip(texts, encoded, strict=True):
        ids = tuple(each["input_ids"][0].tolist())
        if not len(ids) or each["special_tokens_mask"].all():
            raise ValueError(f"label_texts: {text!r} has no tokens. Pass a text that the tokenizer knows.")
        if len(ids) > (positions := getattr(model.config, "max_position_embeddings", None) or len(ids)):
            raise ValueError(
                f"label_texts: {text[:60]!r}… has {len(ids)} tokens, and the model {positions} positions. Shorten it."
            )
        if ids in first:
            raise ValueError(f"label_texts: {first[ids]!r} and {text!r} have the same tokens. Pass different texts.")
        first[ids] = text
    device = getattr(model, "device", torch.device("cpu"))
    if device.type == "meta" and not hasattr(model, "_hf_hook"):
        raise ValueError("head='labels' runs the base model, which is on the meta device. Load its weights first.")
    caught: list[torch.Tensor] = []
    inputs = []
    with _evaluation(model):
        handle = layer.register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0]))
        try:
            for each in encoded:
                own = ~each.pop("special_tokens_mask")[0].bool()
                ids = each["input_ids"][0]
                logits = getattr(model(**each.to("cpu" if device.type == "meta" else device)), "logits", None)
                if logits is None or len(caught) != 1:
                    raise ValueError(
                        f"head='labels' needs a model that classifies, which {type(model).__name__} is not."
                    )
                x = caught.pop()[0].double().cpu()
                if x.dim() == 2 and logits.dim() == 3:
                    x = x[own].mean(0)
                elif x.dim() == 2:  # the model takes the logits of the last token that is not padding
                    pad = getattr(model.config, "pad_token_id", None)
                    x = x[max((i for i, token in enumerate(ids.tolist()) if token != pad), default=-1)]
                inputs.append(x)
        finally:
            handle.remove()
    stacked = torch.stack(inputs)
    rows = stacked - stacked.mean(0)
    rows *= LOGIT_SCALE / (rows @ stacked.T).std(correction=0)
    if not torch.isfinite(rows).all():
        raise ValueError("label_texts: the model has the same, or infinite, features for all texts. Pass other texts.")
    return rows.float()


def init_head_from_labels(model: nn.Module, tokenizer: Any, label_texts: Sequence[str] | None = None) -> None:
    """Initialize a new classification head from texts that name the labels, so that it classifies before training.

    For LoRA, full fine-tuning, and models whose tokenizer `IntrinsicConfig(head="labels")` does not find. Call it
    before an adapter is attached or loaded.

    Args:
        model (`PreTrainedModel`): A model for classification whose head is missing from the checkpoint.
        tokenizer (`PreTrainedTokenizer`): The model's tokenizer.
        label_texts (`Optional[Sequence[str]]`): A text per label, in the order of the labels' indices. `None` takes
            the names in `model.config.id2label`.

    Raises:
        ValueError: the model has an adapter or no new classification head, or the texts do not fit it.

    Example:
        >>> init_head_from_labels(model, tokenizer, ["a terrible film", "a great film"])
        >>> model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS"))
    """
    if any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules()):
        raise ValueError("The model has an adapter. Call init_head_from_labels before attaching adapters.")
    texts = None if label_texts is None else list(label_texts)
    start = LabelHead(model, IntrinsicConfig(head="labels", label_texts=texts), {}, tokenizer)
    start.apply([])
    model.__dict__[LABEL_NOTE] = start.output, start.texts, start.sketch
