"""The stored Gaussian P, and what every projection inherits."""

import copy

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.oracle import TOLERANCE, error

from peft_intrinsic.projection import PROJECTIONS, Shape, Spec, dense
from peft_intrinsic.projection.dense import build_dense
from peft_intrinsic.projection.fastfood import build_fastfood

SHAPES = {"w": Shape(9, 7), "v": Shape(5, 1), "one": Shape(1, 1), "wide": Shape(2, 30)}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


@pytest.fixture(params=[1, 2, 7, 200])
def d(request):
    return request.param


@pytest.fixture(params=["fan_in", "isometric"])
def case(request, d):
    """The tensors' projections, their P from the oracle (`[d, rows, cols]`), and a θ."""
    return build_dense(Spec(d, 5, 1, request.param), SHAPES), oracle.dense(d, 5, request.param, SHAPES), draw(d)


def test_projections_by_name():
    assert PROJECTIONS["dense"] is build_dense
    assert PROJECTIONS["fastfood"] is build_fastfood


def test_materialise_linear_and_gather(case):
    projections, matrices, theta = case
    assert projections.keys() == SHAPES.keys()
    for name, p in projections.items():
        matrix = matrices[name]
        w = np.tensordot(theta.double().numpy(), matrix, 1)
        index = torch.tensor([[0, p.rows - 1, 0]])
        parameter, x, g = leaf(theta), leaf(draw(4, p.cols, seed=1)), draw(4, p.rows, seed=2)
        assert error(p.materialise(theta), w) < TOLERANCE[torch.float32]
        assert torch.equal(p.gather(index, theta), p.materialise(theta)[index])
        y = p.linear(x, parameter)
        assert error(y, x.detach().double().numpy() @ w.T) < TOLERANCE[torch.float32]
        (y * g).sum().backward()
        assert error(x.grad, g.double().numpy() @ w) < TOLERANCE[torch.float32]
        outer = g.double().numpy().T @ x.detach().double().numpy()
        assert error(parameter.grad, np.tensordot(matrix, outer, 2)) < TOLERANCE[torch.float32]


def test_some_rows_at_a_time(case):
    projections, matrices, theta = case
    p, w = projections["w"], np.tensordot(theta.double().numpy(), matrices["w"], 1)
    for start, stop in [(0, 4), (4, 5), (3, 9)]:
        assert error(p.slab(theta, start, stop), w[start:stop]) < TOLERANCE[torch.float32]


def test_a_theta_for_each_sample(case, d):
    projections, matrices, _ = case
    theta = draw(3, d, seed=3)
    for name, p in projections.items():
        w = np.tensordot(theta.double().numpy(), matrices[name], 1)
        assert error(p.materialise(theta), w) < TOLERANCE[torch.float32]
        assert error(p.slab(theta, 0, 1), w[:, :1]) < TOLERANCE[torch.float32]
        for between in ((), (2,), (2, 4)):
            x = draw(3, *between, p.cols, seed=4)
            expected = np.einsum("b...c,brc->b...r", x.double().numpy(), w)
            assert error(p.linear(x, theta), expected) < TOLERANCE[torch.float32]
            index = torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % p.rows
            expected = np.stack([w[i][index[i]] for i in range(3)])
            assert error(p.gather(index, theta), expected) < TOLERANCE[torch.float32]


def columns(p: dense.DenseTensor, d: int) -> torch.Tensor:
    return torch.stack([p.materialise(unit) for unit in torch.eye(d)])


def test_every_weight_has_the_same_norm(d):
    for name, p in build_dense(Spec(d, 0, 1, "fan_in"), SHAPES).items():
        c = 512 / d**0.25 * oracle.natural(SHAPES[name])
        np.testing.assert_allclose(columns(p, d).norm(dim=0).numpy(), c, rtol=1e-5)


