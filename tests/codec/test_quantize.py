"""Quantization to few values: the optimum, half precision, and the limits of `compress`."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from conftest import trained
from helpers.samples import synthetic

from peft_intrinsic.codec import PackedAdapter, compress, read_packed
from peft_intrinsic.codec.quantize import find_nearest, fit_codebook, quantize

HALF = 2.0**-11
"""Maximum relative error of float16."""


def brute_force(theta: np.ndarray, levels: int) -> float:
    """The smallest squared error of all contiguous partitions of the sorted values."""
    ordered = np.sort(theta.astype(np.float64))
    cuts = combinations(range(1, len(ordered)), min(levels, len(ordered)) - 1)
    parts = ([ordered[a:b] for a, b in pairwise((0, *cut, len(ordered)))] for cut in cuts)
    return min(sum(float(((part - part.mean()) ** 2).sum()) for part in partition) for partition in parts)


def sample(kind: str, count: int, seed: int) -> np.ndarray:
    """Values to quantize: spread, in clumps, with repetitions, or of very different sizes."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(count)
    if kind == "clumps":
        values = np.rint(values) + 0.01 * generator.standard_normal(count)
    elif kind == "repeated":
        values = np.rint(3 * values) / 7
    elif kind == "wide":
        values = values * 10.0 ** generator.integers(-4, 4, count)
    return values.astype(np.float32)


@pytest.mark.parametrize("kind", ["spread", "clumps", "repeated", "wide"])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("count", [1, 2, 5, 9, 12])
def test_quantization_is_the_optimum_of_all_partitions(kind, levels, count):
    for seed in range(3):
        theta = sample(kind, count, seed)
        best = brute_force(theta, levels)
        error = float(((quantize(theta, levels).astype(np.float64) - theta) ** 2).sum())
        lost = count * (HALF * float(np.abs(theta).max())) ** 2
        assert best * (1 - 1e-9) - 1e-15 <= error <= best * (1 + 1e-9) + lost


@pytest.mark.parametrize("levels", [1, 2, 7, 100, 256])
def test_quantization_leaves_at_most_so_many_values(levels):
    theta = sample("spread", 3000, 0)
    assert len(np.unique(quantize(theta, levels))) <= levels == len(fit_codebook(theta, levels))


@pytest.mark.parametrize("scale", [2.0**-110, 1e-6, 1.0, 3e5, 2.0**120])
@pytest.mark.parametrize("spare", [0, 5])
def test_few_distinct_values_change_by_half_precision_only(scale, spare):
    values = sample("spread", 12, 1) * np.float32(scale)
    theta = np.random.default_rng(2).permutation(np.repeat(values, 9))
    np.testing.assert_allclose(quantize(theta, 12 + spare), theta, rtol=0, atol=HALF * np.abs(theta).max())


def test_find_nearest_is_the_nearest_value():
    theta, values = sample("spread", 200, 3), fit_codebook(sample("spread", 200, 3), 9)
    assert find_nearest(theta, values).tolist() == [int(np.abs(values - x).argmin()) for x in theta]


@pytest.mark.parametrize("theta", [[0.0] * 5, [-0.0, 0.0, -0.0], [0.0, -0.0, 1.0]])
def test_zero_is_one_value(theta):
    theta = quantize(np.array(theta, dtype=np.float32), 8)
    assert len(PackedAdapter.from_bytes(synthetic(theta).to_bytes()).values) == len(set(theta.tolist()))
    assert not np.signbit(fit_codebook(theta, 8)).any()


@pytest.mark.parametrize("theta", [[1.0, 2.0**-24, 0.0], [1.9999, 2.0**-24, 0.0], [1.9999, 3 * 2.0**-24, 0.5]])
def test_quantized_values_are_packed_without_further_loss(theta):
    """If the largest rounds up to a power of two, the exponent of the others must not change again."""
    once = quantize(np.array(theta, dtype=np.float32), 8)
    np.testing.assert_allclose(once, theta, rtol=0, atol=HALF * max(theta))
    assert PackedAdapter.from_bytes(synthetic(once).to_bytes()).theta.tolist() == once.tolist()


@pytest.mark.parametrize("levels", [0, -1, 257, 2.5, "8"])
def test_levels_out_of_range_raise(levels):
    with pytest.raises(ValueError, match=f"levels must be an integer from 1 to 256, got {levels!r}"):
        compress(trained("bert"), levels)


@pytest.mark.parametrize(("largest", "shown"), [(1e-39, "1e-39"), (3.4028e38, r"3\.4028e\+38")])
def test_parameters_beyond_the_exponent_raise(largest, shown):
    model = trained("bert")
    weight = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    weight.data = (weight.double() / weight.abs().max() * largest).float()
    with pytest.raises(ValueError, match=f"largest parameter is {shown}, outside the range of a packed adapter"):
        compress(model, 256)


@pytest.mark.parametrize("most", [60, 100, 150, 300, 10_000])
@pytest.mark.parametrize("said", [False, True])
def test_max_bytes_gives_the_most_values_that_fit(most, said):
    model = trained("bert", said=said)
    data = compress(model, max_bytes=most)
    assert len(data) <= most
    used = len(read_packed(data).values)
    assert data == compress(model, 256) or len(compress(model, used + 1)) > most  # one more does not fit


def test_max_bytes_that_one_value_exceeds_raises():
    model = trained("bert")
    least = len(compress(model, 1))
    assert len(compress(model, max_bytes=least)) == least
    with pytest.raises(ValueError, match=rf"max_bytes={least - 1} is too small: with one value .* {least} bytes"):
        compress(model, max_bytes=least - 1)


@pytest.mark.parametrize("limit", [0.9, 0.3, 0.05, 0.001])
def test_max_error_gives_the_fewest_values_that_meet_it(limit):
    model = trained("bert", d=300, seed=5)
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight.detach().numpy()
    levels = len((packed := read_packed(compress(model, max_error=limit))).values)
    assert np.linalg.norm(packed.theta - theta) <= limit * np.linalg.norm(theta)
    assert levels == 1 or np.linalg.norm(quantize(theta, levels - 1) - theta) > limit * np.linalg.norm(theta)


def test_max_error_raises_if_256_values_do_not_meet_it():
    with pytest.raises(ValueError, match=r"max_error=1e-09 cannot be met: with 256 values the error is"):
        compress(trained("bert", d=300), max_error=1e-9)
    assert len(read_packed(compress(trained("bert", init_weights=True), max_error=0.0)).values) == 1


@pytest.mark.parametrize(
    "limits", [{"levels": 4, "max_bytes": 90}, {"max_bytes": 90, "max_error": 0.1}, {"levels": 4, "max_error": 0.1}]
)
def test_two_limits_raise(limits):
    with pytest.raises(ValueError, match=r"Pass only one of levels=.*max_bytes=.*max_error="):
        compress(trained("bert"), **limits)


def test_compress_does_not_change_the_model():
    model = trained("bert", said=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compress(model, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
