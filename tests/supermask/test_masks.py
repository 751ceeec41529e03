"""Scores and masks: starts, gradients against their definition, bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from peft_intrinsic import SupermaskConfig
from peft_intrinsic.supermask.masks import (
    UNIT,
    binary,
    coded,
    decoded,
    initial_scores,
    packed,
    scores_of,
    straight_through,
    unpacked,
)

SPARSITIES = [0.0, 0.001, 0.03, 0.5, 0.97, 1.0]


def weight(rows: int = 60, cols: int = 50) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def random_mask(sparsity: float, shape: tuple[int, ...] = (60, 50)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) >= sparsity


@pytest.mark.parametrize("mask", ["threshold", "bernoulli"])
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.03, 0.5, 0.9])
def test_magnitude_zeroes_the_smallest(mask, sparsity):
    w = weight()
    if not sparsity and mask == "bernoulli":
        return
    config = SupermaskConfig(initial_sparsity=sparsity, mask=mask)
    kept = binary(initial_scores(w, "a", config), config)
    zeros = int((~kept).sum())
    assert abs(zeros - sparsity * w.numel()) <= (1 if sparsity else 0)
    assert not zeros or w[~kept].abs().max() <= w[kept].abs().min()


@pytest.mark.parametrize("mask", ["threshold", "bernoulli"])
def test_random_zeroes_any(mask):
    w = weight(300, 200)
    config = SupermaskConfig(initial_sparsity=0.1, mask=mask, init="random")
    kept = binary(initial_scores(w, "a", config), config)
    n = w.numel()
    assert abs(int((~kept).sum()) - 0.1 * n) < 5 * math.sqrt(n * 0.1 * 0.9)
    # As large as the others on average: 5 standard errors.
    assert abs(w[~kept].abs().mean() - w[kept].abs().mean()) < 5 * w.abs().std() / math.sqrt(0.1 * n)
    again = binary(initial_scores(w, "a", config), config)
    assert torch.equal(kept, again)
    for name, seed in (("b", 0), ("a", 1)):
        other = SupermaskConfig(initial_sparsity=0.1, mask=mask, init="random", seed=seed)
        assert not torch.equal(kept, binary(initial_scores(w, name, other), other))


def test_equal_weights_are_zeroed_in_a_random_order():
    config = SupermaskConfig(initial_sparsity=0.5)
    kept = binary(initial_scores(torch.zeros(100, 100), "a", config), config)
    assert abs(int((~kept[:50]).sum()) - 2500) < 5 * 25


@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_bernoulli_keeps_with_the_probability_of_the_score(init):
    config = SupermaskConfig(initial_sparsity=0.2, mask="bernoulli", init=init)
    scores = initial_scores(weight(), "a", config)
    keep = torch.sigmoid(UNIT * scores.double())
    assert float(1 - keep.mean()) == pytest.approx(0.2, abs=1e-4)
    torch.manual_seed(0)
    draws = torch.stack([straight_through(scores, config) for _ in range(400)])
    assert set(draws.round(decimals=4).unique().tolist()) == {0.0, 1.0}
    # The mean of each weight within 6 binomial standard errors, and of all within 5.
    error = torch.sqrt(keep * (1 - keep) / 400)
    assert ((draws.double().mean(0) - keep).abs() < 6 * error + 1e-3).all()
    assert abs(float(draws.mean()) - float(keep.mean())) < 5 * float(
        torch.sqrt((keep * (1 - keep)).mean() / draws.numel())
    )


def test_gradient_of_the_threshold_by_hand():
    """y = Σ x W∘m with W = [2, −3, 5], m = [1, 0, 1]: the scores get x W, as if m were they."""
    config = SupermaskConfig(initial_sparsity=0.1)
    scores = torch.tensor([0.2, -0.1, 0.3], requires_grad=True)
    w, x = torch.tensor([2.0, -3.0, 5.0]), torch.tensor([1.0, 10.0, 100.0])
    y = (x * w * straight_through(scores, config)).sum()
    y.backward()
    assert y.item() == pytest.approx(2 + 500, rel=1e-6)
    assert scores.grad.tolist() == [2.0, -30.0, 500.0]


def test_gradient_of_bernoulli_by_hand():
    """The scores get x W σ'(UNIT s) · UNIT whether or not the weight was drawn."""
    config = SupermaskConfig(mask="bernoulli")
    scores = torch.tensor([0.0, math.log(3) / UNIT], requires_grad=True)
    w, x = torch.tensor([2.0, -3.0]), torch.tensor([1.0, 10.0])
    (x * w * straight_through(scores, config)).sum().backward()
    assert scores.grad.tolist() == pytest.approx([2 * 0.25 * UNIT, -30 * (3 / 16) * UNIT])


