"""Initial scores, gradients of masks against their definition, masks as bytes, and options."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from peft_intrinsic import SupermaskConfig
from peft_intrinsic.supermask.masks import (
    SCALE,
    bits_to_mask,
    decode_mask,
    encode_mask,
    initialize_scores,
    make_mask,
    make_training_mask,
    mask_to_bits,
    restore_scores,
)

SPARSITIES = [0.0, 0.001, 0.03, 0.5, 0.97, 1.0]


def weight(rows: int = 60, cols: int = 50) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def random_mask(sparsity: float, shape: tuple[int, ...] = (60, 50)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) >= sparsity


def initial_mask(w: torch.Tensor, name: str = "a", **options) -> torch.Tensor:
    config = SupermaskConfig(**options)
    return make_mask(initialize_scores(w, name, config), config)


@pytest.mark.parametrize(
    ("mask", "sparsity"),
    [("threshold", 0.0), *((mask, s) for mask in ("threshold", "bernoulli") for s in (0.001, 0.03, 0.5, 0.9))],
)
def test_magnitude_zeroes_the_smallest_weights(mask, sparsity):
    w = weight()
    ones = initial_mask(w, initial_sparsity=sparsity, mask=mask)
    zeros = int((~ones).sum())
    assert abs(zeros - sparsity * w.numel()) <= (1 if sparsity else 0)
    assert not zeros or w[~ones].abs().max() <= w[ones].abs().min()


@pytest.mark.parametrize("mask", ["threshold", "bernoulli"])
def test_random_zeroes_weights_of_any_size_by_seed_and_name(mask):
    w, options = weight(300, 200), {"initial_sparsity": 0.1, "mask": mask, "init": "random"}
    ones, n = initial_mask(w, **options), w.numel()
    assert abs(int((~ones).sum()) - 0.1 * n) < 5 * math.sqrt(n * 0.1 * 0.9)
    # As large as the others on average: 5 standard errors.
    assert abs(w[~ones].abs().mean() - w[ones].abs().mean()) < 5 * w.abs().std() / math.sqrt(0.1 * n)
    assert torch.equal(ones, initial_mask(w, **options))
    assert not torch.equal(ones, initial_mask(w, "b", **options))
    assert not torch.equal(ones, initial_mask(w, **options, seed=1))


def test_equal_weights_are_zeroed_in_a_random_order():
    ones = initial_mask(torch.zeros(100, 100), initial_sparsity=0.5)
    assert abs(int((~ones[:50]).sum()) - 2500) < 5 * 25


@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_bernoulli_samples_ones_with_the_probability_of_the_score(init):
    config = SupermaskConfig(initial_sparsity=0.2, mask="bernoulli", init=init)
    scores = initialize_scores(weight(), "a", config)
    one = torch.sigmoid(SCALE * scores.double())
    assert float(1 - one.mean()) == pytest.approx(0.2, abs=1e-4)
    torch.manual_seed(0)
    samples = torch.stack([make_training_mask(scores, config) for _ in range(400)])
    assert set(samples.round(decimals=4).unique().tolist()) == {0.0, 1.0}
    # The mean of each weight within 6 binomial standard errors, and of all within 5.
    error = torch.sqrt(one * (1 - one) / 400)
    assert ((samples.double().mean(0) - one).abs() < 6 * error + 1e-3).all()
    error = torch.sqrt((one * (1 - one)).mean() / samples.numel())
    assert abs(float(samples.mean()) - float(one.mean())) < 5 * float(error)


def test_gradient_of_the_threshold_is_that_of_the_mask_itself():
    """y = Σ x W∘m with W = [2, −3, 5], m = [1, 0, 1]: the gradient of the scores is x W."""
    config = SupermaskConfig(initial_sparsity=0.1)
    scores = torch.tensor([0.2, -0.1, 0.3], requires_grad=True)
    w, x = torch.tensor([2.0, -3.0, 5.0]), torch.tensor([1.0, 10.0, 100.0])
    y = (x * w * make_training_mask(scores, config)).sum()
    y.backward()
    assert y.item() == pytest.approx(2 + 500, rel=1e-6)
    assert scores.grad.tolist() == [2.0, -30.0, 500.0]


def test_gradient_of_bernoulli_is_that_of_the_probability():
    """The gradient of the scores is x W σ'(SCALE · s) · SCALE, for sampled zeros and ones."""
    config = SupermaskConfig(mask="bernoulli")
    scores = torch.tensor([0.0, math.log(3) / SCALE], requires_grad=True)
    w, x = torch.tensor([2.0, -3.0]), torch.tensor([1.0, 10.0])
    (x * w * make_training_mask(scores, config)).sum().backward()
    assert scores.grad.tolist() == pytest.approx([2 * 0.25 * SCALE, -30 * (3 / 16) * SCALE])


