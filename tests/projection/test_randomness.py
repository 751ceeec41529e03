"""The random stream: known answers, an independent implementation, and the distribution of the values."""

import numpy as np
import pytest
from helpers import oracle
from scipy.stats import kstest

from peft_intrinsic.projection.randomness import ALGORITHM_VERSION, normal_rows, normals, signs_and_permutations, words

STREAMS = [
    (0, "block", "model.weight/64", 9),
    (42, "gaussian", "/16", 5),
    (2**40, "dense", "naïve Ü/3", 6),
    (-1, "", "", 1),
]


def uint64(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def test_golden_values_belong_to_version_1():
    assert ALGORITHM_VERSION == 1  # another algorithm needs a new version, not new golden values


def test_philox_of_the_oracle_gives_the_published_answer():
    # published with Random123: counter and key all zero
    assert oracle.philox(0, (0, 0)) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


def test_words_have_their_golden_values():
    expected = [0x92301D0C401521B7, 0x910DEFA4397EC289, 0xE9787EF5DAFA34A5, 0x7E34F46266D64694, 0x307D6A38DA2A2347]
    assert words(0, "block", "model.weight/64", 5).tolist() == expected
    assert words(42, "gaussian", "/16", 2).tolist() == [0xC7B64B052415C23E, 0x848C18F18605D3AD]


@pytest.mark.parametrize("stream", STREAMS)
def test_words_equal_those_of_plain_integer_arithmetic(stream):
    actual = words(*stream)
    assert actual.dtype == np.uint64
    assert actual.tolist() == oracle.words(*stream)


def test_words_do_not_depend_on_the_count():
    whole = words(1, "block", "a", 1000)
    for count in (0, 1, 3, 4, 5, 999):
        np.testing.assert_array_equal(words(1, "block", "a", count), whole[:count])


@pytest.mark.parametrize(
    "other", [(2, "block", "a"), (1, "dense", "a"), (1, "block", "b"), (1, "block", "a/"), (11, "block", "a")]
)
def test_words_differ_between_streams(other):
    assert not np.isin(words(*other, 1000), words(1, "block", "a", 1000)).any()


def test_normals_have_their_golden_values():
    raw = uint64([0x92301D0C401521B7, 0x910DEFA4397EC289, 0xE9787EF5DAFA34A5, 0x7E34F46266D64694, 0, 2**63])
    grid = [23467, 21991, 177359, -2301, -1076041, 1]
    assert normals(raw).tolist() == [value / 2**17 for value in grid]


def test_normals_equal_those_of_another_inverse_distribution_function():
    raw = oracle.words(7, "gaussian", "other", 20_000)
    assert normals(uint64(raw)).tolist() == [oracle.normal(word) for word in raw]


def test_normals_of_extreme_words_are_finite():
    extremes = normals(uint64([0, 2**11 - 1, 2**64 - 2**11 - 1, 2**64 - 2**11, 2**64 - 1]))
    assert np.isfinite(extremes).all()
    assert (np.diff(extremes) >= 0).all()


def test_normals_are_normal():
    drawn = normals(words(3, "gaussian", "sample", 100_000))
    assert kstest(drawn, "norm").pvalue > 1e-3
    for shift in (1, 2, 4):  # adjacent values, and equal lanes of adjacent blocks
        assert abs(np.corrcoef(drawn[:-shift], drawn[shift:])[0, 1]) < 0.015


def test_normal_rows_have_their_golden_values():
    expected = [
        ["-0x1.254f7c0000000p+0", "-0x1.6c50140000000p+0", "0x1.e979820000000p-2", "0x1.5122a20000000p-1"],
        ["-0x1.30d05c0000000p-2", "-0x1.88953a0000000p-1", "-0x1.cb135c0000000p+0", "-0x1.50019e0000000p-2"],
    ]
    actual = normal_rows(3, "gaussian", "", 2, 4)
    assert actual.dtype == np.float32
    assert [[value.hex() for value in row] for row in actual.tolist()] == expected


@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 1), (5, 2), (3, 7), (40, 64), (2, 1024)])
def test_normal_rows_equal_their_definition(rows, width):
    actual = normal_rows(5, "dense", "x", rows, width)
    np.testing.assert_array_equal(actual, oracle.normal_rows(5, "dense", "x", rows, width).astype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(actual.astype(float), axis=1), width**0.5, rtol=1e-7)
    np.testing.assert_array_equal(normal_rows(5, "dense", "x", rows + 3, width)[:rows], actual)


def test_normal_rows_are_never_undefined():
    # rounded to the nearest grid point, one normal in 160,000 would be 0, and a row of one zero has no direction
    np.testing.assert_array_equal(np.abs(normal_rows(0, "dense", "x", 500_000, 1)), 1)


def test_signs_and_permutations_have_their_golden_values():
    signs, permutation = signs_and_permutations(5, "layer.0.weight", 2, 8)
    assert signs.tolist() == [
        [[-1, 1, -1, 1, 1, -1, 1, -1], [-1, -1, 1, 1, -1, -1, 1, 1]],
        [[1, 1, 1, -1, -1, 1, -1, 1], [-1, -1, 1, 1, 1, 1, -1, 1]],
    ]
    assert permutation.tolist() == [[7, 5, 1, 0, 3, 6, 2, 4], [2, 3, 0, 5, 7, 4, 6, 1]]
    assert (signs.dtype, permutation.dtype) == (np.int8, np.int64)


@pytest.mark.parametrize(("count", "n"), [(0, 4), (3, 1), (7, 2), (5, 16), (4, 64), (2, 128), (2, 1024)])
def test_signs_and_permutations_equal_those_of_plain_integer_arithmetic(count, n):
    signs, permutation = signs_and_permutations(9, "w", count, n)
    expected = oracle.blocks(9, "w", count, n)
    assert (signs.shape, permutation.shape) == ((count, 2, n), (count, n))
    assert signs[:, 0].tolist() == [block[0] for block in expected]
    assert signs[:, 1].tolist() == [block[2] for block in expected]
    assert permutation.tolist() == [block[1] for block in expected]
    np.testing.assert_array_equal(np.abs(signs), 1)
    np.testing.assert_array_equal(np.sort(permutation, axis=1), np.broadcast_to(np.arange(n), (count, n)))


def test_signs_and_permutations_are_balanced():
    signs, permutation = signs_and_permutations(0, "w", 4000, 16)
    # sums over 4000 blocks, within 4.5 standard deviations
    assert np.abs(signs.sum(axis=0, dtype=int)).max() < 4.5 * 4000**0.5
    counts = np.stack([(permutation == k).sum(axis=0) for k in range(16)])
    assert np.abs(counts - 250).max() < 4.5 * (250 * 15 / 16) ** 0.5


def test_blocks_do_not_depend_on_the_count():
    whole, part = signs_and_permutations(0, "w", 9, 16), signs_and_permutations(0, "w", 4, 16)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[:4], b)


@pytest.mark.parametrize("other", [(1, "w"), (0, "v")])
def test_blocks_differ_between_seeds_and_names(other):
    for a, b in zip(signs_and_permutations(0, "w", 1, 128), signs_and_permutations(*other, 1, 128), strict=True):
        assert (a != b).mean() > 0.3