@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.5])
def test_held_sparsity_is_exact(sparsity):
    config = SupermaskConfig(initial_sparsity=sparsity, hold_sparsity=True)
    scores = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    kept = binary(scores, config)
    zeros = round(sparsity * 3000)
    assert int((~kept).sum()) == zeros
    if zeros:
        assert scores[~kept].max() < scores[kept].min()
    assert torch.equal(straight_through(scores, config) > 0.5, kept)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", [(60, 50), (7, 9), (1, 1), (3, 5, 7)])
def test_packing_and_coding_are_exact(sparsity, shape):
    mask = random_mask(sparsity, shape)
    assert torch.equal(unpacked(packed(mask), mask.shape), mask)
    assert len(packed(mask)) == -(-mask.numel() // 8)
    assert torch.equal(decoded(coded(mask), mask.shape, "a"), mask)
    assert np.packbits(mask.numpy().ravel()).tolist() == packed(mask).tolist()


@pytest.mark.parametrize("sparsity", [0.001, 0.03, 0.5])
def test_code_is_as_short_as_the_entropy(sparsity):
    mask = random_mask(sparsity, (1000, 400))
    p = float((~mask).float().mean())
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert 8 * len(coded(mask)) < 1.001 * entropy * mask.numel() + 128
    if sparsity == 0.03:
        assert 8 * len(coded(mask)) / mask.numel() < 0.2


def test_damaged_masks_are_refused():
    mask = random_mask(0.1)
    data = coded(mask)
    for bad in (data[:5], data.float(), torch.cat([torch.full((8,), 255, dtype=torch.uint8), data[8:]])):
        with pytest.raises(ValueError, match="a: the file holds no mask of 3000 weights"):
            decoded(bad, mask.shape, "a")
    for bad in (data[:-2], torch.cat([data, data[-2:]])):
        with pytest.raises(ValueError, match="a: the mask in the file is damaged"):
            decoded(bad, mask.shape, "a")
    other = data.clone()
    other[0] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        decoded(other, mask.shape, "a")


@pytest.mark.parametrize("options", [{}, {"hold_sparsity": True}, {"mask": "bernoulli"}])
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.03, 0.5, 1.0])
def test_scores_of_a_mask_stand_for_it(options, sparsity):
    kept = random_mask(sparsity)
    share = float((~kept).float().mean())
    if share == 1 and options.get("hold_sparsity"):
        return
    start = min(max(share, 0.001), 0.99) if "mask" in options else min(share, 0.99)
    config = SupermaskConfig(**options, initial_sparsity=start)
    scores = scores_of(kept, config)
    assert torch.equal(binary(scores, config), kept)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"initial_sparsity": 1.0}, "initial_sparsity must be from 0 to below 1, got 1.0"),
        ({"initial_sparsity": -0.1}, "initial_sparsity must be from 0"),
        ({"initial_sparsity": math.nan}, "initial_sparsity must be from 0"),
        ({"initial_sparsity": 0.0, "mask": "bernoulli"}, "infinite score"),
        ({"init": "small"}, "init must be one of"),
        ({"mask": "sigmoid"}, "mask must be one of"),
        ({"mask": "bernoulli", "hold_sparsity": True}, "hold_sparsity=True needs"),
        ({"target_modules": ".*query", "layers_to_transform": [0]}, "layers_to_transform=.* does not work"),
        ({"seed": -1}, "seed must be"),
        ({"target_modules": None}, "name linear layers"),
    ],
)
def test_options(options, words):
    with pytest.raises(ValueError, match=words):
        SupermaskConfig(**options)
    with pytest.raises(TypeError, match="initial_sparsity must be a number"):
        SupermaskConfig(initial_sparsity="3%")