@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.5])
def test_hold_sparsity_gives_the_exact_number_of_zeros(sparsity):
    config = SupermaskConfig(initial_sparsity=sparsity, hold_sparsity=True)
    scores = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    ones = make_mask(scores, config)
    assert int((~ones).sum()) == round(sparsity * 3000)
    assert not sparsity or scores[~ones].max() < scores[ones].min()
    assert torch.equal(make_training_mask(scores, config) > 0.5, ones)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", [(60, 50), (7, 9), (1, 1), (3, 5, 7)])
def test_bits_and_code_give_the_mask_back(sparsity, shape):
    mask = random_mask(sparsity, shape)
    assert torch.equal(bits_to_mask(mask_to_bits(mask), mask.shape), mask)
    assert mask_to_bits(mask).tolist() == np.packbits(mask.numpy().ravel()).tolist()
    assert torch.equal(decode_mask(encode_mask(mask), mask.shape, "a"), mask)


@pytest.mark.parametrize("sparsity", [0.001, 0.03, 0.5])
def test_code_is_as_short_as_the_entropy(sparsity):
    mask = random_mask(sparsity, (1000, 400))
    p = float((~mask).float().mean())
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert 8 * len(encode_mask(mask)) < 1.001 * entropy * mask.numel() + 128


def test_damaged_masks_raise():
    mask = random_mask(0.1)
    data = encode_mask(mask)
    other = data.clone()
    other[0] ^= 1
    for bad, message in (
        *((bad, "the file holds no mask of 3000 weights") for bad in (data[:5], data.float(), data | 255)),
        *((bad, "the mask in the file is damaged") for bad in (data[:-2], torch.cat([data, data[-2:]]), other)),
    ):
        with pytest.raises(ValueError, match=f"a: {message}"):
            decode_mask(bad, mask.shape, "a")


@pytest.mark.parametrize(
    ("options", "sparsity"),
    [
        *(({}, sparsity) for sparsity in (0.0, 0.001, 0.03, 0.5, 1.0)),
        *(({"hold_sparsity": True}, sparsity) for sparsity in (0.0, 0.001, 0.03, 0.5)),
        *(({"mask": "bernoulli"}, sparsity) for sparsity in (0.0, 0.001, 0.03, 0.5, 1.0)),
    ],
)
def test_scores_restored_from_a_mask_give_that_mask(options, sparsity):
    mask = random_mask(sparsity)
    low = 0.001 if "mask" in options else 0.0
    start = min(max(float((~mask).float().mean()), low), 0.99)
    config = SupermaskConfig(**options, initial_sparsity=start)
    scores = restore_scores(mask, config)
    assert torch.equal(make_mask(scores, config), mask)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_sparsity": "3%"}, "initial_sparsity must be a number"),
        ({"initial_sparsity": 1.0}, "initial_sparsity must be from 0 to below 1, got 1.0"),
        ({"initial_sparsity": -0.1}, "initial_sparsity must be from 0"),
        ({"initial_sparsity": math.nan}, "initial_sparsity must be from 0"),
        ({"initial_sparsity": 0.0, "mask": "bernoulli"}, "needs an infinite score"),
        ({"init": "small"}, "init must be one of"),
        ({"mask": "sigmoid"}, "mask must be one of"),
        ({"mask": "bernoulli", "hold_sparsity": True}, "hold_sparsity=True needs"),
        ({"target_modules": ".*query", "layers_to_transform": [0]}, "layers_to_transform=.* does not work"),
        ({"target_modules": ".*query", "layers_to_transform": 0}, "layers_to_transform=0 does not work with the"),
        ({"target_modules": ["query"], "layers_pattern": "layer"}, "layers_pattern='layer' needs layers_to_transform"),
        ({"seed": -1}, "seed must be"),
        ({"target_modules": None}, "name linear layers"),
    ],
)
def test_options_that_cannot_work_raise(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SupermaskConfig(**options)
