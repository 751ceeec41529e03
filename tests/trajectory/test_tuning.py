"""Adapters in a learned subspace: outputs, gradients, and PEFT's calls."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import batch, build, evaluate, output, train
from helpers.subspaces import CLOSE, attach, make_subspace, set_theta, theta
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_intrinsic import AdapterBank, IntrinsicConfig, convert_to_lora
from peft_intrinsic.codec import compress
from peft_intrinsic.trajectory import Subspace, fit_subspace, record, snapshots

FAMILIES = ["bert", "gpt2", "llama", "t5", "moe", "whisper"]


def dense(subspace: Subspace, d: int, vector: torch.Tensor, scale: str, names=None) -> dict[str, torch.Tensor]:
    """The offsets, from the definition: V θ of each group, in the leading directions, float64."""
    result = {}
    for group, start, count in subspace.allocate(d, names or subspace.shapes):
        size = 1.0 if scale == "isometric" else 64 * group.singular_values[0] / subspace.snapshots**0.5
        for name in group.parameters:
            v = subspace.directions(name, count).double()
            result[name] = size * torch.einsum("k,k...->...", vector[start : start + count].double(), v)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", ["fan_in", "isometric"])
def test_offsets_are_the_directions_times_theta(tmp_path, family, scale):
    subspace = make_subspace(family, tmp_path, per="layer" if scale == "fan_in" else "model")
    d = subspace.dim - 1
    model = attach(family, subspace, d=d, scale=scale)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == d
    set_theta(model, size=0.01 if scale == "fan_in" else 0.5)
    other = build(family)
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for name, offset in dense(subspace, d, theta(model).detach(), scale).items():
            parameters[name].add_(offset.float())
    assert not torch.allclose(evaluate(build(family), family), evaluate(other, family), **CLOSE)
    assert torch.allclose(evaluate(model, family), evaluate(other, family), **CLOSE)
    merged = model.merge_and_unload()
    assert torch.allclose(evaluate(merged, family), evaluate(other, family), **CLOSE)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_theta_by_least_squares_reproduces_every_snapshot(tmp_path, family):
    subspace = make_subspace(family, tmp_path)
    start = {name: p.detach() for name, p in build(family).named_parameters()}
    end = build(family)
    for path in snapshots(tmp_path / "run"):
        offsets = load_file(path)
        model = attach(family, subspace, scale="isometric")
        for group, first, count in subspace.allocate(subspace.dim, subspace.shapes):
            v = torch.cat([subspace.directions(name, count).reshape(count, -1) for name in group.parameters], 1)
            offset = torch.cat([offsets[name].reshape(-1) for name in group.parameters])
            theta(model).data[first : first + count] = v @ offset
        with torch.no_grad():
            for name, p in end.named_parameters():
                p.copy_(start[name] + offsets[name] if name in offsets else start[name])
        merged = dict(model.merge_and_unload().named_parameters())
        for name in offsets:
            assert torch.allclose(merged[name], dict(end.named_parameters())[name], rtol=0, atol=1e-6), name


def test_training_lowers_the_loss_and_leaves_the_base_unchanged(tmp_path):
    subspace = make_subspace("bert", tmp_path)
    model = attach("bert", subspace)
    before = copy.deepcopy(dict(model.get_base_model().named_parameters()))
    losses = train(model, {**batch("bert"), "labels": torch.tensor([0, 1, 2, 0])}, 30, 1e-3)
    assert losses[-1] < losses[0]
    for name, p in model.get_base_model().named_parameters():
        assert torch.equal(p, before[name]) or "intrinsic_theta" in name


def test_the_gradient_of_theta_is_the_projected_gradient_of_the_weights(tmp_path):
    subspace = make_subspace("bert", tmp_path)
    model = attach("bert", subspace, scale="isometric")
    inputs = {**batch("bert"), "labels": torch.tensor([0, 1, 2, 0])}
    model(**inputs).loss.backward()
    plain = build("bert")
    plain(**inputs).loss.backward()
    for group, first, count in subspace.allocate(subspace.dim, subspace.shapes):
        wanted = sum(
            torch.einsum("k...,...->k", subspace.directions(name, count), plain.get_parameter(name).grad)
            for name in group.parameters
        )
        assert torch.allclose(theta(model).grad[first : first + count], wanted, rtol=1e-3, atol=1e-6)


def test_adapters_are_saved_loaded_disabled_merged_mixed_and_summed(tmp_path):
    subspace = make_subspace("bert", tmp_path)
    model = attach("bert", subspace)
    plain = evaluate(build("bert"), "bert")
    assert torch.equal(evaluate(model, "bert"), plain)
    set_theta(model)
    model.add_adapter("b", model.peft_config["default"].as_requested())
    theta(model, "b").data.copy_(-theta(model).data)
    one = evaluate(model, "bert")
    model.set_adapter("b")
    two = evaluate(model, "bert")
    assert not torch.allclose(one, two, **CLOSE)
    with model.disable_adapter():
        assert torch.equal(evaluate(model, "bert"), plain)
    model.merge_adapter()
    assert torch.allclose(evaluate(model, "bert"), two, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(evaluate(model, "bert"), two)
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["default", "b"])
    assert sum(path.stat().st_size for path in (tmp_path / "adapter").glob("*.safetensors")) < 1000
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "adapter").eval()
    assert torch.equal(evaluate(loaded, "bert"), one)
    loaded.load_adapter(tmp_path / "adapter" / "b", "b")
    names = ["default", "b", "default", "__base__"]
    mixed = loaded(**batch("bert"), adapter_names=names).logits
    assert torch.allclose(mixed, torch.stack([one[0], two[1], one[2], plain[3]]), **CLOSE)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert torch.allclose(evaluate(model, "bert"), plain, **CLOSE)


def test_a_bank_gives_each_sample_its_own_adapter(tmp_path):
    model = attach("llama", make_subspace("llama", tmp_path))
    numbers = 0.01 * torch.randn(3, len(theta(model)), generator=torch.Generator().manual_seed(0))
    with AdapterBank(model, numbers).select([2, -1, 0, 1]), torch.no_grad():
        mixed = output(model, batch("llama"))
    plain = evaluate(build("llama"), "llama")
    for sample, row in enumerate([2, None, 0, 1]):
        theta(model).data.copy_(numbers[row] if row is not None else 0 * numbers[0])
        wanted = evaluate(model, "llama")[sample] if row is not None else plain[sample]
        assert torch.allclose(mixed[sample], wanted, **CLOSE)


def test_said_trains_a_scale_for_each_layer_within_d(tmp_path):
    subspace = make_subspace("llama", tmp_path)
    model = attach("llama", subspace, said=True, d=6)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6
    assert len(theta(model)) == 4
    set_theta(model)
    offset = model.base_model.model.model.layers[0].mlp.up_proj.get_delta_weight("default")
    wanted = dense(subspace, 4, theta(model).detach(), "fan_in")["model.layers.0.mlp.up_proj.weight"]
    assert torch.allclose(offset.double(), wanted, rtol=1e-4, atol=1e-7)  # λ is one


def test_the_head_is_trained_fully_or_in_the_subspace(tmp_path):
    model = attach(
        "bert", make_subspace("bert", tmp_path), modules_to_save=["classifier", "embeddings"], task_type="SEQ_CLS"
    )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[-4] for name in trained if "modules_to_save" in name} >= {"classifier"}
    rest = [name for name in trained if ".classifier." not in name and ".embeddings." not in name]
    assert rest == ["base_model.model.intrinsic.intrinsic_theta.default.weight"]
    whole = make_subspace("bert", tmp_path / "all", parameters=".*")
    assert [group.name for group in whole.groups][-1] == "rest"
    assert attach("bert", whole).peft_config["default"].target_parameters == list(whole.shapes)
    model = attach("bert", whole, modules_to_save=["classifier"], d=whole.dim)
    assert not any("classifier" in name for name in model.peft_config["default"].target_parameters)


def test_parameters_are_matched_by_their_whole_names(tmp_path):
    """`1.0.weight` ends in `0.weight` too."""

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4)))

    model = base()
    record(model, tmp_path, 0, parameters=r"0\.weight")
    with torch.no_grad():
        model[0].weight.add_(0.1)
    record(model, tmp_path, 1)
    subspace = fit_subspace(tmp_path, 1, out=tmp_path / "s.safetensors")
    config = IntrinsicConfig(d=1, projection="trajectory", subspace=str(subspace.path))
    assert get_peft_model(base(), config).peft_config["default"].target_parameters == ["0.weight"]
    config = IntrinsicConfig(d=1, projection="trajectory", subspace=str(subspace.path), modules_to_save=["0"])
    with pytest.raises(ValueError, match="includes all parameters that the subspace adapts"):
        get_peft_model(base(), config)


def test_training_an_ensemble_equals_training_its_members_one_by_one(tmp_path):
    """With Adam, h vectors whose mean is used change as their mean does (section 3)."""
    subspace = make_subspace("bert", tmp_path)
    torch.manual_seed(3)
    model = attach("bert", subspace, ensemble=16)
    first = theta(model).detach().clone()
    torch.manual_seed(3)
    lone = theta(attach("bert", subspace, init_weights=False)).detach()
    assert 0 < first.norm() < lone.norm()
    inputs = {**batch("bert"), "labels": torch.tensor([0, 1, 2, 0])}
    members = [torch.nn.Parameter(first + 0.01 * (i - 7.5) * torch.ones_like(first)) for i in range(16)]
    optimizer = torch.optim.Adam(members, lr=1e-3, eps=1e-16)
    twin = attach("bert", subspace)
    for _ in range(5):
        mean = torch.stack([*members]).mean(0)
        loss = torch.func.functional_call(
            twin, {"base_model.model.intrinsic.intrinsic_theta.default.weight": mean}, (), inputs
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    single = torch.optim.Adam([theta(model)], lr=1e-3, eps=1e-16)
    for _ in range(5):
        single.zero_grad()
        model(**inputs).loss.backward()
        single.step()
    assert torch.allclose(theta(model), sum(members) / 16, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ensemble": 2**40}, "ensemble must be at most 1024"),
        ({"projection": "trajectory"}, "needs a subspace file"),
        ({"subspace": "x"}, "no other takes one"),
        ({"embed_subspace": True}, "embed_subspace=True needs projection='trajectory'"),
        (
            {"projection": "trajectory", "subspace": "x", "target_modules": ["query"]},
            "target_modules=.* does not go with",
        ),
        (
            {"projection": "trajectory", "subspace": "x", "layers_to_transform": [0]},
            "layers_to_transform=.* does not go",
        ),
        ({"projection": "trajectory", "subspace": "x", "add_bias": True}, "add_bias=True does not go"),
        ({"ensemble": 0}, "ensemble must be at least 1"),
    ],
)
def test_invalid_options_raise_errors(options, words):
    with pytest.raises(ValueError, match=words):
        IntrinsicConfig(**options)


def test_packing_and_conversion_to_lora_raise_errors(tmp_path):
    model = attach("bert", make_subspace("bert", tmp_path))
    with pytest.raises(ValueError, match="projection='trajectory'"):
        compress(model)
    with pytest.raises(ValueError, match="A LoRA cannot represent"):
        convert_to_lora(model)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_output(tmp_path):
    model = attach("bert", make_subspace("bert", tmp_path))
    set_theta(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(evaluate(compiled, "bert"), evaluate(model, "bert"), **CLOSE)
    torch.compiler.reset()
    assert np.isfinite(theta(model).detach().numpy()).all()
