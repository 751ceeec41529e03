"""What Fastfood promises of P as a whole: norms, isometry, coverage, independence, and the numbers themselves."""

import gc
import weakref

import numpy as np
import pytest
import torch
from helpers import oracle
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_intrinsic.projection import FastfoodTensor, Shape, Shapes, Spec, allocation
from peft_intrinsic.projection.fastfood import build_fastfood, build_global

SHAPES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=6).map(
    lambda shapes: {f"w{i}": Shape(*shape) for i, shape in enumerate(shapes)}
)
BLOCK_SIZES = st.sampled_from([8, 16, 64])  # in tinier blocks signs can cancel
SEARCH = settings(deadline=None, derandomize=True, database=None, max_examples=60)

# P of seed 1, d = 5, n = 4, times (1, -2, 3, 0.5, -0.25)
GOLDEN = {
    "fan_in": {
        "w": [
            [479.367136, 16.3377069, -35.4629469, -161.298726, 338.72264],
            [408.670582, 261.933752, 63.6492695, 327.345549, -104.92103],
            [474.203713, 283.004234, 183.083018, 221.503345, -96.5413094],
        ],
        "b": [[3207.13833], [701.969925]],
    },
    "isometric": {
        "w": [
            [1.40004114, 0.0477159572, -0.103573192, -0.471089556, 0.989274387],
            [1.19356457, 0.765004525, 0.185894253, 0.956046421, -0.306432685],
            [1.38496083, 0.826543039, 0.534712828, 0.646923354, -0.281958846],
        ],
        "b": [[1.65582808], [0.362423255]],
    },
}


def columns(p: FastfoodTensor, d: int) -> torch.Tensor:
    """P, one unit vector after the other: `[d, rows, cols]`."""
    return torch.stack([p.materialise(unit) for unit in torch.eye(d)])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", GOLDEN)
def test_golden_offset(scale):
    projections = build_fastfood(Spec(5, 1, 4, scale), {"w": Shape(3, 5), "b": Shape(2, 1, "bias")})
    theta = torch.tensor([1, -2, 3, 0.5, -0.25])
    for name, expected in GOLDEN[scale].items():
        np.testing.assert_allclose(projections[name].materialise(theta).numpy(), expected, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("build", [build_fastfood, build_global])
@pytest.mark.parametrize("n", [64, 256])
def test_isometry(build, n):
    d = 200
    shapes = {"a": Shape(768, 384), "b": Shape(1536, 384), "c": Shape(384, 768), "v": Shape(768, 1, "bias")}
    gram = torch.zeros(d, d)
    for p in build(Spec(d, 0, n, "isometric"), shapes).values():
        part = columns(p, d).flatten(1)
        gram += part @ part.T
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert gram.diag().mean().item() == pytest.approx(1, abs=1e-2)
    if build is build_global:  # D = 1.18 M; otherwise a coordinate has one tensor, down to the vector's 768 weights
        assert 0.95 < eigenvalues[0] < 0.98
        assert 1.03 < eigenvalues[-1] < 1.06


@pytest.mark.parametrize(("d", "n"), [(1, 1), (3, 1), (48, 16), (96, 16)])
def test_every_weight_has_the_same_norm_when_slices_are_full(monkeypatch, d, n):
    # rows of G have the length √n and H is orthogonal, so nothing is left to chance unless θ is padded
    monkeypatch.setattr(allocation, "ROWS", 80)
    shapes = {"a": Shape(5, 70), "b": Shape(130, 37), "v": Shape(200, 1, "norm")}
    for name, p in build_fastfood(Spec(d, 0, n, "fan_in"), shapes).items():
        expected = 512 / d**0.25 * oracle.natural(shapes[name])
        np.testing.assert_allclose(columns(p, d).norm(dim=0).numpy(), expected, rtol=1e-5)


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
def test_every_coordinate_moves_something(share, n, shapes, limit, build):
    total = sum(shape.size for shape in shapes.values())
    d = max(1, int(share * total))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "ROWS", limit)
        theta = torch.zeros(d, requires_grad=True)
        for i, p in enumerate(build(Spec(d, 0, n, "fan_in"), shapes).values()):
            (p.materialise(theta) * draw(p.rows, p.cols, seed=i)).sum().backward()
        with pytest.raises(ValueError, match=f"d={total + 1} is more than the {total} weights"):
            build(Spec(total + 1, 0, n, "fan_in"), shapes)
    assert theta.grad.all()  # Pᵀg of a random g is 0 only where a column of P is


