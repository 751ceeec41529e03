"""Outlier dimensions: which weights, the report, and the ablation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import build, trained
from peft import get_peft_model

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.analysis import disable_outliers, find_outliers

SHAPES = {"h.0.weight": (40, 50), "h.0.bias": (40,), "h.1.weight": (30, 60), "embed.weight": (20, 30)}


def offsets() -> dict[str, torch.Tensor]:
    """Normal values around 0.01, some far from it."""
    generator = torch.Generator().manual_seed(0)
    found = {name: 0.01 + 1e-3 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found["h.0.weight"][3, 4] = 0.02
    found["h.0.bias"][7] = 0.0
    found["h.1.weight"][0, 0] = 1.0
    return found


@pytest.mark.parametrize("k", [2.0, 3.0, 5.0])
def test_outliers_are_beyond_k_standard_deviations_of_their_layer(k):
    update = offsets()
    found = find_outliers(update, k)
    for names in (["h.0.weight", "h.0.bias"], ["h.1.weight"], ["embed.weight"]):
        flat = np.concatenate([update[name].double().numpy().ravel() for name in names])
        far = np.abs(flat - flat.mean()) >= k * flat.std()
        ends = np.cumsum([0, *(update[name].numel() for name in names)])
        for i, name in enumerate(names):
            assert found.indices[name].tolist() == far[ends[i] : ends[i + 1]].nonzero()[0].tolist()
    assert 3 * 50 + 4 in found.indices["h.0.weight"]
    assert 7 in found.indices["h.0.bias"]
    if k == 5:
        assert len(found) == 3


def test_the_report_counts_outliers_by_layer_and_kind_and_the_plot_is_an_image(tmp_path):
    found = find_outliers(offsets(), 5.0)
    report = found.report()
    assert "3 of 4440 weights (0.07%) changed beyond 5 σ." in report
    assert "| h.0 | 2 | 0.10% |" in report
    assert "| weight | 2 | 0.05% |" in report
    assert "| bias | 1 | 2.50% |" in report
    found.plot(tmp_path / "outliers.png")
    assert (tmp_path / "outliers.png").stat().st_size > 5000


def test_random_weights_are_as_many_in_each_layer_and_reproducible():
    found = find_outliers(offsets(), 2.0)
    sample, again, other = found.random(0), found.random(0), found.random(1)
    for layer in ("h.0.", "h.1.", "embed."):
        counts = [
            sum(len(o.indices[name]) for name in SHAPES if name.startswith(layer)) for o in (found, sample, other)
        ]
        assert counts[0] == counts[1] == counts[2] > 0
    assert all(np.array_equal(sample.indices[name], again.indices[name]) for name in SHAPES)
    assert not all(np.array_equal(sample.indices[name], other.indices[name]) for name in SHAPES)
    for name, indices in sample.indices.items():
        assert len(np.unique(indices)) == len(indices)
        assert ((indices >= 0) & (indices < np.prod(SHAPES[name]))).all()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_outliers_of_an_adapter_equal_those_of_its_merged_offsets(family):
    model = trained(family)
    found = find_outliers(model, 2.0)
    start = dict(build(family).named_parameters())
    merged = dict(model.merge_and_unload().named_parameters())
    change = {name: merged[name].double() - start[name].double() for name in found.shapes}
    again = find_outliers(change, 2.0)
    assert len(found) > 10
    # Rounding may change on which side of the threshold a weight is.
    for name in found.shapes:
        assert len(np.setxor1d(found.indices[name], again.indices[name])) <= 1 + 0.01 * len(found.indices[name]), name


def test_disabling_sets_the_outliers_to_zero_and_no_other_weights():
    model, plain = build("bert"), build("bert")
    found = find_outliers(trained("bert"), 2.0)
    disable_outliers(model, found)
    for name, parameter in model.named_parameters():
        before = plain.get_parameter(name)
        zeroed = torch.zeros(before.numel(), dtype=torch.bool)
        if name in found.indices:
            zeroed[torch.from_numpy(found.indices[name])] = True
        assert torch.equal(parameter.reshape(-1), torch.where(zeroed, 0.0, before.reshape(-1))), name


def test_invalid_thresholds_equal_offsets_and_unknown_names_raise_errors():
    for k in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="is not above 0"):
            find_outliers(offsets(), k)
    with pytest.raises(ValueError, match=r"offsets of h\.0 are all equal"):
        find_outliers({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    model = get_peft_model(build("bert"), IntrinsicConfig(d=20))
    with pytest.raises(ValueError, match="are all equal or not finite"):
        find_outliers(model)
    with pytest.raises(ValueError, match="no adapter='other'"):
        find_outliers(model, adapter="other")
    with pytest.raises(ValueError, match=r"no parameter h\.0\.weight of shape \(40, 50\)"):
        disable_outliers(build("bert"), find_outliers(offsets()))
