"""A small task, a tiny model of it, and an adapter to be certified."""

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
from peft_intrinsic_command import main

D = 30


def rows(count: int, shift: int = 0) -> list[dict]:
    """Films, every third of them bad; a few of them wrongly labelled."""
    words = ["good", "bad", "good"]
    found = [(i, words[i % 3]) for i in range(count)]
    return [
        {"text": f"a {'very ' * (i % 4)}{word} film", "label": int((word == "good") != (i % 11 == shift))}
        for i, word in found
    ]


def films(folder: Path) -> Path:
    """A base model, an adapter of it in a folder of its own, and labelled texts, in the present directory."""
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


def told(name: str = "adapter/adapter.certificate.json") -> dict:
    return json.loads(Path(name).read_text())


def errors(path: str, name: str, labels: int = 2) -> int:
    """Wrong answers of a packed adapter, one example at a time."""
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=labels)
    model, tokenizer = load_packed(base, path), AutoTokenizer.from_pretrained("base")
    with torch.no_grad():
        return sum(
            int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax() != row["label"])
            for row in map(json.loads, Path(name).read_text().splitlines())
        )
