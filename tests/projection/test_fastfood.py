"""Fastfood against the dense oracle: offsets, factored products, gathers, and their gradients."""

import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.oracle import TOLERANCE, error

from peft_intrinsic.projection import Shape, Spec, allocation
from peft_intrinsic.projection.fastfood import build_fastfood, build_global

ROWS = allocation.ROWS
SEED = 3

# name: (d, n, shapes, row limit). Names out of order, because coordinates are dealt in that of the sorted names.
CASES = {
    "d1-n1": (1, 1, {"a": (3, 2)}, ROWS),
    "d2-n1": (2, 1, {"b": (3, 5), "a": (7, 1, "bias")}, ROWS),
    "d2-n4": (2, 4, {"b": (5, 9), "a": (7, 1, "norm")}, ROWS),
    "d1-n4-shared": (1, 4, {"b": (5, 9), "a": (7, 1, "norm"), "c": (2, 6, "head")}, ROWS),
    "d7-n4-chunks": (7, 4, {"b": (21, 7), "a": (17, 1, "bias"), "c": (8, 3, "embedding")}, 8),
    "d20-n4-depth": (20, 4, {"b": (21, 9), "a": (17, 1, "bias")}, 8),
    "d5-n4-real-chunks": (5, 4, {"a": (16390, 3)}, ROWS),
    "d200-n16-depth": (200, 16, {"b": (9, 150), "a": (11, 1, "bias"), "c": (20, 61)}, ROWS),
    "d200-n64": (200, 64, {"z": (30, 129), "b": (13, 1, "norm"), "a": (8, 100)}, ROWS),
    "d200-n256": (200, 256, {"b": (30, 77), "a": (13, 1, "bias")}, ROWS),
    "d300-n16-edge": (300, 16, {"a": (20, 33), "b": (5, 1)}, ROWS),
    "d170-n8-all": (170, 8, {"b": (10, 13), "a": (7, 5), "v": (5, 1, "bias")}, ROWS),
    "d5000-n64": (5000, 64, {"w": (20, 650)} | {f"v{i}": (80, 1, "bias") for i in range(70)}, ROWS),
    "d40-n8192": (40, 8192, {"a": (12, 5)}, ROWS),
}
OTHERS = ["d2-n4", "d20-n4-depth", "d200-n64"]
PARAMETERS = [(name, "fan_in", False) for name in CASES]
PARAMETERS += [(name, "fan_in", True) for name in OTHERS] + [(name, "isometric", True) for name in OTHERS]
PARAMETERS += [(name, "isometric", False) for name in OTHERS]


@pytest.fixture(params=PARAMETERS, ids=lambda p: "-".join(map(str, p)), scope="module")
def case(request):
    """The tensors' projections, their P from the oracle (`[d, rows, cols]`), and a θ."""
    name, scale, whole = request.param
    d, n, sizes, limit = CASES[name]
    shapes = {name: Shape(*size) for name, size in sizes.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "ROWS", limit)
        build = build_global if whole else build_fastfood
        projections = build(Spec(d, SEED, n, scale), shapes)
        assert list(projections) == list(shapes)
        yield projections, oracle.fastfood(d, SEED, n, scale, shapes, limit, whole), draw(d)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


def offset(theta: torch.Tensor, p: np.ndarray) -> np.ndarray:
    return np.tensordot(theta.double().numpy(), p, 1)


def adjoint(g: torch.Tensor, p: np.ndarray) -> np.ndarray:
    """Pᵀg."""
    return np.tensordot(p, g.double().numpy(), 2)


def test_materialise(case):
    projections, matrices, theta = case
    total = np.zeros(len(theta))
    parameter = leaf(theta)
    for name, p in projections.items():
        g = draw(p.rows, p.cols, seed=1)
        y = p.materialise(parameter)
        assert error(y, offset(theta, matrices[name])) < TOLERANCE[torch.float32]
        (y * g).sum().backward()
        total += adjoint(g, matrices[name])
    assert error(parameter.grad, total) < TOLERANCE[torch.float32]  # <Pθ, g> = <θ, Pᵀg>, for every θ


