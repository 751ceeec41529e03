"""What only Fastfood promises: tiles, coverage of θ and of the output space, memory."""

import gc
import weakref

import pytest
import torch
from helpers.oracle import columns, draw
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_intrinsic.projection import Shape, Spec, allocation
from peft_intrinsic.projection.fastfood import build_fastfood, build_global

SHAPES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=6).map(
    lambda shapes: {f"w{i}": Shape(*shape) for i, shape in enumerate(shapes)}
)
BLOCK_SIZES = st.sampled_from([8, 16, 64])  # in tinier blocks signs can cancel
SEARCH = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def test_tensors_with_more_rows_than_the_limit_are_cut_into_chunks(monkeypatch):
    monkeypatch.setattr(allocation, "ROWS", 8)
    for rows, chunks in [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3)]:
        p = build_fastfood(Spec(3, 0, 4, "fan_in"), {"a": Shape(rows, 6)})["a"]
        assert p.factor(draw(3)).shape == (chunks, 4, 6)
        assert p.materialize(draw(3)).shape == (rows, 6)


def test_offset_is_the_basis_times_the_factor(monkeypatch):
    monkeypatch.setattr(allocation, "ROWS", 8)
    p = build_fastfood(Spec(3, 0, 4, "fan_in"), {"a": Shape(21, 7)})["a"]
    theta = draw(3)
    product = torch.cat([p.basis(theta, r) @ p.factor(theta)[r] for r in range(3)])
    assert torch.equal(product, p.materialize(theta))


@SEARCH
@given(
    share=st.floats(0, 1),
    n=BLOCK_SIZES,
    shapes=SHAPES,
    limit=st.sampled_from([4, 16384]),
    build=st.sampled_from([build_fastfood, build_global]),
)
@example(share=1, n=8, shapes={"a": Shape(2, 60)}, limit=16384, build=build_fastfood)
@example(share=1, n=16, shapes={"a": Shape(30, 33), "b": Shape(9, 1)}, limit=16384, build=build_fastfood)
@example(share=1, n=16, shapes={"a": Shape(3, 17), "b": Shape(2, 31)}, limit=4, build=build_global)
def test_every_coordinate_has_an_effect_on_some_weight(share, n, shapes, limit, build):
    total = sum(shape.size for shape in shapes.values())
    d = max(1, int(share * total))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "ROWS", limit)
        theta = torch.zeros(d, requires_grad=True)
        for i, p in enumerate(build(Spec(d, 0, n, "fan_in"), shapes).values()):
            (p.materialize(theta) * draw(p.rows, p.cols, seed=i)).sum().backward()
        with pytest.raises(ValueError, match=f"d={total + 1} exceeds the {total} weights"):
            build(Spec(total + 1, 0, n, "fan_in"), shapes)
    assert theta.grad.all()  # Pᵀg of a random g is 0 only where a column of P is


@pytest.mark.parametrize(("build", "d"), [(build_fastfood, 30), (build_fastfood, 150), (build_global, 30)])
def test_columns_of_p_are_linearly_independent(build, d):
    shapes = {"a": Shape(16, 16), "b": Shape(40, 1, "bias"), "c": Shape(10, 9), "h": Shape(2, 16, "head")}
    p = torch.cat([columns(p, d).flatten(1) for p in build(Spec(d, 0, 8, "fan_in"), shapes).values()], 1)
    values = torch.linalg.svdvals(p.double() / p.norm(dim=1, keepdim=True))
    assert values[-1] > 1e-6 * values[0]


VECTORS = {f"layer.{i}.{j}": Shape(1536 if j == 5 else 384, 1, "bias") for i in range(6) for j in range(10)}


@pytest.mark.parametrize("d", [60, 100, 250, 1000])
def test_lengths_of_the_columns_differ_by_a_small_factor(d):
    squares = torch.zeros(d)
    for p in build_fastfood(Spec(d, 0, 64, "fan_in"), VECTORS).values():
        squares += columns(p, d).flatten(1).square().sum(1)
    assert squares.max() / squares.min() < 4.5  # ratio of lengths 2.1: a coordinate has one tensor or two


def test_each_tensor_has_its_own_output_space():
    shapes = {f"w{i}": Shape(384, 384) for i in range(12)}
    offsets = [p.materialize(draw(1000)) for p in build_fastfood(Spec(1000, 0, 64, "fan_in"), shapes).values()]
    assert torch.linalg.matrix_rank(offsets[0]) == 64
    assert torch.linalg.matrix_rank(torch.cat(offsets, 1)) == 384


@pytest.mark.parametrize("n", [64, 256, 2**14])
def test_rows_of_g_exceed_the_largest_tensor_by_at_most_two_to_the_18_entries(n):
    gaussian = build_fastfood(Spec(20, 0, n, "fan_in"), {"a": Shape(97, 24)})["a"].gaussian
    assert gaussian.on(torch.device("cpu"))[0].numel() <= n * 97 + 2**18


@pytest.mark.parametrize("build", [build_fastfood, build_global])
def test_vectors_store_at_most_16_values_per_weight(build):
    """The check before attaching relies on it, for every d and block size."""
    for d, n in ((6, 64), (16, 64), (17, 64), (300, 512)):
        projection = build(Spec(d, 0, n, "fan_in"), {"a": Shape(400, 1)})["a"]
        assert sum(tensor.numel() for tensor in projection._state.on(torch.device("cpu"))) <= 16 * 400


def test_tensors_share_one_g_per_device_that_is_freed_after_use():
    tensors = list(
        build_fastfood(Spec(30, 123, 16, "fan_in"), {"a": Shape(20, 30), "b": Shape(20, 8), "c": Shape(20, 2)}).values()
    )
    for device in ("cpu", "meta"):
        assert len({id(tensor.gaussian.on(torch.device(device))) for tensor in tensors}) == 1
    again = build_fastfood(Spec(5, 123, 16, "isometric"), {"c": Shape(20, 2), "b": Shape(20, 8), "a": Shape(20, 30)})
    assert again["b"].gaussian is tensors[0].gaussian
    gone = weakref.ref(tensors[0].gaussian)
    del tensors, again
    gc.collect()
    assert gone() is None
