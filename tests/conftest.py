"""Tiny random models of every family, built from configurations: no download."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # it is read at import; each request without a network is retried for 23 s

import gc
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformers
from helpers.texts import examples
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn

from peft_intrinsic import IntrinsicConfig

transformers.utils.logging.set_verbosity_error()


def pytest_collection_finish() -> None:
    """Exempt imported modules from garbage collection, which each training run triggers."""
    gc.collect()
    gc.freeze()


SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
TWO_STACKS: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
}


class Custom(nn.Module):
    """A plain module with every kind of parameter: direct, convolution, norm, embedding, attention, tied."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.embed = nn.Embedding(50, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=2)
        self.encoder = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.out = nn.Linear(12, 50, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Sequential(nn.Linear(50, 7), nn.ReLU(), nn.Linear(7, 3))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.out(self.norm(self.encoder(x))).mean(1)) * self.scale


def build(family: str) -> nn.Module:
    """A tiny model in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    if family == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3))
    elif family == "bert_mlm":  # tied head, tied bias
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    elif family == "gpt2":  # Conv1D, tied head
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_embd=24, n_layer=2, n_head=4))
    elif family == "llama":
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
        )
    elif family == "t5":  # one embedding for encoder, decoder and head
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=97, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        )
    elif family == "vit":  # convolution, parameters on a module with sub-modules
        config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3)
        model = transformers.ViTForImageClassification(config)
        nn.init.normal_(model.vit.embeddings.cls_token, std=0.02)
    elif family == "roberta":
        model = transformers.RobertaForTokenClassification(transformers.RobertaConfig(**SIZES, num_labels=3))
    elif family == "distilbert":
        config = transformers.DistilBertConfig(vocab_size=97, dim=24, n_layers=2, n_heads=4, hidden_dim=40)
        model = transformers.DistilBertForQuestionAnswering(config)
    elif family == "electra":
        model = transformers.ElectraModel(transformers.ElectraConfig(**SIZES, embedding_size=16))
    elif family == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2))
    elif family == "gemma":  # scaled embedding, norms that add one
        config = transformers.GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=6, pad_token_id=0)
        model = transformers.GemmaForCausalLM(config)
    elif family == "bart":
        config = transformers.BartConfig(
            **TWO_STACKS,
            max_position_embeddings=40,
        )
        model = transformers.BartForConditionalGeneration(config)
    elif family == "whisper":  # reads the weights of its position embedding
        config = transformers.WhisperConfig(
            **TWO_STACKS,
            num_mel_bins=8,
            max_source_positions=10,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        )
        model = transformers.WhisperForConditionalGeneration(config)
    elif family == "mamba":  # reads the weights of its projections, direct parameters
        config = transformers.MambaConfig(vocab_size=97, hidden_size=24, state_size=4, num_hidden_layers=2)
        model = transformers.MambaForCausalLM(config)
    elif family == "moe":  # experts as parameters with three axes
        config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
        model = transformers.MixtralForCausalLM(config)
    else:
        model = Custom()
    return model.eval()


def trained(family: str, **options) -> PeftModel:
    """An adapter with a θ and λ of its own, by default on every parameter."""
    targets = {} if "target_parameters" in options else {"target_modules": "all"}
    config = IntrinsicConfig(**{"d": 200, "init_weights": False, **targets, **options})
    model = get_peft_model(build(family), config).eval()
    for vectors in (
        model.get_base_model().intrinsic.intrinsic_lambda,
        model.get_base_model().intrinsic.intrinsic_theta,
    ):
        for vector in vectors.values():
            vector.weight.data.mul_(0.7)
    return model


def batch(family: str) -> dict[str, torch.Tensor]:
    """Inputs that fit `build(family)`."""
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(4, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, 50, (4, 7), generator=generator)
    if family == "whisper":
        return {"input_features": torch.randn(4, 8, 20, generator=generator), "decoder_input_ids": ids}
    return {"input_ids": ids, "labels": ids} if family in ("t5", "bart") else {"input_ids": ids}


@torch.no_grad()
def evaluate(model: nn.Module, family: str) -> torch.Tensor:
    """Logits without gradients, with which torch may choose other kernels, for bitwise comparisons."""
    return output(model, batch(family))


def train(model: nn.Module, inputs: dict[str, torch.Tensor], steps: int, lr: float, context=nullcontext) -> list[float]:
    """Steps of AdamW on what is trainable; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        with context():
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def output(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, whatever the model returns."""
    result = model(**inputs)
    if isinstance(result, torch.Tensor):
        return result
    return result.logits if "logits" in result else result[0]


def same(a: torch.Tensor, b: torch.Tensor, family: str) -> bool:
    """Whether values are bitwise equal; for Mamba nearly, as its convolution rounds by memory alignment."""
    return torch.equal(a, b) if family != "mamba" else torch.allclose(a, b, rtol=0, atol=1e-6)


FAMILIES = ["bert", "bert_mlm", "gpt2", "llama", "t5", "vit", "custom"]
MORE = ["roberta", "distilbert", "electra", "qwen2", "gemma", "bart", "whisper", "mamba", "moe"]


@pytest.fixture(params=FAMILIES + MORE)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def data(tmp_path) -> dict[str, str]:
    """A small task on text, as files `train` and `eval`."""
    return examples(tmp_path)


WANTED = transformers.integrations.peft.MIN_PEFT_VERSION
adapter_calls = pytest.mark.skipif(
    Version(version("peft")) < Version(WANTED),
    reason=f"transformers {transformers.__version__} needs PEFT {WANTED} for its own adapter calls, for LoRA too",
)