def test_some_rows_at_a_time(case):
    projections, matrices, theta = case
    for name, p in projections.items():
        cuts = sorted({0, p.rows // 2, p.rows // 2 + 1, p.rows - 1, p.rows})
        slabs = [p.slab(theta, start, stop) for start, stop in itertools.pairwise(cuts)]
        assert [len(slab) for slab in slabs] == np.diff(cuts).tolist()
        # Against the whole: a single entry can be what is left of large terms.
        assert error(torch.cat(slabs), offset(theta, matrices[name])) < TOLERANCE[torch.float32]


def test_linear(case):
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


def test_gather(case):
    projections, matrices, theta = case
    for name, p in projections.items():
        index = torch.tensor([[0, p.rows - 1, p.rows // 2], [p.rows - 1, 0, p.rows - 1]])  # repeated on purpose
        parameter, g = leaf(theta), draw(2, 3, p.cols, seed=1)
        y = p.gather(index, parameter)
        assert error(y, offset(theta, matrices[name])[index]) < TOLERANCE[torch.float32]
        assert error(y, p.materialise(theta)[index].double().numpy()) < TOLERANCE[torch.float32]
        (y * g).sum().backward()
        dense = torch.zeros(p.rows, p.cols).index_add_(0, index.flatten(), g.flatten(0, 1))
        assert error(parameter.grad, adjoint(dense, matrices[name])) < TOLERANCE[torch.float32]


def test_a_theta_for_each_sample(case):
    projections, matrices, theta = case
    theta = draw(3, len(theta), seed=3)
    for name, p in projections.items():
        w = np.tensordot(theta.double().numpy(), matrices[name], 1)
        assert error(p.materialise(theta), w) < TOLERANCE[torch.float32]
        for between in ((), (2,), (2, 2)):
            x = draw(3, *between, p.cols, seed=4)
            expected = np.einsum("b...c,brc->b...r", x.double().numpy(), w)
            assert error(p.linear(x, theta), expected) < TOLERANCE[torch.float32]
            index = torch.arange(x[..., 0].numel()).view(x.shape[:-1]) * 7 % p.rows
            expected = np.stack([w[i][index[i]] for i in range(3)])
            assert error(p.gather(index, theta), expected) < TOLERANCE[torch.float32]


def test_linearity(case):
    projections, _, theta = case
    other = draw(len(theta), seed=4)
    for p in projections.values():
        y = p.materialise(2 * theta - 3 * other)
        expected = 2 * p.materialise(theta).double() - 3 * p.materialise(other).double()
        assert error(y, expected.numpy()) < TOLERANCE[torch.float32]
        assert not p.materialise(0 * theta).any()


@pytest.fixture(scope="module")
def small():
    """A matrix of two blocks."""
    return build_fastfood(Spec(20, 0, 32, "fan_in"), {"a": Shape(24, 41)})["a"], draw(20)


def test_row_limit_is_exact(monkeypatch):
    monkeypatch.setattr(allocation, "ROWS", 8)
    for rows, chunks in [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3)]:
        p = build_fastfood(Spec(3, 0, 4, "fan_in"), {"a": Shape(rows, 6)})["a"]
        assert p.factor(draw(3)).shape == (chunks, 4, 6)
        assert p.materialise(draw(3)).shape == (rows, 6)


def test_offset_is_basis_times_factor(monkeypatch):
    monkeypatch.setattr(allocation, "ROWS", 8)
    p = build_fastfood(Spec(3, 0, 4, "fan_in"), {"a": Shape(21, 7)})["a"]
    theta = draw(3)
    product = torch.cat([p.basis(theta, r) @ p.factor(theta)[r] for r in range(3)])
    assert torch.equal(product, p.materialise(theta))


@pytest.mark.parametrize("shape", [(0,), (), (1,), (2, 0, 3)])
def test_batches_of_any_shape(small, shape):
    p, theta = small
    assert p.linear(torch.ones(*shape, p.cols), theta).shape == (*shape, p.rows)
    for dtype in (torch.int64, torch.int32):
        assert p.gather(torch.zeros(shape, dtype=dtype), theta).shape == (*shape, p.cols)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_in_the_dtype_of_x(small, dtype):
    p, theta = small
    x = draw(5, p.cols).to(dtype)
    y = p.linear(x, theta)
    assert y.dtype == dtype
    assert error(y, x.double().numpy() @ p.materialise(theta).double().numpy().T) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_offsets_are_float32_for_any_theta(small, dtype):
    p, theta = small
    theta = theta.to(dtype)
    index = torch.tensor([3, 23])
    assert p.materialise(theta).dtype == torch.float32
    assert torch.equal(p.materialise(theta), p.materialise(theta.float()))
    assert torch.equal(p.gather(index, theta), p.gather(index, theta.float()))
    parameter = leaf(theta)
    p.materialise(parameter).sum().backward()
    assert parameter.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offsets_ignore_autocast(small, dtype):
    p, theta = small
    index = torch.tensor([3, 23])
    expected = p.materialise(theta), p.gather(index, theta)
    with torch.autocast("cpu", dtype=dtype):
        actual = p.materialise(theta), p.gather(index, theta)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_trains_after_being_built_and_used_in_inference_mode():
    shapes = {"a": Shape(7, 9)}
    with torch.inference_mode():
        first = build_fastfood(Spec(5, 1234, 8, "fan_in"), shapes)["a"]
        first.materialise(draw(5))
    second = build_fastfood(Spec(5, 1234, 8, "fan_in"), shapes)["a"]  # G may come from a cache
    for p in (second, first):
        theta, x = leaf(draw(5)), leaf(draw(2, 9))
        (p.materialise(theta).sum() + p.linear(x, theta).sum() + p.gather(torch.tensor([1]), theta).sum()).backward()
        assert theta.grad.all()
        assert x.grad.all()


def test_built_in_memory_under_a_meta_device():
    with torch.device("meta"):  # as while an empty model is made
        p = build_fastfood(Spec(5, 0, 8, "fan_in"), {"a": Shape(7, 9)})["a"]
    assert p.materialise(torch.ones(5, device="cpu")).any()


def test_copies_share_the_projection(small):
    p, _ = small
    assert copy.deepcopy({"a": [p]})["a"][0] is p


def test_threads_do_not_change_a_bit():
    p = build_fastfood(Spec(300, 0, 64, "fan_in"), {"a": Shape(700, 650)})["a"]
    theta, threads = draw(300), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = p.materialise(theta)
        torch.set_num_threads(4)
        assert torch.equal(p.materialise(theta), one)
    finally:
        torch.set_num_threads(threads)
