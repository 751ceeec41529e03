"""How many labels the base model's head has: stored with an adapter, and compared when it is loaded."""

from __future__ import annotations

from peft.utils import TaskType
from torch import nn

from peft_intrinsic_autoload.labels import LABELS


def number_of_labels(model: nn.Module, task: str | None) -> int | None:
    """The labels of a model with a head for classes; None for other models, and where there are more than `LABELS`."""
    classifies = task in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) or "Classification" in type(model).__name__
    labels = getattr(getattr(model, "config", None), "num_labels", None) if classifies else None
    return labels if labels is not None and 0 < labels <= LABELS else None


def other_labels(stored: int | None, model: nn.Module, task: str | None) -> str | None:
    """What to say where the head has another number of labels than the adapter; None where it has not."""
    here = number_of_labels(model, task)
    if None in (stored, here) or stored == here:
        return None
    return f"The adapter has {stored} labels, this model {here}. Load the base model with num_labels={stored}."
