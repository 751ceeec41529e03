"""diffusers' own `add_adapter`, which saves LoRA files, raises; PEFT's calls on its models work."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_intrinsic import IntrinsicConfig, SupermaskConfig

CONFIGS = [
    IntrinsicConfig(d=16, target_modules=["to_q"], init_weights=False),
    SupermaskConfig(target_modules=["to_q"], initial_sparsity=0.3),
]
WORDS = r"add_adapter\(\w+Config.*LoRA files.*Use get_peft_model\(model, config\).*PeftModel\.from_pretrained"


class Mixin(nn.Module):
    """What diffusers' models do when an adapter is added, in the order of `diffusers.loaders.PeftAdapterMixin`."""

    _hf_peft_config_loaded = False

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_q(x)

    def add_adapter(self, config) -> None:
        self._hf_peft_config_loaded = True
        inject_adapter_in_model(config, self, "default")

    def save_lora_adapter(self) -> None:
        """Writes a LoRA file."""


@pytest.mark.parametrize("config", CONFIGS, ids=["intrinsic", "supermask"])
def test_add_adapter_of_the_mixin_raises_and_get_peft_model_still_works(config):
    model = Mixin()
    for _ in range(2):
        with pytest.raises(ValueError, match=WORDS):
            model.add_adapter(copy.copy(config))
    assert type(model.to_q) is nn.Linear
    assert inject_adapter_in_model(copy.copy(config), Mixin()) is not None
    assert get_peft_model(model, copy.copy(config))(torch.ones(1, 8)).shape == (1, 8)


@pytest.mark.parametrize("config", CONFIGS, ids=["intrinsic", "supermask"])
def test_add_adapter_of_a_diffusers_model_raises(config, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

    def unet() -> nn.Module:
        torch.manual_seed(0)
        blocks = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
        down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
        width = {"cross_attention_dim": 16, "attention_head_dim": 4}
        return diffusers.UNet2DConditionModel(down_block_types=down, up_block_types=up, **blocks, **width).eval()

    inputs = torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.ones(1, 5, 16)
    model = unet()
    plain = model(*inputs).sample
    with pytest.raises(ValueError, match=WORDS):
        model.add_adapter(copy.copy(config))
    adapted = get_peft_model(model, copy.copy(config)).eval()
    wanted = adapted(*inputs).sample
    assert not torch.allclose(wanted, plain)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(unet(), tmp_path).eval()(*inputs).sample, wanted)
