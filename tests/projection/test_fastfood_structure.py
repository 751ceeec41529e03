"""What Fastfood promises of P as a whole: norms, isometry, coverage, independence, and the numbers themselves."""

import gc
import weakref

import numpy as np
import oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_intrinsic.projection import FastfoodTensor, Shapes, Spec, choose_block_size, fastfood
from peft_intrinsic.projection.fastfood import build_fastfood

SHAPES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=6).map(
    lambda shapes: {f"w{i}": shape for i, shape in enumerate(shapes)}
)
BLOCK_SIZES = st.sampled_from([1, 2, 4, 8, 16])
SEARCH = settings(deadline=None, derandomize=True, database=None, max_examples=60)

# P of seed 1, d = 5, n = 4, times (1, -2, 3, 0.5, -0.25)
GOLDEN = {
    "fan_in": {
        "w": [
            [0.058712846, -0.180619322, -0.12147656, 0.037428094, -0.052584797],
            [-0.180281939, 0.001839749, 0.240940215, -0.096047099, -1.387971173],
            [0.174975762, -0.019084824, -0.045350112, 0.114726393, 1.667019491],
        ],
        "b": [[1.610561187], [0.034189633]],
    },
    "isometric": {
        "w": [
            [0.065642957, -0.201938541, -0.135814923, 0.041845882, -0.091079541],
            [-0.201561336, 0.002056902, 0.26937935, -0.107383921, -2.404036591],
            [0.195628849, -0.021337482, -0.050702967, 0.128268006, 2.887362456],
        ],
        "b": [[1.764281385], [0.037452867]],
    },
}


def columns(p: FastfoodTensor, d: int) -> torch.Tensor:
    """P, one unit vector after the other: `[d, rows, cols]`."""
    return torch.stack([p.materialise(unit) for unit in torch.eye(d)])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", GOLDEN)
