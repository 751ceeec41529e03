"""Rounding to few values: the optimum, half precision, and the limits that `compress` keeps."""

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
"""What float16 loses of a number at most, relative."""


def brute_force(theta: np.ndarray, levels: int) -> float:
    """The least squared error of all contiguous partitions of the sorted numbers."""
    ordered = np.sort(theta.astype(np.float64))
    cuts = combinations(range(1, len(ordered)), min(levels, len(ordered)) - 1)
    parts = ([ordered[a:b] for a, b in pairwise((0, *cut, len(ordered)))] for cut in cuts)
    return min(sum(float(((part - part.mean()) ** 2).sum()) for part in partition) for partition in parts)


def draws(kind: str, count: int, seed: int) -> np.ndarray:
    """Numbers to round: spread, in clumps, with repetitions, or of very different sizes."""
    generator = np.random.default_rng(seed)
    numbers = generator.standard_normal(count)
    if kind == "clumps":
        numbers = np.rint(numbers) + 0.01 * generator.standard_normal(count)
    elif kind == "repeated":
        numbers = np.rint(3 * numbers) / 7
    elif kind == "wide":
        numbers = numbers * 10.0 ** generator.integers(-4, 4, count)
    return numbers.astype(np.float32)


@pytest.mark.parametrize("kind", ["spread", "clumps", "repeated", "wide"])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("count", [1, 2, 5, 9, 12])
def test_rounding_is_the_optimum_of_all_partitions(kind, levels, count):
    for seed in range(3):
        theta = draws(kind, count, seed)
        best = brute_force(theta, levels)
        found = float(((quantize(theta, levels).astype(np.float64) - theta) ** 2).sum())
        lost = count * (HALF * float(np.abs(theta).max())) ** 2
        assert best * (1 - 1e-9) - 1e-15 <= found <= best * (1 + 1e-9) + lost


@pytest.mark.parametrize("levels", [1, 2, 7, 100, 256])
def test_rounding_leaves_at_most_so_many_values(levels):
    theta = draws("spread", 3000, 0)
    assert len(np.unique(quantize(theta, levels))) <= levels == len(fit_codebook(theta, levels))


@pytest.mark.parametrize("unit", [2.0**-110, 1e-6, 1.0, 3e5, 2.0**120])
@pytest.mark.parametrize("spare", [0, 5])
def test_few_distinct_values_are_kept_to_half_precision(unit, spare):
    values = draws("spread", 12, 1) * np.float32(unit)
    theta = np.random.default_rng(2).permutation(np.repeat(values, 9))
    np.testing.assert_allclose(quantize(theta, 12 + spare), theta, rtol=0, atol=HALF * np.abs(theta).max())


def test_every_value_is_the_nearest_one():
    theta, values = draws("spread", 200, 3), fit_codebook(draws("spread", 200, 3), 9)
    assert find_nearest(theta, values).tolist() == [int(np.abs(values - x).argmin()) for x in theta]


@pytest.mark.parametrize("theta", [[0.0] * 5, [-0.0, 0.0, -0.0], [0.0, -0.0, 1.0]])
def test_zero_is_one_value(theta):
    theta = quantize(np.array(theta, dtype=np.float32), 8)
    assert len(PackedAdapter.from_bytes(synthetic(theta).to_bytes()).values) == len(set(theta.tolist()))
    assert not np.signbit(fit_codebook(theta, 8)).any()


@pytest.mark.parametrize("theta", [[1.0, 2.0**-24, 0.0], [1.9999, 2.0**-24, 0.0], [1.9999, 3 * 2.0**-24, 0.5]])
def test_rounded_numbers_are_packed_without_further_loss(theta):
    """The largest may round up to the next power of two; the others must not be rounded by another unit later."""
    once = quantize(np.array(theta, dtype=np.float32), 8)
    np.testing.assert_allclose(once, theta, rtol=0, atol=HALF * max(theta))
    assert PackedAdapter.from_bytes(synthetic(once).to_bytes()).theta.tolist() == once.tolist()


@pytest.mark.parametrize("levels", [0, -1, 257, 2.5, "8"])
def test_levels_out_of_range_are_refused(levels):
    with pytest.raises(ValueError, match=f"levels must be an integer from 1 to 256, got {levels!r}"):
        compress(trained("bert"), levels)


@pytest.mark.parametrize(("largest", "shown"), [(1e-39, "1e-39"), (3.4028e38, r"3\.4028e\+38")])
def test_numbers_beyond_the_exponent_are_refused(largest, shown):
    model = trained("bert")
    weight = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    weight.data = (weight.double() / weight.abs().max() * largest).float()
    with pytest.raises(ValueError, match=f"largest parameter is {shown}, outside the range of a packed adapter"):
        compress(model, 256)


@pytest.mark.parametrize("most", [60, 100, 150, 300, 10_000])
@pytest.mark.parametrize("said", [False, True])
def test_max_bytes_is_kept(most, said):
    model = trained("bert", said=said)
    data = compress(model, max_bytes=most)
    assert len(data) <= most
    used = len(read_packed(data).values)
    assert data == compress(model, 256) or len(compress(model, used + 1)) > most  # one more does not fit


def test_max_bytes_that_are_too_few_are_refused():
    model = trained("bert")
    least = len(compress(model, 1))
    assert len(compress(model, max_bytes=least)) == least
    with pytest.raises(ValueError, match=rf"max_bytes={least - 1} is too small: with one value .* {least} bytes"):
        compress(model, max_bytes=least - 1)


@pytest.mark.parametrize("share", [0.9, 0.3, 0.05, 0.001])
def test_max_error_is_kept_with_as_few_values_as_can_be(share):
    model = trained("bert", d=300, seed=5)
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight.detach().numpy()
    levels = len((packed := read_packed(compress(model, max_error=share))).values)
    assert np.linalg.norm(packed.theta - theta) <= share * np.linalg.norm(theta)
    assert levels == 1 or np.linalg.norm(quantize(theta, levels - 1) - theta) > share * np.linalg.norm(theta)


def test_max_error_that_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match=r"max_error=1e-09 cannot be met: with 256 values the error is"):
        compress(trained("bert", d=300), max_error=1e-9)


def test_max_error_of_an_untrained_adapter_is_kept():
    assert len(read_packed(compress(trained("bert", init_weights=True), max_error=0.0)).values) == 1


@pytest.mark.parametrize(
    "limits", [{"levels": 4, "max_bytes": 90}, {"max_bytes": 90, "max_error": 0.1}, {"levels": 4, "max_error": 0.1}]
)
def test_two_limits_are_refused(limits):
    with pytest.raises(ValueError, match=r"Pass only one of levels=.*max_bytes=.*max_error="):
        compress(trained("bert"), **limits)


def test_packing_does_not_change_the_model():
    model = trained("bert", said=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compress(model, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
