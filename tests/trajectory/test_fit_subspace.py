"""`fit_subspace` against a dense singular value decomposition, and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import build
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.linalg import subspace_angles

from peft_intrinsic.projection.subspace import Subspace
from peft_intrinsic.trajectory import fit, fit_subspace, record

ANGLE = 1e-5
SHAPES = {"h.0.weight": (7, 9), "h.0.bias": (7,), "h.1.weight": (5, 4, 3), "h.1.scale": (), "embed.weight": (11, 6)}
LAYERS = {"h.0": ["h.0.weight", "h.0.bias"], "h.1": ["h.1.weight", "h.1.scale"], "rest": ["embed.weight"]}


def rows(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Snapshots like those of training: a random walk with shrinking steps of about 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    walk, result = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}, []
    for i in range(count):
        walk = {n: w + 1e-3 / (i + 1) * torch.randn(w.shape, generator=generator).double() for n, w in walk.items()}
        result.append(walk)
    return result


def dense(snapshots: list[dict[str, torch.Tensor]], names: list[str], center: bool = False) -> tuple:
    """Singular values and right singular vectors of the matrix of snapshots: `[t]`, `[t, weights]`."""
    matrix = torch.stack([torch.cat([row[name].reshape(-1).double() for name in names]) for row in snapshots])
    _, singular, right = torch.linalg.svd(matrix - center * matrix.mean(0), full_matrices=False)
    return singular, right


def vectors(subspace: Subspace, names: list[str], dim: int) -> torch.Tensor:
    return torch.cat([subspace.directions(name, dim).reshape(dim, -1) for name in names], 1).double()


@pytest.mark.parametrize("shape", [(), (3,), (50,), (3, 4), (20, 7), (2, 5, 30), (2, 3, 4, 5)])
def test_pieces_are_consecutive_small_and_complete(monkeypatch, shape):
    monkeypatch.setattr(fit, "CHUNK", 12)
    whole, parts = torch.arange(math.prod(shape)).reshape(shape), []
    for index, start in fit._cut(shape):
        part = whole[index].reshape(-1)
        assert start == part[0]
        assert len(part) <= max(12, shape[-1] if shape else 1)
        parts.append(part)
    assert torch.equal(torch.cat(parts), whole.reshape(-1))


@pytest.mark.parametrize("per", ["layer", "model"])
@pytest.mark.parametrize("center", [False, True])
def test_directions_are_the_right_singular_vectors(tmp_path, monkeypatch, per, center):
    monkeypatch.setattr(fit, "CHUNK", 10)  # several pieces of each parameter
    snapshots = rows(6)
    subspace = fit_subspace(snapshots, 4, per, center, tmp_path / "s.safetensors")
    groups = {"model": list(SHAPES)} if per == "model" else LAYERS
    assert [group.name for group in subspace.groups] == list(groups)
    for group in subspace.groups:
        assert sorted(group.parameters) == sorted(groups[group.name])
        singular, right = dense(snapshots, group.parameters, center)
        found = vectors(subspace, group.parameters, 4)
        for k in range(1, 5):  # each leading subspace, which checks the order
            assert subspace_angles(found[:k].T.numpy(), right[:k].T.numpy()).max() < ANGLE
        assert torch.allclose(found @ found.T, torch.eye(4).double(), atol=1e-6)
        assert torch.allclose(torch.tensor(group.singular_values).double(), singular[:4], rtol=1e-6)
        explained = singular[:4] ** 2 / (singular**2).sum()
        assert torch.allclose(torch.tensor(group.explained).double(), explained, rtol=1e-6)


def test_as_many_directions_as_snapshots_reproduce_every_snapshot(tmp_path):
    snapshots = rows(5)
    subspace = fit_subspace(snapshots, 5, out=tmp_path / "s.safetensors")
    for group in subspace.groups:
        v = vectors(subspace, group.parameters, 5)
        for row in snapshots:
            offset = torch.cat([row[name].reshape(-1) for name in group.parameters])
            theta = torch.linalg.lstsq(v.T, offset).solution
            assert torch.linalg.norm(theta @ v - offset) < 1e-6 * torch.linalg.norm(offset)


def test_the_file_is_safetensors_and_its_digest_depends_on_the_contents(tmp_path):
    subspace = fit_subspace(rows(3), 2, out=tmp_path / "s.safetensors", dtype=torch.bfloat16)
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert set(file.keys()) == set(SHAPES)
        for name, shape in SHAPES.items():
            assert file.get_tensor(name).shape == (2, *shape)
            assert file.get_tensor(name).dtype == torch.bfloat16
    assert subspace.shapes == SHAPES
    assert subspace.digest == Subspace(tmp_path / "s.safetensors").digest != "0" * 16
    again = fit_subspace(rows(3), 2, out=tmp_path / "again.safetensors", dtype=torch.bfloat16)
    assert again.digest == subspace.digest
    assert fit_subspace(rows(3, seed=1), 2, out=tmp_path / "other.safetensors").digest != subspace.digest


def test_theta_is_allocated_in_equal_parts_to_the_groups(tmp_path):
    subspace = fit_subspace(rows(4), 3, out=tmp_path / "s.safetensors")
    assert subspace.dim == 9
    assert [(g.name, start, count) for g, start, count in subspace.allocate(7, SHAPES)] == [
        ("h.0", 0, 3),
        ("h.1", 3, 2),
        ("rest", 5, 2),
    ]
    assert [count for _, _, count in subspace.allocate(4, LAYERS["h.0"] + LAYERS["h.1"])] == [2, 2]
    for d in (2, 10):
        with pytest.raises(ValueError, match=f"θ has {d} entries .* from 3 to 9"):
            subspace.allocate(d, SHAPES)


def test_checkpoints_and_their_base_give_the_subspace_of_a_recording(tmp_path):
    model = build("bert")
    record(model, tmp_path / "run", 0)
    for step in (1, 2):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        record(model, tmp_path / "run", step, dtype=torch.float32)
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    files = [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2" / "model.safetensors"]
    whole = fit_subspace(files, 2, base=build("bert"), out=tmp_path / "a.safetensors")
    recorded = fit_subspace(tmp_path / "run", 2, out=tmp_path / "b.safetensors")
    assert whole.shapes == recorded.shapes
    assert whole.base == recorded.base
    for a, b in zip(whole.groups, recorded.groups, strict=True):
        assert a.name == b.name
        assert a.singular_values == pytest.approx(b.singular_values, rel=1e-5)
        for name in a.parameters:
            x, y = whole.directions(name, 2), recorded.directions(name, 2)
            assert torch.allclose(x * (x * y).sum().sign(), y, atol=1e-5)
    with pytest.raises(ValueError, match=r"checkpoint-1 is a whole checkpoint\. Pass base="):
        fit_subspace(files, 2, out=tmp_path / "c.safetensors")


@pytest.mark.parametrize("where", ["fit.SubspaceWriter.write", "subspace.contents_digest"])
def test_an_interruption_leaves_the_old_file_unchanged(tmp_path, monkeypatch, where):
    path = tmp_path / "s.safetensors"
    fit_subspace(rows(3), 2, out=path)
    before = path.read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    package = "trajectory" if where.startswith("fit") else "projection"
    monkeypatch.setattr(f"peft_intrinsic.{package}.{where}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_subspace(rows(3, seed=1), 2, out=path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_raise_an_error(tmp_path, value):
    bad = rows(3)
    bad[1]["h.1.scale"] = torch.tensor(value)
    with pytest.raises(ValueError, match=r"h\.1\.scale holds NaN or infinite"):
        fit_subspace(bad, 2, out=tmp_path / "s.safetensors")


def test_too_few_independent_snapshots_raise_an_error(tmp_path):
    first, *_ = rows(1)
    with pytest.raises(ValueError, match=r"snapshots of h\.0 span 1 directions, fewer than dim=2.*Use dim=1"):
        fit_subspace([first, first, {n: 2 * w for n, w in first.items()}], 2, out=tmp_path / "s.safetensors")
    for count in (2, 3, 7):  # a third and a seventh are rounded
        with pytest.raises(ValueError, match=r"h\.0 do not change"):
            fit_subspace([first] * count, 1, center=True, out=tmp_path / "s.safetensors")
    still = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match="do not change"):
        fit_subspace([still, still], 1, out=tmp_path / "s.safetensors")


def test_snapshots_of_different_models_or_bases_raise_an_error(tmp_path):
    out = tmp_path / "s.safetensors"
    one, two = rows(2)
    with pytest.raises(ValueError, match=r"dim=3 exceeds the 2 snapshots"):
        fit_subspace([one, two], 3, out=out)
    less = {name: w for name, w in two.items() if name != "h.0.bias"}
    other = {**two, "h.0.bias": torch.zeros(8)}
    for unlike in (less, other):
        for pair in ([one, unlike], [unlike, one]):
            with pytest.raises(ValueError, match=r"different models.*h\.0\.bias"):
                fit_subspace(pair, 1, out=out)
    with pytest.raises(ValueError, match="snapshots is empty"):
        fit_subspace([], 1, out=out)
    for folder, shift in (("a", 0.0), ("b", 1.0)):  # two base models
        model = build("bert")
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "layer.0" in n).add_(shift)
        record(model, tmp_path / folder, 0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        record(model, tmp_path / folder, 1)
    with pytest.raises(ValueError, match="have different base models"):
        fit_subspace([tmp_path / "a", tmp_path / "b"], 1, out=out)
    for file in ("start", "subspace"):
        name = tmp_path / "a" / f"{file}.safetensors"
        if file == "subspace":
            fit_subspace([tmp_path / "a"], 1, out=name)
        with pytest.raises(ValueError, match=rf"{file}\.safetensors is the start of a recording, or a subspace"):
            fit_subspace([name], 1, out=out)
    (tmp_path / "torn").write_bytes(b"torn")
    with pytest.raises(ValueError, match="torn cannot be read"):
        fit_subspace([tmp_path / "torn"], 1, out=out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 0}, "dim=0 is no positive integer"),
        ({"dim": True}, "dim=True is no positive integer"),
        ({"dim": 1, "per": "tensor"}, "per='tensor' is not supported"),
        ({"dim": 1, "dtype": torch.float16}, "dtype=torch.float16 is not supported"),
    ],
)
def test_invalid_options_raise_errors(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        fit_subspace(rows(2), out=tmp_path / "s.safetensors", **options)


def test_files_that_are_absent_damaged_or_no_subspace_raise_errors(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no subspace file of this version"):
        Subspace(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"absent\.safetensors' cannot be read"):
        Subspace(tmp_path / "absent.safetensors")
    fit_subspace(rows(2), 1, out=tmp_path / "s.safetensors")
    whole = (tmp_path / "s.safetensors").read_bytes()
    Subspace(tmp_path / "s.safetensors").verify()
    for place in (-3, whole.index(b"explained") + 14):
        (tmp_path / "s.safetensors").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is damaged: its digest"):
            Subspace(tmp_path / "s.safetensors").verify()
    (tmp_path / "s.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="cannot be read"):
        Subspace(tmp_path / "s.safetensors")