def test_golden_offset(scale):
    projections = build_fastfood(Spec(5, 1, 4, scale), {"w": (3, 5), "b": (2, 1)})
    theta = torch.tensor([1, -2, 3, 0.5, -0.25])
    for name, expected in GOLDEN[scale].items():
        np.testing.assert_allclose(projections[name].materialise(theta).numpy(), expected, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("n", [64, 256])  # four slices of 50 coordinates; one of 200
def test_isometry(n):
    d, shapes = 200, {"a": (768, 384), "b": (1536, 384), "c": (384, 768), "v": (768, 1)}  # D = 1.18 M
    gram = torch.zeros(d, d)
    for p in build_fastfood(Spec(d, 0, n, "isometric"), shapes).values():
        part = columns(p, d).flatten(1)
        gram += part @ part.T
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert gram.diag().mean().item() == pytest.approx(1, abs=1e-3)
    assert 0.95 < eigenvalues[0] < 0.98  # measured: .963
    assert 1.03 < eigenvalues[-1] < 1.06  # measured: 1.040 and 1.045


@pytest.mark.parametrize(("d", "n"), [(1, 1), (3, 1), (16, 16), (48, 16), (128, 64)])
def test_every_weight_has_the_same_norm_when_slices_are_full(monkeypatch, d, n):
    # rows of G have the length √n and H is orthogonal, so nothing is left to chance unless θ is padded
    monkeypatch.setattr(fastfood, "ROWS", 8)
    shapes = {"a": (5, 70), "b": (13, 37), "v": (20, 1)}
    for name, p in build_fastfood(Spec(d, 0, n, "fan_in"), shapes).items():
        c = oracle.fan_in(*shapes[name]) ** -0.5
        np.testing.assert_allclose(columns(p, d).norm(dim=0).numpy(), c, rtol=1e-5)


def test_weights_have_the_natural_norm_on_average_when_slices_are_padded():
    d, n = 100, 64  # two slices of 50
    p = build_fastfood(Spec(d, 0, n, "fan_in"), {"a": (50, 640)})["a"]
    norms = columns(p, d).norm(dim=0) * 640**0.5
    assert norms.square().mean().item() == pytest.approx(1, abs=0.01)
    assert 0.02 < norms.std() < 0.08  # measured: .047


@pytest.mark.parametrize(("d", "n"), [(16, 16), (48, 16)])
def test_isometric_counts_the_weights_of_a_slice(d, n):
    shapes = {"a": (5, 70), "b": (13, 37), "v": (20, 1)}
    parts = [columns(p, d).flatten(1) for p in build_fastfood(Spec(d, 0, n, "isometric"), shapes).values()]
    squares = torch.cat(parts, 1).square().sum(1).view(-1, n)  # [slices, n]
    np.testing.assert_allclose(squares.mean(1).numpy(), 1, rtol=1e-5)  # each slice by itself


@SEARCH
@given(d=st.integers(1, 200), n=BLOCK_SIZES, shapes=SHAPES, limit=st.sampled_from([4, 16384]))
@example(d=60, n=1, shapes={"a": (2, 60)}, limit=16384)
@example(d=61, n=1, shapes={"a": (2, 60)}, limit=16384)
@example(d=5, n=2, shapes={"a": (1, 6)}, limit=16384)
def test_every_coordinate_moves_something_or_the_error_says_why(d, n, shapes, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastfood, "ROWS", limit)
        tiles = sum(-(-rows // limit) * -(-cols // n) for rows, cols in shapes.values())
        if tiles * n < d:
            with pytest.raises(ValueError, match=rf"d={d} with block_size={n} needs {-(-d // n)} .* {tiles}\."):
                build_fastfood(Spec(d, 0, n, "fan_in"), shapes)
            return
        theta = torch.zeros(d, requires_grad=True)
        for i, p in enumerate(build_fastfood(Spec(d, 0, n, "fan_in"), shapes).values()):
            (p.materialise(theta) * draw(p.rows, p.cols, seed=i)).sum().backward()
    assert theta.grad.all()  # Pᵀg of a random g is 0 only where a column of P is


@SEARCH
@given(d=st.integers(1, 3000), shapes=SHAPES)
@example(d=64, shapes={"a": (1, 1)})
@example(d=65, shapes={"a": (1, 1)})
@example(d=3000, shapes={"a": (40, 64 * 47)})
def test_chosen_block_size_is_the_smallest_that_works(d, shapes):
    n = choose_block_size(d, shapes)
    assert n.bit_count() == 1
    assert n >= fastfood.DEFAULT_BLOCK_SIZE
    assert build_fastfood(Spec(d, 0, n, "fan_in"), shapes).keys() == shapes.keys()
    if n > fastfood.DEFAULT_BLOCK_SIZE:
        with pytest.raises(ValueError, match="Use a larger block_size"):
            build_fastfood(Spec(d, 0, n // 2, "fan_in"), shapes)


@pytest.mark.parametrize(
    ("d", "shapes", "n"),
    [
        (1, {"a": (1, 1)}, 64),
        (640, {"a": (5, 577)}, 64),
        (641, {"a": (5, 640)}, 256),
        (257, {"a": (5, 64)}, 512),
        (128, {"a": (16385, 1)}, 64),  # two row chunks
        (5000, {"a": (1000, 1)}, 8192),
    ],
)
def test_chosen_block_size(d, shapes, n):
    assert choose_block_size(d, shapes) == n


def offsets(shapes: Shapes, d: int, n: int, **other) -> dict[str, torch.Tensor]:
    spec = Spec(**{"d": d, "seed": 0, "block_size": n, "scale": "fan_in"} | other)
    return {name: p.materialise(draw(d)) for name, p in build_fastfood(spec, shapes).items()}


@pytest.mark.parametrize("d", [1, 31, 32])
def test_offset_does_not_depend_on_other_tensors_when_slices_are_whole(d):
    shapes = {"m": (20, 70), "a": (50, 33), "z": (3, 1)}
    together = offsets(shapes, d, 32)
    for name, shape in shapes.items():
        assert torch.equal(offsets({name: shape}, d, 32)[name], together[name])


def test_order_of_the_tensors_does_not_matter():
    shapes = {"m": (20, 70), "a": (50, 33), "z": (3, 1)}
    forward, backward = offsets(shapes, 50, 8), offsets(dict(reversed(shapes.items())), 50, 8)
    assert all(torch.equal(forward[name], backward[name]) for name in shapes)


def test_seed_and_name_change_the_offset():
    first = offsets({"a": (20, 70), "b": (20, 70)}, 30, 32)
    assert oracle.error(first["a"], first["b"].double().numpy()) > 0.5
    second = offsets({"a": (20, 70)}, 30, 32, seed=1)
    assert oracle.error(first["a"], second["a"].double().numpy()) > 0.5


def test_one_g_for_each_device_and_none_when_unused():
    tensors = list(build_fastfood(Spec(30, 123, 16, "fan_in"), {"a": (20, 30), "b": (40, 8), "c": (7, 1)}).values())
    for device in ("cpu", "meta"):
        assert len({id(tensor.gaussian.on(torch.device(device))) for tensor in tensors}) == 1
    again = build_fastfood(Spec(5, 123, 16, "fan_in"), {"d": (40, 5)})
    assert again["d"].gaussian is tensors[0].gaussian
    gone = weakref.ref(tensors[0].gaussian)
    del tensors, again
    gc.collect()
    assert gone() is None
