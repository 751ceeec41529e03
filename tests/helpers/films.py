"""A small task, a tiny model for it, and an adapter to certify."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from helpers.texts import write
from peft import get_peft_model
from test_documents import tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.codec import load_packed
from peft_intrinsic_cli import main

D = 30


def rows(count: int, shift: int = 0) -> list[dict]:
    """Reviews of films, a third of them bad, with a few wrong labels."""
    words = [("good", "bad", "good")[i % 3] for i in range(count)]
    return [
        {"text": f"a {'very ' * (i % 4)}{word} film", "label": int((word == "good") != (i % 11 == shift))}
        for i, word in enumerate(words)
    ]


def films(folder: Path) -> Path:
    """Write a base model, an adapter and labeled texts into a folder, which is the current directory."""
    base = tiny("bert", folder / "base")
    write(folder, "train.jsonl", rows(120))
    write(folder, "test.jsonl", rows(40, 3))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = get_peft_model(model, IntrinsicConfig(d=D, task_type="SEQ_CLS", init_weights=False))
    model.save_pretrained("adapter")
    return folder


def certify(*more: str) -> None:
    main(["certify", "--train", "train.jsonl", *more])


def read_json(name: str = "adapter/adapter.certificate.json") -> dict:
    return json.loads(Path(name).read_text())


def count_errors(path: str, name: str, labels: int = 2) -> int:
    """Count the wrong predictions of a packed adapter, one example at a time."""
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=labels)
    model, tokenizer = load_packed(base, path), AutoTokenizer.from_pretrained("base")
    with torch.no_grad():
        return sum(
            int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax() != row["label"])
            for row in map(json.loads, Path(name).read_text().splitlines())
        )
