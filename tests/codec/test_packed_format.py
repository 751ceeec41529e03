"""The package and a reader that was written from docs/packed_format.md read the same."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from conftest import trained
from helpers.reader import SINCE_2, boundaries, prior, read
from helpers.samples import GOLDEN, contents, few_values, resealed, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_intrinsic.aliases import renamed
from peft_intrinsic.codec import PackedAdapter, compress
from peft_intrinsic.codec import entropy as coder

RARE: list[dict[str, Any]] = [
    {"target_modules": "all"},
    {"target_modules": r".*\.(query|\"ключ\")\\?"},
    {"target_modules": ["query", "größe"]},
    {"target_modules": None, "target_parameters": ["norm.weight"]},
    {"exclude_modules": r"encoder\.layer\.[01].*"},
    {"exclude_modules": ["word_embeddings"], "layers_to_transform": 1},
    {"layers_to_transform": [0, 1], "layers_pattern": "layer"},
    {"layers_to_transform": [0], "layers_pattern": ["layer", "block"]},
    {"projection": "value_lora", "value_sketch": [0.5, -1.25e-07, *[3.0] * 6]},
    {"head": "labels", "label_texts": ["größe", 'a "b"'], "label_sketch": [0.5, -1.25e-07, *[3.0] * 6]},
]


def read_by_both(packed: PackedAdapter) -> dict[str, Any]:
    """Read the file of a packed adapter by both readers, which must give that adapter and nothing else."""
    data = packed.to_bytes()
    fields = read(data)
    assert contents(PackedAdapter.from_bytes(data)) == contents(packed)
    assert {name: value for name, value in fields.items() if name not in ("weights", "values")} == contents(packed)
    return fields


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.3, 3.0])
@pytest.mark.parametrize(
    ("d", "levels"),
    [(1, 1), (2, 1), (2, 2), (200, 1), (200, 2), (200, 5), (200, 16), (300, 256), (5000, 1), (5000, 16), (5000, 256)],
)
def test_readers_agree_on_lengths_and_numbers_of_values(d, levels, spread):
    read_by_both(synthetic(few_values(d, levels, spread)))


@pytest.mark.parametrize("weights", range(17))
@pytest.mark.parametrize("levels", [2, 5, 256])
def test_readers_agree_on_all_weights(weights, levels):
    packed = synthetic(few_values(600, levels))
    body = packed.encode_body(weights=[weights])
    assert body[1] == weights
    data = resealed(packed.encode_head() + body + b"....")
    assert read(data)["θ"] == PackedAdapter.from_bytes(data).theta.tolist() == packed.theta.tolist()


@pytest.mark.parametrize(
    "option",
    [
        *RARE,
        *({"lambda_granularity": name} for name in ("layer", "module", "tensor")),
        *({"projection": name} for name in ("fastfood", "global", "dense", "value_bias")),
        *({"scale": name} for name in ("fan_in", "isometric")),
        *({"head": name} for name in ("subspace", "keep")),
        {"add_bias": True},
        *({"task_type": task} for task in (None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM")),
        *({"task_type": task} for task in ("TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")),
        *({"block_size": 1 << i} for i in (0, 1, 6, 20, 62)),
        *({"seed": seed} for seed in (127, 128, 2**63 - 1)),
        *({"reinitialized": indexes} for indexes in ([0], [0, 1, 2], [5, 200, 70000])),
        *({"base": name} for name in ("", "größe", "x" * 255)),
        {"classes": 2**20},
    ],
)
def test_readers_agree_on_options_in_head_and_json(option):
    read_by_both(synthetic(few_values(20, 3), **option))


@pytest.mark.parametrize("scales", [[0.0], [1.0, -2.5e-3], [1e-6] * 9, [-0.5, 65504 * 2.0**40]])
def test_readers_agree_on_lambda(scales):
    expected = np.array(scales, dtype=np.float32)
    packed = PackedAdapter.from_bytes(synthetic(few_values(30, 4), expected).to_bytes())
    read_by_both(packed)
    np.testing.assert_allclose(packed.scales, expected, rtol=0, atol=2.0**-11 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {"target_modules": "norms-and-biases", "task_type": "SEQ_CLS"}),
        ("bert", {"said": True}),
        ("bert", {"said": True, "lambda_granularity": "tensor", "projection": "global"}),
        ("bert", {"target_modules": ["query", "value"], "exclude_modules": r".*\.0\.attention.*"}),
        ("bert", {"target_modules": r".*\.1\..*(query|dense)"}),
        ("bert", {"target_parameters": ["LayerNorm.weight"], "d": 100}),
        ("bert", {"target_modules": "all-linear", "seed": 2**40}),
        ("llama", {"add_bias": True, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "d": 48}),
        ("gpt2", {"layers_to_transform": [1], "layers_pattern": "h"}),
        ("llama", {"projection": "value_bias", "task_type": "CAUSAL_LM", "d": 20}),
    ],
)
def test_readers_agree_on_what_compress_writes(family, options):
    model = trained(family, **options)
    data = compress(model, 16)
    fields = read_by_both(PackedAdapter.from_bytes(data))
    config = model.peft_config["default"]
    same = ("d", "seed", "block_size", "said", "projection", "scale", "head", "add_bias", "task_type")
    assert {name: fields[name] for name in same} == {name: getattr(config, name) for name in same}
    for name in ("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"):
        value = getattr(config, name)
        assert fields[name] == (sorted(value) if isinstance(value, set) else value)
    assert fields["labels"] == (3 if config.task_type == "SEQ_CLS" else 0)


names = st.text(st.characters(codec="utf-8"), max_size=12)
listed = st.lists(names, max_size=3)
short = st.floats(-1.9990234375, 1.9990234375, width=16)


@st.composite
def packed_adapters(draw) -> PackedAdapter:
    """Any packed adapter whose values are exact in half precision."""
    values = np.array(draw(st.lists(short, min_size=1, max_size=20)), dtype=np.float32) + np.float32(0)
    factor = np.float32(2.0) ** draw(st.integers(-90, 90))
    indexes = draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=60))
    scales = np.array(draw(st.lists(short, max_size=5)), dtype=np.float32) * factor
    options = {
        "lambda_granularity": draw(st.sampled_from(["layer", "module", "tensor"])),
        "projection": draw(st.sampled_from(["fastfood", "global", "dense"])),
        "scale": draw(st.sampled_from(["fan_in", "isometric"])),
        "head": draw(st.sampled_from(["subspace", "keep"])),
        "add_bias": draw(st.booleans()),
        "task_type": draw(st.sampled_from([None, "SEQ_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION"])),
        "target_modules": draw(st.none() | names | listed),
        "exclude_modules": draw(st.none() | names | listed),
        "layers_to_transform": draw(st.none() | st.integers(0, 99) | st.lists(st.integers(0, 99), max_size=3)),
        "layers_pattern": draw(st.none() | names | listed),
        "target_parameters": draw(st.none() | listed),
    }
    return synthetic(
        values[indexes] * factor,
        scales,
        **options,
        seed=draw(st.integers(0, 2**63 - 1)),
        block_size=1 << draw(st.integers(0, 62)),
        base=draw(names),
        classes=draw(st.integers(0, 2**32)),
        base_digest=draw(st.binary(min_size=8, max_size=8)),
        manifest_digest=draw(st.binary(min_size=8, max_size=8)),
        reinitialized=sorted(draw(st.sets(st.integers(0, 2**31), max_size=4))),
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(packed_adapters())
def test_any_packed_adapter_survives_a_round_trip(packed):
    read_by_both(packed)
    data = packed.to_bytes()
    assert PackedAdapter.from_bytes(data).to_bytes() == data


def test_prior_weights_are_those_of_the_page():
    for index in range(1, 17):
        for levels in (1, 2, 3, 7, 64, 255, 256):
            assert list(coder.compute_prior(index, levels)) == prior(index, levels)


def test_every_symbol_owns_some_integers():
    for weights in ([1, 2**24], [2**24, 1], prior(16, 256), [1] * 256, [7]):
        starts = boundaries(weights)
        assert starts[0] == 0
        assert all(a < b for a, b in pairwise(starts))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files_are_read_and_written_bitwise(path):
    """A change here breaks existing packed adapters."""
    data = path.read_bytes()
    stored = renamed(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
    expected = {**dict.fromkeys(SINCE_2), **stored}
    del expected["family"]
    packed = PackedAdapter.from_bytes(data)
    fields = read(data)
    assert contents(packed) == expected
    assert {name: fields[name] for name in expected} == expected
    assert packed.to_bytes() == data


def test_version_2_is_written_only_for_what_version_1_cannot_hold():
    """A reader of version 1 reads all other files."""
    changes = [{}, {"projection": "dense"}, {"head": "keep"}, {"projection": "value_bias"}, RARE[-1]]
    assert [synthetic([0.5], **change).to_bytes()[3] for change in changes] == [1, 1, 1, 2, 2]
    for change in changes[2:4]:
        data = synthetic([0.5], **change).to_bytes()
        with pytest.raises(ValueError, match="not in canonical form"):
            PackedAdapter.from_bytes(resealed(data[:3] + bytes([3 - data[3]]) + data[4:]))


def test_options_that_the_format_cannot_hold_raise():
    texts = ["a" * 1000 + str(i) for i in range(70)]
    with pytest.raises(ValueError, match=r"label_texts: 70[0-9]{3} bytes, of which a packed adapter holds 65536"):
        synthetic([0.5], head="labels", label_texts=texts).to_bytes()
