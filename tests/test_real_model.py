"""Real pretrained models: complete, small, and learning."""

from __future__ import annotations

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
    losses = train(model, {**batch, "labels": labels}, 12, 0.05)
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


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_decoder_in_half_precision(decoder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(**decoder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(**decoder)
    batch = tokenizer(["The capital of France is", "Water boils at a"], return_tensors="pt", padding=True)
    model = get_peft_model(base, IntrinsicConfig(d=200, task_type="CAUSAL_LM"))
    losses = train(model, {**batch, "labels": batch["input_ids"]}, 6, 0.05)
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path)
    fixed = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    expected = model.generate(**batch, **fixed)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(**decoder, dtype=torch.bfloat16), tmp_path)
    assert torch.equal(again.eval().generate(**batch, **fixed), expected)
    # Two users in one batch: the adapter, and none.
    mixed = model.generate(**batch, **fixed, adapter_names=["default", "__base__"])
    assert torch.equal(mixed[0], expected[0])
    with model.disable_adapter():
        assert torch.equal(mixed[1], model.generate(**batch, **fixed)[1])
