"""The Walsh–Hadamard transform against scipy's matrix and the textbook butterfly."""

import numpy as np
import pytest
import scipy.linalg
import torch

from peft_intrinsic.projection.hadamard import _cached, fwht, hadamard

SIZES = [2**k for k in range(11)]


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def butterfly(x: np.ndarray) -> np.ndarray:
    for k in range(x.shape[-1].bit_length() - 1):
        pairs = x.reshape(*x.shape[:-1], -1, 2, 2**k)
        x = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).reshape(x.shape)
    return x


@pytest.mark.parametrize("n", SIZES)
def test_fwht_equals_the_matrix_product(n):
    x = draw(2, 3, n)
    expected = x.numpy() @ scipy.linalg.hadamard(n)
    np.testing.assert_allclose(fwht(x).numpy(), expected, rtol=0, atol=1e-13 * n)
    np.testing.assert_allclose(fwht(x.float()).numpy(), expected, rtol=0, atol=1e-5 * n**0.5)
    np.testing.assert_allclose(fwht(fwht(x)).numpy(), n * x.numpy(), rtol=0, atol=1e-13 * n * n**0.5)


@pytest.mark.parametrize("n", [2048, 16384, 32768])  # two and three factors
def test_fwht_of_long_vectors_equals_the_butterfly(n):
    x = draw(2, n)
    np.testing.assert_allclose(fwht(x).numpy(), butterfly(x.numpy()), rtol=0, atol=1e-12 * n**0.5)


@pytest.mark.parametrize("shape", [(0, 8), (0, 256), (1, 1), (256,)])
def test_fwht_preserves_the_shape(shape):
    assert fwht(draw(*shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", SIZES)
def test_hadamard_is_a_slice_of_the_matrix(n, dtype):
    for width in {1, 2, 3, 5, n // 2 - 1, n // 2 + 1, n - 1, n} & set(range(1, n + 1)):
        actual = hadamard(n, width, torch.empty(0, dtype=dtype))
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual.float().numpy(), scipy.linalg.hadamard(n)[:, :width])


@pytest.mark.parametrize("n", [1, 2, 16, 256])  # 256: two factors
def test_fwht_has_the_numerical_gradient(n):
    assert torch.autograd.gradcheck(fwht, draw(2, n).requires_grad_(), fast_mode=n > 16)


def test_cached_matrix_survives_inference_mode():
    _cached.cache_clear()
    with torch.inference_mode():
        fwht(draw(1, 512))
        hadamard(512, 512, draw(1))
    x = draw(1, 512).requires_grad_()
    (fwht(x) * hadamard(512, 512, x)[1]).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), 512 * np.eye(512)[1:2], rtol=0, atol=1e-9)


def test_only_small_matrices_are_cached():
    for n, count in ((64, 1), (1024, 1), (2048, 0)):
        _cached.cache_clear()
        for _ in range(3):
            hadamard(n, n, draw(1))
        assert (_cached.cache_info().currsize, _cached.cache_info().hits) == (count, 2 * count)
