"""Which parameter shares its λ with which, on an encoder, a decoder and both."""

from __future__ import annotations

import pytest
import torch
from conftest import build
from peft import get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.tuner.module_types import is_norm, matrix_view
from peft_intrinsic.tuner.names import is_match
from peft_intrinsic.tuner.targets import is_excluded, is_targeted


def groups(name: str, granularity: str) -> list[set[str]]:
    """The parameters of each λ, in the order of λ."""
    config = IntrinsicConfig(d=100, said=True, lambda_granularity=granularity, target_modules="all")
    model = get_peft_model(build(name), config)
    count = len(model.get_base_model().intrinsic.intrinsic_lambda["default"].weight)
    found: list[set[str]] = [set() for _ in range(count)]
    for layer in model.base_model.tuner_layers():
        for offset in layer.offsets["default"].values():
            found[offset.group].add(offset.name)
    return found


PREFIXES = {  # of the names in each group
    "bert": [
        ("bert.embeddings.",),
        ("bert.encoder.layer.0.",),
        ("bert.encoder.layer.1.",),
        ("bert.pooler.", "classifier."),
    ],
    "llama": [("model.embed_tokens.",), ("model.layers.0.",), ("model.layers.1.",), ("model.norm.",)],
    "t5": [
        ("shared.",),
        ("encoder.block.0.",),
        ("encoder.block.1.",),
        ("encoder.final_layer_norm.", "decoder.final_layer_norm."),
        ("decoder.block.0.",),
        ("decoder.block.1.",),
    ],
}


@pytest.mark.parametrize("name", PREFIXES)
def test_a_lambda_for_each_block_for_what_lies_before_and_for_what_lies_after(name):
    names = [full for full, _ in build(name).named_parameters()]
    expected = [{full for full in names if full.startswith(prefixes)} for prefixes in PREFIXES[name]]
    assert groups(name, "layer") == expected
    assert set.union(*expected) == set(names)


@pytest.mark.parametrize("name", PREFIXES)
def test_a_lambda_for_each_module_or_tensor(name):
    names = [full for full, _ in build(name).named_parameters()]
    modules = list(dict.fromkeys(full.rpartition(".")[0] for full in names))
    assert groups(name, "module") == [{n for n in names if n.rpartition(".")[0] == module} for module in modules]
    if len(names) < 100:
        assert groups(name, "tensor") == [{full} for full in names]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(4), True),
        (nn.LayerNorm((2, 4)), False),
        (LlamaRMSNorm(4), True),
        (nn.GroupNorm(2, 4), False),
        (nn.Linear(4, 4), False),
    ],
)
def test_norms_are_recognized(module, expected):
    assert is_norm(module) is expected


class Own(nn.Module):
    """Parameters of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        (nn.Linear(5, 3), "weight", (3, 5, "matrix")),
        (nn.Linear(1, 3), "weight", (3, 1, "matrix")),
        (nn.Linear(5, 3), "bias", (3, 1, "bias")),
        (Conv1D(3, 5), "weight", (3, 5, "matrix")),
        (nn.Conv2d(2, 3, (4, 5)), "weight", (3, 40, "matrix")),
        (nn.Embedding(7, 3), "weight", (7, 3, "embedding")),
        (nn.LayerNorm(4), "weight", (4, 1, "norm")),
        (LlamaRMSNorm(4), "weight", (4, 1, "norm")),
        (nn.LayerNorm(4), "bias", (4, 1, "norm")),
        (Own(2, 3, 4), "weight", (6, 4, "matrix")),
        (Own(), "weight", (1, 1, "bias")),
    ],
)
def test_a_parameter_is_seen_as_a_matrix(module, name, expected):
    assert matrix_view(module, name)[:3] == expected
    kind = expected[2] if expected[2] in ("norm", "bias") else "head"
    assert matrix_view(module, name, head=True)[:3] == (*expected[:2], kind)


def test_a_regular_expression_that_takes_too_long_raises():
    assert is_match("target_modules", r".*\.query", "layer.0.query")
    assert not is_match("target_modules", "query", "layer.0.query")
    with pytest.raises(ValueError, match=r"exclude_modules=.*takes too long"):
        is_match("exclude_modules", "(a|aa)+", "a" * 60 + "?")


@pytest.mark.parametrize("pattern", ["a{99999999}", "(a{0,999}){99,}", "(a{1}b{,999}){99}"])
def test_a_regular_expression_that_would_fill_the_memory_raises(pattern):
    with pytest.raises(ValueError, match=r"target_modules=.* repeats parts more than 10000 times"):
        is_match("target_modules", pattern, "layer.0.query")
    assert is_match("target_modules", r"layer\.[0-9]{1,2}\.query", "layer.10.query")


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        ({}, "any.thing", True),
        ({"target_modules": ["query"]}, "layer.0.query", True),
        ({"target_modules": ["query"]}, "layer.0.subquery", False),
        ({"target_modules": ["layer.0.query"]}, "layer.0.query", True),
        ({"target_modules": r"layer\.\d\.query"}, "layer.0.query", True),
        ({"target_modules": r"layer\.\d"}, "layer.0.query", False),
        ({"layers_to_transform": 1}, "model.layers.1.mlp.experts.0.up", True),
        ({"layers_to_transform": 0}, "model.layers.1.mlp.experts.0.up", False),
        ({"layers_to_transform": [0, 2]}, "model.layers.2.mlp", True),
        ({"layers_to_transform": [0, 2]}, "model.norm", False),
        ({"layers_to_transform": 0, "layers_pattern": "experts"}, "model.layers.1.mlp.experts.0.up", True),
        ({"layers_to_transform": 1, "layers_pattern": ["h", "layers"]}, "model.layers.1.mlp.experts.0.up", True),
        ({"layers_to_transform": 1, "layers_pattern": "ayers"}, "model.layers.1.mlp", False),
        ({"target_parameters": ["up"]}, "model.up", False),
    ],
)
def test_modules_are_chosen_as_in_lora(options, key, expected):
    assert is_targeted(IntrinsicConfig(**options), key) is expected


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        ({}, "layer.0.query", False),
        ({"exclude_modules": ["query"]}, "layer.0.query", True),
        ({"exclude_modules": ["query"]}, "layer.0.subquery", False),
        ({"exclude_modules": "query"}, "layer.0.query", False),
        ({"exclude_modules": r".*query"}, "layer.0.subquery", True),
        ({"modules_to_save": ["head"]}, "head.out", True),
    ],
)
def test_modules_are_left_out_as_in_lora(options, key, expected):
    assert is_excluded(IntrinsicConfig(**options), key) is expected
