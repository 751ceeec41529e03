"""A real pretrained encoder: complete, small, and learning."""

from __future__ import annotations

import pytest
import torch
from carriers import minilm, rotten_tomatoes
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_intrinsic import IntrinsicConfig


@pytest.fixture(scope="module")
def path() -> str:
    try:
        return minilm()
    except SystemExit as absent:
        pytest.skip(str(absent))


def test_a_classifier_in_two_kilobytes(path, tmp_path):
    data = rotten_tomatoes(train=64, test=8)
    batch = AutoTokenizer.from_pretrained(path)(
        data["train"]["text"][:], truncation=True, max_length=24, padding=True, return_tensors="pt"
    )
    labels = torch.tensor(data["train"]["label"][:])

    def base(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).eval()

    model = get_peft_model(base(1), IntrinsicConfig(d=200, said=True, task_type="SEQ_CLS")).eval()
    assert model.get_nb_trainable_parameters()[0] == 200
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01

    model.save_pretrained(tmp_path)
    assert sum(p.stat().st_size for p in tmp_path.iterdir() if p.name != "README.md") < 5000
    with torch.no_grad():
        expected = model(**batch).logits
        again = PeftModel.from_pretrained(base(2), tmp_path).eval()(**batch).logits
        half = PeftModel.from_pretrained(base(3).bfloat16(), tmp_path).eval()(**batch).logits
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)
    assert (half - expected).norm() < 0.05 * expected.norm()
