"""What every projection promises, against its P in float64."""

import copy
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.oracle import TOLERANCE, columns, draw, error

from peft_intrinsic.projection import (
    OF_VALUES,
    PROJECTIONS,
    Shape,
    Shapes,
    Spec,
    TensorProjection,
    ValueBias,
    allocation,
)
from peft_intrinsic.projection.subspace import Group, SubspaceWriter

ROWS = allocation.ROWS
RANDOM = [name for name in PROJECTIONS if name not in ("trajectory", *OF_VALUES)]
SHAPES = {"a": Shape(24, 41)}
SEVERAL = {"m": Shape(20, 70), "a": Shape(50, 33), "z": Shape(3, 1)}

# name: (d, n, shapes, row limit). The names are not sorted, because allocation follows the sorted names.
CASES = {
    "d1-n1": (1, 1, {"b": (3, 2), "a": (1, 1)}, ROWS),
    "d2-n1": (2, 1, {"b": (3, 5), "a": (7, 1, "bias")}, ROWS),
    "d2-n4": (2, 4, {"b": (5, 9), "a": (7, 1, "norm")}, ROWS),
    "d1-n4-shared": (1, 4, {"b": (5, 9), "a": (7, 1, "norm"), "c": (2, 6, "head")}, ROWS),
    "d7-n4-chunks": (7, 4, {"b": (21, 7), "a": (17, 1, "bias"), "c": (8, 3, "embedding")}, 8),
    "d20-n4-depth": (20, 4, {"b": (21, 9, "matrix", True), "a": (17, 1, "bias")}, 8),
    "d5-n4-real-chunks": (5, 4, {"a": (16390, 3)}, ROWS),
    "d200-n16-depth": (200, 16, {"b": (9, 150), "a": (11, 1, "bias"), "c": (20, 61)}, ROWS),
    "d200-n64": (200, 64, {"z": (30, 129), "b": (13, 1, "norm"), "a": (8, 100)}, ROWS),
    "d200-n256": (200, 256, {"b": (30, 77), "a": (13, 1, "bias")}, ROWS),
    "d300-n16-edge": (300, 16, {"a": (20, 33), "b": (5, 1)}, ROWS),
    "d170-n8-all": (170, 8, {"b": (10, 13), "a": (7, 5), "v": (5, 1, "bias")}, ROWS),
    "d5000-n64": (5000, 64, {"w": (20, 650)} | {f"v{i}": (80, 1, "bias") for i in range(70)}, ROWS),
    "d40-n8192": (40, 8192, {"a": (12, 5)}, ROWS),
}
FEW = ["d1-n1", "d2-n4", "d20-n4-depth", "d170-n8-all"]
PARAMETERS = [("fastfood", name, "fan_in") for name in CASES]
PARAMETERS += itertools.product(("fastfood", "global"), ("d1-n4-shared", "d200-n64"), ("fan_in", "isometric"))
PARAMETERS += itertools.product(PROJECTIONS, FEW, ("fan_in", "isometric"))
PARAMETERS = [case for case in PARAMETERS if case[:2] != ("value_lora", "d170-n8-all")]  # it has 22 values

