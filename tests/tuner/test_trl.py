"""TRL's trainers take the default configuration as it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import build
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from peft_intrinsic import IntrinsicConfig, SupermaskConfig
from peft_intrinsic.card import HEADING

trl = pytest.importorskip("trl", reason="trl is not installed")

ROWS: dict[str, dict[str, list[str]]] = {
    "SFT": {"text": ["w1 w2 w3 w4"] * 8},
    "DPO": {"prompt": ["w1 w2"] * 8, "chosen": ["w3 w4"] * 8, "rejected": ["w5"] * 8},
    "GRPO": {"prompt": ["w1 w2", "w3"] * 4},
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(90))]
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def words(completions: list[str], **rest: Any) -> list[float]:
    """A reward: how many different words there are."""
    return [float(len(set(text.split()))) for text in completions]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")  # TRL's own call
@pytest.mark.parametrize("kind", ROWS)
def test_the_default_configuration_trains(tmp_path, kind):
    torch.manual_seed(0)
    own: dict[str, Any] = {"GRPO": {"num_generations": 2, "max_completion_length": 6}}.get(kind, {})
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=2e-4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        **own,
    )
    base = build("llama")
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=base,
        args=arguments,
        train_dataset=Dataset.from_dict(ROWS[kind]),
        processing_class=tokenizer(),
        peft_config=IntrinsicConfig(d=20, task_type="CAUSAL_LM"),
        **({"reward_funcs": words} if kind == "GRPO" else {}),
    )
    trainer.train()
    model = trainer.model
    assert model.get_nb_trainable_parameters()[0] == 20
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    assert theta.count_nonzero() == 20
    assert all(torch.equal(p.cpu(), before[name]) for name, p in model.unload().named_parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")  # TRL's own call
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        IntrinsicConfig(d=64, init_weights=False),
        SupermaskConfig(initial_sparsity=0.2),
    ],
    ids=["lora", "intrinsic", "supermask"],
)
def test_preference_training_of_a_trained_adapter_starts_at_the_loss_log_2(tmp_path, config):
    """The reference model is a copy of the adapter, so that their first difference is zero."""
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), config)
    with torch.no_grad():  # in place of a first training
        for name, parameter in model.named_parameters():
            if "supermask_scores" in name:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=1, logging_steps=1, use_cpu=True, report_to="none", save_strategy="no"
    )
    rows = Dataset.from_dict(ROWS["DPO"])
    trainer = trl.DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")  # TRL's own call
def test_cards_that_trl_writes_have_the_section_on_loading(tmp_path):
    arguments = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False)
    trainer = trl.SFTTrainer(
        model=build("llama"),
        args=arguments,
        train_dataset=Dataset.from_dict(ROWS["SFT"]),
        processing_class=tokenizer(),
        peft_config=IntrinsicConfig(d=20, task_type="CAUSAL_LM"),
    )
    trainer.save_model()
    trainer.create_model_card(model_name="model")  # as before each push
    lines = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("## ")][:2] == [HEADING, "## Quick start"]
