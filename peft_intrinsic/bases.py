"""Base models by name and task, for the commands."""

from __future__ import annotations

from typing import Any

import transformers

CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def load_base(name: str, task: str | None, labels: int | None = None) -> Any:
    """A base model with the class for its task.

    Args:
        name: on the Hub, or folder.
        task: `TaskType` of its adapter; None is a model without a head.
        labels: of its head, where its configuration says something else.
    """
    options = {"num_labels": labels} if labels else {}
    return getattr(transformers, CLASSES.get(task or "", "AutoModel")).from_pretrained(name, **options)