# P of seed 1, d = 5, n = 4, times (1, -2, 3, 0.5, -0.25)
GOLDEN = {
    ("fastfood", "fan_in"): {
        "w": [
            [479.367136, 16.3377069, -35.4629469, -161.298726, 338.72264],
            [408.670582, 261.933752, 63.6492695, 327.345549, -104.92103],
            [474.203713, 283.004234, 183.083018, 221.503345, -96.5413094],
        ],
        "b": [[3207.13833], [701.969925]],
    },
    ("fastfood", "isometric"): {
        "w": [
            [1.40004114, 0.0477159572, -0.103573192, -0.471089556, 0.989274387],
            [1.19356457, 0.765004525, 0.185894253, 0.956046421, -0.306432685],
            [1.38496083, 0.826543039, 0.534712828, 0.646923354, -0.281958846],
        ],
        "b": [[1.65582808], [0.362423255]],
    },
    ("dense", "fan_in"): {
        "w": [[280.345719, 47.9353925, -62.0726396, 498.643621, -34.0304662]],
        "b": [[-142.425662], [-207.667886]],
    },
    ("value_bias", "fan_in"): {
        "w": [
            [400.006104, 659.430664, 459.285522, 439.972443, 740.711487],
            [540.566284, 521.253235, 321.108063, 621.847168, 602.534119],
            [402.388916, 383.075867, 683.81488, 483.669739, 464.356689],
        ],
        "b": [[6.72309113], [-223.505707]],
    },
    ("value_bias", "isometric"): {
        "w": [
            [0.596294045, 0.9830212, 0.684662402, 0.655872226, 1.10418761],
            [0.805828691, 0.777038515, 0.478679657, 0.926994979, 0.898204803],
            [0.599845946, 0.57105577, 1.01937115, 0.721012294, 0.692222059],
        ],
        "b": [[0.0672308803], [-2.23505688]],
    },
}


