"""Adapters on real pretrained models train, are small, and give the same output after loading."""

from __future__ import annotations

import copy

import pytest
import torch
from carriers import minilm, rotten_tomatoes, smollm2
from conftest import train
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_intrinsic import IntrinsicConfig


@pytest.fixture(scope="module")
def path() -> str:
    try:
        return minilm()
    except SystemExit as absent:
        pytest.skip(str(absent))


@pytest.mark.slow
def test_a_classifier_learns_and_is_restored_from_two_kilobytes(path, tmp_path):
    data = rotten_tomatoes(train=32, eval=8)
    batch = AutoTokenizer.from_pretrained(path)(
        data["train"]["text"][:], truncation=True, max_length=24, padding=True, return_tensors="pt"
    )
    labels = torch.tensor(data["train"]["label"][:])

    def base(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).eval()

    model = get_peft_model(base(1), IntrinsicConfig(d=200, said=True, task_type="SEQ_CLS", target_modules="all")).eval()
    assert model.get_nb_trainable_parameters()[0] == 200
    losses = train(model, {**batch, "labels": labels}, 8, 2e-4)
    assert losses[-1] < losses[0] - 0.01

    model.save_pretrained(tmp_path)
    assert sum(p.stat().st_size for p in tmp_path.iterdir() if p.name != "README.md") < 5000
    with torch.no_grad():
        expected = model(**batch).logits
        again = PeftModel.from_pretrained(base(2), tmp_path).eval()(**batch).logits
        half = PeftModel.from_pretrained(base(3).bfloat16(), tmp_path).eval()(**batch).logits
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)
    assert (half - expected).norm() < 0.05 * expected.norm()


@pytest.fixture(scope="module")
def decoder() -> dict[str, str]:
    pytest.importorskip("gguf", reason="reading the decoder's file needs gguf")
    try:
        return smollm2()
    except SystemExit as absent:
        pytest.skip(str(absent))


CLOSE = {"rtol": 1e-3, "atol": 1e-3}
"""Tolerance of float32 logits of about 10, computed in two ways through 30 layers."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_decoder_in_bfloat16_trains_reloads_generates_and_mixes_adapters(decoder, tmp_path):
    """Training and loading use bfloat16. Mixed batches are compared in float32, because their kernels differ."""
    base = AutoModelForCausalLM.from_pretrained(**decoder, dtype=torch.bfloat16).eval()
    plain_base = copy.deepcopy(base)
    tokenizer = AutoTokenizer.from_pretrained(**decoder)
    batch = tokenizer(["The capital of France is", "Water boils at a high"], return_tensors="pt")
    model = get_peft_model(base, IntrinsicConfig(d=200, task_type="CAUSAL_LM", target_modules="all"))
    losses = train(model, {**batch, "labels": batch["input_ids"]}, 6, 2e-4)
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path)

    def logits(model: torch.nn.Module, **options) -> torch.Tensor:
        with torch.no_grad():
            return model(**batch, **options).logits

    again = PeftModel.from_pretrained(plain_base, tmp_path)
    assert torch.equal(logits(again.eval()), logits(model))
    users = {"adapter_names": ["default", "__base__"]}
    fixed = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    assert model.generate(**batch, **users, **fixed).shape == (2, batch["input_ids"].shape[1] + 8)

    whole = again.float()
    adapted = logits(whole)
    with whole.disable_adapter():
        plain = logits(whole)
    torch.testing.assert_close(logits(whole, **users), torch.stack([adapted[0], plain[1]]), **CLOSE)
    assert (adapted - plain).abs().amax(dim=(1, 2)).min() > 100 * CLOSE["atol"]
