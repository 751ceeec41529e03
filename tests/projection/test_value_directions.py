"""What only the projection of value biases promises: its directions, and θ shared with a head."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers.oracle import allocate, columns, draw, error

from peft_intrinsic.projection import Shape, Spec, ValueBias
from peft_intrinsic.projection.fastfood import build_fastfood
from peft_intrinsic.projection.value_bias import build_value_bias, find_directions


def make_matrix(rows: int, cols: int, values: list[float]) -> np.ndarray:
    """A random matrix with these singular values, and zeros."""
    left, right = (np.linalg.qr(draw(n, n, seed=n).double().numpy())[0] for n in (rows, cols))
    return left[:, : len(values)] * values @ right[:, : len(values)].T


def start(n: int, k: int) -> np.ndarray:
    return draw(n, k, seed=1).double().numpy()


def test_directions_span_the_leading_singular_vectors_where_there_is_a_gap():
    matrix = make_matrix(30, 20, [10, 10, 9] + [0.05] * 17)
    q = find_directions(matrix, start(20, 3))
    leading = np.linalg.svd(matrix)[2][:3]
    np.testing.assert_allclose(q @ q.T, leading.T @ leading, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 30])
def test_directions_are_orthonormal_and_more_of_them_begin_with_the_same(rows):
    matrix = draw(rows, 20, seed=2).double().numpy()
    whole = find_directions(matrix, start(20, 20))
    np.testing.assert_allclose(whole.T @ whole, np.eye(20), atol=1e-12)
    np.testing.assert_allclose(find_directions(matrix, start(20, 20)[:, :6]), whole[:, :6], atol=1e-9)


@pytest.mark.parametrize("values", [[1.0] * 12, [2.0] * 6 + [1.0] * 6, [3.0] * 4, []])
def test_directions_do_not_jump_at_equal_or_zero_singular_values(values):
    matrix = make_matrix(15, 12, values) if values else np.zeros((15, 12))
    for k in (3, 12):
        change = 1e-7 * draw(15, 12, seed=5).double().numpy() * (matrix != 0)
        moved = find_directions(matrix + change, start(12, k)) - find_directions(matrix, start(12, k))
        assert np.abs(moved).max() < 1e-4


def test_rotating_the_output_of_the_layer_does_not_change_directions():
    matrix, rotation = draw(15, 12, seed=2).double().numpy(), np.linalg.qr(draw(15, 15, seed=3).double().numpy())[0]
    np.testing.assert_allclose(
        find_directions(rotation @ matrix, start(12, 5)), find_directions(matrix, start(12, 5)), atol=1e-12
    )


def make_spec(d: int, sizes: dict[str, int], scale: str = "fan_in", first: int = 0) -> Spec:
    matrices = {name: draw(8, size, seed=size).double().numpy() for name, size in sizes.items()}
    values = {
        name: ValueBias(first, size, False, partial(matrices.get, name), lambda: (0.3, None))
        for name, size in sizes.items()
    }
    return Spec(d, 1, 4, scale, values=values)


def test_queries_and_keys_of_a_fused_layer_have_no_offset_and_do_not_count():
    spec, shapes = make_spec(12, {"a": 6, "b": 6}, first=12), {name: Shape(18, 1, "bias") for name in "ab"}
    for p in build_value_bias(spec, shapes).values():
        offset = p.materialize(draw(12)).squeeze()
        assert not offset[:12].any()
        assert offset[12:].all()
    with pytest.raises(ValueError, match="d=13 exceeds the 12 weights"):
        build_value_bias(make_spec(13, {"a": 6, "b": 6}, first=12), shapes)


def test_a_head_gets_its_part_of_theta_and_a_fastfood_projection():
    shapes = {
        "a": Shape(6, 1, "bias"),
        "b": Shape(6, 1, "bias"),
        "head": Shape(3, 20, "head"),
        "z": Shape(3, 1, "bias"),
    }
    spec = make_spec(38, {"a": 6, "b": 6})
    projections, coordinates = build_value_bias(spec, shapes), allocate(38, shapes)
    assert coordinates == {"a": (0, 2), "b": (2, 2), "head": (4, 32), "z": (36, 2)}
    for name, p in projections.items():
        first, count = coordinates[name]
        used = columns(p, 38).flatten(1).any(1)
        assert used.nonzero().squeeze(1).tolist() == list(range(first, first + count))
    alone = build_fastfood(spec, {"head": shapes["head"]}, {"head": (4, 32)})["head"]
    assert torch.equal(projections["head"].materialize(draw(38)), alone.materialize(draw(38)))


@pytest.mark.parametrize("d", [1, 2, 5, 18])
def test_columns_of_isometric_p_are_orthonormal(d):
    """With fewer coordinates than biases too, where biases share them."""
    spec, shapes = make_spec(d, dict.fromkeys("abc", 6), "isometric"), {name: Shape(6, 1, "bias") for name in "abc"}
    p = torch.cat([columns(each, d).flatten(1) for each in build_value_bias(spec, shapes).values()], 1).double()
    assert error(p @ p.T, np.eye(d)) < 1e-6