def write_subspace(path, d: int, shapes: Shapes) -> str:
    """A subspace file with random directions in two groups, of which the first has room for a third of θ."""
    first, *rest = shapes
    groups = [[first], rest] if rest and d > 1 else [list(shapes)]
    sizes = [max(1, d // 3), d] if len(groups) == 2 else [d]
    parts = [Group(str(i), names, [2.0 + i] * sizes[i], []) for i, names in enumerate(groups)]
    stored = {n: (s.cols, s.rows) if s.transposed else (s.rows, s.cols) for n, s in shapes.items()}
    with SubspaceWriter(path, stored, parts, torch.float32, {"base": "", "snapshots": "3"}) as writer:
        for i, names in enumerate(groups):
            for name in names:
                writer.write(name, 0, draw(sizes[i], shapes[name].size, seed=i))
    return str(path)


def make_values(shapes: Shapes, weights: bool) -> dict[str, ValueBias]:
    """Every parameter as the bias (or weight) of a value projection, whose output has five features; so W_ov has zero
    singular values."""
    result = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        size = shape.rows if weights else shape.size
        measured = 0.5 + i, np.cos(np.arange(shape.cols) + i) if weights else None
        result[name] = ValueBias(0, size, weights, partial(np.add, values(5, size), i), partial(tuple, measured))
    return result


def values(rows: int, cols: int) -> np.ndarray:
    """A matrix from a formula, the same on every machine."""
    return (np.arange(rows * cols) * 37 % 101 - 50.0).reshape(rows, cols) / 64


def make_spec(folder, projection: str, d: int, shapes: Shapes, n: int = 8, scale="fan_in", seed: int = 3) -> Spec:
    subspace = write_subspace(folder / "subspace.safetensors", d, shapes) if projection == "trajectory" else None
    values = make_values(shapes, projection == "value_lora") if projection in OF_VALUES else {}
    return Spec(d, seed, n, scale, subspace=subspace, values=values)


@pytest.fixture(params=dict.fromkeys(PARAMETERS), ids="-".join, scope="module")
def case(request, tmp_path_factory):
    """The tensors' projections, their P from the oracle (`[d, rows, cols]`), and a θ."""
    projection, name, scale = request.param
    d, n, sizes, limit = CASES[name]
    shapes = {name: Shape(*size) for name, size in sizes.items()}
    spec = make_spec(tmp_path_factory.mktemp("case"), projection, d, shapes, n, scale)
    if projection == "dense":
        matrices = oracle.dense(d, spec.seed, scale, shapes)
    elif projection == "trajectory":
        matrices = oracle.trajectory(d, scale, shapes, spec.subspace)
    elif projection in OF_VALUES:
        matrices = oracle.value_bias(d, spec.seed, scale, shapes, spec.values)
    else:
        matrices = oracle.fastfood(d, spec.seed, n, scale, shapes, limit, projection == "global")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "ROWS", limit)
        projections = PROJECTIONS[projection](spec, shapes)
    assert list(projections) == list(shapes)
    return projections, matrices, draw(d)


@pytest.fixture(params=PROJECTIONS, scope="module")
def small(request, tmp_path_factory) -> tuple[TensorProjection, torch.Tensor]:
    """The projection of a matrix of two blocks, and a θ."""
    spec = make_spec(tmp_path_factory.mktemp("small"), request.param, 20, SHAPES, 32)
    return PROJECTIONS[request.param](spec, SHAPES)["a"], draw(20)


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


def offset(theta: torch.Tensor, p: np.ndarray) -> np.ndarray:
    return np.tensordot(theta.double().numpy(), p, 1)


def adjoint(g: torch.Tensor, p: np.ndarray) -> np.ndarray:
    """Pᵀg."""
    return np.tensordot(p, g.double().numpy(), 2)


@pytest.mark.slow
def test_offset_is_p_times_theta_and_its_gradient_the_adjoint(case):
    projections, matrices, theta = case
    total = np.zeros(len(theta))
    parameter = leaf(theta)
    for name, p in projections.items():
        g = draw(p.rows, p.cols, seed=1)
        y = p.materialize(parameter)
        assert error(y, offset(theta, matrices[name])) < TOLERANCE[torch.float32]
        (y * g).sum().backward()
        total += adjoint(g, matrices[name])
    assert error(parameter.grad, total) < TOLERANCE[torch.float32]  # <Pθ, g> = <θ, Pᵀg>, for every θ


def test_consecutive_slabs_are_the_offset(case):
    projections, matrices, theta = case
    for name, p in projections.items():
        cuts = sorted({0, p.rows // 2, p.rows // 2 + 1, p.rows - 1, p.rows})
        slabs = [p.slab(theta, start, stop) for start, stop in itertools.pairwise(cuts)]
        assert [len(slab) for slab in slabs] == np.diff(cuts).tolist()
        # The error is relative to the whole: a single entry can be a small difference of large terms.
        assert error(torch.cat(slabs), offset(theta, matrices[name])) < TOLERANCE[torch.float32]


def test_linear_multiplies_by_the_offset_and_has_its_gradients(case):
    projections, matrices, theta = case
    for name, p in projections.items():
        w = offset(theta, matrices[name])
        parameter, x, g = leaf(theta), leaf(draw(2, 3, p.cols, seed=1)), draw(2, 3, p.rows, seed=2)
        y = p.linear(x, parameter)
        assert error(y, x.detach().double().numpy() @ w.T) < TOLERANCE[torch.float32]
        (y * g).sum().backward()
        assert error(x.grad, g.double().numpy() @ w) < TOLERANCE[torch.float32]
        outer = torch.einsum("abr, abc -> rc", g.double(), x.detach().double())
        longest = max(1, p.rows / 1000) ** 0.5  # a float32 sum over the rows: its rounding grows as √rows
        assert error(parameter.grad, adjoint(outer, matrices[name])) < TOLERANCE[torch.float32] * longest


def test_gather_returns_rows_of_the_offset_and_has_their_gradients(case):
    projections, matrices, theta = case
    for name, p in projections.items():
        index = torch.tensor([[0, p.rows - 1, p.rows // 2], [p.rows - 1, 0, p.rows - 1]])  # repeated on purpose
        parameter, g = leaf(theta), draw(2, 3, p.cols, seed=1)
        y = p.gather(index, parameter)
        assert error(y, offset(theta, matrices[name])[index]) < TOLERANCE[torch.float32]
        assert error(y, p.materialize(theta)[index].double().numpy()) < TOLERANCE[torch.float32]
        (y * g).sum().backward()
        dense = torch.zeros(p.rows, p.cols).index_add_(0, index.flatten(), g.flatten(0, 1))
        assert error(parameter.grad, adjoint(dense, matrices[name])) < TOLERANCE[torch.float32]


def test_each_sample_of_a_batch_uses_its_own_theta(case):
    projections, matrices, theta = case
    theta = draw(3, len(theta), seed=3)
    for name, p in projections.items():
        w = offset(theta, matrices[name])
        assert error(p.materialize(theta), w) < TOLERANCE[torch.float32]
        assert error(p.slab(theta, 0, p.rows // 2 + 1), w[:, : p.rows // 2 + 1]) < TOLERANCE[torch.float32]
        for between in ((), (2,), (2, 2)):
            x = draw(3, *between, p.cols, seed=4)
            expected = np.einsum("b...c,brc->b...r", x.double().numpy(), w)
            assert error(p.linear(x, theta), expected) < TOLERANCE[torch.float32]
            index = torch.arange(x[..., 0].numel()).view(x.shape[:-1]) * 7 % p.rows
            expected = np.stack([w[i][index[i]] for i in range(3)])
            assert error(p.gather(index, theta), expected) < TOLERANCE[torch.float32]


def test_offset_is_linear_in_theta(case):
    projections, _, theta = case
    other = draw(len(theta), seed=4)
    for p in projections.values():
        y = p.materialize(2 * theta - 3 * other)
        expected = 2 * p.materialize(theta).double() - 3 * p.materialize(other).double()
        assert error(y, expected.numpy()) < TOLERANCE[torch.float32]
        assert not p.materialize(0 * theta).any()


@pytest.mark.parametrize("shape", [(0,), (), (1,), (2, 0, 3)])
def test_linear_and_gather_take_batches_of_any_shape(small, shape):
    p, theta = small
    assert p.linear(torch.ones(*shape, p.cols), theta).shape == (*shape, p.rows)
    for dtype in (torch.int64, torch.int32):
        assert p.gather(torch.zeros(shape, dtype=dtype), theta).shape == (*shape, p.cols)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_returns_the_dtype_of_its_input(small, dtype):
    p, theta = small
    x = draw(5, p.cols).to(dtype)
    y = p.linear(x, theta)
    assert y.dtype == dtype
    assert error(y, x.double().numpy() @ p.materialize(theta).double().numpy().T) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_offsets_are_float32_for_theta_of_any_dtype(small, dtype):
    p, theta = small
    theta = theta.to(dtype)
    index = torch.tensor([3, 23])
    assert p.materialize(theta).dtype == torch.float32
    assert torch.equal(p.materialize(theta), p.materialize(theta.float()))
    assert torch.equal(p.gather(index, theta), p.gather(index, theta.float()))
    parameter = leaf(theta)
    p.materialize(parameter).sum().backward()
    assert parameter.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_offsets(small, dtype):
    p, theta = small
    index = torch.tensor([3, 23])
    expected = p.materialize(theta), p.gather(index, theta)
    with torch.autocast("cpu", dtype=dtype):
        actual = p.materialize(theta), p.gather(index, theta)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_projections_built_and_used_in_inference_mode_still_train(tmp_path, projection):
    spec, build = make_spec(tmp_path, projection, 20, SHAPES, 32, seed=1234), PROJECTIONS[projection]
    with torch.inference_mode():
        first = build(spec, SHAPES)["a"]
        first.materialize(draw(20))
    second = build(spec, SHAPES)["a"]  # G may come from a cache
    for p in (second, first):
        theta, x = leaf(draw(20)), leaf(draw(2, 41))
        (p.materialize(theta).sum() + p.linear(x, theta).sum() + p.gather(torch.tensor([1]), theta).sum()).backward()
        assert theta.grad.all()
        assert x.grad.all()


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_neither_default_device_nor_order_of_tensors_changes_offsets(tmp_path, projection):
    spec, build, theta = make_spec(tmp_path, projection, 50, SEVERAL), PROJECTIONS[projection], draw(50)
    expected = build(spec, SEVERAL)
    with torch.device("meta"):  # as while an empty model is made
        again = build(spec, SEVERAL)
    for projections in (again, build(spec, dict(reversed(SEVERAL.items())))):
        for name, p in projections.items():
            assert torch.equal(p.materialize(theta), expected[name].materialize(theta))


@pytest.mark.parametrize("projection", [*RANDOM, *OF_VALUES])
def test_seed_and_name_change_offsets(tmp_path, projection):
    shapes = {"a": Shape(20, 70), "b": Shape(20, 70)}
    specs = [make_spec(tmp_path, projection, 30, shapes, 32, seed=seed) for seed in (0, 1)]
    first, second = (PROJECTIONS[projection](spec, shapes) for spec in specs)
    a, b, other = (p.materialize(draw(30)) for p in (first["a"], first["b"], second["a"]))
    assert error(a, b.double().numpy()) > 0.5
    assert error(a, other.double().numpy()) > 0.5


@pytest.mark.parametrize(("projection", "scale"), GOLDEN)
def test_golden_offsets(tmp_path, projection, scale):
    theta = torch.tensor([1, -2, 3, 0.5, -0.25])
    shapes = {"w": Shape(3, 5), "b": Shape(2, 1, "matrix" if projection == "dense" else "bias")}
    projections = PROJECTIONS[projection](make_spec(tmp_path, projection, 5, shapes, 4, scale, seed=1), shapes)
    for name, expected in GOLDEN[projection, scale].items():
        actual = projections[name].materialize(theta)[: len(expected)]
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("projection", RANDOM)
@pytest.mark.parametrize(("d", "n"), [(1, 1), (3, 1), (48, 16), (96, 16)])
def test_every_weight_has_the_same_norm(monkeypatch, projection, d, n):
    """If slices are full: rows of G have the length √n and H is orthogonal. Dense rows of P have it for every d."""
    monkeypatch.setattr(allocation, "ROWS", 80)
    shapes = {"a": Shape(5, 70), "b": Shape(130, 37), "v": Shape(200, 1, "norm")}
    for name, p in PROJECTIONS[projection](Spec(d, 0, n, "fan_in"), shapes).items():
        expected = 512 / d**0.25 * oracle.natural(shapes[name])
        np.testing.assert_allclose(columns(p, d).norm(dim=0).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("projection", "n"), [("fastfood", 64), ("fastfood", 256), ("global", 64), ("global", 256), ("dense", 1)]
)
def test_columns_of_isometric_p_have_length_one(projection, n):
    d, shapes = 50, {"a": Shape(384, 192), "b": Shape(192, 384), "v": Shape(384, 1, "bias")}
    gram = torch.zeros(d, d)
    for p in PROJECTIONS[projection](Spec(d, 0, n, "isometric"), shapes).values():
        part = columns(p, d).flatten(1)
        gram += part @ part.T
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert gram.diag().mean().item() == pytest.approx(1, abs=1e-2)
    if projection == "fastfood":  # a coordinate has one tensor, down to the vector's 384 weights
        assert 0.6 < eigenvalues[0] < eigenvalues[-1] < 1.5
    else:  # Gaussian columns: (1 ± √(d/D))² = 0.963 and 1.037
        assert 0.94 < eigenvalues[0] < eigenvalues[-1] < 1.06


def test_copies_share_the_projection(small):
    p, _ = small
    assert copy.deepcopy({"a": [p]})["a"][0] is p


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_factor_multiplies_offsets_bitwise(tmp_path, projection):
    spec, build = make_spec(tmp_path, projection, 50, SEVERAL), PROJECTIONS[projection]
    scaled = build(replace(spec, factor=256), SEVERAL)
    for name, p in build(spec, SEVERAL).items():
        assert torch.equal(scaled[name].materialize(draw(50)), 256 * p.materialize(draw(50)))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_number_of_threads_does_not_change_the_offset(tmp_path, projection):
    """Not a bit of it, except where BLAS multiplies: on some processors, its sums depend on the threads."""
    d, shapes = (300, {"a": Shape(700, 650)}) if projection in ("fastfood", "global") else (60, {"a": Shape(300, 250)})
    p = PROJECTIONS[projection](make_spec(tmp_path, projection, d, shapes, 64), shapes)["a"]
    theta, threads = draw(d), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = p.materialize(theta)
        torch.set_num_threads(4)
        four = p.materialize(theta)
        if projection in ("dense", "trajectory", *OF_VALUES):
            assert error(four, one.double().numpy()) < TOLERANCE[torch.float32]
        else:
            assert torch.equal(four, one)
    finally:
        torch.set_num_threads(threads)