def test_isometry():
    d, shapes = 20, {"a": Shape(100, 150), "b": Shape(37, 135), "v": Shape(5, 1)}  # D = 20,000
    parts = [columns(p, d).flatten(1) for p in build_dense(Spec(d, 0, 1, "isometric"), shapes).values()]
    gram = torch.cat(parts, 1) @ torch.cat(parts, 1).T
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert gram.diag().mean().item() == pytest.approx(1, abs=1e-5)
    assert eigenvalues[0] > 0.93  # (1 ± √(d/D))² = .938 and 1.064
    assert eigenvalues[-1] < 1.07


def test_tensors_do_not_depend_on_each_other():
    together = build_dense(Spec(7, 0, 1, "fan_in"), SHAPES)
    for name, shape in SHAPES.items():
        alone = build_dense(Spec(7, 0, 1, "fan_in"), {name: shape})[name]
        assert torch.equal(alone.materialise(draw(7)), together[name].materialise(draw(7)))


def test_golden_offset():
    projections = build_dense(Spec(5, 1, 4, "fan_in"), {"w": Shape(3, 5), "b": Shape(2, 1)})
    theta = torch.tensor([1, -2, 3, 0.5, -0.25])
    expected = [280.345719, 47.9353925, -62.0726396, 498.643621, -34.0304662]
    np.testing.assert_allclose(projections["w"].materialise(theta)[0].numpy(), expected, rtol=1e-6, atol=2e-7)
    expected = [[-142.425662], [-207.667886]]
    np.testing.assert_allclose(projections["b"].materialise(theta).numpy(), expected, rtol=1e-6, atol=2e-7)


def test_limit(monkeypatch):
    with pytest.raises(ValueError, match=r"1099511627776 x 2 numbers.* Use projection='fastfood'"):
        build_dense(Spec(2, 0, 1, "fan_in"), {"a": Shape(2**20, 2**20)})
    monkeypatch.setattr(dense, "LIMIT", 60)
    build_dense(Spec(3, 0, 1, "fan_in"), {"a": Shape(3, 5), "b": Shape(5, 1)})  # 60 entries
    with pytest.raises(ValueError, match="21 x 3 numbers, more than 60"):
        build_dense(Spec(3, 0, 1, "fan_in"), {"a": Shape(3, 5), "b": Shape(6, 1)})


@pytest.fixture(scope="module")
def small():
    return build_dense(Spec(20, 0, 1, "fan_in"), {"a": Shape(24, 41)})["a"], draw(20)


@pytest.mark.parametrize("shape", [(0,), (), (1,), (2, 0, 3)])
def test_batches_of_any_shape(small, shape):
    p, theta = small
    assert p.linear(torch.ones(*shape, p.cols), theta).shape == (*shape, p.rows)
    assert p.gather(torch.zeros(shape, dtype=torch.int32), theta).shape == (*shape, p.cols)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_in_the_dtype_of_x(small, dtype):
    p, theta = small
    x = draw(5, p.cols).to(dtype)
    y = p.linear(x, theta)
    assert y.dtype == dtype
    assert error(y, x.double().numpy() @ p.materialise(theta).double().numpy().T) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offsets_are_of_full_precision(small, dtype):
    p, theta = small
    theta, index = theta.to(dtype), torch.tensor([3, 23])
    expected = p.materialise(theta.float())
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(p.materialise(theta), expected)
        assert torch.equal(p.gather(index, theta), expected[index])


def test_trains_after_being_built_and_used_in_inference_mode():
    with torch.inference_mode():
        p = build_dense(Spec(5, 0, 1, "fan_in"), {"a": Shape(7, 9)})["a"]
        p.materialise(draw(5))
    theta = leaf(draw(5))
    p.materialise(theta).sum().backward()
    assert theta.grad.all()


def test_built_in_memory_under_a_meta_device():
    with torch.device("meta"):  # as while an empty model is made
        p = build_dense(Spec(5, 0, 1, "fan_in"), {"a": Shape(7, 9)})["a"]
    assert p.materialise(torch.ones(5, device="cpu")).any()


def test_copies_share_the_projection(small):
    p, _ = small
    assert copy.deepcopy([p])[0] is p