@pytest.mark.parametrize(("build", "d"), [(build_fastfood, 30), (build_fastfood, 150), (build_global, 30)])
def test_as_many_directions_as_coordinates(build, d):
    shapes = {"a": Shape(16, 16), "b": Shape(40, 1, "bias"), "c": Shape(10, 9), "h": Shape(2, 16, "head")}
    p = torch.cat([columns(p, d).flatten(1) for p in build(Spec(d, 0, 8, "fan_in"), shapes).values()], 1)
    values = torch.linalg.svdvals(p.double() / p.norm(dim=1, keepdim=True))
    assert values[-1] > 1e-6 * values[0]


VECTORS = {f"layer.{i}.{j}": Shape(1536 if j == 5 else 384, 1, "bias") for i in range(6) for j in range(10)}


@pytest.mark.parametrize("d", [60, 100, 250, 1000])
def test_coordinates_move_about_as_much(d):
    squares = torch.zeros(d)
    for p in build_fastfood(Spec(d, 0, 64, "fan_in"), VECTORS).values():
        squares += columns(p, d).flatten(1).square().sum(1)
    assert squares.max() / squares.min() < 4.5  # of norms, 2.1: one tensor in a coordinate, or two


def test_tensors_have_output_spaces_of_their_own():
    shapes = {f"w{i}": Shape(384, 384) for i in range(12)}
    moved = [p.materialise(draw(1000)) for p in build_fastfood(Spec(1000, 0, 64, "fan_in"), shapes).values()]
    assert torch.linalg.matrix_rank(moved[0]) == 64
    assert torch.linalg.matrix_rank(torch.cat(moved, 1)) == 384


def offsets(shapes: Shapes, d: int, n: int, **other) -> dict[str, torch.Tensor]:
    spec = Spec(**{"d": d, "seed": 0, "block_size": n, "scale": "fan_in"} | other)
    return {name: p.materialise(draw(d)) for name, p in build_fastfood(spec, shapes).items()}


@pytest.mark.parametrize("n", [64, 256, 2**14])
def test_the_windows_cost_no_more_memory_than_that(n):
    gaussian = build_fastfood(Spec(20, 0, n, "fan_in"), {"a": Shape(97, 24)})["a"].gaussian
    assert gaussian.on(torch.device("cpu")).numel() <= n * 97 + 2**18


def test_order_of_the_tensors_does_not_matter():
    shapes = {"m": Shape(20, 70), "a": Shape(50, 33), "z": Shape(3, 1)}
    forward, backward = offsets(shapes, 50, 8), offsets(dict(reversed(shapes.items())), 50, 8)
    assert all(torch.equal(forward[name], backward[name]) for name in shapes)


def test_seed_and_name_change_the_offset():
    first = offsets({"a": Shape(20, 70), "b": Shape(20, 70)}, 30, 32)
    assert oracle.error(first["a"], first["b"].double().numpy()) > 0.5
    second = offsets({"a": Shape(20, 70)}, 30, 32, seed=1)
    assert oracle.error(first["a"], second["a"].double().numpy()) > 0.5


@pytest.mark.parametrize("build", [build_fastfood, build_global])
def test_vectors_store_few_numbers(build):
    """The check before an attachment counts on it: however many coordinates a vector mixes, in whatever block."""
    for d, n in ((6, 64), (16, 64), (17, 64), (300, 512)):
        projection = build(Spec(d, 0, n, "fan_in"), {"a": Shape(400, 1)})["a"]
        tensors = [t for state in projection._state.values() for t in (state if isinstance(state, tuple) else [state])]
        assert sum(t.numel() for t in tensors) <= 16 * 400


def test_a_default_device_changes_nothing():
    shapes, theta = {"a": Shape(20, 1), "b": Shape(9, 7)}, draw(12)
    expected = build_fastfood(Spec(12, 0, 8, "fan_in"), shapes)
    with torch.device("meta"):
        found = build_fastfood(Spec(12, 0, 8, "fan_in"), shapes)
    assert all(torch.equal(found[name].materialise(theta), expected[name].materialise(theta)) for name in shapes)


def test_one_g_for_each_device_and_none_when_unused():
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
